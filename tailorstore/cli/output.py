"""How answers look: tables for people, plain columns for pipes, one JSON document for programs."""

import json
import logging
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console

ID_SHOWN = 12
"""Digits of an id in tables: its second, and enough to tell apart what was made in that; refs may be cut so too."""

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_RECENT_DAYS = 60


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    right: bool = False
    """For numbers."""
    spare: bool = False
    """May be left out where the terminal is too narrow for all."""
    style: str = ""


def print_json(value: Any) -> None:  # noqa: ANN401
    """Print the one document of a call with ``--json``."""
    click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:  # noqa: ANN401
    """Turn records into what JSON can hold.

    Times become ISO texts, durations seconds, NaN and infinities the texts ``nan``, ``inf`` and ``-inf``.

    Examples:
        >>> plain({"loss": math.nan, "steps": (1, 2), "grace": timedelta(hours=1)})
        {'loss': 'nan', 'steps': [1, 2], 'grace': 3600.0}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        # Names of layers may hold halves of surrogate pairs, which no encoding can write.
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return value


def print_line(text: str = "", *, wrap: bool = True) -> None:
    """Print one line for people; ``wrap=False`` for what is to be copied."""
    click.echo(_fitted(shown(text), sys.stdout) if wrap else shown(text))


def print_note(text: str) -> None:
    """Print one line on stderr, where it does not get into what a pipe reads."""
    click.echo(_fitted(shown(text), sys.stderr), err=True)


@contextmanager
def without_warnings(naming: str) -> Iterator[None]:
    """Leave out what the library warns of with this text in it, while the block lasts: advice that is followed."""
    logger = logging.getLogger("tailorstore")

    def differs(record: logging.LogRecord) -> bool:
        return naming not in record.getMessage()

    logger.addFilter(differs)
    try:
        yield
    finally:
        logger.removeFilter(differs)


def print_error(text: str) -> None:
    """Print what went wrong on stderr."""
    lines = [
        _fitted(shown(line), sys.stderr, taken=len("Error: ") * (at == 0)) for at, line in enumerate(text.splitlines())
    ]
    click.echo(styled("Error:", "red") + " " + "\n".join(lines), err=True)


def _fitted(text: str, stream: TextIO, *, taken: int = 0, indent: int = 0) -> str:
    """Fold a text between words to a terminal's width; some of the first line is taken, the others are indented."""
    if not stream.isatty():
        return text
    # Letters, as blanks at the beginning of a line may be dropped.
    lines = textwrap.wrap(
        "x" * taken + text,
        shutil.get_terminal_size().columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines)[taken:]


def print_heading(text: str) -> None:
    """Print an empty line and a title."""
    click.echo("\n" + styled(shown(text)))


def print_details(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one pair a line."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        fitted = _fitted(shown(value), sys.stdout, taken=width + 2, indent=width + 2)
        click.echo(styled(f"{name:<{width}}") + f"  {fitted}")


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: framed and fitted on a terminal, aligned columns in full width elsewhere."""
    safe = [[shown(cell) for cell in row] for row in rows]
    console = make_console()
    if console.is_terminal:
        _print_framed(console, columns, safe)
        return
    from rich.cells import cell_len

    lines = [[column.title for column in columns], *[[cell or "-" for cell in row] for row in safe]]
    widths = [max(cell_len(line[at]) for line in lines) for at in range(len(columns))]
    for line in lines:
        cells = []
        for column, cell, width in zip(columns, line, widths, strict=True):
            gap = " " * (width - cell_len(cell))
            cells.append(gap + cell if column.right else cell + gap)
        click.echo("  ".join(cells).rstrip())


def _print_framed(console: "Console", columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    kept = list(range(len(columns)))

    def build() -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
        for at in kept:
            column = columns[at]
            table.add_column(
                column.title,
                justify="right" if column.right else "left",
                style=column.style,
                # Numbers are never cut; names are folded, so that they can still be read in full.
                no_wrap=column.right,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(Text(row[at]) for at in kept))
        return table

    table = build()
    spare = [at for at, column in enumerate(columns) if column.spare]
    unlimited = console.options.update(width=10_000)
    while spare and console.measure(table, options=unlimited).maximum > console.width:
        kept.remove(spare.pop())
        table = build()
    with console.capture() as captured:
        console.print(table)
    click.echo(captured.get(), nl=False, color=True)


def styled(text: str, color: str | None = None) -> str:
    """Return a text in bold, and in a colour unless NO_COLOR asks for none; click takes it off where it is piped."""
    return click.style(text, bold=True, fg=None if os.environ.get("NO_COLOR") else color)


def make_console(*, stderr: bool = False) -> "Console":
    """Return a console for one of the streams as they are now; rich looks at NO_COLOR, TERM and the width."""
    from rich.console import Console

    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False, markup=False, soft_wrap=False)


def shown(text: str) -> str:
    r"""Return a text in which nothing can move a terminal's cursor or break a line.

    Examples:
        >>> shown("layer\x1b[2J"), shown("Schicht-ß")
        ('layer\\x1b[2J', 'Schicht-ß')
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def size(count_bytes: float) -> str:
    """Return a size for people.

    Examples:
        >>> size(512), size(1536), size(43_200_000), size(112e9)
        ('512 B', '1.54 kB', '43.2 MB', '112 GB')
    """
    value = float(count_bytes)
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    # 999.5 would be rounded to 1000; three figures are enough.
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    digits = 0 if units[0] == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[0]}"


def share(part: float, whole: float) -> str:
    """Return a part of a whole in percent."""
    return f"{part / whole:.0%}" if whole else "-"


def ago(moment: datetime, now: datetime | None = None) -> str:
    """Return a time as its distance from now; a date where that is long ago.

    Examples:
        >>> noon = datetime(2026, 5, 1, 12, tzinfo=UTC)
        >>> ago(noon, noon), ago(noon - timedelta(minutes=5), noon), ago(noon - timedelta(days=400), noon)
        ('just now', '5 min ago', '2025-03-27')
    """
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    if seconds < 1:
        return "just now"
    if seconds < _MINUTE:
        return f"{seconds:.0f} s ago"
    if seconds < _HOUR:
        return f"{seconds // _MINUTE:.0f} min ago"
    if seconds < _DAY:
        return f"{seconds // _HOUR:.0f} h ago"
    if seconds < _RECENT_DAYS * _DAY:
        return f"{seconds // _DAY:.0f} d ago"
    return moment.date().isoformat()


def number(value: float) -> str:
    """Return a metric for people."""
    return f"{value:.4g}"


def metrics(values: Mapping[str, float]) -> str:
    """Return a commit's metrics in one line."""
    return "  ".join(f"{name}={number(value)}" for name, value in values.items())


def duration(length: timedelta) -> str:
    """Return a length of time for people.

    Examples:
        >>> duration(timedelta(hours=24)), duration(timedelta(days=7)), duration(timedelta(0))
        ('24 h', '7 d', '0 s')
    """
    seconds = length.total_seconds()
    for unit, unit_seconds in (("d", _DAY), ("h", _HOUR), ("min", _MINUTE)):
        if seconds >= unit_seconds * (2 if unit == "d" else 1) and seconds % unit_seconds == 0:
            return f"{seconds / unit_seconds:.0f} {unit}"
    return f"{seconds:g} s"


def count(amount: int, one: str, many: str | None = None) -> str:
    """Return an amount with its noun.

    Examples:
        >>> count(1, "layer"), count(1200, "layer"), count(2, "branch", "branches")
        ('1 layer', '1,200 layers', '2 branches')
    """
    return f"{amount:,} {one if amount == 1 else many or one + 's'}"
