"""Objects in a root that nothing explains: told from one flat listing and the catalog."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.chunks import chunks_of
from tailorstore.domain.errors import CorruptDocumentError, FormatTooNewError, MissingObjectError
from tailorstore.domain.names import (
    COMMITS_PREFIX,
    LAYERS_PREFIX,
    QUARANTINE_PREFIX,
    REFS_PREFIX,
    is_id,
    layer_component,
    version_prefix,
)
from tailorstore.domain.records import LayerVersion, Unknown
from tailorstore.engine.verify import Pair, pair_of
from tailorstore.storage.layers import GROUP_DOCUMENT, load_document, object_key
from tailorstore.storage.transport import ObjectInfo, Objects

_OURS = (LAYERS_PREFIX, COMMITS_PREFIX, REFS_PREFIX, QUARANTINE_PREFIX)

_Place = tuple[str, str]
"""Layer component and version id."""


@dataclass(slots=True)
class Listing:
    """What a root held at a moment, by what it belongs to: little for each version, however many objects it has."""

    versions: dict[_Place, int] = field(default_factory=lambda: defaultdict(int))
    """How many objects lie under the prefix."""
    manifests: dict[str, ObjectInfo] = field(default_factory=dict)
    records: dict[_Place, ObjectInfo] = field(default_factory=dict)
    """Of what is in quarantine."""
    strange: list[ObjectInfo] = field(default_factory=list)
    """Below tailorstore's own prefixes, and named like nothing of it."""

    def add(self, info: ObjectInfo) -> None:
        """Count an object."""
        folder, slash, name = info.key.partition("/")
        component, _, rest = name.partition("/")
        version_id, inside, _ = rest.partition("/")
        prefix = folder + slash
        if prefix == LAYERS_PREFIX and inside and is_id(version_id):
            self.versions[component, version_id] += 1
        elif prefix == QUARANTINE_PREFIX and is_id(rest.removesuffix(".json")):
            self.records[component, rest.removesuffix(".json")] = info
        elif prefix == COMMITS_PREFIX and is_id(name.removesuffix(".json")):
            self.manifests[name.removesuffix(".json")] = info
        elif prefix in _OURS and not (prefix == REFS_PREFIX and is_id(name.removesuffix(".json"))):
            self.strange.append(info)
        # What else is in the folder or bucket is nobody's business.


def list_root(objects: Objects) -> Listing:
    """List a root, flat."""
    listed = Listing()
    for info in objects.list():
        listed.add(info)
    return listed


def find_strays(
    objects: Objects, catalog: StoreCatalog, listed: Listing, damaged: Collection[Pair]
) -> tuple[tuple[Unknown, ...], int]:
    """Return the objects below tailorstore's prefixes that nothing explains, and how many others wait for GC.

    Args:
        objects: the root.
        catalog: asked after the listing was made, so that what is being written meanwhile is known.
        listed: the root.
        damaged: versions that are not as they were written. Of the others as many objects as there should be are just
            those that there should be.

    Raises:
        UnavailableError, AccessDeniedError: storage or catalog cannot be read.
    """
    places = {*listed.versions, *listed.records}
    homeless = catalog.unknown_versions(places)
    standings = catalog.standings({*listed.manifests, *(version_id for _, version_id in homeless)})
    # What was withdrawn has been explained, and waits for GC.
    unknown = {place for place in homeless if standings.get(place[1], "published") == "published"}
    live = {(layer_component(version.layer), version.version_id): version for version in catalog.live_versions()}
    found = [*listed.strange, *(info for one, info in listed.manifests.items() if one not in standings)]
    found += [info for place, info in listed.records.items() if place in unknown]
    for component, version_id in unknown & listed.versions.keys():
        found += objects.list(f"{LAYERS_PREFIX}{component}/{version_id}/")
    for place, held in listed.versions.items():
        version = live.get(place)
        if version is not None and (held != version.objects or pair_of(version) in damaged):
            found += _beside(objects, version)
    # GC takes nothing that belongs to a manifest of which nobody knows what it said.
    waiting = listed.versions.keys() - unknown - live.keys()
    awaiting = sum(listed.versions[place] for place in waiting if standings.get(place[1]) != "unreadable")
    awaiting += sum(standings.get(one) not in (None, "published", "unreadable") for one in listed.manifests)
    # What went meanwhile, by GC or a commit that gave up, is no more.
    kept = [Unknown(info.key, info.size) for info in found if objects.exists(info.key)]
    return tuple(sorted(kept, key=lambda one: one.key)), awaiting


def _beside(objects: Objects, version: LayerVersion) -> Iterator[ObjectInfo]:
    """Yield what lies under a version's prefix and is not of it."""
    prefix = version_prefix(version.layer, version.version_id)
    try:
        document = load_document(objects, version)
    except (MissingObjectError, CorruptDocumentError, FormatTooNewError):
        return  # nobody knows what belongs to it
    known = {prefix + GROUP_DOCUMENT, *(prefix + path for path in document.documents)}
    known |= {
        object_key(prefix, path, record.spec, chunk)
        for path, record in document.arrays.items()
        for chunk in chunks_of(record.spec.shape, record.spec.chunk_shape)
    }
    yield from (info for info in objects.list(prefix) if info.key not in known)
