"""Reading layers: documents, tensors, parts of tensors. Every chunk is checked against its digest."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tailorstore.domain.chunks import Box, Chunk, chunks_in, chunks_of
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
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.layers import load_document, object_key, read_chunk
from tailorstore.storage.threads import Job, MemoryBudget, run_jobs
from tailorstore.storage.transport import Objects

COPY_BUDGET_BYTES = 160 << 20


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
    spec = array.record.spec
    whole = tuple((0, extent) for extent in spec.shape)
    if box is None or box == whole:
        target = empty_host(spec.shape, spec.dtype)
        read_arrays(objects, [(array, target)])
        return target
    target = empty_host(tuple(stop - start for start, stop in box), spec.dtype)

    def job(chunk: Chunk) -> Job:
        def read() -> None:
            part = _read_part(objects, array, chunk)
            meet = [
                (max(start, low), min(stop, high)) for (start, stop), (low, high) in zip(chunk.box, box, strict=True)
            ]
            to = tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(meet, box, strict=True))
            of = tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(meet, chunk.box, strict=True))
            copy_into(target[to], part[of])

        return read

    jobs = [job(chunk) for chunk in chunks_in(box, spec.shape, spec.chunk_shape)]
    run_jobs(jobs, min(objects.workers, len(jobs)))
    return target


def read_arrays(objects: Objects, pairs: Iterable[tuple[StoredArray, Tensor]]) -> None:
    """Fill tensors from arrays of the same shapes, in parallel, straight into their memory where that is possible.

    Raises:
        MissingObjectError, DigestMismatchError: some tensors may be overwritten wholly or in part.
    """
    pairs = list(pairs)
    wait_for_devices(target for _, target in pairs)
    jobs = array_jobs(objects, pairs)
    run_jobs(jobs, min(objects.workers, len(jobs)))


def array_jobs(objects: Objects, pairs: Iterable[tuple[StoredArray, Tensor]]) -> list[Job]:
    """Return the jobs that fill tensors from arrays, large chunks first; see :func:`read_arrays`.

    The caller has waited for the devices that the tensors are on.
    """
    budget = MemoryBudget(COPY_BUDGET_BYTES)
    sized: list[tuple[int, Job]] = []
    for array, target in pairs:
        direct = is_plain(target) and name_of(target.dtype) == array.record.spec.dtype
        memory = as_bytes(target) if direct else None
        size = itemsize(array.record.spec.dtype)
        for chunk in chunks_of(array.record.spec.shape, array.record.spec.chunk_shape):
            job = (
                _direct_job(objects, array, chunk, memory)
                if memory is not None
                else _copy_job(objects, array, chunk, target, budget)
            )
            sized.append((chunk.elements * size, job))
    sized.sort(key=lambda item: -item[0])
    return [job for _, job in sized]


def _direct_job(objects: Objects, array: StoredArray, chunk: Chunk, memory: memoryview) -> Job:
    def read() -> None:
        size = itemsize(array.record.spec.dtype)
        part = memory[chunk.offset * size : (chunk.offset + chunk.elements) * size]
        read_chunk(objects, array.key(chunk), array.record, chunk, part, array.where)

    return read


def _copy_job(objects: Objects, array: StoredArray, chunk: Chunk, target: Tensor, budget: MemoryBudget) -> Job:
    def read() -> None:
        with budget.hold(chunk.capacity * itemsize(array.record.spec.dtype)):
            part = _read_part(objects, array, chunk)
            copy_into(target[chunk.slices] if chunk.slices else target, part)

    return read


def _read_part(objects: Objects, array: StoredArray, chunk: Chunk) -> Tensor:
    part = empty_host(tuple(stop - start for start, stop in chunk.box), array.record.spec.dtype)
    read_chunk(objects, array.key(chunk), array.record, chunk, as_bytes(part), array.where)
    return part
