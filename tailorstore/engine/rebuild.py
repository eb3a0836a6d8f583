"""From the manifests in a root back to a catalog: the explicit take-over, and the view of a root owned by another."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tailorstore.domain.errors import CorruptDocumentError, FormatTooNewError, MissingObjectError
from tailorstore.domain.names import manifest_key, ref_record_key
from tailorstore.domain.records import Commit, CommitManifest, RefRecord
from tailorstore.storage.manifests import manifest_ids, read_manifest, read_ref_record, ref_record_ids
from tailorstore.storage.threads import Job, run_jobs
from tailorstore.storage.transport import Objects

if TYPE_CHECKING:
    from datetime import datetime

Document = TypeVar("Document")


@dataclass(frozen=True, slots=True)
class History:
    """What the documents in a root amount to."""

    commits: tuple[CommitManifest, ...]
    """Published commits, oldest first."""
    branches: Mapping[str, str]
    """Branch name → id of its newest commit."""
    tags: Mapping[str, str]
    unplaced: tuple[str, ...]
    """Ids of commits that were not published: they lost a race, or their process died just before."""
    unreadable: tuple[str, ...]
    """Keys of documents that could not be understood."""


def read_history(objects: Objects) -> History:
    """Read every manifest and every record of tags and branches, in parallel, and replay them.

    Raises:
        UnavailableError, AccessDeniedError: the root cannot be read.
    """
    unreadable: list[str] = []
    manifests = _read_all(objects, sorted(manifest_ids(objects)), read_manifest, manifest_key, unreadable)
    records = _read_all(objects, sorted(ref_record_ids(objects)), read_ref_record, ref_record_key, unreadable)
    good = [manifest for name, manifest in manifests.items() if manifest.commit.id == name]
    unreadable += [manifest_key(name) for name, manifest in manifests.items() if manifest.commit.id != name]
    return replay(good, list(records.values()), unreadable)


def replay(
    manifests: Sequence[CommitManifest], records: Sequence[RefRecord], unreadable: Iterable[str] = ()
) -> History:
    """Let publications and changes of refs happen again, in the order of their times and by the same rule.

    The rule: a commit is published if its parent is the head of its branch.

    Where two commits name the same parent, the one that others were built on was published; of two without
    descendants, the later one counts, as a process that died just before publishing would have gone on.
    """
    by_id = {manifest.commit.id: manifest for manifest in manifests}
    built_on = {manifest.commit.parent for manifest in manifests if manifest.commit.parent}
    referenced = {record.commit for record in records if record.commit}
    events: list[tuple[datetime, int, CommitManifest | RefRecord]] = [
        (manifest.commit.created_at, 0, manifest) for manifest in manifests
    ]
    events += [(record.created_at, 1, record) for record in records]
    events.sort(key=lambda event: (event[0], event[1]))
    pointed: dict[str, list[datetime]] = {}
    for record in sorted(records, key=lambda record: record.created_at):
        if record.kind == "branch":
            pointed.setdefault(record.name, []).append(record.created_at)
    siblings: dict[tuple[str, str | None], list[Commit]] = defaultdict(list)
    for manifest in manifests:
        siblings[manifest.commit.branch, manifest.commit.parent].append(manifest.commit)
    branches: dict[str, str] = {}
    tags: dict[str, str] = {}
    placed: dict[str, CommitManifest] = {}

    def changes_before(commit: Commit) -> int:
        return bisect_right(pointed.get(commit.branch, []), commit.created_at)

    def loses(manifest: CommitManifest) -> bool:
        commit = manifest.commit
        if commit.id in built_on or commit.id in referenced:
            return False
        # Where the branch was moved or removed in between, two commits with the same parent never met.
        rivals = [
            other
            for other in siblings[commit.branch, commit.parent]
            if other is not commit and changes_before(other) == changes_before(commit)
        ]
        return any(
            rival.id in built_on or rival.id in referenced or rival.created_at > commit.created_at for rival in rivals
        ) and branches.get(commit.branch) in (commit.parent, None)

    for _, _, event in events:
        if isinstance(event, RefRecord):
            names = tags if event.kind == "tag" else branches
            if event.commit is None:
                names.pop(event.name, None)
            elif event.commit in by_id:
                names[event.name] = event.commit
        else:
            head = branches.get(event.commit.branch)
            # A parent without manifest was expired; then the branch's head is whatever came last before it.
            follows = head == event.commit.parent or event.commit.parent not in by_id
            if follows and not loses(event):
                branches[event.commit.branch] = event.commit.id
                placed[event.commit.id] = event
    unplaced = tuple(commit_id for commit_id in by_id if commit_id not in placed)
    heads = {name: commit_id for name, commit_id in branches.items() if commit_id in placed}
    kept_tags = {name: commit_id for name, commit_id in tags.items() if commit_id in placed}
    return History(tuple(placed.values()), heads, kept_tags, unplaced, tuple(sorted(unreadable)))


def _read_all(
    objects: Objects,
    ids: Sequence[str],
    read: Callable[[Objects, str], Document],
    key: Callable[[str], str],
    unreadable: list[str],
) -> dict[str, Document]:
    found: dict[str, Document] = {}

    def job(name: str) -> Job:
        def run() -> None:
            try:
                found[name] = read(objects, name)
            except MissingObjectError:
                return  # deleted since it was listed
            except (CorruptDocumentError, FormatTooNewError):
                unreadable.append(key(name))

        return run

    if ids:
        run_jobs([job(name) for name in ids], objects.workers)
    return {name: found[name] for name in ids if name in found}
