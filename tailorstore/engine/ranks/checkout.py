"""A checkout that all ranks make together: one catalog query, on the coordinator."""

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from tailorstore.domain.names import Ref
from tailorstore.domain.records import LayerMeasures
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.observed import observations
from tailorstore.engine.publish import Head
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.records_json import head_from_json, head_to_json, measures_from_json, measures_to_json
from tailorstore.engine.read import load_documents
from tailorstore.engine.session import Session
from tailorstore.storage.layers import canonical_json

if TYPE_CHECKING:
    from tailorstore.engine.commits import Commits


def check_out_together(ranks: Ranks, session: Session, ref: Ref, branch: str, commits: "Commits") -> Checkpoint:
    """Return the same composite on every rank; the coordinator's lease holds it for all.

    Raises:
        RefNotFoundError, AmbiguousRefError: on every rank.
        RankLostError: another rank did not call, or died.
    """
    lease_id: str | None = None
    described = b""
    with ranks.together(f"checking out {ref.text!r}"):
        if ranks.is_coordinator:
            session.refresh()
            lease = session.keeper.lease if session.writable else None
            composite, lease_id = session.catalog.resolve(ref, branch, lease)
            if lease_id is not None:
                session.keeper.hold(lease_id)
            objects = session.objects
            known = commits.known_documents
            head = Head(
                composite,
                load_documents(objects, composite.versions.values(), known),
                load_documents(objects, composite.bases.values()),
            )
            steps, measures = observations(session.catalog, composite.commit)
            described = canonical_json([head_to_json(head), steps, measures_to_json(measures)])
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
    )


def _seen(steps: list[int], measures: Mapping[str, Any]) -> tuple[list[int], dict[str, LayerMeasures]]:
    return steps, measures_from_json(measures)
