"""Logs, composites, layers, counts."""

import pytest

from tailorstore.catalog import StoreCatalog
from tailorstore.domain.errors import BranchNotFoundError, RefNotFoundError
from tailorstore.domain.names import new_id, parse_ref
from tailorstore.domain.records import EXTRA_LAYER, StoreStats
from tests.catalog.kit import LEASE, announce, at, commit, commit_light, publish, steps, version


def test_a_log_is_cut_where_asked(store: StoreCatalog) -> None:
    for step in range(1, 6):
        commit(store, step)
    assert [one.step for one in store.log("main", 2)] == [5, 4]
    assert store.log("main", 0) == []
    assert len(store.log("main", 99)) == 5
    with pytest.raises(BranchNotFoundError, match="no branch 'exp'; there are: main"):
        store.log("exp")


def test_steps_are_those_of_the_log(store: StoreCatalog) -> None:
    assert store.steps("main", 5) == []
    made = [commit(store, step) for step in (1, 4, 9)]
    store.branch("exp", made[1].id, move=False)
    commit(store, 5, branch="exp")
    for branch in ("main", "exp"):
        assert store.steps(branch, 99) == steps(store, branch)
        assert store.steps(branch, 2) == steps(store, branch)[:2]
    assert store.steps("exp", 3) == [5, 4, 1]
    assert store.steps("exp", 0) == []
    store.expire([made[0].id])
    assert store.steps("exp", 3) == [5, 4]


def test_steps_that_led_to_a_commit_stay_those_wherever_its_branch_is(store: StoreCatalog) -> None:
    made = [commit(store, step) for step in (1, 4, 9)]
    store.branch("exp", made[1].id, move=False)
    forked = commit(store, 5, branch="exp")
    store.branch("main", made[0].id, move=True)
    commit(store, 3)
    assert [store.steps_to(one.id, 99) for one in (*made, forked)] == [[1], [4, 1], [9, 4, 1], [5, 4, 1]]
    assert store.steps_to(forked.id, 2) == [5, 4]
    with pytest.raises(RefNotFoundError):
        store.steps_to(new_id(), 9)


def test_a_composite_is_found_by_its_commits_id(store: StoreCatalog) -> None:
    made = commit(store, 1)
    assert store.composite(made.id) == at(store, 1)
    with pytest.raises(RefNotFoundError):
        store.composite(new_id())


def test_layers_show_their_age(store: StoreCatalog) -> None:
    commit(store, 10, ["a", "b"])
    last = commit(store, 30, ["b"])
    shown = {one.name: one for one in store.layers(last.id)}
    assert list(shown) == [EXTRA_LAYER, "a", "b"]
    assert (shown["a"].source_step, shown["a"].staleness, shown["a"].versions) == (10, 20, 1)
    assert (shown["b"].source_step, shown["b"].staleness, shown["b"].versions) == (30, 0, 2)
    assert shown["b"].version_id == last.id
    assert {(one.base_step, one.error) for one in shown.values()} == {(None, None)}


def test_layers_show_what_their_light_versions_are_a_difference_to(store: StoreCatalog) -> None:
    base = commit(store, 10)
    commit_light(store, 20, "a", base.id)
    last = commit_light(store, 30, "a", base.id)
    shown = {one.name: one for one in store.layers(last.id)}
    assert (shown["a"].fidelity, shown["a"].source_step, shown["a"].base_step, shown["a"].error) == (
        "light",
        30,
        10,
        0.01,
    )
    assert (shown["b"].fidelity, shown["b"].base_step, shown["b"].error) == ("full", None, None)


def test_a_composite_brings_the_bases_of_its_light_versions(store: StoreCatalog) -> None:
    first, second = commit(store, 1, ["a", "b", "c"]), commit(store, 2, ["b"])
    draft = announce(store, 3)
    light = [version("a", draft.id, 3, first.id), version("b", draft.id, 3, second.id)]
    made = publish(store, draft, light)
    assert at(store, 2).bases == {}
    expected = {"a": version("a", first.id, 1), "b": version("b", second.id, 2)}
    for composite in (at(store, 3), store.composite(made.id), store.resolve(parse_ref(3), "main", LEASE)[0]):
        assert dict(composite.bases) == expected
        assert list(composite.bases) == ["a", "b"]
        assert {name: one.version_id for name, one in composite.versions.items()} == {
            EXTRA_LAYER: made.id,
            "a": made.id,
            "b": made.id,
            "c": first.id,
        }
    # Bases stay what they are when their own commits are gone, and are named no more than they are needed.
    store.expire([first.id, second.id])
    assert dict(at(store, 3).bases) == expected
    commit(store, 4, ["a"])
    assert dict(at(store, 4).bases) == {"b": expected["b"]}


def test_bases_are_found_for_light_versions_by_themselves(store: StoreCatalog) -> None:
    first, second = commit(store, 1), commit(store, 2)
    commit_light(store, 3, "a", first.id)
    commit_light(store, 4, "b", second.id)
    commit_light(store, 5, "a", first.id)
    everything = list(store.live_versions())
    found = store.bases_of(everything)
    assert {(one.layer, one.version_id) for one in found} == {("a", first.id), ("b", second.id)}
    assert len(found) == 2
    assert store.bases_of(one for one in everything if one.fidelity == "full") == []
    assert store.bases_of([version("a", new_id(), 9, new_id()), version("z", new_id(), 9, first.id)]) == []


def test_stats_of_nothing_are_zero(store: StoreCatalog) -> None:
    assert store.stats() == StoreStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_stats_count(store: StoreCatalog) -> None:
    first, _ = commit(store, 1), commit(store, 2)
    store.tag("best", first.id)
    store.resolve(parse_ref("latest"), "main", LEASE)
    assert store.stats() == StoreStats(
        commits=2,
        branches=1,
        tags=1,
        layers=3,
        versions=6,
        versions_doomed=0,
        bytes_logical=200,
        bytes_stored=60,
        bytes_doomed=0,
        leases=1,
    )


def test_commits_that_hold_a_version_are_found(store: StoreCatalog) -> None:
    first, second, third = commit(store, 1), commit(store, 2, ["b"]), commit(store, 3)
    assert store.commits_holding("a", first.id) == [first, second]
    assert store.commits_holding("a", third.id) == [third]
    assert store.commits_holding("nope", first.id) == []
    assert store.commits_holding("a", new_id()) == []


def test_commits_that_need_a_base_hold_it(store: StoreCatalog) -> None:
    first = commit(store, 1)
    light, later, last = commit_light(store, 2, "a", first.id), commit(store, 3, ["b"]), commit(store, 4)
    assert store.commits_holding("a", first.id) == [first, light, later]
    assert store.commits_holding("a", light.id) == [light, later]
    store.expire([first.id, light.id])
    assert store.commits_holding("a", first.id) == [later]
    assert store.commits_holding("a", last.id) == [last]


def test_all_live_versions_are_streamed_in_pages(store: StoreCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.history._PAGE", 4)
    made = [commit(store, step) for step in range(1, 5)]
    found = list(store.live_versions())
    assert {(one.layer, one.version_id) for one in found} == {
        (layer, one.id) for one in made for layer in (EXTRA_LAYER, "a", "b")
    }
    assert [one.step for one in found] == sorted(one.step for one in found)
    assert len(found) == 12
