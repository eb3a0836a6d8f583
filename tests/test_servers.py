"""The servers of the tests are what other tests take them for: real, strict, and gone afterwards."""

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import s3fs
from botocore.exceptions import ClientError

from tests.conftest import Root
from tests.kit import postgres, processes
from tests.kit.postgres import PostgresServer, run_postgres
from tests.kit.s3 import S3Key, S3Server, run_s3


def status_of(call: Callable[[], object]) -> int:
    """Return the HTTP status with which S3 refuses a call."""
    with pytest.raises(ClientError) as refusal:
        call()
    return int(refusal.value.response["ResponseMetadata"]["HTTPStatusCode"])


def gone(pid: int) -> bool:
    """Return whether a process has ended, or does within some seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


# --- S3


def test_s3_gives_back_what_was_put(s3_server: S3Server) -> None:
    with contextlib.closing(s3_server.client()) as client:
        client.put_object(Bucket=s3_server.bucket, Key="put/p/q", Body=b"\x00\xff" * 1000)
        body = client.get_object(Bucket=s3_server.bucket, Key="put/p/q")["Body"]
        with body:
            assert body.read() == b"\x00\xff" * 1000
    assert s3_server.keys(f"s3://{s3_server.bucket}/put/") == ["put/p/q"]


@pytest.mark.parametrize(
    "make_key",
    [
        pytest.param(lambda server: server.admin.with_wrong_secret(), id="wrong-secret"),
        pytest.param(lambda server: S3Key.fresh("stranger"), id="unknown-key"),
    ],
)
def test_s3_refuses_strangers(s3_server: S3Server, make_key: Callable[[S3Server], S3Key]) -> None:
    with contextlib.closing(s3_server.client(make_key(s3_server))) as client:
        put = {"Bucket": s3_server.bucket, "Key": "strange", "Body": b""}
        assert status_of(lambda: client.put_object(**put)) == 403
        assert status_of(lambda: client.list_objects_v2(Bucket=s3_server.bucket)) == 403


def test_s3_reader_only_reads(s3_server: S3Server) -> None:
    with contextlib.closing(s3_server.client()) as admin:
        admin.put_object(Bucket=s3_server.bucket, Key="read/me", Body=b"words")
    with contextlib.closing(s3_server.client(s3_server.reader)) as reader:
        with reader.get_object(Bucket=s3_server.bucket, Key="read/me")["Body"] as body:
            assert body.read() == b"words"
        listing = reader.list_objects_v2(Bucket=s3_server.bucket, Prefix="read/")
        assert [entry["Key"] for entry in listing["Contents"]] == ["read/me"]
        put = {"Bucket": s3_server.bucket, "Key": "read/me", "Body": b"other words"}
        assert status_of(lambda: reader.put_object(**put)) == 403
        assert status_of(lambda: reader.delete_object(Bucket=s3_server.bucket, Key="read/me")) == 403


def test_s3_has_no_bucket_that_nobody_made(s3_server: S3Server) -> None:
    with contextlib.closing(s3_server.client()) as client:
        assert status_of(lambda: client.put_object(Bucket="nobody-made-it", Key="k", Body=b"")) == 404
        assert status_of(lambda: client.list_objects_v2(Bucket="nobody-made-it")) == 404


def test_s3_keeps_a_bucket_that_holds_objects(s3_server: S3Server) -> None:
    bucket = s3_server.create_bucket()
    with contextlib.closing(s3_server.client()) as client:
        client.put_object(Bucket=bucket, Key="k", Body=b"")
        assert status_of(lambda: client.delete_bucket(Bucket=bucket)) == 409
        client.delete_object(Bucket=bucket, Key="k")
        client.delete_bucket(Bucket=bucket)


def test_s3_lets_one_writer_create_a_key(s3_server: S3Server) -> None:
    with contextlib.closing(s3_server.client()) as client:
        put = {"Bucket": s3_server.bucket, "Key": "once", "Body": b"first", "IfNoneMatch": "*"}
        client.put_object(**put)
        assert status_of(lambda: client.put_object(**put)) == 412


def test_s3_lists_more_than_one_page(s3_server: S3Server) -> None:
    bucket = s3_server.create_bucket()
    with contextlib.closing(s3_server.client()) as client:
        for number in range(1001):
            client.put_object(Bucket=bucket, Key=f"{number:04}", Body=b"")
        assert client.list_objects_v2(Bucket=bucket)["IsTruncated"]
    assert len(s3_server.keys(f"s3://{bucket}/")) == 1001


def test_s3_environment_is_enough_for_a_client(s3_server: S3Server, s3_root: Root) -> None:
    program = f"import s3fs; s3fs.S3FileSystem().pipe_file({s3_root.url + '/k'!r}, b'value')"
    subprocess.run([sys.executable, "-c", program], env=os.environ | s3_server.environment(), check=True)
    assert len(s3_server.keys(s3_root.url)) == 1


def test_s3_storage_options_are_enough_for_a_client(s3_root: Root) -> None:
    filesystem = s3fs.S3FileSystem(**s3_root.storage_options, skip_instance_cache=True)
    filesystem.pipe_file(f"{s3_root.url}/k", b"value")
    assert filesystem.cat_file(f"{s3_root.url}/k") == b"value"
    s3fs.S3FileSystem.close_session(filesystem.loop, filesystem.s3)


# --- PostgreSQL


def test_postgres_gives_back_what_was_inserted(postgres_server: PostgresServer, postgres_url: str) -> None:
    with contextlib.closing(postgres_server.connect(postgres_url.rpartition("/")[2])) as connection:
        connection.execute("CREATE TABLE t (x bigint, y text)")
        connection.execute("INSERT INTO t VALUES (%s, %s)", (2**62, "ü"))
        assert connection.execute("SELECT x, y FROM t").fetchall() == [(2**62, "ü")]


def test_postgres_databases_are_apart_and_dropped(postgres_server: PostgresServer) -> None:
    with postgres_server.create_database() as first, postgres_server.create_database() as second:
        assert first != second
        # Left open: somebody who forgets a connection does not keep the database alive.
        forgotten = postgres_server.connect(first.rpartition("/")[2])
    with contextlib.closing(postgres_server.connect()) as connection:
        names = {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
    assert names == {"postgres", "template0", "template1"}
    forgotten.close()


def test_postgres_refuses_a_wrong_password(postgres_server: PostgresServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(postgres_server.url().replace("+psycopg", "").replace(postgres_server.password, "guess"))


@pytest.mark.postgres
def test_postgres_runs_from_an_environment_that_is_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = postgres.postgres_programs().parents[1]
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for folder in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(folder, closed / folder.name, symlinks=True)
    programs = closed / package.name / "pginstall" / "bin"
    monkeypatch.setattr(postgres, "postgres_programs", lambda: programs)
    with run_postgres() as server, contextlib.closing(server.connect()) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


# --- both


@pytest.mark.s3
def test_s3_server_ends_and_leaves_nothing() -> None:
    with run_s3() as server:
        port = server.endpoint_url.rpartition(":")[2]
        directory = os.readlink(f"/proc/{server.pid}/cwd")
        assert os.path.isdir(directory)
    assert gone(server.pid)
    assert not os.path.exists(directory)
    assert glob.glob(f"/tmp/seaweedfs-*-{port}.sock") == []


@pytest.mark.postgres
def test_postgres_server_ends_and_leaves_nothing() -> None:
    with run_postgres() as server:
        directory = os.path.dirname(os.readlink(f"/proc/{server.pid}/cwd"))
        assert os.path.isdir(directory)
    assert gone(server.pid)
    assert not os.path.exists(directory)


@pytest.mark.parametrize(
    "run",
    [
        pytest.param("tests.kit.s3.run_s3", marks=pytest.mark.s3),
        pytest.param("tests.kit.postgres.run_postgres", marks=pytest.mark.postgres),
    ],
)
def test_a_server_dies_with_a_process_that_is_killed(run: str) -> None:
    module, _, function = run.rpartition(".")
    program = (
        f"import time; from {module} import {function}\n"
        f"with {function}() as server: print(server.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        assert os.path.exists(f"/proc/{pid}")
        holder.send_signal(signal.SIGKILL)
    assert gone(pid)


@pytest.mark.parametrize("place", [0, 2, 6])  # S3, master, filer
def test_s3_tries_again_when_a_port_is_taken(place: int, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    tried = take_first_port(monkeypatch, "tests.kit.s3", place, int(s3_server.endpoint_url.rpartition(":")[2]))
    with run_s3() as server:
        assert server.endpoint_url != s3_server.endpoint_url
    assert len(tried) == 2


def test_postgres_tries_again_when_its_port_is_taken(
    monkeypatch: pytest.MonkeyPatch, postgres_server: PostgresServer
) -> None:
    tried = take_first_port(monkeypatch, "tests.kit.postgres", 0, postgres_server.port)
    with run_postgres() as server:
        assert server.port != postgres_server.port
    assert len(tried) == 2


def take_first_port(monkeypatch: pytest.MonkeyPatch, module: str, place: int, taken: int) -> list[list[int]]:
    """Make a server's first try find one port taken, and return the list that holds the ports of each try."""
    tried: list[list[int]] = []

    @contextlib.contextmanager
    def reserve_ports(count: int) -> Iterator[list[int]]:
        with processes.reserve_ports(count) as ports:
            if not tried:
                ports[place] = taken
            tried.append(ports)
            yield ports

    monkeypatch.setattr(f"{module}.reserve_ports", reserve_ports)
    return tried


def test_reserved_ports_are_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with processes.reserve_ports(1) as (first,):
        numbers = iter([first, first, first + 1, first + 1, *range(first + 2, first + 1000)])
        monkeypatch.setattr("random.randrange", lambda *_: next(numbers))
        with processes.reserve_ports(2) as others:
            assert first not in others
            assert len(set(others)) == 2


def test_a_server_that_does_not_start_shows_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("tests.kit.s3.weed_program", lambda: program)
    with pytest.raises(processes.ServerStartError, match="out of luck"), run_s3():
        pass


def test_a_program_that_cannot_run_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "server"
    directory.mkdir()
    with pytest.raises(processes.ServerStartError, match="FileNotFoundError"):
        processes.Leash([tmp_path / "no-such-program"], directory=directory, port_taken="taken")
    assert not directory.exists()


def test_every_kind_of_root_and_catalog(root: Root, catalog_url: str) -> None:
    assert root.url.split(":")[0] in {"file", "memory", "s3"}
    assert catalog_url.split(":")[0] in {"sqlite", "postgresql+psycopg"}
    assert "secret" not in repr(root)
