"""A catalog with one empty store in it, in each kind of database."""

from collections.abc import Iterator

import pytest

from tailorstore.catalog import Catalog, StoreCatalog


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    """Give a fresh catalog."""
    opened = Catalog.open(catalog_url)
    yield opened
    opened.close()


@pytest.fixture
def store(catalog: Catalog) -> StoreCatalog:
    """Give a fresh store."""
    return catalog.register("store-1", "file:///data/run", 1)
