"""Reading light versions: the base's elements straight into place, then the coded difference on top."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tailorstore.domain.chunks import Box
from tailorstore.engine.light.sources import LightSource, Source
from tailorstore.engine.read import StoredArray, array_jobs, read_array
from tailorstore.engine.tensors.memory import (
    Tensor,
    as_bytes,
    copy_into,
    empty_host,
    is_plain,
    name_of,
    wait_for_devices,
)
from tailorstore.storage import quantise
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.light import CODES, EXACT, LOGARITHMIC, SCALES
from tailorstore.storage.threads import Job, in_turn, run_jobs
from tailorstore.storage.transport import Objects

_PIECE = 16 * quantise.SLICE
"""Elements that one job decodes."""
_AT_ONCE = quantise.SLICE // 2
"""Elements decoded at once: some are float64 in between, and larger arrays than those of a slice cost page faults."""


def read_tensors(objects: Objects, pairs: Iterable[tuple[Source, Tensor]]) -> None:
    """Fill tensors from stored ones of the same shapes, in parallel, straight into their memory where possible.

    Raises:
        MissingObjectError, DigestMismatchError, CorruptDocumentError: some tensors may be overwritten in part.
    """
    pairs = list(pairs)
    wait_for_devices(target for _, target in pairs)
    jobs = array_jobs(objects, [(source, target) for source, target in pairs if isinstance(source, StoredArray)])
    by_layer: dict[tuple[str, str], list[tuple[LightSource, Tensor]]] = defaultdict(list)
    for source, target in pairs:
        if isinstance(source, LightSource):
            by_layer[source.version.layer, source.version.version_id].append((source, target))
    for members in by_layer.values():
        jobs += _layer_jobs(objects, members)
    run_jobs(jobs, objects.workers)


def read_tensor(objects: Objects, source: Source, box: Box | None = None) -> Tensor:
    """Read a tensor, or the box of it that is asked for, into a new host tensor; fetches only the chunks it needs.

    Raises:
        MissingObjectError, DigestMismatchError, CorruptDocumentError: nothing is returned.
    """
    if isinstance(source, StoredArray):
        return read_array(objects, source, box)
    shape = source.shape
    if not shape or math.prod(shape) == 0:
        target = empty_host(shape, source.dtype)
        read_tensors(objects, [(source, target)])
        return target
    box = box or tuple((0, extent) for extent in shape)
    # Not the whole layer's codes, of which this may be a small part.
    first, stop = box[0]
    rows = _read_rows(objects, source, first, stop)
    return rows[(slice(None), *(slice(low, high) for low, high in box[1:]))].contiguous()


def _read_rows(objects: Objects, source: LightSource, first: int, stop: int) -> Tensor:
    """Read rows ``first`` to ``stop`` along the first dimension."""
    if source.master is not None:
        rounded = empty_host((stop - first, *source.shape[1:]), source.dtype)
        rounded.copy_(_read_rows(objects, source.master, first, stop))
        return rounded
    tensor, block = source.tensor, source.block
    width = math.prod(tensor.shape[1:])
    # Codes can be taken apart at blocks only, elements of the base at rows only.
    align = block if tensor.coding != "exact" else 1
    low = first * width // align * align
    high = min(tensor.elements, -(-stop * width // align) * align)
    parts = {
        path: _words(read_array(objects, array, (_span(source, path, low, high),)), path)
        for path, array in source.arrays.items()
    }
    out = empty_host((high - low,), tensor.dtype)
    if source.base is not None and high > low:
        base_first, base_stop = low // width, -(-high // width)
        box = ((base_first, base_stop), *((0, extent) for extent in tensor.shape[1:]))
        base = read_array(objects, source.base, box).reshape(-1)[low - base_first * width : high - base_first * width]
        out.copy_(base)
    _decode(source, parts, _flat(out), 0, high - low)
    rows = out[first * width - low : stop * width - low]
    return rows.reshape((stop - first, *tensor.shape[1:]))


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


def _layer_jobs(objects: Objects, members: Sequence[tuple[LightSource, Tensor]]) -> list[Job]:
    """Return the jobs that read and decode some tensors of one light version."""
    arrays = members[0][0].arrays
    held = {path: empty_host(array.record.spec.shape, array.record.spec.dtype) for path, array in arrays.items()}
    reads = [(array, held[path]) for path, array in arrays.items()]
    decodes: list[Job] = []
    ends: list[Job] = []
    coded = {source.path for source, _ in members if source.master is None}
    masters: dict[str, tuple[LightSource, Tensor]] = {}
    for source, target in members:
        if source.path in masters and source.master is None:
            # Tied when it was committed, and not in what is restored.
            ends.append(_copy_job(target, masters[source.path][1]))
        elif source.master is None:
            buffer = target if _in_place(source, target) else empty_host(source.shape, source.dtype)
            if buffer is not target:
                ends.append(_copy_job(target, buffer))
            masters[source.path] = (source, buffer)
        elif source.master.path not in coded and source.master.path not in masters:
            masters[source.master.path] = (source.master, empty_host(source.shape, source.master.dtype))
    for source, target in members:
        if source.master is not None:
            ends.append(_round_job(target, source.dtype, masters[source.master.path][1]))
    for source, buffer in masters.values():
        if source.base is not None:
            reads.append((source.base, buffer))
        decodes += _decode_jobs(source, held, buffer)

    def decode() -> Iterable[Job]:
        return in_turn(decodes, lambda: ends) if ends else decodes

    return in_turn(array_jobs(objects, reads), decode)


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


def _decode_jobs(source: LightSource, held: Mapping[str, Tensor], buffer: Tensor) -> list[Job]:
    def job(low: int, high: int) -> Job:
        def run() -> None:
            parts = {
                path: _words(tensor, path)[slice(*_span(source, path, low, high))] for path, tensor in held.items()
            }
            _decode(source, parts, _flat(buffer), low, high)

        return run

    count = source.tensor.elements
    return [job(low, min(low + _PIECE, count)) for low in range(0, count, _PIECE)]


def _flat(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a plain tensor's elements as NumPy sees them; bfloat16 as its bits."""
    raw = np.frombuffer(as_bytes(tensor), np.uint8)
    dtypes = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32, "float64": np.float64}
    return raw.view(dtypes.get(name_of(tensor.dtype), np.uint8))


