"""Runs a soak: starts the crew, kills some of it all the time, ends it, and looks at what is left.

The one that watches has no threads and never opens a store, so that it can be forked again and again: a process that
takes the place of one that was killed has everything imported, and is there at once.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Final

import torch
from sqlalchemy import func, select

import tailorstore as ts
from tailorstore.catalog.catalog import Catalog
from tailorstore.catalog.tables import leases, pending
from tailorstore.engine.rebuild import read_history
from tests.kit.audit import all_commits, assert_root_is_exact
from tests.soak.content import compare
from tests.soak.crew import SHARED, Setting, work_at
from tests.soak.ledger import COUNTED, Board, Line

NOW: Final = timedelta(0)
KILL_EVERY_SECONDS: Final = 1.5
_END_SECONDS: Final = 120


@dataclass(frozen=True, slots=True)
class Place:
    """Somebody's place in the crew."""

    name: str
    catalog: int = 0


FULL_CREW: Final = (
    *(Place(f"trainer-{number}") for number in range(3)),
    *(Place(f"rival-{number}") for number in range(2)),
    *(Place(f"reader-{number}") for number in range(3)),
    *(Place(f"visitor-{number}") for number in range(2)),
    Place("collector-0"), Place("verifier-0"), Place("scrubber-0"),
)  # fmt: skip
SMALL_CREW: Final = (
    *(Place(f"trainer-{number}") for number in range(2)),
    *(Place(f"rival-{number}") for number in range(2)),
    *(Place(f"reader-{number}") for number in range(2)),
    Place("visitor-0"), Place("collector-0"), Place("verifier-0"), Place("scrubber-0"),
)  # fmt: skip
MUST_HAPPEN: Final = frozenset({
    "commits", "composites read", "held under a lease", "gc runs", "objects deleted", "commits expired", "verifies",
    "scrubs", "kills",
})  # fmt: skip
"""Without which nothing was shown: on a slow machine it takes longer until all of it has been."""
MUST_HAPPEN_IN_A_CONTEST: Final = frozenset({
    "commits", "composites read", "gc runs", "verifies", "take-overs", "refused: root taken", "kills",
})  # fmt: skip
_LONGEST: Final = 5
"""How many times as long as asked for a soak takes at most."""

CONTEST: Final = tuple(
    Place(f"{role}-{catalog}", catalog)
    for catalog in range(2)
    for role in ("trainer", "reader", "collector", "verifier", "taker")
)


@dataclass(slots=True)
class Outcome:
    """What a soak comes to."""

    name: str
    seconds: float = 0.0
    processes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    """What must not be, as it was noted."""
    left: dict[str, int] = field(default_factory=dict)
    """What was there at the end, before and after everything without standing was swept."""

    @property
    def good(self) -> bool:
        return not self.complaints


def soak(name: str, setting: Setting, crew: Sequence[Place], seconds: float) -> Outcome:
    """Let a crew work on one store for so long, and until everything has happened that must; then check the store."""
    torch.set_num_threads(1)
    board = Board(len(crew))
    outcome = Outcome(name, 0, len(crew))
    _in_child(lambda: _make(setting))
    must = MUST_HAPPEN_IN_A_CONTEST if setting.contested else MUST_HAPPEN
    began = time.monotonic()
    _watch(setting, board, crew, seconds, must)
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.left = _in_child(lambda: _check(setting, crew))
    outcome.counts = {what: board.totals()[what] for what in COUNTED}
    complaints = setting.folder / "complaints.txt"
    if complaints.exists():
        outcome.complaints = complaints.read_text().split("\n\n")
    if outcome.left.pop("failed", 0):
        outcome.complaints.append("the store is not as it must be at the end")
    missing = sorted(what for what in must if not outcome.counts[what])
    if missing:
        outcome.complaints.append(f"never happened: {', '.join(missing)}")
    return outcome


def _make(setting: Setting) -> dict[str, int]:
    for url in setting.catalogs:
        Catalog.open(url, create=True).close()
    setting.open().close()
    return {}


# --- The crew ----------------------------------------------------------------------------------------------------


def _watch(setting: Setting, board: Board, crew: Sequence[Place], seconds: float, must: Collection[str]) -> None:
    dice = random.Random(setting.seed)
    lives = dict.fromkeys(range(len(crew)), 0)
    children = {place: _start(setting, board, place, crew[place], 0) for place in lives}
    end, latest = time.monotonic() + seconds, time.monotonic() + _LONGEST * seconds
    next_kill = time.monotonic() + 2 * KILL_EVERY_SECONDS
    while time.monotonic() < (end if board.have_happened(must) else latest):
        time.sleep(0.05)
        if time.monotonic() > next_kill:
            next_kill = time.monotonic() + KILL_EVERY_SECONDS * dice.uniform(0.2, 1.8)
            victim = dice.choice(sorted(children))
            os.kill(children[victim], signal.SIGKILL)
            board.add(victim, "kills")
        for place, pid in children.items():
            if os.waitpid(pid, os.WNOHANG)[0]:
                lives[place] += 1
                children[place] = _start(setting, board, place, crew[place], lives[place])
    board.stop()
    _wait_for(setting, {crew[place].name: pid for place, pid in children.items()})


