"""Opening a store: bring root and catalog together, and find out which of them is whose.

A root names the catalog that owns it (DESIGN.md, invariant 5). With that catalog a store can be written; with
another one, or none, it is read from its manifests, through a catalog made for the occasion.
"""

import atexit
import hashlib
import logging
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import platformdirs

from tailorstore.catalog.catalog import Catalog, StoreCatalog
from tailorstore.domain.errors import (
    AlreadyExistsError,
    NotAStoreError,
    StoreNotFoundError,
)
from tailorstore.domain.names import COMMITS_PREFIX, ROOT_DOCUMENT, new_id
from tailorstore.domain.records import Binding
from tailorstore.engine.rebuild import History, read_history
from tailorstore.storage.manifests import read_binding, write_binding
from tailorstore.storage.transport import Objects

logger = logging.getLogger("tailorstore")

_memory_catalogs: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Opened:
    """A root with a catalog that can answer for it."""

    catalog: Catalog
    store: StoreCatalog
    binding: Binding
    """What the root says."""
    owned: bool
    """Whether ``catalog`` owns the root; else it is a copy of the manifests, for reading only."""
    temporary: Path | None = None
    """Folder of a catalog made for the occasion."""

    def close(self) -> None:
        """Close the catalog, and remove it if it was made for the occasion."""
        self.catalog.close()
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)


def default_catalog(url: str) -> str:
    """Return the catalog's URL for a root for which none was named.

    A local root holds its own; for a remote one it is a file in the user's data directory, named after the root.

    Args:
        url: normalised, without secrets.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        return f"sqlite:///{Path(unquote(parts.path)) / 'catalog.sqlite'}"
    if parts.scheme == "memory":
        return _memory_catalog(url)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", url).strip("-")[:60]
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    folder = Path(platformdirs.user_data_dir("tailorstore", appauthor=False))
    return f"sqlite:///{folder / 'catalogs' / f'{readable}-{digest}.sqlite'}"


def _memory_catalog(url: str) -> str:
    # A root in memory ends with the process, and its catalog with it.
    if url not in _memory_catalogs:
        folder = tempfile.mkdtemp(prefix="tailorstore-memory-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _memory_catalogs[url] = f"sqlite:///{folder}/catalog.sqlite"
    return _memory_catalogs[url]


def open_root(objects: Objects, catalog_url: str, *, create: bool) -> Opened:
    """Open the store at a root, making it if there is none.

    Args:
        objects: the root.
        catalog_url: the catalog to use.
        create: whether to make what is missing.

    Raises:
        StoreNotFoundError: there is no store and ``create`` is false; nothing was made.
        NotAStoreError: the root holds something else.
        FormatTooNewError, SchemaOutdatedError, SchemaTooNewError: another version of tailorstore made it.
        UnavailableError, AccessDeniedError: root or catalog cannot be reached.
    """
    binding = read_binding(objects)
    if binding is None:
        orphan = _open_orphan(objects)
        if orphan is not None:
            return orphan
        if not create:
            msg = f"there is no store at {objects.url}; make one with open_store(...) or 'tailorstore init'"
            raise StoreNotFoundError(msg)
        return _create(objects, catalog_url)
    catalog = _open_existing(catalog_url)
    if catalog is not None:
        store = catalog.store(binding.store_id)
        if store is not None and store.binding() == binding:
            return Opened(catalog, store, binding, owned=True)
        catalog.close()
    return open_copy(objects, binding)


def open_copy(objects: Objects, binding: Binding) -> Opened:
    """Open a root that another catalog owns: for reading, from its manifests."""
    folder = Path(tempfile.mkdtemp(prefix="tailorstore-copy-"))
    try:
        catalog = Catalog.open(f"sqlite:///{folder / 'catalog.sqlite'}", create=True)
        store = load_history(catalog, binding, objects, read_history(objects))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Opened(catalog, store, binding, owned=False, temporary=folder)


def load_history(catalog: Catalog, binding: Binding, objects: Objects, history: History) -> StoreCatalog:
    """Put a root's history into a catalog, in place of what that knew of the store."""
    return catalog.take_over(
        binding,
        objects.url,
        history.commits,
        history.branches,
        history.tags,
    )


def _open_existing(catalog_url: str) -> Catalog | None:
    try:
        return Catalog.open(catalog_url, create=False)
    except StoreNotFoundError:
        return None


def _open_orphan(objects: Objects) -> Opened | None:
    """Open a root whose ``tailorstore.json`` is gone: for reading, until a take-over writes a new one."""
    if next(iter(objects.list(COMMITS_PREFIX)), None) is None:
        return None
    bindings = [manifest.binding for manifest in read_history(objects).commits]
    if not bindings:
        msg = f"{objects.url} holds commits, but neither a {ROOT_DOCUMENT} nor a manifest that can be read"
        raise NotAStoreError(msg)
    logger.warning(
        "the %s of %s is gone: it can be read; 'tailorstore rebuild' makes a new one", ROOT_DOCUMENT, objects.url
    )
    return open_copy(objects, max(bindings, key=lambda binding: binding.epoch))


def _create(objects: Objects, catalog_url: str) -> Opened:
    catalog = Catalog.open(catalog_url, create=True)
    try:
        binding = Binding(new_id(), catalog.catalog_id, 1)
        store = catalog.register(binding.store_id, objects.url, binding.epoch)
        with suppress(AlreadyExistsError):
            write_binding(objects, binding, replace=False)
        # Of two processes that make the store at once, one finds the other's document here and takes it.
        found = read_binding(objects)
        if found is not None and found != binding:
            other = catalog.store(found.store_id)
            if other is None:
                catalog.close()
                return open_copy(objects, found)
            return Opened(catalog, other, found, owned=True)
    except BaseException:
        catalog.close()
        raise
    return Opened(catalog, store, binding, owned=True)
