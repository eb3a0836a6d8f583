"""Connections to a SQLite file: who may write it, in which journal mode, and whether it is still the same file."""

import contextlib
import errno
import os
import sqlite3
import sys
import time
from pathlib import Path

from sqlalchemy import Connection, Engine, NullPool, QueuePool, create_engine, event

from tailorstore.catalog.failures import is_busy
from tailorstore.catalog.urls import CatalogUrl
from tailorstore.domain.errors import (
    AccessDeniedError,
    CatalogDamagedError,
    CatalogUnavailableError,
    MissingDependencyError,
    StoreNotFoundError,
)

_NO_TRUST = "PRAGMA trusted_schema = OFF"
"""Views and triggers in a stranger's file get only functions that have no effects."""

LOCK_SECONDS = 30
"""How long a transaction waits for another one's locks. A publish takes milliseconds, a large expiry seconds."""

WRITES = "tailorstore_writes"
"""The option of a SQLAlchemy connection whose transaction will write."""

_OLDEST = (3, 35, 0)
"""The first with RETURNING."""

NETWORK_FILE_SYSTEMS = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "gpfs", "lustre", "nfs", "nfs4", "ocfs2", "orangefs", "panfs",
    "pvfs2", "smb3", "vboxsf", "virtiofs",
})  # fmt: skip
"""Several machines may use the file at once there, which share no memory, as the write-ahead log wants them to."""

_MOUNTS = Path("/proc/self/mountinfo")


class SqliteFile:
    """The file of a catalog.

    Args:
        url: of the catalog.
        path: of the file.
        create: make the file, and its folder, if it is not there.
        migrating: foreign keys off: changing a table means replacing it.

    Raises:
        AccessDeniedError: the file or folder may not be read or made.
        CatalogUnavailableError: the folder cannot be made.
        StoreNotFoundError: there is no file, or an empty one, and making one was not asked for.
        MissingDependencyError: Python's SQLite is too old.
    """

    def __init__(self, url: CatalogUrl, path: Path, *, create: bool, migrating: bool) -> None:
        if sqlite3.sqlite_version_info < _OLDEST:
            msg = f"SQLite {sqlite3.sqlite_version} is too old for a catalog; Python needs 3.35 or newer"
            raise MissingDependencyError(msg)
        self._url = url
        self._path = path
        self._mode = "rwc" if create else "rw"
        self._migrating = migrating
        self._identity: tuple[int, int] | None = None
        _find(url, path, create=create)
        if not create and not migrating:
            _refuse_empty(url, path)
        self.read_only = url.asks_read_only or not _writable(path)

    def engine(self) -> Engine:
        """Return an engine on the file."""
        engine = create_engine(
            "sqlite://",
            creator=self._connect_read_only if self.read_only else self._connect,
            # Measured: a fresh connection for each call quadruples the time of a small query, and closing the last
            # one empties the write-ahead log. A read-only one is made fresh, as the way to open it can change.
            poolclass=NullPool if self.read_only else QueuePool,
            hide_parameters=True,
            **({} if self.read_only else {"pool_size": 4, "max_overflow": -1}),
        )
        event.listen(engine, "begin", _begin)
        return engine

    def check_same(self) -> None:
        """Make sure that the path still leads to the file that was opened: SQLite would go on in the old one.

        Raises:
            CatalogDamagedError: it does not. What was written just now may be lost with the old file.
        """
        if self._identity is not None and self._identity != self._look():
            msg = (
                f"the file of the catalog {self._url.shown} was removed or replaced while it was open, so nothing of"
                " what is written to it would last. Close the store; restore the file if it is gone, or rebuild the"
                " catalog from the root with rebuild_catalog() ('tailorstore rebuild'); then open the store again"
            )
            raise CatalogDamagedError(msg)

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _connect(self) -> sqlite3.Connection:
        shared = is_on_network(self._path)
        if shared:
            _leave_write_ahead_log(self._path)
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode={self._mode}",
            uri=True,
            timeout=LOCK_SECONDS,
            check_same_thread=False,
            # Leave transactions to us: the module would begin them late and deferred.
            isolation_level=None,
        )
        try:
            if not shared:
                _use_write_ahead_log(connection)
            # A published commit survives a power cut, not only a crash of the process. Without a write-ahead log the
            # removal of the journal is what commits; FULL would not flush it, and the journal could come back.
            connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute(f"PRAGMA foreign_keys = {'OFF' if self._migrating else 'ON'}")
            connection.execute("PRAGMA cache_size = -16384")
            connection.execute(_NO_TRUST)
        except BaseException:
            connection.close()
            raise
        self._identity = self._identity or self._look()
        return connection

    def _connect_read_only(self) -> sqlite3.Connection:
        # Reading needs the files of the write-ahead log while there is a writer, and may not make them. Without them
        # nobody is writing, and SQLite must be told so.
        live = self._path.with_name(f"{self._path.name}-wal").exists()
        reads_along = live or os.access(self._path.parent, os.W_OK) or not _has_log(self._path)
        self._identity = self._identity or self._look()
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?{'mode=ro' if reads_along else 'immutable=1'}",
            uri=True,
            timeout=LOCK_SECONDS,
            check_same_thread=False,
            isolation_level=None,
        )
        connection.execute(_NO_TRUST)
        return connection


