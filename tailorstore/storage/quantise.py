"""The arithmetic of light versions: blocks of elements as small codes with a scale a block. Pure NumPy, no I/O.

Linear codes are for weights and signed moments: an element is ``scale × code``, with codes between -L and L and
L = 2^(bits-1) - 1. Logarithmic codes are for second moments, of which the logarithm matters (an update divides by their
root): an element is a power of two, and a small one never becomes zero; zero has a code of its own. Linear codes would
round small second moments to zero, and the updates that divide by them would explode (arXiv 2309.01507).

All arithmetic is on slices that fit a core's cache. Decoding uses nothing but additions and multiplications of IEEE
numbers, integers and one table, so every machine restores the same bits.
"""

from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]

SLICE = 1 << 16
"""Elements worked on at once; a multiple of every block size."""

_WIDTH = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
"""Bits that a code takes before entropy coding. Those of 3, 5 and 6 bits take 4 and 8: whole codes in a byte
compress to their entropy, codes that straddle bytes do not."""

_CLIP = {2: 1.5, 3: 3.0}
"""With few levels, where the scale ends, in root mean squares of the block: it errs less than the greatest element."""

FRACTION = 1024
"""Steps to an octave of logarithmic codes."""
OFFSET_STEP = 16
"""Steps to a unit of a block's offset, which then fits 16 bits."""
_SMALLEST, _LARGEST = 2.0**-120, 2.0**120


def _powers() -> npt.NDArray[np.float64]:
    """Return the powers of two for an octave, correctly rounded: mathematics libraries differ in the last bit."""
    with localcontext(prec=50):
        power, root = Decimal(1), Decimal(2) ** (1 / Decimal(FRACTION))
        found = []
        for _ in range(FRACTION):
            found.append(float(power))
            power *= root
    return np.array(found)


_POWERS = _powers()

_LIMITS = {
    "float64": (float(np.finfo(np.float64).smallest_subnormal), float(np.finfo(np.float64).max)),
    "float32": (2.0**-149, float(np.finfo(np.float32).max)),
    "bfloat16": (2.0**-133, (2 - 2.0**-7) * 2.0**127),
    "float16": (2.0**-24, 65504.0),
}
"""The least and the greatest positive number of a dtype."""

_COARSE = 1e-20
"""Sums of float32 squares below this have lost some to underflow."""
_LOST = 1e-280
"""The same for float64."""
_FAINT = 1e-15
"""The same for the greatest element of a block."""


def clip_of(bits: int) -> float | None:
    """Return where the scale of a block ends, in its root mean squares; ``None``: at its greatest element."""
    return _CLIP.get(bits)


