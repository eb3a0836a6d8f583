"""Catalog URLs: which databases are spoken, and how a URL is shown without its secrets."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from tailorstore.domain.errors import InvalidInputError

_FORMS = "give sqlite:///path/to/catalog.db or postgresql://user:password@host/database"
_POSTGRES = ("postgres", "postgresql", "postgresql+psycopg")
_SECRET_OPTIONS = frozenset({"password", "sslpassword", "passfile", "service", "oauth_client_secret"})
_HIDDEN = "***"


@dataclass(frozen=True, slots=True)
class CatalogUrl:
    """A catalog URL that was understood."""

    url: URL = field(repr=False)
    shown: str
    """The URL as it may be printed and logged."""
    secrets: tuple[str, ...] = field(repr=False)
    """Texts that must not appear in any message."""
    path: Path | None
    """The database file; ``None`` on Postgres."""
    asks_read_only: bool = False
    """``?mode=ro`` was given."""

    def scrub(self, text: str) -> str:
        """Return a text without the URL's secrets."""
        for secret in self.secrets:
            text = text.replace(secret, _HIDDEN)
        return text


def parse_url(text: str) -> CatalogUrl:
    """Understand a catalog URL.

    Raises:
        InvalidInputError: it is none of the forms that a catalog can have. The message does not repeat the URL
            where that could show a password.
    """
    url: URL | None = None
    if isinstance(text, str) and text.startswith("sqlite:///"):
        return _sqlite(_sqlite_url(text.removeprefix("sqlite:///")))
    if isinstance(text, str):
        try:
            url = make_url(text)
        except (ArgumentError, ValueError):
            # Not chained: the parser's message may quote half of an unescaped password as the port.
            url = None
    if url is None:
        msg = f"the catalog URL cannot be read; {_FORMS} (with @ : / in a password written as %40 %3A %2F)"
        raise InvalidInputError(msg)
    if url.drivername in _POSTGRES:
        return _postgres(url)
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        return _sqlite(url)
    msg = f"no catalog speaks {url.drivername!r}; {_FORMS}"
    raise InvalidInputError(msg)


def _postgres(url: URL) -> CatalogUrl:
    hidden = {key: value for key, value in url.query.items() if key.lower() in _SECRET_OPTIONS}
    secrets = [str(url.password)] if url.password else []
    for value in hidden.values():
        secrets.extend([value] if isinstance(value, str) else value)
    shown = url.update_query_dict(dict.fromkeys(hidden, _HIDDEN)).render_as_string(hide_password=True)
    # The longest first, or a short secret would break up a longer one that contains it.
    ordered = tuple(sorted((secret for secret in secrets if secret), key=len, reverse=True))
    return CatalogUrl(url.set(drivername="postgresql+psycopg"), shown.replace("%2A%2A%2A", _HIDDEN), ordered, None)


def _sqlite_url(rest: str) -> URL:
    # A parser of URLs would take a question mark in the name of a folder for the beginning of the options.
    path, _, options = rest.rpartition("?") if "?" in rest and "/" not in rest.rpartition("?")[2] else (rest, "", "")
    parsed = make_url(f"sqlite:///x?{options}") if options else URL.create("sqlite")
    return URL.create("sqlite", database=path, query=parsed.query)


def _sqlite(url: URL) -> CatalogUrl:
    query = dict(url.query)
    read_only = query.pop("mode", "rw") == "ro"
    if query or url.query.get("mode", "rw") not in ("rw", "ro"):
        msg = f"a SQLite catalog takes no option but mode=ro; {_shown_options(url.query)} was given"
        raise InvalidInputError(msg)
    if url.host or url.username or url.password:
        msg = f"a SQLite catalog has a path and no host: {_FORMS} (four slashes for an absolute path)"
        raise InvalidInputError(msg)
    if not url.database or url.database == ":memory:":
        msg = f"a catalog in memory could be seen by one connection only; {_FORMS}"
        raise InvalidInputError(msg)
    # Absolute from here on: the process may change its directory while the store is open.
    path = Path(os.path.abspath(os.path.expanduser(url.database)))
    shown = f"sqlite:///{url.database}" + ("?mode=ro" if read_only else "")
    return CatalogUrl(url, shown, (), path, read_only)


def _shown_options(query: Mapping[str, str | Sequence[str]]) -> str:
    return ", ".join(sorted(query))
