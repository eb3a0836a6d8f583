"""``tailorstore heatmap``: draw how the layers moved, commit by commit."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tailorstore.cli.drawing import DAMAGED, RAMP, Heatmap, Scale, color_of, figure, hex_of, scale_of, step_marks, svg
from tailorstore.cli.output import count, make_console, print_json, print_line, shown
from tailorstore.cli.settings import Settings
from tailorstore.cli.settings import command as make_command
from tailorstore.domain.errors import AlreadyExistsError
from tailorstore.domain.records import MEASURES

if TYPE_CHECKING:
    from rich.text import Text

    from tailorstore.engine.updates import Updates

_COMMITS = 200
_WIDEST = 4
"""Columns of a cell, where there is room."""
_STRIP = 24
"""Columns of the legend's strip, where there is room."""


@make_command(
    "heatmap",
    examples=[
        "tailorstore heatmap",
        "tailorstore heatmap --measure curvature --limit 50",
        "tailorstore heatmap --measure gradient --output gradient.svg",
        "tailorstore heatmap --json",
    ],
)
@click.option(
    "--measure", type=click.Choice(MEASURES), default="drift", help="Which measure to draw.  [default: drift]"
)
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=0),
    help=f"How many of the newest commits; 0 for all.  [default: {_COMMITS} in a picture, all with --json]",
)
@click.option("--linear", is_flag=True, help="Colours from zero in equal steps, instead of a logarithmic scale.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Draw into this .svg file.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def command(
    settings: Settings, measure: str, limit: int | None, linear: bool, output: Path | None, overwrite: bool
) -> None:
    """Draw how much each layer had moved at each commit.

    A row is a layer, a column a commit; what is drawn was measured just before the commit wrote.

    drift: change of the weights since the layer's own last saved version, as an L2 norm; relative_drift: the same
    over the norm of the weights; momentum: the step that the optimizer is making; gradient: the gradient's norm since
    the commit before; curvature: second moment times squared change.

    A blank has no figure: there was no saved version to be compared with, the optimizer lacks what is needed, or
    gradients were not watched. "!" stands for a layer that held NaN or infinities.
    """
    if output is not None and output.suffix.lower() != ".svg":
        msg = f"--output {output}: pictures are drawn as SVG; give a name that ends in .svg"
        raise click.UsageError(msg)
    if overwrite and output is None:
        msg = "--overwrite goes with --output PATH"
        raise click.UsageError(msg)
    if limit is None:
        limit = 0 if settings.json else _COMMITS
    with settings.open() as store:
        updates = store.updates(limit=limit or None)
        branch = store.branch_name
    if output is not None:
        _write(_heatmap(updates, branch, measure, linear=linear), output, overwrite=overwrite)
    if settings.json:
        document = _document(updates, branch, measure)
        print_json(document if output is None else {**document, "path": str(output)})
    elif output is None:
        _print(_heatmap(updates, branch, measure, linear=linear))
    else:
        steps = count(len(updates.steps), "commit")
        print_line(f"Drew {measure} of {count(len(updates.layers), 'layer')} at {steps} into {output}.")


def _heatmap(updates: "Updates", branch: str, measure: str, *, linear: bool) -> Heatmap:
    rows = zip(updates.of(measure).T.tolist(), updates.finite.T.tolist(), strict=True)
    cells = tuple(
        tuple(value if fine else math.inf for value, fine in zip(figures, finite, strict=True))
        for figures, finite in rows
    )
    scale = scale_of((value for row in cells for value in row), linear=linear)
    steps = tuple(updates.steps.tolist())
    title = f"{measure} on {branch}, {count(len(steps), 'commit')}"
    return Heatmap(title, updates.layers, steps, cells, scale)


def _document(updates: "Updates", branch: str, measure: str) -> dict[str, object]:
    return {
        "branch": branch,
        "measure": measure,
        "steps": updates.steps.tolist(),
        "layers": list(updates.layers),
        "values": [[None if math.isnan(value) else value for value in row] for row in updates.of(measure).tolist()],
        "finite": updates.finite.tolist(),
    }


