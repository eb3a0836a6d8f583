"""Valid documents made into others that mean harm: structure-aware, and sealed anew so that checksums do not help."""

import copy
import json
from collections.abc import Iterator
from typing import Any, Final

from hypothesis import strategies as st

from tailorstore.storage.checksums import BLANK, CHECKSUM, sealed

DEEP: Final = "a value as deep as no parser follows"
"""Stands for a hundred thousand brackets; Hypothesis would print them all."""
DEEPER_THAN_WE_WRITE: Final = 300
TWICE: Final = "the same key again: "
"""Begins a key that is written out as what follows, so that the document has it twice."""

NUMBERS: Final = (
    -1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    10**400, 0.0, -0.0, 0.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"), True, False, None,
)  # fmt: skip
TEXTS: Final = (
    "", ".", "..", "../x", "../../../../tmp/x", "/", "/etc/passwd", "a/b", "a//b", "a/../b", "a\0b", "C:\\x", "\\", "~",
    "\ud800", "ａ/ｂ", "﹒﹒/x", "\u202e", "x" * 300, "é" * 5000, "zarr.json", "c", "c.0", "__pycache__", ".hidden",
    "con", "@extra", "@light/codes", "@light/scales", "@light/exact", "@optim/exp_avg/a", "float32", "float64",
    "bfloat16", "complex32", "float8_e8m0fnu", "uint8", "bool", "object", "none", "lz4", "zstd", "entropy",
    "full", "light",
    "exact", "difference", "value", "ratio", "log", "rounded", "tag", "branch", "main", "latest", "12", "HEAD",
    "0" * 20, "a" * 20, "f" * 32, "xxh3-128:" + "0" * 32, "2020-01-01T00:00:00", "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00", "99999-13-41", "1e999", "nan", "<f8", "O", "<U9999999", "V99", "(9999999,)f8",
)  # fmt: skip
SPECIALS: Final = ("$array", "$ndarray", "$scalar", "$number", "$float", "$tuple", "$dict", "$bytes", "$other")

scalars: Final = st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.integers(-(2**70), 2**70) | st.text(max_size=6)
values: Final = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(TEXTS), inner, max_size=3)
        | st.builds(lambda kind, held: {kind: held}, st.sampled_from(SPECIALS), inner)
    ),
    max_leaves=4,
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where every value of a document stands."""
    if path:
        yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places_in(inner, (*path, name))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from places_in(inner, (*path, at))


def at(document: Any, path: tuple[Any, ...]) -> Any:
    """Return what stands at a place."""
    for part in path:
        document = document[part]
    return document


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """Return a document with one to four values replaced, removed, moved, repeated, renamed or stretched."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 4))):
        places = list(places_in(changed))
        if not places:
            break
        *way, last = place = draw(st.sampled_from(places))
        inside, value = at(changed, tuple(way)), at(changed, place)
        match draw(
            st.sampled_from(["replace", "replace", "number", "remove", "move", "copy", "more", "rename", "deep"])
        ):
            case "replace":
                inside[last] = draw(values)
            case "number" if type(value) is int:
                inside[last] = draw(st.sampled_from([value + 1, value - 1, value * 2, value * 2**40, -value]))
            case "remove":
                del inside[last]
            case "move":
                other = draw(st.sampled_from(places))
                inside[last] = copy.deepcopy(at(changed, other))
            case "copy" if isinstance(inside, dict):
                inside[draw(st.sampled_from([f"{last}2", "../x", "a/b", f"{TWICE}{last}"]))] = copy.deepcopy(value)
            case "more" if isinstance(inside, list):
                inside[last:last] = [value] * draw(st.sampled_from([1, 2, 100]))
            case "rename" if isinstance(inside, dict):
                inside[draw(st.sampled_from(TEXTS))] = inside.pop(last)
            case "deep":
                inside[last] = DEEP if draw(st.booleans()) else _nested(draw(st.sampled_from([60, 120, 300])))
            case _:
                inside[last] = draw(scalars)
    return changed


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """Return bytes with some flipped, cut off, added, repeated or put elsewhere; or other bytes altogether."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        size = len(changed)
        where = draw(st.integers(0, max(0, size - 1)))
        match draw(st.sampled_from(["flip", "flip", "set", "cut", "add", "zero", "repeat", "noise"])):
            case "flip" if size:
                changed[where] ^= 1 << draw(st.integers(0, 7))
            case "set" if size:
                changed[where : where + 4] = draw(
                    st.sampled_from([b"\0\0\0\0", b"\xff" * 4, b"\xff\xff\xff\x7f", b"\1"])
                )
            case "cut":
                del changed[where:]
            case "zero":
                changed[where : where + 64] = bytes(len(changed[where : where + 64]))
            case "repeat":
                changed[where:where] = changed[: draw(st.integers(0, 200))]
            case "noise":
                changed[:] = draw(st.binary(max_size=60))
            case _:
                changed[where:where] = draw(st.binary(max_size=8))
    return bytes(changed)


def written(document: Any) -> bytes:
    """Return a document's text, with what JSON data cannot hold put in."""
    text = json.dumps(document)
    return text.replace(json.dumps(TWICE)[:-1], '"').replace(json.dumps(DEEP), "[" * 100_000).encode()


def resealed(document: Any, where: tuple[str, ...] = ()) -> bytes:
    """Return a document's text with the checksum that it then has.

    Args:
        document: JSON data.
        where: what the checksum stands in.
    """
    changed = copy.deepcopy(document)
    try:
        inside = at(changed, where)
        inside[CHECKSUM] = BLANK
    except (KeyError, TypeError, IndexError):
        return written(document)
    # First of all fields, as it always is: a text of ours could not stand before it.
    rest = {name: inside.pop(name) for name in [name for name in inside if name != CHECKSUM]}
    inside.update(rest)
    return sealed(written(changed))


def _nested(levels: int) -> Any:
    value: Any = 0
    for level in range(levels):
        value = [value] if level % 2 else {"$tuple": [value]}
    return value
