"""Reading layers: documents, tensors, parts of tensors. Every chunk is checked against its digest."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tailorstore.domain.chunks import Box, Chunk, box_of, chunks_in, meet, within
from tailorstore.domain.names import version_prefix
from tailorstore.domain.records import ArrayRecord, LayerDocument, LayerVersion
from tailorstore.engine.tensors.memory import (
    Tensor,
    as_bytes,
    copy_into,
    empty_host,
    is_plain,
    name_of,
    wait_for_devices,
)
from tailorstore.engine.tensors.shards import Part, Sharded, sharded
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.layers import load_document, object_key, read_chunk
from tailorstore.storage.threads import Job, MemoryBudget, run_jobs
from tailorstore.storage.transport import Objects

COPY_BUDGET_BYTES = 160 << 20

_SCRATCH_BYTES = 256 << 10
_scratch = threading.local()

Target: TypeAlias = Tensor | Sharded
"""What may be filled: a plain tensor, the local part of a ``DTensor``, or the parts of a tensor that are here."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of one layer version: all that reading it needs."""

    version: LayerVersion
    record: ArrayRecord

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.record.spec.shape

    @property
    def dtype(self) -> str:
        """Name of its dtype."""
        return self.record.spec.dtype

    @property
    def digests(self) -> tuple[str, ...]:
        """Of its chunks."""
        return self.record.digests

    @property
    def prefix(self) -> str:
        """Key prefix of the layer version."""
        return version_prefix(self.version.layer, self.version.version_id)

    def key(self, chunk: Chunk) -> str:
        """Key of a chunk's object."""
        return object_key(self.prefix, self.record.path, self.record.spec, chunk)

    def where(self) -> str:
        """Name the array, for messages."""
        return f"layer {self.version.layer!r} of step {self.version.step}, array {self.record.path!r}"


def load_documents(
    objects: Objects, versions: Iterable[LayerVersion], known: Mapping[str, LayerDocument] | None = None
) -> dict[str, LayerDocument]:
    """Read the documents of some layer versions at once.

    Args:
        objects: the root.
        versions: of different layers.
        known: documents that need not be read again, by layer; used where the version is the same.

    Returns:
        Layer → document, in the order of ``versions``.

    Raises:
        MissingObjectError, CorruptDocumentError, FormatTooNewError: as ``storage.layers.load_document``.
    """
    versions = list(versions)
    found: dict[str, LayerDocument] = {}
    for version in versions:
        document = known.get(version.layer) if known else None
        if document is not None and document.version_id == version.version_id:
            found[version.layer] = document

    def job(version: LayerVersion) -> Job:
        def read() -> None:
            found[version.layer] = load_document(objects, version)

        return read

    missing = [version for version in versions if version.layer not in found]
    if missing:
        run_jobs([job(version) for version in missing], min(objects.workers, len(missing)))
    return {version.layer: found[version.layer] for version in versions}


def read_array(objects: Objects, array: StoredArray, box: Box | None = None) -> Tensor:
    """Read an array, or the box of it that is asked for, into a new host tensor; fetches only the chunks it needs.

    Raises:
        MissingObjectError, DigestMismatchError: as ``storage.layers.read_chunk``.
    """
    box = box_of(array.shape) if box is None else box
    target = empty_host(tuple(stop - start for start, stop in box), array.dtype)
    read_arrays(objects, [(array, Sharded(array.shape, target.dtype, (Part(box, target),)))])
    return target


def read_arrays(objects: Objects, pairs: Iterable[tuple[StoredArray, Target]]) -> None:
    """Fill tensors from arrays of the same shapes, in parallel, straight into their memory where that is possible.

    Raises:
        MissingObjectError, DigestMismatchError: some tensors may be overwritten wholly or in part.
    """
    held = [(array, held_of(target, array.where())) for array, target in pairs]
    wait_for_devices(part.tensor for _, target in held for part in target.parts)
    jobs = array_jobs(objects, held)
    run_jobs(jobs, min(objects.workers, len(jobs)))


