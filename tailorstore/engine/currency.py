"""Is a catalog as new as its root? One that was restored from a backup is not, and must not decide what may go.

A catalog has a word on every commit id that was ever announced to it (``catalog.standing``), and a commit's manifest is
written while it is announced. So a manifest that bears the catalog's own binding, and about which it has no word, was
written by a newer state of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.errors import CatalogOutdatedError, CorruptDocumentError
from tailorstore.domain.names import least_id, manifest_key, ref_record_key
from tailorstore.domain.records import Binding, CommitManifest
from tailorstore.engine.rebuild import read_manifests
from tailorstore.storage.manifests import manifest_ids
from tailorstore.storage.threads import map_in_threads
from tailorstore.storage.transport import Objects

CLOCKS_APART = timedelta(hours=1)
"""How far the clocks of trainers and catalog may be apart for :func:`find_newer` to look in the right place."""


@dataclass(frozen=True, slots=True)
class Unheard:
    """Manifests about which a catalog has no word."""

    newer: Mapping[str, CommitManifest]
    """Written by a newer state of the catalog."""
    unreadable: frozenset[str]
    """Nobody can tell by whom."""
    foreign: frozenset[str]
    """Of another store, or of a catalog that had lost the root, or was about to: nothing of it was published here."""


def find_newer(objects: Objects, catalog: StoreCatalog, binding: Binding, *, everywhere: bool) -> list[CommitManifest]:
    """Return the manifests in the root that were written by a newer state of the catalog.

    Args:
        objects: the root.
        catalog: its owner.
        binding: what the root says.
        everywhere: list all manifests, one request for a thousand. Else only those whose ids were made since an hour
            before the newest head: at most a few requests, however long the history.
    """
    newest = None if everywhere else catalog.newest()
    after = "" if newest is None else manifest_key(least_id(newest - CLOCKS_APART))
    return _by_age(_find_unheard(objects, catalog, binding, after))


def _find_unheard(objects: Objects, catalog: StoreCatalog, binding: Binding, after: str = "") -> Unheard:
    # Listed first and asked after: what is announced in between is in no listing.
    listed = list(manifest_ids(objects, after=after))
    known = catalog.standings(listed)
    return sort_unheard(objects, [one for one in listed if one not in known], binding)


def _by_age(unheard: Unheard) -> list[CommitManifest]:
    return sorted(unheard.newer.values(), key=lambda one: (one.commit.created_at, one.commit.id))


def sort_unheard(objects: Objects, commit_ids: Sequence[str], binding: Binding) -> Unheard:
    """Read manifests about which a catalog has no word, and tell by whom they were written."""
    found, unreadable = read_manifests(objects, commit_ids)
    newer = {
        name: manifest
        for name, manifest in found.items()
        if manifest.binding.store_id == binding.store_id
        and (manifest.binding == binding or manifest.binding.epoch > binding.epoch)
    }
    return Unheard(newer, frozenset(unreadable), frozenset(found.keys() - newer.keys()))


def check_current(objects: Objects, catalog: StoreCatalog, binding: Binding) -> None:
    """Make sure that the catalog knows of everything that was published, and of every name.

    Raises:
        CatalogOutdatedError: it is older than its root.
        CorruptDocumentError: nobody can tell, as there are documents that it never read and that cannot be understood.
    """
    unheard = _find_unheard(objects, catalog, binding)
    newer = _by_age(unheard)
    if newer:
        msg = (
            f"the catalog is older than the root {objects.url}: {in_words(newer)}. Nothing was deleted; bring the"
            " catalog up to date with 'tailorstore rebuild'"
        )
        raise CatalogOutdatedError(msg)
    unread = sorted({*unread_documents(objects, catalog), *map(manifest_key, unheard.unreadable)})
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        msg = (
            f"nobody knows what these documents of {objects.url} said, and so what may go: {', '.join(unread[:3])}"
            f"{more}. Nothing was deleted. Put them back from a backup and run 'tailorstore rebuild', or delete them;"
            " then run gc again. If a newer tailorstore wrote them, use that one"
        )
        raise CorruptDocumentError(msg)


def unread_documents(objects: Objects, catalog: StoreCatalog) -> tuple[str, ...]:
    """Return the keys of the manifests and records that a take-over could not understand, and that are still there.

    Where there are none, that costs no request.

    Raises:
        UnavailableError, AccessDeniedError: root or catalog cannot be read.
    """
    keys = [key for one in sorted(catalog.unreadable()) for key in (manifest_key(one), ref_record_key(one))]
    there = map_in_threads(objects.exists, keys, objects.workers) if keys else []
    return tuple(sorted(key for key, is_there in zip(keys, there, strict=True) if is_there))


def in_words(newer: Iterable[CommitManifest]) -> str:
    """Say which commits a catalog does not know, by branch."""
    steps: dict[str, list[int]] = {}
    for manifest in newer:
        steps.setdefault(manifest.commit.branch, []).append(manifest.commit.step)
    count = sum(map(len, steps.values()))
    spans = {name: (min(of_it), max(of_it)) for name, of_it in sorted(steps.items())}
    ranges = [f"{name}@{first}" + (f" to {last}" if last > first else "") for name, (first, last) in spans.items()]
    more = f" and {len(ranges) - 5} more branches" if len(ranges) > 5 else ""
    return f"it does not know {count} of the commits there ({', '.join(ranges[:5])}{more})"
