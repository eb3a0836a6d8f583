"""Whatever the order in which several actors' calls reach a store, nothing is lost: :mod:`tests.soak.interleave`.

``python -m tests.soak interleave`` tries as many more schedules as one likes.
"""

import dataclasses
import itertools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import delete, exists, or_, select

import tailorstore as ts
from tailorstore.catalog.collection import Collection
from tailorstore.catalog.tables import branches, commits, leases, pending, tags, versions
from tailorstore.catalog.writing import Writing
from tailorstore.domain.errors import RootTakenError
from tailorstore.domain.records import Binding
from tailorstore.engine import gc, publish, rebuild, session
from tailorstore.engine.storage_clock import StorageClock
from tailorstore.storage import manifests
from tailorstore.storage.transport import Objects
from tests.kit.audit import assert_root_is_exact
from tests.kit.schedule import (
    Choose,
    Scheduler,
    StuckError,
    by_list,
    by_seed,
    pause,
    read_runs,
    with_two_switches,
    write_runs,
)
from tests.soak.interleave import (
    BrokenError,
    Count,
    Stage,
    by_chance,
    check,
    every_two_switches,
    lengths_of,
    perform,
    play,
    replay,
    stage,
)
from tests.soak.scenarios import NOW, SCENARIOS, Actor, collect, commit, in_turn, take_over

BY_CHANCE = 2 * len(SCENARIOS)
SHORT = ("branch move|branch move", "tag|untag")


@pytest.fixture(scope="module")
def scene() -> Iterator[Stage]:
    logger = logging.getLogger("tailorstore")
    level = logger.level
    # Roots that belong to another catalog are what this is about.
    logger.setLevel(logging.ERROR)
    with stage() as found:
        yield found
    logger.setLevel(level)


def test_no_schedule_by_chance_breaks_a_promise(scene: Stage) -> None:
    count = Count()
    by_chance(scene, list(SCENARIOS), range(BY_CHANCE), count)
    assert not count.broken, count.broken[0]
    assert count.schedules.keys() == SCENARIOS.keys()
    assert count.schedules.total() == BY_CHANCE
    # They did meet: one in its middle when the other went on, and some to be refused.
    assert count.switches > 4 * BY_CHANCE
    assert {"HeadMovedError", "RootTakenError"} <= count.refusals.keys()


@pytest.mark.parametrize("name", SHORT)
def test_no_schedule_of_at_most_two_switches_breaks_a_promise(scene: Stage, name: str) -> None:
    count = Count()
    every_two_switches(scene, name, count)
    assert not count.broken, count.broken[0]
    first, second = lengths_of(scene, name).values()
    assert count.schedules[name] == first + second + 2


def test_a_schedule_can_be_followed_again(scene: Stage) -> None:
    told = play(scene, "commit|gc", by_seed(3))
    assert told.switches > 1
    again = replay(scene, "commit|gc", write_runs(told.runs))
    assert [who for who, _ in again.calls] == [who for who, _ in told.calls]
    assert [call.split()[0] for _, call in again.calls] == [call.split()[0] for _, call in told.calls]
    assert read_runs(write_runs(told.runs)) == list(told.runs)


# --- It finds what is broken -------------------------------------------------------------------------------------


Schedules = Iterator[Callable[[str], Choose]]
"""One after the other, each made for a scenario's name."""


def by_chance_from(seed: int) -> Schedules:
    """Yield schedules by chance."""

    def made(seed: int) -> Callable[[str], Choose]:
        return lambda _: by_seed(seed)

    return map(made, itertools.count(seed))


def within(outer: str, calls: int) -> Schedules:
    """Yield schedules in which the others act within one actor, after that many of its calls and more."""

    def made(calls: int) -> Callable[[str], Choose]:
        return lambda name: by_list([(outer, calls), *((who, 1_000_000) for who in SCENARIOS[name] if who != outer)])

    return map(made, itertools.count(calls))


def _no_check(*_: object) -> None:
    """Let everybody write to a root, whoever owns it."""


def _unguarded_gc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "check_binding", _no_check)
    monkeypatch.setattr(gc, "check_current", _no_check)


