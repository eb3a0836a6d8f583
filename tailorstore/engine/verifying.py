"""The verifier's verbs: a commit, the whole store, a part of it each day; with or without repair."""

from collections.abc import Iterable
from dataclasses import replace

from tailorstore.domain.errors import CorruptDocumentError, FormatTooNewError, InvalidInputError, MissingObjectError
from tailorstore.domain.names import Ref, manifest_key, version_prefix
from tailorstore.domain.records import Damage, VerifyReport
from tailorstore.domain.replay import Replayed
from tailorstore.engine.changes import names_of, read_changes, record_again
from tailorstore.engine.claims import claimed, remembering
from tailorstore.engine.gc import Progress
from tailorstore.engine.repair import pair_of_damage, repair
from tailorstore.engine.session import Session
from tailorstore.engine.strays import find_strays, list_root
from tailorstore.engine.verify import Verification, what_is_said
from tailorstore.storage.manifests import read_manifest
from tailorstore.storage.threads import map_in_threads

_WHAT_TO_DO = (
    "which commit it was of nobody knows. Put it back from a backup and run 'tailorstore rebuild', or delete it; gc"
    " waits for that"
)


def verify_commit(
    session: Session, ref: Ref, branch: str, *, mend: bool = False, progress: Progress | None = None
) -> VerifyReport:
    """Verify the composite of a ref and its manifest, under a lease; see ``Store.verify``."""
    verification = _verification(session, progress)
    with claimed(session, ref, branch) as composite:
        verification.read([*composite.versions.values(), *composite.bases.values()], [composite.commit.id])
        return _reported(session, verification, mend=mend)


def verify_store(session: Session, *, mend: bool = False, progress: Progress | None = None) -> VerifyReport:
    """Verify everything, and tell what nothing explains; see ``Store.verify``."""
    # What is compared with it is judged by it.
    session.catalog.check_sound()
    before = session.catalog.whole_history()
    listed = list_root(session.objects)
    verification = _verification(session, progress)
    verification.read(session.catalog.live_versions(), list(session.catalog.inventory().commits()))
    report = _reported(session, verification, mend=mend)
    unread = _unread_manifests(session, listed.manifests)
    named = {damage.key for damage in unread}
    unknown, awaiting = find_strays(session.objects, session.catalog, listed, verification.damaged())
    report = replace(
        report,
        damages=(*report.damages, *unread),
        unknown=tuple(one for one in unknown if one.key not in named),
        awaiting_gc=awaiting,
    )
    return _with_changes(session, report, before, mend=mend)


def scrub(session: Session, fraction: float, *, progress: Progress | None = None) -> VerifyReport:
    """Verify what was not verified for longest; see ``Store.scrub``."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        msg = f"fraction must be above 0 and at most 1, as 1/30 for all within 30 days; not {fraction!r}"
        raise InvalidInputError(msg)
    session.check_writable("scrub")
    verification = _verification(session, progress)
    verification.read(*session.catalog.least_recently_verified(fraction))
    return _reported(session, verification, mend=False)


def _verification(session: Session, progress: Progress | None) -> Verification:
    return Verification(session.objects, session.catalog, progress, remembering(session))


def _reported(session: Session, verification: Verification, *, mend: bool) -> VerifyReport:
    if not mend:
        damages, quarantine = verification.damages(), session.catalog.in_quarantine()
        known = {pair_of_damage(damage) for damage in damages} & quarantine.keys()
        quarantined = tuple(sorted(version_prefix(*pair) for pair in known))
        return replace(verification.report(damages), quarantined=quarantined)
    done = repair(session.objects, session.catalog, session.binding, verification)
    return replace(verification.report(done.damages), quarantined=done.quarantined, lifted=done.lifted)


def _unread_manifests(session: Session, listed: Iterable[str]) -> tuple[Damage, ...]:
    """Return as damage the manifests that say nothing, of commits that the catalog does not know, or of nobody."""
    objects = session.objects
    # Asked after the listing was made: what is being written meanwhile is known.
    standings = session.catalog.standings(listed)
    never_read = sorted(one for one in listed if standings.get(one, "unreadable") == "unreadable")

    def look(commit_id: str) -> str:
        key = manifest_key(commit_id)
        try:
            manifest = read_manifest(objects, commit_id)
        except MissingObjectError:
            return ""  # deleted since
        except FormatTooNewError as error:
            return what_is_said(error, key, objects.url)
        except CorruptDocumentError as error:
            return what_is_said(error, key, objects.url) + (f": {_WHAT_TO_DO}" if session.owned else "")
        if manifest.commit.id != commit_id:
            return f"it is the manifest of commit {manifest.commit.id}"
        if commit_id in standings and session.owned:
            return (
                "can be read, and the catalog does not know what it says: run 'tailorstore rebuild' if it was put back"
            )
        return ""

    said = map_in_threads(look, never_read, objects.workers) if never_read else []
    return tuple(
        Damage("document", "", 0, manifest_key(one), what, readable=True)
        for one, what in zip(never_read, said, strict=True)
        if what
    )


def _with_changes(session: Session, report: VerifyReport, before: Replayed, *, mend: bool) -> VerifyReport:
    """Add to a report what is to be said of the records of tags and branches; record what is missing if asked to."""
    objects, catalog = session.objects, session.catalog
    if mend:
        found, left = record_again(objects, catalog, before)
    else:
        found = left = read_changes(objects, catalog, before, owned=session.owned)
    kept = set(left.unreadable)
    damages = tuple(
        replace(damage, mended=one not in kept)
        for one, damage in zip(sorted(found.unreadable), found.damages(objects.url), strict=True)
    )
    unrecorded, all_names = names_of(left.missing), names_of(found.missing)
    return replace(
        report,
        objects=report.objects + found.read,
        damages=(*report.damages, *damages),
        unrecorded=unrecorded,
        recorded=tuple(name for name in all_names if name not in unrecorded),
    )
