"""Actors in threads of one process, of which one at a time goes on: a seed, or a list, decides which.

An actor gives its turn up before each call to storage and before each transaction; a listing also between its pages,
and a deletion between the folders that it empties. Nothing else of what one process does can be seen by another, so
whatever several processes could do to each other is some order of these calls.
"""

import contextlib
import itertools
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tailorstore.catalog.database import Database
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.transport import DeleteFailure, ObjectInfo

Choose = Callable[[Sequence[str], str | None], str]
"""Names the actor whose turn it is, given those that can go on and the one that went on last."""

Runs = Sequence[tuple[str, int]]
"""Actors with how many calls each makes before the next: a schedule."""

PATIENCE_SECONDS: Final = 60.0
_PAGE: Final = 8
_CALLS: Final = ("put", "get", "read_into", "replace", "exists", "confirm")

_here = threading.local()


class StuckError(Exception):
    """An actor did not come to its next call: it waits for another one, which must not go on."""


class _AbandonedError(BaseException):
    """Ends an actor whose schedule is given up."""


@dataclass(slots=True)
class _Actor:
    name: str
    work: Callable[[], None]
    turn: threading.Lock = field(default_factory=threading.Lock)
    call: str = "begin"
    error: BaseException | None = None
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """What happened under a schedule."""

    errors: Mapping[str, BaseException]
    """By actor, of those that failed."""
    calls: Sequence[tuple[str, str]]
    """Who made which call, in order."""

    @property
    def runs(self) -> Runs:
        """The schedule, to be followed again."""
        return [(name, len(list(group))) for name, group in itertools.groupby(name for name, _ in self.calls)]

    @property
    def switches(self) -> int:
        """How often the turn went from one actor to another."""
        return len(self.runs) - 1