def _write(heatmap: Heatmap, path: Path, *, overwrite: bool) -> None:
    try:
        with path.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(svg(heatmap))
    except FileExistsError:
        msg = f"{path} exists already; choose another name, or replace it with --overwrite"
        raise AlreadyExistsError(msg) from None
    except OSError as error:
        raise click.FileError(str(path), error.strerror) from error


# --- On a terminal, and in a pipe ----------------------------------------------------------------------------------


def _print(heatmap: Heatmap) -> None:
    console = make_console()
    colored = console.is_terminal and not console.no_color and console.color_system in ("256", "truecolor", "windows")
    if not heatmap.layers:
        print_line(f"{heatmap.title}: nothing was measured at these commits.")
        return
    with console.capture() as captured:
        for line in _lines(heatmap, console.width if console.is_terminal else None, colored=colored):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
    print_line(heatmap.title)
    click.echo(captured.get(), nl=False, color=console.is_terminal)
    if heatmap.has_blanks:
        print_line("A blank has no figure: nothing to compare with, or nothing to measure it by.")
    if heatmap.has_damage:
        print_line(f"{DAMAGED} stands for NaN or infinities in the layer.")


def _lines(heatmap: Heatmap, width: int | None, *, colored: bool) -> list["Text"]:
    """Return the picture and its legend, fitted to a terminal's width, or in full for a pipe."""
    from rich.cells import cell_len
    from rich.text import Text

    names = [shown(name) for name in heatmap.layers]
    margin = max(len("step"), *map(cell_len, names))
    room = None
    drawn, wide = heatmap, 1
    if width is not None:
        margin = min(margin, width // 3)
        room = width - margin - 2
        drawn = heatmap.thinned(room)
        wide = max(1, min(_WIDEST, room // len(drawn.steps)))
    lines = [Text()]
    for name, row in zip(names, drawn.cells, strict=True):
        cut = _shortened(name, margin)
        line = Text(" " * (margin - cell_len(cut)) + cut + "  ")
        for value in row:
            line.append_text(_cell(drawn.scale, value, wide, colored=colored))
        lines.append(line)
    lines += [Text("step".rjust(margin) + "  " + _axis(drawn, wide, room)), Text()]
    lines.append(_legend(drawn.scale, width, colored=colored))
    if len(drawn.steps) < len(heatmap.steps):
        lines.append(Text(f"{len(drawn.steps)} of {len(heatmap.steps)} commits are drawn."))
    if width is None:
        for line in lines:
            line.rstrip()
    return lines


def _shortened(name: str, width: int) -> str:
    """Cut a name at its beginning: what tells layers apart stands at the end."""
    from rich.cells import cell_len

    if cell_len(name) <= width:
        return name
    while cell_len(name) > width - 1:
        name = name[1:]
    return "…" + name


def _cell(scale: Scale, value: float, wide: int, *, colored: bool) -> "Text":
    from rich.text import Text

    if math.isnan(value):
        return Text(" " * wide)
    if math.isinf(value):
        return Text(DAMAGED * wide, style="bold red")
    return _shade(scale.level(value), wide, colored=colored)


def _shade(level: float, wide: int, *, colored: bool) -> "Text":
    from rich.text import Text

    if colored:
        return Text(" " * wide, style=f"on {hex_of(color_of(level))}")
    return Text(RAMP[round(level * (len(RAMP) - 1))] * wide)


def _axis(heatmap: Heatmap, wide: int, room: int | None) -> str:
    line = ""
    for at, text in step_marks(heatmap.steps, wide):
        if room is None or at * wide + len(text) <= room:
            line = line.ljust(at * wide) + text
    return line


def _legend(scale: Scale, width: int | None, *, colored: bool) -> "Text":
    from rich.text import Text

    line = Text(figure(scale.low) + " ")
    end = f" {figure(scale.high)}  ({'log' if scale.log else 'linear'} scale)"
    strip = _STRIP if width is None else max(2, min(_STRIP, width - len(line) - len(end)))
    for at in range(strip):
        line.append_text(_shade(at / (strip - 1), 1, colored=colored))
    return line.append(end)
