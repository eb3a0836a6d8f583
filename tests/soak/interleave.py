"""Scenarios under schedules: what must be true of a store whatever the order of the actors' calls was."""

import itertools
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import tailorstore as ts
from tailorstore.domain.names import COMMITS_PREFIX
from tailorstore.engine.rebuild import read_history
from tests.crash.campaign import SchemaPress
from tests.kit.audit import all_commits, assert_root_is_exact, let_claims_lapse
from tests.kit.schedule import (
    Choose,
    Scheduler,
    Told,
    by_list,
    by_seed,
    read_runs,
    switching,
    with_two_switches,
    write_runs,
)
from tests.soak.content import compare
from tests.soak.scenarios import NOW, SCENARIOS, Actor, World, prepare


class Stage:
    """A folder in which a prepared store is put up again for each schedule, always at the same place."""

    def __init__(self, folder: Path) -> None:
        self._base = folder / "base"
        self._place = folder / "try"
        self._place.mkdir()
        prepare(World(self._place))
        self._place.rename(self._base)

    def set_up(self) -> World:
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self._base, self._place)
        return World(self._place)


@contextmanager
def stage() -> Iterator[Stage]:
    """Give a stage, in memory where there is a place for files in memory."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="ts-interleave-", dir=memory) as folder,
            switching(),
            # Views of roots that belong to another catalog need a schema each.
            SchemaPress(Path(folder)).used(),
        ):
            yield Stage(Path(folder))
    finally:
        torch.set_num_threads(threads)


class BrokenError(AssertionError):
    """A schedule broke a promise; the message has how to see it again."""


def play(scene: Stage, name: str, choose: Choose, seed: int | None = None) -> Told:
    """Play a scenario by a schedule, and check what it left.

    Raises:
        BrokenError: a promise was broken.
    """
    world = scene.set_up()
    told: Told | None = None
    try:
        told = perform(world, SCENARIOS[name], choose)
        _check_errors(SCENARIOS[name], told)
        check(world)
    except Exception as error:
        runs = write_runs(told.runs) if told else "(not known)"
        again = f"python -m tests.soak interleave --scenario {name!r}"
        how = f"{again} --seed {seed} --schedules 1, or {again} --replay {runs!r}"
        calls = "" if told is None else "\n".join(f"  {who}: {call}" for who, call in told.calls)
        raise BrokenError(f"{name}: {type(error).__name__}: {error}\nsee it again: {how}\n{calls}") from error
    return told


def perform(world: World, actors: Mapping[str, Actor], choose: Choose) -> Told:
    """Let actors act."""
    with ExitStack() as stack:
        stores = {name: stack.enter_context(world.open(one.catalog, one.branch)) for name, one in actors.items()}
        return Scheduler(choose).run({name: _work(world, one, stores[name]) for name, one in actors.items()})


def _check_errors(actors: Mapping[str, Actor], told: Told) -> None:
    for name, error in told.errors.items():
        assert isinstance(error, actors[name].may_fail), f"{name} failed: {type(error).__name__}: {error}"


def _work(world: World, actor: Actor, store: ts.Store) -> Callable[[], None]:
    return lambda: actor.act(world, store)


# --- What must be true afterwards --------------------------------------------------------------------------------


def check(world: World) -> None:
    """Fail unless everything that was published is there, verified and exact, and GC leaves just that."""
    with _owner(world) as store:
        _check_verified(store)
        let_claims_lapse(store)
        # Nobody is there any more: what has no standing goes, and all else stays.
        report = store.gc(grace=NOW)
        assert not report.deletes_failed
        assert not report.expired, report.expired
        _check_composites(world, store)
        assert_root_is_exact(store)
        _check_history(store)


def _owner(world: World) -> ts.Store:
    for name in "abc":
        store = world.open(name)
        if store.writable:
            return store
        store.close()
    # Take-overs that met may leave a root without owner: it can be read, and taken over again.
    store = world.open("a")
    store.rebuild_catalog()
    return store


def _check_verified(store: ts.Store) -> None:
    damages = store.verify().damages
    if damages and all(one.kind == "missing" and one.key.startswith(COMMITS_PREFIX) for one in damages):
        # The GC of a catalog that just lost the root may still have deleted manifests of commits that it had dropped
        # and the new owner believed in. Nothing else is missing, and they follow from the new owner's rows.
        store.verify(repair=True)
        damages = store.verify().damages
    assert not damages, damages


def _check_composites(world: World, store: ts.Store) -> None:
    known = all_commits(store)
    lost = {commit_id: branch for commit_id, branch in world.published.items() if commit_id not in known}
    assert not lost, f"acknowledged and gone: {lost}"
    logs = {ref.name: {commit.id for commit in store.log(ref.name)} for ref in store.branches()}
    astray = {one: branch for one, branch in world.published.items() if one not in logs.get(branch, set())}
    assert world.moved or not astray, f"acknowledged and not on their branch: {astray}"
    assert set().union(*logs.values(), (ref.commit for ref in store.tags())) <= known.keys()
    for commit_id in known:
        with store.checkout(commit_id) as checkpoint:
            _, wrong = compare(checkpoint)
            assert not wrong, f"composite of step {checkpoint.step}: {wrong}"


def _check_history(store: ts.Store) -> None:
    """Fail unless the documents in the root tell what the catalog tells."""
    history = read_history(store._objects)
    assert not history.unreadable, history.unreadable
    assert {manifest.commit.id for manifest in history.commits} == all_commits(store).keys(), "commits of a rebuild"
    heads = {name: tip.commit for name, tip in history.branches.items()}
    assert heads == {ref.name: ref.commit for ref in store.branches()}, "branches of a rebuild"
    assert dict(history.tags) == {ref.name: ref.commit for ref in store.tags()}, "tags of a rebuild"


# --- Many schedules ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Count:
    """What was tried."""

    schedules: Counter[str] = field(default_factory=Counter)
    switches: int = 0
    calls: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    """Errors that an actor met because of the other one, by kind."""
    broken: list[str] = field(default_factory=list)

    def add(self, name: str, told: Told) -> None:
        self.schedules[name] += 1
        self.switches += told.switches
        self.calls += len(told.calls)
        self.refusals.update(type(error).__name__ for error in told.errors.values())


def by_chance(scene: Stage, names: Sequence[str], seeds: Sequence[int], count: Count, seconds: float = 1e9) -> None:
    """Play scenarios in turn, a seed each; stop early after some seconds."""
    end = time.monotonic() + seconds
    for seed, name in zip(seeds, itertools.cycle(names), strict=False):
        if time.monotonic() > end:
            return
        _try(scene, name, by_seed(seed), count, seed)


def every_two_switches(scene: Stage, name: str, count: Count) -> None:
    """Play a scenario of two actors by every schedule of at most two switches."""
    for runs in with_two_switches(lengths_of(scene, name)):
        _try(scene, name, by_list(runs), count)


def lengths_of(scene: Stage, name: str) -> dict[str, int]:
    """Return how many calls each actor makes where it is the first."""
    found: dict[str, int] = {}
    for who in SCENARIOS[name]:
        told = play(scene, name, by_list([(who, 1_000_000)]))
        found[who] = sum(name == who for name, _ in told.calls)
    return found


def replay(scene: Stage, name: str, schedule: str) -> Told:
    """Play a scenario by the schedule that a failure printed."""
    return play(scene, name, by_list(read_runs(schedule)))


def _try(scene: Stage, name: str, choose: Choose, count: Count, seed: int | None = None) -> None:
    try:
        count.add(name, play(scene, name, choose, seed))
    except BrokenError as error:
        count.schedules[name] += 1
        count.broken.append(str(error))