class Scheduler:
    """Lets actors go on one at a time."""

    def __init__(self, choose: Choose, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._choose = choose
        self._patience = patience_seconds
        self._parked = threading.Lock()
        self._abandoned = False

    def run(self, works: Mapping[str, Callable[[], None]]) -> Told:
        """Run actors by name until all have ended.

        Raises:
            StuckError: one of them waits for another; the message has every actor's stack.
        """
        actors = {name: _Actor(name, work) for name, work in works.items()}
        self._parked.acquire()
        threads = {name: threading.Thread(target=self._body, args=(actor,), daemon=True, name=name)
                   for name, actor in actors.items()}  # fmt: skip
        for actor in actors.values():
            actor.turn.acquire()
            threads[actor.name].start()
        calls: list[tuple[str, str]] = []
        last: str | None = None
        while able := [name for name, actor in actors.items() if not actor.ended]:
            last = self._choose(able, last)
            calls.append((last, actors[last].call))
            actors[last].turn.release()
            if not self._parked.acquire(timeout=self._patience):
                raise self._give_up(actors, threads, last)
        for thread in threads.values():
            thread.join()
        return Told({name: actor.error for name, actor in actors.items() if actor.error is not None}, calls)

    def _body(self, actor: _Actor) -> None:
        actor.turn.acquire()
        _here.seat = (self, actor)
        try:
            if not self._abandoned:
                actor.work()
        except _AbandonedError:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to whoever runs the schedule
            actor.error = error
        actor.ended = True
        if not self._abandoned:
            self._parked.release()

    def pause(self, actor: _Actor, call: str) -> None:
        """Let others go on before an actor makes a call."""
        actor.call = call
        # The one that was waited for in vain comes here late: nobody waits for it any more.
        if not self._abandoned:
            self._parked.release()
            actor.turn.acquire()
        if self._abandoned:
            raise _AbandonedError

    def _give_up(self, actors: Mapping[str, _Actor], threads: Mapping[str, threading.Thread], last: str) -> StuckError:
        frames = sys._current_frames()
        stacks = [
            f"{name}:\n{''.join(traceback.format_stack(frames[thread.ident])[-8:])}"
            for name, thread in threads.items()
            if thread.ident in frames
        ]
        self._abandoned = True
        for actor in actors.values():
            if not actor.ended and actor.name != last:
                actor.turn.release()
        return StuckError(f"{last} did not come to its next call in {self._patience:g} s\n" + "\n".join(stacks))


def pause(call: str) -> None:
    """Let others go on, if this thread is an actor's."""
    seat = getattr(_here, "seat", None)
    if seat is not None:
        scheduler, actor = seat
        scheduler.pause(actor, call)


# --- Who goes on -------------------------------------------------------------------------------------------------


def by_seed(seed: int) -> Choose:
    """Choose by chance: some seeds switch at nearly every call, others seldom."""
    dice = random.Random(seed)
    loyalty = dice.choice((0.3, 0.7, 0.9, 0.97))

    def choose(able: Sequence[str], last: str | None) -> str:
        if last in able and dice.random() < loyalty:
            return str(last)
        return dice.choice(able)

    return choose


def by_list(runs: Runs) -> Choose:
    """Follow a schedule; beyond its end, and where an actor has ended before its time, go on with the next."""
    left = [name for name, count in runs for _ in range(count)]
    left.reverse()

    def choose(able: Sequence[str], last: str | None) -> str:
        while left:
            name = left.pop()
            if name in able:
                return name
        return last if last in able else able[0]  # type: ignore[return-value]

    return choose


def with_two_switches(lengths: Mapping[str, int]) -> Iterator[Runs]:
    """Yield every schedule of two actors that has at most two switches: one is let go on within the other.

    Args:
        lengths: how many calls each makes when it is alone.
    """
    first, second = lengths
    for outer, inner in ((first, second), (second, first)):
        for calls in range(lengths[outer] + 1):
            # Far more calls than it makes: until it has ended.
            yield [(outer, calls), (inner, 1_000_000)]


def write_runs(runs: Runs) -> str:
    """Return a schedule as text: ``gc*5 commit*12``."""
    return " ".join(f"{name}*{count}" for name, count in runs)


def read_runs(text: str) -> Runs:
    """Return the schedule of a text that :func:`write_runs` made."""
    pairs = (part.rpartition("*") for part in text.split())
    return [(name, int(count)) for name, _, count in pairs]


# --- Where they stop ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def switching() -> Iterator[None]:
    """Make local storage and databases let others go on before each call, in the threads of actors.

    Storage works on the calling thread alone: its helpers would be nobody's.
    """
    with contextlib.ExitStack() as undo:

        def put_in(owner: type, name: str, made: Callable[..., Any]) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, made)

        for name in _CALLS:
            put_in(LocalObjects, name, _pausing(name, getattr(LocalObjects, name)))
        for name in ("read", "write"):
            put_in(Database, name, _pausing(f"db {name}", getattr(Database, name)))
        put_in(LocalObjects, "list", _listing(LocalObjects.list))
        put_in(LocalObjects, "delete", _deleting(LocalObjects.delete))
        put_in(LocalObjects, "__init__", _alone(LocalObjects.__init__))
        yield


def _pausing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def paused(self: Any, *args: Any, **kwargs: Any) -> Any:
        subject = args[0] if args and isinstance(args[0], str) else ""
        pause(f"{name} {subject}".rstrip())
        return method(self, *args, **kwargs)

    return paused


def _listing(method: Callable[..., Iterator[ObjectInfo]]) -> Callable[..., Iterator[ObjectInfo]]:
    def paged(self: LocalObjects, prefix: str = "", **options: Any) -> Iterator[ObjectInfo]:
        pause(f"list {prefix}".rstrip())
        for number, info in enumerate(method(self, prefix, **options), start=1):
            yield info
            if number % _PAGE == 0:
                pause(f"list {prefix}, go on")

    return paged


def _deleting(method: Callable[..., list[DeleteFailure]]) -> Callable[..., list[DeleteFailure]]:
    def by_folder(self: LocalObjects, keys: Sequence[str]) -> list[DeleteFailure]:
        failures: list[DeleteFailure] = []
        for folder, group in itertools.groupby(keys, lambda key: key.rpartition("/")[0]):
            pause(f"delete {folder}")
            failures += method(self, list(group))
        return failures

    return by_folder


def _alone(initialise: Callable[..., None]) -> Callable[..., None]:
    def alone(self: LocalObjects, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        self.workers = 1

    return alone