def packed_bytes(elements: int, bits: int, block: int) -> int:
    """Return how many bytes the codes of a tensor take before compression."""
    return -(-elements // block) * block * _WIDTH[bits] // 8


def scale_words(elements: int, block: int, *, logarithmic: bool) -> int:
    """Return how many 16-bit words the scales of a tensor take."""
    return -(-elements // block) * (2 if logarithmic else 1)


def encode_linear(
    x: FloatArray, base: FloatArray | None, bits: int, block: int, codes: Bytes, words: Words
) -> tuple[float, float]:
    """Code a slice's difference to its base, or, without base, its values.

    Args:
        x: at most :data:`SLICE` elements, float32 or float64, finite.
        base: as many of the same dtype, or ``None``.
        bits: a member of ``domain.light.BITS``.
        block: elements that share a scale.
        codes: filled with packed codes; ``packed_bytes`` of the slice.
        words: filled with a bfloat16 for each block.

    Returns:
        Sums over the slice of squared errors and of squared elements of ``x``; not finite where it cannot be coded.
    """
    d = _padded(x if base is None else x - base, block)
    levels = (1 << (bits - 1)) - 1
    t = np.abs(d)
    peaks = np.maximum.reduceat(t, np.arange(0, t.size, block)).astype(np.float32)
    if bits in _CLIP:
        rows = d.reshape(-1, block)
        squares = np.einsum("ij,ij->i", rows, rows)
        small = peaks < _FAINT
        if small.any():
            squares = np.where(small, np.einsum("ij,ij->i", rows, rows, dtype=np.float64), squares)
        np.minimum(peaks, (_CLIP[bits] * np.sqrt(squares / block)).astype(np.float32), out=peaks)
    # Rounded up, so that no code passes the last level.
    words[:] = ((peaks * np.float32(1 / levels)).view(np.uint32) + np.uint32(0xFFFF)) >> 16
    scales = _bfloat16(words).astype(d.dtype)
    divisors = np.where(scales > 0, scales, d.dtype.type(1))
    np.divide(d.reshape(-1, block), divisors[:, None], out=t.reshape(-1, block))
    np.add(t, t.dtype.type(levels + 0.5), out=t)
    if bits in _CLIP:
        np.clip(t, 0, 2 * levels + 0.5, out=t)
    u = t.astype(np.uint8)
    _pack(u, bits, block, codes)
    np.subtract(u, t.dtype.type(levels), out=t)
    rows = t.reshape(-1, block)
    np.multiply(rows, scales[:, None], out=rows)
    np.subtract(d, t, out=t)
    return _sums(t[: x.size], x)


def decode_linear(codes: Bytes, words: Words, bits: int, block: int, base: FloatArray | None, out: FloatArray) -> None:
    """Undo :func:`encode_linear`.

    Args:
        codes: of a slice.
        words: of the same slice.
        bits: as coded.
        block: as coded.
        base: as many elements as ``out``, or ``None``; may be ``out`` itself.
        out: filled; float32 or float64.
    """
    levels = (1 << (bits - 1)) - 1
    t = _unpack(codes, bits, block).astype(np.float32)
    np.subtract(t, np.float32(levels), out=t)
    rows = t.reshape(-1, block)
    np.multiply(rows, _bfloat16(words)[:, None], out=rows)
    if base is None:
        out[:] = t[: out.size]
    else:
        np.add(base, t[: out.size], out=out)


def encode_log(
    x: FloatArray, base: FloatArray | None, bits: int, block: int, codes: Bytes, words: Words
) -> tuple[float, float]:
    """Code the logarithms of a slice of non-negative elements, or of their ratios to a base.

    Args:
        x: as for :func:`encode_linear`, none negative.
        base: as many non-negative elements, or ``None``; where it is zero, the value itself is coded.
        bits: a member of ``domain.light.BITS``; one code stands for zero.
        block: elements that share an offset and a step.
        codes: filled with packed codes.
        words: filled with two words for each block.

    Returns:
        Sum over the slice of squared errors of the natural logarithm, which are relative errors where they are small,
        and the number of elements; the first is not finite where an element is out of the range of the codes.
    """
    values = _padded(x, block)
    logs = _logs(values, None if base is None else _padded(base, block))
    starts = np.arange(0, logs.size, block)
    some_zero = not values.all()
    zero = values == 0 if some_zero else np.empty(0, np.bool_)
    low = np.minimum.reduceat(np.where(zero, np.inf, logs) if some_zero else logs, starts)
    high = np.maximum.reduceat(logs, starts)
    if some_zero:
        nothing = high == -np.inf
        low[nothing] = high[nothing] = 0
    offsets = np.floor(low / OFFSET_STEP)
    last = (1 << bits) - 2
    steps = np.ceil((high - offsets * OFFSET_STEP) / last)
    # Larger powers are no float64.
    if not (offsets.min() >= -32768 and steps.max() <= 65535 and high.max() <= 500 * FRACTION):
        return float("inf"), float(x.size)
    pairs = words.reshape(-1, 2)
    pairs[:, 0] = offsets.astype(np.int16).view(np.uint16)
    pairs[:, 1] = steps.astype(np.uint16)
    rows = logs.reshape(-1, block)
    rows -= (offsets * OFFSET_STEP).astype(logs.dtype)[:, None]
    if some_zero:
        logs[zero] = 0
    inverse = np.where(steps > 0, 1 / np.maximum(steps, 1), 0).astype(logs.dtype)
    q = np.rint(rows * inverse[:, None])
    rows -= q * steps.astype(logs.dtype)[:, None]
    if some_zero:
        logs[zero] = 0
    errors = logs[: x.size] * logs.dtype.type(np.log(2) / FRACTION)
    u = q.astype(np.uint8).reshape(-1)
    u += np.uint8(1)
    if some_zero:
        u[zero] = 0
    _pack(u, bits, block, codes)
    return float(np.dot(errors, errors)), float(x.size)


def _logs(values: FloatArray, base: FloatArray | None) -> FloatArray:
    """Return logarithms of values, or of their ratios to a base where that is not zero; minus infinity for zero."""
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        if base is None:
            logs = np.log2(values)
        else:
            ones = _positive(base)
            ratios = values / ones
            # One logarithm rather than two, unless the quotient leaves the range of normal numbers.
            # Zeros aside: the least of zeros would be zero.
            least = ratios.min() or np.where(values > 0, ratios, 1).min()
            normal = least > _SMALLEST and ratios.max() < _LARGEST
            logs = np.log2(ratios) if normal else np.log2(values) - np.log2(ones)
    logs *= FRACTION
    return logs


def _positive(base: FloatArray) -> FloatArray:
    """Return a base with ones in place of what is not positive; of each element alone, wherever a slice ends."""
    return base if base.min() > 0 else np.where(base > 0, base, base.dtype.type(1))


def decode_log(
    codes: Bytes, words: Words, bits: int, block: int, base: FloatArray | None, dtype: str, out: FloatArray
) -> None:
    """Undo :func:`encode_log`; arguments as for :func:`decode_linear`.

    Elements stay within the positive numbers of ``dtype``, to which they will be rounded: none becomes zero or
    infinite, unless it was zero.
    """
    u = _unpack(codes, bits, block)
    pairs = words.reshape(-1, 2)
    e = np.multiply.outer(pairs[:, 1].astype(np.int32), np.arange(-1, (1 << bits) - 1, dtype=np.int32))
    e += pairs[:, 0].view(np.int16).astype(np.int32)[:, None] * OFFSET_STEP
    least, greatest = _LIMITS[dtype]
    # In float64: the ratio of two float32 is no float32.
    with np.errstate(over="ignore", under="ignore"):
        table = np.ldexp(_POWERS[e & (FRACTION - 1)], e >> 10)
        if base is None:
            np.clip(table, least, greatest, out=table)
        table[:, 0] = 0
        at = u.astype(np.intp)
        rows = at.reshape(-1, block)
        rows += np.arange(0, table.size, 1 << bits)[:, None]
        t = np.take(table.reshape(-1), at[: out.size], mode="clip")
        if base is not None:
            t *= _positive(base)
            np.minimum(t, greatest, out=t)
            np.maximum(t, least, out=t, where=u[: out.size] > 0)
        out[:] = t


def measure(x: FloatArray, decoded: FloatArray, *, logarithmic: bool) -> tuple[float, float]:
    """Return what the encoders return, as measured from what decoding and rounding give.

    Args:
        x: elements that were coded.
        decoded: as many, of the same dtype.
        logarithmic: which encoder's measure.
    """
    if not logarithmic:
        return _sums(x - decoded, x)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.log(decoded, dtype=np.float64) - np.log(x, dtype=np.float64)
    errors[(x == 0) & (decoded == 0)] = 0
    return float(np.dot(errors, errors)), float(x.size)


def widened(raw: npt.NDArray[Any], dtype: str) -> FloatArray:
    """Return elements as float32, or float64 if they are; ``raw`` of bfloat16 is its bits as uint16."""
    if dtype == "bfloat16":
        return _bfloat16(raw)
    return raw if raw.dtype in (np.float32, np.float64) else raw.astype(np.float32)


def narrowed(x: FloatArray, dtype: str, out: npt.NDArray[Any]) -> None:
    """Round float32 or float64 elements to a dtype, to nearest even; ``out`` of bfloat16 is its bits as uint16."""
    if dtype == "bfloat16":
        bits = x.astype(np.float32, copy=False).view(np.uint32)
        with np.errstate(over="ignore"):
            out[:] = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    else:
        with np.errstate(over="ignore"):
            out[:] = x


def _sums(errors: FloatArray, x: FloatArray) -> tuple[float, float]:
    """Return the sums of squares of errors and of elements; the first is infinite where they are too small to tell."""
    norm = float(np.dot(x, x))
    if norm < _COARSE:
        errors, x = errors.astype(np.float64), x.astype(np.float64)
        norm = float(np.dot(x, x))
        if norm < _LOST and x.any():
            return float("inf"), norm
    return float(np.dot(errors, errors)), norm


def _bfloat16(words: Words) -> npt.NDArray[np.float32]:
    return (words.astype(np.uint32) << 16).view(np.float32)


def _padded(x: FloatArray, block: int) -> FloatArray:
    """Return elements filled up to whole blocks with the last one's value, which widens no block's range."""
    missing = -x.size % block
    return np.concatenate([x, np.full(missing, x[-1], x.dtype)]) if missing else x


def _pack(u: Bytes, bits: int, block: int, out: Bytes) -> None:
    """Pack codes: a byte takes codes that lie a part of the block apart, so that whole parts are packed at once."""
    share = 8 // _WIDTH[bits]
    if share == 1:
        out[:] = u
        return
    part = block // share
    rows, packed = u.reshape(-1, block), out.reshape(-1, part)
    packed[:] = rows[:, :part]
    for at in range(1, share):
        packed |= rows[:, at * part : (at + 1) * part] * np.uint8(1 << (at * _WIDTH[bits]))


def _unpack(codes: Bytes, bits: int, block: int) -> Bytes:
    share = 8 // _WIDTH[bits]
    if share == 1:
        return codes
    part = block // share
    packed = codes.reshape(-1, part)
    u = np.empty((packed.shape[0], block), np.uint8)
    mask = np.uint8((1 << _WIDTH[bits]) - 1)
    for at in range(share):
        np.bitwise_and(packed >> np.uint8(at * _WIDTH[bits]), mask, out=u[:, at * part : (at + 1) * part])
    return u.reshape(-1)
