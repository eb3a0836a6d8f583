"""Repair: make again what can be made again exactly, put what is damaged into quarantine, let out what is whole again.

Nothing is re-pointed and no object of a layer is touched: a composite that holds a quarantined version says so, and the
next commit that captures the layer writes it anew. What a newer version of tailorstore wrote is left as it is, and does
not go into quarantine: to that version it is whole.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.errors import (
    CorruptDocumentError,
    FormatTooNewError,
    InvalidInputError,
    MissingObjectError,
    RefNotFoundError,
)
from tailorstore.domain.names import layer_component, manifest_key, quarantine_key, version_prefix
from tailorstore.domain.records import Binding, Damage, LayerVersion
from tailorstore.engine.publish import check_binding
from tailorstore.engine.verify import Pair, Verification, manifest_of
from tailorstore.storage.documents import array_document, group_document
from tailorstore.storage.layers import GROUP_DOCUMENT, chunk_digest, load_document
from tailorstore.storage.manifests import write_manifest
from tailorstore.storage.quarantine import quarantine_records, write_quarantine
from tailorstore.storage.transport import Objects


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did."""

    damages: tuple[Damage, ...]
    """As found; those that were made good are marked."""
    quarantined: tuple[str, ...]
    """Prefixes of versions."""
    lifted: tuple[str, ...]
    """Prefixes of versions."""


def repair(objects: Objects, catalog: StoreCatalog, binding: Binding, verification: Verification) -> Repaired:
    """Repair what a verification found.

    Each step stands by itself: after a crash in the middle, doing it again goes on.

    Raises:
        RootTakenError: another catalog owns the root; nothing was changed.
        UnavailableError, AccessDeniedError: some of it was done; do it again.
    """
    check_binding(objects, binding)
    mender = _Mender(objects, catalog, verification)
    damages = tuple(
        replace(damage, mended=True) if mender.mend(damage) else damage for damage in verification.damages()
    )
    left = _by_version(verification, (damage for damage in damages if not damage.mended))
    on_record = set(quarantine_records(objects))
    known = {*catalog.in_quarantine(), *(pair for pair in verification.versions if _place(pair) in on_record)}
    whole = sorted((verification.versions.keys() & known) - {pair_of_damage(one) for one in damages if not one.mended})
    # The record first, both ways: what a dying process leaves is found again by the catalog's word.
    _put_away(objects, catalog, left)
    objects.delete([quarantine_key(*_place(pair)) for pair in whole])
    catalog.lift(whole)
    return Repaired(damages, tuple(sorted(map(_prefix, left))), tuple(map(_prefix, whole)))


def put_away(objects: Objects, catalog: StoreCatalog, binding: Binding, verification: Verification) -> None:
    """Put the versions of which not all values can be read into quarantine; nothing is made again, nothing let out.

    Raises:
        RootTakenError: another catalog owns the root; nothing was changed.
        UnavailableError, AccessDeniedError: some of it was done; do it again.
    """
    found = _by_version(verification, (damage for damage in verification.damages() if not damage.readable))
    if found:
        check_binding(objects, binding)
        _put_away(objects, catalog, found)


def _by_version(verification: Verification, damages: Iterable[Damage]) -> dict[Pair, list[Damage]]:
    """Return the damages of versions by these, without what a newer version of tailorstore wrote."""
    found: dict[Pair, list[Damage]] = defaultdict(list)
    for damage in damages:
        if damage.version_id is not None and damage.key not in verification.too_new:
            found[damage.layer, damage.version_id].append(damage)
    return found


def _put_away(objects: Objects, catalog: StoreCatalog, damages: Mapping[Pair, Sequence[Damage]]) -> None:
    for pair, found in damages.items():
        write_quarantine(objects, *_place(pair), _told(found))
    catalog.quarantine({pair: _told(found) for pair, found in damages.items()})


def pair_of_damage(damage: Damage) -> Pair:
    """Return the version that a damage is of; of a manifest none that there is."""
    return damage.layer, damage.version_id or ""


def write_manifest_again(objects: Objects, catalog: StoreCatalog, commit_id: str) -> bool:
    """Write the manifest of a commit from the catalog, over whatever is there; returns whether there is one now."""
    try:
        manifest = manifest_of(catalog, commit_id)
    except RefNotFoundError:
        return False  # expired since
    write_manifest(objects, manifest)
    if catalog.unknown_commits([commit_id]):
        # GC expired it and has deleted its manifest: a rebuild must not find it again.
        objects.delete([manifest_key(commit_id)])
        return False
    return True


def _place(pair: Pair) -> tuple[str, str]:
    return layer_component(pair[0]), pair[1]


def _prefix(pair: Pair) -> str:
    return version_prefix(*pair)


def _told(damages: Sequence[Damage]) -> str:
    """Return what a person is told of a version's damages."""
    first = damages[0]
    more = len(damages) - 1
    what = "its document is not what was written" if first.kind == "document" else first.kind
    return f"{what}: {first.key}" + (f", and {more} more object{'s' if more > 1 else ''}" if more else "")


class _Mender:
    """Makes documents again that follow from what is known."""

    def __init__(self, objects: Objects, catalog: StoreCatalog, verification: Verification) -> None:
        self._objects = objects
        self._catalog = catalog
        self._verification = verification

    def mend(self, damage: Damage) -> bool:
        """Make a damaged object again; returns whether it now is exactly what it should be."""
        # What stands by its own checksum is never written over: it may be the catalog that is wrong.
        if damage.key in self._verification.too_new | self._verification.standing:
            return False
        if damage.version_id is None:
            make = partial(write_manifest_again, self._objects, self._catalog, damage.commits[0])
        else:
            version = self._verification.versions.get((damage.layer, damage.version_id))
            if version is None or not damage.readable:
                return False
            make = partial(self._mend_document, version, damage.key)
        try:
            return make()
        except InvalidInputError:
            return False  # a folder stands in its place, or a link on the way there

    def _mend_document(self, version: LayerVersion, key: str) -> bool:
        prefix = version_prefix(version.layer, version.version_id)
        try:
            document = load_document(self._objects, version)
        except (MissingObjectError, CorruptDocumentError, FormatTooNewError):
            return False
        path = key.removeprefix(prefix)
        record = document.arrays.get(path.removesuffix(f"/{GROUP_DOCUMENT}"))
        made = group_document({}, {}) if record is None else array_document(record.spec)
        # Another version of zarr-python may write it in another way.
        if chunk_digest(memoryview(made)) != document.documents[path]:
            return False
        self._objects.replace(key, made)
        return True
