"""Progress bars on stderr, for work that takes its time."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tailorstore.cli.output import make_console, print_note, size

_LINE_SECONDS = 30.0
"""Between two lines where there is no terminal."""

Tell = Callable[[str, int, int | None], None]


@contextmanager
def progress_bars() -> Iterator[Tell]:
    """Give a function that is told what is being done, how much is done and how much there is.

    On a terminal each kind of work gets a bar, which goes when all is done. Elsewhere a line now and then says that it
    goes on.
    """
    console = make_console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {}

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total, amount="")
            progress.update(tasks[what], completed=done, total=total, amount=amount(what, done, total))

        yield tell


def _lines() -> Tell:
    """Return a function that prints how far all work is, at most every half minute."""
    told_at, states, lock = time.monotonic(), {}, threading.Lock()

    def tell(what: str, done: int, total: int | None) -> None:
        nonlocal told_at
        with lock:
            states[what] = f"{what} {amount(what, done, total)}"
            if time.monotonic() - told_at >= _LINE_SECONDS:
                told_at = time.monotonic()
                print_note(", ".join(states.values()))

    return tell


def amount(what: str, done: int, total: int | None) -> str:
    """Return how far work is; what ends in "bytes" is counted in bytes.

    Examples:
        >>> amount("verifying bytes", 1_500_000, 6_000_000), amount("listing objects", 5000, None)
        ('1.50 MB/6.00 MB', '5,000/?')
    """
    written = size if what.endswith("bytes") else "{:,}".format
    return f"{written(done)}/{'?' if total is None else written(total)}"
