"""Who meets whom under a scheduler, and at what: verbs, and scenarios made of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import tailorstore as ts
from tailorstore.catalog.catalog import Catalog
from tailorstore.domain.errors import (
    BranchExistsError,
    HeadMovedError,
    RefNotFoundError,
    RootTakenError,
    StepOrderError,
    StorageUnavailableError,
    TagExistsError,
    TailorError,
)
from tests.soak.content import FROZEN, LAYERS, LIGHT, compare, sources_after, state_at

NOW: Final = timedelta(0)
FROZEN_SINCE: Final = {FROZEN: 10}
SOME_LIGHT: Final = {"a": "light", "b/x": "full", "c": "full"}


@dataclass(slots=True)
class World:
    """A store with the catalogs that want it, and what the actors were told."""

    folder: Path
    published: dict[str, str] = field(default_factory=dict)
    """Ids of commits whose publication was acknowledged → on which branch."""
    moved: bool = False
    """Whether somebody moved or deleted a branch, so that commits may be on none."""

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def catalog(self, name: str) -> str:
        return f"sqlite:///{self.folder}/{name}.db"

    def open(self, catalog: str = "a", branch: str = "main") -> ts.Store:
        return ts.open_store(self.root, catalog=self.catalog(catalog), branch=branch, light=LIGHT)


Act = Callable[[World, ts.Store], None]


@dataclass(frozen=True, slots=True)
class Actor:
    """Somebody with a store of their own, opened before the schedule begins."""

    act: Act
    may_fail: tuple[type[TailorError], ...] = ()
    """With these, for reasons that the other actor gives."""
    catalog: str = "a"
    branch: str = "main"


# --- What actors do ----------------------------------------------------------------------------------------------


def commit(step: int, mask: Any = None, frozen: Mapping[str, int] | None = FROZEN_SINCE) -> Act:
    def act(world: World, store: ts.Store) -> None:
        sources = {**(frozen or {}), **dict.fromkeys(LAYERS, step)}
        found = store.commit(step, state_at(step), None, mask, extra={"sources": sources, "step": step})
        world.published[found.id] = store.branch_name

    return act


def collect(keep: int | None = 1) -> Act:
    def act(_world: World, store: ts.Store) -> None:
        store.gc(ts.KeepLast(keep) if keep else None, grace=NOW)

    return act


def read(ref: str) -> Act:
    def act(_world: World, store: ts.Store) -> None:
        with store.checkout(ref) as checkpoint:
            for _ in range(2):
                _, wrong = compare(checkpoint)
                assert not wrong, wrong
                # What was read is in no memory any more: the next look goes to storage.
                checkpoint._contents = type(checkpoint._contents)(checkpoint._composite, store._objects, None)

    return act


def take_over(_world: World, store: ts.Store) -> None:
    store.rebuild_catalog()


def tag(_world: World, store: ts.Store) -> None:
    store.tag("new", "main@10")


def untag(_world: World, store: ts.Store) -> None:
    store.delete_tag("kept")


def retag(_world: World, store: ts.Store) -> None:
    store.tag("kept", "main@30")
    store.delete_tag("kept")
    store.tag("kept", "main@40")


def move(ref: str) -> Act:
    def act(world: World, store: ts.Store) -> None:
        world.moved = True
        store.branch("main", ref, move=True)

    return act


def fork(_world: World, store: ts.Store) -> None:
    store.branch("try", "main@10")


def unbranch(world: World, store: ts.Store) -> None:
    world.moved = True
    store.delete_branch("side")


def verify(_world: World, store: ts.Store) -> None:
    damages = store.verify().damages
    assert not damages, damages


def in_turn(*acts: Act) -> Act:
    def act(world: World, store: ts.Store) -> None:
        for one in acts:
            one(world, store)

    return act


def elsewhere(catalog: str, *acts: Act) -> Act:
    """Do something with a store opened for it, in another catalog."""

    def act(world: World, _store: ts.Store) -> None:
        with world.open(catalog) as store:
            in_turn(*acts)(world, store)

    return act


_TAKEN = (RootTakenError,)
_SWEPT = (RootTakenError, StorageUnavailableError)
"""A GC without grace, by a new owner, takes what a commit of the old one is still writing: it finds some of it gone."""
_GONE = (RefNotFoundError,)

SCENARIOS: Final[Mapping[str, Mapping[str, Actor]]] = {
    "commit|gc": {"commit": Actor(commit(50)), "gc": Actor(collect())},
    "light commit|gc": {"commit": Actor(commit(50, SOME_LIGHT)), "gc": Actor(collect())},
    "commit|commit": {
        "one": Actor(commit(50), (HeadMovedError, StepOrderError)),
        "two": Actor(commit(51), (HeadMovedError, StepOrderError)),
    },
    "commit|commit elsewhere": {"one": Actor(commit(50)), "two": Actor(commit(51), branch="side")},
    "gc|gc": {"one": Actor(collect()), "two": Actor(collect(2))},
    "gc|reader": {"gc": Actor(collect()), "reader": Actor(read("main@10"), _GONE)},
    "gc|reader of latest": {"gc": Actor(collect()), "reader": Actor(in_turn(read("latest"), read("side")))},
    "commit|reader": {"commit": Actor(commit(50)), "reader": Actor(read("latest"))},
    "takeover|commit": {"takeover": Actor(take_over, catalog="b"), "commit": Actor(commit(50), _TAKEN)},
    "takeover|gc": {"takeover": Actor(take_over, catalog="b"), "gc": Actor(collect(), _TAKEN)},
    "takeover|takeover": {
        "b": Actor(take_over, _TAKEN, catalog="b"),
        "c": Actor(take_over, _TAKEN, catalog="c"),
    },
    "takeover|takeover into one": {
        "b": Actor(take_over, _TAKEN, catalog="b"),
        "also b": Actor(take_over, _TAKEN, catalog="b"),
    },
    "takeover, commit, gc|commit": {
        "takeover": Actor(in_turn(take_over, commit(51), collect(None)), catalog="b"),
        "commit": Actor(commit(50), _SWEPT),
    },
    "takeover, commit, gc|gc": {
        "takeover": Actor(in_turn(take_over, commit(51), collect(None)), catalog="b"),
        "gc": Actor(collect(), _TAKEN),
    },
    "takeover, commit|tag": {
        "takeover": Actor(in_turn(take_over, commit(51)), catalog="b"),
        "tag": Actor(tag, _TAKEN),
    },
    "two takeovers, commit|late takeover": {
        "early": Actor(in_turn(take_over, elsewhere("c", take_over, commit(51)), commit(52)), _TAKEN, catalog="b"),
        "late": Actor(take_over, _TAKEN, catalog="b"),
    },
    "rebuild|gc": {"rebuild": Actor(take_over), "gc": Actor(collect(), _TAKEN)},
    "rebuild|commit": {"rebuild": Actor(take_over), "commit": Actor(commit(50), _TAKEN)},
    "tag|gc": {"tag": Actor(tag, _GONE), "gc": Actor(collect())},
    "untag|gc": {"untag": Actor(untag), "gc": Actor(collect())},
    "branch|gc": {"branch": Actor(fork, _GONE), "gc": Actor(collect())},
    "branch move|commit": {"move": Actor(move("side")), "commit": Actor(commit(50), (HeadMovedError,))},
    "branch move|branch move": {"one": Actor(move("side")), "two": Actor(move("kept"))},
    "branch move|gc": {"move": Actor(move("main@10"), _GONE), "gc": Actor(collect())},
    "branch deletion|gc": {"delete": Actor(unbranch), "gc": Actor(collect())},
    "branch deletion|commit there": {
        "delete": Actor(unbranch),
        "commit": Actor(commit(51, frozen=None), (HeadMovedError,), branch="side"),
    },
    "branch move|light commit": {
        "move": Actor(move("side")),
        "commit": Actor(commit(50, SOME_LIGHT), (HeadMovedError,)),
    },
    "tag|untag": {"tag": Actor(in_turn(untag, tag)), "again": Actor(retag, (TagExistsError, *_GONE))},
    "branch|branch": {"one": Actor(fork, (BranchExistsError,)), "two": Actor(fork, (BranchExistsError,))},
    "verify|gc": {"verify": Actor(verify), "gc": Actor(collect())},
    "verify|commit": {"verify": Actor(verify), "commit": Actor(commit(50))},
    "commit|gc|reader": {
        "commit": Actor(commit(50)),
        "gc": Actor(collect()),
        "reader": Actor(read("main@10"), _GONE),
    },
    "commit|gc|takeover": {
        "commit": Actor(commit(50), _TAKEN),
        "gc": Actor(collect(), _TAKEN),
        "takeover": Actor(in_turn(take_over, commit(51)), catalog="b"),
    },
}
"""Who meets whom. The steps 50 and 51 are committed by somebody; what was there before is :func:`prepare`'s."""


def prepare(world: World) -> None:
    """Make the store that every schedule begins with: two branches, a tag, a light version, mixed steps."""
    with world.open() as store:
        sources: dict[str, int] | None = None
        masks: dict[int, Any] = {10: None, 20: {"a": "full"}, 30: {"a": "light", "b/x": "full"}, 40: {"c": "full"}}
        for step, mask in masks.items():
            sources = sources_after(sources, step, mask or LAYERS)
            store.commit(step, state_at(step), None, mask, extra={"sources": sources, "step": step})
        store.tag("kept", "main@20")
        store.branch("side", "main@30")
    for name in "bc":
        Catalog.open(world.catalog(name), create=True).close()