def _decode(
    source: LightSource, parts: Mapping[str, np.ndarray[Any, Any]], out: np.ndarray[Any, Any], low: int, high: int
) -> None:
    """Decode elements ``low`` to ``high`` of ``out``, which holds the base's elements where they are needed.

    Args:
        source: whose elements they are.
        parts: what just these elements take of the version's arrays.
        out: elements of the tensor (as :func:`_flat` gives them), from the one that ``low`` counts from.
        low: at a block's beginning.
        high: past the last.
    """
    tensor, block = source.tensor, source.block
    if tensor.coding == "exact":
        size = itemsize(tensor.dtype)
        raw = out.view(np.uint8)
        raw[low * size : high * size] = parts[EXACT]
        return
    logarithmic = tensor.coding in LOGARITHMIC
    for begin in range(0, high - low, _AT_ONCE):
        count = min(_AT_ONCE, high - low - begin)
        codes_at = quantise.packed_bytes(begin, tensor.bits, block)
        words_at = quantise.scale_words(begin, block, logarithmic=logarithmic)
        codes = parts[CODES][codes_at : codes_at + quantise.packed_bytes(count, tensor.bits, block)]
        words = parts[SCALES][words_at : words_at + quantise.scale_words(count, block, logarithmic=logarithmic)]
        target = out[low + begin : low + begin + count]
        base = quantise.widened(target, tensor.dtype) if source.base is not None else None
        wide: quantise.FloatArray = np.empty(count, np.float64 if tensor.dtype == "float64" else np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            if logarithmic:
                quantise.decode_log(codes, words, tensor.bits, block, base, tensor.dtype, wide)
            else:
                quantise.decode_linear(codes, words, tensor.bits, block, base, wide)
        quantise.narrowed(wide, tensor.dtype, target)
