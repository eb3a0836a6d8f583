"""Measures are kept with their commit, exactly, and go with it."""

import math

import pytest

from tailorstore.catalog import Catalog, StoreCatalog
from tailorstore.domain.errors import BranchNotFoundError, HeadMovedError, RefNotFoundError
from tailorstore.domain.names import new_id
from tailorstore.domain.records import EXTRA_LAYER, LayerMeasures
from tests.bench.catalog_scale import STORE_ID, fill
from tests.catalog.kit import announce, at, commit, measured, plain_sql, publish


def rows_in(catalog_url: str) -> int:
    """Count what the table holds, of all stores."""
    with plain_sql(catalog_url) as connection:
        found = connection.execute("SELECT count(*) FROM measures").fetchone()
    assert found is not None
    return int(found[0])


def test_what_was_measured_comes_back_to_the_bit(store: StoreCatalog) -> None:
    given = {
        "b": LayerMeasures(1 / 3, 5e-324, 1.7976931348623157e308, 0.0, 2**53 + 1.0),
        "a": LayerMeasures(None, None, None, None, None, finite=False),
        "ünïcödé 層\x00": LayerMeasures(1.0, None, 1e-45, None, 0.1),
    }
    made = publish(store, announce(store, 1), list(given), given)
    assert store.measures_of(made.id) == given
    assert list(store.measures_of(made.id)) == sorted(given)
    assert store.measures("main") == [(made, given)]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_stored_as_unknown(
    store: StoreCatalog, catalog_url: str, number: float
) -> None:
    given = {"a": LayerMeasures(number, 1.0, number, number, number, finite=False)}
    made = publish(store, announce(store, 1), ["a"], given)
    assert store.measures_of(made.id) == {"a": LayerMeasures(None, 1.0, None, None, None, finite=False)}
    with plain_sql(catalog_url) as connection:
        found = connection.execute("SELECT drift, relative_drift, curvature FROM measures").fetchall()
    assert [tuple(row) for row in found] == [(None, 1.0, None)]


def test_a_branch_gives_its_measures_oldest_first_those_before_a_fork_included(store: StoreCatalog) -> None:
    made = [publish(store, announce(store, step), measures={"a": measured(step)}) for step in (1, 2, 3)]
    store.branch("exp", made[1].id, move=False)
    quiet = commit(store, 5, branch="exp")
    last = publish(store, announce(store, 6, "exp"), measures={"b": measured(6)})
    everything = [
        (made[0], {"a": measured(1)}),
        (made[1], {"a": measured(2)}),
        (quiet, {}),
        (last, {"b": measured(6)}),
    ]
    assert store.measures("exp", None) == everything
    assert store.measures("exp", 3) == everything[1:]
    assert store.measures("exp", 1) == everything[3:]
    assert store.measures("exp", 0) == []
    assert [one.step for one, _ in store.measures("main", 2)] == [2, 3]


def test_measures_of_nothing_are_refused_by_name(store: StoreCatalog) -> None:
    commit(store, 1)
    with pytest.raises(BranchNotFoundError, match="no branch 'exp'; there are: main"):
        store.measures("exp", 3)
    with pytest.raises(RefNotFoundError):
        store.measures_of(new_id())


def test_a_layer_may_be_measured_before_it_is_ever_written(store: StoreCatalog) -> None:
    made = publish(store, announce(store, 1), ["a"], {"late": measured(1)})
    assert store.measures_of(made.id) == {"late": measured(1)}
    assert set(at(store, 1).versions) == {EXTRA_LAYER, "a"}
    commit(store, 2, ["late"])
    assert at(store, 2).sources == {EXTRA_LAYER: 2, "a": 1, "late": 2}


def test_measures_go_with_their_commit(store: StoreCatalog, catalog_url: str) -> None:
    made = [publish(store, announce(store, step), measures={"a": measured(step)}) for step in (1, 2)]
    store.preview([made[0].id])
    assert rows_in(catalog_url) == 2
    store.expire([one.id for one in made])
    assert rows_in(catalog_url) == 1
    assert store.measures("main", None) == [(made[1], {"a": measured(2)})]
    with pytest.raises(RefNotFoundError):
        store.measures_of(made[0].id)


def test_measures_of_a_commit_that_lost_are_not_kept(store: StoreCatalog, catalog_url: str) -> None:
    slow, quick = announce(store, 1), announce(store, 1)
    publish(store, quick)
    with pytest.raises(HeadMovedError):
        publish(store, slow, ["a"], {"a": measured(1), "new": measured(2)})
    assert rows_in(catalog_url) == 0
    assert store.measures("main", None) == [(at(store, 1).commit, {})]


def test_publishing_twice_keeps_the_first_measures(store: StoreCatalog, catalog_url: str) -> None:
    draft = announce(store, 1)
    made = publish(store, draft, ["a"], {"a": measured(1)})
    assert publish(store, draft, ["a"], {"a": measured(2)}) == made
    assert store.measures_of(made.id) == {"a": measured(1)}
    assert rows_in(catalog_url) == 1


def test_stores_do_not_share_measures(catalog: Catalog, store: StoreCatalog) -> None:
    other = catalog.register("store-2", "file:///other", 1)
    mine = publish(store, announce(store, 1), ["a"], {"a": measured(1)})
    theirs = publish(other, announce(other, 1), ["a"], {"a": measured(2)})
    assert store.measures_of(mine.id) == {"a": measured(1)}
    assert other.measures("main", None) == [(theirs, {"a": measured(2)})]
    with pytest.raises(RefNotFoundError):
        store.measures_of(theirs.id)


def test_more_commits_than_fit_into_one_statement(catalog_url: str) -> None:
    history = fill(catalog_url, layers=3, versions=1800, light=True)
    catalog = Catalog.open(catalog_url)
    store = catalog.store(STORE_ID)
    assert store is not None
    found = store.measures("main")
    assert history.commits == len(found) == 600
    assert [one.step for one, _ in found] == sorted(one.step for one, _ in found)
    assert all(set(measures) == {"model.layers.1", "model.layers.2"} for _, measures in found)
    assert len({measures["model.layers.2"].drift for _, measures in found}) == 600
    catalog.close()
