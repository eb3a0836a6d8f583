"""Transactions: the one way in which SQL reaches a database.

A transaction is a function of a connection, so that it can be run again: after a deadlock, a lock that was held too
long, or an outage of the server.
"""

import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TypeVar

from sqlalchemy import ColumnElement, Connection, Engine, Table, delete, func, literal, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from tailorstore.catalog.failures import Obstacle, damaged, obstacle, translate, unreadable
from tailorstore.catalog.sqlite import LOCK_SECONDS, WRITES, SqliteFile
from tailorstore.catalog.tables import UtcDateTime, receipts
from tailorstore.catalog.urls import CatalogUrl
from tailorstore.domain.errors import AccessDeniedError, MissingDependencyError, TailorError
from tailorstore.domain.names import new_id

logger = logging.getLogger("tailorstore")

T = TypeVar("T")

OUTAGE_SECONDS = 60
"""How long a server that was there is waited for: it may be restarted, or replaced by its standby."""

OPENING_SECONDS = 10
"""How long a server is waited for that has never answered: it may be restarted, but the URL may also be wrong."""

_SILENT_SECONDS = 2
"""How long it is waited for without a word."""

_LONGEST_PAUSE = 1.0
_RECEIPTS_LAST = timedelta(days=1)


class Database:
    """A database and its pool of connections; used by many threads, and by children after a fork.

    Args:
        url: of the database.
        create: make the file of a SQLite database, and its folder, if it is not there.
        migrating: one connection that may change the schema, with foreign keys off on SQLite, where changing a
            table means replacing it.

    Raises:
        AccessDeniedError: the file or folder may not be read or made.
        CatalogUnavailableError: the folder cannot be made.
        StoreNotFoundError: there is no file, and making one was not asked for.
        MissingDependencyError: the driver is not installed.
    """

    def __init__(self, url: CatalogUrl, *, create: bool = False, migrating: bool = False) -> None:
        self.url = url
        self._file = SqliteFile(url, url.path, create=create, migrating=migrating) if url.path is not None else None
        self.is_sqlite = self._file is not None
        self.read_only = self._file is not None and self._file.read_only
        self._outage = _Outage(url.shown)
        self._engine = (
            self._file.engine() if self._file else _postgres_engine(url, self._outage.tell, migrating=migrating)
        )
        readers = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._readers: Engine = self._engine.execution_options(**readers)
        self._writers: Engine = self._engine.execution_options(**{WRITES: True})
        _open_databases.add(self)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction that sees one moment of the database and changes nothing.

        Raises:
            AccessDeniedError: the credentials or the file's permissions do not allow it.
            CatalogUnavailableError: the database does not answer, or not for as long as it is waited for.
            CatalogDamagedError: the database is not what was written.
        """
        return self._run(self._readers, work)

    def write(self, work: Callable[[Connection], T], *, once: bool = False) -> T:
        """Run ``work`` in a transaction that takes effect as a whole or not at all.

        Args:
            work: is run again from the start after a deadlock or an outage.
            once: running it again after it took effect would do harm, or answer otherwise. Then it leaves a receipt,
                which tells where the reply to the commit was lost.

        Raises:
            AccessDeniedError: the catalog is open read-only, or the credentials do not allow it.
            CatalogUnavailableError: the database does not answer, or not for as long as it is waited for; nothing
                was changed, except where the message says that the outcome is unknown.
            CatalogDamagedError: the database is not what was written; nothing was changed.
        """
        if self.read_only:
            msg = f"the catalog {self.url.shown} is open read-only: its file or credentials do not allow writing"
            raise AccessDeniedError(msg)
        # A file's reply to a commit cannot get lost.
        return self._run(self._writers, work if self.is_sqlite or not once else self._with_receipt(work))

    def clock(self) -> ColumnElement[datetime]:
        """Return the SQL for the catalog's clock: the server's where there is one, so that all clients agree."""
        if self.is_sqlite:
            return literal(datetime.now(UTC), UtcDateTime())
        return func.clock_timestamp(type_=UtcDateTime())

    def now(self, connection: Connection) -> datetime:
        """Return the catalog's time."""
        return connection.execute(select(self.clock())).scalar_one()

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """Return an INSERT that knows ON CONFLICT, which the two databases spell alike but SQLAlchemy keeps apart."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def find_out_whether_read_only(self, connection: Connection, tables: tuple[str, ...]) -> None:
        """Note, on Postgres, whether this user can write to all of ``tables`` on this server."""
        if self.is_sqlite:
            return
        wanted = " AND ".join(
            f"has_table_privilege('{table}', '{right}')" for table in tables for right in ("INSERT", "UPDATE", "DELETE")
        )
        able = text(
            f"SELECT NOT pg_is_in_recovery() AND current_setting('default_transaction_read_only') = 'off' AND {wanted}"
        )
        self.read_only = not connection.scalar(able)

    def close(self) -> None:
        """Close all connections. Using the database again opens new ones."""
        self._engine.dispose()

    def leave_connections(self) -> None:
        """Start afresh in the child of a fork."""
        # The child must neither use nor close what it inherited: closing would end the parent's session on Postgres,
        # and could remove the parent's locks and write-ahead log on SQLite. So the old pool is kept for ever.
        _inherited.append(self._engine.pool)
        self._engine.dispose(close=False)

    def _with_receipt(self, work: Callable[[Connection], T]) -> Callable[[Connection], T]:
        receipt = new_id()
        answers: list[T] = []

        def receipted(connection: Connection) -> T:
            now = self.now(connection)
            mine = self.insert(receipts).values(receipt_id=receipt, created_at=now).on_conflict_do_nothing()
            # An earlier attempt may still be on its way through the server: this waits until that is decided.
            if connection.scalar(mine.returning(receipts.c.receipt_id)) is None:
                return answers[-1]
            connection.execute(delete(receipts).where(receipts.c.created_at < now - _RECEIPTS_LAST))
            answers.append(work(connection))
            return answers[-1]

        return receipted

    def _run(self, engine: Engine, work: Callable[[Connection], T]) -> T:
        patience = _Patience(self._outage)
        outcome_unknown = False
        while True:
            committing = False
            refusal = None
            try:
                self._check_file()
                with engine.connect() as connection, connection.begin() as transaction:
                    result = work(connection)
                    committing = True
                    transaction.commit()
                self._check_file()
                self._outage.end()
                return result
            except SQLAlchemyError as error:
                kind = obstacle(error)
                outcome_unknown |= committing and kind == "outage"
                if kind is None or patience.is_over(kind):
                    besides = f"; it was waited for, {self._outage.patience} s in all" if kind == "outage" else ""
                    if outcome_unknown:
                        besides += "; the connection broke during a commit, so look whether it took effect"
                    refusal = translate(error, self.url, besides)
                elif kind == "outage":
                    self._outage.tell_in_time()
            except ValueError as error:
                if isinstance(error, TailorError):
                    raise
                refusal = damaged(unreadable(error), self.url), error
            # Not where the driver's error would be the context of ours: psycopg's hold the password.
            if refusal is not None:
                raise refusal[0] from refusal[1]
            time.sleep(patience.pause())

    def _check_file(self) -> None:
        if self._file is not None:
            self._file.check_same()


class _Outage:
    """Since when a server has not answered: one for all calls, which share the time that it is waited for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.patience = OPENING_SECONDS
        self._began: float | None = None
        self._seen = 0.0
        self._told = False

    def end(self) -> None:
        """Note that it answered."""
        self.patience = OUTAGE_SECONDS
        self._began = None
        self._told = False

    def tell(self) -> None:
        """Say, once, what is waited for."""
        told, self._told = self._told, True
        if not told:
            logger.warning("waiting for the catalog %s (up to %g s)", self._name, self.patience)

    def tell_in_time(self) -> None:
        """Say it if it has lasted for a while."""
        if self._began is not None and time.monotonic() - self._began >= _SILENT_SECONDS:
            self.tell()

    def is_too_long(self, since: float) -> bool:
        """Note that it did not answer one who asks ``since`` a time; tell whether it has been waited for long enough.

        So a commit that fails gives its claim up at once, and closing the store takes no further minute.
        """
        now = time.monotonic()
        # If nobody asked for a while, it may well have been there in between.
        if self._began is None or since - self._seen > self.patience:
            self._began = now
        self._seen = now
        return now - self._began > self.patience


