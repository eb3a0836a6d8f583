"""The thread that keeps leases alive ends when it is told to, and not a period later."""

import time
from datetime import timedelta

from tailorstore.engine.leases import LeaseKeeper


def test_a_keeper_that_is_closed_at_once_does_not_wait_for_its_period() -> None:
    started = time.monotonic()
    for _ in range(200):
        keeper = LeaseKeeper(lambda ids, _: list(ids), lambda _: None, timedelta(minutes=5))
        keeper.hold("lease")
        keeper.close()
    assert time.monotonic() - started < 30
