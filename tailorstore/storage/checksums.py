"""Documents that can tell whether they are whole: each holds a checksum of all of itself.

The digests of layers cover what a layer *is*; a checksum covers how its document is written, so that a flipped bit is
found also where it changes nothing that tailorstore reads, but something that other readers do.
"""

import re

import xxhash

CHECKSUM = "checksum"
BLANK = "xxh3-128:" + "0" * 32
"""Stands in the place of the checksum while the checksum is taken."""

_FIELD = re.compile(rb'("checksum": ?")xxh3-128:[0-9a-f]{32}"')


def sealed(document: bytes) -> bytes:
    """Return a JSON document with the checksum filled in.

    Args:
        document: has a field ``"checksum"`` of the value :data:`BLANK`, before any text of a user's.
    """
    return document.replace(BLANK.encode(), _digest(document), 1)


def is_whole(document: bytes) -> bool:
    """Tell whether a JSON document is the one that :func:`sealed` returned, to the bit."""
    found = _FIELD.search(document)
    if found is None:
        return False
    blank = document[: found.end(1)] + BLANK.encode() + document[found.end() - 1 :]
    return document[found.end(1) : found.end() - 1] == _digest(blank)


def _digest(document: bytes) -> bytes:
    return b"xxh3-128:" + xxhash.xxh3_128(document).hexdigest().encode()
