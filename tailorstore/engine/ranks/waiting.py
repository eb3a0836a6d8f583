"""A word to who waits very long for other ranks."""

import logging
import threading
import time

logger = logging.getLogger("tailorstore")

SILENT_SECONDS = 30.0
"""How long a wait may be without a word."""


class Waiting:
    """Watches the waits of one process, one at a time, from a thread that runs only while there are long ones."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._what: str | None = None
        self._since = 0.0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, what: str) -> None:
        """A wait begins; ``what`` says whose and where."""
        self._since, self._what = time.monotonic(), what
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="tailorstore-waiting", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """The wait is over."""
        self._what = None

    def close(self) -> None:
        """Watch no more."""
        self._what = None
        self._closed.set()

    def _run(self) -> None:
        told = None
        while not self._closed.wait(SILENT_SECONDS / 6):
            what, since = self._what, self._since
            if what is not None and since != told and time.monotonic() - since > SILENT_SECONDS:
                told = since
                logger.warning(
                    "%s, for %d s now. Every rank must make the same calls of a store in the same order; one that is to"
                    " use it alone opens it with ranks='alone', and ranks_timeout says how long to wait",
                    *(what, SILENT_SECONDS),
                )
