"""What the arrays of a layer version may look like: checked when they are sealed, and again when they are read.

So a document describes no more than its objects can hold, before any memory is taken by its word.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tailorstore.domain.chunks import grid_of
from tailorstore.domain.records import ArrayRecord, ArraySpec
from tailorstore.storage.codecs import CODECS, stored_sizes
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.parsing import LARGEST, text

MOST_DIMENSIONS = 64
"""What NumPy, and with it Zarr, knows."""
MOST_BYTES = 1 << 60
"""Of one tensor; no extent of it may be larger either, where another is zero."""
MOST_CHUNK_BYTES = 1 << 40
"""Of one chunk: it is read at once. Object stores take 5 TB at most."""

_DIGEST = re.compile(r"[0-9a-f]{32}")
_COMPONENT = re.compile(r"[A-Za-z0-9=_@-][A-Za-z0-9=_@.-]{0,199}")
"""Part of an array's path as ``domain.names.escape`` makes them, or a folder of our own."""


def record_from_json(path: str, entry: Mapping[str, Any]) -> ArrayRecord:
    """Return one array of a layer version's document.

    Raises:
        KeyError, TypeError, ValueError: it is not valid.
    """
    spec = ArraySpec(
        text(entry["dtype"]), _extents(entry["shape"]), _extents(entry["chunk_shape"]), text(entry["codec"])
    )
    return check_record(ArrayRecord(path, spec, tuple(entry["digests"]), tuple(entry["sizes"])))


def check_record(record: ArrayRecord) -> ArrayRecord:
    """Return an array's record if such an array can be stored and read.

    Raises:
        TypeError, ValueError: its path, dtype, codec, shape, chunks, digests or sizes mean nothing, or sizes do not
            fit the shape: without codec a chunk has just as many bytes as elements take, with one at most
            ``codecs.MOST_RATIO`` times fewer.
    """
    spec = record.spec
    check_path(record.path)
    check_shape(spec.dtype, spec.shape)
    if spec.codec not in CODECS or len(spec.shape) != len(spec.chunk_shape):
        raise ValueError(record.path)
    # Chunks that reach beyond the array would be padding for the most part.
    if not all(1 <= step <= max(1, extent) for step, extent in zip(spec.chunk_shape, spec.shape, strict=True)):
        raise ValueError(record.path)
    chunk = math.prod(spec.chunk_shape) * itemsize(spec.dtype)
    if chunk > MOST_CHUNK_BYTES:
        raise ValueError(record.path)
    if not len(record.digests) == len(record.sizes) == math.prod(grid_of(spec.shape, spec.chunk_shape)):
        raise ValueError(record.path)
    if not all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in record.digests):
        raise ValueError(record.path)
    least, most = stored_sizes(spec.codec, chunk)
    if not all(type(stored) is int and least <= stored <= most for stored in record.sizes):
        raise ValueError(record.path)
    return record


def check_path(path: str) -> str:
    """Return the path of an array below its layer version; raises ValueError if it cannot be one."""
    if not all(_COMPONENT.fullmatch(part) and part != "zarr.json" for part in path.split("/")):
        raise ValueError(path)
    return path


def check_shape(dtype: str, shape: tuple[int, ...]) -> None:
    """Make sure that there can be a tensor of this shape.

    Raises:
        ValueError: of so many dimensions or bytes there is none, or none of this dtype.
    """
    if len(shape) > MOST_DIMENSIONS or math.prod(max(1, extent) for extent in shape) * itemsize(dtype) > MOST_BYTES:
        raise ValueError(shape)


def check_apart(paths: Iterable[str]) -> None:
    """Make sure that no array lies inside another.

    Raises:
        ValueError: one does: their keys would meet.
    """
    paths = set(paths)
    for path in paths:
        above = path.rpartition("/")[0]
        while above:
            if above in paths:
                raise ValueError(path)
            above = above.rpartition("/")[0]


def check_digest(digest: object) -> str:
    """Return the digest of a chunk or document; raises ValueError if it is none."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError(digest)
    return digest


def _extents(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value <= LARGEST for value in values):
        raise ValueError(values)
    return tuple(values)
