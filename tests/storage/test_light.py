"""A light version's table is refused unless all that it speaks of lies within the version's arrays."""

import copy
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorstore.domain.light import LightTable, LightTensor
from tailorstore.domain.records import ArrayRecord, ArraySpec
from tailorstore.storage.light import CODES, EXACT, SCALES, code_bytes, table_from_json, table_to_json, words_of

BLOCK = 128

TENSORS = {
    "a": LightTensor("float32", (20, 30), "difference", 4, 0, 0, None, 0.01),
    "b": LightTensor("bfloat16", (1000,), "value", 2, 320, 5, None, 0.25),
    "c": LightTensor("float64", (9, 9, 9), "ratio", 8, 576, 13, None, 0.5),
    "d": LightTensor("float16", (130,), "log", 3, 1344, 25),
    "e": LightTensor("bfloat16", (20, 30), "rounded", of="a"),
    "f": LightTensor("int64", (7,), "exact", codes_at=0),
    "g": LightTensor("complex64", (), "exact", codes_at=56),
    "h": LightTensor("float32", (0, 5), "exact", codes_at=64),
}
TABLE = LightTable(BLOCK, TENSORS)


def arrays(codes: int = 1472, scales: int = 29, exact: int = 64) -> dict[str, ArrayRecord]:
    """Return arrays of just the sizes that the table needs."""
    found = {}
    for path, size, dtype in ((CODES, codes, "uint8"), (SCALES, scales, "uint16"), (EXACT, exact, "uint8")):
        found[path] = ArrayRecord(path, ArraySpec(dtype, (size,), (max(size, 1),)), ("0" * 32,), (size,))
    return found


def described() -> dict[str, Any]:
    return copy.deepcopy(table_to_json(TABLE))


def test_a_table_comes_back() -> None:
    assert table_from_json(described(), arrays()) == TABLE


def test_sizes_are_those_of_whole_blocks() -> None:
    sizes = {name: (code_bytes(tensor, BLOCK), words_of(tensor, BLOCK)) for name, tensor in TENSORS.items()}
    assert sizes == {
        "a": (320, 5),
        "b": (256, 8),
        "c": (768, 12),
        "d": (128, 4),
        "e": (0, 0),
        "f": (56, 0),
        "g": (8, 0),
        "h": (0, 0),
    }


@pytest.mark.parametrize(("which", "size"), [("codes", 1471), ("scales", 28), ("exact", 63)])
def test_arrays_that_end_too_early_are_refused(which: str, size: int) -> None:
    with pytest.raises(ValueError, match=which):
        table_from_json(described(), arrays(**{which: size}))


@pytest.mark.parametrize("path", [CODES, SCALES, EXACT])
def test_arrays_that_are_missing_are_refused(path: str) -> None:
    held = {name: record for name, record in arrays().items() if name != path}
    with pytest.raises(ValueError, match=path):
        table_from_json(described(), held)


@pytest.mark.parametrize("path", [CODES, SCALES, EXACT])
@pytest.mark.parametrize("spec", [("int8", (4000,)), ("uint16", (40, 100)), ("float32", (4000,)), ("uint8", ())])
def test_arrays_of_another_kind_are_refused(path: str, spec: tuple[str, tuple[int, ...]]) -> None:
    dtype, shape = spec
    wrong = ArrayRecord(path, ArraySpec(dtype, shape, tuple(max(one, 1) for one in shape)), ("0" * 32,), (4000,))
    with pytest.raises(ValueError, match="@light"):
        table_from_json(described(), arrays() | {path: wrong})


def changed(name: str, at: int, value: Any) -> dict[str, Any]:
    found = described()
    found["tensors"][name][at] = value
    return found


DTYPE, SHAPE, CODING, WIDTH, CODES_AT, SCALES_AT, OF, ERROR = range(8)

