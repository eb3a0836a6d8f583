"""Readers whose database user may only SELECT, or whose file may only be read: they read all, and write nothing."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import tailorstore as ts
from tailorstore.catalog.urls import parse_url
from tailorstore.cli.main import cli
from tailorstore.domain.errors import AccessDeniedError
from tests.catalog.kit import plain_sql
from tests.kit.models import assert_same

TABLES = ("stores", "commits", "versions", "composites", "branches", "tags", "lines", "pending", "leases", "receipts")


def weights(step: int) -> dict[str, torch.Tensor]:
    """Return what is committed at a step."""
    return {"a.w": torch.full((5,), float(step)), "b.w": torch.ones(2)}


@pytest.fixture
def root(tmp_path: Path, catalog_url: str) -> Path:
    """Give a store with two commits and a tag."""
    with ts.open_store(tmp_path / "root", catalog=catalog_url) as store:
        store.commit(1, weights(1))
        store.commit(2, weights(2))
        store.tag("best", 1)
    return tmp_path / "root"


@pytest.fixture
def reading(catalog_url: str, root: Path) -> Iterator[str]:
    """Give the URL by which the catalog can only be read."""
    assert root.is_dir()
    if catalog_url.startswith("sqlite"):
        yield f"{catalog_url}?mode=ro"
        return
    with plain_sql(catalog_url) as connection:
        connection.execute("DROP ROLE IF EXISTS reader")
        connection.execute("CREATE ROLE reader LOGIN PASSWORD 'r34ds'")
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    url = parse_url(catalog_url).url.set(username="reader", password="r34ds")
    yield url.render_as_string(hide_password=False)
    with plain_sql(catalog_url) as connection:
        connection.execute("DROP OWNED BY reader")
        connection.execute("DROP ROLE reader")


def everything(root: Path, catalog_url: str) -> tuple[dict[str, bytes], dict[str, list[Any]]]:
    """Return all that a store consists of: the files of its root, and the rows of its catalog."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    with plain_sql(catalog_url) as connection:
        rows = {table: sorted(map(repr, connection.execute(f"SELECT * FROM {table}"))) for table in TABLES}  # noqa: S608
    return files, rows


def test_a_reader_reads_all_and_writes_nothing(root: Path, catalog_url: str, reading: str, tmp_path: Path) -> None:
    before = everything(root, catalog_url)
    with ts.open_store(root, catalog=reading) as store:
        assert store.owned
        assert not store.writable
        assert [one.step for one in store.log()] == [2, 1]
        for ref, step in (("latest", 2), ("best", 1), ("main@1", 1)):
            with store.checkout(ref) as checkpoint:
                assert_same(checkpoint.model_state_dict(), weights(step))
                checkpoint.export(tmp_path / f"{ref[:4]}.safetensors")
        assert store.verify().ok
        assert store.diff(1, 2).changed
        assert store.stats().commits == 2
        assert [tag.name for tag in store.tags()] == ["best"]
        assert [layer.name for layer in store.layers()]
        assert everything(root, catalog_url) == before
        writes: list[Callable[[], object]] = [
            lambda: store.commit(3, weights(3)),
            lambda: store.commit(3, weights(3), block=False).result(60),
            lambda: store.tag("worst"),
            lambda: store.delete_tag("best"),
            lambda: store.branch("side"),
            lambda: store.branch("main", 1, move=True),
            lambda: store.gc(),
            lambda: store.gc(ts.KeepLast(1), grace=timedelta(0)),
            lambda: store.gc(ts.KeepLast(1), dry_run=True),
            lambda: store.rebuild_catalog(),
        ]
        for write in writes:
            with pytest.raises(AccessDeniedError, match="read"):
                write()
            assert everything(root, catalog_url) == before


COMMANDS = {
    "log": True,
    "show best": True,
    "stats": True,
    "diff 1 2": True,
    "verify": True,
    "checkout best --to OUT": True,
    "tag worst": False,
    "branch side": False,
    "gc --yes": False,
    "rebuild --yes": False,
}
"""Command to whether it only reads."""


def test_a_readers_commands(root: Path, catalog_url: str, reading: str, tmp_path: Path) -> None:
    before = everything(root, catalog_url)
    for command, reads in COMMANDS.items():
        words = command.replace("OUT", str(tmp_path / "out.safetensors")).split(" ")
        result = CliRunner().invoke(cli, ["--store", str(root), "--catalog", reading, *words], prog_name="tailorstore")
        assert (result.exit_code == 0) == reads, result.output
        assert reads or "read" in result.output
        assert "r34ds" not in result.output
    assert everything(root, catalog_url) == before
