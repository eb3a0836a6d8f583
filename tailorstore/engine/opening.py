"""Opening a store: bring root and catalog together, and find out which of them is whose.

A root names the catalog that owns it (DESIGN.md, invariant 5). With that catalog a store can be written; with
another one, or none, it is read from its manifests, through a catalog made for the occasion.
"""

import atexit
import hashlib
import logging
import os
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
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
from tailorstore.engine.currency import find_newer, in_words
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
    remove: Callable[[], object] | None = None
    """Of a catalog made for the occasion: removes it. Done at the process's end if nobody has."""
    seen: frozenset[str] = frozenset()
    """Of such a catalog: what was in the root before it was read."""
    outdated: str | None = None
    """How far the catalog that was asked for, the owner of the root, is behind it; ``None``: it is not."""
    fate: str | None = None
    """What happened to the document that says who owns the root, as "is gone"; ``None``: it is there."""

    def close(self) -> None:
        """Close the catalog, and remove it if it was made for the occasion."""
        self.catalog.close()
        if self.remove is not None:
            self.remove()


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
    return f"sqlite:///{_own_folder() / f'{readable}-{digest}.sqlite'}"


def _own_folder() -> Path:
    """Return where catalogs of remote roots are unless the user says otherwise."""
    return Path(platformdirs.user_data_dir("tailorstore", appauthor=False)) / "catalogs"


def make_catalog(catalog_url: str) -> Catalog:
    """Open a catalog, making it if there is none; raises as ``Catalog.open`` does.

    Whatever the umask, nobody else may look into the folder of catalogs of remote roots: of a bucket that others cannot
    read it would show names, messages and metrics.
    """
    folder = _own_folder()
    if catalog_url.startswith(f"sqlite:///{folder}/"):
        # What cannot be made, opening the catalog tells better.
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Catalog.open(catalog_url, create=True)


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
    try:
        binding = read_binding(objects)
    except NotAStoreError:
        damaged = _open_orphan(objects, "cannot be understood")
        if damaged is None:
            raise
        return damaged
    if binding is None:
        orphan = _open_orphan(objects, "is gone")
        if orphan is not None:
            return orphan
        if not create:
            msg = f"there is no store at {objects.url}; make one with open_store(...) or 'tailorstore init'"
            raise StoreNotFoundError(msg)
        return _create(objects, catalog_url)
    try:
        catalog = Catalog.open(catalog_url, create=False)
    except StoreNotFoundError as error:
        logger.warning(
            "%s: reading the root %s from its manifests. If the catalog that owns the root is elsewhere, name it to"
            " write; if it was lost, 'tailorstore rebuild' makes a new one",
            *(str(error), objects.url),
        )
    else:
        store = catalog.store(binding.store_id)
        if store is not None and store.binding() == binding:
            if _is_at_home(store, objects, catalog_url):
                # One that may not be written decides nothing, and a replica may be behind for a moment.
                newer = [] if catalog.read_only else find_newer(objects, store, binding, everywhere=False)
                if not newer:
                    return Opened(catalog, store, binding, owned=True)
                catalog.close()
                return _open_outdated(objects, binding, catalog.url, in_words(newer))
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


def _open_outdated(objects: Objects, binding: Binding, catalog_url: str, behind: str) -> Opened:
    """Open a root that its catalog is older than, as one restored from a backup is: for reading, from its manifests."""
    logger.warning(
        "catalog %s is older than the root %s: %s. Reading the root from its manifests; 'tailorstore rebuild' brings"
        " the catalog up to date",
        catalog_url,
        objects.url,
        behind,
    )
    # A take-over that came in between is the other way in which a manifest can be newer.
    return replace(open_copy(objects, read_binding(objects) or binding), outdated=behind)


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
        store = load_history(catalog, binding, objects, read_history(objects, binding.store_id))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # A store that nobody closes leaves nothing behind either.
    remove = weakref.finalize(catalog, _remove_own, folder, os.getpid())
    return Opened(catalog, store, binding, owned=False, remove=remove, seen=seen)


def _remove_own(folder: Path, owner: int) -> None:
    # The child of a fork must leave what its parent uses.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


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
        history.quarantine,
        {**dict.fromkeys(history.unclaimed, "unplaced"), **history.withdrawn},
    )


def _open_orphan(objects: Objects, fate: str) -> Opened | None:
    """Open a root whose ``tailorstore.json`` is gone or damaged: for reading, until a take-over writes a new one.

    Args:
        objects: the root.
        fate: of the document.
    """
    if next(iter(objects.list(COMMITS_PREFIX)), None) is None:
        return None
    bindings = [manifest.binding for manifest in read_history(objects).commits]
    if not bindings:
        msg = f"{objects.url} holds commits, but neither a {ROOT_DOCUMENT} nor a manifest that can be read"
        raise NotAStoreError(msg)
    logger.warning(
        "the %s of %s %s: the root can be read; 'tailorstore rebuild' makes a new one",
        *(ROOT_DOCUMENT, objects.url, fate),
    )
    # Most manifests are the store's own, whatever else was copied here.
    (store_id, _), *_ = Counter(binding.store_id for binding in bindings).most_common()
    newest = max((one for one in bindings if one.store_id == store_id), key=lambda binding: binding.epoch)
    return replace(open_copy(objects, newest), fate=fate)


def _create(objects: Objects, catalog_url: str) -> Opened:
    catalog = make_catalog(catalog_url)
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