class _Patience:
    """How long one transaction is tried."""

    def __init__(self, outage: _Outage) -> None:
        self._outage = outage
        self._began = time.monotonic()
        self._attempts = 0

    def is_over(self, kind: Obstacle) -> bool:
        """Note a failed attempt; tell whether it was the last one."""
        self._attempts += 1
        if kind == "outage":
            return self._outage.is_too_long(self._began)
        return time.monotonic() - self._began > LOCK_SECONDS

    def pause(self) -> float:
        """Return how many seconds to wait before the next one: doubling, and by chance, so that two part."""
        return min(_LONGEST_PAUSE, 0.01 * 2.0**self._attempts) * random.uniform(0.5, 1.5)  # noqa: S311


_open_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_inherited: list[object] = []


def _after_fork_in_child() -> None:
    for database in list(_open_databases):
        database.leave_connections()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _postgres_engine(url: CatalogUrl, waits: Callable[[], None], *, migrating: bool) -> Engine:
    try:
        # Only now: the driver is an optional package.
        from tailorstore.catalog.postgres import postgres_engine

        return postgres_engine(url.url, partial(threading.Timer, _SILENT_SECONDS, waits), migrating=migrating)
    except ImportError as error:
        msg = "a catalog in PostgreSQL needs psycopg: pip install 'psycopg[binary]'"
        raise MissingDependencyError(msg) from error
