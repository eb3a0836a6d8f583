"""JSON that a stranger may have written: parsed within bounds of memory, time and depth, or refused.

The bounds hold for what is written, too, so that nothing is ever stored that nobody could read. They are several times
what the largest models need. 671 billion parameters in 61 layers of 256 experts, each expert a layer of its own, make
a manifest of 12 MB with a quarter of a million values; a layer of as many experts in one piece, with Adam's slots, has
a document of 5 MB. A model of 405 billion parameters that was one single layer in chunks of 32 MiB, with 16 bytes of
state a parameter, would have one of 10 MB with 400 000 values.
"""

import json
import math
from typing import Any, NoReturn

from tailorstore.domain.errors import InvalidInputError

BINDING_BYTES = RECORD_BYTES = 1 << 16
"""Largest ``tailorstore.json``, and largest record of a tag or branch. They have a few hundred bytes."""
MANIFEST_BYTES = 64 << 20
LAYER_BYTES = 64 << 20
"""Largest group document of a layer version."""
MOST_VALUES = 4_000_000
"""Most values, names included, of one document. Parsed they take a hundred bytes each, more than their text."""
MOST_LEVELS = 256
"""How deep a document may nest: state of 64 levels, each of up to three lists and objects, and what is around it."""
LARGEST = 2**63 - 1
"""Greatest whole number that a catalog can hold."""


class UnfitError(ValueError):
    """A document is not fit to be read; says why as "it …"."""


def why_not(error: Exception) -> str:
    """Return why a document cannot be used, as a sentence about "it".

    Args:
        error: by which parsing, or building a record of what was parsed, ended.

    Examples:
        >>> why_not(KeyError("format")), why_not(ValueError("-1"))
        ("it lacks 'format'", 'it holds a value that no such document has')
    """
    if isinstance(error, UnfitError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return "it holds bytes that are no text"
    if isinstance(error, json.JSONDecodeError):
        return "it is not JSON"
    if isinstance(error, RecursionError):
        return "it nests deeper than any"
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]!r}"
    return "it holds a value that no such document has"


def parse_object(raw: memoryview) -> dict[str, Any]:
    """Parse a document that is a JSON object, in memory of about a hundred bytes a value.

    Raises:
        ValueError, TypeError, RecursionError: it is not one, names a key twice, holds a number that is not finite, or
            is larger or deeper than any of ours.
    """
    data = bytes(raw)
    _check_count(data)
    described = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    if not isinstance(described, dict):
        msg = "it is not a JSON object"
        raise UnfitError(msg)
    _check_depth(described)
    return described


def check_writable(data: bytes, limit: int, what: str) -> bytes:
    """Return a document if it keeps to the bounds that it will be read with.

    Raises:
        InvalidInputError: it does not; nobody could read it back.
    """
    if len(data) > limit or _count(data) > MOST_VALUES:
        msg = (
            f"{what} would have {len(data)} bytes and {_count(data)} values, and may have {limit} and {MOST_VALUES};"
            " pass large lists as tensors or arrays, and texts as files beside the store"
        )
        raise InvalidInputError(msg)
    return data


def text(value: object) -> str:
    """Return a value that must be a string; raises TypeError otherwise."""
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value


def optional_text(value: object) -> str | None:
    """Return a value that must be a string or nothing; raises TypeError otherwise."""
    return None if value is None else text(value)


def whole_number(value: object) -> int:
    """Return a value that must be a whole number from 0 to :data:`LARGEST`; raises TypeError otherwise."""
    # Python counts booleans among whole numbers.
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise TypeError(type(value).__name__)
    return value


def number_or_none(value: object) -> float | None:
    """Return a value that must be a finite number with a fraction, or nothing; raises TypeError otherwise."""
    if value is None:
        return None
    if type(value) is not float or not math.isfinite(value):
        raise TypeError(type(value).__name__)
    return value


def _count(data: bytes) -> int:
    """Return at least as many as a document has values: these characters may also stand in strings."""
    return data.count(b",") + data.count(b"[") + data.count(b"{") + data.count(b":")


def _check_count(data: bytes) -> None:
    if _count(data) > MOST_VALUES:
        msg = "it holds more values than any"
        raise UnfitError(msg)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a key that is there twice, parsers differ in which they take: what one checks, another would not use.
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "it names a key twice"
        raise UnfitError(msg)
    return found


def _refuse(constant: str) -> NoReturn:
    msg = f"it holds {constant}, which is not JSON"
    raise UnfitError(msg)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(digits[:20])
    return number


def _check_depth(described: dict[str, Any]) -> None:
    """Refuse depth that functions which call themselves, and there are many, could not follow."""
    level: list[Any] = [described]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for held in level
            for inner in (held.values() if isinstance(held, dict) else held)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    msg = "it nests deeper than any"
    raise UnfitError(msg)
