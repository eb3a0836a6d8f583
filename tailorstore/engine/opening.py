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
from tailorstore.storage.manifests import manifest_ids, read_binding, ref_record_ids, write_binding
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
    seen: frozenset[str] = frozenset()
    """Of such a catalog: what was in the root before it was read."""

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
    if url.startswith("file://"):
        # Roots' URLs are not percent-encoded, so what follows is the path as it is.
        return f"sqlite:///{Path(url.removeprefix('file://')) / 'catalog.sqlite'}"
    if url.startswith("memory://"):
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
            if _is_at_home(store, objects, catalog_url):
                return Opened(catalog, store, binding, owned=True)
            logger.warning(
                "catalog %s knows this store at %s, not at %s: a copy can only be read. If the root was moved,"
                " 'tailorstore rebuild' takes it over",
                catalog.url,
                store.root(),
                objects.url,
            )
        else:
            logger.warning("the root %s belongs to another catalog: reading it from its manifests", objects.url)
        catalog.close()
    return open_copy(objects, binding)


def _is_at_home(store: StoreCatalog, objects: Objects, catalog_url: str) -> bool:
    """Tell whether a root is the one that the catalog means, and not a copy of it.

    Two roots with one catalog would publish into one history and collect each other's objects. A catalog inside the
    root went along with it when it was copied or moved.
    """
    return store.root() == objects.url or catalog_url == default_catalog(objects.url)


def open_copy(objects: Objects, binding: Binding) -> Opened:
    """Open a root that another catalog owns: for reading, from its manifests."""
    # Looked at first: what is published while the manifests are being read must not count as seen.
    seen = fingerprint(objects)
    folder = Path(tempfile.mkdtemp(prefix="tailorstore-copy-"))
    try:
        catalog = Catalog.open(f"sqlite:///{folder / 'catalog.sqlite'}", create=True)
        store = load_history(catalog, binding, objects, read_history(objects))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Opened(catalog, store, binding, owned=False, temporary=folder, seen=seen)


def fingerprint(objects: Objects) -> frozenset[str]:
    """Return what tells whether a root's history has changed: the ids of all its manifests and records."""
    return frozenset(manifest_ids(objects)) | frozenset(ref_record_ids(objects))


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
