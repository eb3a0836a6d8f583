"""Coding on the device that a tensor is on: what leaves it is a tenth of what a full copy would be.

The same codes as ``storage.quantise`` gives, which says what they mean; with two or three bits a block's scale may
differ in its last place, as devices add up a block in another order.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tailorstore.engine.tensors.memory import resolved
from tailorstore.storage import quantise

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class DeviceCodes:
    """A piece of a tensor, coded; on the host."""

    codes: npt.NDArray[np.uint8]
    words: npt.NDArray[np.uint16]
    squared_error: float
    squared_norm: float


def codes_on_device(tensor: torch.Tensor) -> bool:
    """Whether a tensor is coded where it is rather than on the host."""
    return tensor.is_cuda and tensor.dtype in _DTYPES


@torch.no_grad()
def encode_on_device(
    tensor: torch.Tensor,
    base: torch.Tensor | None,
    low: int,
    high: int,
    bits: int,
    block: int,
    *,
    logarithmic: bool,
) -> DeviceCodes:
    """Code elements ``low`` to ``high`` of a tensor, in C order.

    Args:
        tensor: float32, bfloat16 or float16, on any device.
        base: of the same shape and dtype, on the host; ``None`` to code values.
        low: at a block's beginning.
        high: past the last.
        bits: a member of ``domain.light.BITS``.
        block: elements that share a scale.
        logarithmic: for elements that are never negative; see ``storage.quantise``.

    Returns:
        Codes, words and sums as ``quantise.encode_linear`` and ``encode_log`` give them. The device is waited for.
    """
    x = _piece(tensor, low, high, tensor.device)
    of = None if base is None else _piece(base, low, high, tensor.device)
    encode = _encode_log if logarithmic else _encode_linear
    u, words, sums = encode(x, of, bits, block, tensor.dtype)
    # One transfer each: codes, words, sums.
    squared_error, squared_norm = sums.cpu().tolist()
    return DeviceCodes(
        _packed(u, bits, block).cpu().numpy(),
        words.to(torch.int16).cpu().numpy().view(np.uint16),
        squared_error,
        squared_norm,
    )


def _piece(tensor: torch.Tensor, low: int, high: int, device: torch.device) -> torch.Tensor:
    return resolved(tensor).reshape(-1)[low:high].to(device, non_blocking=True).float()


def _padded(x: torch.Tensor, block: int) -> torch.Tensor:
    missing = -x.numel() % block
    return torch.cat([x, x[-1:].expand(missing)]) if missing else x


def _encode_linear(
    x: torch.Tensor, base: torch.Tensor | None, bits: int, block: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = _padded(x if base is None else x - base, block).view(-1, block)
    levels = (1 << (bits - 1)) - 1
    peaks = rows.abs().amax(dim=1)
    clip = quantise.clip_of(bits)
    if clip is not None:
        peaks = torch.minimum(peaks, clip * rows.double().square().mean(dim=1).sqrt().float())
    words = ((peaks * float(np.float32(1 / levels))).view(torch.int32) + 0xFFFF) >> 16
    scales = (words << 16).view(torch.float32)[:, None]
    t = rows / torch.where(scales > 0, scales, 1.0) + (levels + 0.5)
    if clip is not None:
        t = t.clamp(0, 2 * levels + 0.5)
    u = t.to(torch.uint8)
    decoded = ((u.float() - levels) * scales).view(-1)[: x.numel()]
    rounded = (decoded if base is None else base + decoded).to(dtype).float()
    return u, words, torch.stack([_square(x - rounded), _square(x)])


def _encode_log(
    x: torch.Tensor, base: torch.Tensor | None, bits: int, block: int, _dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = _padded(x, block).double()
    logs = values.log2()
    if base is not None:
        of = _padded(base, block).double()
        logs = logs - torch.where(of > 0, of, 1.0).log2()
    rows = (logs * quantise.FRACTION).view(-1, block)
    zero = (values == 0).view(-1, block)
    last = (1 << bits) - 2
    low = torch.where(zero, torch.inf, rows).amin(dim=1)
    high = torch.where(zero, -torch.inf, rows).amax(dim=1)
    nothing = zero.all(dim=1)
    low, high = low.masked_fill(nothing, 0), high.masked_fill(nothing, 0)
    offsets = (low / quantise.OFFSET_STEP).floor()
    starts = offsets * quantise.OFFSET_STEP
    steps = ((high - starts) / last).ceil()
    fits = (offsets.min() >= -32768) & (steps.max() <= 65535) & (high.max() <= 500 * quantise.FRACTION)
    rows = (rows - starts[:, None]).masked_fill(zero, 0)
    q = (rows / steps.clamp(min=1)[:, None]).round()
    errors = (rows - q * steps[:, None]).view(-1)[: x.numel()] * (math.log(2) / quantise.FRACTION)
    u = (q.to(torch.uint8) + 1).masked_fill(zero, 0)
    words = torch.stack([offsets, steps], dim=1).long().view(-1)
    error = torch.where(fits, _square(errors), torch.inf)
    return u, words, torch.stack([error, torch.full_like(error, x.numel())])


def _square(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().sum()


def _packed(u: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    rows = u.view(-1, block)
    width = quantise.packed_bytes(block, bits, block)
    packed = rows[:, :width].clone()
    for at in range(1, block // width):
        packed |= rows[:, at * width : (at + 1) * width] << (at * 8 * width // block)
    return packed.reshape(-1)
