"""Sends SIGINT and SIGTERM to processes in the midst of their work on a store, and looks at how they leave it.

Signals are sent by the process to itself at the n-th of its calls (see :mod:`tests.crash.fuse`), for n = 1, 2, …, so
that none of its moments is missed; and from outside, at moments drawn by chance, to one whose storage is slow.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from sqlalchemy import func, select

import tailorstore as ts
from tailorstore.catalog.tables import leases, pending
from tailorstore.cli.main import cli
from tailorstore.storage import local
from tests.crash.campaign import SchemaPress
from tests.crash.content import NOW, check_composites, check_whole, commit, weights
from tests.crash.fuse import NEVER, End, Fuse, in_child, wire
from tests.crash.places import Place, Servers, prepared
from tests.kit.audit import assert_root_is_exact, let_claims_lapse
from tests.kit.models import assert_same

INT, TERM = signal.SIGINT, signal.SIGTERM


@dataclass(slots=True)
class InterruptReport:
    """What one kind of interrupt has shown."""

    case: str
    points: int = 0
    """Moments at which a process was interrupted."""
    slowest_seconds: float = 0.0
    """From the signal to the end of the process, where it was sent from outside to one that waits for its commit."""
    published: int = 0
    """Times at which the commit was published all the same."""
    outputs: list[str] = field(default_factory=list)
    """What the command line printed, where it differed."""
    failures: list[str] = field(default_factory=list)


# --- What is interrupted -------------------------------------------------------------------------------------------


def commits(place: Place, fuse: Fuse, *, block: bool, goes_on: bool) -> None:
    """Commit; where the trainer ``goes_on`` it takes the interrupt, and commits again in the same process."""
    with place.open() as store:
        fuse.arm()
        try:
            commit(store, 30, block=block)
        except KeyboardInterrupt:
            if not goes_on:
                raise
        if goes_on:
            commit(store, 40, block=block)


def raises_system_exit(place: Place, fuse: Fuse) -> None:
    """Commit, in a trainer that turns SIGTERM into an orderly end."""
    signal.signal(TERM, lambda *_: sys.exit(143))
    commits(place, fuse, block=True, goes_on=False)


def commands(arguments: Sequence[str]) -> Callable[[Place, Fuse], None]:
    """Return what runs a command line, and keeps what it prints in the file ``said``."""

    def run(place: Place, fuse: Fuse) -> None:
        said = os.open(place.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        fuse.arm()
        cli(["--store", place.root, *(one.format(folder=place.folder) for one in arguments)], "tailorstore")

    return run


@contextlib.contextmanager
def _leaving(expected: int | None) -> Iterator[None]:
    """Fail unless what is done ends as by a signal that it did not take itself; ``None``: it goes on."""
    code: object = None
    try:
        yield
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leaving:
        code = leaving.code
    # As the interpreter does before it ends.
    threading._shutdown()  # type: ignore[attr-defined]
    if code not in (expected, None, 0):  # what ended, or went on, before it was interrupted
        raise AssertionError(f"left with {code}, not {expected}")


@dataclass(frozen=True, slots=True)
class Case:
    """Something to interrupt."""

    work: Callable[[Place, Fuse], None]
    strikes: tuple[signal.Signals, ...]
    code: int | None
    """Exit code; ``None``: of a process that the signal ends."""
    check: Callable[[Place, bool, bool], bool]
    """Looks at what is left, given whether the process was interrupted but once, and whether it had begun to publish;
    tells whether it did."""
    every: int = 1
    """Points: every so many-th call."""


def check_left(place: Place, once: bool, sealed: bool) -> bool:
    """Fail unless a commit has gone or is published, its claim is given up, and what it wrote is gone.

    From the manifest on nothing is deleted: that is left to GC. So it is after a second interrupt.
    """
    with place.open(create=False) as store:
        steps = check_composites(store)
        assert steps in ([20, 10], [30, 20, 10], [40, 20, 10], [40, 30, 20, 10]), steps
        if once:
            assert_no_claims(store)
            if not sealed:
                assert_root_is_exact(store)
        check_whole(store)
    return 30 in steps


def check_dead(place: Place, once: bool, sealed: bool) -> bool:
    """Fail unless what a process without a handler leaves is swept as after any crash."""
    return check_left(place, not once, sealed)


def check_commanded(place: Place, once: bool, _: bool) -> bool:
    """Fail unless a command has given its lease back, left no half of a file, and the store as good as before."""
    exported = {path.name for path in place.folder.iterdir()} - {"root"}
    assert exported <= {"out.safetensors"}, exported
    if exported:
        assert_same(load_file(place.folder / "out.safetensors"), weights(10))
    with place.open(create=False) as store:
        if once:
            assert_no_claims(store)
        assert [one.step for one in store.log()] in ([20, 10], [20])
        check_whole(store)
    return False


def assert_no_claims(store: ts.Store) -> None:
    """Fail if anybody is known to commit or read."""

    def count(connection: Any) -> list[int]:
        return [connection.scalar(select(func.count()).select_from(table)) for table in (pending, leases)]

    found = store._catalog._database.read(count)
    assert found == [0, 0], f"{found} claims of commits and readers are left"


def _commits(*, block: bool, goes_on: bool = False) -> Callable[[Place, Fuse], None]:
    return lambda place, fuse: commits(place, fuse, block=block, goes_on=goes_on)


CASES: Final[dict[str, Case]] = {
    "commit": Case(_commits(block=True), (INT,), 130, check_left),
    "commit behind": Case(_commits(block=False), (INT,), 130, check_left, 2),
    "commit, twice": Case(_commits(block=True), (INT, INT), 130, check_left, 2),
    "commit behind, twice": Case(_commits(block=False), (INT, INT), 130, check_left, 4),
    "commit, goes on": Case(_commits(block=True, goes_on=True), (INT,), 130, check_left, 3),
    "commit behind, goes on": Case(_commits(block=False, goes_on=True), (INT,), 130, check_left, 3),
    "commit, SystemExit": Case(raises_system_exit, (TERM,), 143, check_left, 4),
    "commit, SIGTERM": Case(_commits(block=True), (TERM,), None, check_dead, 8),
    **{
        f"{arguments[0]}, {strike.name}": Case(commands(arguments), (strike,), 128 + strike, check_commanded, 5)
        for arguments in (
            ["gc", "--keep-last", "1", "--grace", "0s"],
            ["verify"],
            ["checkout", "10", "--to", "{folder}/out.safetensors"],
        )
        for strike in (INT, TERM)
    },
}


# --- At every call ---------------------------------------------------------------------------------------------------


def prepare(place: Place) -> None:
    """Make a store with two commits."""
    with place.open() as store:
        commit(store, 10)
        commit(store, 20)


def strike(case: Case, place: Place, at: int) -> End:
    """Interrupt a process at one of its calls."""

    def wired(fuse: Fuse) -> None:
        wire(fuse)
        with _leaving(case.code):
            case.work(place, fuse)

    return in_child(wired, at, case.strikes)


def at_every_call(name: str, folder: Path, every: int) -> InterruptReport:
    """Interrupt a case at its calls, every so many-th of them."""
    case = CASES[name]
    report = InterruptReport(name)
    with prepared(folder, Servers(), prepare) as fresh:
        calls = len(strike(case, fresh(), NEVER).calls)
        for at in range(1, calls + 1, case.every * every):
            place = fresh()
            end = strike(case, place, at)
            report.points += 1
            # A process without a handler is ended by the signal, and that is no error of its own.
            error = "" if case.check is check_dead and "wait status" in end.error else end.error
            said = place.folder / "said"
            if said.exists():
                output = said.read_text()
                report.outputs += [output] if output not in report.outputs else []
                said.unlink()
            if not error:
                found: list[bool] = []
                once, sealed = len(case.strikes) == 1, "confirm" in end.calls[: at - 1]
                with _shared(found) as tell:
                    error = in_child(lambda _: tell(case.check(place, once, sealed))).error  # noqa: B023
                report.published += sum(found)
            if error:
                report.failures.append(f"{name}, interrupted at call {at} ({end.calls[at - 1 : at + 2]}):\n{error}")
    return report


@contextlib.contextmanager
def _shared(found: list[bool]) -> Iterator[Callable[[bool], object]]:
    """Give what a child tells this process by."""
    reading, writing = os.pipe()
    yield lambda value: os.write(writing, b"1" if value else b"0")
    os.close(writing)
    found += [one == ord("1") for one in os.read(reading, 100)]
    os.close(reading)


# --- From outside ----------------------------------------------------------------------------------------------------


def wide(step: int, layers: int = 400) -> dict[str, torch.Tensor]:
    """Return a model of many layers: with 400, more than slow storage takes in half a minute."""
    return {f"m.{number}.w": torch.full((50,), float(step)) for number in range(layers)}


def slow_storage(seconds: float) -> None:
    """Make every put of a local store take its time."""
    put = local.LocalObjects.put

    def slow(self: local.LocalObjects, *args: Any) -> int:
        time.sleep(seconds)
        return put(self, *args)

    local.LocalObjects.put = slow  # type: ignore[method-assign,assignment]


def from_outside(folder: Path, moments: int) -> InterruptReport:
    """Interrupt commits of many layers to slow storage, by several threads, at moments drawn by chance.

    Those behind are of fewer layers: they are finished before the process ends.
    """
    report = InterruptReport("from outside")
    dice = random.Random(0)
    with prepared(folder, Servers(), lambda place: place.open().close()) as fresh:
        for number in range(moments):
            place = fresh()
            block = bool(number % 2)
            ready, told = os.pipe()
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    slow_storage(0.1)
                    with _leaving(130), place.open() as store:
                        os.write(told, b".")
                        if block:
                            store.commit(2, wide(2))
                        else:
                            store.commit(2, wide(2, layers=20), block=False).result()
                    status = 0
                finally:
                    os._exit(status)
            os.read(ready, 1)
            time.sleep(dice.random() * 1.5)
            began = time.monotonic()
            os.kill(child, INT)
            # Once more, while it cleans up, in every third.
            if number % 3 == 2:
                time.sleep(dice.random() * 0.2)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, INT)
            _, ended = os.waitpid(child, 0)
            if block:
                report.slowest_seconds = max(report.slowest_seconds, time.monotonic() - began)
            report.points += 1
            os.close(ready)
            os.close(told)
            error = f"wait status {ended}" if ended else ""
            error = error or in_child(lambda _: check_wide(place, behind=not block, once=number % 3 != 2)).error  # noqa: B023
            if error:
                report.failures.append(f"block={block}, moment {number}:\n{error}")
    return report


def check_wide(place: Place, *, behind: bool, once: bool) -> None:
    """Fail unless an interrupted commit is gone with all that it wrote, or, one behind, was finished at the end."""
    with place.open(create=False) as store:
        published = [branch.step for branch in store.branches()]
        assert published in ([], [2] if behind else []), published
        if published:
            with store.checkout(2) as checkpoint:
                assert_same(checkpoint.model_state_dict(), wide(2, layers=20))
        if once:
            assert_no_claims(store)
            assert_root_is_exact(store)
        let_claims_lapse(store)
        store.gc(grace=NOW)
        assert_root_is_exact(store)
        assert store.verify().ok


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.interrupts", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="a share of the calls: every so many-th")
    parser.add_argument("--moments", type=int, default=30, help="interrupts from outside")
    parser.add_argument("--case", choices=list(CASES), action="append", help="default: all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("tailorstore").setLevel(logging.CRITICAL)
    gc.freeze()
    # Whoever started this program may have told it to ignore what it is about.
    signal.signal(INT, signal.default_int_handler)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    reports = []
    with tempfile.TemporaryDirectory(prefix="ts-interrupts-", dir=memory) as name, SchemaPress(Path(name)).used():
        for number, case in enumerate(arguments.case or CASES):
            folder = Path(name, str(number))
            folder.mkdir()
            reports.append(at_every_call(case, folder, arguments.every))
        if arguments.moments:
            folder = Path(name, "outside")
            folder.mkdir()
            reports.append(from_outside(folder, arguments.moments))
    if arguments.json:
        print(json.dumps([asdict(report) for report in reports]))  # noqa: T201
        return 0
    for report in reports:
        print(  # noqa: T201
            f"interrupted, {report.case}: {report.points} points, {report.published} of them published,"
            f" {len(report.failures)} failures"
        )
    failures = [failure for report in reports for failure in report.failures]
    for failure in failures:
        print(failure)  # noqa: T201
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
