"""Codes err within their scale, zero stays zero, nothing else becomes zero, and what is said of the error is true."""

import itertools
import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tailorstore.storage import quantise
from tests.kit.light import Floats, linear, logarithmic, scales_of

BITS = (2, 3, 4, 5, 6, 8)
BLOCKS = (16, 64, 128, 1024)
DTYPES = ("float32", "float64", "bfloat16", "float16")
CLIPPED = {2: 1.5, 3: 3.0}

bits = st.sampled_from(BITS)
blocks = st.sampled_from(BLOCKS)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 3000)
RUNS = settings(max_examples=150, deadline=None)


def kind(dtype: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, dtype, None) or dtype)


def raw_of(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """Return values rounded to a dtype, as the engine sees its elements: bfloat16 as its bits."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32).astype(kind(dtype)) if dtype == "bfloat16" else values.astype(kind(dtype))
    return rounded.view(np.uint16) if dtype == "bfloat16" else rounded


@st.composite
def some_values(draw: st.DrawFn, count: int, *, positive: bool = False) -> Floats:
    """Return elements of one of the kinds that training makes, and of some that it should not."""
    chance = np.random.default_rng(draw(seeds))
    values = chance.standard_normal(count)
    match draw(st.sampled_from(["plain", "plain", "spread", "equal", "zeros", "some zeros", "blocks", "outliers"])):
        case "spread":
            values = values * 10.0 ** chance.uniform(-8, 0, count)
        case "equal":
            values[:] = values[0]
        case "zeros":
            values[:] = 0
        case "some zeros":
            values[chance.random(count) < 0.4] = 0
        case "blocks":
            values = values * 10.0 ** np.repeat(chance.uniform(-6, 0, -(-count // 16)), 16)[:count]
        case "outliers":
            values[chance.random(count) < 0.01] *= 1000
    return np.abs(values) if positive else values


def scaled(values: Floats, exponent: int) -> Floats:
    return values * 10.0**exponent


exponents = st.sampled_from([0, 0, 0, -3, -6, 3])


def encoded(
    raw: npt.NDArray[Any], base: npt.NDArray[Any] | None, dtype: str, bits: int, block: int, *, log: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16], float, float]:
    """Encode slice after slice, as the engine does."""
    codes = np.full(quantise.packed_bytes(raw.size, bits, block), 0xAA, np.uint8)
    words = np.full(quantise.scale_words(raw.size, block, logarithmic=log), 0xAAAA, np.uint16)
    error = norm = 0.0
    encode = quantise.encode_log if log else quantise.encode_linear
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, raw.size, quantise.SLICE):
            end = min(raw.size, at + quantise.SLICE)
            found = encode(
                quantise.widened(raw[at:end], dtype),
                None if base is None else quantise.widened(base[at:end], dtype),
                bits,
                block,
                codes[quantise.packed_bytes(at, bits, block) : quantise.packed_bytes(end, bits, block)],
                words[
                    quantise.scale_words(at, block, logarithmic=log) : quantise.scale_words(end, block, logarithmic=log)
                ],
            )
            error, norm = error + found[0], norm + found[1]
    return codes, words, error, norm


def decoded(
    codes: npt.NDArray[np.uint8],
    words: npt.NDArray[np.uint16],
    base: npt.NDArray[Any] | None,
    dtype: str,
    bits: int,
    block: int,
    count: int,
    *,
    log: bool,
) -> npt.NDArray[Any]:
    wide: quantise.FloatArray = np.empty(count, np.float64 if dtype == "float64" else np.float32)
    of = None if base is None else quantise.widened(base, dtype)
    if log:
        quantise.decode_log(codes, words, bits, block, of, dtype, wide)
    else:
        quantise.decode_linear(codes, words, bits, block, of, wide)
    out = np.empty(count, np.uint16 if dtype == "bfloat16" else kind(dtype))
    quantise.narrowed(wide, dtype, out)
    return out


def wide_of(raw: npt.NDArray[Any], dtype: str) -> Floats:
    return (raw.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else raw).astype(np.float64)


def ulp(values: Floats, dtype: str) -> Floats:
    """Return the distance of neighbouring numbers of a dtype."""
    info = ml_dtypes.finfo(kind(dtype))
    return np.maximum(np.abs(values) * float(info.eps), float(info.smallest_subnormal))


# --- Linear codes


@RUNS
@given(st.data(), sizes, dtypes, bits, blocks, exponents, st.sampled_from([None, 1.0, 0.01]))
def test_linear_codes_err_within_their_scale(
    data: st.DataObject, count: int, dtype: str, bits: int, block: int, exponent: int, drift: float | None
) -> None:
    values = scaled(data.draw(some_values(count)), exponent)
    raw = raw_of(values, dtype)
    base = None if drift is None else raw_of(values + scaled(data.draw(some_values(count)), exponent) * drift, dtype)
    assume(all(one is None or np.isfinite(wide_of(one, dtype)).all() for one in (raw, base)))
    codes, words, error, norm = encoded(raw, base, dtype, bits, block, log=False)
    x = wide_of(raw, dtype)
    b = np.zeros(count) if base is None else wide_of(base, dtype)
    coded = linear(codes, words, bits, block)[:count]
    difference = x - b
    # The sums are those of the errors before rounding to 16 bits.
    truth = float(np.sum((difference - coded) ** 2))
    slack = 4 * float(np.sqrt(np.sum(ulp(np.abs(x) + np.abs(b), "float32" if dtype != "float64" else dtype) ** 2)))
    assert np.sqrt(error) == pytest.approx(np.sqrt(truth), rel=1e-4, abs=slack)
    assert norm == pytest.approx(float(np.sum(x**2)), rel=1e-4)
    scales = np.repeat(scales_of(words), block)[:count]
    levels = 2 ** (bits - 1) - 1
    bound = np.maximum(scales / 2, np.abs(difference) - levels * scales if bits in CLIPPED else 0)
    found = wide_of(decoded(codes, words, base, dtype, bits, block, count, log=False), dtype)
    room = ulp(np.abs(x) + np.abs(b), dtype) + 1e-6 * scales
    assert (np.abs(difference - coded) <= bound * 1.000001 + room).all()
    assert (np.abs(found - x) <= bound * 1.000001 + 2 * room).all()
    # No scale is coarser than it need be.
    for at, scale in enumerate(scales_of(words)):
        part = difference[at * block : (at + 1) * block]
        assert scale * levels <= np.abs(part).max() * (1 + 2**-6) + 1e-44


@RUNS
@given(st.data(), sizes, dtypes, bits, blocks)
def test_what_equals_its_base_comes_back_to_the_bit(
    data: st.DataObject, count: int, dtype: str, bits: int, block: int
) -> None:
    raw = raw_of(np.abs(data.draw(some_values(count))), dtype)
    codes, words, error, _ = encoded(raw, raw, dtype, bits, block, log=False)
    assert error == 0
    assert not words.any()
    assert (decoded(codes, words, raw, dtype, bits, block, count, log=False) == raw).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e-25, 1e-30, 1e-38, 1e-42])
def test_the_error_of_tiny_elements_is_not_lost(bits: int, size: float) -> None:
    """Their float32 squares are zero."""
    x = (np.random.default_rng(3).standard_normal(1000) * size).astype(np.float32)
    codes, words, error, norm = encoded(x, None, "float32", bits, 128, log=False)
    coded = linear(codes, words, bits, 128)[:1000]
    assert norm == pytest.approx(float(np.sum(x.astype(np.float64) ** 2)), rel=1e-4)
    assert error == pytest.approx(float(np.sum((x - coded) ** 2)), rel=1e-3)
    # As good as codes of larger ones, down to where bfloat16 scales and float32 elements lose their last bits.
    if size > 1e-38:
        assert np.sqrt(error / norm) < {2: 0.6, 3: 0.35, 4: 0.2, 5: 0.1, 6: 0.05, 8: 0.01}[bits]
    assert (decoded(codes, words, None, "float32", bits, 128, 1000, log=False) == coded.astype(np.float32)).all()


@pytest.mark.parametrize("bits", BITS)
def test_what_float32_scales_cannot_hold_is_said_to_be_lost(bits: int) -> None:
    for size in (1e-60, 1e-170, 1e-300):
        x = np.random.default_rng(4).standard_normal(300) * size
        _, _, error, norm = encoded(x, None, "float64", bits, 64, log=False)
        assert error == np.inf or np.sqrt(error / norm) > 0.99
    for x in (np.array([1e41, 1.0]), np.array([1.0, np.inf]), np.array([np.nan, 1.0]), np.array([1e300, -1e300])):
        _, _, error, norm = encoded(x, None, "float64", bits, 64, log=False)
        assert not np.isfinite(error) or not np.isfinite(norm)
    huge = np.array([3e38, -3e38, 1.0], dtype=np.float32)
    assert not np.isfinite(encoded(huge, -huge, "float32", bits, 64, log=False)[2])


# --- Logarithmic codes


def check_logarithmic(
    raw: npt.NDArray[Any], base: npt.NDArray[Any] | None, dtype: str, bits: int, block: int
) -> tuple[float, float] | None:
    """Fail unless codes are within their steps and no element is lost; return true and recorded sum of errors."""
    count = raw.size
    codes, words, error, norm = encoded(raw, base, dtype, bits, block, log=True)
    assert norm == count
    if not np.isfinite(error):
        return None
    found = wide_of(decoded(codes, words, base, dtype, bits, block, count, log=True), dtype)
    x = wide_of(raw, dtype)
    assert ((found == 0) == (x == 0)).all()
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    b = np.ones(count) if base is None else wide_of(base, dtype)
    there = x > 0
    coded = logarithmic(codes, words, bits, block)[:count]
    coded[there] *= np.where(b[there] > 0, b[there], 1.0)
    steps = np.repeat(words[1::2].astype(np.float64), block)[:count] / 1024
    with np.errstate(divide="ignore"):
        octaves = np.log2(coded[there]) - np.log2(x[there])
    # Logarithms of float32 err by up to a hundredth of a 1024th.
    assert (np.abs(octaves) <= steps[there] / 2 + 16 / 1024 / 2 + 0.02 / 1024).all()
    # What is restored differs from that by rounding to the dtype only, or is the nearest that the dtype has.
    info = ml_dtypes.finfo(kind(dtype))
    least, greatest = float(info.smallest_subnormal), float(info.max)
    nearest = np.clip(coded[there], least, greatest)
    assert (np.abs(found[there] - nearest) <= ulp(nearest, dtype) + 1e-15 * nearest).all()
    return float(np.sum((octaves * np.log(2)) ** 2)), error


@RUNS
@given(st.data(), sizes, dtypes, bits, blocks, exponents, st.sampled_from([None, 0.1, 1.0, "other"]))
def test_logarithmic_codes_err_within_their_step_and_lose_nothing(
    data: st.DataObject, count: int, dtype: str, bits: int, block: int, exponent: int, drift: float | str | None
) -> None:
    values = scaled(data.draw(some_values(count, positive=True)), exponent)
    raw, base = raw_of(values, dtype), None
    if drift == "other":
        # Zero where the value is not, and the other way round.
        base = raw_of(scaled(data.draw(some_values(count, positive=True)), exponent), dtype)
    elif isinstance(drift, float):
        chance = np.random.default_rng(data.draw(seeds))
        base = raw_of(values * np.exp(drift * chance.standard_normal(count)), dtype)
    assume(all(one is None or np.isfinite(wide_of(one, dtype)).all() for one in (raw, base)))
    sums = check_logarithmic(raw, base, dtype, bits, block)
    assert sums is not None
    truth, recorded = sums
    assert recorded == pytest.approx(truth, rel=1e-3, abs=count * 1e-8)


EXTREMES = {
    "float64": [5e-324, 1e-310, 1e-160, 1e-150, 1.0, 1e150, 1.7e308],
    "float32": [1.4e-45, 1e-42, 1e-38, 1e-30, 1e-3, 1.0, 1e5, 1e20, 3.4e38],
    "bfloat16": [9.2e-41, 1e-39, 1e-38, 1e-30, 1e-3, 1.0, 1e5, 1e20, 3.38e38],
    "float16": [6e-8, 1.2e-7, 1e-6, 6e-5, 1e-3, 1.0, 1e3, 6.5e4],
}


@RUNS
@given(st.data(), dtypes, bits, blocks, st.booleans())
def test_no_extreme_element_becomes_zero_or_infinite(
    data: st.DataObject, dtype: str, bits: int, block: int, based: bool
) -> None:
    some = st.lists(st.sampled_from([0.0, *EXTREMES[dtype]]), min_size=1, max_size=40)
    raw = raw_of(np.array(data.draw(some)), dtype)
    base = None
    if based:
        base = raw_of(np.resize(np.array(data.draw(some)), raw.size), dtype)
    # Not coded are float64 beyond 2 ** ±500, and what is so far apart that three or seven codes would say nothing.
    assert check_logarithmic(raw, base, dtype, bits, block) is not None or dtype == "float64" or bits < 4


@pytest.mark.parametrize("bits", BITS)
def test_a_second_moment_that_has_died_away_keeps_its_size(bits: int) -> None:
    """Adam's decays by a factor of 1e-43 in a hundred thousand steps without gradient, and is divided by all along."""
    base = np.geomspace(1e-6, 1e3, 640).astype(np.float32)
    for gone in (1e-30, 1e-38, 1e-40):
        raw = (base * np.float32(gone)).astype(np.float32)
        raw[raw == 0] = 1.4e-45
        truth, recorded = check_logarithmic(raw, base, "float32", bits, 64) or (None, None)
        assert recorded == pytest.approx(truth, rel=1e-2, abs=1e-5)


@given(bits, blocks, dtypes, st.integers(0, 1500))
def test_all_zero_and_all_equal_blocks(bits: int, block: int, dtype: str, extra: int) -> None:
    count = block + extra
    zeros = raw_of(np.zeros(count), dtype)
    ones = raw_of(np.full(count, 0.37), dtype)
    for base in (None, zeros, ones):
        sums = check_logarithmic(zeros, base, dtype, bits, block)
        assert sums == (0, 0)
        _, _, error, _ = encoded(ones, base, dtype, bits, block, log=True)
        assert np.sqrt(error / count) < 0.006
        _, words, error, norm = encoded(ones, base, dtype, bits, block, log=False)
        # A scale is a bfloat16, which is rounded up.
        assert np.sqrt(error / norm) <= 2**-7
    codes, words, error, norm = encoded(zeros, None, dtype, bits, block, log=False)
    assert (error, norm) == (0, 0)
    assert not decoded(codes, words, None, dtype, bits, block, count, log=False).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize("base_too", [False, True])
def test_what_has_no_logarithm_is_not_coded(bits: int, bad: float, base_too: bool) -> None:
    x = np.linspace(1, 2, 500, dtype=np.float32)
    base = x * np.float32(1.5) if base_too else None
    x[77] = bad
    _, _, error, _ = encoded(x, base, "float32", bits, 128, log=True)
    assert not np.isfinite(error)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_positive_in_a_base_counts_as_one_wherever_slices_end(bits: int) -> None:
    x = np.random.default_rng(6).uniform(0.5, 2, 512).astype(np.float32)
    base = x.copy()
    base[[3, 140, 300]] = 0, np.nan, -1
    codes, words, error, _ = encoded(x, base, "float32", bits, 128, log=True)
    assert np.sqrt(error / 512) < 0.2
    for ends in ([0, 512], [0, 128, 256, 384, 512]):
        out = np.empty_like(x)
        for low, high in itertools.pairwise(ends):
            part = codes[quantise.packed_bytes(low, bits, 128) : quantise.packed_bytes(high, bits, 128)]
            part_words = words[low // 64 : high // 64]
            out[low:high] = decoded(part, part_words, base[low:high], "float32", bits, 128, high - low, log=True)
        assert np.sqrt(np.mean(np.log(out / x) ** 2)) == pytest.approx(np.sqrt(error / 512), rel=1e-3)


# --- One form


@RUNS
@given(st.data(), bits, st.sampled_from([16, 128, 4096]), st.booleans(), st.booleans(), seeds)
def test_codes_do_not_depend_on_where_slices_end(
    data: st.DataObject, bits: int, block: int, log: bool, based: bool, seed: int
) -> None:
    count = data.draw(st.integers(1, quantise.SLICE))
    chance = np.random.default_rng(seed)
    x = np.abs(chance.standard_normal(count, dtype=np.float32))
    x[chance.random(count) < 0.1] = 0
    base = (x * chance.uniform(0.5, 2, count)).astype(np.float32) if based else None
    codes, words, error, norm = encoded(x, base, "float32", bits, block, log=log)
    cuts = sorted({0, count, *(data.draw(st.integers(0, count // block)) * block for _ in range(3))})
    out = np.empty_like(x)
    parts_error = parts_norm = 0.0
    for low, high in itertools.pairwise(cuts):
        of = None if base is None else base[low:high]
        part, part_words, e, n = encoded(x[low:high], of, "float32", bits, block, log=log)
        at = quantise.packed_bytes(low, bits, block)
        words_at = quantise.scale_words(low, block, logarithmic=log)
        assert (part == codes[at : at + part.size]).all()
        assert (part_words == words[words_at : words_at + part_words.size]).all()
        out[low:high] = decoded(part, part_words, of, "float32", bits, block, high - low, log=log)
        parts_error, parts_norm = parts_error + e, parts_norm + n
    assert (out == decoded(codes, words, base, "float32", bits, block, count, log=log)).all()
    assert parts_error == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert parts_norm == pytest.approx(norm, rel=1e-3)


def test_powers_are_correctly_rounded() -> None:
    """They are what makes decoding the same on every machine: none of them may come from its mathematics library."""
    from decimal import Decimal, localcontext

    with localcontext(prec=80):
        for step in range(0, 1024, 11):
            assert quantise._POWERS[step] == float(Decimal(2) ** (Decimal(step) / 1024))


MEASURED = """
import numpy as np, sys
from tailorstore.storage import quantise
chance = np.random.default_rng(5)
x = chance.standard_normal(20000, dtype=np.float32) ** 2
base = (x * chance.uniform(0.9, 1.1, 20000)).astype(np.float32)
for bits in (2, 3, 4, 5, 6, 8):
    for log in (False, True):
        codes = np.empty(quantise.packed_bytes(x.size, bits, 128), np.uint8)
        words = np.empty(quantise.scale_words(x.size, 128, logarithmic=log), np.uint16)
        (quantise.encode_log if log else quantise.encode_linear)(x, base, bits, 128, codes, words)
        print(codes.tobytes().hex(), words.tobytes().hex())
"""


def test_another_process_makes_the_same_codes() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", MEASURED],
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(outputs) == 1


# --- Dtypes


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60))
def test_rounding_to_bfloat16_is_to_nearest_even(values: list[float]) -> None:
    x = np.array(values, dtype=np.float32)
    out = np.empty(x.size, np.uint16)
    quantise.narrowed(x, "bfloat16", out)
    with np.errstate(over="ignore"):
        assert (out == x.astype(ml_dtypes.bfloat16).view(np.uint16)).all()
    assert (quantise.widened(out, "bfloat16") == out.view(ml_dtypes.bfloat16).astype(np.float32)).all()


@RUNS
@given(st.data(), sizes, st.sampled_from(["bfloat16", "float16"]), bits, st.booleans(), st.sampled_from([1e-3, 0.1]))
def test_errors_of_16_bits_are_measured_as_they_will_be(
    data: st.DataObject, count: int, dtype: str, bits: int, log: bool, drift: float
) -> None:
    values = data.draw(some_values(count, positive=log))
    chance = np.random.default_rng(data.draw(seeds))
    raw = raw_of(values, dtype)
    base = raw_of(values * (1 + drift * chance.uniform(-1, 1, count)), dtype)
    codes, words, error, _ = encoded(raw, base, dtype, bits, 128, log=log)
    assume(np.isfinite(error))
    found = decoded(codes, words, base, dtype, bits, 128, count, log=log)
    x, out = wide_of(raw, dtype), wide_of(found, dtype)
    measured, norm = quantise.measure(quantise.widened(raw, dtype), quantise.widened(found, dtype), logarithmic=log)
    if log:
        there = x > 0
        truth, whole = float(np.sum(np.log(out[there] / x[there]) ** 2)), float(count)
    else:
        truth, whole = float(np.sum((x - out) ** 2)), float(np.sum(x**2))
    assert measured == pytest.approx(truth, rel=1e-3, abs=1e-12)
    assert norm == pytest.approx(whole, rel=1e-4)


def test_a_code_for_an_element_beyond_a_dtype_gives_its_nearest() -> None:
    for dtype, (least, greatest) in quantise._LIMITS.items():
        info = ml_dtypes.finfo(kind(dtype))
        assert (least, greatest) == (float(info.smallest_subnormal), float(info.max))