def is_on_network(path: Path) -> bool:
    """Tell whether a file is on a file system that several machines may share; False where that cannot be told."""
    if sys.platform != "linux":
        return False
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    folder = os.path.realpath(path.parent)
    kinds: dict[str, str] = {}
    for mount in mounts:
        # 36 35 98:0 /inside /mount\040point options shared:1 - type source options
        before, _, after = mount.partition(" - ")
        point = before.split(" ")[4]
        # Only these four characters are written in octal.
        for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            point = point.replace(octal, character)
        # What was mounted later at the same point hides what was there.
        kinds[point] = after.split(" ")[0]
    while folder not in kinds and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    kind = kinds.get(folder, "")
    return kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse.")


def _find(url: CatalogUrl, path: Path, *, create: bool) -> None:
    if path.exists():
        return
    if not create or url.asks_read_only:
        msg = f"there is no catalog at {url.shown}"
        raise StoreNotFoundError(msg)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _flush_folders(path.parent)
    except PermissionError as error:
        msg = f"the folder of the catalog {url.shown} cannot be made: {error.strerror}"
        raise AccessDeniedError(msg) from error
    except OSError as error:
        msg = f"the folder of the catalog {url.shown} cannot be made: {error.strerror}"
        raise CatalogUnavailableError(msg) from error
    if not _writable(path):
        msg = f"the catalog {url.shown} cannot be made: its folder may not be written"
        raise AccessDeniedError(msg)
    # SQLite would not let a group write it, whatever the umask; the files beside it get this one's permissions.
    with contextlib.suppress(OSError):
        path.touch(mode=0o666)


def _refuse_empty(url: CatalogUrl, path: Path) -> None:
    """Say of an empty file that it is empty, and leave it as it is: opening it would make a database of it."""
    log = path.with_name(f"{path.name}-wal")
    if path.stat().st_size == 0 and not log.exists():
        msg = f"the catalog {url.shown} is an empty file"
        raise StoreNotFoundError(msg)


def _flush_folders(folder: Path) -> None:
    """Make a folder survive a loss of power, and those above it. SQLite does that for its files, in their folder."""
    for above in (folder, *folder.parents):
        try:
            descriptor = os.open(above, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            # Some file systems cannot flush folders, and do not need to; those far above may not be ours.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
                raise
        if above.is_mount():
            return


def _writable(path: Path) -> bool:
    """Tell whether a database file, and beside it SQLite's logs, may be written."""
    return (not path.exists() or os.access(path, os.W_OK)) and os.access(path.parent, os.W_OK)


def _has_log(path: Path) -> bool:
    """Tell by its header whether a database is kept with a write-ahead log."""
    with path.open("rb") as file:
        return file.read(20)[18:] == b"\2\2"


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


def _leave_write_ahead_log(path: Path) -> None:
    # Refused while others have the file open. The connection is not kept for a second try, or each of several that
    # wait would keep the others from it.
    if path.exists() and _has_log(path):
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=0)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")


def _begin(connection: Connection) -> None:
    # A writer takes its lock at once: a reader that turns writer may be refused without waiting.
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
