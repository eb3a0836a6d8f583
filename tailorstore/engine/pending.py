"""A commit that is carried out behind the caller's back."""

import logging
import threading
import time
from collections.abc import Callable

from tailorstore.domain.errors import UnavailableError
from tailorstore.domain.records import Commit

logger = logging.getLogger("tailorstore")

_HEAD_START_SECONDS = 0.002


class PendingCommit:
    """A commit under way. The state was copied already: the model may change.

    The thread that carries it out is no daemon, so that a program that ends waits for its last commit.
    """

    def __init__(self, step: int, branch: str, carry_out: Callable[[], Commit]) -> None:
        """Describe it; :meth:`start` carries it out."""
        self.step = step
        self.branch = branch
        self._commit: Commit | None = None
        self._error: BaseException | None = None
        self._told = False
        self._finished = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(carry_out,), name=f"tailorstore-commit-{step}", daemon=False
        )
        # Taken by the thread, or by whoever gives it up: after an interrupt nobody knows whether it runs.
        self._begun = threading.Lock()

    def start(self) -> None:
        """Carry it out from now on.

        Raises:
            BaseException: an interrupt, or no more threads; call :meth:`give_up` then.
        """
        self._thread.start()

    def give_up(self, error: BaseException) -> bool:
        """Keep it from beginning, if it has not begun, and let it end with this error; return whether it has ended.

        An interrupt may come at any moment, also before :meth:`start` does anything.
        """
        if self._begun.acquire(blocking=False):
            self._told = True
            self._error = error
            self._finished.set()
        return self.done()

    def done(self) -> bool:
        """Tell whether it has been published or has failed."""
        return self._finished.is_set()

    def result(self, timeout: float | None = None) -> Commit:
        """Wait for the publication and return the commit.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it is still under way.
            TailorError: it failed, as ``Store.commit`` would have.
        """
        if not self._finished.wait(timeout):
            msg = f"the commit of step {self.step} on {self.branch!r} is still being written after {timeout} s"
            raise TimeoutError(msg)
        if self._error is not None:
            self._told = True
            raise self._error
        if self._commit is None:
            msg = f"the commit of step {self.step} on {self.branch!r} ended without a result"
            raise UnavailableError(msg)
        return self._commit

    def wait(self) -> None:
        """Wait until it has been published or has failed."""
        self._finished.wait()

    def settle(self) -> None:
        """Wait; raise its error if nobody has seen that yet."""
        self._finished.wait()
        if self._error is not None and not self._told:
            self._told = True
            raise self._error

    def _run(self, carry_out: Callable[[], Commit]) -> None:
        # Let the caller go first: it waits for the interpreter's lock, and this thread would hold it for milliseconds.
        time.sleep(_HEAD_START_SECONDS)
        if not self._begun.acquire(blocking=False):
            return
        try:
            self._commit = carry_out()
        except BaseException as error:  # noqa: BLE001 - kept for whoever asks
            # Logged at once as well: a program that ends without asking would never see it.
            logger.error("the commit of step %d on %r failed: %s", self.step, self.branch, error)  # noqa: TRY400
            self._error = error
        finally:
            self._finished.set()

    def __repr__(self) -> str:
        """Say how it stands."""
        state = "under way" if not self.done() else "failed" if self._error else "published"
        return f"<PendingCommit step {self.step} on {self.branch!r}, {state}>"
