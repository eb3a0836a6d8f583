"""A fixed pseudo-random sample of a tensor's elements: the same in every process, and without reading the rest.

A tensor's elements, counted in C order, are cut into strata of 256 consecutive ones, and one of each is looked at. The
sum over strata of length × value is an unbiased estimate of the sum over all elements, the last, shorter stratum
included. Which element it is follows from the tensor's name alone by integer arithmetic, so that nothing but values
need be kept, and no random number generator is touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

import torch

STRATUM = 256
"""Elements of which one is looked at."""

WHOLE_BELOW = 4096
"""Tensors of fewer elements are looked at whole."""

_GOLDEN = -7046029254386353131
_MIXERS = ((30, -4658895280553007687), (27, -7723592293110705685))
"""Constants of splitmix64, whose 64-bit words are written here as signed ones."""


def reals(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of real numbers over the same memory; a complex element counts as two."""
    tensor = tensor.detach()
    if not tensor.is_complex():
        return tensor
    # A lazily conjugated tensor has no real view; its conjugate has, and is as large.
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def stride_of(elements: int) -> int:
    """Return how many elements a stratum of a tensor has."""
    return 1 if elements < WHOLE_BELOW else STRATUM


def samples_of(elements: int) -> int:
    """Return how many elements of a tensor are looked at."""
    return -(-elements // stride_of(elements))


def name_key(name: str, seed: int) -> int:
    """Return the 64-bit signed integer that a tensor's sample follows from."""
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where the samples of several tensors lie, one after the other."""

    index: tuple[torch.Tensor, ...]
    """Per tensor: positions in C order, int64 of shape (samples,)."""
    weight: torch.Tensor
    """How many elements each sample stands for: int64 of shape (all samples,)."""
    owner: torch.Tensor
    """Which of the tensors each sample is of: int64 of shape (all samples,)."""


def coordinates(sizes: Sequence[int], keys: Sequence[int], spans: Sequence[range], device: torch.device) -> Coordinates:
    """Return where samples lie in several tensors.

    Args:
        sizes: elements of each tensor.
        keys: what each tensor's sample follows from, see :func:`name_key`.
        spans: which of its samples are asked for: some of the numbers below ``samples_of(size)``, in a row.
        device: where the result is needed.
    """
    counts = [len(span) for span in spans]
    ends = list(accumulate(counts))
    total = ends[-1]
    # A sample's place among all, less this, is its number within its own tensor.
    ahead = [end - count - span.start for end, count, span in zip(ends, counts, spans, strict=True)]
    rows = [sizes, keys, ahead, [stride_of(size) for size in sizes], counts]
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    each = torch.arange(len(sizes), device=device)
    owner = each.repeat_interleave(table[4], output_size=total)
    size, key, start, stride = (row[owner] for row in table[:4])
    number = torch.arange(total, device=device) - start
    first = number * stride
    weight = torch.minimum(stride, size - first)
    index = first + _mixed(key + number * _GOLDEN) % weight
    return Coordinates(torch.split(index, counts), weight, owner)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Return splitmix64 of 64-bit words, as integers from 0 to 2⁶³ − 1."""
    for shift, factor in _MIXERS:
        words = (words ^ _shifted(words, shift)) * factor
    return _shifted(words ^ _shifted(words, 31), 1)


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right as if the words had no sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the elements at positions in C order, of shape (samples,); a tensor of any strides is never copied."""
    index = index.to(tensor.device)
    if tensor.element_size() == 1 and tensor.dtype != torch.uint8:
        # Eight-bit floats can be stored and converted, and little else.
        return take(tensor.view(torch.uint8), index).view(tensor.dtype)
    return tensor.view(-1).index_select(0, index) if tensor.is_contiguous() else torch.take(tensor, index)


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype that sums are made in: the widest that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def joined(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return samples one after the other on a device, in the dtype that sums are made in."""
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or any(dtype.itemsize == 1 for dtype in dtypes):
        parts = [part.to(torch.float32) if part.element_size() < 4 else part for part in parts]
    return torch.cat([part.to(device) for part in parts]).to(wide(device))
