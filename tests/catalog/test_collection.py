"""What GC asks: nothing that is needed may go, and all else must."""

import random
from datetime import timedelta

import pytest

from tailorstore.catalog import StoreCatalog
from tailorstore.domain.errors import HeadMovedError
from tailorstore.domain.names import layer_component, new_id, parse_ref
from tailorstore.domain.records import EXTRA_LAYER, Commit, CommitDraft, LayerVersion
from tests.catalog.kit import LAPSED, LEASE, announce, at, commit, commit_light, publish, steps, version

NOW = timedelta(0)


def ids(*commits: Commit) -> list[str]:
    """Return commits' ids."""
    return [one.id for one in commits]


def alive(store: StoreCatalog) -> set[tuple[str, str]]:
    """Return what stands, as (layer, version id)."""
    return {(one.layer, one.version_id) for one in store.live_versions()}


def needed(store: StoreCatalog) -> set[tuple[str, str]]:
    """Return what the composites of all commits hold, and the bases of that."""
    held: set[tuple[str, str]] = set()
    for commit_id in store.inventory().commits():
        composite = store.composite(commit_id)
        held |= {(one.layer, one.version_id) for one in (*composite.versions.values(), *composite.bases.values())}
        assert {name: one.version_id for name, one in composite.bases.items()} == {
            name: one.base_id for name, one in composite.versions.items() if one.fidelity == "light"
        }
    return held


def test_the_inventory_is_what_policies_decide_upon(store: StoreCatalog) -> None:
    first, second, third = commit(store, 1), commit(store, 2), commit(store, 3)
    store.branch("exp", first.id, move=False)
    fourth = commit(store, 4, branch="exp")
    store.tag("best", second.id)
    store.branch("main", second.id, move=True)
    store.resolve(parse_ref(1), "main", LEASE)
    announce(store, 9, "exp")
    inventory = store.inventory()
    assert inventory.lines == {"exp": [fourth, first], "main": [second, first]}
    assert inventory.unreachable == (third,)
    assert inventory.tags == {"best": second.id}
    # The head that somebody is building on counts as in use.
    assert inventory.leased == {first.id, fourth.id}
    assert abs(inventory.now - store.now()) < timedelta(seconds=10)


def test_expired_commits_are_gone_and_their_versions_doomed(store: StoreCatalog) -> None:
    first, second, third = commit(store, 1), commit(store, 2, ["a"]), commit(store, 3, ["a"])
    done = store.expire(ids(first, second))
    assert done.commits == (first, second)
    # b of step 1 is held by step 3 still.
    assert done.versions_doomed == 4
    assert done.bytes_doomed == 40
    assert steps(store) == [3]
    assert alive(store) == {(EXTRA_LAYER, third.id), ("a", third.id), ("b", first.id)}
    assert at(store, "latest").sources == {EXTRA_LAYER: 3, "a": 3, "b": 1}
    assert store.stats().versions_doomed == 4
    assert store.stats().bytes_doomed == 40


def test_a_preview_has_the_same_numbers_and_changes_nothing(store: StoreCatalog) -> None:
    first, second = commit(store, 1), commit(store, 2)
    before = store.stats()
    preview = store.preview(ids(first, second))
    assert store.stats() == before
    assert steps(store) == [2, 1]
    assert preview == store.expire(ids(first, second))
    assert preview.commits == (first,)


