"""From the manifests in a root back to a catalog: what the documents amount to, and what of it can be read."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tailorstore.domain.errors import CorruptDocumentError, FormatTooNewError, MissingObjectError, TailorError
from tailorstore.domain.lines import Tip
from tailorstore.domain.names import (
    LAYERS_PREFIX,
    is_id,
    layer_component,
    manifest_key,
    ref_record_key,
    version_prefix,
)
from tailorstore.domain.records import EXTRA_LAYER, CommitManifest, RefRecord, Standing
from tailorstore.domain.replay import replay
from tailorstore.domain.reports import IncompleteCommit, RebuildReport
from tailorstore.storage.layers import GROUP_DOCUMENT
from tailorstore.storage.manifests import manifest_ids, read_manifest, read_ref_record, ref_record_ids
from tailorstore.storage.quarantine import read_quarantine
from tailorstore.storage.threads import Job, map_in_threads, run_jobs
from tailorstore.storage.transport import Objects

Document = TypeVar("Document")


@dataclass(frozen=True, slots=True)
class History:
    """What the documents in a root amount to."""

    commits: tuple[CommitManifest, ...]
    """Published commits, oldest first."""
    branches: Mapping[str, Tip]
    tags: Mapping[str, str]
    """Tag name → commit id."""
    withdrawn: Mapping[str, Standing]
    """Ids of commits of which there is a manifest, and which are not among the published ones, to the reason; and those
    of records of tags and branches that could not be understood."""
    unreadable: tuple[str, ...]
    """Keys of documents that could not be understood."""
    quarantine: Mapping[tuple[str, str], str]
    """Layer component and version id of what is in quarantine, with what was found."""
    dangling: tuple[str, ...] = ()
    """Tags and branches that point to a commit that is not among the published ones."""
    incomplete: tuple[IncompleteCommit, ...] = ()
    """Of the published commits; see :func:`compare_with_layers`."""
    unclaimed: tuple[str, ...] = ()
    """Ids of commits of which there are layers, of no use to any published one, and no manifest."""

    @property
    def unplaced(self) -> tuple[str, ...]:
        """Ids of commits that were not published: they lost a race, or their process died just before."""
        return tuple(commit_id for commit_id, why in self.withdrawn.items() if why == "unplaced")

    def report(self, epoch: int, written: tuple[str, ...], *, dry_run: bool) -> RebuildReport:
        """Return what a take-over says of it."""
        held = (version for one in self.commits for version in (*one.versions.values(), *one.bases.values()))
        return RebuildReport(
            commits=len(self.commits),
            versions=len({(version.layer, version.version_id) for version in held}),
            branches=tuple(sorted(self.branches)),
            tags=tuple(sorted(self.tags)),
            unplaced=self.unplaced,
            unclaimed=self.unclaimed,
            unreadable=self.unreadable,
            dangling=self.dangling,
            incomplete=self.incomplete,
            written=written,
            epoch=epoch,
            dry_run=dry_run,
        )


def read_history(
    objects: Objects,
    store_id: str | None = None,
    more_manifests: Sequence[CommitManifest] = (),
    more_records: Sequence[RefRecord] = (),
    heard: Collection[str] = (),
) -> History:
    """Read every manifest and every record of tags and branches, in parallel, and replay them.

    Args:
        objects: the root.
        store_id: the store that it is of: manifests of another one, that somebody copied here, were never published
            here. ``None``: of whichever there are.
        more_manifests: taken for as good as those there, and in place of those of the same commits.
        more_records: likewise.
        heard: ids of records that cannot be understood, and of which the root's catalog knows what they said.

    Raises:
        UnavailableError, AccessDeniedError: the root cannot be read.
    """
    manifests, bad_manifests = read_manifests(objects, sorted(manifest_ids(objects)))
    records, bad_records = read_records(objects)
    manifests |= {one.commit.id: one for one in more_manifests}
    records |= {one.id: one for one in more_records}
    bad_manifests = tuple(one for one in bad_manifests if one not in manifests)
    bad_records = {one: error for one, error in bad_records.items() if one not in {*records, *heard}}
    strange = {name for name, one in manifests.items() if store_id not in (None, one.binding.store_id)}
    # Of those that are given it is known that they were published.
    strange |= _swept(objects, manifests, records.values()) - {one.commit.id for one in more_manifests}
    replayed = replay([one for name, one in manifests.items() if name not in strange], list(records.values()))
    bad_manifests = (*bad_manifests, *replayed.contradictory)
    unplaced: dict[str, Standing] = dict.fromkeys([*replayed.unplaced, *strange], "unplaced")
    unreadable: dict[str, Standing] = dict.fromkeys([*bad_manifests, *bad_records], "unreadable")
    return History(
        commits=replayed.commits,
        branches=replayed.branches,
        tags=replayed.tags,
        withdrawn=unplaced | unreadable,
        unreadable=tuple(sorted([*map(manifest_key, bad_manifests), *map(ref_record_key, bad_records)])),
        quarantine=read_quarantine(objects),
        dangling=replayed.dangling,
    )


def read_manifests(objects: Objects, commit_ids: Sequence[str]) -> tuple[dict[str, CommitManifest], tuple[str, ...]]:
    """Read manifests in parallel; those that are gone are left out.

    Returns:
        Those that can be read, by id, and the ids of those that cannot be understood.
    """
    found, unreadable = _read_all(objects, commit_ids, read_manifest)
    strange = [name for name, manifest in found.items() if manifest.commit.id != name]
    good = {name: manifest for name, manifest in found.items() if manifest.commit.id == name}
    return good, tuple(sorted([*unreadable, *strange]))


def read_records(objects: Objects) -> tuple[dict[str, RefRecord], dict[str, TailorError]]:
    """Read all records of tags and branches in parallel.

    Returns:
        Those that can be read, by id, and why the others cannot be understood.
    """
    return _read_all(objects, sorted(ref_record_ids(objects)), read_ref_record)


def _swept(objects: Objects, manifests: Mapping[str, CommitManifest], records: Iterable[RefRecord]) -> set[str]:
    """Return the ids of commits whose manifest came when GC had taken all that they had written.

    So it is with a commit that stood still until the grace period had passed, while another catalog owned the root: it
    was refused, and as the newest of its branch it would be taken for one that was about to be published. Those that
    others were built on, or whose parent is gone, so that they alone hold the layers before them, are none of these.
    """
    built_on = {one.commit.parent for one in manifests.values()} | {record.commit for record in records}
    newest = [one for name, one in manifests.items() if name not in built_on]

    def is_swept(manifest: CommitManifest) -> bool:
        commit = manifest.commit
        own = (one.layer for one in manifest.versions.values() if one.version_id == commit.id)
        # What every commit writes comes first: where it is there, one request tells.
        first = sorted(own, key=lambda layer: layer != EXTRA_LAYER)
        documents = (version_prefix(layer, commit.id) + GROUP_DOCUMENT for layer in first)
        parent_is_there = commit.parent is None or commit.parent in manifests
        return parent_is_there and not any(map(objects.exists, documents))

    swept = map_in_threads(is_swept, newest, objects.workers) if newest else []
    return {one.commit.id for one, gone in zip(newest, swept, strict=True) if gone}


def compare_with_layers(objects: Objects, history: History) -> History:
    """Return a history with the commits of which layers are gone, and those of which only layers are there.

    One flat listing tells, and no object is read: a version is there if its group document is. A layer is gone if its
    version, or the base that this needs, is not there.

    Raises:
        UnavailableError, AccessDeniedError: the root cannot be read.
    """
    present: set[tuple[str, str]] = set()
    for info in objects.list(LAYERS_PREFIX):
        component, _, rest = info.key.removeprefix(LAYERS_PREFIX).partition("/")
        version_id, _, name = rest.partition("/")
        if name == GROUP_DOCUMENT:
            present.add((component, version_id))
    incomplete: list[IncompleteCommit] = []
    held: set[tuple[str, str]] = set()
    for manifest in history.commits:
        versions = (*manifest.versions.values(), *manifest.bases.values())
        needed = {(layer_component(one.layer), one.version_id): one.layer for one in versions}
        gone = {layer for pair, layer in needed.items() if pair not in present}
        if gone:
            commit = manifest.commit
            incomplete.append(IncompleteCommit(commit.id, commit.step, commit.branch, tuple(sorted(gone))))
        held |= needed.keys()
    told_of = history.withdrawn.keys() | {one.commit.id for one in history.commits}
    unclaimed = {version_id for _, version_id in present - held if is_id(version_id)} - told_of
    return replace(history, incomplete=tuple(incomplete), unclaimed=tuple(sorted(unclaimed)))


def _read_all(
    objects: Objects, ids: Sequence[str], read: Callable[[Objects, str], Document]
) -> tuple[dict[str, Document], dict[str, TailorError]]:
    """Read documents in parallel; those that are gone are left out.

    Returns:
        Those that can be read, by id, and why the others cannot be understood.
    """
    found: dict[str, Document] = {}
    unreadable: dict[str, TailorError] = {}

    def job(name: str) -> Job:
        def run() -> None:
            try:
                found[name] = read(objects, name)
            except MissingObjectError:
                return  # deleted since it was listed
            except (CorruptDocumentError, FormatTooNewError) as error:
                unreadable[name] = error

        return run

    if ids:
        run_jobs([job(name) for name in ids], objects.workers)
    return {name: found[name] for name in ids if name in found}, unreadable
