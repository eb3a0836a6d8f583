"""Cuts the power while a process works on a local store, at many moments, and looks at what the disk may hold then.

The process is traced: every system call by which it writes below a folder, and its databases at each of their commits,
at which SQLite has flushed them (``synchronous=FULL``). A cut is what :mod:`tests.crash.disk` makes of all that came
before it. What a call to the store had done when it returned must be there after the cut; what one was doing may be.
"""

import argparse
import gc
import json
import logging
import os
import random
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from sqlalchemy import Engine, event
from sqlalchemy.engine.default import DefaultDialect

import tailorstore as ts
from tailorstore.domain.errors import NotFoundError
from tailorstore.storage import local
from tests.crash.campaign import SchemaPress
from tests.crash.content import NOW, check_composite, check_whole, commit
from tests.crash.disk import Disk, Happening
from tests.crash.fuse import in_child, in_order
from tests.crash.places import Place
from tests.kit.audit import let_claims_lapse, refs

State = dict[str, Any]
"""Steps of every branch, and where tags and branches point."""

FLUSHES: Final = ("layers", "manifests", "folders")
"""Kinds of flushes that can be left out."""

NOTHING: Final[State] = {"steps": {}, "refs": {}}


# --- What is traced ----------------------------------------------------------------------------------------------


class Tracer:
    """Notes what this process writes below a folder. There is no way back: for processes that end soon.

    Args:
        top: the folder.
        without: flushes that are left out, to see that they matter: of files of ``layers`` or of ``manifests``, or of
            ``folders`` below the root.
    """

    def __init__(self, top: Path, without: Sequence[str] = ()) -> None:
        self.happenings: list[Happening] = []
        self._top = f"{top}/"
        self._without = without
        self._paths: dict[int, str] = {}
        self._lock = threading.Lock()

    def wire(self) -> None:
        """Lead every system call that writes past this tracer."""
        real_open, real_close, real_write, real_fsync = os.open, os.close, os.write, os.fsync

        def traced_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            with self._lock:
                makes = self._is_mine(path) and flags & os.O_CREAT and not os.path.exists(path)
                descriptor = real_open(path, flags, *args, **kwargs)
                if self._is_mine(path):
                    self._paths[descriptor] = str(path)
                    if makes:
                        self.happenings.append(("create", str(path), None))
            return descriptor

        def traced_close(descriptor: int) -> None:
            with self._lock:
                self._paths.pop(descriptor, None)
            real_close(descriptor)

        def traced_write(descriptor: int, data: Any) -> int:
            with self._lock:
                count = real_write(descriptor, data)
                if descriptor in self._paths:
                    self.happenings.append(("write", self._paths[descriptor], bytes(data[:count])))
            return count

        def traced_fsync(descriptor: int) -> None:
            path = self._paths.get(descriptor, "")
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            kind = "layers" if "/layers/" in path else "manifests" if "/commits/" in path else ""
            if (is_folder and "/root/" in path and "folders" in self._without) or (
                not is_folder and kind in self._without
            ):
                return
            with self._lock:
                if descriptor in self._paths:
                    self.happenings.append(("fsync", self._paths[descriptor], None))
            real_fsync(descriptor)

        for name, traced in (
            ("open", traced_open),
            ("close", traced_close),
            ("write", traced_write),
            ("fsync", traced_fsync),
            ("mkdir", self._noting("mkdir", os.mkdir)),
            ("rmdir", self._noting("rmdir", os.rmdir)),
            ("unlink", self._noting("unlink", os.unlink)),
            ("replace", self._noting("rename", os.replace, pair=True)),
            ("link", self._noting("link", os.link, pair=True)),
        ):
            setattr(os, name, traced)
        in_order(local.LocalObjects)
        self._wire_databases()

    def note(self, what: str, state: State | None = None) -> None:
        """Note what the process is at."""
        with self._lock:
            self.happenings.append((what, "", state))

    def _noting(self, what: str, call: Callable[..., None], *, pair: bool = False) -> Callable[..., None]:
        def traced(path: Any, *args: Any, **kwargs: Any) -> None:
            with self._lock:
                call(path, *args, **kwargs)
                if self._is_mine(path):
                    self.happenings.append((what, str(path), str(args[0]) if pair else None))

        return traced

    def _is_mine(self, path: object) -> bool:
        return isinstance(path, str | Path) and f"{path}/".startswith(self._top)

    def _wire_databases(self) -> None:
        commit_it = DefaultDialect.do_commit

        def do_commit(dialect: DefaultDialect, connection: Any) -> None:
            commit_it(dialect, connection)
            self._look_at_database(connection.execute("PRAGMA database_list").fetchone()[2])

        def opened(connection: Any, _record: object) -> None:
            # Its journal mode was changed, which made the file.
            self._look_at_database(connection.execute("PRAGMA database_list").fetchone()[2])

        DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]
        event.listen(Engine, "connect", opened)

    def _look_at_database(self, path: str) -> None:
        if not self._is_mine(path):
            return
        with self._lock:
            content = {
                suffix: Path(path + suffix).read_bytes() for suffix in ("", "-wal") if os.path.exists(path + suffix)
            }
            self.happenings.append(("database", path, content))


