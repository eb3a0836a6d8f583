"""The catalog's clock: transactions that wait for each other are in the order of their times."""

import threading
import time

from sqlalchemy import select

from tailorstore.catalog import StoreCatalog
from tailorstore.catalog.tables import stores
from tests.catalog.kit import commit


def test_a_change_that_waited_for_another_has_the_later_time(store: StoreCatalog) -> None:
    first = commit(store, 10)
    second = commit(store, 20)
    locked, waiting = threading.Event(), threading.Event()

    def hold(connection: object) -> None:
        connection.execute(select(stores.c.pk).with_for_update())  # type: ignore[attr-defined]
        locked.set()
        waiting.wait(30)
        # Until the other transaction has come to the lock, and a little longer.
        time.sleep(0.3)

    holder = threading.Thread(target=lambda: store._database.write(hold))
    holder.start()
    assert locked.wait(30)
    before = time.monotonic()
    started = store.now()
    waiting.set()
    moved = store.branch("main", first.id, move=True)
    waited = time.monotonic() - before
    holder.join()
    again = store.branch("main", second.id, move=True)
    assert moved is not None
    assert again is not None
    assert waited > 0.25
    assert (moved - started).total_seconds() > 0.25, "the time from before the wait"
    assert moved < again
