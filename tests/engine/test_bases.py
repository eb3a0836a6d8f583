"""A base lives as long as a light version needs it: through GC, verification, damage and the loss of the catalog."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.names import manifest_key, version_prefix
from tailorstore.domain.records import EXTRA_LAYER, Composite, LayerMeasures
from tailorstore.engine.write import write_layers
from tailorstore.storage.manifests import read_manifest, write_manifest
from tailorstore.storage.transport import DeleteFailure
from tests.conftest import Root
from tests.kit.audit import all_commits, assert_root_is_exact

NOW = timedelta(0)
BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)
LIGHT = {"*": "light"}
ALL = ("a", "b", "c")


class Run:
    """A training run without a trainer: three layers that drift a little at every step."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.weights = {f"{layer}.w": self._noise() for layer in ALL}

    def _noise(self) -> torch.Tensor:
        return torch.randn(48, 64, generator=self._generator)

    def commit(self, store: ts.Store, step: int, mask: Any = None) -> ts.Commit:
        self.weights = {name: weight + 0.01 * self._noise() for name, weight in self.weights.items()}
        return store.commit(step, self.weights, mask=mask)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ts.Store]:
    with ts.open_store(tmp_path / "root") as opened:
        yield opened


def values(store: ts.Store, ref: str | int | ts.Commit = "latest") -> dict[str, bytes]:
    """Return what a composite restores, to the bit."""
    with store.checkout(ref) as checkpoint:
        return {name: tensor.numpy().tobytes() for name, tensor in checkpoint.model_state_dict().items()}


def versions_in(store: ts.Store) -> set[tuple[str, str]]:
    """Return the (layer, version id) pairs of which the root holds objects."""
    keys = [info.key.split("/") for info in store._objects.list("layers/")]
    return {(key[1], key[2]) for key in keys}


def history(store: ts.Store) -> list[tuple[Composite, Mapping[str, LayerMeasures]]]:
    """Return all that the catalog knows of the commits of the branch, but for the moment of publication."""
    found: list[tuple[Composite, Mapping[str, LayerMeasures]]] = []
    for commit, measures in store._catalog.measures("main"):
        composite = store._catalog.composite(commit.id)
        assert composite.commit == commit
        found.append((replace(composite, commit=replace(commit, created_at=BEGINNING)), measures))
    return found


def test_the_base_outlives_its_commit_and_goes_with_the_last_light_version(root: Root, catalog_url: str) -> None:
    run = Run()
    with ts.open_store(root.url, catalog=catalog_url, storage_options=root.storage_options) as store:
        first = run.commit(store, 1)
        made = [run.commit(store, step, LIGHT) for step in (2, 3, 4)]
        before = values(store)
        plan = store.gc(ts.KeepLast(1), grace=NOW, dry_run=True)
        assert values(store, 2) != before
        report = store.gc(ts.KeepLast(1), grace=NOW)
        assert report.versions_doomed == report.versions_swept == plan.versions_doomed
        assert report.bytes_freed == plan.bytes_to_free > 0
        # Of the first commit only its own extra state went.
        assert versions_in(store) == {
            *((layer, first.id) for layer in ALL),
            *((layer, made[-1].id) for layer in (*ALL, EXTRA_LAYER)),
        }
        assert_root_is_exact(store)
        assert store.verify().ok
        assert values(store) == before
        assert {one.base_step for one in store.layers() if one.name != EXTRA_LAYER} == {1}
        # A light commit on that base still works, and a full one ends it.
        fifth = run.commit(store, 5, {"a": "light"})
        assert {
            name: one.version_id for name, one in store._catalog.composite(fifth.id).bases.items()
        } == dict.fromkeys(ALL, first.id)
        last = run.commit(store, 6)
        store.gc(ts.KeepLast(1), grace=NOW)
        assert versions_in(store) == {(layer, last.id) for layer in (*ALL, EXTRA_LAYER)}
        assert_root_is_exact(store)
        assert values(store) == {name: weight.numpy().tobytes() for name, weight in run.weights.items()}