# --- What the process does -----------------------------------------------------------------------------------------

Did = Callable[[ts.Store | None], None]


def state_of(store: ts.Store) -> State:
    """Return what must not get lost."""
    steps = {branch.name: [one.step for one in store.log(branch.name)] for branch in store.branches()}
    return {"steps": steps, "refs": refs(store)}


def life(place: Place, did: Did) -> None:
    """Make a store with its catalog inside, and do to it all that one does."""
    store = place.open()
    did(store)
    for step, light in ((10, False), (20, True), (30, True)):
        commit(store, step, light=light)
        did(store)
    store.tag("kept", 20)
    did(store)
    store.branch("side", 30)
    did(store)
    store.branch("side", 10, move=True)
    did(store)
    store.delete_branch("side")
    did(store)
    commit(store, 40, block=False)
    did(store)
    for policy in (ts.KeepLast(1), None):
        store.gc(policy, grace=NOW)
        did(store)
    store.delete_tag("kept")
    did(store)
    store.gc(ts.KeepLast(1), grace=NOW)
    did(store)
    store.close()


def take_over(place: Place, did: Did) -> None:
    """Make a store with its catalog elsewhere, and have another catalog take it over."""
    store = place.open(catalog=catalog_of(place, "first"))
    did(store)
    commit(store, 10)
    did(store)
    commit(store, 20)
    did(store)
    store.close()
    store = place.open(catalog=catalog_of(place, "second"))
    did(None)
    store.rebuild_catalog()
    did(store)
    commit(store, 30)
    did(store)
    store.gc(grace=NOW)
    did(store)
    store.close()


def catalog_of(place: Place, name: str) -> str:
    """Return the URL of a catalog in a folder that is not there yet."""
    return f"sqlite:///{place.folder}/{name}/folder/catalog.db"


LIVES: Final[dict[str, Callable[[Place, Did], None]]] = {"life": life, "take over": take_over}


@dataclass(frozen=True, slots=True)
class Cut:
    """A moment of a traced process, and what it had done by then."""

    at: int
    """Happenings before it."""
    allowed: tuple[State, ...]
    """After what was done, and after what was being done."""
    second_owner: bool
    """Whether another catalog had begun to take the root over."""
    commits: bool
    """Whether a database has just committed."""


def cuts_of(happenings: Sequence[Happening]) -> list[Cut]:
    """Return every moment at which something happened."""
    states: list[State] = [NOTHING, *(state for what, _, state in happenings if what == "did" and state is not None)]
    done = 0
    second_owner = False
    cuts = []
    for at, (what, _, state) in enumerate(happenings, start=1):
        if what == "did":
            done += state is not None
            second_owner |= state is None
        cuts.append(Cut(at, tuple(states[done : done + 2]), second_owner, what == "database"))
    return cuts


# --- What must be true after a cut -----------------------------------------------------------------------------------


def check(name: str, place: Place, cut: Cut) -> None:
    """Fail unless everything that was done is there, to the bit, and the store can be used."""
    catalog = None if name == "life" else catalog_of(place, "second" if cut.second_owner else "first")
    try:
        with place.open(create=False, catalog=catalog) as store:
            check_state(store, cut.allowed, exact=store.owned)
    except NotFoundError:
        assert NOTHING in cut.allowed, "the store is gone"
    if any(place.folder.glob("root/commits/*.json")):
        with place.without_catalog().open() as store:
            store.rebuild_catalog()
            check_state(store, cut.allowed, exact=False)
    with place.open(catalog=catalog) as store:
        if not store.writable:
            store.rebuild_catalog()
            check_state(store, cut.allowed, exact=False)
        let_claims_lapse(store)
        check_whole(store)


def check_state(store: ts.Store, allowed: Sequence[State], *, exact: bool) -> None:
    """Fail unless a store has what it had before or after what was being done, all of it to the bit.

    Args:
        store: it.
        allowed: states before and after.
        exact: of commits that are being dropped, some may be left only where the state is read from manifests.
    """
    found = state_of(store)
    assert found["refs"] in [state["refs"] for state in allowed], (found, allowed)
    if exact:
        assert found in allowed, (found, allowed)
    for branch, steps in found["steps"].items():
        choices = [set(state["steps"].get(branch, [])) for state in allowed]
        assert set.intersection(*choices) <= set(steps) <= set.union(*choices), (branch, found, allowed)
        for step in steps:
            check_composite(store, f"{branch}@{step}")
    assert store.verify().ok, store.verify().damages


