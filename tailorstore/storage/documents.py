"""Zarr's metadata documents, and where the chunks of an array lie.

zarr-python writes them, once for every distinct layout: creating an array takes it a millisecond, and a model of
hundreds of tensors has a few dozen layouts.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tailorstore.domain.chunks import grid_of
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.records import ArraySpec
from tailorstore.storage import codecs
from tailorstore.storage.dtypes import data_type, zarr_data_type

if TYPE_CHECKING:
    from zarr.abc.buffer import Buffer

DOCUMENT = "zarr.json"
CHUNK_BYTES = 32 << 20

_SEPARATOR = "."
"""Between the parts of a chunk key. Zarr's usual ``/`` would make one directory more for every dimension: on a local
disk twice as many inodes in all, writing small arrays takes 1.3 times as long, listing and deleting them twice."""


def array_document(spec: ArraySpec) -> bytes:
    """Return the ``zarr.json`` of an array.

    Its fill value is zero, which no reader should ever see: chunks are always written.

    Raises:
        InvalidInputError: a dtype that cannot be stored, or chunks that do not fit the shape.
        CorruptDocumentError: an unknown codec.
    """
    return _array_document(spec)[0]


def array_metadata(spec: ArraySpec) -> dict[str, Any]:
    """Return the same document as JSON data of the caller's own.

    Raises:
        InvalidInputError, CorruptDocumentError: as for :func:`array_document`.
    """
    found: dict[str, Any] = json.loads(_array_document(spec)[0])
    return found


def group_document(
    attributes: Mapping[str, Any],
    consolidated: Mapping[str, ArraySpec],
    groups: Mapping[str, Mapping[str, Any]] | None = None,
) -> bytes:
    """Return the ``zarr.json`` of a group.

    Args:
        attributes: of the group; JSON data.
        consolidated: every array below the group by its path, so that a reader need not ask for each of them. The
            groups in between are added. Without arrays the document has no consolidated metadata.
        groups: attributes of groups below, by their paths; others have none.

    Raises:
        InvalidInputError, CorruptDocumentError: as for :func:`array_document`.
    """
    document: dict[str, Any] = {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}
    if not consolidated:
        return _json(document)
    # Documents of arrays are put in as text: a large model has thousands of equal ones, and parsing and writing each
    # again would take longer than all the rest of sealing a layer.
    members = dict.fromkeys(groups_above(consolidated), group_document({}, {}))
    members |= {path: group_document(about, {}) for path, about in (groups or {}).items()}
    members |= {path: _array_document(spec)[1] for path, spec in consolidated.items()}
    entries = b",".join(_json(path) + b":" + members[path] for path in sorted(members))
    prelude = b'{"kind":"inline","must_understand":false,"metadata":{'
    return _json(document)[:-1] + b',"consolidated_metadata":' + prelude + entries + b"}}}"


def groups_above(paths: Mapping[str, Any]) -> list[str]:
    """Return the groups between the root and these paths, sorted."""
    found: set[str] = set()
    for path in paths:
        above = path.rpartition("/")[0]
        while above and above not in found:
            found.add(above)
            above = above.rpartition("/")[0]
    return sorted(found)


def chunk_key(spec: ArraySpec, index: tuple[int, ...]) -> str:
    """Return the key of a chunk below its array.

    Examples:
        >>> chunk_key(ArraySpec("float32", (4, 4), (2, 4)), (1, 0)), chunk_key(ArraySpec("int8", (), ()), ())
        ('c.1.0', 'c')
    """
    trailing = (0,) * len(data_type(spec.dtype).trailing)
    return _SEPARATOR.join(("c", *map(str, index + trailing)))


def chunk_grid(spec: ArraySpec) -> tuple[int, ...]:
    """Return how many chunks an array has along each dimension of the tensor."""
    return grid_of(spec.shape, spec.chunk_shape)


def choose_chunks(shape: tuple[int, ...], itemsize: int, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """Return a chunk shape of at most ``limit`` bytes such that every chunk is one run of a contiguous tensor's memory.

    The shape is cut along the first dimension; where one row is too large, rows are cut along the next, and so on.
    A number of rows that divides the shape is preferred, if it makes no more than half as many chunks again: then no
    chunk needs padding.

    Raises:
        InvalidInputError: a limit that does not hold one element.

    Examples:
        >>> choose_chunks((50257, 768), 4), choose_chunks((4096, 4096), 2), choose_chunks((), 4)
        ((10052, 768), (4096, 4096), ())
    """
    if limit < itemsize:
        msg = f"chunks of {limit} bytes cannot hold an element of {itemsize}"
        raise InvalidInputError(msg)
    chunk = [max(1, extent) for extent in shape]
    for dimension, extent in enumerate(chunk):
        inner = math.prod(chunk[dimension + 1 :]) * itemsize
        if extent * inner <= limit:
            break
        chunk[dimension] = _cut(extent, max(1, limit // inner))
        if inner <= limit:
            break
    return tuple(chunk)


def _cut(extent: int, most: int) -> int:
    """Return how many of ``extent`` go into one chunk, at most ``most``."""
    fewest = -(-extent // most)
    for count in range(fewest, fewest + fewest // 2 + 1):
        if extent % count == 0:
            return extent // count
    # As even as can be, so that little is padded.
    return -(-extent // fewest)


@lru_cache(maxsize=4096)
def _array_document(spec: ArraySpec) -> tuple[bytes, bytes]:
    """Return the document as zarr-python writes it, and on one line."""
    import zarr
    from zarr.storage import MemoryStore

    described = data_type(spec.dtype)
    if len(spec.shape) != len(spec.chunk_shape) or any(extent < 1 for extent in spec.chunk_shape):
        msg = f"chunks of shape {spec.chunk_shape} do not fit an array of shape {spec.shape}"
        raise InvalidInputError(msg)
    # A dictionary of our own, so that reading the document needs no event loop: there may be one running already.
    written: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(written),
        shape=(*spec.shape, *described.trailing),
        chunks=(*spec.chunk_shape, *described.trailing),
        dtype=zarr_data_type(spec.dtype),
        filters=None,
        compressors=codecs.zarr_compressors(spec.codec, described.numpy.itemsize) or None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": _SEPARATOR},
        zarr_format=3,
    )
    document = written[DOCUMENT].to_bytes()
    return document, _json(json.loads(document))


def _json(value: Any) -> bytes:  # noqa: ANN401 - JSON data
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
