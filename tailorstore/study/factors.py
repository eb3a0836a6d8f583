"""Where each factor of the bytes comes from: the same states, stored in one way more thrifty than the other.

Nothing is computed from bits and shapes: each row is what was really written over a whole run.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import tailorstore as ts
from tailorstore.study.contenders import Contender
from tailorstore.study.fullrun import FullRun, Say, manifest_bytes

_CODEC = "zstd"


@dataclass(frozen=True, slots=True)
class Row:
    """One way of storing all states of a run, each row thriftier than the one before."""

    what: str
    bytes_written: int
    """Over all commits."""


def measure_factors(run: FullRun, selection: str, light: Contender, scratch: Path, *, say: Say) -> list[Row]:
    """Store a run's states in every way.

    Args:
        run: is trained first, as far as it has not been.
        selection: strategy that writes full versions only.
        light: strategy and bits of light versions.
        scratch: where the stores are made; they are removed at the end.
        say: is told what is going on.
    """
    ways = {
        "zstd": Contender("all()", codec=_CODEC),
        "selection": Contender(selection, codec=_CODEC),
        "light": Contender(light.strategy, light.bits, _CODEC),
    }
    mixed = run.plan.precision == "mixed"
    if mixed:
        ways["weights"] = ways["light"]
    totals = dict.fromkeys(ways, 0)
    plain = unchanged = torch_save = 0
    say(f"{run.plan.name}: storing every state in {len(ways) + 1} ways")
    try:
        with ExitStack() as stack:
            stores = {
                name: stack.enter_context(ts.open_store(scratch / name, **way.options())) for name, way in ways.items()
            }
            for point in run.points(say):
                model, optim = run.trainer.state()
                torch_save += run.trainer.torch_save_bytes()
                plain += point.bytes_full
                unchanged += point.bytes_unchanged
                for name, way in ways.items():
                    commit = stores[name].commit(
                        point.step, model, optim if name != "weights" else None, mask=way.mask(None)
                    )
                    totals[name] += commit.bytes_written + manifest_bytes(scratch / name, commit)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    rows = [
        Row("a torch.save file at every commit", torch_save),
        Row("full commits, every layer written", plain + unchanged),
        Row("unchanged layers not written again", plain),
        Row(f"codec {_CODEC}", totals["zstd"]),
        Row(f"selection: `{selection}`", totals["selection"]),
    ]
    if mixed:
        # The same weights without a master to be derived from: what a store of nothing else takes for them.
        rows.append(Row(f"light versions: `{light.text}`", totals["light"] + totals["weights"]))
        return [*rows, Row("bfloat16 weights derived from their masters", totals["light"])]
    return [*rows, Row(f"light versions instead: `{light.text}`", totals["light"])]


def factors_table(rows: Sequence[Row], title: str) -> str:
    """Return the rows as Markdown, each with its factor over the row before."""
    lines = [
        f"# {title}: where each factor comes from",
        "",
        "| | bytes | factor | in all |",
        "|---|--:|--:|--:|",
    ]
    before = rows[0]
    for row in rows:
        factor = before.bytes_written / row.bytes_written
        total = rows[0].bytes_written / row.bytes_written
        lines.append(f"| {row.what} | {row.bytes_written:,} | {factor:.2f}× | {total:.2f}× |")
        before = row
    return "\n".join([*lines, ""])
