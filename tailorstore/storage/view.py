"""A composite as one Zarr hierarchy: documents made here, chunks read from the layer versions where they lie."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import xxhash
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from tailorstore.domain.chunks import Box, Chunk, chunks_in, chunks_of, grid_of
from tailorstore.domain.errors import DigestMismatchError, MissingObjectError
from tailorstore.domain.records import ArrayRecord, ArraySpec, LayerDocument
from tailorstore.storage import codecs
from tailorstore.storage.documents import (
    DOCUMENT,
    array_document,
    choose_chunks,
    chunk_key,
    group_document,
    groups_above,
)
from tailorstore.storage.dtypes import itemsize, register
from tailorstore.storage.transport import get_exactly

if TYPE_CHECKING:
    from zarr.abc.buffer import Buffer
    from zarr.core.buffer import BufferPrototype

    from tailorstore.storage.transport import Objects


@dataclass(frozen=True, slots=True)
class ViewedLayer:
    """One layer of a composite."""

    prefix: str
    """Of its version's keys, ending in ``/``."""
    document: LayerDocument
    decode: Callable[[str, Box], memoryview] | None = None
    """For a light version: gives the elements of a tensor (array path, box), decoded, in C order."""


Layers = Mapping[str, ViewedLayer]
"""By path component of the layer."""


