"""Records of tags and branches: can they be read, and would a rebuild find every name where it is?

A change is made in the catalog first and recorded in the root next, so a process that dies between the two leaves one
that is not on record: no damage, and yet a rebuild would not find it. A repair records it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.errors import CorruptDocumentError, FormatTooNewError, TailorError
from tailorstore.domain.names import new_id, ref_record_key
from tailorstore.domain.records import Damage, RefRecord
from tailorstore.domain.replay import Replayed, replay
from tailorstore.engine.rebuild import read_records
from tailorstore.engine.verify import what_is_said
from tailorstore.storage.manifests import write_ref_record
from tailorstore.storage.transport import Objects

_WHAT_TO_DO = (
    "what it said nobody knows. Put it back from a backup and run 'tailorstore rebuild', or set the name again with"
    " 'tailorstore tag' or 'tailorstore branch', then delete this file"
)


@dataclass(frozen=True, slots=True)
class Changes:
    """The records of a root, beside what its catalog says."""

    read: int
    """How many there are."""
    unreadable: Mapping[str, TailorError]
    """Ids of those that cannot be understood, and why; and of those that the catalog has never read."""
    missing: tuple[RefRecord, ...]
    """What would have to be on record for a rebuild to find each name where it is."""
    never_read: frozenset[str] = frozenset()
    """Ids of those that could not be read when the catalog was made from the root. They may be all that is left of a
    name, so nobody but a person may replace or delete them."""

    @property
    def too_new(self) -> frozenset[str]:
        """Ids of those that a newer version of tailorstore wrote: nobody here may replace or delete them."""
        return frozenset(one for one, error in self.unreadable.items() if isinstance(error, FormatTooNewError))

    @property
    def untouchable(self) -> frozenset[str]:
        """Ids of those that a repair leaves as they are."""
        return self.too_new | self.never_read

    def damages(self, url: str) -> tuple[Damage, ...]:
        """Return the records that cannot be read, as damage."""
        return tuple(
            Damage("document", "", 0, ref_record_key(one), self._said(one, url), readable=True)
            for one in sorted(self.unreadable)
        )

    def _said(self, record_id: str, url: str) -> str:
        said = what_is_said(self.unreadable[record_id], ref_record_key(record_id), url)
        return f"{said}: {_WHAT_TO_DO}" if record_id in self.never_read - self.too_new else said


def names_of(records: Collection[RefRecord]) -> tuple[str, ...]:
    """Return the names that records are of, in words."""
    return tuple(sorted(f"{one.kind} {one.name}" for one in records))


def read_changes(
    objects: Objects, catalog: StoreCatalog, before: Replayed | None = None, *, owned: bool = True
) -> Changes:
    """Read all records, in parallel, and compare what they tell with the catalog.

    Every name whose last change is on record is found, whatever was moved, removed or expired before.

    Args:
        objects: the root.
        catalog: of its owner, or one that was made of its documents.
        before: what the catalog said a while ago. Of names that have changed since, the record may just be on its way:
            they are left out.
        owned: whether the catalog is the root's owner.

    Raises:
        UnavailableError, AccessDeniedError: root or catalog cannot be read.
    """
    records, unreadable = read_records(objects)
    never_read = frozenset(catalog.unreadable() & {*records, *unreadable}) if owned else frozenset()
    for record_id in never_read & records.keys():
        # Nothing that the catalog says of this name contradicts it.
        unreadable[record_id] = CorruptDocumentError(f"{ref_record_key(records.pop(record_id).id)} can be read again")
    # Told before the names are: a change that is not among them is later than what a repair writes of them.
    when = catalog.now()
    known = catalog.whole_history()
    missing = _missing(replay(known.commits, list(records.values())), known, when)
    if before is not None:
        past, present = _commits_by_name(before), _commits_by_name(known)
        missing = [one for one in missing if past.get((one.kind, one.name)) == present.get((one.kind, one.name))]
    return Changes(len(records) + len(unreadable), unreadable, tuple(missing), never_read)


def record_again(objects: Objects, catalog: StoreCatalog, before: Replayed) -> tuple[Changes, Changes]:
    """Record what is missing; then delete the damaged records, once nothing at all depends on them.

    A crash leaves some of it done; do it again.

    Args:
        objects: the root; this catalog owns it.
        catalog: its owner.
        before: what the catalog said a while ago.

    Returns:
        What was found, and what is left of it.
    """
    found = read_changes(objects, catalog, before)
    for record in found.missing:
        if record.id not in found.untouchable:
            write_ref_record(objects, record)
    if not found.missing and not found.unreadable:
        return found, found
    left = read_changes(objects, catalog)
    if left.missing:
        return found, left
    going = [ref_record_key(one) for one in left.unreadable.keys() - left.untouchable]
    gone = set(going) - {failure.key for failure in objects.delete(going)}
    kept = {one: error for one, error in left.unreadable.items() if ref_record_key(one) not in gone}
    return found, replace(left, unreadable=kept)


def _commits_by_name(said: Replayed) -> dict[tuple[str, str], str]:
    """Return the commit that each name points to, by kind and name."""
    heads = {("branch", name): tip.commit for name, tip in said.branches.items()}
    return heads | {("tag", name): commit for name, commit in said.tags.items()}


def _missing(told: Replayed, known: Replayed, when: datetime) -> list[RefRecord]:
    """Return the records that would make a replay tell what is known."""
    says, is_so = _commits_by_name(told), _commits_by_name(known)
    missing: list[RefRecord] = []
    for kind, name in sorted(says.keys() | is_so.keys()):
        commit = is_so.get((kind, name))
        if says.get((kind, name)) != commit:
            # A line is named by the record that began it, so that what is committed there next is known again.
            begun = known.branches[name].line if kind == "branch" and commit is not None else new_id()
            missing.append(RefRecord(begun, "branch" if kind == "branch" else "tag", name, commit, when))
    return missing
