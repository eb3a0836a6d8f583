"""What a store's root must hold, and what its composites must read back as, told from outside of the engine."""

from collections import defaultdict
from datetime import UTC, datetime

from sqlalchemy import update

import tailorstore as ts
from tailorstore.catalog.tables import leases, pending
from tailorstore.domain.names import ROOT_DOCUMENT, layer_component, manifest_key, quarantine_key
from tailorstore.storage.manifests import read_ref_record

_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def let_claims_lapse(store: ts.Store) -> None:
    """Make every lease and every announced commit lapse now, as those of dead processes do after some minutes."""

    def work(connection: object) -> None:
        for table in (pending, leases):
            connection.execute(update(table).values(expires_at=_LONG_AGO))  # type: ignore[attr-defined]

    store._catalog._database.write(work)


def all_commits(store: ts.Store) -> dict[str, ts.Commit]:
    """Return every commit that the catalog knows, on a branch or not, by id."""
    return store._catalog.inventory().commits()


def assert_root_is_exact(store: ts.Store) -> None:
    """Fail unless the root holds the objects that the catalog accounts for, all of them, and nothing else.

    True after a GC without grace. Versions are compared by the number and the bytes of their objects.
    """
    found: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    others: set[str] = set()
    for info in store._objects.list():
        if info.key.startswith("layers/"):
            _, layer, version, _ = info.key.split("/", 3)
            count, size = found[layer, version]
            found[layer, version] = (count + 1, size + info.size)
        elif not info.key.startswith("catalog.sqlite"):
            others.add(info.key)
    expected = {
        (layer_component(version.layer), version.version_id): (version.objects, version.bytes_stored)
        for version in store._catalog.live_versions()
    }
    assert dict(found) == expected
    records = {key for key in others if key.startswith("refs/")}
    for key in records:
        read_ref_record(store._objects, key.removeprefix("refs/").removesuffix(".json"))
    explained = {ROOT_DOCUMENT} | {manifest_key(commit_id) for commit_id in all_commits(store)}
    explained |= {quarantine_key(layer_component(layer), one) for layer, one in store._catalog.in_quarantine()}
    assert others - records == explained


def refs(store: ts.Store) -> dict[str, int]:
    """Return where every branch and tag points: ``branch main`` → step."""
    named = [("branch", ref) for ref in store.branches()] + [("tag", ref) for ref in store.tags()]
    return {f"{kind} {ref.name}": ref.step for kind, ref in named if ref.step is not None}
