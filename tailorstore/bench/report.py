"""What a measurement gives, and how it is shown. Pure data and text."""

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure beside what it is compared with."""

    what: str
    ours: float
    unit: str
    against: str = ""
    """What it is compared with."""
    theirs: float | None = None
    target: float | None = None
    """Largest ratio, or with nothing to compare, largest figure, that was aimed at."""
    at_least: bool = False
    """The target is a smallest figure instead."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over theirs."""
        return None if self.theirs is None else self.ours / self.theirs

    @property
    def reached(self) -> bool | None:
        """Whether the target was reached; ``None`` where there is none."""
        if self.target is None:
            return None
        value = self.ours if self.ratio is None else self.ratio
        return value >= self.target if self.at_least else value <= self.target

    def as_json(self) -> dict[str, Any]:
        """Return the row for programs."""
        return asdict(self) | {"ratio": self.ratio, "reached": self.reached}


def interleaved(runs: dict[str, Callable[[], float]], repeat: int) -> dict[str, float]:
    """Run every measurement ``repeat`` times in turns, so that drift of the machine meets all; return medians."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(values) for name, values in found.items()}


def show(rows: Sequence[Row], title: str, console: Console | None = None) -> None:
    """Print a table of rows."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name, justify in (
        ("what", "left"),
        ("tailorstore", "right"),
        ("compared with", "left"),
        ("it takes", "right"),
        ("ratio", "right"),
        ("target", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        mark = {True: "[green]reached", False: "[red]missed", None: ""}[row.reached]
        sign = "≥" if row.at_least else "≤"
        unit = "×" if row.theirs is not None else f" {row.unit}"
        table.add_row(
            row.what,
            _figure(row.ours, row.unit),
            row.against,
            "" if row.theirs is None else _figure(row.theirs, row.unit),
            "" if row.ratio is None else f"{row.ratio:.2f}×",
            "" if row.target is None else f"{sign} {row.target:g}{unit}",
            mark + (f" {row.note}" if row.note else ""),
        )
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=200)  # a table that is kept in a file should not be cut to 80 columns
    console.print(table)


def machine() -> str:
    """Say on what is measured."""
    versions = f"Python {platform.python_version()}, torch {version('torch')}"
    return f"{os.cpu_count()} cores, {versions}, {platform.system()} {platform.release()}"


def _figure(value: float, unit: str) -> str:
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"
