"""``tailorstore strategies``: what there is to choose layers by, what a text means, and what it would write."""

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from tailorstore.cli.output import (
    Column,
    count,
    print_details,
    print_heading,
    print_json,
    print_line,
    print_note,
    print_table,
    share,
    size,
)
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.domain.names import natural
from tailorstore.domain.strategies import STRATEGIES, config_of, parse_strategy, signature_of

if TYPE_CHECKING:
    from tailorstore.engine.preview import Preview

LISTED = (Column("strategy", style="cyan"), Column("writes"))
PARTS = (Column("part", style="cyan"), Column("arguments"), Column("writes"))
PLANNED = (
    Column("layer", style="cyan"),
    Column("write", style="bold"),
    Column("bytes", right=True),
    Column("age after", right=True),
)


@make_command(
    "strategies",
    examples=[
        "tailorstore strategies",
        "tailorstore strategies \"budget(bytes_per_commit='2GB').max_age(commits=5)\"",
        'tailorstore strategies "top_k(8) | parity()" --store s3://bucket/run',
    ],
)
@click.argument("text", required=False)
def command(settings: Settings, text: str | None) -> None:
    """List the strategies for masks; check one, and show what it would write.

    A strategy chooses at each commit which layers it writes, in full or light. TEXT is one as a trainer, a config file
    or 'tailorstore demo --mask' takes it: a name with arguments, bounded by methods and joined by | (what either
    writes) or & (what both write). It is checked and explained.

    If a store is named, too, shows what the strategy would write at the next commit of the branch: an estimate
    from the catalog alone, in which every layer moves on as it did up to the newest commit.
    """
    if text is None:
        _list(settings)
        return
    strategy = parse_strategy(text)
    config = config_of(strategy)
    plan = None
    if settings.store:
        with settings.open() as store:
            from tailorstore.engine.preview import preview

            plan = preview(store, strategy, order=natural)
    if settings.json:
        print_json({"text": str(strategy), "config": config, "preview": plan})
        return
    print_details([("strategy", str(strategy))])
    print_line()
    print_table(
        PARTS, [[f"{'  ' * depth}{name}", arguments, _meaning(name)] for depth, name, arguments in _parts(config)]
    )
    if plan is not None:
        _print_preview(plan)


def _list(settings: Settings) -> None:
    listed = [{"name": name, "signature": signature_of(name), "writes": _meaning(name)} for name in STRATEGIES]
    if settings.json:
        print_json({"strategies": listed})
        return
    print_table(LISTED, [[one["signature"], one["writes"]] for one in listed])
    print_note("Join them by | and &, as in \"top_k(8, by='drift').max_age(commits=5) | parity()\".")


def _meaning(name: str) -> str:
    """Return the first sentence on a strategy."""
    return (inspect.getdoc(STRATEGIES[name]) or "").partition("\n\n")[0].replace("\n", " ").replace("``", "")


def _parts(config: dict[str, Any], depth: int = 0) -> Iterator[tuple[int, str, str]]:
    """Yield depth, name and arguments of a strategy and of those within it."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    arguments = [
        f"{name}={value!r}" for name, value in config.items() if name != "strategy" and not isinstance(value, dict)
    ]
    yield depth, str(config["strategy"]), ", ".join(arguments)
    for one in inner:
        yield from _parts(one, depth + 1)


def _print_preview(plan: "Preview") -> None:
    print_heading(f"The commit after step {plan.after_step} on {plan.branch}, by estimate")
    written = [layer for layer in plan.layers if layer.write]
    print_table(
        PLANNED,
        [
            [layer.layer, layer.write or "", size(layer.bytes) if layer.write else "", str(layer.age)]
            for layer in plan.layers
        ],
    )
    light = sum(layer.write == "light" for layer in written)
    of = f" ({light} of them light)" if light else ""
    print_line()
    print_line(
        f"It would write {len(written)} of {count(len(plan.layers), 'layer')}{of}, {size(plan.bytes)}:"
        f" {share(plan.bytes, plan.bytes_full)} of what all take in full."
    )
