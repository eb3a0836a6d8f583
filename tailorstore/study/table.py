"""The results as a Markdown table; every number in it stands in the results."""

from collections.abc import Sequence
from pathlib import Path

from tailorstore.study.contenders import NUDGED
from tailorstore.study.results import Mean, Record, Summary, summarise

_HEAD = (
    "strategy",
    "bytes / full",
    "times fewer",
    "oldest layer, commits",
    "mean age, commits",
    "loss at restore, %",
    "after {resume} steps, %",
    "farthest from 0, %",
)


def write_table(path: Path, records: Sequence[Record]) -> None:
    """Write the table of one task, size and optimizer; ``records`` are all of these."""
    path.write_text(table(records))


def table(records: Sequence[Record]) -> str:
    """Return the table with a paragraph that says what was done."""
    first = records[0]
    plan = first.plan
    seeds = len({record.plan.seed for record in records})
    full = sum(first.bytes_full)
    looked_at = ", ".join(str(number + 1) for number in plan.evaluated())
    notes = (
        f"{first.parameters / 1e6:.2f} M parameters in {first.layers} layers, {plan.commits} commits {plan.every} steps"
        f" apart, {seeds} seed{'s' * (seeds != 1)}. Full commits write {full / 1e6:.1f} MB in all, torch.save files of"
        f" the same states {first.bytes_torch * plan.commits / 1e6:.1f} MB. Composites were looked at after commits"
        f" {looked_at} of each run. Loss: held-out loss above the full checkpoint's, as restored and after both were"
        " trained on with the same batches; mean ± standard error over all looks, and the look of either that is"
        f" farthest from 0. Bytes: everything in storage but the catalog, over all commits. `{NUDGED}`: the full"
        " checkpoint with every weight moved by one unit in the last place, which shows what chance does."
    )
    lines = [
        f"# {plan.task}, {plan.size}, {plan.optimizer}",
        "",
        notes,
        "",
        "| " + " | ".join(_HEAD).format(resume=plan.resume) + " |",
        "|---|" + "--:|" * (len(_HEAD) - 1),
        *(f"| {' | '.join(_cells(summary))} |" for summary in summarise(records)),
        "",
    ]
    return "\n".join(lines)


def _cells(summary: Summary) -> list[str]:
    farthest = max(summary.restored.farthest, summary.resumed.farthest, key=abs)
    return [
        f"`{summary.contender}`",
        f"{summary.share:.4f}",
        f"{1 / summary.share:.1f}×",
        f"{summary.oldest:.0f}",
        f"{summary.mean_age:.1f}",
        _mean(summary.restored),
        _mean(summary.resumed),
        f"{farthest:+.3f}",
    ]


def _mean(mean: Mean) -> str:
    return f"{mean.value:+.3f} ± {mean.error:.3f}"
