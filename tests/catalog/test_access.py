"""Databases that refuse, break, lock or only let one read."""

import contextlib
import json
import multiprocessing
import os
import pwd
import shutil
import socket
import sqlite3
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, text

from tailorstore.catalog import Catalog, StoreCatalog
from tailorstore.catalog.database import Database
from tailorstore.catalog.failures import translate, unreadable
from tailorstore.catalog.urls import parse_url
from tailorstore.domain.errors import (
    AccessDeniedError,
    CatalogDamagedError,
    CatalogUnavailableError,
    MissingDependencyError,
    RootTakenError,
    TailorError,
)
from tailorstore.domain.names import parse_ref
from tests.catalog.kit import LEASE, announce, at, commit, open_file, plain_sql, publish, steps
from tests.kit.postgres import PostgresServer

FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def shown(error: BaseException) -> str:
    """Return all that a traceback shows of an error."""
    return "".join(traceback.format_exception(error))


def test_a_wrong_password_is_told_and_not_shown(postgres_server: PostgresServer) -> None:
    url = f"postgresql://ts:wr0ngpassw0rd@127.0.0.1:{postgres_server.port}/postgres"
    with pytest.raises(AccessDeniedError, match=r"ts:\*\*\*@127") as refused:
        Catalog.open(url)
    assert "wr0ngpassw0rd" not in shown(refused.value)


def test_an_unknown_database_is_unavailable(postgres_server: PostgresServer) -> None:
    with pytest.raises(CatalogUnavailableError, match="nowhere"):
        Catalog.open(postgres_server.url("nowhere"))


def test_a_server_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.database.OPENING_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"postgresql://ts:s3cr3t@127.0.0.1:{port}/x"
    with pytest.raises(CatalogUnavailableError, match=str(port)) as refused:
        Catalog.open(url)
    assert "s3cr3t" not in shown(refused.value)


def test_it_is_told_that_a_server_is_waited_for_that_lets_nobody_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tailorstore.catalog.database._SILENT_SECONDS", 0.1)
    monkeypatch.setattr("tailorstore.catalog.database.OPENING_SECONDS", 0)
    told = threading.Event()

    def tell(_: object) -> bool:
        told.set()
        return True

    caplog.handler.addFilter(tell)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        opening = pool.submit(Catalog.open, f"postgresql://ts:s3cr3t@127.0.0.1:{port}/x")
        # What it waits for comes only after it has said that it waits.
        assert told.wait(30)
        server.close()
        with pytest.raises(CatalogUnavailableError):
            opening.result(30)
    (record,) = caplog.records
    assert record.getMessage() == f"waiting for the catalog postgresql://ts:***@127.0.0.1:{port}/x (up to 0 s)"


def test_bytes_that_are_no_text_are_told_without_python(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/c.sqlite"
    Catalog.open(url).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)) as connection:
        connection.execute("UPDATE catalog SET catalog_id = CAST(x'ff' AS TEXT)")
    with pytest.raises(CatalogDamagedError, match=r"is damaged: it holds bytes that are no text\. Restore it"):
        Catalog.open(url, create=False)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (lambda: b"\xff".decode(), "it holds bytes that are no text"),
        (lambda: json.loads("{"), "it holds text that should be JSON and is not"),
        (lambda: datetime.fromisoformat("x"), "it holds a value that cannot be understood"),
    ],
)
def test_what_a_row_holds_instead_is_said_in_words(raw: Callable[[], object], what: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - only its kind counts
        raw()
    assert unreadable(caught.value) == what


def test_a_secret_in_a_drivers_message_is_hidden_in_the_cause_too() -> None:
    url = parse_url("postgresql://ada:s3cr3t@h/d")
    error, cause = translate(psycopg.OperationalError("cannot use s3cr3t here"), url)
    assert isinstance(error, CatalogUnavailableError)
    assert "s3cr3t" not in f"{error} {cause!r}"
    assert "cannot use *** here" in str(cause)


def test_without_psycopg_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingDependencyError, match="psycopg"):
        Catalog.open("postgresql://ts@127.0.0.1:1/x")


def test_a_registered_store_is_found_again(catalog: Catalog, store: StoreCatalog) -> None:
    again = catalog.register("store-1", "s3://moved", 1)
    commit(again, 1)
    assert steps(store) == [1]
    assert catalog.store("nope") is None
    with pytest.raises(RootTakenError, match="at epoch 1, and its root says 3"):
        catalog.register("store-1", "s3://moved", 3)
    binding = store.binding()
    assert (binding.store_id, binding.catalog_id, binding.epoch) == ("store-1", catalog.catalog_id, 1)


def test_a_closed_catalog_opens_again_when_used(catalog: Catalog, store: StoreCatalog) -> None:
    catalog.close()
    commit(store, 1)
    catalog.close()
    assert steps(store) == [1]


# --- Only reading -----------------------------------------------------------------------------------------------