def test_a_commit_under_way_keeps_the_bases_that_it_builds_on(
    store: ts.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run()
    first = run.commit(store, 1)
    run.commit(store, 2, LIGHT)

    def collect_first(*args: Any) -> None:
        with ts.open_store(tmp_path / "root") as other:
            assert [one.step for one in other.gc(ts.KeepLast(1), grace=NOW).expired] == [1]
        write_layers(*args)

    monkeypatch.setattr("tailorstore.engine.commit.write_layers", collect_first)
    third = run.commit(store, 3, LIGHT)
    monkeypatch.undo()
    assert store.verify().ok
    assert {one.version_id for one in store._catalog.composite(third.id).bases.values()} == {first.id}
    store.gc(ts.KeepLast(1), grace=NOW)
    assert versions_in(store) == {(layer, one) for layer in ALL for one in (first.id, third.id)} | {
        (EXTRA_LAYER, third.id)
    }
    assert_root_is_exact(store)
    assert set(values(store)) == {"a.w", "b.w", "c.w"}


def test_a_manifest_that_stays_holds_the_bases_too(store: ts.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    first, second, _ = run.commit(store, 1), run.commit(store, 2, LIGHT), run.commit(store, 3)
    objects = store._objects
    delete = objects.delete

    def stubborn(keys: Sequence[str]) -> list[DeleteFailure]:
        kept = manifest_key(second.id)
        return [
            *delete([key for key in keys if key != kept]),
            *(DeleteFailure(key, "busy") for key in keys if key == kept),
        ]

    monkeypatch.setattr(objects, "delete", stubborn)
    report = store.gc(ts.KeepLast(1), grace=NOW)
    monkeypatch.undo()
    assert report.deletes_failed == 1
    # A catalog that is rebuilt now would find the second commit, which needs the first one's layers.
    assert not objects.exists(manifest_key(first.id))
    assert {(layer, first.id) for layer in ALL} <= versions_in(store)
    store.rebuild_catalog()
    assert store.verify().ok
    store.gc(ts.KeepLast(1), grace=NOW)
    assert_root_is_exact(store)
    assert [one.step for one in store.log()] == [3]


def test_a_lost_catalog_comes_back_with_bases_whose_commits_are_gone(tmp_path: Path) -> None:
    run = Run()
    root, catalog, other = tmp_path / "root", tmp_path / "catalog.sqlite", f"sqlite:///{tmp_path}/other.sqlite"
    with ts.open_store(root, catalog=f"sqlite:///{catalog}") as store:
        run.commit(store, 1)
        for step in (2, 3, 4):
            run.commit(store, step, LIGHT)
        run.commit(store, 5, {"b": "full", "a": "light"})
        for step in (6, 7):
            run.commit(store, step, LIGHT)
        store.gc(ts.KeepLast(2), grace=NOW)
        before, stats = history(store), store.stats()
        restored = {step: values(store, step) for step in (6, 7)}
        assert [{base.step for base in composite.bases.values()} for composite, _ in before] == [{1, 5}, {1, 5}]
        assert all(set(measures) == set(ALL) for _, measures in before)
    # Read from its manifests, by somebody whose catalog does not own it.
    with ts.open_store(root, catalog=other) as copy:
        assert not copy.owned
        assert (history(copy), copy.stats()) == (before, stats)
        assert {step: values(copy, step) for step in (6, 7)} == restored
    catalog.unlink()
    with ts.open_store(root, catalog=f"sqlite:///{catalog}") as store:
        store.rebuild_catalog()
        assert (history(store), store.stats()) == (before, stats)
        assert {step: values(store, step) for step in (6, 7)} == restored
        assert store.verify().ok
        swept = store.gc(grace=NOW)
        assert (swept.versions_doomed, swept.objects_deleted) == (0, 0)
        run.commit(store, 8, LIGHT)
        store.gc(ts.KeepLast(1), grace=NOW)
        assert_root_is_exact(store)
        assert {base.step for base in store._catalog.composite(store.log()[0].id).bases.values()} == {1, 5}
        assert store.verify().ok


def chunk_of(store: ts.Store, root: Path, layer: str, version_id: str) -> Path:
    """Return a file of a version that holds elements."""
    found = (root / version_prefix(layer, version_id)).rglob("c.*")
    return min(path for path in found if path.is_file())


def test_verify_reads_each_base_once_and_says_who_needs_a_damaged_one(store: ts.Store, tmp_path: Path) -> None:
    run = Run()
    first = run.commit(store, 1)
    light = [run.commit(store, step, LIGHT) for step in (2, 3)]
    later = run.commit(store, 4, ["b", "c"])
    last = run.commit(store, 5)
    everything = store.verify()
    assert everything.ok
    assert everything.versions == store.stats().versions
    # Two of its own, a light version that the commit before wrote, and that one's base.
    assert store.verify(4).versions == 5
    assert store.verify(3).versions == 7
    assert store.verify(5).versions == 4
    path = chunk_of(store, tmp_path / "root", "a", first.id)
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    for ref in (None, 1, 2, 3, 4):
        (damage,) = store.verify(ref).damages
        assert (damage.kind, damage.layer, damage.step) == ("flipped", "a", 1)
        assert damage.commits == tuple(one.id for one in (first, *light, later))
    assert store.verify(5).ok
    # Its own commit is gone, and it is damage all the same, as others still need it.
    store.tag("kept", later)
    store.gc(ts.KeepLast(1), grace=NOW)
    for damages in (store.verify().damages, store.verify("kept").damages):
        assert [one.commits for one in damages] == [(later.id,)]
    with pytest.raises(ts.IntegrityError):
        values(store, "kept")
    store.delete_tag("kept")
    store.gc(ts.KeepLast(1), grace=NOW)
    assert store.verify().ok
    assert [one.id for one in store.log()] == [last.id]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "bases": lambda one: replace(one, bases={**one.bases, "a": replace(one.bases["a"], digest="xxh3-128:" + "0" * 32)}),
    "measures": lambda one: replace(one, measures={"a": LayerMeasures(1.0, 2.0, 3.0, None, None)}),
    "versions": lambda one: replace(one, versions={**one.versions, "a": replace(one.versions["a"], error=0.5)}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_manifest_of_another_history_is_damage(store: ts.Store, what: str) -> None:
    run = Run()
    run.commit(store, 1)
    made = run.commit(store, 2, LIGHT)
    manifest = read_manifest(store._objects, made.id)
    key = manifest_key(made.id)
    assert store.verify().ok
    store._objects.delete([key])
    assert write_manifest(store._objects, CHANGES[what](manifest)) == key
    for ref in (None, 2):
        (damage,) = store.verify(ref).damages
        assert (damage.kind, damage.key, damage.commits) == ("document", key, (made.id,))


@pytest.mark.parametrize("seed", range(3))
def test_any_history_of_full_and_light_commits_keeps_every_value(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    run = Run(seed)
    seen: dict[str, dict[str, bytes]] = {}
    with ts.open_store(tmp_path / "root") as store:
        for step in range(1, 30):
            match chance.randrange(8) if step > 1 else 7:
                case 0:
                    store.branch(f"fork{step}", chance.choice(sorted(all_commits(store))))
                case 1:
                    store.tag(f"tag{step}", chance.choice(sorted(all_commits(store))))
                case 2:
                    for tag in store.tags():
                        store.delete_tag(tag.name)
                case 3:
                    store.gc(ts.KeepLast(chance.randrange(1, 4)), grace=NOW)
                    assert_root_is_exact(store)
                case 4 if chance.random() < 0.5:
                    store.rebuild_catalog()
                case _:
                    mask = {layer: chance.choice([True, False, "light", "light"]) for layer in ALL}
                    made = run.commit(store, step, mask)
                    seen[made.id] = values(store, made)
            for commit_id in all_commits(store):
                assert values(store, commit_id) == seen[commit_id]
        assert store.verify().ok
        store.gc(ts.KeepLast(1), grace=NOW)
        assert_root_is_exact(store)
        assert store.verify().ok