def composite_group(objects: "Objects", attributes: Mapping[str, Any], layers: Layers) -> zarr.Group:
    """Return a read-only group with a subgroup for every layer. Reads no objects yet.

    Reading a chunk whose object is gone, of another size or not what was written raises ``MissingObjectError`` or
    ``DigestMismatchError``, where Zarr by itself would give fill values or damaged numbers.

    Args:
        objects: the root; it must stay open as long as the group is used.
        attributes: of the group; JSON data.
        layers: what the composite refers to.
    """
    register()
    return zarr.open_group(CompositeStore(objects, attributes, layers), mode="r", zarr_format=3)


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of the composite, and how to come by its chunks."""

    layer: str
    version_id: str
    spec: ArraySpec
    read: Callable[[Chunk], memoryview] = field(compare=False)


class CompositeStore(Store):
    """A Zarr store that holds nothing: keys of a composite are answered from the layer versions it refers to."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, objects: "Objects", attributes: Mapping[str, Any], layers: Layers) -> None:
        """Lay out the hierarchy; see :func:`composite_group` for the arguments."""
        super().__init__(read_only=True)
        self._objects = objects
        self._arrays = {
            f"{component}/{path}": array
            for component, layer in layers.items()
            for path, array in self._arrays_of(layer).items()
        }
        self._documents = self._make_documents(attributes, layers)

    def _arrays_of(self, layer: ViewedLayer) -> dict[str, _Array]:
        document = layer.document
        about = (document.layer, document.version_id)
        if document.light is None or layer.decode is None:
            return {
                path: _Array(*about, record.spec, partial(self._read, document.layer, f"{layer.prefix}{path}", record))
                for path, record in document.arrays.items()
            }
        specs = {
            path: ArraySpec(tensor.dtype, tensor.shape, choose_chunks(tensor.shape, itemsize(tensor.dtype)))
            for path, tensor in document.light.tensors.items()
        }
        return {
            path: _Array(*about, spec, partial(_decoded, spec, partial(layer.decode, path)))
            for path, spec in specs.items()
        }

    def _make_documents(self, attributes: Mapping[str, Any], layers: Layers) -> dict[str, bytes]:
        specs = {path: array.spec for path, array in self._arrays.items()}
        documents = {f"{path}/{DOCUMENT}": array_document(spec) for path, spec in specs.items()}
        plain = group_document({}, {})
        documents |= {f"{path}/{DOCUMENT}": plain for path in groups_above(specs)}
        about = {
            component: {
                "layer": layer.document.layer,
                "version": layer.document.version_id,
                "step": layer.document.step,
                "fidelity": layer.document.fidelity,
            }
            for component, layer in layers.items()
        }
        documents |= {f"{path}/{DOCUMENT}": group_document(held, {}) for path, held in about.items()}
        documents[DOCUMENT] = group_document(attributes, specs, about)
        return documents

    def __eq__(self, other: object) -> bool:
        """Tell whether both show the same arrays of the same root."""
        return (
            isinstance(other, CompositeStore)
            and self._objects.url == other._objects.url
            and self._documents == other._documents
            and self._arrays == other._arrays
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Name the root."""
        return f"CompositeStore({self._objects.url!r})"

    async def get(
        self, key: str, prototype: "BufferPrototype", byte_range: ByteRequest | None = None
    ) -> "Buffer | None":
        """Return a document or chunk; ``None`` for a key that no document mentions.

        Raises:
            MissingObjectError, DigestMismatchError: the chunk is gone or damaged.
        """
        content: bytes | memoryview | None = self._documents.get(key)
        if content is None:
            located = self._locate(key)
            if located is None:
                return None
            # Transports block, and this is the event loop that other chunks are waiting on.
            array, chunk = located
            content = await asyncio.to_thread(array.read, chunk)
        return prototype.buffer.from_bytes(_part(content, byte_range))

    async def get_partial_values(
        self, prototype: "BufferPrototype", key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> "list[Buffer | None]":
        """Return several parts; see :meth:`get`."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Tell whether a document mentions the key; storage is not asked."""
        return key in self._documents or self._locate(key) is not None

    async def set(self, key: str, value: "Buffer") -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        self._refuse()

    async def delete(self, key: str) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        self._refuse()

    async def list(self) -> AsyncIterator[str]:
        """Yield every key."""
        for key in self._keys():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield every key that begins with ``prefix``."""
        for key in self._keys():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below ``prefix``."""
        below = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        names = {key[len(below) :].partition("/")[0] for key in self._keys() if key.startswith(below)}
        for name in sorted(names):
            yield name

    def _keys(self) -> Iterable[str]:
        yield from self._documents
        for path, array in self._arrays.items():
            spec = array.spec
            for chunk in chunks_of(spec.shape, spec.chunk_shape):
                yield f"{path}/{chunk_key(spec, chunk.index)}"

    def _locate(self, key: str) -> tuple[_Array, Chunk] | None:
        path, _, name = key.rpartition("/")
        array = self._arrays.get(path)
        if array is None:
            return None
        chunk = _parse_chunk(array.spec, name)
        return None if chunk is None else (array, chunk)

    def _read(self, layer: str, prefix: str, record: ArrayRecord, chunk: Chunk) -> memoryview:
        spec = record.spec
        key = f"{prefix}/{chunk_key(spec, chunk.index)}"
        size = record.sizes[chunk.number]
        try:
            stored = get_exactly(self._objects, key, size)
            elements = stored
            if spec.codec != "none":
                elements = memoryview(bytearray(chunk.capacity * itemsize(spec.dtype)))
                codecs.decode(spec.codec, itemsize(spec.dtype), stored, elements)
        except (MissingObjectError, DigestMismatchError) as error:
            msg = f"layer {layer!r}, array {record.path}: {error}"
            raise type(error)(msg) from error
        written = elements[: chunk.elements * itemsize(spec.dtype)]
        if xxhash.xxh3_128(written).hexdigest() != record.digests[chunk.number]:
            msg = (
                f"layer {layer!r}, array {record.path}: object {key} in {self._objects.url} is not what "
                "was written (its digest differs); run 'tailorstore verify'"
            )
            raise DigestMismatchError(msg)
        return stored

    def _refuse(self) -> NoReturn:
        msg = f"the composite in {self._objects.url} is a view and cannot be written to; commit to the store instead"
        raise ValueError(msg)


def _decoded(spec: ArraySpec, decode: Callable[[Box], memoryview], chunk: Chunk) -> memoryview:
    """Return a chunk of a light version's tensor as Zarr expects it, edges padded."""
    elements = decode(chunk.box)
    padding = (chunk.capacity - chunk.elements) * itemsize(spec.dtype)
    return memoryview(b"".join((elements, bytes(padding)))) if padding else elements


def _parse_chunk(spec: ArraySpec, name: str) -> Chunk | None:
    """Return the chunk that a key's last component names, if the array has it."""
    parts = name.split(".")
    if parts[0] != "c" or not all(part.isascii() and part.isdecimal() for part in parts[1:]):
        return None
    grid = grid_of(spec.shape, spec.chunk_shape)
    index = tuple(map(int, parts[1:]))[: len(grid)]
    if len(index) != len(grid) or name != chunk_key(spec, index):
        return None
    if any(at >= count for at, count in zip(index, grid, strict=True)):
        return None
    box = tuple(
        (at * step, min((at + 1) * step, extent))
        for at, step, extent in zip(index, spec.chunk_shape, spec.shape, strict=True)
    )
    return next(chunks_in(box, spec.shape, spec.chunk_shape))


def _part(content: bytes | memoryview, byte_range: ByteRequest | None) -> bytes | memoryview:
    if isinstance(byte_range, RangeByteRequest):
        return content[byte_range.start : byte_range.end]
    if isinstance(byte_range, OffsetByteRequest):
        return content[byte_range.offset :]
    if isinstance(byte_range, SuffixByteRequest):
        return content[max(0, len(content) - byte_range.suffix) :]
    return content
