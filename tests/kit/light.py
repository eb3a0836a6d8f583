"""What a light version means, told from its definition in DESIGN.md, in float64 and with nothing of the engine's."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import zarr

Floats = npt.NDArray[np.float64]

WIDTHS = {2: 2, 3: 4, 4: 4, 8: 8}
"""Bits that a code takes, by bits per element."""


def codes_of(packed: npt.NDArray[np.uint8], bits: int, block: int) -> npt.NDArray[np.int64]:
    """Return the codes of whole blocks, of shape (blocks, block).

    A byte holds ``8 / width`` codes, the first in its lowest bits, that lie a part of the block apart.
    """
    width = WIDTHS[bits]
    share = 8 // width
    rows = packed.reshape(-1, block // share).astype(np.int64)
    return np.concatenate([rows >> (at * width) & ((1 << width) - 1) for at in range(share)], axis=1)


def scales_of(words: npt.NDArray[np.uint16]) -> Floats:
    """Return the numbers whose bfloat16 bits these are."""
    return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def linear(packed: npt.NDArray[np.uint8], words: npt.NDArray[np.uint16], bits: int, block: int) -> Floats:
    """Return scale × code of every element of whole blocks."""
    levels = 2 ** (bits - 1) - 1
    return ((codes_of(packed, bits, block) - levels) * scales_of(words)[:, None]).reshape(-1)


def logarithmic(packed: npt.NDArray[np.uint8], words: npt.NDArray[np.uint16], bits: int, block: int) -> Floats:
    """Return the power of two of every element of whole blocks; zero where its code says so."""
    codes = codes_of(packed, bits, block)
    offsets, steps = words[0::2].copy().view(np.int16), words[1::2].astype(np.int64)
    octaves = offsets[:, None] / 64 + (codes - 1) * (steps[:, None] / 1024)
    return np.where(codes == 0, 0.0, np.exp2(octaves)).reshape(-1)


class StoredLight:
    """A light version and its base as zarr-python alone reads them."""

    def __init__(self, folder: Path, base: Path) -> None:
        light, full = zarr.open_group(str(folder), mode="r"), zarr.open_group(str(base), mode="r")
        described: Any = light.attrs["tailorstore"]
        assert (described["fidelity"], described["base"]) == ("light", base.name)
        self.block: int = described["light"]["block"]
        self.table: dict[str, list[Any]] = described["light"]["tensors"]
        self._arrays = {name: array[...] for name, array in light["@light"].arrays()}  # type: ignore[union-attr]
        self._base = full

    def tensor(self, path: str) -> npt.NDArray[Any]:
        """Return a tensor as its definition has it: in its own dtype, rounded once or, of 16 bits, twice."""
        dtype, shape, coding, bits, codes_at, scales_at, of, _ = self.table[path]
        kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
        count = int(np.prod(shape, dtype=np.int64))
        if coding == "exact":
            raw = self._arrays["exact"][codes_at : codes_at + count * kind.itemsize]
            return raw.view(kind).reshape(shape)
        if coding == "rounded":
            return self.tensor(of).astype(kind)
        blocks = -(-count // self.block)
        packed = self._arrays["codes"][codes_at : codes_at + blocks * self.block * WIDTHS[bits] // 8]
        words = self._arrays["scales"][scales_at:]
        if coding in ("difference", "value"):
            values = linear(packed, words[:blocks], bits, self.block)[:count]
        else:
            values = logarithmic(packed, words[: 2 * blocks], bits, self.block)[:count]
        if coding in ("difference", "ratio"):
            base = np.asarray(self._base[path][...]).astype(np.float64).reshape(-1)  # type: ignore[index]
            values = base + values if coding == "difference" else np.where(base > 0, base, 1.0) * values
        wide = values if dtype == "float64" else values.astype(np.float32)
        return wide.astype(kind).reshape(shape)
