"""``tailorstore study``: what composites cost in quality per byte written, measured on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailorstore.cli.output import Column, print_heading, print_json, print_line, print_note, print_table, size
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.study.plan import EVERY, OPTIMIZERS, PRECISIONS, RESUME, SIZES, TASKS, Plan

COLUMNS = (
    Column("contender"),
    Column("bytes", right=True),
    Column("oldest", right=True, spare=True),
    Column("at restore, %", right=True),
    Column("resumed, %", right=True),
)

if TYPE_CHECKING:
    from tailorstore.study.factors import Row

_FOLDER = click.Path(path_type=Path, file_okay=False)


@make_command(
    "study",
    examples=[
        "tailorstore study --task pretrain --optimizer adamw --seeds 3 --out study",
        'tailorstore study --task vision --strategy "filter(first=2, last=2, every=5)" --strategy "light() @ 4/3"',
    ],
)
@click.option("--task", type=click.Choice(TASKS), default="pretrain", show_default=True, help="What to train.")
@click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", show_default=True, help="What to train it with."
)
@click.option(
    "--size",
    "model_size",
    type=click.Choice(SIZES),
    default="small",
    show_default=True,
    help="Of the model; 300m wants a GPU.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="How many runs.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="float32",
    show_default=True,
    help="Of states; mixed: bfloat16 weights with float32 masters, 14 bytes a parameter under AdamW.",
)
@click.option("--freeze", metavar="GLOB", multiple=True, help="Parameters that are not trained; may be repeated.")
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    metavar="TEXT",
    help="What to lead along the runs: STRATEGY [@ WEIGHTS/SLOTS] [+ CODEC], with the bits of light versions, such as"
    " 'light() @ 4/3'; may be repeated. Default: some twenty.",
)
@click.option("--commits", type=click.IntRange(min=1), default=50, show_default=True, help="In each run.")
@click.option("--every", type=click.IntRange(min=1), help="Steps between commits.  [default: 10; finetune: 4]")
@click.option(
    "--evaluations",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="At how many commits of a run composites are restored and trained on.",
)
@click.option(
    "--resume", type=click.IntRange(min=1), help="How many steps they are trained on.  [default: 20; finetune: 10]"
)
@click.option(
    "--out", type=_FOLDER, default=Path("study"), show_default="./study", help="For results, tables and pictures."
)
@click.option("--work", type=_FOLDER, show_default="OUT/runs", help="For the runs, stored in full at every commit.")
@click.option("--discard", is_flag=True, help="Keep no states of a run and train anew for each pass: for large models.")
@click.option("--factors", is_flag=True, help="Only find out where each factor of the bytes comes from; one run.")
@click.option("--draw-only", is_flag=True, help="Draw what is known, run nothing.")
def command(
    settings: Settings,
    task: str,
    optimizer: str,
    model_size: str,
    seeds: int,
    precision: str,
    freeze: tuple[str, ...],
    strategies: tuple[str, ...],
    commits: int,
    every: int | None,
    evaluations: int,
    resume: int | None,
    out: Path,
    work: Path | None,
    discard: bool,
    factors: bool,
    draw_only: bool,
) -> None:
    """Measure what strategies cost in quality per byte.

    Trains a model, stores it in full at every commit, and leads every strategy along: each full state is committed
    to the strategy's own store under its mask. At some commits the composite is restored; its held-out loss, and the
    loss after training on, are compared with the full checkpoint's. Writes results.jsonl, and a table and a picture
    for each task, size and optimizer. Interrupted, it goes on where it was; strategies can be added later.
    """
    from tailorstore.study.contenders import default_contenders
    from tailorstore.study.study import draw_results, make_folders, run_factors, run_study

    plan = Plan(
        task,
        optimizer,
        model_size,
        commits=commits,
        every=every or EVERY[task],
        evaluations=evaluations,
        resume=resume or RESUME[task],
        precision=precision,
        freeze=",".join(freeze),
    )
    with make_folders(out, work) as folders:
        if factors:
            _print_factors(settings, *run_factors(plan, folders, keep=not discard, say=print_note))
            return
        if not draw_only:
            run_study(
                plan,
                range(seeds),
                strategies or default_contenders(task),
                folders,
                keep=not discard,
                say=print_note,
            )
        summaries, written = draw_results(plan, folders)
    if settings.json:
        print_json({"written": [str(path) for path in written], "contenders": summaries})
        return
    print_heading(f"{plan.group}: bytes relative to full commits; loss above the full checkpoint's")
    print_table(
        COLUMNS,
        [
            [
                summary.contender,
                f"{summary.share:.4f}",
                f"{summary.oldest:.0f}",
                f"{summary.restored.value:+.3f} ± {summary.restored.error:.3f}",
                f"{summary.resumed.value:+.3f} ± {summary.resumed.error:.3f}",
            ]
            for summary in summaries
        ],
    )
    for path in written:
        print_line(f"  {path}", wrap=False)


def _print_factors(settings: Settings, rows: "list[Row]", path: Path) -> None:
    if settings.json:
        print_json({"written": [str(path)], "rows": rows})
        return
    first = rows[0].bytes_written
    print_table(
        (Column(""), Column("bytes", right=True), Column("times fewer", right=True)),
        [[row.what, size(row.bytes_written), f"{first / row.bytes_written:.2f}"] for row in rows],
    )
    print_line(f"  {path}", wrap=False)
