"""Logs, composites, layers, counts."""

import pytest

from tailorstore.catalog import StoreCatalog
from tailorstore.domain.errors import BranchNotFoundError, RefNotFoundError
from tailorstore.domain.names import new_id, parse_ref
from tailorstore.domain.records import EXTRA_LAYER, StoreStats
from tests.catalog.kit import LEASE, at, commit


def test_a_log_is_cut_where_asked(store: StoreCatalog) -> None:
    for step in range(1, 6):
        commit(store, step)
    assert [one.step for one in store.log("main", 2)] == [5, 4]
    assert store.log("main", 0) == []
    assert len(store.log("main", 99)) == 5
    with pytest.raises(BranchNotFoundError, match="no branch 'exp'; there are: main"):
        store.log("exp")


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


def test_all_live_versions_are_streamed_in_pages(store: StoreCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.history._PAGE", 4)
    made = [commit(store, step) for step in range(1, 5)]
    found = list(store.live_versions())
    assert {(one.layer, one.version_id) for one in found} == {
        (layer, one.id) for one in made for layer in (EXTRA_LAYER, "a", "b")
    }
    assert [one.step for one in found] == sorted(one.step for one in found)
    assert len(found) == 12
