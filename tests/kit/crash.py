"""Kills a process at every call that it makes to its store, and looks at what is left.

A program of its own: ``python -m tests.kit.crash SPEC`` with SPEC in JSON, which has the scenarios, each with the plan
that :func:`points_of` takes, and the URL of a PostgreSQL server or null. It prints a report of each in JSON. The
process that is killed is a fork of this one, which has everything imported and no threads, so a kill costs
milliseconds.

A *call* is a statement or a commit that reaches the database, a call that reads from the root or flushes it, and each
system call by which one writes there: opening a new file, writing to it (it is killed with half of the bytes written),
renaming, unlinking, making directories. The n-th call is the last thing that the process does, for n = 1, 2, … until it
gets to its end alive.
"""

import contextlib
import dataclasses
import gc
import json
import mmap
import os
import secrets
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Protocol

import psycopg
import torch
from sqlalchemy import Engine, event, make_url
from sqlalchemy.engine.default import DefaultDialect

import tailorstore as ts
from tailorstore.catalog import catalog as catalog_module
from tailorstore.catalog.schema import migrate
from tailorstore.catalog.urls import CatalogUrl, parse_url
from tailorstore.domain.errors import BranchNotFoundError
from tailorstore.storage import local
from tests.kit.audit import assert_root_is_exact, let_claims_lapse, refs
from tests.kit.models import assert_same

NOW: Final = timedelta(0)
_SPARSE = {"PRAGMA": 10, "CREATE": 6}
"""Of these statements every so many-th counts: Alembic makes some thirty, all in one transaction."""
_READS = frozenset({"BEGIN", "SELECT", "WITH", "PRAGMA", "connect", "exists", "get", "list", "read_into"})
"""Calls that change nothing."""
_MOST_FAILURES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A store that may be damaged: a copy of a prepared one."""

    folder: Path
    catalog: str | None = None
    """On Postgres; ``None`` for the SQLite file in the root."""

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def other_catalog(self) -> str:
        return f"sqlite:///{self.folder}/other.db"

    def open(self, *, branch: str = "main", create: bool = True, catalog: str | None = None) -> ts.Store:
        return ts.open_store(
            self.root,
            catalog=catalog or self.catalog,
            branch=branch,
            create=create,
            chunk_bytes=1024,
            light=ts.LightSettings(weight_bits=4, slot_bits=4, exact_below=64),
        )


# --- Killing -----------------------------------------------------------------------------------------------------


class Fuse:
    """Counts calls, from all threads, and kills the process at one of them."""

    def __init__(self, at: int, told: mmap.mmap) -> None:
        self._at = at
        self._told = told
        self._count = 0
        self._armed = False
        self._lock = threading.Lock()

    def arm(self) -> None:
        """Count from now on."""
        self._armed = True

    def call(self, what: str, half: Callable[[], object] | None = None) -> None:
        """Note a call that is about to be made; at the chosen one do ``half`` of it and die."""
        with self._lock:
            if not self._armed:
                return
            self._count += 1
            self._told.write(f"{what}\n".encode())
            if self._count < self._at:
                return
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()


class _Os:
    """Stands in for ``os`` in the local transport."""

    def __init__(self, fuse: Fuse) -> None:
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._fuse.call("open")
        return os.open(path, flags, mode)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._fuse.call("write", lambda: os.write(descriptor, data[: len(data) // 2]))
        return os.write(descriptor, data)

    def makedirs(self, path: str, *, exist_ok: bool) -> None:
        self._fuse.call("makedirs")
        os.makedirs(path, exist_ok=exist_ok)

    def replace(self, old: str, new: str) -> None:
        self._fuse.call("rename")
        os.replace(old, new)

    def unlink(self, path: str) -> None:
        self._fuse.call("unlink")
        os.unlink(path)


def wire(fuse: Fuse) -> None:
    """Lead every call of this process to its store past the fuse. There is no way back: for processes to be killed."""
    local.os = _Os(fuse)  # type: ignore[assignment,attr-defined]
    initialise = local.LocalObjects.__init__

    def in_order(self: local.LocalObjects, root: str) -> None:
        initialise(self, root)
        # One thread, so that the n-th call is the same one each time.
        self.workers = 1

    local.LocalObjects.__init__ = in_order  # type: ignore[method-assign]
    for name in ("get", "read_into", "list", "exists", "sync"):
        setattr(local.LocalObjects, name, _counted(name, getattr(local.LocalObjects, name), fuse))

    seen: Counter[str] = Counter()

    def statement(_connection: object, _cursor: object, sql: str, *_: object) -> None:
        verb = sql.split(maxsplit=1)[0].upper()
        seen[verb] += 1
        if seen[verb] % _SPARSE.get(verb, 1) == 0:
            fuse.call(verb)

    commit = DefaultDialect.do_commit

    def do_commit(self: DefaultDialect, connection: Any) -> None:
        fuse.call("COMMIT")
        commit(self, connection)
        fuse.call("after COMMIT")

    event.listen(Engine, "connect", lambda *_: fuse.call("connect"))
    event.listen(Engine, "before_cursor_execute", statement)
    DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]


def _counted(name: str, method: Callable[..., Any], fuse: Fuse) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        fuse.call(name)
        return method(*args, **kwargs)

    return counted


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """How a child ended."""

    killed: bool
    calls: list[str]
    """That it made, the one at which it was killed last."""
    error: str
    """What it raised, if it did."""


def run_until(at: int, victim: "Callable[[Place, Fuse], None]", place: Place) -> End:
    """Run ``victim`` in a child that is killed at its ``at``-th call."""
    with mmap.mmap(-1, 1 << 18) as told, mmap.mmap(-1, 1 << 16) as failed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                fuse = Fuse(at, told)
                wire(fuse)
                victim(place, fuse)
                status = 0
            except BaseException:
                failed.write(traceback.format_exc().encode()[-60_000:])
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        calls = told[:].rstrip(b"\0").decode().splitlines()
        error = failed[:].rstrip(b"\0").decode(errors="replace")
    killed = os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL
    return End(killed, calls, "" if killed or ended == 0 else error or f"wait status {ended}")


# --- What is committed -------------------------------------------------------------------------------------------

Sources = dict[str, int]


OFFSETS: Final = {10: 0, 20: 7, 30: 14, 40: 28, 90: 56}
"""How far ``a`` has moved: what a light version's codes of four bits hold exactly, so that it restores to the bit."""


