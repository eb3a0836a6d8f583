"""Threads that share a heap of small jobs. Standard library only.

Plain threads rather than an executor: executors refuse work once the interpreter begins to exit, which is just when
a commit in the background must be finished.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Job = Callable[[], "Iterable[Job] | None"]
"""Does one piece of work; may return further jobs."""


def run_jobs(jobs: Iterable[Job], workers: int) -> None:
    """Run jobs, and the jobs they return, on several threads; the calling thread is one of them.

    Raises:
        BaseException: the first error of any job. Jobs that run then are finished, all others dropped; no interrupt
            of the calling thread makes it return before that.
    """
    heap = _Heap(jobs)
    helpers = [threading.Thread(target=heap.work, name=f"tailorstore-{number}") for number in range(1, workers)]
    started = []
    try:
        for helper in helpers:
            helper.start()
            started.append(helper)
        heap.work()
    except BaseException as error:  # an interrupt of the calling thread outside a job, or no more threads
        heap.fail(error)
        raise
    finally:
        heap.settle()
    for helper in started:
        helper.join()
    if heap.error is not None:
        raise heap.error


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """Return what a function gives for each item, in their order.

    Raises:
        BaseException: the first error of any call.
    """
    found: dict[int, Result] = {}

    def job(at: int) -> Job:
        def run() -> None:
            found[at] = function(items[at])

        return run

    run_jobs([job(at) for at in range(len(items))], min(workers, len(items)))
    return [found[at] for at in range(len(items))]


class _Heap:
    def __init__(self, jobs: Iterable[Job]) -> None:
        self.waiting = deque(jobs)
        self.error: BaseException | None = None
        self._busy: set[int] = set()
        """Threads that are at a job."""
        self._changed = threading.Condition()

    def work(self) -> None:
        while (job := self._take()) is not None:
            try:
                more = job()
            except BaseException as error:  # noqa: BLE001 - handed to the caller of run_jobs
                self.fail(error)
                more = None
            self._done(more)

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self.waiting.clear()
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until no other thread is at a job; an interrupt of this one is raised only then.

        What helpers write must not come after whoever cleans up has begun. Joining them would not do: in CPython an
        interrupted ``join`` takes a thread for ended that still runs.
        """
        interrupt: BaseException | None = None
        settled = False
        while not settled:
            try:
                with self._changed:
                    # An interrupt may have kept this thread from saying so itself.
                    self._busy.discard(threading.get_ident())
                    self._changed.wait_for(lambda: not self._busy)
                settled = True
            except BaseException as error:  # noqa: BLE001 - raised below
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _take(self) -> Job | None:
        with self._changed:
            while not self.waiting and self._busy and self.error is None:
                self._changed.wait()
            if not self.waiting:
                return None
            self._busy.add(threading.get_ident())
            return self.waiting.popleft()

    def _done(self, more: Iterable[Job] | None) -> None:
        with self._changed:
            self._busy.discard(threading.get_ident())
            if more is not None and self.error is None:
                # First what was begun: else every job's intermediate results would be in memory at once.
                self.waiting.extendleft(reversed(list(more)))
            if self.waiting or not self._busy:
                self._changed.notify_all()


def in_turn(jobs: Sequence[Job], follow: Job) -> list[Job]:
    """Return the jobs, changed so that the last of them to end also gives ``follow`` to be run.

    Jobs among them must not return further jobs that ``follow`` depends on.
    """
    if not jobs:
        return [follow]
    left = [len(jobs)]
    lock = threading.Lock()

    def wrap(job: Job) -> Job:
        def run() -> Iterable[Job]:
            more = list(job() or ())
            with lock:
                left[0] -= 1
                last = not left[0]
            return [*more, follow] if last else more

        return run

    return [wrap(job) for job in jobs]


class MemoryBudget:
    """Bounds the bytes that jobs hold at once, however many threads and however large the model."""

    def __init__(self, limit_bytes: int) -> None:
        """Allow ``limit_bytes`` in all; one job larger than that runs alone."""
        self._limit = limit_bytes
        self._held = 0
        self._changed = threading.Condition()

    def hold(self, size_bytes: int) -> AbstractContextManager[None]:
        """Wait until ``size_bytes`` fit, and hold them until the context ends."""
        return self._hold(size_bytes) if size_bytes else nullcontext()

    @contextmanager
    def _hold(self, size_bytes: int) -> Iterator[None]:
        with self._changed:
            while self._held and self._held + size_bytes > self._limit:
                self._changed.wait()
            self._held += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= size_bytes
                self._changed.notify_all()
