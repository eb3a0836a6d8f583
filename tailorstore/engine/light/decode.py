"""Reading light versions: the base's elements straight into place, then the coded difference on top."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tailorstore.domain.chunks import Box, box_of, chunks_in, meet, within
from tailorstore.engine.light.proof import check_held
from tailorstore.engine.light.sources import LightSource, Source
from tailorstore.engine.read import StoredArray, Target, array_jobs, held_of, read_array
from tailorstore.engine.tensors.memory import (
    Tensor,
    as_bytes,
    copy_into,
    empty_host,
    is_plain,
    name_of,
    wait_for_devices,
)
from tailorstore.engine.tensors.shards import Part, Sharded
from tailorstore.storage import quantise
from tailorstore.storage.documents import choose_chunks
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.light import CODES, EXACT, LOGARITHMIC, SCALES
from tailorstore.storage.threads import Job, in_turn, run_jobs
from tailorstore.storage.transport import Objects

_PIECE = 16 * quantise.SLICE
"""Elements that one job decodes."""
_AT_ONCE = quantise.SLICE // 2
"""Elements decoded at once: some are float64 in between, and larger arrays than those of a slice cost page faults."""


def read_tensors(objects: Objects, pairs: Iterable[tuple[Source, Target]]) -> None:
    """Fill tensors from stored ones of the same shapes, in parallel, straight into their memory where possible.

    Of a tensor that is here in parts only these are read: the chunks that they meet, each of them once.

    Raises:
        MissingObjectError, DigestMismatchError, CorruptDocumentError: some tensors may be overwritten in part.
        InvalidInputError: as ``engine.tensors.shards.sharded``; nothing was changed.
    """
    held = [(source, held_of(target, f"layer {source.version.layer!r}")) for source, target in pairs]
    wait_for_devices(part.tensor for _, target in held for part in target.parts)
    run_jobs(_jobs(objects, held), objects.workers)


def read_tensor(objects: Objects, source: Source, box: Box | None = None) -> Tensor:
    """Read a tensor, or the box of it that is asked for, into a new host tensor; fetches only the chunks it needs.

    Raises:
        MissingObjectError, DigestMismatchError, CorruptDocumentError: nothing is returned.
    """
    box = box_of(source.shape) if box is None else box
    check_held(objects, [source], math.prod(_extents(box)) * itemsize(source.dtype))
    if isinstance(source, StoredArray):
        return read_array(objects, source, box)
    target = empty_host(_extents(box), source.dtype)
    read_tensors(objects, [(source, Sharded(source.shape, target.dtype, (Part(box, target),)))])
    return target


def _jobs(objects: Objects, pairs: Sequence[tuple[Source, Sharded]]) -> Iterator[Job]:
    """Yield the jobs that fill tensors. Keeps none: with the last job of a light version its codes are forgotten."""
    yield from array_jobs(objects, [(source, target) for source, target in pairs if isinstance(source, StoredArray)])
    by_layer: dict[tuple[str, str], list[tuple[LightSource, Part]]] = defaultdict(list)
    for source, target in pairs:
        if isinstance(source, LightSource):
            parts = [(source, part) for part in target.parts if part.tensor.numel()]
            by_layer[source.version.layer, source.version.version_id] += parts
    for members in by_layer.values():
        if members:
            yield from _layer_jobs(objects, members)


def _layer_jobs(objects: Objects, members: Sequence[tuple[LightSource, Part]]) -> list[Job]:
    """Return the jobs that read and decode parts of some tensors of one light version."""
    ends: list[Job] = []
    coded = {(source.path, part.box) for source, part in members if source.master is None}
    decoded: dict[tuple[str, Box], tuple[LightSource, Part]] = {}
    for source, part in members:
        master = source.master or source
        key = master.path, part.box
        if source is not master:
            if key not in coded and key not in decoded:
                decoded[key] = master, Part(part.box, empty_host(_extents(part.box), master.dtype))
        elif key in decoded:
            # Tied when it was committed, and not in what is restored.
            ends.append(_copy_job(part.tensor, decoded[key][1].tensor))
        else:
            buffer = part.tensor if _in_place(source, part.tensor) else empty_host(_extents(part.box), source.dtype)
            if buffer is not part.tensor:
                ends.append(_copy_job(part.tensor, buffer))
            decoded[key] = source, Part(part.box, buffer)
    for source, part in members:
        if source.master is not None:
            ends.append(_round_job(part.tensor, source.dtype, decoded[source.master.path, part.box][1].tensor))
    pieces = [piece for source, part in decoded.values() for piece in _pieces_of(source, part)]
    held, reads = _codes_of(pieces)
    decodes = [_decode_job(piece, held) for piece in pieces]

    def decode() -> Iterable[Job]:
        return in_turn(decodes, lambda: ends) if ends else decodes

    return in_turn(array_jobs(objects, [*reads, *_bases_of(decoded.values())]), decode)


def _in_place(source: LightSource, target: Tensor) -> bool:
    return is_plain(target) and name_of(target.dtype) == source.dtype


def _copy_job(target: Tensor, buffer: Tensor) -> Job:
    return lambda: copy_into(target, buffer)


def _round_job(target: Tensor, dtype: str, master: Tensor) -> Job:
    def job() -> None:
        rounded = empty_host(tuple(master.shape), dtype)
        rounded.copy_(master)
        copy_into(target, rounded)

    return job


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """What one job decodes: some elements of a tensor's part."""

    source: LightSource
    target: Tensor
    """The elements, in host memory; hold the base's until they are decoded."""
    strides: tuple[int, ...]
    """How far apart they are in the tensor, by dimension of ``target``."""
    first: int
    """Which element of the tensor the first of them is."""
    low: int
    """First element of the blocks in which they lie: codes can be taken apart at blocks only."""
    high: int
    """Past the last element of these blocks."""


