"""The verifier's verbs: a commit, the whole store, a part of it each day; with or without repair."""

from dataclasses import replace

from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.names import Ref
from tailorstore.domain.records import VerifyReport
from tailorstore.domain.replay import Replayed
from tailorstore.engine.changes import names_of, read_changes, record_again
from tailorstore.engine.claims import claimed, remembering
from tailorstore.engine.gc import Progress
from tailorstore.engine.repair import repair
from tailorstore.engine.session import Session
from tailorstore.engine.strays import find_strays, list_root
from tailorstore.engine.verify import Verification


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
    before = session.catalog.whole_history()
    listed = list_root(session.objects)
    verification = _verification(session, progress)
    verification.read(session.catalog.live_versions(), list(session.catalog.inventory().commits()))
    report = _reported(session, verification, mend=mend)
    unknown, awaiting = find_strays(session.objects, session.catalog, listed, verification.damaged())
    report = replace(report, unknown=unknown, awaiting_gc=awaiting)
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
        return verification.report(verification.damages())
    done = repair(session.objects, session.catalog, session.binding, verification)
    return replace(verification.report(done.damages), quarantined=done.quarantined, lifted=done.lifted)


def _with_changes(session: Session, report: VerifyReport, before: Replayed, *, mend: bool) -> VerifyReport:
    """Add to a report what is to be said of the records of tags and branches; record what is missing if asked to."""
    objects, catalog = session.objects, session.catalog
    if mend:
        found, left = record_again(objects, catalog, before)
    else:
        found = left = read_changes(objects, catalog, before)
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
