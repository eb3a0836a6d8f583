"""``tailorstore demo``: the whole story, told while it happens."""

import contextlib
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailorstore.cli.commands import log, show
from tailorstore.cli.output import (
    Column,
    count,
    make_console,
    number,
    plain,
    print_details,
    print_heading,
    print_json,
    print_line,
    print_table,
    share,
    size,
)
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tailorstore.demo.story import DemoResult, Report


@make_command(
    "demo",
    examples=[
        "tailorstore demo",
        "tailorstore demo --to /tmp/demo --steps 400",
        'tailorstore demo --mask "staggered(8)"      # an eighth in full, the rest light',
    ],
)
@click.option(
    "--to",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("tailorstore-demo"),
    show_default="./tailorstore-demo",
    help="Where the store is made. The store of an earlier demo is replaced, anything else is not.",
)
@click.option("--steps", type=click.IntRange(min=1), help="How long to train.  [default: 240]")
@click.option("--quick", is_flag=True, help="A tiny model and few steps.")
@click.option(
    "--mask",
    metavar="TEXT",
    help="Which layers commits write; see 'tailorstore strategies'.  [default: a budget of bytes, a quarter of all]",
)
def command(settings: Settings, folder: Path, steps: int | None, quick: bool, mask: str | None) -> None:
    """Train, be killed in mid-commit, restore and train on, with what this machine has.

    Trains a small transformer on the sources of Python's standard library and commits a part of its layers at
    intervals. The process is killed with SIGKILL in the middle of a commit; a new one restores the newest composite
    and trains on. Takes about a minute and a half on two cores. The store stays on disk, to look around in.
    """
    from tailorstore.demo.story import demo_plan, prepare, run_demo

    plan = demo_plan(folder, steps=steps, quick=quick, mask=mask)
    prepare(folder)
    with _told(settings, plan.steps) as report:
        result = run_demo(folder, plan, report)
    if settings.json:
        print_json(plain(result))
    else:
        _print_result(result)


@contextlib.contextmanager
def _told(settings: Settings, steps: int) -> "Iterator[Report]":
    """Give a function that shows on stderr what happens: a bar on a terminal, and a line for each turn of the story."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = make_console(stderr=True)
    columns = (
        TextColumn("  training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    silent = settings.json
    with Progress(*columns, console=console, transient=True, disable=silent or not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps, loss="starting", start=True)

        def report(name: str, values: dict[str, Any]) -> None:
            if name == "step":
                progress.update(task, completed=values["step"], loss=f"loss {values['loss']:.2f}")
            elif name == "restored":
                progress.update(task, completed=values["step"], loss="restored")
            if not silent and (line := _line(name, values)):
                progress.console.print(line, soft_wrap=not console.is_terminal)

        yield report


def _line(name: str, values: dict[str, Any]) -> str:
    match name:
        case "training" if not values["step"]:
            parameters = f"{values['parameters'] / 1e6:.1f} million parameters"
            return (
                f"Training {parameters} under AdamW on {size(values['text_bytes'])} of Python's own library, in a"
                " process that commits and goes on."
            )
        case "killed":
            left = f"{count(values['objects'], 'object')}, {size(values['objects_bytes'])}"
            return (
                f"Killed it with SIGKILL in the middle of the commit of step {values['step']}: {left} written, nothing"
                f" published. The newest commit is step {values['head']}."
            )
        case "missed":
            return (
                f"The commit of step {values['step']} was published just before the kill; starting again for the next."
            )
        case "restored":
            return (
                f"A new process restored the composite of step {values['step']} (its oldest layer is from step"
                f" {values['oldest']}): model, optimizer, RNG states, scheduler, position in the data. Training on."
            )
    return ""


def _print_result(result: "DemoResult") -> None:
    crash, losses = result.crash, result.losses
    print_heading("Commits")
    print_table(log.COLUMNS, log.rows(result.commits, result.branches, ()))
    newest = result.commits[0]
    print_heading(f"Where the layers of step {newest.step} come from")
    print_table(show.COLUMNS, show.rows(result.layers))
    print_heading(f"Losses in nats a byte; training over steps {(crash.head or 0) + 1} to {crash.step}, done twice")
    print_table(
        (Column(""), Column("training", right=True), Column("held out", right=True)),
        [
            _losses(f"before the kill; held out at step {crash.head}", losses.before_kill, losses.held_out_committed),
            _losses("after the restart; held out as restored", losses.after_restart, losses.held_out_restored),
            _losses(f"at the end, step {newest.step}", newest.metrics["loss"], losses.held_out_end),
        ],
    )
    print_heading("Bytes")
    times_less = result.bytes_full / result.bytes_written
    leftovers = f"{count(result.leftovers, 'leftover')}, {size(result.leftovers_bytes)}"
    print_details(
        [
            ("mask", result.mask),
            ("written", f"{size(result.bytes_written)} in {count(len(result.commits), 'commit')}"),
            ("full saves", f"{size(result.bytes_full)} would have been written at the same steps"),
            ("ratio", f"{share(result.bytes_written, result.bytes_full)}, or {times_less:.1f} times less"),
            ("killed commit", f"gc would sweep {leftovers}, once the grace period is over"),
        ],
    )
    store, program = shlex.quote(result.store), shlex.quote(_program())
    print_heading(f"Look around: the store stays in {result.store} ({result.seconds:.0f} s in all)")
    for line in (
        f"{program} log --store {store}",
        f"{program} show {crash.head} --store {store}",
        f"{program} diff {crash.head} latest --store {store}",
        f"{program} heatmap --measure curvature --store {store}",
        f"{program} strategies {shlex.quote(result.mask)} --store {store}",
        f"{program} checkout latest --to model.safetensors --store {store}",
        f"{program} gc --keep-last 3 --keep-best held_out --dry-run --store {store}",
        f"{program} verify --store {store}",
    ):
        print_line(f"  {line}", wrap=False)
    if all(layer.fidelity == "full" for layer in result.layers):
        print_line()
        print_line(f"With light versions no layer is left behind: {program} demo --mask 'staggered(8)'", wrap=False)


def _program() -> str:
    """Return how this program can be called again: by its name, or by its path where that is not enough."""
    if shutil.which("tailorstore") is not None:
        return "tailorstore"
    beside = Path(sys.executable).parent / "tailorstore"
    with contextlib.suppress(ValueError):
        beside = beside.relative_to(Path.cwd())
    return str(beside)


def _losses(when: str, training: float, held_out: float) -> list[str]:
    return [when, number(training), number(held_out)]