def held_of(target: Target, owner: str) -> Sharded:
    """Return what this process holds of a target.

    Raises:
        InvalidInputError: as ``engine.tensors.shards.sharded``.
    """
    return target if isinstance(target, Sharded) else sharded(target, owner)


def array_jobs(objects: Objects, pairs: Iterable[tuple[StoredArray, Target]]) -> list[Job]:
    """Return the jobs that fill tensors from arrays, large chunks first; see :func:`read_arrays`.

    A chunk is read once, however many parts of its target it meets; not at all, if it meets none. The caller has
    waited for the devices that the tensors are on.
    """
    budget = MemoryBudget(COPY_BUDGET_BYTES)
    sized: list[tuple[int, Job]] = []
    for array, target in pairs:
        size = itemsize(array.dtype)
        for chunk, parts in _meetings(array, held_of(target, array.where()).parts):
            sized.append((chunk.elements * size, _job(objects, array, chunk, parts, budget)))
    sized.sort(key=lambda item: -item[0])
    return [job for _, job in sized]


def _meetings(array: StoredArray, parts: Sequence[Part]) -> Iterable[tuple[Chunk, Sequence[Part]]]:
    """Return the chunks that some parts of a tensor need, each with those parts."""
    shape, grid = array.shape, array.record.spec.chunk_shape
    if len(parts) == 1:
        return ((chunk, parts) for chunk in chunks_in(parts[0].box, shape, grid))
    found: dict[int, tuple[Chunk, list[Part]]] = {}
    for part in parts:
        for chunk in chunks_in(part.box, shape, grid):
            found.setdefault(chunk.number, (chunk, []))[1].append(part)
    return found.values()


def _job(objects: Objects, array: StoredArray, chunk: Chunk, parts: Sequence[Part], budget: MemoryBudget) -> Job:
    def read() -> None:
        memory = _memory(array, chunk, parts[0]) if len(parts) == 1 else None
        if memory is not None:
            read_chunk(objects, array.key(chunk), array.record, chunk, memory, array.where)
            return
        with budget.hold(chunk.capacity * itemsize(array.dtype)):
            held = empty_host(tuple(stop - start for start, stop in chunk.box), array.dtype)
            read_chunk(objects, array.key(chunk), array.record, chunk, as_bytes(held), array.where)
            for part in parts:
                shared = meet(chunk.box, part.box)
                assert shared is not None  # noqa: S101 (the chunk is one that meets the part)
                copy_into(part.tensor[within(shared, part.box)], held[within(shared, chunk.box)])

    return read


def _memory(array: StoredArray, chunk: Chunk, part: Part) -> list[memoryview] | None:
    """Return the memory that a chunk's elements are to fill, if those that are wanted follow each other here and there.

    What comes before and after them in the chunk is only hashed, and goes where it is overwritten at once.
    """
    if name_of(part.tensor.dtype) != array.dtype:
        return None
    if chunk.box == part.box:
        return [as_bytes(part.tensor)] if is_plain(part.tensor) else None
    shared = meet(chunk.box, part.box)
    assert shared is not None  # noqa: S101 (the chunk is one that meets the part)
    cut = chunk.cut
    target = part.tensor[within(shared, part.box)]
    if shared[cut + 1 :] != chunk.box[cut + 1 :] or not is_plain(target):
        return None
    row = chunk.elements // (chunk.box[cut][1] - chunk.box[cut][0]) * itemsize(array.dtype)
    before, after = (shared[cut][0] - chunk.box[cut][0]) * row, (chunk.box[cut][1] - shared[cut][1]) * row
    return [*nowhere(before), as_bytes(target), *nowhere(after)]


def nowhere(count: int) -> list[memoryview]:
    """Return so many bytes of memory that nobody looks at; the same over and over."""
    if not hasattr(_scratch, "block"):
        _scratch.block = memoryview(bytearray(_SCRATCH_BYTES))
    whole, rest = divmod(count, _SCRATCH_BYTES)
    block: memoryview = _scratch.block
    return [*[block] * whole, *([block[:rest]] if rest else [])]