def _pieces_of(source: LightSource, part: Part) -> Iterator[_Piece]:
    """Cut a part, of a plain tensor, into pieces."""
    tensor, align = source.tensor, source.block if source.tensor.coding != "exact" else 1
    shape, box, target = tensor.shape, part.box, part.tensor.detach()
    grid = choose_chunks(shape, 1, _PIECE)
    first, stop = _run(shape, box)
    if stop - first == target.numel():
        # One run of the tensor's memory, of whatever shape: cut at blocks, all but its ends are decoded in place.
        shape, box, target, grid = (tensor.elements,), ((first, stop),), target.reshape(-1), (_PIECE,)
    for cut in chunks_in(box, shape, grid):
        shared = meet(cut.box, box)
        assert shared is not None  # noqa: S101 (the cut is one that meets the box)
        first, stop = _run(shape, shared)
        low, high = first // align * align, min(tensor.elements, -(-stop // align) * align)
        yield _Piece(source, target[within(shared, box)], _strides(shape), first, low, high)


def _codes_of(pieces: Iterable[_Piece]) -> tuple[dict[str, Tensor], list[tuple[StoredArray, Sharded]]]:
    """Return memory for a light version's arrays, and what of them some pieces need, to be read into it.

    As much memory as the arrays have, of which no more than what is read is ever touched.
    """
    needed: dict[str, list[tuple[int, int]]] = defaultdict(list)
    arrays: dict[str, StoredArray] = {}
    for piece in pieces:
        arrays = arrays or piece.source.arrays
        for path in arrays:
            needed[path].append(_span(piece.source, path, piece.low, piece.high))
    held = {path: empty_host(array.shape, array.dtype) for path, array in arrays.items()}
    reads = []
    for path, array in arrays.items():
        parts = tuple(Part(((low, high),), held[path][low:high]) for low, high in _joined(needed[path]))
        reads.append((array, Sharded(array.shape, held[path].dtype, parts)))
    return held, reads


