"""Garbage collection: drop commits that no policy keeps, sweep objects that nothing refers to.

What may be deleted is decided by the catalog alone; the order is DESIGN.md, "Order of deleting": an object loses its
standing first and is deleted after the grace period, so readers that hold no lease have that long to finish.

Records of tags and branches are left alone, all of them: they are small, any may be what a rebuild needs to tell where
a name points, and one that cannot be read is damaged. ``verify`` names it, and a repair replaces it. Where there are
manifests or records of which nobody knows what they said, nothing is deleted at all: what they need, others may have
written.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.errors import CorruptDocumentError, FormatTooNewError, InvalidInputError, MissingObjectError
from tailorstore.domain.names import (
    COMMITS_PREFIX,
    LAYERS_PREFIX,
    QUARANTINE_PREFIX,
    REFS_PREFIX,
    is_id,
    layer_component,
)
from tailorstore.domain.records import Binding, GcReport, LayerVersion
from tailorstore.domain.retention import RetentionPolicy, decide
from tailorstore.engine.currency import check_current, sort_unheard
from tailorstore.engine.publish import check_binding
from tailorstore.engine.storage_clock import StorageClock
from tailorstore.storage.manifests import read_manifest
from tailorstore.storage.transport import ObjectInfo, Objects

logger = logging.getLogger("tailorstore")

Progress = Callable[[str, int, int | None], None]
"""Is told what is being done, how much of it is done, and how much there is (``None``: not known)."""

_BATCH = 1000
_CLOCK_SKEW = timedelta(minutes=5)


_REPLACEMENT = re.compile(r"(tailorstore|(layers|quarantine|commits|refs)/.+)\.json\.[0-9a-f]{16}\.new")
"""Key of what was to replace a document, on file systems, when the process died. No tensor's object has such a name."""


@dataclass(slots=True)
class _Found:
    """Objects of one version that lie in storage."""

    keys: list[str] = field(default_factory=list)
    size_bytes: int = 0
    newest: datetime | None = None
    timeless: bool = False

    def add(self, info: ObjectInfo) -> None:
        self.keys.append(info.key)
        self.size_bytes += info.size
        if info.modified is None:
            self.timeless = True
        elif self.newest is None or info.modified > self.newest:
            self.newest = info.modified


def _in_folder(key: str, folder: str) -> str | None:
    """Return the id of a document in a folder; ``None`` where the key is no such document's."""
    name = key.removeprefix(folder).removesuffix(".json")
    return name if key.startswith(folder) and is_id(name) else None


@dataclass(slots=True)
class _Listing:
    """Every object of a root that GC may delete, by what it belongs to. What else is there is nobody's business."""

    versions: dict[tuple[str, str], _Found] = field(default_factory=lambda: defaultdict(_Found))
    """By path component of the layer, and version id."""
    manifests: dict[str, _Found] = field(default_factory=lambda: defaultdict(_Found))
    records: set[str] = field(default_factory=set)
    """Ids of records of tags and branches, which are left alone."""
    replacements: list[_Found] = field(default_factory=list)

    def add(self, info: ObjectInfo) -> None:
        parts = info.key.split("/", 3)
        record_of = parts[2].removesuffix(".json") if len(parts) == 3 else ""
        if info.key.endswith(".new") and _REPLACEMENT.fullmatch(info.key):
            found = _Found()
            found.add(info)
            self.replacements.append(found)
        elif len(parts) == 4 and f"{parts[0]}/" == LAYERS_PREFIX and is_id(parts[2]):
            self.versions[parts[1], parts[2]].add(info)
        elif f"{parts[0]}/" == QUARANTINE_PREFIX and is_id(record_of):
            # That a version is damaged is on record as long as the version is there.
            self.versions[parts[1], record_of].add(info)
        elif commit_id := _in_folder(info.key, COMMITS_PREFIX):
            self.manifests[commit_id].add(info)
        elif record_id := _in_folder(info.key, REFS_PREFIX):
            self.records.add(record_id)


@dataclass(slots=True)
class _Tally:
    deleted: int = 0
    failed: int = 0
    bytes_freed: int = 0
    versions: int = 0
    leftovers: int = 0