# --- Cutting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PowerReport:
    """What the cuts have shown."""

    life: str
    without: Sequence[str]
    """Flushes that were left out."""
    happenings: int
    flushes: int
    commits: int
    cuts: int
    failures: list[str]


def trace(name: str, place: Place, without: Sequence[str]) -> list[Happening]:
    """Return what a process does to a folder, which is made for it."""
    record = place.folder.with_name("record")

    def live(_: object) -> None:
        tracer = Tracer(place.folder, without)
        tracer.wire()
        LIVES[name](place, lambda store: tracer.note("did", None if store is None else state_of(store)))
        record.write_text(json.dumps(tracer.happenings, default=lambda data: {"bytes": data.decode("latin-1")}))

    shutil.rmtree(place.folder, ignore_errors=True)
    place.folder.mkdir()
    end = in_child(live)
    if end.error:
        raise AssertionError(end.error)
    happenings = json.loads(record.read_text(), object_hook=lambda found: found.get("bytes", found))
    return [
        (what, path, more.encode("latin-1") if what == "write" else _as_bytes(more) if what == "database" else more)
        for what, path, more in happenings
    ]


def _as_bytes(content: dict[str, str]) -> dict[str, bytes]:
    return {suffix: data.encode("latin-1") for suffix, data in content.items()}


def cut_power(name: str, folder: Path, *, cuts: int, seeds: int, without: Sequence[str] = ()) -> PowerReport:
    """Cut a process's power at many moments.

    Args:
        name: what it does.
        folder: for everything.
        cuts: moments, half of them commits of a database, the others by chance; 0 for all there are.
        seeds: what the disk may hold is drawn by so many, at each moment; and once everything that may be lost is.
        without: flushes that the process leaves out.
    """
    place = Place(folder / "place")
    press = SchemaPress(folder)
    with press.used():
        happenings = trace(name, place, without)
        moments = cuts_of(happenings)
        tried = 0
        failures: list[str] = []
        for cut in _some(moments, cuts) if cuts else moments:
            disk = Disk(str(place.folder))
            for what, path, more in happenings[: cut.at]:
                if what != "did":
                    disk.apply((what, path, more))
            for seed in range(seeds + 1):
                shutil.rmtree(place.folder)
                disk.root.write(place.folder, random.Random(f"{cut.at} {seed}") if seed else None)
                tried += 1
                end = in_child(lambda _: check(name, place, cut))  # noqa: B023 - called at once
                if end.error:
                    last = happenings[cut.at - 1][:2]
                    failures.append(f"{name}, cut after happening {cut.at} {last}, seed {seed}:\n{end.error}")
    count = [what for what, _, _ in happenings]
    return PowerReport(name, without, len(happenings), count.count("fsync"), count.count("database"), tried, failures)


def _some(moments: Sequence[Cut], count: int) -> list[Cut]:
    """Return as many moments by chance, half of them commits of a database."""
    dice = random.Random(0)
    commits = [cut for cut in moments if cut.commits]
    others = [cut for cut in moments if not cut.commits]
    half = min(count // 2, len(commits))
    return [*dice.sample(commits, half), *dice.sample(others, min(count - half, len(others)))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.power", description=__doc__)
    parser.add_argument("--cuts", type=int, default=0, help="moments; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--proofs", type=int, default=10, help="moments of processes that leave out flushes")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("tailorstore").setLevel(logging.CRITICAL)
    gc.freeze()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    reports: list[PowerReport] = []
    with tempfile.TemporaryDirectory(prefix="ts-power-", dir=memory) as folder:
        reports += [cut_power(name, Path(folder), cuts=arguments.cuts, seeds=arguments.seeds) for name in LIVES]
        reports += [
            cut_power("life", Path(folder), cuts=arguments.proofs, seeds=0, without=[without])
            for without in (FLUSHES if arguments.proofs else ())
        ]
    if arguments.json:
        print(json.dumps([asdict(report) for report in reports]))  # noqa: T201
        return 0
    for report in reports:
        left_out = f"without flushing {', '.join(report.without)}, " if report.without else ""
        print(  # noqa: T201
            f"power cut, {report.life}: {left_out}{report.happenings} happenings, {report.flushes} flushes,"
            f" {report.commits} commits of databases; {report.cuts} cuts, {len(report.failures)} failures"
        )
    failures = [failure for report in reports if not report.without for failure in report.failures]
    for failure in failures:
        print(failure)  # noqa: T201
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
