"""Fixtures that give a test a place for bytes and a place for rows: fresh each time, and of every kind.

Servers start when the first test asks for one, once in each pytest-xdist worker, and stop with the worker.
"""

import dataclasses
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.postgres import PostgresServer, postgres_programs, run_postgres
from tests.kit.processes import ServerMissingError, in_ci
from tests.kit.s3 import S3Server, run_s3, weed_program


@dataclasses.dataclass(frozen=True, slots=True)
class Root:
    """Where a store may keep its bytes, in the words of `tailorstore.open_store`."""

    url: str
    storage_options: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)


def require(find_program: Callable[[], Path]) -> None:
    """Skip the test, or in CI fail it, where a server is not installed."""
    try:
        find_program()
    except ServerMissingError as error:
        if in_ci():
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Give the S3 server that the tests of this worker share."""
    require(weed_program)
    with run_s3() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Give the PostgreSQL that the tests of this worker share."""
    require(postgres_programs)
    with run_postgres() as server:
        yield server


@pytest.fixture
def s3_root(s3_server: S3Server) -> Root:
    """Give a prefix of its own in a bucket of the S3 server."""
    return Root(f"s3://{s3_server.bucket}/{uuid.uuid4().hex[:12]}/run", s3_server.storage_options())


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """Give the URL of an empty PostgreSQL database."""
    with postgres_server.create_database() as url:
        yield url


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    """Give an empty root of each kind: a folder, memory, S3."""
    match request.param:
        case "file":
            return Root(f"file://{tmp_path}/root")
        case "memory":
            return Root(f"memory://{uuid.uuid4().hex[:12]}/run")
        case _:
            s3_root: Root = request.getfixturevalue("s3_root")
            return s3_root


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give the URL of an empty database of each kind: SQLite, PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/catalog.db"
    postgres_url: str = request.getfixturevalue("postgres_url")
    return postgres_url


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a server's fixtures, so that `-m "not s3"` leaves them out."""
    markers = {"s3_server": "s3", "s3_root": "s3", "postgres_server": "postgres", "postgres_url": "postgres"}
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in markers:
                item.add_marker(markers[fixture])
