"""Stores that may be damaged: copies of a prepared one, with a catalog in SQLite or PostgreSQL, and a local or S3 root.

Nothing here opens a store in this process: its library for object stores does not survive a fork.
"""

import contextlib
import dataclasses
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psycopg
from sqlalchemy import make_url

import tailorstore as ts


@dataclasses.dataclass(frozen=True, slots=True)
class Servers:
    """What there is beside files."""

    postgres: str | None = None
    """URL of a PostgreSQL server."""
    bucket: str | None = None
    """Of an S3 server, in which to make roots."""
    storage_options: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def catalog_name(self) -> str:
        return "SQLite" if self.postgres is None else "Postgres"

    @property
    def storage_name(self) -> str:
        return "local" if self.bucket is None else "S3"


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A store that may be damaged."""

    folder: Path
    """Holds a local root, and what is in SQLite."""
    servers: Servers = dataclasses.field(default_factory=Servers)
    database: str | None = None
    """URL of the catalog, where that is not in SQLite."""

    @property
    def local_root(self) -> Path:
        return self.folder / "root"

    @property
    def root(self) -> str:
        return str(self.local_root) if self.servers.bucket is None else f"s3://{self.servers.bucket}{self.local_root}"

    @property
    def catalog(self) -> str:
        """The catalog's URL; that in a local root is the default one."""
        if self.database is not None:
            return self.database
        inside = self.local_root / "catalog.sqlite"
        return f"sqlite:///{inside if self.servers.bucket is None else self.folder / 'catalog.db'}"

    @property
    def other_catalog(self) -> str:
        return f"sqlite:///{self.folder}/other.db"

    def open(self, *, branch: str = "main", create: bool = True, catalog: str | None = None) -> ts.Store:
        return ts.open_store(
            self.root,
            catalog=catalog or self.catalog,
            branch=branch,
            create=create,
            storage_options=self.servers.storage_options,
            chunk_bytes=1024,
            light=ts.LightSettings(weight_bits=4, slot_bits=4, exact_below=64),
        )

    def without_catalog(self) -> "Place":
        """Return a copy of the root, which has lost its catalog."""
        copy = Place(self.folder / "copy", self.servers)
        shutil.rmtree(copy.folder, ignore_errors=True)
        if self.servers.bucket is None:
            shutil.copytree(self.local_root, copy.local_root, ignore=shutil.ignore_patterns("catalog.sqlite*"))
        else:
            copy.folder.mkdir()
            copy_objects(self, copy)
        return copy


def copy_objects(place: Place, other: Place) -> None:
    """Copy all objects of a root on S3; what was at the other place goes."""
    servers = place.servers
    options = servers.storage_options
    source, target = (str(one.local_root).lstrip("/") + "/" for one in (place, other))
    with contextlib.closing(
        boto3.client(
            "s3",
            endpoint_url=options["endpoint_url"],
            aws_access_key_id=options["key"],
            aws_secret_access_key=options["secret"],
            region_name=options["client_kwargs"]["region_name"],
        )
    ) as client:

        def keys(prefix: str) -> list[str]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=servers.bucket, Prefix=prefix)
            return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

        for key in keys(target):
            client.delete_object(Bucket=servers.bucket, Key=key)
        for key in keys(source):
            where = {"Bucket": servers.bucket, "Key": key}
            client.copy_object(Bucket=servers.bucket, Key=target + key.removeprefix(source), CopySource=where)


@contextlib.contextmanager
def prepared(folder: Path, servers: Servers, prepare: Callable[[Place], None]) -> Iterator[Callable[[], Place]]:
    """Prepare a place once; give what makes a fresh copy of it, in place of the one before."""
    databases = None if servers.postgres is None else Databases(servers.postgres)
    base = Place(folder / "base", servers, databases.create() if databases else None)
    base.folder.mkdir()
    try:
        prepare(base)

        def fresh() -> Place:
            shutil.rmtree(folder / "try", ignore_errors=True)
            shutil.copytree(base.folder, folder / "try")
            copy = Place(folder / "try", servers)
            if servers.bucket is not None:
                copy_objects(base, copy)
            if databases is not None:
                return dataclasses.replace(copy, database=databases.copy(base, copy))
            if servers.bucket is not None:
                _tell_where(copy, base)
            return copy

        yield fresh
    finally:
        if databases is not None:
            databases.drop()


def _tell_where(copy: Place, base: Place) -> None:
    """Have a copied catalog mean the copied root; one in the root goes along by itself."""
    path = copy.catalog.removeprefix("sqlite:///")
    if not os.path.exists(path):
        return
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE stores SET root = replace(root, ?, ?)", [str(base.folder), str(copy.folder)])


class Databases:
    """Databases of a PostgreSQL server: a prepared one and copies of it."""

    def __init__(self, server: str) -> None:
        self._server = make_url(server)
        self._prefix = f"crash_{secrets.token_hex(6)}"
        self._names = [f"{self._prefix}_base"]

    def create(self) -> str:
        """Make an empty database, to be prepared; return its URL."""
        self._run(f"CREATE DATABASE {self._names[0]}")
        return self._url(self._names[0])

    def copy(self, base: Place, copy: Place) -> str:
        """Copy it for a root that was copied too; return the copy's URL.

        It has a name of its own: the one before may still have a session.
        """
        self._names.append(f"{self._prefix}_{len(self._names)}")
        self._run(f"CREATE DATABASE {self._names[-1]} TEMPLATE {self._names[0]}")
        url = self._url(self._names[-1])
        # A catalog means one place; this copy means the copied root.
        with psycopg.connect(_plain(url)) as connection, contextlib.suppress(psycopg.errors.UndefinedTable):
            connection.execute("UPDATE stores SET root = replace(root, %s, %s)", (str(base.folder), str(copy.folder)))
        return url

    def drop(self) -> None:
        """Remove them all."""
        for name in self._names:
            self._run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _url(self, name: str) -> str:
        return self._server.set(database=name).render_as_string(hide_password=False)

    def _run(self, statement: str) -> None:
        server = _plain(self._server.set(database="postgres").render_as_string(hide_password=False))
        with contextlib.closing(psycopg.connect(server, autocommit=True)) as connection:
            for attempt in range(100):
                try:
                    connection.execute(statement.encode())
                except psycopg.errors.ObjectInUse:
                    # A session of the database to be copied is still ending.
                    if attempt == 99:
                        raise
                    time.sleep(0.05)
                else:
                    return


def wait_for_sessions(url: str) -> None:
    """Return once nobody is connected to a database any more: what a dead process sent last has been done then."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with contextlib.closing(psycopg.connect(_plain(url), autocommit=True)) as connection:
        deadline = time.monotonic() + 20
        while connection.execute(others).fetchone() != (0,):
            if time.monotonic() > deadline:
                raise TimeoutError(url)
            time.sleep(0.01)


def _plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")
