"""What a commit of 405 billion parameters would ask of each of 1024 ranks: the real planning, on shapes alone.

The training state of Llama-3.1-405B is cut as FSDP and others cut it, described, planned and counted; no element of it
exists. Layers are sealed and published for real, with made-up digests.
"""

import json
import math
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailorstore.bench.cuts import LLAMA_405B_BLOCKS, SLOTS, Cut, llama_405b
from tailorstore.bench.report import Row
from tailorstore.catalog import Catalog, StoreCatalog
from tailorstore.domain.chunks import Box, chunks_of
from tailorstore.domain.holdings import Ints, holders_of, meetings_of
from tailorstore.domain.names import new_id
from tailorstore.domain.records import (
    DEFAULT_LEASE,
    EXTRA_LAYER,
    ArrayRecord,
    ArraySpec,
    CommitDraft,
    LayerDocument,
    LayerMeasures,
    LayerVersion,
)
from tailorstore.domain.spread import SpreadArray, Writers, assign, traffic_of
from tailorstore.engine.plan import Layout
from tailorstore.engine.ranks.outline import Outline, Whole, outline_of, unite
from tailorstore.engine.ranks.plan import WritePlan, plan_writing
from tailorstore.engine.tensors.capture import Capture, LayerCapture
from tailorstore.engine.tensors.memory import name_of
from tailorstore.storage.documents import CHUNK_BYTES, array_document
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.layers import chunk_digest, seal
from tailorstore.storage.objects import open_objects

CUTS = (Cut("FSDP", 1, 1024, 1), Cut("HSDP 8 × 128", 8, 128, 1), Cut("FSDP 128 × TP 8", 1, 128, 8))
RANKS_PER_HOST = 8
STEP = 1000
_VERSION_ID = "simulated"
_LAYOUT = Layout(CHUNK_BYTES, "none")


@dataclass(frozen=True, slots=True)
class PerRank:
    """One figure of every rank."""

    mean: float
    most: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """What one commit of a whole training state takes."""

    cut: Cut
    parameters: int
    nbytes: int
    arrays: int
    chunks: int
    layers: int
    """Without ``@extra``."""
    documents: int
    """That seal all the layers; with the chunks these are the commit's objects."""
    document_bytes: int
    written_bytes: PerRank
    """Of chunks."""
    host_bytes: PerRank
    """The same of hosts."""
    layer_bytes: PerRank
    """The same if all ranks waited for one another after each layer: the most is the sum of each layer's busiest."""
    puts: PerRank
    """One for each chunk, and for each document where a rank seals layers."""
    sent_bytes: PerRank
    received_bytes: PerRank
    received_pieces: PerRank
    description_bytes: int
    """What each rank tells of the boxes it holds, before anything is planned."""
    catalog_rows: int
    """That the commit adds, if all layers were measured."""
    planning_s: float
    """CPU time from all descriptions to one rank's part of the plan: that which puts most pieces together."""
    sealing_s: float
    """CPU time of the rank that seals for longest."""
    publishing_s: float
    """In SQLite."""


def rows(*, say: Callable[[str], None], cuts: Sequence[Cut] = CUTS, blocks: int = LLAMA_405B_BLOCKS) -> list[Row]:
    """Return what one core measures, and what it counts, as a table.

    Args:
        say: is told what is going on.
        cuts: the layouts.
        blocks: of the model.
    """
    found = []
    for cut in cuts:
        say(f"{cut.name}: planning a commit on {cut.ranks} ranks")
        found += _rows(simulate(cut, blocks))
    return found


def _rows(found: Simulated) -> list[Row]:
    name = f"{found.cut.name}:"
    state = f"{found.parameters / 1e9:.0f} B parameters, {found.nbytes / 1e12:.2f} TB, {found.cut.ranks} ranks"

    def compared(what: str, figure: PerRank, unit: str, scale: float, target: float | None = None) -> Row:
        row = Row(f"{name} {what}, the busiest", figure.most / scale, unit, "mean", figure.mean / scale, target)
        return row if figure.mean else Row(row.what, row.ours, unit)

    return [
        Row(f"{name} planning", found.planning_s, "s", target=2.0, note=state),
        Row(f"{name} objects", found.chunks + found.documents, "objects", note=f"{found.documents} are documents"),
        compared("written by a rank", found.written_bytes, "GB", 1e9, 1.1),
        compared("written by a host", found.host_bytes, "GB", 1e9, 1.1),
        compared("written by a rank, layer by layer", found.layer_bytes, "GB", 1e9),
        compared("puts of a rank", found.puts, "puts", 1),
        compared("sent by a rank", found.sent_bytes, "GB", 1e9),
        compared("received by a rank", found.received_bytes, "GB", 1e9),
        compared("pieces received by a rank", found.received_pieces, "pieces", 1),
        Row(f"{name} description of a rank", found.description_bytes / 1e3, "kB"),
        Row(f"{name} documents of all layers", found.document_bytes / 1e6, "MB"),
        Row(f"{name} sealing by the busiest rank", found.sealing_s, "s"),
        Row(f"{name} rows added to the catalog", found.catalog_rows, "rows", note=f"{found.layers} layers"),
        Row(f"{name} publishing in SQLite", found.publishing_s, "s"),
    ]


