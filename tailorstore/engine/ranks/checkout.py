"""A checkout that all ranks make together: one catalog query, on the coordinator."""

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from tailorstore.domain.names import Ref
from tailorstore.domain.records import LayerMeasures
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.claims import claim, claim_whole, warn_of_quarantine
from tailorstore.engine.gc import Progress
from tailorstore.engine.observed import observations
from tailorstore.engine.publish import Head
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.records_json import (
    commit_from_json,
    commit_to_json,
    head_from_json,
    head_to_json,
    measures_from_json,
    measures_to_json,
)
from tailorstore.engine.read import load_documents
from tailorstore.engine.session import Session
from tailorstore.storage.layers import canonical_json

if TYPE_CHECKING:
    from tailorstore.engine.commits import Commits


def check_out_together(
    ranks: Ranks,
    session: Session,
    ref: Ref,
    branch: str,
    commits: "Commits",
    *,
    fallback: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Return the same composite on every rank; the coordinator's lease holds it for all.

    With ``fallback`` the coordinator verifies, alone, while the others wait: ``ranks_timeout`` must leave it the time.

    Raises:
        RefNotFoundError, AmbiguousRefError, IntegrityError: on every rank.
        RankLostError: another rank did not call, or died.
    """
    lease_id: str | None = None
    described = b""
    with ranks.together(f"checking out {ref.text!r}"):
        if ranks.is_coordinator:
            session.refresh()
            claimed = claim_whole(session, ref, branch, progress) if fallback else claim(session, ref, branch)
            composite, lease_id, asked = claimed.composite, claimed.lease_id, claimed.fallback_from
            warn_of_quarantine(composite)
            objects = session.objects
            # What is in quarantine may lack its document; whoever needs it finds out.
            whole = Head(composite, {}, {}).whole
            head = Head(
                composite,
                load_documents(objects, whole.versions.values(), commits.known_documents),
                load_documents(objects, whole.bases.values()),
            )
            steps, measures = observations(session.catalog, composite.commit)
            instead_of = commit_to_json(asked) if asked is not None else None
            described = canonical_json([head_to_json(head), steps, measures_to_json(measures), instead_of])
        found = json.loads(ranks.share_bytes(described if ranks.is_coordinator else None))
    shared, seen = head_from_json(found[0]), _seen(found[1], found[2])
    keeper = session.keeper if lease_id is not None else None
    return Checkpoint(
        shared.composite,
        session.objects,
        known=shared.documents,
        known_bases=shared.base_documents,
        release=partial(keeper.release, lease_id) if keeper is not None and lease_id is not None else None,
        drop=partial(keeper.drop, lease_id) if keeper is not None and lease_id is not None else None,
        observed=lambda: seen,
        ranks=commits.ranks,
        fallback_from=commit_from_json(found[3]) if found[3] is not None else None,
    )


def _seen(steps: list[int], measures: Mapping[str, Any]) -> tuple[list[int], dict[str, LayerMeasures]]:
    return steps, measures_from_json(measures)
