"""Before much memory is taken by a document's word: does storage hold what the document speaks of?"""

import math
from collections.abc import Iterable

from tailorstore.domain.chunks import chunks_of
from tailorstore.domain.errors import AccessDeniedError
from tailorstore.engine.light.sources import Source
from tailorstore.engine.read import StoredArray
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.failures import missing
from tailorstore.storage.transport import Objects, wrong_size

UNPROVED_BYTES = 1 << 30
"""So much is taken without asking storage: any machine that trains has it, and what is not read is never touched."""


def size_of(source: Source) -> int:
    """Return the size of a tensor's elements in bytes."""
    return math.prod(source.shape) * itemsize(source.dtype)


def check_held(objects: Objects, sources: Iterable[Source], size_bytes: int) -> None:
    """Make sure that the objects of some tensors are there, each as long as its document says.

    A document of a few kilobytes can describe a petabyte; so can one whose objects were lost. One listing an array.

    Args:
        objects: the root.
        sources: the tensors.
        size_bytes: memory that is about to be taken for them; storage is asked only above :data:`UNPROVED_BYTES`.

    Raises:
        MissingObjectError: an object is gone, short or long; names the first.
    """
    if size_bytes <= UNPROVED_BYTES:
        return
    seen: set[tuple[str, str]] = set()
    for source in sources:
        for array in _arrays_of(source):
            place = array.prefix, array.record.path
            if place not in seen:
                seen.add(place)
                _check_array(objects, array)


def _arrays_of(source: Source) -> list[StoredArray]:
    if isinstance(source, StoredArray):
        return [source]
    return [*source.arrays.values(), *([source.base] if source.base else [])]


def _check_array(objects: Objects, array: StoredArray) -> None:
    record = array.record
    try:
        found = {info.key: info.size for info in objects.list(f"{array.prefix}{record.path}/")}
    except AccessDeniedError:
        return  # credentials that may read but not list: the reads will tell
    for chunk in chunks_of(record.spec.shape, record.spec.chunk_shape):
        key, size = array.key(chunk), record.sizes[chunk.number]
        if key not in found:
            raise missing(objects.url, key)
        if found[key] != size:
            raise wrong_size(objects.url, key, found[key], size)
