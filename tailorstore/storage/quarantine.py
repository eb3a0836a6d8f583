"""Records of damaged layer versions, kept in the root so that a rebuilt catalog still knows of them."""

import json

from tailorstore.domain.errors import CorruptDocumentError, MissingObjectError
from tailorstore.domain.names import QUARANTINE_PREFIX, is_id, quarantine_key
from tailorstore.storage.checksums import BLANK, CHECKSUM, is_whole, sealed
from tailorstore.storage.parsing import parse_object
from tailorstore.storage.threads import map_in_threads
from tailorstore.storage.transport import Objects

FORMAT = 1
_MAX_BYTES = 1 << 20
_UNREADABLE = "damaged; what was wrong is not known any more, as its record cannot be read"


def write_quarantine(objects: Objects, component: str, version_id: str, damage: str) -> None:
    """Record durably that a layer version is damaged, in place of a record that is there.

    Args:
        objects: the root.
        component: path component of the layer.
        version_id: of the version.
        damage: what was found, for people.
    """
    described = {CHECKSUM: BLANK, "format": FORMAT, "version": version_id, "damage": damage}
    data = sealed(json.dumps(described, indent=1).encode("ascii"))
    objects.replace(quarantine_key(component, version_id), data)


def quarantine_records(objects: Objects) -> list[tuple[str, str]]:
    """Return (layer component, version id) of all records, from one listing."""
    found = []
    for info in objects.list(QUARANTINE_PREFIX):
        component, _, name = info.key.removeprefix(QUARANTINE_PREFIX).partition("/")
        version_id = name.removesuffix(".json")
        if is_id(version_id) and quarantine_key(component, version_id) == info.key:
            found.append((component, version_id))
    return sorted(found)


def read_quarantine(objects: Objects) -> dict[tuple[str, str], str]:
    """Return what is in quarantine by layer component and version id, with what was found.

    A version whose record cannot be read is in quarantine all the same: its name says which one it is.

    Raises:
        UnavailableError, AccessDeniedError: the root cannot be read.
    """
    pairs = quarantine_records(objects)
    found = map_in_threads(lambda pair: _read(objects, *pair), pairs, objects.workers) if pairs else []
    return {pair: damage for pair, damage in zip(pairs, found, strict=True) if damage is not None}


def _read(objects: Objects, component: str, version_id: str) -> str | None:
    try:
        raw = bytes(objects.get(quarantine_key(component, version_id), limit=_MAX_BYTES))
        damage = parse_object(memoryview(raw))["damage"]
    except MissingObjectError:
        return None  # lifted since it was listed
    except (CorruptDocumentError, KeyError, TypeError, ValueError, RecursionError):
        return _UNREADABLE
    return damage if isinstance(damage, str) and is_whole(raw) else _UNREADABLE
