"""Kills a process at one call after another, and says what happened."""

import contextlib
import dataclasses
import functools
import random
import secrets
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tailorstore.catalog import catalog as catalog_module
from tailorstore.catalog.schema import HEAD, migrate
from tailorstore.catalog.urls import CatalogUrl, parse_url
from tests.crash.fuse import NEVER, End, Fuse, in_child, wire
from tests.crash.places import Place, Servers, prepared, wait_for_sessions
from tests.crash.scenarios import SCENARIOS, Scenario
from tests.crash.tracing import in_traced_child

_READS = frozenset({"BEGIN", "SELECT", "WITH", "PRAGMA", "connect", "exists", "get", "list", "read_into"})
"""Calls that change nothing."""
_MOST_FAILURES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What a campaign has shown."""

    scenario: str
    catalog: str
    storage: str
    calls: int
    """That the process makes when it is let live."""
    points: int
    """Calls at which it was killed."""
    pairs: int
    """Times at which who came after it was killed as well."""
    killed_at: dict[str, int]
    """Points by kind of call."""
    outlived: bool
    """Whether it was let live once, too."""
    failures: list[str]


class SchemaPress:
    """Makes the schema of a new SQLite catalog by copying one: Alembic takes ten times as long as all the rest.

    For whoever looks at what is left, and for processes that are killed at other things than making a schema.
    """

    def __init__(self, folder: Path) -> None:
        self._plate = folder / "schema.db"
        migrate(parse_url(f"sqlite:///{self._plate}"))

    def __call__(self, url: CatalogUrl, target: str = HEAD, *, create_only: bool = False) -> object:
        if url.path is None or not create_only:
            return migrate(url, target, create_only=create_only)
        with (
            contextlib.closing(sqlite3.connect(self._plate)) as plate,
            contextlib.closing(sqlite3.connect(url.path)) as new,
        ):
            plate.backup(new)
            with new:
                new.execute("UPDATE catalog SET catalog_id = ?", [f"f{secrets.token_hex(10)[1:]}"])
        return None

    @contextlib.contextmanager
    def used(self, *, use: bool = True) -> Iterator[None]:
        catalog_module.migrate = self if use else migrate  # type: ignore[attr-defined,assignment]
        try:
            yield
        finally:
            catalog_module.migrate = migrate  # type: ignore[attr-defined]


def points_of(calls: Sequence[str], plan: str | int) -> list[int]:
    """Return the calls to kill at, counted from 1, and perhaps one beyond the last, which the process outlives.

    Args:
        calls: that the process makes when it is let live.
        plan: ``calls`` for every call; ``changes`` for those at which something changed since the one before; or every
            so many-th.
    """
    if isinstance(plan, int):
        return list(range(1, len(calls) + 1, plan))
    beyond = len(calls) + 1
    if plan == "calls":
        return list(range(1, beyond + 1))
    after_change = [at for at in range(2, beyond) if calls[at - 2] not in _READS or calls[at - 1] == "write"]
    return [1, *after_change, beyond]


class Campaign:
    """One scenario on one kind of catalog and storage.

    Args:
        name: of the scenario.
        servers: what stores are made of.
        press: for catalogs that are made by the way.
        at_writes: kill not at calls to the store but at those by which SQLite changes its files.
    """

    def __init__(self, name: str, servers: Servers, press: SchemaPress, *, at_writes: bool = False) -> None:
        self._name = name
        self._at_writes = at_writes
        self._scenario: Scenario = SCENARIOS[name]
        self._servers = servers
        self._press = press
        self._killed_at: Counter[str] = Counter()
        self._pairs = 0
        self._outlived = False
        self._failures: list[str] = []

    def run(self, folder: Path, plan: str | int, pairs: int, seed: int = 0) -> Report:
        """Kill the process at the points of a plan, and at ``pairs`` more, where the one that comes after dies too."""
        dice = random.Random(seed)
        with prepared(folder, self._servers, self._prepare) as fresh:
            end = self._kill(fresh(), self._scenario.victim, NEVER)
            if end.error:
                raise AssertionError(end.error)
            calls = end.calls
            for at in points_of(calls, plan):
                self._try(fresh(), at, None)
            for _ in range(pairs):
                self._try(fresh(), dice.randint(1, len(calls)), dice.random())
        return Report(
            self._name,
            self._servers.catalog_name,
            self._servers.storage_name,
            len(calls),
            self._killed_at.total(),
            self._pairs,
            dict(self._killed_at),
            self._outlived,
            self._failures,
        )

    def _prepare(self, place: Place) -> None:
        with self._press.used():
            end = in_child(lambda _: self._scenario.prepare(place))
        if end.error:
            raise AssertionError(end.error)

    def _try(self, place: Place, at: int, again: float | None) -> None:
        """Kill at a call; then, where ``again`` says so, kill who comes after at that share of its calls."""
        if len(self._failures) >= _MOST_FAILURES:
            return
        end = self._kill(place, self._scenario.victim, at)
        self._outlived |= not end.killed
        where = f"killed at call {at} ({end.calls[-1]})"
        error = end.error and f"the process failed by itself:\n{end.error}"
        if again is None:
            self._killed_at.update([end.calls[-1]] if end.killed else [])
        elif not error:
            # How many calls it will make depends on where the one before died.
            second = self._kill(place, self._scenario.recover, max(1, round(again * 60)))
            where += f", then at call {len(second.calls)} ({second.calls[-1:]})"
            error = second.error and f"who came after failed by itself:\n{second.error}"
            self._pairs += second.killed
        if not error:
            with self._press.used():
                error = in_child(lambda _: self._scenario.check(place)).error
        if error:
            self._failures.append(f"{where}:\n{error}")

    def _kill(self, place: Place, work: Callable[[Place, Fuse], None], at: int) -> End:
        def wired(fuse: Fuse) -> None:
            wire(fuse)
            work(place, fuse)

        with self._press.used(use=not self._scenario.makes_schema):
            end = in_traced_child(functools.partial(work, place), at) if self._at_writes else in_child(wired, at)
        if place.database is not None:
            wait_for_sessions(place.database)
        return end