def weights(step: int) -> dict[str, torch.Tensor]:
    """Layers ``a`` (two tensors, one of two chunks), ``b`` (never changes) and ``c``."""
    return {
        "a.w": torch.arange(300, dtype=torch.float32) - 100 + OFFSETS[step],
        "a.v": torch.full((3,), step, dtype=torch.bfloat16),
        "b.w": torch.full((5,), -0.0),
        "c.w": torch.full((), float(step)),
    }


def slots(step: int) -> dict[str, torch.Tensor]:
    """Optimizer state of ``a.w``."""
    return {"exp_avg": torch.full((300,), float(-OFFSETS[step])), "step": torch.tensor(float(step))}


SOURCES: Final[dict[int, Sources]] = {
    10: {"a": 10, "b": 10, "c": 10},
    20: {"a": 20, "b": 10, "c": 10},
    30: {"a": 30, "b": 10, "c": 30},
    40: {"a": 40, "b": 10, "c": 40},
    90: {"a": 90, "b": 10, "c": 90},
}
MASKS: Final[dict[int, list[str] | None]] = {10: None, 20: ["a"], 30: ["a", "c"], 40: None, 90: None}


def commit(store: ts.Store, step: int, *, block: bool = True, light: bool = False) -> None:
    due = MASKS[step] or ["a", "b", "c"]
    optim = {"state": {"a.w": slots(step)}, "param_groups": [{"params": ["a.w"], "lr": step / 3}]}
    pending = store.commit(  # type: ignore[call-overload]
        step,
        weights(step),
        optim,
        dict.fromkeys(due, "light" if light else "full"),
        extra={"at": step},
        metrics={"loss": step},
        block=block,
    )
    if not block:
        pending.result(60)


def check_composites(store: ts.Store, branch: str | None = None) -> list[int]:
    """Fail unless every composite of a branch reads back to the bit; return the steps, newest first."""
    try:
        log = store.log(branch)
    except BranchNotFoundError:
        return []
    for one in log:
        check_composite(store, one.id, alone=len(log) == 1)
    return [one.step for one in log]


def check_composite(store: ts.Store, ref: str, *, alone: bool = False) -> None:
    """Fail unless a composite reads back to the bit."""
    with store.checkout(ref) as checkpoint:
        step = checkpoint.step
        # A branch's first commit writes all of its layers.
        sources = dict.fromkeys(SOURCES[step], step) if alone else SOURCES[step]
        assert checkpoint.sources == {"@extra": step, **sources}, checkpoint.sources
        expected = {name: weights(sources[name[0]])[name] for name in weights(step)}
        assert_same(checkpoint.model_state_dict(), expected)
        state = checkpoint.optim_state_dict()
        assert isinstance(state, dict)
        assert_same(state["state"]["a.w"], slots(sources["a"]))
        assert state["param_groups"] == [{"params": ["a.w"], "lr": step / 3}]
        assert checkpoint.extra == {"at": step}
        assert checkpoint.metrics == {"loss": float(step)}