def check_reading(url: str, shown_url: str) -> None:
    """Check that a catalog with a commit at step 1 can be read through this URL, and nothing else."""
    catalog = Catalog.open(url)
    assert catalog.read_only
    store = catalog.store("store-1")
    assert store is not None
    composite, lease_id = store.resolve(parse_ref("latest"), "main", LEASE)
    assert composite.commit.step == 1
    assert lease_id is None
    store.release(["any"])
    assert steps(store) == [1]
    assert store.inventory().leased == frozenset()
    assert store.stats().commits == 1
    for write in (
        lambda: announce(store, 2),
        lambda: store.tag("best", composite.commit.id),
        lambda: store.expire([]),
        lambda: store.renew(["any"], LEASE),
        lambda: catalog.register("store-2", "file:///x", 1),
    ):
        with pytest.raises(AccessDeniedError, match="read-only") as refused:
            write()
        assert shown_url in str(refused.value)
    catalog.close()


def test_a_sqlite_catalog_can_be_opened_for_reading_only(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalog.db"
    writer = Catalog.open(url)
    store = writer.register("store-1", "file:///x", 1)
    commit(store, 1)
    check_reading(f"{url}?mode=ro", url)
    writer.close()
    check_reading(f"{url}?mode=ro", url)


def test_a_postgres_user_who_may_only_select_can_read(postgres_url: str) -> None:
    writer = Catalog.open(postgres_url)
    commit(writer.register("store-1", "file:///x", 1), 1)
    with plain_sql(postgres_url) as connection:
        connection.execute("DROP ROLE IF EXISTS looker")
        connection.execute("CREATE ROLE looker LOGIN PASSWORD 'l00ks'")
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO looker")
    reading = parse_url(postgres_url).url.set(username="looker", password="l00ks")
    check_reading(reading.render_as_string(hide_password=False), "looker:***@")
    with plain_sql(postgres_url) as connection:
        connection.execute("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM looker")
    with pytest.raises(AccessDeniedError, match="permission denied"):
        Catalog.open(reading.render_as_string(hide_password=False))
    writer.close()
    with plain_sql(postgres_url) as connection:
        connection.execute("DROP ROLE looker")


def test_a_postgres_user_who_may_not_write_to_all_that_is_written_can_only_read(postgres_url: str) -> None:
    writer = Catalog.open(postgres_url)
    commit(writer.register("store-1", "file:///x", 1), 1)
    url = parse_url(postgres_url).url.set(username="halfway", password="h4lf").render_as_string(hide_password=False)
    with plain_sql(postgres_url) as connection:
        connection.execute("DROP ROLE IF EXISTS halfway")
        connection.execute("CREATE ROLE halfway LOGIN PASSWORD 'h4lf'")
        try:
            connection.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO halfway")
            connection.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO halfway")
            able = Catalog.open(url)
            assert not able.read_only
            able.close()
            for table in ("withdrawn", "receipts"):
                connection.execute(f"REVOKE INSERT ON {table} FROM halfway")
                check_reading(url, "halfway:***@")
                connection.execute(f"GRANT INSERT ON {table} TO halfway")
        finally:
            connection.execute("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM halfway")
            connection.execute("REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM halfway")
            connection.execute("DROP ROLE halfway")
    writer.close()


def test_a_postgres_user_who_may_not_create_is_told(postgres_url: str) -> None:
    with plain_sql(postgres_url) as connection:
        connection.execute("DROP ROLE IF EXISTS guest")
        connection.execute("CREATE ROLE guest LOGIN PASSWORD 'gu3st'")
    try:
        url = parse_url(postgres_url).url.set(username="guest", password="gu3st")
        with pytest.raises(AccessDeniedError, match="permission denied"):
            Catalog.open(url.render_as_string(hide_password=False))
    finally:
        with plain_sql(postgres_url) as connection:
            connection.execute("DROP ROLE guest")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Give a folder that every user can reach; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="tailorstore-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(look: Callable[[str], str], *urls: str) -> list[str]:
    """Run a function of a URL as a user without rights; as oneself, if one has none over others."""
    fork = multiprocessing.get_context("fork")
    outcomes: multiprocessing.Queue[str] = fork.Queue()

    # A fork, as another user may not be able to start the Python of this environment.
    def child() -> None:
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
        for url in urls:
            try:
                outcomes.put(look(url))
            except TailorError as error:
                outcomes.put(f"{type(error).__name__}: {error}")

    process = fork.Process(target=child)
    process.start()
    found = [outcomes.get(timeout=30) for _ in urls]
    process.join(30)
    return found


def read_latest(url: str) -> str:
    """Read the newest commit, and tell what was given."""
    catalog = Catalog.open(url)
    store = catalog.store("store-1")
    assert store is not None
    composite, lease_id = store.resolve(parse_ref("latest"), "main", LEASE)
    return f"read-only {catalog.read_only}, step {composite.commit.step}, lease {lease_id}"


@FORKS
def test_a_file_without_write_permission_is_read(open_folder: Path) -> None:
    url = f"sqlite:///{open_folder}/catalog.db"
    writer = Catalog.open(url)
    commit(writer.register("store-1", "file:///x", 1), 1)
    for path in open_folder.iterdir():
        path.chmod(0o444)
    open_folder.chmod(0o555)
    assert {path.name for path in open_folder.iterdir()} > {"catalog.db"}
    assert as_nobody(read_latest, url) == ["read-only True, step 1, lease None"]
    # Once the last writer has left there is no write-ahead log beside the file.
    open_folder.chmod(0o755)
    writer.close()
    open_folder.chmod(0o555)
    assert {path.name for path in open_folder.iterdir()} == {"catalog.db"}
    assert as_nobody(read_latest, url) == ["read-only True, step 1, lease None"]
    open_folder.chmod(0o755)


@FORKS
def test_a_folder_without_write_permission_is_told(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    urls = [f"sqlite:///{open_folder}/{name}" for name in ("catalog.db", "sub/catalog.db")]
    outcomes = as_nobody(read_latest, *urls)
    open_folder.chmod(0o755)
    for url, outcome in zip(urls, outcomes, strict=True):
        assert outcome.startswith("AccessDeniedError")
        assert url in outcome
    assert list(open_folder.iterdir()) == []


# --- Locks, broken connections, forks ----------------------------------------------------------------------------


def test_a_locked_file_is_reported_after_a_while(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("database", "sqlite"):
        monkeypatch.setattr(f"tailorstore.catalog.{module}.LOCK_SECONDS", 0.2)
    catalog = Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
    store = catalog.register("store-1", "file:///x", 1)
    commit(store, 1)
    with contextlib.closing(open_file(tmp_path / "catalog.db")) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(CatalogUnavailableError, match="stayed locked by another process"):
            announce(store, 2)
        assert steps(store) == [1]
        holder.execute("ROLLBACK")
    commit(store, 2)
    catalog.close()


def test_a_deadlock_is_run_again(postgres_url: str) -> None:
    catalog = Catalog.open(postgres_url)
    for name in ("store-1", "store-2"):
        catalog.register(name, "file:///x", 1)
    catalog.close()
    database = Database(parse_url(postgres_url))
    both = threading.Barrier(2)
    met: list[int] = []

    def crosswise(first: str, second: str) -> None:
        def work(connection: Connection) -> None:
            lock = text("SELECT pk FROM stores WHERE store_id = :store FOR UPDATE")
            connection.execute(lock, {"store": first})
            met.append(1)
            if len(met) <= 2:
                both.wait(20)
            connection.execute(lock, {"store": second})

        database.write(work)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(crosswise, "store-1", "store-2")
        other = pool.submit(crosswise, "store-2", "store-1")
        one.result(30)
        other.result(30)
    assert len(met) >= 3
    database.close()


def kick_everybody(postgres_url: str) -> None:
    """End all sessions of the database, as a restarting server does."""
    with plain_sql(postgres_url) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_a_connection_that_was_cut_is_replaced(postgres_url: str) -> None:
    catalog = Catalog.open(postgres_url)
    store = catalog.register("store-1", "file:///x", 1)
    draft = announce(store, 1)
    kick_everybody(postgres_url)
    publish(store, draft)
    kick_everybody(postgres_url)
    assert steps(store) == [1]
    catalog.close()


def test_a_transaction_that_is_cut_is_run_again(postgres_url: str) -> None:
    database = Database(parse_url(postgres_url))
    runs: list[int] = []

    def work(connection: Connection) -> int:
        runs.append(1)
        connection.execute(text("CREATE TABLE once (n int)"))
        if len(runs) == 1:
            kick_everybody(postgres_url)
        return int(connection.execute(text("SELECT count(*) FROM once")).scalar_one())

    assert database.write(work) == 0
    assert len(runs) == 2
    database.close()


def _child(store: StoreCatalog, results: "multiprocessing.Queue[list[int]]") -> None:
    commit(store, 2)
    results.put(steps(store))


@FORKS
def test_a_forked_child_uses_connections_of_its_own(catalog: Catalog, store: StoreCatalog) -> None:
    commit(store, 1)
    fork = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[list[int]] = fork.Queue()
    child = fork.Process(target=_child, args=(store, results))
    child.start()
    assert results.get(timeout=30) == [2, 1]
    child.join(30)
    assert child.exitcode == 0
    commit(store, 3)
    assert steps(store) == [3, 2, 1]
    assert not catalog.read_only


def test_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    catalog = Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
    store = catalog.register("store-1", "file:///x", 1)
    commit(store, 1)
    with contextlib.closing(open_file(tmp_path / "catalog.db")) as holder:
        holder.execute("BEGIN IMMEDIATE")
        holder.execute("DELETE FROM branches")
        assert at(store, "latest").commit.step == 1
        holder.execute("ROLLBACK")
    catalog.close()


def test_the_driver_of_sqlite_is_the_one_of_python() -> None:
    assert sqlite3.sqlite_version_info >= (3, 35)
