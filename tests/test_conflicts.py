"""Others and the world outside: a second writer, a full disk, wrong keys, servers that are not there."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psycopg
import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    CatalogUnavailableError,
    StorageFullError,
    StorageUnavailableError,
)
from tests.conftest import Root
from tests.kit.audit import assert_root_is_exact, let_claims_lapse
from tests.kit.models import assert_same
from tests.kit.postgres import PostgresServer
from tests.kit.rival import weights
from tests.kit.s3 import S3Key, S3Server
from tests.kit.small_disk import SmallDisk

CHECKOUT = Path(__file__).parent.parent


# --- Two processes on one branch


class Rival:
    """A process that commits when it is told to."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.rival", *arguments],
            cwd=CHECKOUT,
            env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def ask(self, command: str) -> dict[str, Any]:
        self.tell(command)
        return self.answer()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()


def test_of_two_processes_on_one_branch_one_wins(tmp_path: Path, catalog_url: str) -> None:
    root = str(tmp_path / "root")
    with ts.open_store(root, catalog=catalog_url) as store:
        store.commit(1, weights("first", 1))
        one, two = Rival(root, "one", catalog_url), Rival(root, "two", catalog_url)
        published: dict[int, str] = {1: "first"}
        # Both write, then one publishes first; and the other way round.
        for step, (winner, name), (loser, _) in ((2, (one, "one"), (two, "two")), (3, (two, "two"), (one, "one"))):
            for rival in (winner, loser):
                assert rival.ask(f"prepare {step}") == {"waits": step}
            assert "published" in winner.ask("publish")
            lost = loser.ask("publish")
            assert lost["error"] == "HeadMovedError"
            assert "'main'" in lost["message"]
            assert f"step {step}" in lost["message"]
            published[step] = name
        # Who comes late is told how to go on.
        assert "published" in one.ask("commit 4")
        published[4] = "one"
        for step in (3, 4):
            late = two.ask(f"commit {step}")
            assert late["error"] == "StepOrderError"
            assert "move=True" in late["message"]
        assert "published" in two.ask("commit 5")
        published[5] = "two"
        # Both at once, with nobody to order them.
        for step in range(6, 11):
            for rival in (one, two):
                rival.tell(f"commit {step}")
            outcomes = {"one": one.answer(), "two": two.answer()}
            winners = [name for name, outcome in outcomes.items() if "published" in outcome]
            errors = {outcome["error"] for outcome in outcomes.values() if "error" in outcome}
            assert len(winners) == 1, outcomes
            assert errors <= {"HeadMovedError", "StepOrderError"}, outcomes
            published[step] = winners[0]
        one.end()
        two.end()
        assert [commit.step for commit in store.log()] == sorted(published, reverse=True)
        for step, name in published.items():
            with store.checkout(step) as checkpoint:
                assert_same(checkpoint.model_state_dict(), weights(name, step))
        assert store.verify().ok
        # Losers leave what they wrote to GC: somebody who took the root over might have found their manifests. Their
        # claims they give back themselves, so that nothing but the grace period protects it.
        report = store.gc(grace=timedelta(0))
        assert report.leftovers_swept > 0
        assert_root_is_exact(store)


# --- A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "small")
    yield disk
    disk.end()


@pytest.mark.parametrize("block", [True, False])
def test_a_full_disk_leaves_the_store_as_it_was(small_disk: SmallDisk, *, block: bool) -> None:
    small = {"a.w": torch.ones(100), "b.w": torch.ones(10)}
    large = {"a.w": torch.ones(100) * 2, "b.w": torch.ones(10)}
    with ts.open_store(small_disk.folder / "root", branch="main") as store:
        store.commit(1, small)
        before = sorted(info.key for info in store._objects.list("layers/"))
        with small_disk.full():
            huge = {"position": torch.ones(150_000)}

            def commit() -> None:
                pending: Any = store.commit(2, large, extra=huge, block=block)  # type: ignore[call-overload]
                if not block:
                    pending.result(60)

            with pytest.raises(StorageFullError, match="space") as caught:
                commit()
            assert "gc" in str(caught.value)
            assert [commit.step for commit in store.log()] == [1]
            assert_same(store.checkout().model_state_dict(), small)
            assert store.verify().ok
            # Half a commit is no use, and on a full disk its space is wanted.
            assert sorted(info.key for info in store._objects.list("layers/")) == before
        assert store.commit(2, large).step == 2
        let_claims_lapse(store)
        store.gc(grace=timedelta(0))
        assert_root_is_exact(store)
        assert_same(store.checkout().model_state_dict(), large)
        assert store.verify().ok


# --- Keys, buckets and servers


def all_text(error: BaseException) -> str:
    """Return what anybody could come to print of an error: it, its causes, its contexts and their tracebacks."""
    told = ["".join(traceback.format_exception(error))]
    current: BaseException | None = error
    while current is not None:
        told += [str(current), repr(current), repr(current.args)]
        current = current.__cause__ or current.__context__
    return "\n".join(told)


def refused(open_it: Callable[[], ts.Store], kind: type[ts.TailorError], seconds: float, *secrets: str) -> str:
    """Fail unless opening fails with an error, within some seconds, that shows no secret; return its message."""
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        open_it()
    assert time.monotonic() - started < seconds
    assert isinstance(caught.value, kind)
    text = all_text(caught.value)
    for secret in secrets:
        assert secret not in text
    return str(caught.value)


@pytest.fixture(params=[None, "fsspec"])
def transport(request: pytest.FixtureRequest) -> Any:
    """Give each transport that speaks S3."""
    return request.param


