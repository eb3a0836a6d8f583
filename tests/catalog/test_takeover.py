"""A catalog rebuilt from manifests shows the same history."""

import random
from dataclasses import replace
from datetime import timedelta

import pytest

from tailorstore.catalog import Catalog, StoreCatalog
from tailorstore.domain.errors import CorruptDocumentError, RefNotFoundError, RootTakenError
from tailorstore.domain.lines import Tip
from tailorstore.domain.names import new_id
from tailorstore.domain.records import Binding, CommitManifest
from tests.catalog.kit import announce, at, commit, commit_light, measured, publish, steps, version


def manifests_of(store: StoreCatalog) -> list[CommitManifest]:
    """Return what the root would hold, oldest first."""
    found = sorted(store.inventory().commits().values(), key=lambda one: one.created_at)
    binding = store.binding()
    composites = {one.id: store.composite(one.id) for one in found}
    return [
        CommitManifest(
            binding,
            one,
            composites[one.id].versions,
            composites[one.id].bases,
            store.measures_of(one.id),
            store.lines_to(one.id),
        )
        for one in found
    ]


def rebuild(catalog: Catalog, store: StoreCatalog, manifests: list[CommitManifest] | None = None) -> StoreCatalog:
    """Take a store over from its own manifests and refs."""
    heads = {one.name: Tip(one.commit, store.lines_of(one.name)[0].line) for one in store.branches() if one.commit}
    fixed = {one.name: one.commit for one in store.tags() if one.commit}
    binding = replace(store.binding(), epoch=store.binding().epoch + 1)
    return catalog.take_over(binding, "file:///data/run", manifests or manifests_of(store), heads, fixed)


def test_everything_is_as_before(catalog: Catalog, store: StoreCatalog) -> None:
    commit(store, 1)
    second = commit(store, 2, ["b"])
    commit_light(store, 3, "b", second.id)
    store.branch("exp", second.id, move=False)
    commit(store, 5, ["a"], "exp")
    store.tag("best", second.id)
    logs = {name: store.log(name) for name in ("main", "exp")}
    composites = {one.id: store.composite(one.id) for log in logs.values() for one in log}
    again = rebuild(catalog, store)
    assert {name: again.log(name) for name in ("main", "exp")} == logs
    assert {one: again.composite(one) for one in composites} == composites
    assert [(one.name, one.step) for one in again.tags()] == [("best", 2)]
    commit(again, 6, branch="exp")
    commit(again, 4)
    assert steps(again) == [4, 3, 2, 1]
    assert steps(again, "exp") == [6, 5, 2, 1]
    fresh = catalog.store("store-1")
    assert fresh is not None
    assert fresh.epoch == 2


def test_what_the_catalog_knew_besides_is_forgotten(catalog: Catalog, store: StoreCatalog) -> None:
    first, second = commit(store, 1), commit(store, 2)
    claimed = announce(store, 3)
    store.tag("best", first.id)
    manifests = manifests_of(store)[1:]
    heads = {"main": Tip(second.id, first.id)}
    again = catalog.take_over(Binding("store-1", catalog.catalog_id, 2), "r", manifests, heads, {})
    assert again.unknown_commits([first.id, second.id, claimed.id]) == {first.id, claimed.id}
    assert again.unknown_versions([("a", first.id), ("a", second.id)]) == {("a", first.id)}
    assert again.tags() == []
    assert again.stats().versions == 3
    with pytest.raises(RootTakenError):
        publish(store, claimed)


def test_other_stores_are_left_alone(catalog: Catalog, store: StoreCatalog) -> None:
    other = catalog.register("store-2", "file:///other", 1)
    commit(other, 1)
    before = other.stats()
    commit(store, 1)
    rebuild(catalog, store)
    assert other.stats() == before
    commit(other, 2)


def test_a_fresh_catalog_can_read_a_root_of_another(catalog: Catalog, store: StoreCatalog) -> None:
    made = commit(store, 1)
    copied = [replace(one, binding=Binding("copy", "other", 4)) for one in manifests_of(store)]
    copy = catalog.take_over(Binding("copy", "other", 4), "file:///x", copied, {"main": Tip(made.id, made.id)}, {})
    assert copy.epoch == 4
    assert at(copy, "latest").commit == made


def test_names_of_missing_commits_change_nothing(catalog: Catalog, store: StoreCatalog) -> None:
    made = commit(store, 1)
    binding = Binding("store-1", catalog.catalog_id, 2)
    manifests = manifests_of(store)
    for heads, tags in (({"main": Tip(new_id(), new_id())}, {}), ({}, {"best": new_id()})):
        with pytest.raises(RefNotFoundError, match="of which there is no manifest"):
            catalog.take_over(binding, "r", manifests, heads, tags)
    assert store.head("main") == made
    commit(store, 2)


