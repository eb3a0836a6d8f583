"""Which objects a read asked for, and which it needs: told element by element, with nothing of the engine's."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailorstore.domain.chunks import Box
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.light.sources import LightSource, Source
from tailorstore.engine.read import StoredArray
from tailorstore.storage.documents import chunk_key
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.transport import Memory
from tests.kit.light import WIDTHS


class Watched(LocalObjects):
    """A root that remembers which objects were read, and where the bytes of those went that were not decoded."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.read: list[str] = []
        self.filled: dict[str, list[range]] = {}

    def get(self, key: str, *, limit: int | None = None) -> memoryview:
        self.read.append(key)
        return super().get(key, limit=limit)

    def read_into(self, key: str, target: Memory, observe: Any = None, size: int | None = None) -> None:
        self.read.append(key)
        # Of a chunk that is wanted in part, what comes before and after goes through buffers of up to 256 KiB.
        parts = [target] if isinstance(target, memoryview) else target
        for part in parts:
            start = np.frombuffer(part, np.uint8).ctypes.data if part.nbytes else 0
            self.filled.setdefault(key, []).append(range(start, start + len(part)))
        super().read_into(key, target, observe, size)


def sources_of(checkpoint: Checkpoint) -> dict[str, Source]:
    """Return where each tensor is, slots as ``slot of parameter``."""
    contents = checkpoint._contents
    found, _ = contents.model_arrays()
    for layer, document in contents.layer_documents():
        for name, slots in document.content["optim"].items():
            arrays = {slot: value["$array"] for slot, value in slots.items() if "$array" in value}
            found |= {f"{slot} of {name}": contents.array(layer, path) for slot, path in arrays.items()}
    return found


def extents(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def taken(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in box)]


def chunks_with(array: StoredArray, box: Box) -> set[str]:
    grid = array.record.spec.chunk_shape
    if not math.prod(extents(box)):
        return set()
    ranges = [np.arange(start, stop) // step for (start, stop), step in zip(box, grid, strict=True)]
    every = np.stack([axis.reshape(-1) for axis in np.meshgrid(*ranges, indexing="ij")], axis=1) if ranges else [()]
    folder = f"{array.prefix}{array.record.path}/"
    return {folder + chunk_key(array.record.spec, tuple(map(int, at))) for at in every}


def codes_with(source: LightSource, box: Box) -> set[str]:
    """Return the objects of codes, scales and exact bytes for all blocks from that of a box's first element on."""
    tensor, arrays = source.tensor, source.arrays
    numbers = taken(torch.arange(tensor.elements).reshape(tensor.shape), box)
    if not numbers.numel():
        return set()
    first, last = int(numbers.min()), int(numbers.max())
    if tensor.coding == "exact":
        size = torch.zeros((), dtype=getattr(torch, tensor.dtype)).element_size()
        span = tensor.codes_at + first * size, tensor.codes_at + (last + 1) * size
        return chunks_with(arrays["@light/exact"], (span,))
    first, last = first // source.block, last // source.block
    codes, words = source.block * WIDTHS[tensor.bits] // 8, 2 if tensor.coding in ("ratio", "log") else 1
    held = (tensor.codes_at + first * codes, tensor.codes_at + (last + 1) * codes)
    scaled = (tensor.scales_at + first * words, tensor.scales_at + (last + 1) * words)
    return chunks_with(arrays["@light/codes"], (held,)) | chunks_with(arrays["@light/scales"], (scaled,))


def objects_with(source: Source, box: Box) -> set[str]:
    if isinstance(source, StoredArray):
        return chunks_with(source, box)
    if source.master is not None:
        return objects_with(source.master, box)
    return codes_with(source, box) | (chunks_with(source.base, box) if source.base is not None else set())
