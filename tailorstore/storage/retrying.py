"""Trying again what may go well the next time. Standard library and domain only.

The transports' libraries repeat requests themselves, but not all that can be repeated: obstore gives up on a deletion
whose connection is reset and on a listing that breaks off, botocore on an answer of 429. Every call to a root can be
repeated: objects are put under fresh keys, the same bytes each time, and what is deleted stays deleted.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tailorstore.domain.errors import StorageUnavailableError
from tailorstore.storage.arrivals import by_folder
from tailorstore.storage.threads import map_in_threads
from tailorstore.storage.transport import (
    DeleteFailures,
    Memory,
    ObjectInfo,
    Objects,
    Observe,
    flat_parts,
    size_in_bytes,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

RETRY_SECONDS = 60.0
"""No retry begins later than this after a call's first attempt, however it is made: a server's restart is survived, an
outage is reported."""

_LONGEST_PAUSE_SECONDS = 8.0
_SILENT_SECONDS = 5.0
"""How long an outage is waited for without a word."""

logger = logging.getLogger("tailorstore")


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long calls are repeated."""

    seconds: float = RETRY_SECONDS
    """From the first attempt of a call to the beginning of its last."""
    attempts: int | None = None
    """At most so many; ``None`` for as many as the time allows."""
    pause_seconds: float = 0.2
    """The first pause is drawn from up to this, each later one from up to twice as much as the one before."""


class Retrying:
    """Objects whose calls are repeated where they fail for want of an answer, with growing random pauses between."""

    def __init__(self, objects: Objects, patience: Patience | None = None) -> None:
        """Take the objects to ask."""
        self._objects = objects
        self._patience = patience or Patience()
        self._told_at: float | None = None

    def __repr__(self) -> str:
        """Name what is asked."""
        return repr(self._objects)

    @property
    def url(self) -> str:
        """See :attr:`Objects.url`."""
        return self._objects.url

    @property
    def workers(self) -> int:
        """See :attr:`Objects.workers`."""
        return self._objects.workers

    @property
    def copies_on_put(self) -> int:
        """See :attr:`Objects.copies_on_put`."""
        return self._objects.copies_on_put

    def put(self, key: str, data: "Buffer | Sequence[memoryview]", observe: Observe | None = None) -> int:
        """Put the same bytes until they are taken; see :meth:`Objects.put`."""
        if observe is not None:
            # Once, however often they are put.
            for part in flat_parts(data):
                observe(part)
        return self._repeat(lambda: self._objects.put(key, data))

    def get(self, key: str, *, limit: int | None = None) -> memoryview:
        """See :meth:`Objects.get`."""
        return self._repeat(lambda: self._objects.get(key, limit=limit))

    def read_into(self, key: str, target: Memory, observe: Observe | None = None, size: int | None = None) -> None:
        """Fill the target, its beginning perhaps by an attempt that broke off; see :meth:`Objects.read_into`."""
        if observe is None:
            self._repeat(lambda: self._objects.read_into(key, target, None, size))
            return
        shown = 0

        def watch(block: memoryview) -> None:
            nonlocal shown
            observe(block)
            shown += block.nbytes

        def attempt() -> None:
            if not shown:
                self._objects.read_into(key, target, watch, size)
                return
            # What was shown lies in the target and stays there: what is written over it now might differ from it, and
            # its digest would not tell.
            wanted = size_in_bytes(target)
            whole = memoryview(bytearray(wanted))
            self._objects.read_into(key, whole, None, wanted if size is None else size)
            _fill_rest(target, whole, shown, observe)

        self._repeat(attempt)

    def replace(self, key: str, data: "Buffer", *, exclusive: bool = False) -> None:
        """See :meth:`Objects.replace`."""
        self._repeat(lambda: self._objects.replace(key, data, exclusive=exclusive))

    def exists(self, key: str) -> bool:
        """See :meth:`Objects.exists`."""
        return self._repeat(lambda: self._objects.exists(key))

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        """List, from the beginning where it breaks off, and yield each object once; see :meth:`Objects.list`."""
        seen: set[str] = set()
        tries = _Tries(self._patience)
        while True:
            try:
                for info in self._objects.list(prefix, after=after):
                    if info.key not in seen:
                        seen.add(info.key)
                        # The time that counts is that without an answer.
                        tries = _Tries(self._patience)
                        yield info
            except StorageUnavailableError as error:
                tries.pause_after(error)
                self._tell(tries)
            else:
                return

    def delete(self, keys: Sequence[str]) -> DeleteFailures:
        """Delete until it is answered; what is gone by then is no failure; see :meth:`Objects.delete`."""
        return self._repeat(lambda: self._objects.delete(keys))

    def confirm(self, sizes: Mapping[str, int]) -> None:
        """Ask for each folder until all of it has arrived; see :meth:`Objects.confirm`."""

        # By folder, so that one question that fails does not make all of them be asked again.
        def confirm(part: Mapping[str, int]) -> None:
            self._repeat(lambda: self._objects.confirm(part))

        map_in_threads(confirm, list(by_folder(sizes).values()), self.workers)

    def close(self) -> None:
        """See :meth:`Objects.close`."""
        self._objects.close()

    def _repeat(self, call: Callable[[], T]) -> T:
        tries = _Tries(self._patience)
        while True:
            try:
                return call()
            except StorageUnavailableError as error:
                tries.pause_after(error)
                self._tell(tries)

    def _tell(self, tries: "_Tries") -> None:
        """Say that storage is waited for, once an outage: many calls meet the same one."""
        now = time.monotonic()
        if tries.spent() < _SILENT_SECONDS or (self._told_at is not None and now - self._told_at < RETRY_SECONDS):
            return
        self._told_at = now
        logger.warning("waiting for the storage %s (up to %g s)", self.url, self._patience.seconds)


class _Tries:
    """The attempts of one call."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._started = time.monotonic()
        self._failed = 0

    def spent(self) -> float:
        """Return the seconds since the first attempt."""
        return time.monotonic() - self._started

    def pause_after(self, error: StorageUnavailableError) -> None:
        """Wait a while before the next attempt.

        Raises:
            StorageUnavailableError: there is to be none; says how often it was tried.
        """
        self._failed += 1
        longest = min(_LONGEST_PAUSE_SECONDS, self._patience.pause_seconds * 2 ** (self._failed - 1))
        # Drawn from all of it, so that many clients that failed together do not come back together.
        pause = random.uniform(0, longest)  # noqa: S311 - no secret
        spent = self.spent()
        if self._failed == self._patience.attempts or spent + pause > self._patience.seconds:
            msg = f"{error} [tried {self._failed} times in {spent:.0f} s]"
            raise StorageUnavailableError(msg) from error
        time.sleep(pause)


def _fill_rest(target: Memory, whole: memoryview, start: int, observe: Observe) -> None:
    """Copy to the target, from ``start`` on, and show what was copied."""
    at = 0
    for part in [target] if isinstance(target, memoryview) else target:
        rest = part[max(0, start - at) :]
        if rest.nbytes:
            begin = at + part.nbytes - rest.nbytes
            rest[:] = whole[begin : begin + rest.nbytes]
            observe(rest)
        at += part.nbytes
