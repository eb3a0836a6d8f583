"""What a process does to a store while it is killed, what must be true of what is left, and how one goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import pytest

import tailorstore as ts
from tailorstore.catalog import upgrade
from tailorstore.catalog.database import Database
from tailorstore.catalog.schema import HEAD, migrate, read_revision
from tailorstore.catalog.urls import parse_url
from tailorstore.domain.errors import SchemaOutdatedError
from tests.crash.content import NOW, check_composite, check_composites, check_whole, commit, slots, weights
from tests.crash.fuse import Fuse
from tests.crash.places import Place
from tests.kit.audit import assert_root_is_exact, let_claims_lapse, refs
from tests.kit.models import assert_same


class Scenario(Protocol):
    """Something that a process does to a store while it is killed."""

    @property
    def makes_schema(self) -> bool:
        """Whether the making of the schema belongs to what is killed; else it is copied, ten times as fast."""
        ...

    def prepare(self, place: Place) -> None:
        """Make the store as it is before."""

    def victim(self, place: Place, fuse: Fuse) -> None:
        """Do it, in the process that is killed."""

    def recover(self, place: Place, fuse: Fuse) -> None:
        """Do what one does after such a death; is killed in its turn."""

    def check(self, place: Place) -> None:
        """Look at what is left; may change it."""


class _Swept:
    """Recovers by collecting what dead processes have left."""

    __slots__ = ()
    makes_schema = False

    def recover(self, place: Place, fuse: Fuse) -> None:
        store = place.open()
        let_claims_lapse(store)
        fuse.arm()
        store.gc(grace=NOW)
        store.close()


def check_rebuilt(place: Place, allowed: Sequence[list[int]]) -> None:
    """Fail unless a root that lost its catalog is rebuilt to a line of steps that is allowed, all of it whole."""
    with place.without_catalog().open() as store:
        if not store.writable:
            store.rebuild_catalog()
        steps = check_composites(store)
        assert steps in allowed, f"rebuilt to {steps}"
        assert store.verify().ok, store.verify().damages


@dataclass(frozen=True, slots=True)
class Committing(_Swept):
    """A commit: on a store that has none yet, or after others."""

    before: tuple[int, ...]
    step: int
    block: bool = True
    light: bool = False
    partial: bool = False

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            for step in self.before:
                commit(store, step, light=self.light)

    def victim(self, place: Place, fuse: Fuse) -> None:
        store = place.open()
        fuse.arm()
        commit(store, self.step, block=self.block, light=self.light, partial=self.partial)
        store.close()

    def check(self, place: Place) -> None:
        old = sorted(self.before, reverse=True)
        new = [self.step, *old]
        with place.open(create=False) as store:
            has_manifest = len(list(store._objects.list("commits/"))) > len(old)
        # Without a manifest of its own, a commit cannot show in what is rebuilt.
        if has_manifest:
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


@dataclass(frozen=True, slots=True)
class Branching(_Swept):
    """Commits on two branches, in turn, by one process."""

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            commit(store, 10)
            commit(store, 20)
            store.branch("side", 20)

    def victim(self, place: Place, fuse: Fuse) -> None:
        main, side = place.open(), place.open(branch="side")
        fuse.arm()
        commit(main, 30)
        commit(side, 25)
        commit(side, 40)
        main.close()
        side.close()

    def check(self, place: Place) -> None:
        with place.open(create=False) as store:
            heads = check_composites(store, "main"), check_composites(store, "side")
            lines = [([20, 10], [20, 10]), ([30, 20, 10], [20, 10]), ([30, 20, 10], [25, 20, 10])]
            assert heads in [*lines, ([30, 20, 10], [40, 25, 20, 10])], heads
            check_whole(store)


@dataclass(frozen=True, slots=True)
class Restoring(_Swept):
    """A restore: the reader dies with its lease."""

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            for step in (10, 20, 30):
                commit(store, step)

    def victim(self, place: Place, fuse: Fuse) -> None:
        store = place.open()
        fuse.arm()
        with store.checkout(20) as checkpoint:
            assert_same({"a.w": checkpoint.model_state_dict()["a.w"]}, {"a.w": weights(20)["a.w"]})
            state = checkpoint.optim_state_dict()
            assert isinstance(state, dict)
            assert_same(state["state"]["a.w"], slots(20))
        store.close()

    def check(self, place: Place) -> None:
        with place.open(create=False) as store:
            assert check_composites(store) == [30, 20, 10]
            # The lease that may have been left holds what its reader was at, and then lapses.
            assert {one.step for one in store.gc(ts.KeepLast(1), grace=NOW).expired} in ({10}, {10, 20})
            let_claims_lapse(store)
            store.gc(ts.KeepLast(1), grace=NOW)
            assert check_steps(store) == [30]
            assert_root_is_exact(store)


def check_steps(store: ts.Store) -> list[int]:
    """Fail unless all that a branch still has reads back, whatever was expired before it; return the steps."""
    steps = [one.step for one in store.log()]
    for step in steps:
        check_composite(store, str(step))
    return steps


@dataclass(frozen=True, slots=True)
class Collecting:
    """GC under a policy, on a store with a tag, and with what a commit that died has left."""

    light: bool = False
    """Whether what is kept needs layers of a commit that is dropped."""
    makes_schema = False

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            for step in (10, 20, 30, 40):
                commit(store, step, light=self.light)
            store.tag("kept", 20)
            left = "0123456789abcdef0123"
            for key in (f"layers/a/{left}/zarr.json", f"layers/a/{left}/a.w/c.0"):
                store._objects.put(key, b"{")

    def victim(self, place: Place, fuse: Fuse) -> None:
        store = place.open()
        fuse.arm()
        store.gc(ts.KeepLast(1), grace=NOW)
        store.close()

    recover = victim

    def check(self, place: Place) -> None:
        old, new = [40, 30, 20, 10], [40, 20]
        # A manifest goes before its layers do, so what a rebuild brings back is whole.
        check_rebuilt(place, [old, [40, 30, 20], [40, 20, 10], new])
        with place.open(create=False) as store:
            assert check_steps(store) in (old, new)
            assert refs(store) == {"branch main": 40, "tag kept": 20}
            assert store.verify().ok, store.verify().damages
            let_claims_lapse(store)
            store.gc(ts.KeepLast(1), grace=NOW)
            assert check_steps(store) == new
            assert_root_is_exact(store)
            check_whole(store)


@dataclass(frozen=True, slots=True)
class Naming(_Swept):
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
        with place.without_catalog().open() as store:
            store.rebuild_catalog()
            assert refs(store) in states, refs(store)
            assert check_composites(store) == [30, 20, 10]
        with place.open(create=False) as store:
            assert refs(store) in states, refs(store)
            for name in refs(store):
                check_composite(store, name.partition(" ")[2])
            assert check_composites(store) == [30, 20, 10]
            check_whole(store)


@dataclass(frozen=True, slots=True)
class Rebuilding:
    """A take-over: of a root that lost its catalog, or by a second catalog."""

    lost: bool
    makes_schema = False

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            for step in (10, 20, 30):
                commit(store, step)
            store.branch("side", 20)
            store.tag("kept", 10)
        if self.lost and place.database is not None:
            migrate(parse_url(place.database), "base")
        elif self.lost:
            for path in place.folder.rglob("catalog.*"):
                path.unlink()

    def victim(self, place: Place, fuse: Fuse) -> None:
        store = place.open(catalog=None if self.lost else place.other_catalog)
        fuse.arm()
        store.rebuild_catalog()
        store.close()

    recover = victim

    def check(self, place: Place) -> None:
        names = {"branch main": 30, "branch side": 20, "tag kept": 10}
        with place.open() as owner:
            assert check_composites(owner) == [30, 20, 10]
            was_owner = owner.writable
        with place.open(catalog=None if self.lost else place.other_catalog) as store:
            assert not (was_owner and store.writable) or self.lost
            assert (steps := check_composites(store)) == [30, 20, 10], steps
            # Until the end of the take-over nobody may own the root, and it is taken over again.
            store.rebuild_catalog()
            assert store.writable
            assert refs(store) == names
            assert check_composites(store) == [30, 20, 10]
            check_whole(store)


@dataclass(frozen=True, slots=True)
class Upgrading:
    """The upgrade of a catalog whose schema is older."""

    makes_schema = True
    before = "0003"

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            for step in (10, 20, 30):
                commit(store, step)
            store.tag("kept", 20)
        migrate(parse_url(place.catalog), self.before)

    def victim(self, place: Place, fuse: Fuse) -> None:
        fuse.arm()
        upgrade(place.catalog)

    recover = victim

    def check(self, place: Place) -> None:
        database = Database(parse_url(place.catalog))
        revision = database.read(read_revision)
        database.close()
        assert revision in (self.before, HEAD), revision
        if revision != HEAD:
            with pytest.raises(SchemaOutdatedError, match="tailorstore upgrade"):
                place.open()
        assert upgrade(place.catalog) == (revision, HEAD)
        with place.open(create=False) as store:
            assert store.writable
            assert refs(store) == {"branch main": 30, "tag kept": 20}
            assert check_composites(store) == [30, 20, 10]
            # Manifests say more of lines than the older catalog knew: those of its time did not.
            store.rebuild_catalog()
            check_whole(store)


@dataclass(frozen=True, slots=True)
class Repairing:
    """A verify with repair, of a store with a damaged layer and a manifest that is gone."""

    makes_schema = False

    def prepare(self, place: Place) -> None:
        with place.open() as store:
            for step in (10, 20, 30):
                commit(store, step)
            damaged = store.show(20).id
            key = next(info.key for info in store._objects.list("layers/a/") if f"/{damaged}/a.w/c." in info.key)
            data = bytearray(store._objects.get(key))
            data[0] ^= 1
            store._objects.replace(key, data)
            store._objects.delete([f"commits/{store.show(10).id}.json"])

    def victim(self, place: Place, fuse: Fuse) -> None:
        store = place.open()
        fuse.arm()
        store.verify(repair=True)
        store.close()

    recover = victim

    def check(self, place: Place) -> None:
        with place.open(create=False) as store:
            store.verify(repair=True)
            quarantined = {store.show(20).id: ("a",)}
            assert store.quarantined() == quarantined
            for step in (10, 30):
                check_composite(store, str(step))
        with place.without_catalog().open() as store:
            store.rebuild_catalog()
            assert [one.step for one in store.log()] == [30, 20, 10]
            assert store.quarantined() == quarantined
        with place.open(create=False) as store:
            commit(store, 90)
            let_claims_lapse(store)
            store.gc(ts.KeepLast(2), grace=NOW)
            assert check_steps(store) == [90, 30]
            assert_root_is_exact(store)
            assert store.verify().ok


@dataclass(frozen=True, slots=True)
class Opening:
    """The first opening, which makes root, schema and store."""

    makes_schema = True

    def prepare(self, place: Place) -> None:
        place.folder.mkdir(exist_ok=True)

    def victim(self, place: Place, fuse: Fuse) -> None:
        fuse.arm()
        place.open().close()

    recover = victim

    def check(self, place: Place) -> None:
        with place.open() as store:
            assert store.writable
            assert check_composites(store) == []
            check_whole(store)


SCENARIOS: Final[dict[str, Scenario]] = {
    "first commit": Committing((), 10),
    "commit": Committing((10, 20), 30),
    "full commit": Committing((10, 20), 40),
    "partial commit": Committing((10, 20), 25, partial=True),
    "commit behind": Committing((10, 20), 30, block=False),
    "light commit": Committing((10, 20), 30, light=True),
    "light commit behind": Committing((10, 20), 30, block=False, light=True),
    "two branches": Branching(),
    "restore": Restoring(),
    "gc": Collecting(),
    "gc of bases": Collecting(light=True),
    "names": Naming(),
    "rebuild": Rebuilding(lost=True),
    "take over": Rebuilding(lost=False),
    "repair": Repairing(),
    "upgrade": Upgrading(),
    "opening": Opening(),
}