@pytest.mark.parametrize("stranger", [False, True])
def test_wrong_s3_credentials(
    s3_server: S3Server, s3_root: Root, tmp_path: Path, transport: Any, *, stranger: bool
) -> None:
    key = S3Key.fresh("nobody") if stranger else s3_server.admin.with_wrong_secret()
    options = s3_server.storage_options(key)
    message = refused(
        lambda: ts.open_store(
            s3_root.url, catalog=f"sqlite:///{tmp_path}/c.db", storage_options=options, transport=transport
        ),
        AccessDeniedError,
        60,
        key.secret,
    )
    assert s3_root.url in message
    assert "credentials" in message
    assert s3_server.keys(s3_root.url) == []
    assert not (tmp_path / "c.db").exists()


def test_a_reader_may_read_and_not_commit(s3_server: S3Server, s3_root: Root, tmp_path: Path, transport: Any) -> None:
    catalog = f"sqlite:///{tmp_path}/c.db"
    with ts.open_store(s3_root.url, catalog=catalog, storage_options=s3_root.storage_options) as store:
        store.commit(1, weights("x", 1))
    options = s3_server.storage_options(s3_server.reader)
    with ts.open_store(s3_root.url, catalog=catalog, storage_options=options, transport=transport) as store:
        assert_same(store.checkout().model_state_dict(), weights("x", 1))
        with pytest.raises(AccessDeniedError) as caught:
            store.commit(2, weights("x", 2))
        assert s3_server.reader.secret not in all_text(caught.value)
        assert [commit.step for commit in store.log()] == [1]


def test_a_missing_bucket(s3_server: S3Server, tmp_path: Path, transport: Any) -> None:
    url = "s3://no-such-bucket-here/run"
    message = refused(
        lambda: ts.open_store(
            url,
            catalog=f"sqlite:///{tmp_path}/c.db",
            storage_options=s3_server.storage_options(),
            transport=transport,
        ),
        BucketNotFoundError,
        60,
        s3_server.admin.secret,
    )
    assert url in message
    assert "create it" in message


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Give a port on which nobody listens, and nobody will while the test runs."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def test_an_unreachable_endpoint(closed_port: int, tmp_path: Path, transport: Any) -> None:
    key = S3Key.fresh("key")
    options = {
        "key": key.key,
        "secret": key.secret,
        "endpoint_url": f"http://127.0.0.1:{closed_port}",
        "client_kwargs": {"region_name": "us-east-1"},
        # Without this it is tried for a minute, as long as servers take to start anew.
        "config_kwargs": {"retries": {"total_max_attempts": 3}},
    }
    message = refused(
        lambda: ts.open_store(
            "s3://bucket/run", catalog=f"sqlite:///{tmp_path}/c.db", storage_options=options, transport=transport
        ),
        StorageUnavailableError,
        30,
        key.secret,
    )
    assert "s3://bucket/run" in message
    assert "reachable" in message


PASSWORD = "p%40ss-w0rd"
"""As it stands in a URL."""
SPOKEN = unquote(PASSWORD)


@pytest.mark.parametrize("option", ["", "?connect_timeout=3"])
def test_an_unreachable_postgres(
    closed_port: int, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailorstore.catalog.database.OPENING_SECONDS", 0.5)
    url = f"postgresql+psycopg://ts:{PASSWORD}@127.0.0.1:{closed_port}/catalog{option}"
    message = refused(
        lambda: ts.open_store(tmp_path / "root", catalog=url), CatalogUnavailableError, 60, PASSWORD, SPOKEN
    )
    assert f"127.0.0.1:{closed_port}" in message
    assert not (tmp_path / "root").exists()


def test_a_postgres_that_takes_calls_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.database.OPENING_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"postgresql://ts:{PASSWORD}@127.0.0.1:{deaf.getsockname()[1]}/catalog?connect_timeout=2"
        refused(lambda: ts.open_store(tmp_path / "root", catalog=url), CatalogUnavailableError, 60, PASSWORD)


def test_a_wrong_postgres_password(postgres_server: PostgresServer, tmp_path: Path) -> None:
    url = postgres_server.url().replace(postgres_server.password, PASSWORD)
    message = refused(lambda: ts.open_store(tmp_path / "root", catalog=url), AccessDeniedError, 60, PASSWORD, SPOKEN)
    assert "refused" in message


def test_a_catalog_that_goes_away_fails_the_commit_and_nothing_more(postgres_url: str, tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root", catalog=postgres_url) as store:
        store.commit(1, weights("x", 1))
        announce = store._catalog.announce
        name = postgres_url.rpartition("/")[2]

        def cut_off(*args: Any) -> Any:
            """Announce, then lose the database for good."""
            announced = announce(*args)
            rename(postgres_url, name, f"{name}_away")
            return announced

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store._catalog, "announce", cut_off)
            with pytest.raises(CatalogUnavailableError):
                store.commit(2, weights("x", 2))
        rename(postgres_url, f"{name}_away", name)
        assert [commit.step for commit in store.log()] == [1]
        store.commit(2, weights("x", 2))
        let_claims_lapse(store)
        store.gc(grace=timedelta(0))
        assert_root_is_exact(store)
        assert store.verify().ok


def rename(url: str, old: str, new: str) -> None:
    """Give a database of a PostgreSQL server another name, and end all sessions with it."""
    server = url.replace("postgresql+psycopg://", "postgresql://").rpartition("/")[0] + "/postgres"
    with contextlib.closing(psycopg.connect(server, autocommit=True)) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [old])
        for _ in range(100):
            with contextlib.suppress(psycopg.errors.ObjectInUse):
                connection.execute(f'ALTER DATABASE "{old}" RENAME TO "{new}"'.encode())
                return
            time.sleep(0.02)
    raise AssertionError(old)
