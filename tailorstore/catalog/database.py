"""Connections and transactions: the one way in which SQL reaches a database.

A transaction is a function of a connection, so that it can be run again: after a deadlock, a lock that was held too
long, or a connection that broke before the commit was sent.
"""

import os
import random
import sqlite3
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    NullPool,
    QueuePool,
    Table,
    create_engine,
    event,
    func,
    literal,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError

from tailorstore.catalog.failures import is_busy, may_run_again, translate
from tailorstore.catalog.tables import UtcDateTime
from tailorstore.catalog.urls import CatalogUrl
from tailorstore.domain.errors import (
    AccessDeniedError,
    CatalogUnavailableError,
    MissingDependencyError,
    StoreNotFoundError,
)

T = TypeVar("T")

LOCK_SECONDS = 30
"""How long a transaction waits for another one's locks. A publish takes milliseconds, a large expiry seconds."""

CONNECT_SECONDS = 10
ATTEMPTS = 6
_OLDEST_SQLITE = (3, 35, 0)
"""The first with RETURNING."""

_WRITES = "tailorstore_writes"


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
        self.is_sqlite = url.path is not None
        self.read_only = False
        self._migrating = migrating
        if url.path is not None:
            self._find_file(url.path, create=create)
            self.read_only = url.asks_read_only or not _writable(url.path)
            self._engine = self._sqlite_engine(url.path, create=create)
        else:
            self._engine = self._postgres_engine()
        readers = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._readers: Engine = self._engine.execution_options(**readers)
        self._writers: Engine = self._engine.execution_options(**{_WRITES: True})
        _open_databases.add(self)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction that sees one moment of the database and changes nothing.

        Raises:
            AccessDeniedError: the credentials or the file's permissions do not allow it.
            CatalogUnavailableError: the database does not answer.
        """
        return self._run(self._readers, work, repeatable=True)

    def write(self, work: Callable[[Connection], T], *, repeatable: bool = True) -> T:
        """Run ``work`` in a transaction that takes effect as a whole or not at all.

        Args:
            work: is run again from the start after a deadlock or a broken connection.
            repeatable: running it again after it took effect does no harm, so a lost reply to the commit is no
                error.

        Raises:
            AccessDeniedError: the catalog is open read-only, or the credentials do not allow it.
            CatalogUnavailableError: the database does not answer; nothing was changed, except where the message
                says that the outcome is unknown.
        """
        if self.read_only:
            msg = f"the catalog {self.url.shown} is open read-only: its file or credentials do not allow writing"
            raise AccessDeniedError(msg)
        return self._run(self._writers, work, repeatable=repeatable)

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

    def _run(self, engine: Engine, work: Callable[[Connection], T], *, repeatable: bool) -> T:
        deadline = time.monotonic() + LOCK_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            committing = False
            try:
                with engine.connect() as connection, connection.begin() as transaction:
                    result = work(connection)
                    committing = True
                    transaction.commit()
                return result
            except SQLAlchemyError as error:
                lost_reply = committing and getattr(error, "connection_invalidated", False)
                failure, cause = translate(error, self.url)
                if lost_reply and not repeatable:
                    msg = f"{failure}; the connection broke during the commit, so look whether it took effect"
                    raise CatalogUnavailableError(msg) from cause
                if attempt == ATTEMPTS or time.monotonic() > deadline or not may_run_again(error):
                    raise failure from cause
            # Doubling with jitter, so that two that met once do not meet again.
            time.sleep(0.01 * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311
        raise AssertionError

    def _sqlite_engine(self, path: Path, *, create: bool) -> Engine:
        if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
            msg = f"SQLite {sqlite3.sqlite_version} is too old for a catalog; Python needs 3.35 or newer"
            raise MissingDependencyError(msg)
        mode = "rwc" if create else "rw"

        def connect() -> sqlite3.Connection:
            return _connect_read_only(path) if self.read_only else _connect(path, mode, self._migrating)

        engine = create_engine(
            "sqlite://",
            creator=connect,
            # Measured: a fresh connection for each call quadruples the time of a small query, and closing the last
            # one empties the write-ahead log. A read-only one is made fresh, as the way to open it can change.
            poolclass=NullPool if self.read_only else QueuePool,
            hide_parameters=True,
            **({} if self.read_only else {"pool_size": 4, "max_overflow": -1}),
        )
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _find_file(self, path: Path, *, create: bool) -> None:
        if path.exists():
            return
        if not create or self.url.asks_read_only:
            msg = f"there is no catalog at {self.url.shown}"
            raise StoreNotFoundError(msg)
        folder = path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except PermissionError as error:
            msg = f"the folder of the catalog {self.url.shown} cannot be made: {error.strerror}"
            raise AccessDeniedError(msg) from error
        except OSError as error:
            msg = f"the folder of the catalog {self.url.shown} cannot be made: {error.strerror}"
            raise CatalogUnavailableError(msg) from error
        if not _writable(path):
            msg = f"the catalog {self.url.shown} cannot be made: its folder may not be written"
            raise AccessDeniedError(msg)

    def _postgres_engine(self) -> Engine:
        arguments: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "application_name": "tailorstore"}
        url = self.url.url
        try:
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
        except ImportError as error:
            msg = "a catalog in PostgreSQL needs psycopg: pip install 'psycopg[binary]'"
            raise MissingDependencyError(msg) from error
        event.listen(engine, "connect", _limit_lock_waits)
        return engine

    def leave_connections(self) -> None:
        """Start afresh in the child of a fork."""
        # The child must neither use nor close what it inherited: closing would end the parent's session on Postgres,
        # and could remove the parent's locks and write-ahead log on SQLite. So the old pool is kept for ever.
        _inherited.append(self._engine.pool)
        self._engine.dispose(close=False)


_open_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_inherited: list[object] = []


def _after_fork_in_child() -> None:
    for database in list(_open_databases):
        database.leave_connections()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _writable(path: Path) -> bool:
    """Tell whether a database file, and beside it SQLite's logs, may be written."""
    return (not path.exists() or os.access(path, os.W_OK)) and os.access(path.parent, os.W_OK)


def _connect(path: Path, mode: str, migrating: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}",
        uri=True,
        timeout=LOCK_SECONDS,
        check_same_thread=False,
        # Leave transactions to us: the module would begin them late and deferred.
        isolation_level=None,
    )
    try:
        _use_write_ahead_log(connection)
        # FULL: a published commit survives a power cut, not only a crash of the process.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA foreign_keys = {'OFF' if migrating else 'ON'}")
        connection.execute("PRAGMA cache_size = -16384")
    except BaseException:
        connection.close()
        raise
    return connection


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    # Two processes that switch a new file at once: one is refused without any waiting, whatever the timeout.
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            # Where the file system cannot do it, SQLite answers with the mode it keeps, and that works too.
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _connect_read_only(path: Path) -> sqlite3.Connection:
    # Reading needs the files of the write-ahead log while there is a writer, and may not make them. Without them
    # nobody is writing, and SQLite must be told so.
    live = path.with_name(f"{path.name}-wal").exists()
    options = "mode=ro" if live or os.access(path.parent, os.W_OK) else "immutable=1"
    return sqlite3.connect(
        f"{path.as_uri()}?{options}", uri=True, timeout=LOCK_SECONDS, check_same_thread=False, isolation_level=None
    )


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its lock at once: a reader that turns writer may be refused without waiting.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _limit_lock_waits(connection: DBAPIConnection, _record: object) -> None:
    connection.cursor().execute(f"SET lock_timeout = '{LOCK_SECONDS}s'")
    connection.commit()
