"""Elements of tensors as NumPy arrays, for arithmetic that is the same on every machine."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailorstore.engine.tensors.memory import as_bytes, is_plain, name_of, resolved

_HALVES = (torch.bfloat16, torch.float16)
_NUMPY = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def elements_of(tensor: torch.Tensor, low: int, high: int) -> npt.NDArray[Any]:
    """Return elements ``low`` to ``high`` in C order: floats, bfloat16 as its bits in uint16, all else as bytes.

    The array shares the memory of a plain host tensor, and is a copy of any other.
    """
    if not is_plain(tensor):
        tensor = resolved(tensor).reshape(-1)[low:high].to("cpu").contiguous()
        low, high = 0, high - low
    raw = np.asarray(as_bytes(tensor))
    size = tensor.element_size()
    part: npt.NDArray[Any] = raw[low * size : high * size]
    return part.view(_NUMPY.get(name_of(tensor.dtype), np.uint8))


def tensor_of(array: npt.NDArray[Any]) -> torch.Tensor:
    """Return a tensor that shares an array's memory."""
    return torch.from_numpy(array)


def is_rounding_of(weight: torch.Tensor, master: torch.Tensor) -> bool:
    """Whether a 16-bit weight is, to the bit, what a float32 tensor of its shape is rounded to."""
    if weight.dtype not in _HALVES or master.dtype != torch.float32 or weight.shape != master.shape:
        return False
    with torch.no_grad():
        rounded = resolved(master).to(weight.dtype)
        return torch.equal(rounded.contiguous().view(torch.int16), resolved(weight).contiguous().view(torch.int16))


def any_negative(tensor: torch.Tensor) -> bool:
    """Whether any element is less than zero."""
    return bool((resolved(tensor) < 0).any())


def sample_blocks(tensor: torch.Tensor, block: int, count: int) -> npt.NDArray[np.float64]:
    """Return up to ``count`` whole blocks of elements, evenly spread; float64 of shape (blocks, block).

    A tensor of less than a block gives one, filled up with its last element.
    """
    flat = resolved(tensor).reshape(-1)
    if flat.numel() < block:
        few = flat.to("cpu", torch.float64).numpy()
        return np.concatenate([few, np.full(block - few.size, few[-1])])[None, :]
    rows = flat[: flat.numel() // block * block].view(-1, block)
    chosen = torch.linspace(0, rows.shape[0] - 1, min(count, rows.shape[0]), device=rows.device).long()
    return rows[chosen].to("cpu", torch.float64).numpy()