def collect(
    objects: Objects,
    catalog: StoreCatalog,
    binding: Binding,
    policy: RetentionPolicy | None,
    *,
    dry_run: bool,
    grace: timedelta,
    progress: Progress | None = None,
) -> GcReport:
    """Expire commits by a policy, then sweep. Safe beside trainers, readers and other GC runs; safe to stop anywhere.

    Args:
        objects: the root.
        catalog: the store's.
        binding: what the root must say.
        policy: which commits to keep; ``None`` keeps every commit and only sweeps.
        dry_run: plan and report; change nothing.
        grace: how long an object that nothing refers to is left alone; that of which a take-over found no manifest, or
            none that it could place, also since then: till then it may have been a published commit's.
        progress: is told how far it is.

    Raises:
        RootTakenError: another catalog owns the root; nothing was deleted.
        CatalogOutdatedError: the catalog is older than the root; nothing was deleted.
        CorruptDocumentError: there are manifests or records of which nobody knows what they said; nothing was deleted.
        CatalogDamagedError: the catalog is not what was published; nothing was dropped or deleted.
        UnavailableError, AccessDeniedError: what was deleted by then had lost its standing; run it again.
    """
    if not isinstance(grace, timedelta) or grace < timedelta(0):
        msg = f"grace must be a timedelta of at least 0, not {grace!r}"
        raise InvalidInputError(msg)
    tell = progress or (lambda *_: None)
    check_binding(objects, binding)
    check_current(objects, catalog, binding)
    catalog.check_sound()
    if not dry_run:
        catalog.void_lapsed()
    tell("deciding", 0, None)
    decision = decide(catalog.inventory(), policy)
    ids = [commit.id for commit in decision.expired]
    expired = catalog.preview(ids) if dry_run else catalog.expire(ids)
    sweep = _Sweep(objects, catalog, binding, grace, dry_run=dry_run, tell=tell)
    sweep.run({commit.id for commit in expired.commits})
    dropped = {commit.id for commit in expired.commits}
    spared = {commit_id: ("became protected meanwhile",) for commit_id in ids if commit_id not in dropped}
    return GcReport(
        dry_run=dry_run,
        kept={**decision.kept, **spared},
        expired=expired.commits,
        versions_doomed=expired.versions_doomed,
        bytes_doomed=expired.bytes_doomed,
        versions_swept=sweep.tally.versions,
        leftovers_swept=sweep.tally.leftovers,
        objects_deleted=sweep.tally.deleted,
        bytes_freed=sweep.tally.bytes_freed,
        deletes_failed=sweep.tally.failed,
        grace=grace,
    )


