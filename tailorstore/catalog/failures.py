"""What drivers report, turned into the project's errors. No message or chained cause shows a secret."""

import json
import sqlite3
from typing import Literal

from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from tailorstore.catalog.urls import CatalogUrl
from tailorstore.domain.errors import AccessDeniedError, CatalogDamagedError, CatalogUnavailableError, TailorError

Obstacle = Literal["lock", "outage"]
"""Why a transaction did nothing and may be run again: others were in its way, or the server was not there."""

_LOCK_STATES = frozenset({"40001", "40P01", "55P03"})
"""Serialization failure, deadlock, and a lock that was not to be had."""

_OUTAGE_STATES = frozenset({"57P01", "57P02", "57P03", "57P05", "25P03", "53300"})
"""Shut down, crashed, not ready yet, idle for too long twice, no connection free. Those of class 08 as well."""

_OUTAGE_TEXTS = ("the database system is ", "too many clients", "remaining connection slots", "terminating connection")
"""What a server that is there says to a new connection while it starts or stops, or is crowded."""

_REFUSED_STATES = frozenset({"28000", "28P01", "42501", "25006"})
_REFUSED_TEXTS = (
    "password authentication failed",
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "permission denied",
)
"""A refused connection carries no SQL state, only text."""

_HOPELESS_TEXTS = (*_REFUSED_TEXTS, "could not translate host name", "does not support SSL", "certificate", "invalid ")
"""A connection that is not made for these reasons will not be made in a minute either."""

_REFUSED_CODES = frozenset({"SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH"})
_BUSY_CODES = frozenset({"SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL"})

_DAMAGED_STATES = frozenset({"SQLITE_CORRUPT", "SQLITE_NOTADB", "XX001", "XX002", "42P01", "42703"})
"""Among them: a table or column that every catalog has is not there."""

_NO_TEXT = "Could not decode to UTF-8"
_DAMAGED_TEXTS = ("no such table", "no such column")
"""For these SQLite has no code of their own."""

_HINTS = {
    "SQLITE_NOTADB": "the file is not a SQLite database",
    "SQLITE_FULL": "the disk that holds the catalog is full",
    "SQLITE_CANTOPEN": "the database file cannot be opened",
    "53100": "the database server's disk is full",
    "57014": "the statement took too long and was cancelled",
}


class DriverError(Exception):
    """Stands in, as a cause, for a driver's error that holds, or may hold, a secret."""


def sqlite_code(error: BaseException | None) -> str:
    """Return the primary result code of a SQLite error, such as ``SQLITE_BUSY``; else an empty text."""
    if not isinstance(error, sqlite3.Error):
        return ""
    # Extended codes append to the primary one, as in SQLITE_READONLY_DIRECTORY.
    return "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])


def is_busy(error: BaseException | None) -> bool:
    """Tell whether SQLite gave up waiting for a lock."""
    return sqlite_code(error) in _BUSY_CODES


def obstacle(error: SQLAlchemyError) -> Obstacle | None:
    """Tell what was in the way of a transaction that left nothing, or a lost reply; None if trying again is vain."""
    if not isinstance(error, DBAPIError):
        return None
    state = getattr(error.orig, "sqlstate", None)
    if state in _LOCK_STATES or is_busy(error.orig):
        return "lock"
    if state is None:
        return "outage" if error.connection_invalidated or _was_not_reached(error) else None
    return "outage" if error.connection_invalidated or state in _OUTAGE_STATES or state[:2] == "08" else None


def _was_not_reached(error: DBAPIError) -> bool:
    """Tell whether a server, of which only words are known, was not there or not ready; it may be soon."""
    if isinstance(error.orig, sqlite3.Error) or not isinstance(error, OperationalError):
        return False
    said = str(error.orig)
    if any(sign in said for sign in _OUTAGE_TEXTS) or "Temporary failure in name resolution" in said:
        return True
    # What a server that was reached says begins with this word.
    return "FATAL:" not in said and not any(sign in said for sign in _HOPELESS_TEXTS)


def is_duplicate(error: IntegrityError) -> bool:
    """Tell whether a unique constraint refused a row."""
    return getattr(error.orig, "sqlstate", None) == "23505" or (
        getattr(error.orig, "sqlite_errorname", "") in ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY")
    )


def translate(error: BaseException, url: CatalogUrl, besides: str = "") -> tuple[TailorError, BaseException]:
    """Return the project's error for a driver's, and what to chain as its cause.

    Args:
        error: from the driver, or SQLAlchemy's around it.
        url: of the catalog.
        besides: what else the message shall say, at its end.
    """
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    state = str(getattr(original, "sqlstate", None) or sqlite_code(original))
    text = " ".join(str(original).split())
    reason = _HINTS.get(state, "")
    detail = f"{reason} ({url.scrub(text)})" if reason else url.scrub(text)
    # A stand-in, because tracebacks and error trackers print the cause's own text; and psycopg's errors keep the whole
    # connection, with its password.
    harmless = isinstance(original, sqlite3.Error) and url.scrub(text) == text
    cause = original if harmless else DriverError(f"{type(original).__name__}: {url.scrub(text)}")
    refused = state in _REFUSED_STATES or state in _REFUSED_CODES
    if refused or (not state and any(sign in text for sign in _REFUSED_TEXTS)):
        return AccessDeniedError(f"the catalog {url.shown} refused access: {detail}{besides}"), cause
    if _NO_TEXT in text:
        # The driver would show the bytes.
        return damaged(f"it holds bytes that are no text{besides}", url), cause
    if _is_damage(original, state, text):
        return damaged(f"{detail}{besides}", url), cause
    if is_busy(original) or state == "55P03":
        msg = f"the catalog {url.shown} stayed locked by another process; try again ({detail}){besides}"
        return CatalogUnavailableError(msg), cause
    if isinstance(error, PoolTimeoutError):
        msg = f"the catalog {url.shown} has no connection free: more threads use it at once than it has connections"
        return CatalogUnavailableError(msg), cause
    return CatalogUnavailableError(f"the catalog {url.shown} cannot be used: {detail}{besides}"), cause


def damaged(detail: str, url: CatalogUrl) -> CatalogDamagedError:
    """Return the error for a database that is not what was written, with what can be done."""
    return CatalogDamagedError(f"the catalog {url.shown} is damaged: {detail}. {_remedy(url)}")


def unreadable(error: ValueError) -> str:
    """Return what is wrong with a value that was read and is no text, no JSON or no time."""
    if isinstance(error, UnicodeDecodeError):
        return "it holds bytes that are no text"
    if isinstance(error, json.JSONDecodeError):
        return "it holds text that should be JSON and is not"
    return "it holds a value that cannot be understood"


def _is_damage(original: BaseException, state: str, text: str) -> bool:
    short = getattr(original, "sqlite_errorname", "") == "SQLITE_IOERR_SHORT_READ"
    said = isinstance(original, sqlite3.Error) and any(sign in text for sign in _DAMAGED_TEXTS)
    return state in _DAMAGED_STATES or short or said


def _remedy(url: CatalogUrl) -> str:
    if url.path is None:
        again = "rebuild it from the root: open the store with an empty database"
    else:
        beside = f"{url.path.name}-wal and {url.path.name}-shm"
        again = f"rebuild it from the root: move {url.path} away, with {beside} if they are there, open the store again"
    return f"Restore it from a backup, or {again} and call rebuild_catalog() ('tailorstore rebuild')"
