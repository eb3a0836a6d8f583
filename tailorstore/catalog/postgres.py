"""Connections to PostgreSQL: none of them waits for ever, whoever fell silent.

Imported only for a catalog in PostgreSQL, since the driver is an optional package.
"""

import time
from collections.abc import Callable
from threading import Timer
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import URL, Engine, create_engine, event

T = TypeVar("T")

CONNECT_SECONDS = 10
"""How long a server may take to let a client in."""

SILENCE_SECONDS = 300
"""How long a server whose machine is there may take to answer a statement: it may be stopped, or hang."""

LOCK_WAIT_SECONDS = 10
"""How long a statement waits for a lock before its transaction lets go of those that it holds, and begins anew."""

IDLE_SECONDS = 20
"""How long a transaction may stand idle. Shorter than others wait for locks: they outlast a client that died in it."""

_TCP = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4, "tcp_user_timeout": 30_000}
"""A machine that is gone, or a network that drops everything, is noticed after 30 s."""

_SERVER_TCP = ("SET tcp_keepalives_idle = 10", "SET tcp_keepalives_interval = 5", "SET tcp_keepalives_count = 4")
"""So the server notices a client's machine that is gone, and does not keep its locks for hours: while it waits for the
rest of several statements sent together its session counts as at work, not as idle."""


class HeedfulConnection(psycopg.Connection[Any]):
    """A connection that gives up a server that says nothing for too long; the driver alone would wait for ever."""

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:  # noqa: ANN401 - as the driver's version has them
        """Carry a conversation with the server on to its end.

        Raises:
            psycopg.OperationalError: the server said nothing for too long; the connection is closed.
        """
        try:
            return super().wait(_heard(gen), *args, **kwargs)
        except _SilentError:
            self.close()
            raise


class _SilentError(psycopg.OperationalError):
    """The server is there and says nothing."""


def _heard(gen: PQGen[T]) -> PQGen[T]:
    """Carry on what ``gen`` does, which is woken several times a second, whether there is something to read or not."""
    deadline = time.monotonic() + SILENCE_SECONDS
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if ready:
                deadline = time.monotonic() + SILENCE_SECONDS
            elif time.monotonic() > deadline:
                msg = f"the server said nothing for {SILENCE_SECONDS} s"
                raise _SilentError(msg)
            wanted = gen.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result


def postgres_engine(url: URL, timer: Callable[[], Timer], *, migrating: bool) -> Engine:
    """Return the engine of a database; options in its URL count more than those of this module.

    Args:
        url: of the database.
        timer: makes what is started while a server is being connected to, and cancelled when it has answered.
        migrating: changing the schema of a large catalog may take any time, between statements as well.
    """
    arguments = {"connect_timeout": CONNECT_SECONDS, "application_name": "tailorstore", **_TCP}
    engine = create_engine(
        url,
        connect_args={key: value for key, value in arguments.items() if key not in url.query},
        hide_parameters=True,
        # A trainer publishes every few minutes: its connection may have been cut in between.
        pool_pre_ping=True,
        pool_size=4,
        max_overflow=12,
        use_native_hstore=False,
    )
    kind: type[psycopg.Connection[Any]] = psycopg.Connection if migrating else HeedfulConnection
    limits = [f"SET lock_timeout = '{LOCK_WAIT_SECONDS}s'", *_SERVER_TCP]
    if not migrating:
        limits.append(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")

    @event.listens_for(engine, "do_connect")
    def connect(
        _dialect: object, _record: object, args: list[Any], parameters: dict[str, Any]
    ) -> psycopg.Connection[Any]:
        waiting = timer()
        waiting.daemon = True
        waiting.start()
        try:
            connection = kind.connect(*args, **parameters)
        finally:
            waiting.cancel()
        try:
            connection.execute("; ".join(limits).encode())
            connection.commit()
        except BaseException:
            connection.close()
            raise
        return connection

    return engine