def check_whole(store: ts.Store) -> None:
    """Fail unless nothing is damaged, the next commit goes through, and GC leaves exactly what has standing."""
    damages = store.verify().damages
    assert not damages
    commit(store, 90)
    let_claims_lapse(store)
    report = store.gc(grace=NOW)
    assert report.deletes_failed == 0
    assert report.expired == ()
    assert_root_is_exact(store)
    check_composite(store, "latest", alone=len(store.log()) == 1)


def check_rebuilt(place: Place, allowed: Sequence[list[int]]) -> None:
    """Fail unless a root that lost its catalog is rebuilt to a line of steps that is allowed, all of it whole."""
    copy = Place(place.folder / "copy")
    shutil.copytree(place.root, copy.root, ignore=shutil.ignore_patterns("catalog.sqlite*"))
    with copy.open() as store:
        if not store.writable:
            store.rebuild_catalog()
        steps = check_composites(store)
        assert steps in allowed, f"rebuilt to {steps}"
        assert store.verify().ok, store.verify().damages


# --- Scenarios ---------------------------------------------------------------------------------------------------


class Scenario(Protocol):
    """Something that a process does to a store while it is killed."""

    def prepare(self, place: Place) -> None:
        """Make the store as it is before."""

    def victim(self, place: Place, fuse: Fuse) -> None:
        """Do it, in the process that is killed."""

    def check(self, place: Place) -> None:
        """Look at what is left; may change it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Committing:
    """A commit: on a store that has none yet, or after others."""

    before: tuple[int, ...]
    step: int
    block: bool = True
    light: bool = False

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            for step in self.before:
                commit(store, step, light=self.light)

    def victim(self, place: Place, fuse: Fuse) -> None:
        store = place.open()
        fuse.arm()
        commit(store, self.step, block=self.block, light=self.light)
        store.close()

    def check(self, place: Place) -> None:
        old = sorted(self.before, reverse=True)
        new = [self.step, *old]
        # Without a manifest of its own, a commit cannot show in what is rebuilt.
        if len(list(place.root.glob("commits/*"))) > len(old):
            check_rebuilt(place, [old, new])
        with place.open(create=False) as store:
            steps = check_composites(store)
            assert steps in (old, new), steps
            if self.light and steps == new:
                with store.checkout() as checkpoint:
                    assert checkpoint.fidelity == {"@extra": "full", "a": "light", "b": "full", "c": "light"}
                    table = checkpoint.documents()["a"].light
                    assert table is not None
                    assert {tensor.coding for tensor in table.tensors.values()} == {"difference", "value", "exact"}
            check_whole(store)


@dataclasses.dataclass(frozen=True, slots=True)
class Collecting:
    """GC under a policy, on a store with a tag, and with what a commit that died has left."""

    light: bool = False
    """Whether what is kept needs layers of a commit that is dropped."""

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            for step in (10, 20, 30, 40):
                commit(store, step, light=self.light)
            store.tag("kept", 20)
            left = "0123456789abcdef0123"
            for key in (f"layers/a/{left}/zarr.json", f"layers/a/{left}/a.w/c.0", f"commits/{left}.json"):
                store._objects.put(key, b"{")

    def victim(self, place: Place, fuse: Fuse) -> None:
        store = place.open()
        fuse.arm()
        store.gc(ts.KeepLast(1), grace=NOW)
        store.close()

    def check(self, place: Place) -> None:
        old, new = [40, 30, 20, 10], [40, 20]
        # A manifest goes before its layers do, so what a rebuild brings back is whole.
        check_rebuilt(place, [old, [40, 30, 20], [40, 20, 10], new])
        with place.open(create=False) as store:
            steps = [one.step for one in store.log()]
            assert steps in (old, new), steps
            for step in steps:
                check_composite(store, str(step))
            assert refs(store) == {"branch main": 40, "tag kept": 20}
            assert store.verify().ok, store.verify().damages
            let_claims_lapse(store)
            store.gc(ts.KeepLast(1), grace=NOW)
            assert [one.step for one in store.log()] == new
            assert_root_is_exact(store)
            check_whole(store)


@dataclasses.dataclass(frozen=True, slots=True)
class Naming:
    """Tags and branches made, moved and removed."""

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            for step in (10, 20, 30):
                commit(store, step)
            store.tag("old", 10)

    def victim(self, place: Place, fuse: Fuse) -> None:
        store = place.open()
        fuse.arm()
        store.tag("new", 20)
        store.branch("side", 20)
        store.branch("side", 30, move=True)
        store.delete_tag("old")
        store.delete_branch("side")
        store.close()

    def check(self, place: Place) -> None:
        start = {"branch main": 30, "tag old": 10}
        states = [
            start,
            start | {"tag new": 20},
            start | {"tag new": 20, "branch side": 20},
            start | {"tag new": 20, "branch side": 30},
            {"branch main": 30, "tag new": 20, "branch side": 30},
            {"branch main": 30, "tag new": 20},
        ]
        copy = Place(place.folder / "copy")
        shutil.copytree(place.root, copy.root, ignore=shutil.ignore_patterns("catalog.sqlite*"))
        with copy.open() as store:
            store.rebuild_catalog()
            assert refs(store) in states, refs(store)
            assert check_composites(store) == [30, 20, 10]
        with place.open(create=False) as store:
            assert refs(store) in states, refs(store)
            for name in refs(store):
                check_composite(store, name.partition(" ")[2])
            assert check_composites(store) == [30, 20, 10]
            check_whole(store)


@dataclasses.dataclass(frozen=True, slots=True)
class Rebuilding:
    """A take-over: of a root that lost its catalog, or by a second catalog."""

    lost: bool

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            for step in (10, 20, 30):
                commit(store, step)
            store.branch("side", 20)
            store.tag("kept", 10)
        if self.lost:
            for path in place.root.glob("catalog.sqlite*"):
                path.unlink()

    def victim(self, place: Place, fuse: Fuse) -> None:
        store = place.open(catalog=None if self.lost else place.other_catalog)
        fuse.arm()
        store.rebuild_catalog()
        store.close()

    def check(self, place: Place) -> None:
        names = {"branch main": 30, "branch side": 20, "tag kept": 10}
        with place.open() as owner:
            assert check_composites(owner) == [30, 20, 10]
            was_owner = owner.writable
        with place.open(catalog=None if self.lost else place.other_catalog) as store:
            assert not (was_owner and store.writable) or self.lost
            assert check_composites(store) == [30, 20, 10]
            # Until the end of the take-over nobody may own the root, and it is taken over again.
            store.rebuild_catalog()
            assert store.writable
            assert refs(store) == names
            assert check_composites(store) == [30, 20, 10]
            check_whole(store)


@dataclasses.dataclass(frozen=True, slots=True)
class Opening:
    """The first opening, which makes root, schema and store."""

    def prepare(self, place: Place) -> None:
        place.folder.mkdir(exist_ok=True)

    def victim(self, place: Place, fuse: Fuse) -> None:
        fuse.arm()
        place.open().close()

    def check(self, place: Place) -> None:
        with place.open() as store:
            assert store.writable
            assert check_composites(store) == []
            check_whole(store)


SCENARIOS: Final[dict[str, Scenario]] = {
    "first commit": Committing((), 10),
    "commit": Committing((10, 20), 30),
    "commit behind": Committing((10, 20), 30, block=False),
    "light commit": Committing((10, 20), 30, light=True),
    "light commit behind": Committing((10, 20), 30, block=False, light=True),
    "gc": Collecting(),
    "gc of bases": Collecting(light=True),
    "names": Naming(),
    "rebuild": Rebuilding(lost=True),
    "take over": Rebuilding(lost=False),
    "opening": Opening(),
}


# --- Schemas -----------------------------------------------------------------------------------------------------


class SchemaPress:
    """Makes the schema of a new SQLite catalog by copying one: Alembic takes ten times as long as all the rest.

    For whoever looks at what is left, and for processes that are killed at other things than making a schema.
    """

    def __init__(self, folder: Path) -> None:
        self._plate = folder / "schema.db"
        migrate(parse_url(f"sqlite:///{self._plate}"))

    def __call__(self, url: CatalogUrl, *, create_only: bool) -> None:
        if url.path is None:
            migrate(url, create_only=create_only)
            return
        with (
            contextlib.closing(sqlite3.connect(self._plate)) as plate,
            contextlib.closing(sqlite3.connect(url.path)) as new,
        ):
            plate.backup(new)
            with new:
                new.execute("UPDATE catalog SET catalog_id = ?", [f"f{secrets.token_hex(10)[1:]}"])

    @contextlib.contextmanager
    def used(self, *, use: bool = True) -> Iterator[None]:
        catalog_module.migrate = self if use else migrate  # type: ignore[attr-defined,assignment]
        try:
            yield
        finally:
            catalog_module.migrate = migrate  # type: ignore[attr-defined]


# --- Campaigns ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def prepared(folder: Path, scenario: Scenario, server: str | None) -> Iterator[Callable[[], Place]]:
    """Prepare a scenario once; give what makes a fresh copy of it."""
    databases = None if server is None else Databases(server)
    base = Place(folder / "base", databases.create() if databases else None)
    base.folder.mkdir()
    scenario.prepare(base)

    def fresh() -> Place:
        shutil.rmtree(folder / "try", ignore_errors=True)
        shutil.copytree(base.folder, folder / "try")
        return Place(folder / "try", databases.copy(base.folder, folder / "try") if databases else None)

    try:
        yield fresh
    finally:
        if databases is not None:
            databases.drop()


class Databases:
    """Databases of a PostgreSQL server: a prepared one and copies of it."""

    def __init__(self, server: str) -> None:
        self._server = make_url(server)
        self._prefix = f"crash_{secrets.token_hex(6)}"
        self._names = [f"{self._prefix}_base"]

    def create(self) -> str:
        """Make an empty database, to be prepared; return its URL."""
        self._run(f"CREATE DATABASE {self._names[0]}")
        return self._url(self._names[0])

    def copy(self, place: Path, moved_to: Path) -> str:
        """Copy it for a root that was copied too; return the copy's URL.

        It has a name of its own: the one before may still have a session.
        """
        self._names.append(f"{self._prefix}_{len(self._names)}")
        self._run(f"CREATE DATABASE {self._names[-1]} TEMPLATE {self._names[0]}")
        url = self._url(self._names[-1])
        # A catalog means one place; this copy means the copied root.
        with psycopg.connect(url.replace("postgresql+psycopg://", "postgresql://")) as connection:
            connection.execute("UPDATE stores SET root = replace(root, %s, %s)", (str(place), str(moved_to)))
        return url

    def drop(self) -> None:
        """Remove them all."""
        for name in self._names:
            self._run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _url(self, name: str) -> str:
        return self._server.set(database=name).render_as_string(hide_password=False)

    def _run(self, statement: str) -> None:
        url = self._server
        with contextlib.closing(
            psycopg.connect(
                host=url.host,
                port=url.port,
                user=url.username,
                password=url.password,
                dbname="postgres",
                autocommit=True,
            )
        ) as connection:
            for attempt in range(100):
                try:
                    connection.execute(statement.encode())
                except psycopg.errors.ObjectInUse:
                    # A session of the database to be copied is still ending.
                    if attempt == 99:
                        raise
                    time.sleep(0.05)
                else:
                    return


def points_of(calls: Sequence[str], plan: str | int) -> list[int]:
    """Return the calls to kill at, counted from 1, and one beyond the last, which the process outlives.

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