WRONG: dict[str, dict[str, Any]] = {
    "codes beyond their array": changed("d", CODES_AT, 1345),
    "codes far beyond their array": changed("d", CODES_AT, 10**400),
    "scales beyond their array": changed("d", SCALES_AT, 26),
    "exact bytes beyond their array": changed("g", CODES_AT, 57),
    "a negative offset": changed("a", CODES_AT, -1),
    "a negative offset of scales": changed("a", SCALES_AT, -1),
    "a negative extent": changed("a", SHAPE, [-20, -30]),
    "an offset that is no whole number": changed("a", CODES_AT, 0.0),
    "an offset that is a boolean": changed("a", CODES_AT, False),
    "a huge shape": changed("a", SHAPE, [10**9, 10**9, 10**9]),
    "a huge shape without elements": changed("h", SHAPE, [0, 10**30]),
    "a huge exact tensor": changed("f", SHAPE, [2**62]),
    "more elements than codes": changed("c", SHAPE, [9, 9, 12]),
    "extents that are no numbers": changed("a", SHAPE, ["20", 30]),
    "a shape that is none": changed("a", SHAPE, None),
    "an unknown coding": changed("a", CODING, "delta"),
    "a coding that is no word": changed("a", CODING, None),
    "unknown bits": changed("a", WIDTH, 7),
    "no bits": changed("a", WIDTH, 0),
    "bits that are no whole number": changed("a", WIDTH, 4.0),
    "bits that are true": changed("f", WIDTH, False),
    "bits of what is exact": changed("f", WIDTH, 4),
    "bits of what is rounded": changed("e", WIDTH, 4),
    "codes of whole numbers": changed("a", DTYPE, "int32"),
    "codes of complex numbers": changed("a", DTYPE, "complex64"),
    "an unknown dtype": changed("f", DTYPE, "float7"),
    "rounded of nothing": changed("e", OF, None),
    "rounded of what is missing": changed("e", OF, "z"),
    "rounded of itself": changed("e", OF, "e"),
    "rounded of another shape": changed("e", OF, "b"),
    "rounded of a number": changed("e", OF, 3),
    "of what it is not rounded of": changed("a", OF, "b"),
    "an error that is a word": changed("a", ERROR, "0.1"),
    "an error that is true": changed("a", ERROR, True),
    "a negative error": changed("a", ERROR, -0.1),
    "an endless error": changed("a", ERROR, math.inf),
    "an error that is no number": changed("a", ERROR, math.nan),
    "an entry that is too short": {"block": 128, "tensors": {"a": ["float32", [1]]}},
    "an entry that is too long": {"block": 128, "tensors": {"a": [*described()["tensors"]["a"], 0]}},
    "an entry that is a word": {"block": 128, "tensors": {"a": "abcdefgh"}},
    "tensors that are a list": {"block": 128, "tensors": []},
    "no tensors": {"block": 128},
    "no block": {"tensors": {}},
    "an odd block": {"block": 100, "tensors": {}},
    "a small block": {"block": 8, "tensors": {}},
    "a large block": {"block": 8192, "tensors": {}},
    "a block of no elements": {"block": 0, "tensors": {}},
    "a block that is no whole number": {"block": 128.0, "tensors": {}},
    "two roundings in a row": {
        "block": 128,
        "tensors": described()["tensors"] | {"x": ["bfloat16", [20, 30], "rounded", 0, 0, 0, "e", 0.0]},
    },
}


@pytest.mark.parametrize("what", WRONG)
def test_a_table_that_means_harm_is_refused(what: str) -> None:
    tracemalloc.start()
    try:
        # What `parse_document` makes an error of ours of.
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)) as caught:
            table_from_json(WRONG[what], arrays())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert not isinstance(caught.value, MemoryError | RecursionError)


values = st.none() | st.booleans() | st.integers(-3, 5000) | st.floats() | st.text(max_size=5) | st.just(2**200)
codings = st.sampled_from(["exact", "difference", "value", "ratio", "log", "rounded", "other"])
entries = st.tuples(
    st.sampled_from(["float32", "bfloat16", "int8", "float64", "complex32", "x"]) | values,
    st.lists(st.integers(-1, 40) | values, max_size=3) | values,
    codings | values,
    st.sampled_from([0, 2, 3, 4, 8]) | values,
    st.integers(0, 1500) | values,
    st.integers(0, 40) | values,
    st.none() | st.sampled_from(["a", "b", "c"]) | values,
    st.floats(0, 1) | values,
)


def within(table: LightTable, held: dict[str, ArrayRecord]) -> bool:
    sizes = {path: record.spec.shape[0] for path, record in held.items()}
    for tensor in table.tensors.values():
        where = EXACT if tensor.coding == "exact" else CODES
        if tensor.codes_at + code_bytes(tensor, table.block) > sizes[where]:
            return False
        if tensor.scales_at + words_of(tensor, table.block) > sizes[SCALES]:
            return False
    return True


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc"), entries.map(list), max_size=3), st.sampled_from([16, 128, 4096]) | values
)
def test_whatever_is_understood_lies_within_the_arrays(tensors: dict[str, Any], block: Any) -> None:
    try:
        table = table_from_json({"block": block, "tensors": tensors}, arrays())
    except (KeyError, TypeError, ValueError, AttributeError):
        return
    assert within(table, arrays())
    assert table_to_json(table) == {"block": block, "tensors": tensors}
