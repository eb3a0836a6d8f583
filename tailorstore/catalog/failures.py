"""What drivers report, turned into the project's errors. No message or chained cause shows a secret."""

import sqlite3

from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from tailorstore.catalog.urls import CatalogUrl
from tailorstore.domain.errors import AccessDeniedError, CatalogUnavailableError, TailorError

_RETRIED_STATES = frozenset({"40001", "40P01"})
"""Serialization failure and deadlock: the transaction did nothing and may be run again."""

_REFUSED_STATES = frozenset({"28000", "28P01", "42501", "25006"})
_REFUSED_TEXTS = (
    "password authentication failed",
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "permission denied",
)
"""A refused connection carries no SQL state, only text."""

_REFUSED_CODES = frozenset({"SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH"})
_BUSY_CODES = frozenset({"SQLITE_BUSY", "SQLITE_LOCKED"})

_HINTS = {
    "SQLITE_NOTADB": "the file is not a SQLite database",
    "SQLITE_CORRUPT": "the database file is damaged; restore it, or rebuild the catalog from the root",
    "SQLITE_FULL": "the disk that holds the catalog is full",
    "SQLITE_CANTOPEN": "the database file cannot be opened",
    "53100": "the database server's disk is full",
    "55P03": "another transaction held its locks for too long",
    "57014": "the statement took too long and was cancelled",
}


class DriverError(Exception):
    """Stands in, as a cause, for a driver's error whose text held a secret."""


def sqlite_code(error: BaseException | None) -> str:
    """Return the primary result code of a SQLite error, such as ``SQLITE_BUSY``; else an empty text."""
    if not isinstance(error, sqlite3.Error):
        return ""
    # Extended codes append to the primary one, as in SQLITE_READONLY_DIRECTORY.
    return "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])


def is_busy(error: BaseException | None) -> bool:
    """Tell whether SQLite gave up waiting for a lock."""
    return sqlite_code(error) in _BUSY_CODES


def may_run_again(error: SQLAlchemyError) -> bool:
    """Tell whether the transaction left nothing and another attempt may succeed at once."""
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    return error.connection_invalidated or state in _RETRIED_STATES or is_busy(error.orig)


def is_duplicate(error: IntegrityError) -> bool:
    """Tell whether a unique constraint refused a row."""
    return getattr(error.orig, "sqlstate", None) == "23505" or (
        getattr(error.orig, "sqlite_errorname", "") in ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY")
    )


def translate(error: BaseException, url: CatalogUrl) -> tuple[TailorError, BaseException]:
    """Return the project's error for a driver's, and what to chain as its cause."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    state = str(getattr(original, "sqlstate", None) or sqlite_code(original))
    text = " ".join(str(original).split())
    reason = _HINTS.get(state, "")
    detail = f"{reason} ({url.scrub(text)})" if reason else url.scrub(text)
    # A stand-in, because tracebacks and error trackers print the cause's own text.
    cause = original if url.scrub(text) == text else DriverError(f"{type(original).__name__}: {url.scrub(text)}")
    refused = state in _REFUSED_STATES or state in _REFUSED_CODES
    if refused or (not state and any(sign in text for sign in _REFUSED_TEXTS)):
        return AccessDeniedError(f"the catalog {url.shown} refused access: {detail}"), cause
    if is_busy(original):
        msg = f"the catalog {url.shown} stayed locked by another process; try again ({detail})"
        return CatalogUnavailableError(msg), cause
    if isinstance(error, PoolTimeoutError):
        msg = f"the catalog {url.shown} has no connection free: more threads use it at once than it has connections"
        return CatalogUnavailableError(msg), cause
    return CatalogUnavailableError(f"the catalog {url.shown} cannot be used: {detail}"), cause