def _start(setting: Setting, board: Board, place: int, who: Place, life: int) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            work_at(setting, board, place, who.name, who.catalog, life)
            status = 0
        except BaseException:  # noqa: BLE001 - it ends here, and says so
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def _wait_for(setting: Setting, children: dict[str, int]) -> None:
    end = time.monotonic() + _END_SECONDS
    left = dict(children)
    while left and time.monotonic() < end:
        left = {name: pid for name, pid in left.items() if not os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.05)
    for name, pid in left.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with (setting.folder / "complaints.txt").open("a") as file:
            file.write(f"{name} did not come to an end\n\n")


def _in_child(work: Callable[[], dict[str, int]]) -> dict[str, int]:
    """Do something in a process of its own; what it raises is printed, and told as ``failed``."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            found = work()
        except BaseException:  # noqa: BLE001 - it ends here, and says so
            traceback.print_exc()
            found = {"failed": 1}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    answer: dict[str, int] = json.loads(told) if told else {"failed": 1}
    return answer


# --- The end -----------------------------------------------------------------------------------------------------


def _check(setting: Setting, crew: Sequence[Place]) -> dict[str, int]:
    """Fail unless the store holds what it must, all of it exact, and GC leaves just that."""
    # Those that were killed hold claims, which lapse by themselves.
    time.sleep(setting.lease.total_seconds() + 0.5)
    with _owner(setting) as store:
        found = {"objects before the last gc": sum(1 for _ in store._objects.list())}
        found["claims of the dead"] = _claims(store)
        _check_promises(setting, crew, store)
        _check_composites(store)
        report = store.gc(ts.KeepLast(setting.keep_last), grace=NOW)
        assert report.deletes_failed == 0
        assert _claims(store) == 0, "claims that lapsed are still there"
        _check_promises(setting, crew, store)
        found["composites"] = _check_composites(store)
        assert_root_is_exact(store)
        _check_kept(setting, store)
        _check_history(store)
        found["objects after it"] = sum(1 for _ in store._objects.list())
    return found


def _owner(setting: Setting) -> ts.Store:
    for catalog in range(len(setting.catalogs)):
        store = setting.open(catalog=catalog)
        if store.writable:
            return store
        store.close()
    store = setting.open()
    store.rebuild_catalog()
    return store


def _claims(store: ts.Store) -> int:
    def work(connection: Any) -> int:
        return sum(int(connection.scalar(select(func.count()).select_from(table))) for table in (leases, pending))

    return store._catalog._database.read(work)


def _check_promises(setting: Setting, crew: Sequence[Place], store: ts.Store) -> None:
    """Fail unless all that was acknowledged and that no policy may have dropped is there."""
    tags = {ref.name: ref.step for ref in store.tags()}
    heads = {ref.name: ref.step for ref in store.branches()}
    shared: list[Line] = []
    for place in crew:
        line = Line.of(setting.ledger(place.name))
        if place.name.startswith("trainer") and line.acknowledged:
            steps = {commit.step for commit in store.log(place.name)}
            lost = [step for step in line.must_keep(setting.keep_last) if step not in steps]
            assert not lost, f"{place.name} lost the steps {lost}; it has {sorted(steps)}"
            for names, known in ((line.tags, tags), (line.forks, heads)):
                wrong = {name: known.get(name) for name, step in names.items() if known.get(name) != step}
                assert not wrong, f"{place.name}: {wrong} instead of {names}"
        if place.name.startswith("rival"):
            shared.append(line)
    acknowledged = sorted(step for line in shared for step in line.acknowledged)
    if acknowledged:
        log = [commit.step for commit in store.log(SHARED)]
        # Commits of which nobody heard may be there, too: at most as many as there are rivals at the newest end.
        newest = acknowledged[-(setting.keep_last - len(shared)) :]
        lost = [step for step in newest if step not in log]
        assert not lost, f"{SHARED} lost the steps {lost}; it has {log}"


def _check_composites(store: ts.Store) -> int:
    known = all_commits(store)
    for commit_id in known:
        with store.checkout(commit_id) as checkpoint:
            _, wrong = compare(checkpoint)
            assert not wrong, f"step {checkpoint.step}: {wrong}"
    damages = store.verify().damages
    assert not damages, damages
    return len(known)


def _check_kept(setting: Setting, store: ts.Store) -> None:
    """Fail if a commit is still there that nobody needs: that a dead reader held, or that was never published."""
    branches = [ref.name for ref in store.branches()]
    last = {commit.id for name in branches for commit in store.log(name, setting.keep_last)}
    tagged = {ref.commit for ref in store.tags()}
    assert all_commits(store).keys() == last | tagged


def _check_history(store: ts.Store) -> None:
    history = read_history(store._objects)
    assert {manifest.commit.id for manifest in history.commits} == all_commits(store).keys()
    assert {name: tip.commit for name, tip in history.branches.items()} == {
        ref.name: ref.commit for ref in store.branches()
    }
    assert dict(history.tags) == {ref.name: ref.commit for ref in store.tags()}


# --- Telling -----------------------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> str:
    """Return what was done as a table, a column for each soak."""
    rows = [("", *(one.name for one in outcomes))]
    rows += [("seconds", *(f"{one.seconds:.0f}" for one in outcomes))]
    rows += [("processes", *(str(one.processes) for one in outcomes))]
    rows += [(what, *(f"{one.counts.get(what, 0):,}" for one in outcomes)) for what in COUNTED]
    left = dict.fromkeys(key for one in outcomes for key in one.left)
    rows += [(f"at the end: {key}", *(f"{one.left.get(key, 0):,}" for one in outcomes)) for key in left]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def as_json(outcomes: Sequence[Outcome]) -> str:
    return json.dumps([asdict(one) for one in outcomes], indent=2)
