"""The generator of the benchmark, at a small size, and that time does not grow with the number of commits."""

import pytest

from tailorstore.catalog import Catalog
from tailorstore.domain.records import EXTRA_LAYER
from tests.bench.catalog_scale import STORE_ID, fill, measure
from tests.catalog.kit import at, commit, plain_sql


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("written_in", [1, 4])
def test_the_generator_makes_a_true_history(catalog_url: str, written_in: int, light: bool) -> None:
    history = fill(catalog_url, layers=8, versions=400, written_in=written_in, light=light)
    catalog = Catalog.open(catalog_url)
    store = catalog.store(STORE_ID)
    assert store is not None
    log = store.log("main")
    assert len(log) == history.commits == 50 * written_in
    for one in (log[0], log[7], log[-1]):
        composite = store.composite(one.id)
        assert len(composite.versions) == 8
        assert composite.versions[EXTRA_LAYER].version_id == one.id
        written_again = one.step >= 100 * written_in
        assert len(composite.bases) == (7 if light and written_again else 0)
        assert len(store.measures_of(one.id)) == (7 if light else 0)
        assert all(0 <= one.step - version.step <= 100 * written_in for version in composite.versions.values())
    commit(store, log[0].step + 1, ["model.layers.1"])
    assert at(store, "latest").versions["model.layers.1"].step == log[0].step + 1
    assert {row.verb for row in measure(catalog_url, runs=3)} >= {"resolve any step", "log(limit=20)"}
    catalog.close()


def test_no_query_of_a_reader_reads_a_whole_table(tmp_path_factory: pytest.TempPathFactory) -> None:
    url = f"sqlite:///{tmp_path_factory.mktemp('plan')}/catalog.db"
    fill(url, layers=4, versions=400)
    with plain_sql(url) as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM composite WHERE store_id = 'scale' AND commit_id = 'a'"
        ).fetchall()
    assert not [step for step in plan if "SCAN" in step[3]], plan
