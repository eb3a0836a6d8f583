"""How long requests may take. Standard library and domain only.

A server that says nothing must be told from a slow link soon enough to ask again, and objects of 32 MiB must still
pass over slow links. Reads can be watched as they arrive. What is written can not: there a deadline is all there is,
so the first one suits an ordinary link, and only a request that missed it gets one for a slow link.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tailorstore.domain.errors import InvalidInputError

T = TypeVar("T")

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 20.0
"""How long a server may say nothing: two such silences in a row leave time for a third attempt within a minute."""
READ_SECONDS = 600.0
"""For all of an answer, however steadily it drips."""

_QUICK_BYTES_PER_SECOND = 1_000_000
_SLOW_BYTES_PER_SECOND = 250_000
_CLASSES = (256 << 10, 4 << 20, 32 << 20)
"""Sizes of objects that share a deadline, and with it a pool of connections."""


class PutDeadlines:
    """Chooses deadlines for puts, and remembers whether the link is slow."""

    def __init__(self, silence_seconds: float = SILENCE_SECONDS) -> None:
        """Allow so much time for the server's answer, on top of what the bytes take."""
        self._silence_seconds = silence_seconds
        self._slow = False

    def run(self, size: int, attempt: Callable[[float], T]) -> T:
        """Return what ``attempt`` does with a deadline in seconds; if it misses that, with a longer one.

        Args:
            size: of the object, in bytes.
            attempt: puts it; raises whatever it likes.
        """
        limit = _size_class(size)
        quick = self._silence_seconds + limit / _QUICK_BYTES_PER_SECOND
        if not self._slow:
            started = time.monotonic()
            try:
                return attempt(quick)
            except Exception:
                if time.monotonic() - started < quick:
                    raise
        started = time.monotonic()
        try:
            return attempt(self._silence_seconds + limit / _SLOW_BYTES_PER_SECOND)
        finally:
            # One request that hung makes no slow link.
            self._slow = time.monotonic() - started > quick


def configured_attempts(config: Mapping[str, Any]) -> int | None:
    """Return how often a request is to be tried by botocore's configuration; ``None`` where that does not say.

    Raises:
        InvalidInputError: ``retries`` is not what botocore takes.
    """
    retries = config.get("retries") or {}
    words = {"total_max_attempts", "max_attempts", "mode"}
    if not isinstance(retries, Mapping) or not retries.keys() <= words:
        msg = f"storage option 'retries' must be a dictionary of {', '.join(sorted(words))}, not {retries!r}"
        raise InvalidInputError(msg)
    total, repeats = retries.get("total_max_attempts"), retries.get("max_attempts")
    if total is not None:
        return max(1, int(total))
    return None if repeats is None else max(0, int(repeats)) + 1


def _size_class(size: int) -> int:
    """Return the least size of those that share a deadline that is not below ``size``."""
    for limit in _CLASSES:
        if size <= limit:
            return limit
    return 1 << (size - 1).bit_length()
