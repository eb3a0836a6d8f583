"""This rank's part of writing a commit: exchange pieces, compare, write, seal. All ranks do it together."""

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tailorstore.domain.chunks import box_of, grid_of
from tailorstore.domain.errors import RankLostError, TailorError
from tailorstore.domain.light import LightSettings
from tailorstore.domain.names import version_prefix
from tailorstore.domain.records import ArrayRecord, ArraySpec, LayerDocument
from tailorstore.engine.commit import light_plan
from tailorstore.engine.light.bases import BaseCache
from tailorstore.engine.plan import Layout, is_comparable, plan_layer
from tailorstore.engine.publish import Head
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.outline import Whole
from tailorstore.engine.ranks.pieces import ChunkPieces, Pieces, assembled, chunks_to_write, exchange, key_of
from tailorstore.engine.ranks.plan import Round, WritePlan
from tailorstore.engine.ranks.records_json import sealed_from_json, sealed_to_json
from tailorstore.engine.tensors.capture import LayerCapture
from tailorstore.engine.tensors.memory import name_of
from tailorstore.engine.write import COPY_BUDGET_BYTES, Destination, Written, write_layers
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.layers import SealedLayer, StoredChunk, chunk_digest, object_key, seal, write_chunk
from tailorstore.storage.threads import Job, MemoryBudget, run_jobs
from tailorstore.storage.transport import Objects


@dataclass(frozen=True, slots=True)
class Task:
    """A commit that is announced and planned: what writing it needs on one rank."""

    commit_id: str
    step: int
    whole: Whole
    plan: WritePlan
    pieces: Pieces
    extra: LayerCapture | None
    """``@extra``, on the coordinator."""
    head: Head | None
    changed: frozenset[str]
    """Layers that need not be compared with what is stored: they have moved."""


