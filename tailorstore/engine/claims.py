"""From a ref to a composite under a lease: the one that is meant, or the newest before it that verifies."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

from tailorstore.domain.errors import (
    AccessDeniedError,
    ConflictError,
    IntegrityError,
    RefNotFoundError,
    TailorError,
    UnavailableError,
)
from tailorstore.domain.names import Ref, parse_ref
from tailorstore.domain.records import Commit, Composite, LayerDocument, LayerVersion
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.gc import Progress
from tailorstore.engine.observed import observations
from tailorstore.engine.repair import put_away
from tailorstore.engine.session import Session
from tailorstore.engine.verify import Remember, Verification, pair_of

logger = logging.getLogger("tailorstore")


@dataclass(frozen=True, slots=True)
class Claim:
    """A composite that this process reads, and the lease that keeps GC from it."""

    composite: Composite
    lease_id: str | None
    """``None`` where the catalog cannot be written: such a reader leans on the grace period."""
    fallback_from: Commit | None = None
    """The commit that was asked for, if this is another one."""


def claim(session: Session, ref: Ref, branch: str) -> Claim:
    """Return the composite of a ref; raises as ``Store.checkout`` does."""
    keeper = session.keeper
    composite, lease_id = session.catalog.resolve(ref, branch, keeper.lease if session.writable else None)
    if lease_id is not None:
        keeper.hold(lease_id)
    return Claim(composite, lease_id)


@contextmanager
def claimed(session: Session, ref: Ref, branch: str) -> Iterator[Composite]:
    """Hold the composite of a ref while the block lasts."""
    held = claim(session, ref, branch)
    try:
        yield held.composite
    finally:
        if held.lease_id is not None:
            session.keeper.release(held.lease_id)


def claim_whole(session: Session, ref: Ref, branch: str, progress: Progress | None = None) -> Claim:
    """Return the composite of a ref if it verifies, or else the newest verifying one that led to it.

    What composites share is read once.

    What cannot be read goes into quarantine where the catalog owns the root and can be written: the next commit writes
    these layers anew, whatever its mask says.

    Raises:
        IntegrityError: none verifies; lists what was tried.
        RefNotFoundError, AmbiguousRefError: the ref itself is not one commit's.
    """
    verification = Verification(session.objects, session.catalog, progress, remembering(session))
    tried: list[str] = []

    def holds(composite: Composite) -> bool:
        commit, broken = composite.commit, _broken_layers(verification, composite)
        if not broken:
            return True
        tried.append(f"step {commit.step} (layer {', '.join(map(repr, broken))})")
        return False

    with claimed(session, ref, branch) as composite:
        asked = composite.commit
        if holds(composite):
            return claim(session, parse_ref(asked), branch)
        candidates = session.catalog.commits_to(asked.id)[1:]
    for commit in candidates:
        with suppress(RefNotFoundError), claimed(session, parse_ref(commit), branch) as composite:  # expired since
            if holds(composite):
                _put_away(session, verification)
                found = claim(session, parse_ref(commit), branch)
                logger.warning(
                    "step %d on %r does not verify; step %d is the newest before it that does. Tried: %s.%s",
                    *(asked.step, asked.branch, commit.step, "; ".join(tried)),
                    _how_to_train_on(session, branch, asked, commit),
                )
                return replace(found, fallback_from=asked)
    _put_away(session, verification)
    msg = (
        f"no commit that led to step {asked.step} on {asked.branch!r} verifies. Tried: {'; '.join(tried)}."
        " 'tailorstore verify' tells what is damaged; layers that are whole can be read from a plain checkout"
    )
    raise IntegrityError(msg)


def _put_away(session: Session, verification: Verification) -> None:
    """Put what was found broken into quarantine, if this process may: else a commit could take it for unchanged."""
    if not session.writable:
        return
    try:
        put_away(session.objects, session.catalog, session.binding, verification)
    except TailorError as error:
        # What is whole can be read all the same.
        logger.warning("what is damaged was not put into quarantine, 'tailorstore verify --repair' does: %s", error)


def _how_to_train_on(session: Session, branch: str, asked: Commit, found: Commit) -> str:
    """Return how to go on from a commit that was found in place of another; nothing where no branch leads there."""
    for name in dict.fromkeys((branch, asked.branch)) if session.writable else ():
        with suppress(RefNotFoundError):
            head = session.catalog.head(name)
            if head is None or asked not in session.catalog.commits_to(head.id):
                continue
            there = f"{name}@{found.step}"
            return (
                f" To train on from there: store.branch({name!r}, {there!r}, move=True), or 'tailorstore branch {name}"
                f" {there} --move'. Until then commits on {name!r} at steps up to {head.step} are refused, and a later"
                f" one leaves what its mask does not name as step {head.step} has it"
            )
    return ""


def _broken_layers(verification: Verification, composite: Composite) -> list[str]:
    """Return the layers of a composite that cannot be read, without reading again what was read before."""
    versions = [*composite.versions.values(), *composite.bases.values()]
    if not any(pair_of(version) in verification.broken() for version in versions):
        verification.read(versions)
    broken = verification.broken()
    return sorted({version.layer for version in versions if pair_of(version) in broken})


def remembering(session: Session) -> Remember | None:
    """Return what notes in the catalog what was read; ``None`` where that cannot be written."""
    if not session.writable:
        return None

    def remember(versions: Collection[LayerVersion], commits: Collection[str]) -> None:
        try:
            session.catalog.verified(versions, commits)
        except (ConflictError, UnavailableError, AccessDeniedError) as error:
            # What was found counts all the same.
            logger.warning("when this was verified is not remembered: %s", error)

    return remember


def warn_of_quarantine(composite: Composite) -> None:
    """Say which layers of a composite cannot be relied on."""
    commit, quarantined = composite.commit, composite.quarantined
    if quarantined:
        told = "; ".join(
            f"{name!r} of step {composite.versions[name].step} ({why})" for name, why in quarantined.items()
        )
        logger.warning(
            "the composite of step %d on %r holds layers in quarantine: %s. The next commit of these layers writes them"
            " anew; checkout(%d, fallback=True) takes the newest step before it that is whole",
            *(commit.step, commit.branch, told, commit.step),
        )


def check_out(
    session: Session,
    ref: Ref,
    branch: str,
    known: Mapping[str, LayerDocument] | None,
    *,
    fallback: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Return the composite of a ref; see ``Store.checkout``.

    Args:
        session: the store's.
        ref: what was asked for.
        branch: what ``latest`` means.
        known: documents that are in memory already.
        fallback: take the newest that verifies.
        progress: of verifying.
    """
    keeper, catalog = session.keeper, session.catalog
    found = claim_whole(session, ref, branch, progress) if fallback else claim(session, ref, branch)
    warn_of_quarantine(found.composite)
    lease_id = found.lease_id
    return Checkpoint(
        found.composite,
        session.objects,
        known=known,
        release=partial(keeper.release, lease_id) if lease_id else None,
        drop=partial(keeper.drop, lease_id) if lease_id else None,
        observed=partial(observations, catalog, found.composite.commit),
        fallback_from=found.fallback_from,
    )