def test_many_commits_are_dropped_a_few_at_a_time(store: StoreCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.collection._EXPIRED_TOGETHER", 2)
    full = commit(store, 0)
    light = [commit_light(store, step, "a", full.id) for step in range(1, 6)]
    last = commit(store, 6)
    store.tag("best", light[2].id)
    asked = ids(full, *light, last)
    preview = store.preview(asked)
    done = store.expire(reversed(asked))
    assert done == preview
    assert done.commits == (full, *light[:2], *light[3:])
    assert alive(store) == needed(store)
    assert not {one for one in store.doomed(NOW) if (one.layer, one.version_id) in needed(store)}


def test_heads_tags_leases_and_parents_of_pending_commits_stay(store: StoreCatalog) -> None:
    first, second, third, fourth = (commit(store, step) for step in (1, 2, 3, 4))
    store.tag("best", first.id)
    store.resolve(parse_ref(2), "main", LEASE)
    announce(store, 5)
    store.branch("main", third.id, move=True)
    assert store.expire(ids(first, second, third, fourth)).commits == ()
    store.untag("best")
    assert store.expire(ids(first, second, third, fourth)).commits == (first,)


def test_a_lapsed_pending_commit_protects_nothing(store: StoreCatalog) -> None:
    first, second = commit(store, 1), commit(store, 2)
    announce(store, 3, lease=LAPSED)
    store.branch("main", first.id, move=True)
    assert store.expire([second.id]).commits == (second,)


def test_unknown_and_repeated_ids_are_no_error(store: StoreCatalog) -> None:
    first, _ = commit(store, 1), commit(store, 2)
    assert store.expire([first.id, first.id, new_id()]).commits == (first,)
    assert store.expire([first.id]).commits == ()
    assert store.expire([]).versions_doomed == 0


def test_commits_survive_the_loss_of_all_their_ancestors(store: StoreCatalog) -> None:
    made = [commit(store, step, ["a"] if step % 2 else ["b"]) for step in range(10)]
    store.branch("exp", made[4].id, move=False)
    commit(store, 5, branch="exp")
    whole = at(store, "exp")
    store.expire(ids(*made))
    assert at(store, "exp") == whole
    assert steps(store) == [9]
    assert steps(store, "exp") == [5]
    commit(store, 10)
    assert steps(store) == [10, 9]


def test_a_base_lives_as_long_as_a_light_version_needs_it(store: StoreCatalog) -> None:
    base = commit(store, 1, ["a"])
    light = commit_light(store, 2, "a", base.id)
    commit(store, 3, ["b"])
    store.expire([base.id])
    assert ("a", base.id) in alive(store)
    last = commit(store, 4, ["a", "b"])
    done = store.expire([one.id for one in store.log("main")])
    # The light version goes, and with it the base that only it kept, though nobody named that.
    assert {("a", base.id), ("a", light.id)} <= {(one.layer, one.version_id) for one in store.doomed(NOW)}
    assert done.versions_doomed >= 2
    assert alive(store) == {(EXTRA_LAYER, last.id), ("a", last.id), ("b", last.id)}


def test_the_doomed_wait_for_the_grace_period(store: StoreCatalog) -> None:
    first, _ = commit(store, 1), commit(store, 2)
    store.expire([first.id])
    assert store.doomed(timedelta(hours=1)) == []
    doomed = store.doomed(NOW)
    assert {(one.layer, one.version_id) for one in doomed} == {(name, first.id) for name in (EXTRA_LAYER, "a", "b")}


def test_the_buried_are_known_no_more(store: StoreCatalog) -> None:
    first, second = commit(store, 1), commit(store, 2)
    store.expire([first.id])
    doomed = store.doomed(NOW)
    pairs = [(layer_component(one.layer), one.version_id) for one in doomed]
    assert store.unknown_versions(pairs) == set()
    store.bury(doomed[:1])
    assert store.unknown_versions(pairs) == {pairs[0]}
    store.bury(doomed)
    store.bury(doomed)
    store.bury([])
    assert store.unknown_versions(pairs) == set(pairs)
    # What stands cannot be buried.
    standing = list(store.live_versions())
    store.bury(standing)
    assert list(store.live_versions()) == standing
    assert {one.version_id for one in standing} == {second.id}


def test_a_base_may_be_buried_before_its_light_version(store: StoreCatalog) -> None:
    base = commit(store, 1, ["a"])
    commit_light(store, 2, "a", base.id)
    commit(store, 3, ["a"])
    store.expire([one.id for one in store.log("main")])
    doomed = {one.version_id: one for one in store.doomed(NOW) if one.layer == "a"}
    store.bury([doomed.pop(base.id)])
    (light,) = (one for one in store.doomed(NOW) if one.layer == "a")
    assert light.base_id is None
    store.bury([light])


def test_objects_without_a_row_are_told_from_those_with_one(store: StoreCatalog) -> None:
    made = commit(store, 1, ["a/b", "c"])
    writing = announce(store, 2)
    stranger = new_id()
    asked = [
        ("a=2Fb", made.id),
        (EXTRA_LAYER, made.id),
        ("a/b", made.id),
        ("d", made.id),
        ("whatever", writing.id),
        ("c", stranger),
    ]
    assert store.unknown_versions(asked) == {("a/b", made.id), ("d", made.id), ("c", stranger)}
    assert store.unknown_commits([made.id, writing.id, stranger]) == {stranger}
    store.abandon(writing.id)
    assert ("whatever", writing.id) in store.unknown_versions(asked)
    assert store.unknown_commits([writing.id]) == {writing.id}
    assert store.unknown_versions([]) == set()
    assert store.unknown_commits([]) == set()


def test_a_preview_sees_lapsed_claims_as_voided(store: StoreCatalog) -> None:
    lapsed, held = announce(store, 1, lease=LAPSED), announce(store, 1)
    pairs = [("a", lapsed.id), ("a", held.id)]
    assert store.unknown_versions(pairs) == set()
    assert store.unknown_commits([lapsed.id, held.id]) == set()
    assert store.unknown_versions(pairs, as_if_voided=True) == {pairs[0]}
    assert store.unknown_commits([lapsed.id, held.id], as_if_voided=True) == {lapsed.id}
    store.void_lapsed()
    assert store.unknown_versions(pairs) == {pairs[0]}
    assert store.unknown_commits([lapsed.id, held.id]) == {lapsed.id}


def test_many_ids_are_asked_in_batches(store: StoreCatalog) -> None:
    made = [commit(store, step) for step in range(3)]
    strangers = {new_id() for _ in range(1200)}
    assert store.unknown_commits([*ids(*made), *strangers]) == strangers
    pairs = {("a", one) for one in strangers}
    assert store.unknown_versions([*pairs, *(("a", one.id) for one in made)]) == pairs
    assert len(store.expire([*strangers, *ids(*made)]).commits) == 2


def test_void_lapsed_counts_claims_and_leases(store: StoreCatalog) -> None:
    commit(store, 1)
    announce(store, 2, lease=LAPSED)
    announce(store, 2)
    store.resolve(parse_ref(1), "main", LAPSED)
    store.resolve(parse_ref(1), "main", LEASE)
    assert store.void_lapsed() == 2
    assert store.void_lapsed() == 0
    assert store.stats().leases == 1


@pytest.mark.parametrize("seed", range(4))
def test_what_stands_is_exactly_what_is_needed(store: StoreCatalog, seed: int) -> None:
    chance = random.Random(seed)
    commit(store, 0, ["a", "b", "c"])
    for step in range(1, 40):
        branch = chance.choice([one.name for one in store.branches()])
        everything = list(store.inventory().commits())
        match chance.randrange(8):
            case 0:
                store.branch(f"b{step}", chance.choice(everything), move=False)
            case 1:
                store.branch(branch, chance.choice(everything), move=True)
            case 2:
                store.expire(chance.sample(everything, len(everything) // 2))
                store.bury(store.doomed(NOW)[::2])
            case 3 if len(store.branches()) > 1:
                store.delete_branch(branch)
            case 4:
                full = at(store, branch).versions["a"]
                base = full.version_id if full.base_id is None else full.base_id
                commit_light(store, 100 + step, "a", base, branch)
            case _:
                commit(store, 100 + step, chance.sample(["a", "b", "c"], chance.randrange(3)), branch)
        assert alive(store) >= needed(store)
        for name in store.branches():
            assert set(at(store, name.name).versions) == {EXTRA_LAYER, "a", "b", "c"}
    for _ in range(2):
        store.expire(list(store.inventory().commits()))
    assert alive(store) == needed(store)


@pytest.mark.parametrize("seed", range(4))
def test_what_a_pending_commit_may_build_on_stays(store: StoreCatalog, seed: int) -> None:
    chance = random.Random(seed)
    names = ["a", "b", "c"]
    commit(store, 0, names)
    under_way: list[tuple[CommitDraft, dict[str, str]]] = []
    outcomes: list[bool] = []
    for step in range(1, 60):
        everything = list(store.inventory().commits())
        match chance.randrange(6):
            case 0:
                store.branch("main", chance.choice(everything), move=True)
            case 1 | 2:
                store.expire(chance.sample(everything, chance.randrange(len(everything) + 1)))
                store.bury(store.doomed(NOW))
            case 3:
                composite = at(store, "latest")
                newest = {name: composite.bases.get(name, composite.versions[name]).version_id for name in names}
                under_way.append((announce(store, 100 * step), newest))
            case 4 if under_way:
                draft, newest = under_way.pop(chance.randrange(len(under_way)))
                written = chance.sample(names, chance.randrange(1, 4))
                try:
                    publish(store, draft, [version(name, draft.id, draft.step, newest[name]) for name in written])
                    outcomes.append(True)
                except HeadMovedError:
                    store.abandon(draft.id)
                    outcomes.append(False)
            case _:
                commit(store, 100 * step, chance.sample(names, 1))
        for _, newest in under_way:
            assert set(newest.items()) <= alive(store)
        assert needed(store) <= alive(store)
    assert any(outcomes)


def test_a_version_that_is_expired_while_a_commit_builds_on_it_stays(store: StoreCatalog) -> None:
    first = commit(store, 1, ["a", "b"])
    draft = announce(store, 2)
    store.expire([first.id])
    publish(store, draft, ["a"])
    done = store.expire([first.id])
    assert [one.id for one in done.commits] == [first.id]
    found: dict[str, LayerVersion] = dict(at(store, 2).versions)
    assert found["b"].version_id == first.id
    assert ("b", first.id) in alive(store)