class _Sweep:
    """Lists the root once, then deletes doomed versions and leftovers that are old enough."""

    def __init__(
        self,
        objects: Objects,
        catalog: StoreCatalog,
        binding: Binding,
        grace: timedelta,
        *,
        dry_run: bool,
        tell: Progress,
    ) -> None:
        self.tally = _Tally()
        self._objects = objects
        self._catalog = catalog
        self._binding = binding
        self._grace = grace
        self._dry_run = dry_run
        self._tell = tell
        self._now: datetime | None = None
        """By the storage's clock, which tells how old objects are."""
        self._fresh: Set[str] = frozenset()
        """Ids of commits that a take-over has found something of, just now, and could not place."""

    def run(self, expired: Set[str]) -> None:
        """Sweep; ``expired`` are the ids of commits that this run dropped from the catalog."""
        # The order matters: list first, ask the catalog after. A version announced since is in no listing, one
        # announced before is known to the catalog, pending or published.
        listing = self._list()
        doomed = {(layer_component(v.layer), v.version_id): v for v in self._catalog.doomed(self._grace)}
        unknown = self._catalog.unknown_versions(list(listing.versions), as_if_voided=self._dry_run)
        self._fresh = self._catalog.unplaced_within(self._grace)
        # Manifests before layers: as long as there is a manifest, a catalog that is rebuilt from it believes in its
        # layers. What a manifest that stays refers to is left alone.
        held = self._sweep_manifests(listing, expired)
        self._sweep_doomed({pair: version for pair, version in doomed.items() if pair not in held}, listing)
        leftovers = [pair for pair in unknown if pair not in held and self._may_go(pair[1], listing.versions[pair])]
        self._sweep_leftovers([listing.versions[pair] for pair in leftovers])
        self._sweep_leftovers([one for one in listing.replacements if self._old_enough(one)])
        if not self._dry_run:
            present = {*listing.manifests, *listing.records, *(version_id for _, version_id in listing.versions)}
            self._catalog.forget_withdrawn(present, self._grace)

    def _list(self) -> _Listing:
        listing = _Listing()
        clock = StorageClock(self._objects, ask=not self._dry_run)
        try:
            for count, info in enumerate(self._objects.list(), start=1):
                if not clock.see(info):
                    listing.add(info)
                if count % 5000 == 0:
                    self._tell("listing objects", count, None)
        finally:
            clock.put_away()
        self._now = clock.now()
        return listing

    def _sweep_manifests(self, listing: _Listing, expired: Set[str]) -> set[tuple[str, str]]:
        """Delete manifests of commits that are not published; return the versions that those that stay need."""
        known = self._catalog.standings(listing.manifests, as_if_voided=self._dry_run)
        strange = sort_unheard(self._objects, [one for one in listing.manifests if one not in known], self._binding)
        dropped = {one for one, standing in known.items() if standing == "expired"} | expired
        withdrawn = {one for one, standing in known.items() if standing in ("voided", "abandoned", "unplaced")}
        unpublished = withdrawn | dropped | strange.foreign
        going = [one for one in sorted(unpublished) if one in dropped or self._may_go(one, listing.manifests[one])]
        # Of expired commits it is the layers that are counted: a dry run could not tell what else will go.
        groups = [replace(listing.manifests[i], size_bytes=0) if i in dropped else listing.manifests[i] for i in going]
        gone = self._delete(groups)
        self.tally.leftovers += sum(
            done for commit_id, done in zip(going, gone, strict=True) if commit_id not in dropped
        )
        staying = unpublished - {commit_id for commit_id, done in zip(going, gone, strict=True) if done}
        held: set[tuple[str, str]] = set()
        for commit_id in [*staying, *strange.newer]:
            # One that cannot be read makes no catalog believe in anything.
            with suppress(MissingObjectError, CorruptDocumentError, FormatTooNewError):
                manifest = read_manifest(self._objects, commit_id)
                needed = [*manifest.versions.values(), *manifest.bases.values()]
                held |= {(layer_component(version.layer), version.version_id) for version in needed}
        return held

    def _sweep_doomed(self, doomed: dict[tuple[str, str], LayerVersion], listing: _Listing) -> None:
        pairs = list(doomed)
        gone = self._delete([listing.versions.get(pair, _Found()) for pair in pairs], "sweeping versions")
        buried = [doomed[pair] for pair, done in zip(pairs, gone, strict=True) if done]
        self.tally.versions = len(buried)
        if not self._dry_run and buried:
            self._catalog.bury(buried)

    def _sweep_leftovers(self, found: list[_Found]) -> None:
        self.tally.leftovers += sum(self._delete(found, "sweeping leftovers"))

    def _delete(self, groups: list[_Found], what: str = "sweeping manifests") -> list[bool]:
        """Delete groups of objects, many to a request; return which groups are gone whole."""
        gone: list[bool] = []
        batch: list[_Found] = []
        for group in groups:
            batch.append(group)
            if sum(len(one.keys) for one in batch) >= _BATCH:
                gone += self._delete_batch(batch)
                batch = []
                self._tell(what, len(gone), len(groups))
        return gone + self._delete_batch(batch) if batch else gone

    def _delete_batch(self, batch: list[_Found]) -> list[bool]:
        keys = [key for group in batch for key in group.keys]
        failed: set[str] = set()
        if not self._dry_run and keys:
            # Another catalog may take the root over at any time; what it refers to is not ours to delete.
            check_binding(self._objects, self._binding)
            failures = self._objects.delete(keys)
            failed = {failure.key for failure in failures}
            self.tally.deleted += len(keys) - len(failures)
            self.tally.failed += len(failures)
            for failure in failures[:3]:
                logger.warning("gc could not delete %s (%s); the next run tries again", failure.key, failure.reason)
        gone = [failed.isdisjoint(group.keys) for group in batch]
        self.tally.bytes_freed += sum(group.size_bytes for group, done in zip(batch, gone, strict=True) if done)
        return gone

    def _may_go(self, commit_id: str, found: _Found) -> bool:
        """Tell whether something of a commit that was not published is old enough."""
        return commit_id not in self._fresh and self._old_enough(found)

    def _old_enough(self, found: _Found) -> bool:
        # Where storage does not say how old an object is, it stays.
        if found.timeless or found.newest is None or self._now is None:
            return False
        skew = _CLOCK_SKEW if self._grace else timedelta(0)
        return self._now - found.newest >= self._grace + skew
