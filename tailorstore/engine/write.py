"""Writing layers: compare with what is stored, write what differs, seal it. Many threads, bounded memory.

Each chunk goes straight from the tensor's memory to storage and is hashed as it passes. A layer that could be equal
to its stored version is compared first, chunk by chunk, until one differs; what was hashed by then is not hashed again.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from tailorstore.domain.chunks import Chunk, chunks_of
from tailorstore.domain.names import version_prefix
from tailorstore.domain.records import ArrayRecord, LayerDocument
from tailorstore.engine.plan import PlannedLayer
from tailorstore.engine.tensors.memory import chunk_bytes, is_plain
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.layers import (
    SealedLayer,
    StoredChunk,
    chunk_digest,
    object_key,
    seal,
    write_chunk,
)
from tailorstore.storage.threads import Job, MemoryBudget, run_jobs
from tailorstore.storage.transport import Objects

COPY_BUDGET_BYTES = 160 << 20
"""Host memory that copies of chunks may take at once: tensors that are not plain host memory, codecs, remote puts."""


@dataclass(slots=True)
class Written:
    """What a commit put into storage, so far; grows while it is being written."""

    sealed: dict[str, SealedLayer] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Every key that was or was about to be put, for cleaning up."""


def write_layers(
    objects: Objects, version_id: str, step: int, layers: Iterable[PlannedLayer], written: Written
) -> None:
    """Write and seal layers; when this returns every object of theirs is durable.

    Args:
        objects: the root.
        version_id: of all versions written.
        step: their source step.
        layers: what to write.
        written: filled as layers are sealed; after an error it says what may have been left behind.

    Raises:
        StorageUnavailableError, StorageFullError, AccessDeniedError: unpublished objects remain, listed in ``written``.
    """
    budget = MemoryBudget(COPY_BUDGET_BYTES)
    writers = [_LayerWriter(objects, version_id, step, layer, written, budget) for layer in layers]
    jobs: list[Job] = [writer.compare for writer in writers if writer.planned.known is not None]
    # Large chunks first, so that no thread is left with one at the end.
    direct = [job for writer in writers if writer.planned.known is None for job in writer.start()]
    direct.sort(key=lambda sized: -sized[0])
    run_jobs([*jobs, *(job for _, job in direct)], objects.workers)
    # Once for all layers: they share directories, and a journal takes many flushes in one go.
    objects.sync([key for sealed in written.sealed.values() for key in sealed.keys])


class _LayerWriter:
    """Writes one layer; its jobs may run on any threads."""

    def __init__(
        self,
        objects: Objects,
        version_id: str,
        step: int,
        planned: PlannedLayer,
        written: Written,
        budget: MemoryBudget,
    ) -> None:
        self.planned = planned
        self._objects = objects
        self._version_id = version_id
        self._step = step
        self._written = written
        self._budget = budget
        self._prefix = version_prefix(planned.capture.name, version_id)
        self._stored: dict[tuple[str, int], StoredChunk] = {}
        self._digests: dict[tuple[str, int], str] = {}
        self._left = 0
        self._lock = threading.Lock()

    def compare(self) -> Iterable[Job] | None:
        """Hash chunks until one differs from the stored version; return the jobs that write the layer if one does."""
        known = self.planned.known
        for path, chunk in sorted(self._chunks(), key=lambda item: item[1].elements):
            with self._held(path, chunk):
                digest = chunk_digest(chunk_bytes(self.planned.capture.arrays[path], chunk))
            self._digests[path, chunk.number] = digest
            if known is None or known.arrays[path].digests[chunk.number] != digest:
                return [job for _, job in self.start()]
        self._written.unchanged.append(self.planned.capture.name)
        return None

    def start(self) -> list[tuple[int, Job]]:
        """Return (bytes, job) for every chunk; the last to end seals the layer."""
        chunks = list(self._chunks())
        self._left = len(chunks)
        if not chunks:
            return [(0, self._seal)]
        return [
            (chunk.elements * itemsize(self.planned.specs[path].dtype), self._chunk_job(path, chunk))
            for path, chunk in chunks
        ]

    def _chunks(self) -> Iterator[tuple[str, Chunk]]:
        for path, spec in self.planned.specs.items():
            for chunk in chunks_of(spec.shape, spec.chunk_shape):
                yield path, chunk

    def _chunk_job(self, path: str, chunk: Chunk) -> Job:
        def job() -> None:
            spec = self.planned.specs[path]
            key = object_key(self._prefix, path, spec, chunk)
            self._written.keys.append(key)
            with self._held(path, chunk):
                data = chunk_bytes(self.planned.capture.arrays[path], chunk)
                digest = self._digests.get((path, chunk.number))
                self._stored[path, chunk.number] = write_chunk(self._objects, key, spec, chunk, data, digest)
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._seal()

        return job

    def _held(self, path: str, chunk: Chunk) -> AbstractContextManager[None]:
        spec = self.planned.specs[path]
        plain = is_plain(self.planned.capture.arrays[path])
        padded = chunk.elements < chunk.capacity
        copies = (not plain) + padded + (spec.codec != "none") + self._objects.copies_on_put
        return self._budget.hold(copies * chunk.capacity * itemsize(spec.dtype))

    def _seal(self) -> None:
        name = self.planned.capture.name
        document = LayerDocument(
            layer=name,
            version_id=self._version_id,
            step=self._step,
            content=self.planned.capture.content,
            arrays=self._records(),
        )
        sealed = seal(self._objects, document)
        self._written.keys.extend(sealed.keys)
        self._written.sealed[name] = sealed

    def _records(self) -> Mapping[str, ArrayRecord]:
        records = {}
        for path, spec in self.planned.specs.items():
            stored = [self._stored[path, chunk.number] for chunk in chunks_of(spec.shape, spec.chunk_shape)]
            records[path] = ArrayRecord(
                path, spec, tuple(chunk.digest for chunk in stored), tuple(chunk.size for chunk in stored)
            )
        return records