def _unguarded_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "check_binding", _no_check)


def _asking_before_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let GC learn what is announced before it lists, so that what is announced in between counts as a leftover."""
    listing = gc._Sweep._list
    known: dict[str, Any] = {}

    def list_late(self: Any) -> Any:
        catalog = self._catalog
        known["announced"] = catalog._database.read(lambda connection: _everything_known(catalog, connection))
        return listing(self)

    def ask_early(self: Any, pairs: Any, **_: object) -> Any:
        return {pair for pair in pairs if pair[1] not in known["announced"]}

    monkeypatch.setattr(gc._Sweep, "_list", list_late)
    monkeypatch.setattr(Collection, "unknown_versions", ask_early)


def _everything_known(catalog: Any, connection: Any) -> set[str]:
    found = set(connection.scalars(select(versions.c.version_id)))
    return found | set(connection.scalars(select(pending.c.commit_id)))


def _unguarded_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let expiry drop what readers hold."""

    def protected(_self: Any, _now: object) -> Any:
        return or_(exists().where(branches.c.head_pk == commits.c.pk), exists().where(tags.c.commit_pk == commits.c.pk))

    expire = Collection._expire

    def forgetful(self: Any, connection: Any, now: Any, ids: Any) -> Any:
        connection.execute(delete(leases))
        return expire(self, connection, now, ids)

    monkeypatch.setattr(Collection, "_is_protected", protected)
    monkeypatch.setattr(Collection, "_leased", lambda *_: frozenset())
    monkeypatch.setattr(Collection, "_expire", forgetful)


def _blind_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish whatever the head is by now."""
    expect = Writing._expect_parent

    def blind(self: Any, connection: Any, draft: Any) -> Any:
        head = self._head_row(connection, draft.branch)
        return expect(self, connection, dataclasses.replace(draft, parent=head.commit_id, step=head.step + 1))

    monkeypatch.setattr(Writing, "_expect_parent", blind)


def _reading_before_claiming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a take-over read the manifests first and claim the root after."""
    history = rebuild.read_history
    early: list[Any] = []
    bind = manifests.write_binding

    def read_then_write(objects: Any, binding: Any, **options: Any) -> None:
        early.append(history(objects))
        bind(objects, binding, **options)

    monkeypatch.setattr(session, "write_binding", read_then_write)
    monkeypatch.setattr(session, "read_history", lambda *_, **__: early.pop())


@pytest.mark.parametrize(
    ("name", "without", "schedules", "says"),
    [
        ("takeover, commit, gc|gc", _unguarded_gc, by_chance_from(0), "acknowledged and gone|'missing'"),
        ("takeover|commit", _unguarded_publish, within("commit", 35), "acknowledged and gone"),
        ("commit|gc", _asking_before_listing, within("gc", 5), "'missing'"),
        ("gc|reader", _unguarded_leases, by_chance_from(0), "MissingObjectError"),
        ("commit|commit", _blind_publish, by_chance_from(0), "not on their branch|of a rebuild"),
        ("takeover|commit", _reading_before_claiming, within("takeover", 10), "acknowledged and gone"),
    ],
)
def test_a_guard_that_is_taken_away_is_missed(
    scene: Stage,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    without: Callable[[pytest.MonkeyPatch], None],
    schedules: Schedules,
    says: str,
) -> None:
    without(monkeypatch)
    tries = (_broken_by(scene, name, schedule(name)) for schedule in itertools.islice(schedules, 40))
    first = next(filter(None, tries), "no schedule missed it")
    assert re.search(says, first.splitlines()[0]), first


def _broken_by(scene: Stage, name: str, choose: Choose) -> str:
    """Return what a schedule broke; nothing if it broke nothing."""
    try:
        play(scene, name, choose)
    except BrokenError as error:
        return str(error)
    return ""


# --- What it found -----------------------------------------------------------------------------------------------


