"""Progress bars on stderr, for work that takes its time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tailorstore.cli.output import make_console

Tell = Callable[[str, int, int | None], None]


@contextmanager
def progress_bars() -> Iterator[Tell]:
    """Give a function that is told what is being done, how much is done and how much there is.

    On a terminal each kind of work gets a bar, which goes when all is done. Elsewhere nothing is shown: a log file
    gains nothing from it.
    """
    console = make_console(stderr=True)
    if not console.is_terminal:
        yield lambda *_: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {}

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield tell