@dataclass(slots=True)
class CollectiveWriter:
    """Writes one commit's layers from all ranks. Use once."""

    ranks: Ranks
    objects: Objects
    layout: Layout
    light: LightSettings
    bases: BaseCache
    task: Task
    written: Written = field(default_factory=Written)
    """What this rank put into storage; ``unchanged`` is what all ranks found so in the end."""
    handed_over: bool = False
    """Whether the coordinator may have all that it needs to publish: from then on nothing may be deleted."""
    _sizes: dict[str, int] = field(default_factory=dict)
    """Of what this rank put itself, in bytes, by key; light layers and ``@extra`` are confirmed by what writes them."""
    _records: dict[tuple[str, str, int], StoredChunk] = field(default_factory=dict)
    _digests: dict[tuple[str, str, int], str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _unchanged: set[str] = field(default_factory=set)

    def write(self) -> dict[str, SealedLayer]:
        """Write and seal everything that is due, within ``ranks.together``; returns what all ranks have sealed.

        When this returns every object of every rank is durable, and has arrived whole.

        Raises:
            TailorError: unpublished objects remain, listed in ``written``.
        """
        self._unchanged |= {name for name in self.task.plan.sealers if self._is_same_skeleton(name)}
        for one in self.task.plan.full:
            self._write_round(one)
        for one in self.task.plan.light:
            self._write_light_round(one)
        if self.task.extra is not None:
            write_layers(self._destination(), [plan_layer(self.task.extra, self.layout, None)])
        self._seal(self._all_records())
        self.objects.confirm(self._sizes)
        return self._share_sealed()

    def _is_same_skeleton(self, layer: str) -> bool:
        """Whether a layer without any array is what the branch has: no round has it."""
        return not self.task.whole.captured.layers[layer].arrays and self._comparable(layer) is not None

    def _write_round(self, one: Round) -> None:
        arrived = exchange(self.ranks, one, self.task.pieces)
        chunks = chunks_to_write(one, self.ranks.rank, arrived)
        changed = self._changed(one, chunks)
        self._put([chunk for chunk in chunks if chunk.array.layer in changed])

    def _changed(self, one: Round, chunks: Iterable[ChunkPieces]) -> set[str]:
        """Return the layers of a round that are not what the branch has: all ranks look at their chunks of them."""
        layers = dict.fromkeys(array.layer for array in one.arrays)
        known = {name: document for name in layers if (document := self._comparable(name)) is not None}
        if not known:
            return set(layers)
        differ: set[str] = set()
        for chunk in chunks:
            name = chunk.array.layer
            if name in known and name not in differ:
                digest = chunk_digest(chunk.data())
                self._digests[name, chunk.array.path, chunk.chunk.number] = digest
                if known[name].arrays[chunk.array.path].digests[chunk.chunk.number] != digest:
                    differ.add(name)
        moved = {name for found in self.ranks.gather(sorted(differ)) for name in found}
        self._unchanged |= known.keys() - moved
        return {name for name in layers if name not in known or name in moved}

    def _comparable(self, layer: str) -> LayerDocument | None:
        """Return the branch's version of a layer if that could be what is to be written."""
        head, task = self.task.head, self.task
        stored = head.documents.get(layer) if head is not None else None
        if stored is None or stored.fidelity != "full" or layer in task.changed:
            return None
        live = task.whole.captured.layers[layer]
        specs = {path: self._spec(layer, path) for path in live.arrays}
        return stored if is_comparable(stored, live, specs) else None

    def _spec(self, layer: str, path: str) -> ArraySpec:
        tensor = self.task.whole.captured.layers[layer].arrays[path]
        return self.layout.spec(tuple(tensor.shape), name_of(tensor.dtype))

    def _put(self, chunks: Iterable[ChunkPieces]) -> None:
        budget = MemoryBudget(COPY_BUDGET_BYTES)
        jobs = [self._job(chunk, budget) for chunk in sorted(chunks, key=lambda chunk: -chunk.chunk.elements)]
        run_jobs(jobs, self.objects.workers)

    def _job(self, chunk: ChunkPieces, budget: MemoryBudget) -> Job:
        array, place = chunk.array, chunk.chunk
        prefix = version_prefix(array.layer, self.task.commit_id)
        key = object_key(prefix, array.path, array.spec, place)
        padded = place.elements < place.capacity
        copies = (not chunk.is_ready) + padded + (array.spec.codec != "none") + self.objects.copies_on_put

        def job() -> None:
            with self._lock:
                self.written.keys.append(key)
            with budget.hold(copies * place.capacity * itemsize(array.spec.dtype)):
                digest = self._digests.get((array.layer, array.path, place.number))
                stored = write_chunk(self.objects, key, array.spec, place, chunk.data(), digest)
            with self._lock:
                self._sizes[key] = stored.size
                self._records[array.layer, array.path, place.number] = stored

        return job

    def _write_light_round(self, one: Round) -> None:
        arrived = exchange(self.ranks, one, self.task.pieces)
        for layer in dict.fromkeys(array.layer for array in one.arrays):
            if self.task.plan.owners[layer] == self.ranks.rank:
                self._write_light(layer, one, arrived)

    def _write_light(self, layer: str, one: Round, arrived: Pieces) -> None:
        head = self.task.head
        assert head is not None  # noqa: S101 (a layer that the branch never stored is due in full)
        arrays = {
            array.path: assembled(
                box_of(array.spec.shape),
                array.spec.dtype,
                [(piece.box, arrived[key_of(array, piece)]) for piece in array.pieces],
            )
            for array in one.arrays
            if array.layer == layer
        }
        live = self.task.whole.captured.layers[layer]
        planned = plan_layer(LayerCapture(layer, live.content, arrays), self.layout, head.documents[layer])
        planned = replace(planned, light=light_plan(head, layer, self.light))
        write_layers(self._destination(), [planned])

    def _destination(self) -> Destination:
        return Destination(self.objects, self.task.commit_id, self.task.step, self.layout, self.bases, self.written)

    def _all_records(self) -> dict[tuple[str, str, int], StoredChunk]:
        mine = [[*place, stored.digest, stored.size] for place, stored in self._records.items()]
        return {
            (layer, path, number): StoredChunk(digest, size)
            for found in self.ranks.gather(mine)
            for layer, path, number, digest, size in found
        }

    def _seal(self, records: Mapping[tuple[str, str, int], StoredChunk]) -> None:
        """Write the documents of this rank's share of the full layers."""
        task = self.task
        mine = [
            name for name, rank in task.plan.sealers.items() if rank == self.ranks.rank and name not in self._unchanged
        ]

        def job(name: str) -> Job:
            def run() -> None:
                layer = task.whole.captured.layers[name]
                arrays = {}
                for path in layer.arrays:
                    spec = self._spec(name, path)
                    count = math.prod(grid_of(spec.shape, spec.chunk_shape))
                    stored = [records[name, path, number] for number in range(count)]
                    digests, sizes = tuple(one.digest for one in stored), tuple(one.size for one in stored)
                    arrays[path] = ArrayRecord(path, spec, digests, sizes)
                document = LayerDocument(name, task.commit_id, task.step, layer.content, arrays)
                sealed = seal(self.objects, document, self.written.keys.extend)
                documents = list(sealed.sizes.items())[-len(sealed.document.documents) - 1 :]
                with self._lock:
                    self._sizes.update(documents)
                    self.written.sealed[name] = sealed

            return run

        run_jobs([job(name) for name in mine], min(self.objects.workers, max(1, len(mine))))

    def _share_sealed(self) -> dict[str, SealedLayer]:
        """Let every rank know what all have sealed or found unchanged."""
        mine = {
            "sealed": {name: sealed_to_json(sealed) for name, sealed in self.written.sealed.items()},
            "unchanged": self.written.unchanged,
        }
        everything: dict[str, SealedLayer] = {}
        unchanged = set(self._unchanged)
        for found in self._hand_over(mine):
            everything |= {name: sealed_from_json(described) for name, described in found["sealed"].items()}
            unchanged |= set(found["unchanged"])
        self.written.unchanged = sorted(unchanged)
        return everything

    def _hand_over(self, mine: Mapping[str, Any]) -> list[Any]:
        self.handed_over = True
        try:
            return self.ranks.gather(mine)
        except RankLostError:
            raise
        except TailorError:
            # Refused for all, the coordinator among them: nobody was told anything.
            self.handed_over = False
            raise
