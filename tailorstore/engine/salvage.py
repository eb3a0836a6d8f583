"""Before a root's own catalog is filled from the root anew: what only this catalog knows is put into the root.

A take-over reads nothing but the root. Where this has lost manifests or records, commits and names would be gone
without a word.
"""

from collections.abc import Collection, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.errors import RefNotFoundError
from tailorstore.domain.names import manifest_key, ref_record_key
from tailorstore.domain.records import CommitManifest, RefRecord
from tailorstore.engine.changes import Changes, read_changes, record_again
from tailorstore.engine.repair import write_manifest_again
from tailorstore.engine.verify import Verification, manifest_of
from tailorstore.storage.transport import Objects


@dataclass(frozen=True, slots=True)
class Salvage:
    """Documents that a root lacks, or that cannot be read there, and that its catalog can write."""

    manifests: tuple[CommitManifest, ...] = ()
    records: tuple[RefRecord, ...] = ()
    too_new: frozenset[str] = frozenset()
    """Keys under which lies what a newer version of tailorstore wrote: it stays there, whatever is said of it here."""

    heard: frozenset[str] = frozenset()
    """Ids of records that cannot be understood, and of which the catalog knows what they said."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of those that are to be written, sorted."""
        manifests = (manifest_key(one.commit.id) for one in self.manifests)
        return tuple(sorted({*manifests, *(ref_record_key(one.id) for one in self.records)} - self.too_new))

    def without(self, commit_ids: Collection[str]) -> "Salvage":
        """Return it without the manifests of some commits."""
        return replace(self, manifests=tuple(one for one in self.manifests if one.commit.id not in commit_ids))


def find_salvage(objects: Objects, catalog: StoreCatalog) -> Salvage:
    """Return what only the catalog knows; changes nothing.

    Args:
        objects: the root.
        catalog: its owner, which is as new as the root.

    Raises:
        CatalogDamagedError: the catalog is not to be believed.
        UnavailableError, AccessDeniedError: root or catalog cannot be read.
    """
    catalog.check_sound()
    before = catalog.whole_history()
    lost, too_new = _lost_manifests(objects, catalog, [one.commit.id for one in before.commits])
    return _salvage(_manifests_of(catalog, lost), read_changes(objects, catalog, before), too_new)


def write_salvage(objects: Objects, catalog: StoreCatalog) -> Salvage:
    """Write what only the catalog knows into the root, and return it; a crash leaves some of it done.

    A listing may not show yet what was written just now, so whoever reads the root next takes it from here.

    Args:
        objects: the root.
        catalog: its owner, which is as new as the root.

    Raises:
        CatalogDamagedError: the catalog is not to be believed; nothing was written.
        UnavailableError, AccessDeniedError: root or catalog cannot be read or written; do it again.
    """
    catalog.check_sound()
    before = catalog.whole_history()
    lost, too_new = _lost_manifests(objects, catalog, [one.commit.id for one in before.commits])
    kept = [one for one in lost if manifest_key(one) in too_new or write_manifest_again(objects, catalog, one)]
    found, _ = record_again(objects, catalog, before)
    return _salvage(_manifests_of(catalog, kept), found, too_new)


def _salvage(manifests: tuple[CommitManifest, ...], changes: Changes, too_new: Set[str]) -> Salvage:
    untouched = frozenset(too_new) | set(map(ref_record_key, changes.too_new))
    return Salvage(manifests, changes.missing, untouched, frozenset(changes.unreadable.keys() - changes.never_read))


def _manifests_of(catalog: StoreCatalog, commit_ids: Sequence[str]) -> tuple[CommitManifest, ...]:
    found: list[CommitManifest] = []
    for commit_id in commit_ids:
        with suppress(RefNotFoundError):  # expired since
            found.append(manifest_of(catalog, commit_id))
    return tuple(found)


def _lost_manifests(objects: Objects, catalog: StoreCatalog, commit_ids: Sequence[str]) -> tuple[list[str], Set[str]]:
    """Return the commits whose manifests are gone or cannot be understood; and which keys are too new.

    A manifest that stands counts for more than the catalog: it has a checksum of its own.
    """
    verification = Verification(objects, catalog)
    verification.read((), commit_ids)
    lost = (damage for damage in verification.damages() if damage.key not in verification.standing)
    return [damage.commits[0] for damage in lost], verification.too_new