def campaign(name: str, folder: Path, plan: str | int, server: str | None) -> dict[str, Any]:
    """Kill a process at one call after another; return what happened."""
    scenario = SCENARIOS[name]
    killed_at: Counter[str] = Counter()
    failures: list[str] = []
    outlived = False
    press = SchemaPress(folder)

    def run(at: int, place: Place) -> End:
        with press.used(use=not isinstance(scenario, Opening)):
            return run_until(at, scenario.victim, place)

    with prepared(folder, scenario, server) as fresh:
        calls = run(sys.maxsize, fresh()).calls
        for at in points_of(calls, plan):
            place = fresh()
            end = run(at, place)
            killed_at.update([end.calls[-1]] if end.killed else [])
            outlived |= not end.killed
            try:
                assert not end.error, f"the process failed by itself:\n{end.error}"
                with press.used():
                    scenario.check(place)
            except Exception:
                failures.append(f"killed at call {at} ({end.calls[-1]}):\n{traceback.format_exc()}")
                if len(failures) == _MOST_FAILURES:
                    break
    points = killed_at.total()
    return {"scenario": name, "points": points, "outlived": outlived, "calls": killed_at, "failures": failures}


def main(arguments: Sequence[str]) -> int:
    spec = json.loads(arguments[0])
    # One thread, or the operators' own would be missing in the child.
    torch.set_num_threads(1)
    # What the collector of garbage does not touch, fork need not copy.
    gc.freeze()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    reports = []
    for name, plan in spec["scenarios"].items():
        with tempfile.TemporaryDirectory(prefix="ts-crash-", dir=memory) as folder:
            reports.append(campaign(name, Path(folder), plan, spec["server"]))
    print(json.dumps(reports))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
