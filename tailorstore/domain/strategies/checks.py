"""Checks of what strategies are given, and sizes as people write them."""

import difflib
import math
import re
from collections.abc import Iterable

from tailorstore.domain.errors import MaskError
from tailorstore.domain.mask import Strategy
from tailorstore.domain.records import MEASURES

IMPORTANCE = "importance"
"""What :attr:`LayerState.importance` is asked for by; stands beside the names of :data:`MEASURES`."""

_UNITS = {"B": 1} | {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGTP", start=1)
    for infix, base in (("", 1000), ("I", 1024))
}
_SIZE = re.compile(r"([0-9]{1,18}(?:_[0-9]{1,18}){0,9}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)")


def check_whole(owner: str, name: str, value: object, least: int = 1) -> None:
    """Refuse what is not a whole number of at least ``least``.

    Raises:
        MaskError: names the strategy and the argument.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        msg = f"{owner}: {name} is {value!r}; it must be a whole number of at least {least}"
        raise MaskError(msg)


def check_flag(owner: str, name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        msg = f"{owner}: {name} is {value!r}; it must be True or False"
        raise MaskError(msg)


def check_one_of(owner: str, name: str, value: object, known: Iterable[str]) -> None:
    """Refuse a name that is not known; the error has the nearest and all of them."""
    names = list(known)
    if not isinstance(value, str) or value not in names:
        msg = f"{owner}: {name} is {value!r}; {known_names(value, names)}"
        raise MaskError(msg)


def check_measure(owner: str, by: object) -> None:
    """Refuse what is no measure."""
    check_one_of(owner, "by", by, (*MEASURES, IMPORTANCE))


def check_strategy(owner: str, name: str, value: object) -> None:
    """Refuse what is not a strategy object; a class with a ``select`` is none."""
    if isinstance(value, type) or not isinstance(value, Strategy):
        msg = f"{owner}: {name} is {value!r}; it must be a strategy, as parity() or top_k(8)"
        raise MaskError(msg)


def known_names(given: object, names: Iterable[str]) -> str:
    """Return the end of a message on an unknown name: those nearest to it, and all."""
    names = list(names)
    near = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    nearest = f"nearest: {', '.join(map(repr, near))}; " if near else ""
    return f"{nearest}known are {', '.join(names)}"


def parse_bytes(size: object, owner: str = "size") -> int:
    """Return a size in bytes: a whole number, or a text with a unit of 1000s (kB, MB, …) or 1024s (KiB, MiB, …).

    Args:
        size: what a person gave.
        owner: what the size is of, for the message.

    Raises:
        MaskError: not a size, or less than one byte.

    Examples:
        >>> parse_bytes("2GB"), parse_bytes("1.5 MiB"), parse_bytes("2_000_000"), parse_bytes(7e9)
        (2000000000, 1572864, 2000000, 7000000000)
    """
    count: float | None = None
    if isinstance(size, str):
        matched = _SIZE.fullmatch(size.strip())
        unit = _UNITS.get((matched[2] or "B").upper()) if matched else None
        if matched and unit:
            count = int(matched[1]) * unit if "." not in matched[1] else float(matched[1]) * unit
    elif isinstance(size, int | float) and not isinstance(size, bool) and math.isfinite(size) and size == int(size):
        count = size
    if count is None or count < 1 or not math.isfinite(count):
        msg = f"{owner} is {size!r}; write bytes, at least 1, as 2_000_000, '2GB' or '500 MiB'"
        raise MaskError(msg)
    return int(count)


def show_bytes(count: float) -> str:
    """Return a size as people read it, exact below 10 kB.

    Examples:
        >>> show_bytes(1234), show_bytes(2_500_000_000)
        ('1234 bytes', '2.5 GB')
    """
    if count < 10_000:
        return f"{count:.0f} bytes"
    power = min(int(math.log10(count)) // 3, 5)
    return f"{count / 1000**power:.4g} {' kMGTP'[power]}B"