def _bases_of(decoded: Iterable[tuple[LightSource, Part]]) -> list[tuple[StoredArray, Sharded]]:
    """Return what of the base is to be read into the parts of tensors that are differences to it."""
    found: dict[str, tuple[StoredArray, list[Part]]] = {}
    for source, part in decoded:
        if source.base is not None:
            found.setdefault(source.path, (source.base, []))[1].append(part)
    return [(base, Sharded(base.shape, parts[0].tensor.dtype, tuple(parts))) for base, parts in found.values()]


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans in order, those that touch joined, empty ones left out.

    Examples:
        >>> _joined([(4, 6), (0, 2), (9, 9), (1, 4)])
        [(0, 6)]
    """
    found: list[tuple[int, int]] = []
    for low, high in sorted(span for span in spans if span[0] < span[1]):
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return found


def _decode_job(piece: _Piece, held: Mapping[str, Tensor]) -> Job:
    def run() -> None:
        source, target = piece.source, piece.target
        parts = {
            path: _words(tensor, path)[slice(*_span(source, path, piece.low, piece.high))]
            for path, tensor in held.items()
        }
        if target.is_contiguous() and target.numel() == piece.high - piece.low:
            _decode(source, parts, _flat(target))
            return
        # Elements that share blocks with others which are not asked for.
        blocks = empty_host((piece.high - piece.low,), source.dtype)
        inside = blocks.as_strided(target.shape, piece.strides, piece.first - piece.low)
        if source.base is not None:
            blocks.zero_()
            inside.copy_(target)
        _decode(source, parts, _flat(blocks))
        target.copy_(inside)

    return run


def _extents(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _run(shape: tuple[int, ...], box: Box) -> tuple[int, int]:
    """Return the first of a box's elements in a tensor's C order, and the one after the last.

    Examples:
        >>> _run((4, 6), ((1, 3), (0, 6))), _run((4, 6), ((1, 3), (2, 4)))
        ((6, 18), (8, 16))
    """
    strides = _strides(shape)
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    last = sum((stop - 1) * stride for (_, stop), stride in zip(box, strides, strict=True))
    return first, last + 1


def _words(tensor: Tensor, path: str) -> np.ndarray[Any, Any]:
    """Return what was read of one of a light version's arrays as NumPy sees it."""
    return np.frombuffer(as_bytes(tensor), np.uint16 if path == SCALES else np.uint8)


def _span(source: LightSource, path: str, low: int, high: int) -> tuple[int, int]:
    """Return which part of an array elements ``low`` to ``high`` of a tensor take; ``low`` at a block's beginning."""
    tensor, block = source.tensor, source.block
    if (tensor.coding == "exact") != (path == EXACT):
        return 0, 0
    if path == SCALES:
        logarithmic = tensor.coding in LOGARITHMIC
        begin, end = (quantise.scale_words(n, block, logarithmic=logarithmic) for n in (low, high))
        return tensor.scales_at + begin, tensor.scales_at + end
    if path == EXACT:
        size = itemsize(tensor.dtype)
        return tensor.codes_at + low * size, tensor.codes_at + high * size
    begin, end = (quantise.packed_bytes(n, tensor.bits, block) for n in (low, high))
    return tensor.codes_at + begin, tensor.codes_at + end


def _flat(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a plain tensor's elements as NumPy sees them; bfloat16 as its bits."""
    raw = np.frombuffer(as_bytes(tensor), np.uint8)
    dtypes = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32, "float64": np.float64}
    return raw.view(dtypes.get(name_of(tensor.dtype), np.uint8))


def _decode(source: LightSource, parts: Mapping[str, np.ndarray[Any, Any]], out: np.ndarray[Any, Any]) -> None:
    """Decode elements in place of the base's, where these are needed.

    Args:
        source: whose elements they are.
        parts: what just these elements take of the version's arrays.
        out: the elements, as :func:`_flat` gives them; filled. The first is a block's first.
    """
    tensor, block = source.tensor, source.block
    if tensor.coding == "exact":
        out.view(np.uint8)[:] = parts[EXACT]
        return
    logarithmic = tensor.coding in LOGARITHMIC
    for begin in range(0, out.size, _AT_ONCE):
        count = min(_AT_ONCE, out.size - begin)
        codes_at = quantise.packed_bytes(begin, tensor.bits, block)
        words_at = quantise.scale_words(begin, block, logarithmic=logarithmic)
        codes = parts[CODES][codes_at : codes_at + quantise.packed_bytes(count, tensor.bits, block)]
        words = parts[SCALES][words_at : words_at + quantise.scale_words(count, block, logarithmic=logarithmic)]
        target = out[begin : begin + count]
        base = quantise.widened(target, tensor.dtype) if source.base is not None else None
        wide: quantise.FloatArray = np.empty(count, np.float64 if tensor.dtype == "float64" else np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            if logarithmic:
                quantise.decode_log(codes, words, tensor.bits, block, base, tensor.dtype, wide)
            else:
                quantise.decode_linear(codes, words, tensor.bits, block, base, wide)
        quantise.narrowed(wide, tensor.dtype, target)