def test_a_light_version_without_its_base_changes_nothing(catalog: Catalog, store: StoreCatalog) -> None:
    base = commit(store, 1)
    commit_light(store, 2, "a", base.id)
    with pytest.raises(CorruptDocumentError, match="layer 'a'"):
        rebuild(catalog, store, [replace(one, bases={}) for one in manifests_of(store)[1:]])
    assert steps(store) == [2, 1]


def test_bases_whose_commits_are_gone_come_back_with_the_light_versions(catalog: Catalog, store: StoreCatalog) -> None:
    first = publish(store, announce(store, 1), ["a", "b"], {"a": measured(1)})
    second = commit(store, 2, ["b"])
    third = commit_light(store, 3, "a", first.id)
    fourth = publish(store, (draft := announce(store, 4)), [version("b", draft.id, 4, second.id)], {"b": measured(4)})
    fifth = publish(store, (draft := announce(store, 5)), [version("a", draft.id, 5, first.id)], {"a": measured(5)})
    store.expire([first.id, second.id, third.id])
    store.bury(store.doomed(timedelta(0)))
    before = (store.stats(), store.measures("main"), [store.composite(one.id) for one in (fourth, fifth)])
    kept = {(one.layer, one.version_id): one for one in store.live_versions()}
    assert set(before[2][1].bases) == {"a", "b"}
    again = rebuild(catalog, store)
    assert (again.stats(), again.measures("main"), [again.composite(one.id) for one in (fourth, fifth)]) == before
    assert {(one.layer, one.version_id): one for one in again.live_versions()} == kept
    # And they are bases as before: alive as long as they are needed, and no longer.
    last = commit(again, 6, ["b"])
    again.expire([fourth.id, fifth.id])
    alive = {(one.layer, one.version_id) for one in again.live_versions()}
    assert alive == {("@extra", last.id), ("b", last.id), ("a", fifth.id), ("a", first.id)}


def test_measures_that_the_catalog_knew_besides_are_forgotten(catalog: Catalog, store: StoreCatalog) -> None:
    first = publish(store, announce(store, 1), ["a"], {"a": measured(1)})
    (manifest,) = manifests_of(store)
    again = rebuild(catalog, store, [replace(manifest, measures={"b": measured(2)})])
    assert again.measures_of(first.id) == {"b": measured(2)}


def test_gaps_of_expired_parents_do_not_break_the_log(catalog: Catalog, store: StoreCatalog) -> None:
    made = [commit(store, step) for step in range(1, 8)]
    store.expire([made[1].id, made[3].id, made[4].id])
    assert steps(rebuild(catalog, store)) == [7, 6, 3, 1]


def test_gaps_after_a_move_back_keep_the_two_futures_apart(catalog: Catalog, store: StoreCatalog) -> None:
    made = [commit(store, step) for step in (1, 2, 5)]
    store.branch("main", made[1].id, move=True)
    commit(store, 3)
    commit(store, 9)
    store.expire([made[1].id])
    assert steps(store) == [9, 3, 1]
    assert steps(rebuild(catalog, store)) == [9, 3, 1]


def test_a_first_commit_after_a_deleted_branch_begins_anew(catalog: Catalog, store: StoreCatalog) -> None:
    commit(store, 5)
    store.delete_branch("main")
    commit(store, 9)
    again = rebuild(catalog, store)
    assert steps(again) == [9]


@pytest.mark.parametrize("seed", range(4))
def test_any_history_is_rebuilt(catalog: Catalog, store: StoreCatalog, seed: int) -> None:
    chance = random.Random(seed)
    commit(store, 0)
    for step in range(1, 30):
        branch = chance.choice([one.name for one in store.branches()])
        everything = list(store.inventory().commits())
        match chance.randrange(6):
            case 0:
                store.branch(f"b{step}", chance.choice(everything), move=False)
            case 1:
                store.branch(branch, chance.choice(everything), move=True)
            case 2:
                store.expire(chance.sample(everything, len(everything) // 3))
            case _:
                commit(store, step, chance.sample(["a", "b"], chance.randrange(3)), branch)
    logs = {one.name: store.log(one.name) for one in store.branches()}
    unreachable = {one.id for one in store.inventory().unreachable}
    again = rebuild(catalog, store)
    assert {one.name: again.log(one.name) for one in again.branches()} == logs
    assert {one.id for one in again.inventory().unreachable} == unreachable
    for name in logs:
        commit(again, 100, branch=name)
        assert again.log(name)[1:] == logs[name]
