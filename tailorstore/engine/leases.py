"""Keeps claims alive: a thread renews the leases of this process's commits and readers."""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta

from tailorstore.domain.errors import TailorError

logger = logging.getLogger("tailorstore")


_keepers: "weakref.WeakSet[LeaseKeeper]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The parent's leases are the parent's to renew and to give back, and its thread did not come along.
    for keeper in _keepers:
        keeper._start_empty()  # noqa: SLF001 - the same module


os.register_at_fork(after_in_child=_after_fork_in_child)


class LeaseKeeper:
    """Renews leases three times in their life, from one daemon thread that runs only while there are any.

    A lease that cannot be renewed lapses; the catalog decides then, not this process: a commit that lost its lease
    is refused at its publication.
    """

    def __init__(
        self,
        renew: Callable[[Sequence[str], timedelta], list[str]],
        release: Callable[[Sequence[str]], None],
        lease: timedelta,
    ) -> None:
        """Take the catalog's two verbs and how long a lease lives."""
        self.lease = lease
        self._renew = renew
        self._release = release
        self._closed = False
        self._start_empty()
        _keepers.add(self)

    def _start_empty(self) -> None:
        self._held: set[str] = set()
        self._dropped: list[str] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def hold(self, lease_id: str) -> None:
        """Renew a lease from now on."""
        with self._changed:
            self._held.add(lease_id)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="tailorstore-leases", daemon=True)
                self._thread.start()

    def forget(self, lease_id: str) -> None:
        """Stop renewing a lease that ended by itself."""
        with self._changed:
            self._held.discard(lease_id)

    def drop(self, lease_id: str) -> None:
        """Give a reader's lease back, soon: safe to call from a finaliser, where no query may run."""
        if lease_id in self._held:
            self._dropped.append(lease_id)

    def release(self, lease_id: str) -> None:
        """Give a reader's lease back now. A catalog that cannot be reached lets it lapse."""
        self.forget(lease_id)
        self._give_back([lease_id])

    def close(self) -> None:
        """Give all readers' leases back and end the thread."""
        with self._changed:
            self._closed = True
            held, self._held = list(self._held), set()
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None:
            thread.join()
        if held:
            self._give_back(held)

    def _give_back(self, lease_ids: list[str]) -> None:
        try:
            self._release(lease_ids)
        except TailorError as error:
            logger.debug("leases not given back, they lapse by themselves: %s", error)

    def _run(self) -> None:
        period = self.lease.total_seconds() / 3
        while True:
            with self._changed:
                # Not a plain wait: the keeper may have been closed before this thread came here.
                if self._changed.wait_for(lambda: self._closed, period):
                    return
                dropped, self._dropped = self._dropped, []
                self._held -= set(dropped)
                held = list(self._held)
            if dropped:
                self._give_back(dropped)
            if held:
                self._renew_quietly(held)

    def _renew_quietly(self, held: list[str]) -> None:
        try:
            alive = set(self._renew(held, self.lease))
        except TailorError as error:
            logger.warning("leases could not be renewed, will try again: %s", error)
            return
        with self._changed:
            self._held -= set(held) - alive
