"""The composite, read as a person with psql or sqlite3 reads it: no SQLAlchemy, no tailorstore."""

from datetime import UTC, datetime

from tailorstore.catalog import StoreCatalog
from tailorstore.domain.names import version_prefix
from tailorstore.domain.records import EXTRA_LAYER
from tests.catalog.kit import at, commit, plain_sql

COLUMNS = (
    "store_id",
    "commit_id",
    "branch",
    "step",
    "created_at",
    "layer",
    "version_id",
    "source_step",
    "staleness",
    "fidelity",
    "digest",
    "bytes_logical",
    "bytes_stored",
    "prefix",
)


def test_the_view_is_the_composite(store: StoreCatalog, catalog_url: str) -> None:
    commit(store, 10, ["a", "block/../ü"])
    made = commit(store, 30, ["a"])
    with plain_sql(catalog_url) as connection:
        found = connection.execute("SELECT * FROM composite WHERE step = 30 ORDER BY source_step, layer")
        assert tuple(one[0] for one in found.description or ()) == COLUMNS
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in found.fetchall()]
    composite = at(store, 30)
    assert {row["layer"]: row["source_step"] for row in rows} == composite.sources
    for row in rows:
        version = composite.versions[row["layer"]]
        created = row["created_at"]
        if isinstance(created, str):
            created = datetime.fromisoformat(created).replace(tzinfo=UTC)
        assert created == made.created_at
        assert row["store_id"] == store.store_id
        assert (row["commit_id"], row["branch"], row["step"]) == (made.id, "main", 30)
        assert row["version_id"] == version.version_id
        assert row["staleness"] == 30 - version.step
        assert (row["fidelity"], row["digest"]) == ("full", version.digest)
        assert (row["bytes_logical"], row["bytes_stored"]) == (version.bytes_logical, version.bytes_stored)
        assert row["prefix"] == version_prefix(version.layer, version.version_id)
    assert {row["prefix"].split("/")[1] for row in rows} == {EXTRA_LAYER, "a", "block=2F..=2F=C3=BC"}