def simulate(cut: Cut, blocks: int = LLAMA_405B_BLOCKS) -> Simulated:
    """Plan and count a commit of everything.

    Args:
        cut: the ranks.
        blocks: of the model; fewer than all for a trial.
    """
    told = tell(cut, blocks)
    hosts = [rank // RANKS_PER_HOST for rank in range(cut.ranks)]
    start = time.process_time()
    whole = told.unite()
    uniting_s = time.process_time() - start
    layers = list(whole.captured.layers.values())
    arrays = [_spread_array(whole, layer, path) for layer in layers for path in layer.arrays]
    writers = assign(arrays, hosts)
    traffic = traffic_of(arrays, writers, hosts)
    for remembered in (meetings_of, holders_of):
        remembered.cache_clear()  # as at a first commit
    start = time.process_time()
    plan = plan_of(whole, hosts, int(traffic.received_pieces.argmax()))
    planning_s = uniting_s + time.process_time() - start
    sealed = {layer.name: _sealed(layer) for layer in layers}
    catalog_rows, publishing_s = _published([one.version for one in sealed.values()])
    sealing = _by_sealer(plan, {name: one.seconds for name, one in sealed.items()}, cut.ranks)
    documents = _by_sealer(plan, {name: one.documents for name, one in sealed.items()}, cut.ranks)
    chunks = np.bincount(np.concatenate(writers), minlength=cut.ranks)
    by_layer = _written_by_layer(layers, arrays, writers, cut.ranks)
    written = by_layer.sum(axis=0)
    return Simulated(
        cut=cut,
        parameters=sum(math.prod(array.shape) for array in arrays) // (1 + len(SLOTS)),
        nbytes=int(written.sum()),
        arrays=len(arrays),
        chunks=int(chunks.sum()),
        layers=len(layers),
        documents=int(documents.sum()),
        document_bytes=sum(one.document_bytes for one in sealed.values()),
        written_bytes=_per_rank(written),
        host_bytes=_per_rank(np.bincount(hosts, written)),
        layer_bytes=PerRank(float(written.mean()), float(by_layer.max(axis=1).sum())),
        puts=_per_rank(chunks + documents),
        sent_bytes=_per_rank(traffic.sent_bytes),
        received_bytes=_per_rank(traffic.received_bytes),
        received_pieces=_per_rank(traffic.received_pieces),
        description_bytes=told.description_bytes,
        catalog_rows=catalog_rows,
        planning_s=planning_s,
        sealing_s=float(sealing.max()),
        publishing_s=publishing_s,
    )


def _per_rank(figures: npt.NDArray[Any]) -> PerRank:
    return PerRank(float(figures.mean()), float(figures.max()))


# --- Planning


@dataclass(frozen=True, slots=True)
class Told:
    """What the ranks tell one another of what they hold."""

    captured: Capture
    """Of rank 0."""
    outline: Outline
    """Of rank 0; its structure is everybody's."""
    boxes: Sequence[list[list[Box]]]
    """Of each rank."""

    @property
    def description_bytes(self) -> int:
        """What a rank says at most, as JSON."""
        return max(len(json.dumps([self.outline.digest, boxes], separators=(",", ":"))) for boxes in self.boxes)

    def unite(self) -> Whole:
        """Return what they hold together."""
        digest = self.outline.digest
        return unite([digest] * len(self.boxes), self.boxes, {digest: self.outline.structure}, self.captured)


def tell(cut: Cut, blocks: int) -> Told:
    """Describe the model as each rank does."""
    captured = cut.capture(llama_405b(blocks), 0, STEP)
    # Blocks are cut alike: one of them tells what a rank holds of tensors of each kind.
    one_block = llama_405b(1)
    boxes = [outline_of(cut.capture(one_block, rank, STEP)).boxes for rank in range(cut.ranks)]
    return Told(captured, outline_of(captured), boxes)


def plan_of(whole: Whole, hosts: Sequence[int], rank: int) -> WritePlan:
    """Return a rank's part of writing everything in full."""
    return plan_writing(whole, dict.fromkeys(whole.captured.layers, "full"), _LAYOUT, hosts, rank)


def _spec(layer: LayerCapture, path: str) -> ArraySpec:
    tensor = layer.arrays[path]
    return _LAYOUT.spec(tuple(tensor.shape), name_of(tensor.dtype))


def _spread_array(whole: Whole, layer: LayerCapture, path: str) -> SpreadArray:
    spec = _spec(layer, path)
    holdings = whole.holdings[layer.name][path]
    return SpreadArray(path, spec.shape, spec.chunk_shape, itemsize(spec.dtype), holdings)


def _written_by_layer(
    layers: Sequence[LayerCapture], arrays: Sequence[SpreadArray], writers: Sequence[Writers], ranks: int
) -> Ints:
    """Return the bytes that each rank writes of each layer; shape (layers, ranks)."""
    written = np.zeros((len(layers), ranks), np.int64)
    of_layer = [number for number, layer in enumerate(layers) for _ in layer.arrays]
    for number, array, by_chunk in zip(of_layer, arrays, writers, strict=True):
        sizes = [chunk.elements * array.itemsize for chunk in chunks_of(array.shape, array.chunk_shape)]
        np.add.at(written[number], by_chunk, sizes)
    return written


# --- Sealing and publishing


@dataclass(frozen=True, slots=True)
class _Sealed:
    """What sealing a layer took."""

    version: LayerVersion
    documents: int
    document_bytes: int
    seconds: float


def _sealed(layer: LayerCapture) -> _Sealed:
    """Seal a layer in memory, as if its chunks had been written."""
    records = {}
    for path in layer.arrays:
        spec = _spec(layer, path)
        array_document(spec)  # a few dozen are made by Zarr once in a process: not what is measured
        chunks = list(chunks_of(spec.shape, spec.chunk_shape))
        digests = tuple(chunk_digest(memoryview(f"{path} {chunk.number}".encode())) for chunk in chunks)
        sizes = tuple(chunk.capacity * itemsize(spec.dtype) for chunk in chunks)
        records[path] = ArrayRecord(path, spec, digests, sizes)
    keys: list[str] = []
    with closing(open_objects("memory://tailorstore-bench")) as objects:
        document = LayerDocument(layer.name, _VERSION_ID, STEP, layer.content, records)
        start = time.process_time()
        sealed = seal(objects, document, keys.extend)
        seconds = time.process_time() - start
        objects.delete(list(sealed.sizes))
    chunk_bytes = sum(sum(record.sizes) for record in records.values())
    documents = sealed.version.objects - sum(len(record.sizes) for record in records.values())
    return _Sealed(sealed.version, documents, sealed.version.bytes_stored - chunk_bytes, seconds)


def _by_sealer(plan: WritePlan, figures: Mapping[str, float], ranks: int) -> npt.NDArray[np.float64]:
    """Sum up a figure of layers by the ranks that seal them."""
    summed = np.zeros(ranks)
    for name, rank in plan.sealers.items():
        summed[rank] += figures[name]
    return summed


def _published(versions: Sequence[LayerVersion]) -> tuple[int, float]:
    """Publish two commits of these layers to a new catalog; return the rows that the second added, and its time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalog.sqlite"
        with closing(Catalog.open(f"sqlite:///{path}")) as catalog:
            store = catalog.register("bench", "memory://tailorstore-bench", 1)
            _publish(store, versions, STEP)
            before = _rows_in(path)
            seconds = _publish(store, versions, 2 * STEP)
            return _rows_in(path) - before, seconds


def _publish(store: StoreCatalog, versions: Sequence[LayerVersion], step: int) -> float:
    commit_id = new_id()
    head = store.announce(commit_id, "main", step, DEFAULT_LEASE)
    draft = CommitDraft(commit_id, step, "main", head.id if head else None, None, {"loss": 1.0}, 0)
    extra = LayerVersion(EXTRA_LAYER, commit_id, step, versions[0].digest, 0, 0, 1)
    fresh = [replace(version, version_id=commit_id, step=step) for version in versions]
    measures = {version.layer: LayerMeasures(1.0, 0.5, 0.25, 0.1, 2.0) for version in versions}
    start = time.perf_counter()
    store.publish(draft, [*fresh, extra], measures)
    return time.perf_counter() - start


def _rows_in(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return sum(connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in tables)  # noqa: S608
