"""Writing layers: compare with what is stored, write what differs, seal it. Many threads, bounded memory.

Each chunk goes straight from the tensor's memory to storage and is hashed as it passes. A layer that could be equal
to its stored version is compared first, chunk by chunk, until one differs; what was hashed by then is not hashed again.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from tailorstore.domain.chunks import Chunk, chunks_of
from tailorstore.domain.names import version_prefix
from tailorstore.domain.records import ArrayRecord, LayerDocument
from tailorstore.engine.light.bases import BaseCache
from tailorstore.engine.light.encode import EncodedLayer
from tailorstore.engine.light.lighten import lightening_jobs
from tailorstore.engine.light.planning import plan_light
from tailorstore.engine.plan import Layout, PlannedLayer
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

_FIRST = 1 << 62


@dataclass(slots=True)
class Written:
    """What a commit put into storage, so far; grows while it is being written."""

    sealed: dict[str, SealedLayer] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Every key that was or was about to be put, for cleaning up."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a commit's layers go."""

    objects: Objects
    version_id: str
    """Of all versions written."""
    step: int
    """Their source step."""
    layout: Layout
    bases: BaseCache
    written: Written
    """Filled as layers are sealed; after an error it says what may have been left behind."""


def write_layers(destination: Destination, layers: Iterable[PlannedLayer]) -> None:
    """Write and seal layers; when this returns every object of theirs is durable, and has arrived whole.

    Raises:
        StorageUnavailableError, StorageFullError, AccessDeniedError: unpublished objects remain, listed in ``written``.
    """
    objects, written = destination.objects, destination.written
    before = set(written.sealed)
    budget = MemoryBudget(COPY_BUDGET_BYTES)
    sized = [job for layer in layers for job in _LayerWriter(destination, layer, budget).start()]
    # Large chunks first, so that no thread is left with one at the end.
    sized.sort(key=lambda job: -job[0])
    run_jobs([job for _, job in sized], objects.workers)
    # Once for all layers: they share directories, and a journal takes many flushes in one go.
    fresh = [sealed.sizes for name, sealed in written.sealed.items() if name not in before]
    objects.confirm({key: size for sizes in fresh for key, size in sizes.items()})


class _LayerWriter:
    """Writes one layer; its jobs may run on any threads."""

    def __init__(
        self,
        destination: Destination,
        planned: PlannedLayer,
        budget: MemoryBudget,
    ) -> None:
        self.planned = planned
        self._to = destination
        self._objects = destination.objects
        self._written = destination.written
        self._budget = budget
        self._prefix = version_prefix(planned.capture.name, destination.version_id)
        self._stored: dict[tuple[str, int], StoredChunk] = {}
        self._digests: dict[tuple[str, int], str] = {}
        self._left = 0
        self._lock = threading.Lock()

    def start(self) -> list[tuple[int, Job]]:
        """Return (bytes, job) for everything that can be done at once; jobs return those that follow."""
        # What may turn out unchanged, and what has to be coded first, comes before what can be put as it is.
        return [(_FIRST, self._compare)] if self.planned.known is not None else self._go_on()

    def _go_on(self) -> list[tuple[int, Job]]:
        """Return the jobs for a layer that is known to have changed."""
        plan = self.planned.light
        if plan is None or self.planned.encoded is not None:
            return self._chunk_jobs()
        jobs = lightening_jobs(self._objects, self.planned.capture, plan, self._to.bases, self._write_light)
        return [(_FIRST, job) for job in jobs]

    def _write_light(self, encoded: EncodedLayer) -> Iterable[Job]:
        """Return the jobs that write a coded layer, or find that the branch has it."""
        assert self.planned.light is not None  # noqa: S101 (it was coded by that plan)
        planned = plan_light(encoded, self.planned.light, self._to.layout)
        writer = _LayerWriter(self._to, planned, self._budget)
        return [job for _, job in writer.start()]

    def _compare(self) -> Iterable[Job] | None:
        """Hash chunks until one differs from the stored version; return the jobs that write the layer if one does."""
        known = self.planned.known
        for path, chunk in sorted(self._chunks(), key=lambda item: item[1].elements):
            with self._held(path, chunk):
                digest = chunk_digest(chunk_bytes(self.planned.capture.arrays[path], chunk))
            self._digests[path, chunk.number] = digest
            if known is None or known.arrays[path].digests[chunk.number] != digest:
                return [job for _, job in self._go_on()]
        self._written.unchanged.append(self.planned.capture.name)
        return None

    def _chunk_jobs(self) -> list[tuple[int, Job]]:
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
            version_id=self._to.version_id,
            step=self._to.step,
            content=self.planned.capture.content,
            arrays=self._records(),
        )
        encoded, plan = self.planned.encoded, self.planned.light
        if encoded is not None and plan is not None:
            document = replace(
                document,
                fidelity="light",
                base_id=plan.base.version_id,
                light=encoded.table,
                error=encoded.error,
            )
        sealed = seal(self._objects, document, self._written.keys.extend)
        self._written.sealed[name] = sealed

    def _records(self) -> Mapping[str, ArrayRecord]:
        records = {}
        for path, spec in self.planned.specs.items():
            stored = [self._stored[path, chunk.number] for chunk in chunks_of(spec.shape, spec.chunk_shape)]
            records[path] = ArrayRecord(
                path, spec, tuple(chunk.digest for chunk in stored), tuple(chunk.size for chunk in stored)
            )
        return records