def test_a_take_over_that_comes_late_gives_nobody_an_old_claim_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(step: int) -> dict[str, torch.Tensor]:
        return {"a.w": torch.full((3,), float(step))}

    root, shared = tmp_path / "root", f"sqlite:///{tmp_path}/shared.db"
    with ts.open_store(root) as owner:
        owner.commit(1, weights(1))
    with (
        ts.open_store(root, catalog=shared) as fast,
        ts.open_store(root, catalog=shared) as late,
        ts.open_store(root, catalog=f"sqlite:///{tmp_path}/other.db") as other,
    ):

        def claim_late(objects: Objects, binding: Binding, *, replace: bool) -> None:
            monkeypatch.undo()
            fast.rebuild_catalog()
            other.rebuild_catalog()
            other.commit(2, weights(2))
            manifests.write_binding(objects, binding, replace=replace)

        monkeypatch.setattr(session, "write_binding", claim_late)
        with pytest.raises(RootTakenError, match="another take-over was faster"):
            late.rebuild_catalog()
        # It knows nothing of step 2, and the root bears the name of its catalog again, by another claim.
        with pytest.raises(RootTakenError):
            fast.commit(3, weights(3))
        with pytest.raises(RootTakenError):
            other.commit(3, weights(3))
        other.rebuild_catalog()
        other.commit(3, weights(3))
        assert [commit.step for commit in other.log()] == [3, 2, 1]
        assert other.verify().ok


def test_a_commit_that_was_swept_while_it_stood_still_is_not_taken_for_the_newest(scene: Stage) -> None:
    actors = {
        "commit": Actor(commit(50), (RootTakenError,)),
        "swap": Actor(in_turn(take_over, collect(None)), catalog="b"),
    }
    alone = perform(scene.set_up(), actors, by_list(()))
    calls = [call for who, call in alone.calls if who == "commit"]
    manifest = next(at for at, call in enumerate(calls) if call.startswith("replace commits/"))
    world = scene.set_up()
    told = perform(world, actors, by_list([("commit", manifest), ("swap", 1_000_000)]))
    assert isinstance(told.errors["commit"], RootTakenError)
    with world.open("a") as store:
        report = store.rebuild_catalog()
        assert [commit.step for commit in store.log()] == [40, 30, 20, 10]
        assert (len(report.unplaced), report.incomplete) == (1, ())
    check(world)


def test_what_a_gc_that_died_has_put_to_tell_the_time_is_swept_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, {"a.w": torch.zeros(3)})
        with monkeypatch.context() as dying:
            dying.setattr(StorageClock, "put_away", lambda _: None)
            store.gc(grace=NOW)
        left = [info.key for info in store._objects.list() if info.key.endswith(".new")]
        assert len(left) == 1
        assert store.gc(grace=NOW).leftovers_swept == 1
        assert_root_is_exact(store)


# --- The scheduler itself ----------------------------------------------------------------------------------------


def test_two_switches_let_each_actor_act_within_the_other_at_every_call() -> None:
    found = [write_runs(runs) for runs in with_two_switches({"a": 1, "b": 2})]
    assert [runs.split()[0] for runs in found] == ["a*0", "a*1", "b*0", "b*1", "b*2"]


def test_one_actor_at_a_time_goes_on_and_the_list_says_which() -> None:
    said: list[str] = []

    def actor(name: str) -> Callable[[], None]:
        def act() -> None:
            for number in range(3):
                said.append(f"{name}{number}")
                pause("next")

        return act

    told = Scheduler(by_list([("b", 2), ("a", 1), ("b", 1)])).run({"a": actor("a"), "b": actor("b")})
    assert said == ["b0", "b1", "a0", "b2", "a1", "a2"]
    assert told.switches == 3
    assert not told.errors


def test_an_actor_that_waits_for_another_is_found_out_and_nobody_stays_behind() -> None:
    lock = threading.Lock()

    def hold() -> None:
        with lock:
            pause("holding")

    def wait() -> None:
        with lock:
            pause("never here")

    before = threading.active_count()
    with pytest.raises(StuckError, match=r"wait did not come to its next call(?s:.*)with lock"):
        Scheduler(by_list([("hold", 1), ("wait", 1)]), patience_seconds=0.5).run({"hold": hold, "wait": wait})
    deadline = threading.Event()
    for _ in range(100):
        if threading.active_count() == before:
            break
        deadline.wait(0.1)
    assert threading.active_count() == before
