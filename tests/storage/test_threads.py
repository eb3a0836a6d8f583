"""Threads that share jobs: whatever interrupts the calling one, nothing goes on behind its back."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tailorstore.storage.threads import run_jobs


class Interrupt(BaseException):
    """What Ctrl-C would raise, but for pytest."""


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Interrupt this thread again and again for as long as the test lasts."""

    def raise_it(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, raise_it)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("delay", [0.01, 0.05, 0.12])
@pytest.mark.parametrize("again", [0.0, 0.03])
def test_no_helper_is_at_a_job_when_an_interrupt_is_raised(delay: float, again: float) -> None:
    at_work = set()
    done = []

    def job() -> None:
        me = threading.get_ident()
        at_work.add(me)
        try:
            # Helpers take their time, as puts do, and cannot be interrupted; this thread can.
            time.sleep(0.02 if threading.current_thread() is threading.main_thread() else 0.2)
            done.append(me)
        finally:
            at_work.discard(me)

    signal.setitimer(signal.ITIMER_REAL, delay, again)
    left_at = set()
    try:
        run_jobs([job] * 200, 4)
    except Interrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        left_at = set(at_work)
    else:
        pytest.fail("the interrupt was swallowed")
    assert not left_at
    count = len(done)
    time.sleep(0.3)
    assert len(done) == count < 200
