"""Stores that earlier versions wrote, and those of this one, are read to the bit, rebuilt, and gone on with.

``tests/data/README.md`` says how a version adds its own.
"""

import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

import tailorstore as ts
from tailorstore.catalog.schema import HEAD, REVISIONS, VERSION_TABLE, migrate
from tailorstore.catalog.urls import parse_url
from tailorstore.domain.errors import SchemaOutdatedError
from tailorstore.storage import layers, manifests
from tests.kit import archives
from tests.kit.audit import assert_root_is_exact
from tests.kit.fixtures import STORES
from tests.kit.kept import assert_as_kept, must_be, read_back, refs_of
from tests.kit.stores import GOOD, ROOT_IN_DUMP, make_history

KEPT: Final = sorted(path.name.removesuffix(".tar.xz") for path in STORES.glob("*.tar.xz"))
IN_POSTGRES: Final = [name for name in KEPT if name.endswith("-postgres")]
IN_SQLITE: Final = [name for name in KEPT if name not in IN_POSTGRES]
RUNS: Final = [name for name in KEPT if name.endswith("-training")]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

Fetch = Callable[[str], Path]


@cache
def about(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STORES / f"{name}.json").read_text())
    return found


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """Give a function that makes a folder of a kept store, its catalog brought up to date as a user would do it."""

    def unpacked(name: str) -> Path:
        root = archives.unpack(STORES / f"{name}.tar.xz", tmp_path / name)
        if name in IN_SQLITE and about(name)["formats"]["schema"] != HEAD:
            upgrade(root)
        return root

    return unpacked


def upgrade(root: Path) -> None:
    with pytest.raises(SchemaOutdatedError, match="tailorstore upgrade"):
        ts.open_store(root, create=False)
    migrate(parse_url(f"sqlite:///{root}/catalog.sqlite"))


def assert_all_read(store: ts.Store, name: str) -> None:
    for commit_id in about(name)["commits"]:
        assert read_back(store, commit_id) == must_be(about(name), commit_id)


# --- What is kept


def test_every_store_is_of_formats_that_this_version_reads() -> None:
    for name in KEPT:
        formats = about(name)["formats"]
        assert formats.keys() == {"documents", "layers", "schema"}, name
        assert 1 <= formats["documents"] <= manifests.FORMAT, name
        assert 1 <= formats["layers"] <= layers.FORMAT, name
        assert formats["schema"] in REVISIONS, name


def test_this_version_and_its_formats_have_their_stores() -> None:
    """A release, or a change of a format, adds its stores: see ``tests/data/README.md``."""
    mine = {name.removeprefix(f"{ts.__version__}-") for name in KEPT if name.startswith(f"{ts.__version__}-")}
    assert mine == set(GOOD)
    for name in mine:
        kept = about(f"{ts.__version__}-{name}")
        assert kept["written_by"] == ts.__version__
        assert kept["formats"] == {"documents": manifests.FORMAT, "layers": layers.FORMAT, "schema": HEAD}
    described = {path.name.removesuffix(".json") for path in STORES.glob("*.json")}
    assert described == set(KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_a_store_is_what_is_said_of_it(tmp_path: Path, name: str) -> None:
    root = archives.unpack(STORES / f"{name}.tar.xz", tmp_path / "root")
    formats = about(name)["formats"]
    documents = [root / "tailorstore.json", *root.glob("commits/*.json"), *root.glob("refs/*.json")]
    assert {json.loads(path.read_text())["format"] for path in documents} == {formats["documents"]}
    groups = [json.loads(path.read_text()) for path in root.glob("layers/*/*/zarr.json")]
    assert {group["attributes"]["tailorstore"]["format"] for group in groups} == {formats["layers"]}
    assert {path.stem for path in root.glob("commits/*.json")} == set(about(name)["commits"])
    if name in IN_SQLITE:
        connection = sqlite3.connect(root / "catalog.sqlite")
        ((schema,),) = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}")  # noqa: S608
        connection.close()
        assert schema == formats["schema"]
    else:
        dumped = re.search(rf"INTO public.{VERSION_TABLE} VALUES \('(\w+)'\)", (root / "catalog.sql").read_text())
        assert dumped
        assert dumped[1] == formats["schema"]


def test_packing_is_the_same_bytes_each_time_and_a_store_can_be_made_today(tmp_path: Path) -> None:
    made = make_history(tmp_path / "root")
    archives.settle(made.root / "catalog.sqlite")
    for archive in ("one.tar.xz", "two.tar.xz"):
        archives.pack(made.root, tmp_path / archive)
    assert (tmp_path / "one.tar.xz").read_bytes() == (tmp_path / "two.tar.xz").read_bytes()
    again = archives.unpack(tmp_path / "one.tar.xz", tmp_path / "again")
    with ts.open_store(again, create=False) as store:
        assert_as_kept(store, made.recorder.kept(store))


# --- What they are good for


@pytest.mark.parametrize("name", IN_SQLITE)
def test_every_ref_reads_back_exactly(fetch: Fetch, name: str) -> None:
    with ts.open_store(fetch(name), create=False) as store:
        assert store.writable
        assert_as_kept(store, about(name))
        report = store.verify()
        assert report.damages == ()
        assert report.objects > len(about(name)["commits"])


@pytest.mark.parametrize("name", KEPT)
def test_the_root_alone_is_enough(fetch: Fetch, name: str) -> None:
    root = fetch(name)
    for catalog in root.glob("catalog.*"):
        catalog.unlink()
    with ts.open_store(root, create=False) as store:
        assert not store.writable
        assert_as_kept(store, about(name))
        report = store.rebuild_catalog()
        assert (report.commits, report.unreadable, report.unplaced) == (len(about(name)["commits"]), (), ())
        assert_as_kept(store, about(name))
        assert store.verify().ok
    with ts.open_store(root, create=False) as store:
        assert store.writable


@pytest.mark.parametrize("name", IN_SQLITE)
def test_a_run_goes_on_and_garbage_is_collected(fetch: Fetch, name: str) -> None:
    root, refs = fetch(name), refs_of(about(name))
    for branch, log in about(name)["logs"].items():
        with ts.open_store(root, branch=branch, chunk_bytes=1024) as store:
            with store.checkout(branch) as checkpoint:
                model, optim, step = checkpoint.model_state_dict(), checkpoint.optim_state_dict(), checkpoint.step
            changed = next(name for name, tensor in model.items() if tensor.is_floating_point() and tensor.numel() > 20)
            model[changed] = model[changed] * 2
            mask = ts.parse_strategy("top_k(1)") if name in RUNS else None
            commit = store.commit(step + 1, model, optim, mask=mask, extra={"more": True})
            assert commit.parent == log[0]
            assert set(commit.layers_written) >= {layer for layer in commit.layers_written if changed.startswith(layer)}
            with store.checkout() as checkpoint:
                assert read_back(store, "latest")["model"][changed] != read_back(store, log[0])["model"][changed]
                assert checkpoint.extra == {"more": True}
    with ts.open_store(root, create=False) as store:
        first = store.gc(grace=timedelta(0))
        assert (first.expired, first.leftovers_swept, first.deletes_failed) == ((), 0, 0)
        assert_root_is_exact(store)
        assert_all_read(store, name)
        store.gc(ts.KeepTagged(), grace=timedelta(0))
        assert_root_is_exact(store)
        for tag, commit_id in about(name)["tags"].items():
            assert read_back(store, tag) == must_be(about(name), commit_id)
        assert store.verify().ok
        left = {commit.id for branch in store.branches() for commit in store.log(branch.name)}
        assert left & set(refs.values()) <= set(about(name)["tags"].values())


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("revision", REVISIONS[2:-1])
def test_a_catalog_of_an_older_schema_is_upgraded(fetch: Fetch, name: str, revision: str) -> None:
    root = fetch(name)
    url = parse_url(f"sqlite:///{root}/catalog.sqlite")
    migrate(url, revision)
    upgrade(root)
    with ts.open_store(root, create=False) as store:
        assert store.writable
        assert_as_kept(store, about(name))
        # Catalogs from before lines had ids cannot know those that manifests name.
        damages = store.verify(repair=True).damages
        assert bool(damages) == (revision < "0005")
        assert all("holds: lines; 'tailorstore rebuild' goes by the manifest" in one.detail for one in damages)
        if damages:
            store.rebuild_catalog()
        assert store.verify().damages == ()
        store.gc(grace=timedelta(0))
        assert_as_kept(store, about(name))


ZARR_ALONE: Final = """
import hashlib, json, sys, zarr
found = {}
for path in json.load(sys.stdin):
    array = zarr.open_array(path, mode="r")
    found[path] = hashlib.blake2b(array[...].tobytes(), digest_size=16).hexdigest()
assert not any(name.startswith(("tailorstore", "torch")) for name in sys.modules)
print(json.dumps(found))
"""


@pytest.mark.parametrize("name", [name for name in KEPT if name.endswith("-kinds")])
def test_zarr_python_alone_reads_the_arrays(fetch: Fetch, name: str) -> None:
    root = fetch(name)
    listed = {
        str(root / "layers" / layer / version / tensor): described.split()[-1]
        for layer in ("kinds", "chunks")
        for version, part in about(name)["versions"][layer].items()
        for tensor, described in part["model"].items()
        if not described.startswith(("tensor bfloat", "tensor float8"))
    }
    assert len(listed) == 3 * (15 + 3)
    done = subprocess.run(
        [sys.executable, "-c", ZARR_ALONE],
        input=json.dumps(list(listed)),
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == listed


@pytest.mark.parametrize("name", IN_POSTGRES)
def test_a_dump_of_a_postgres_catalog_is_restored(fetch: Fetch, postgres_url: str, name: str) -> None:
    root = fetch(name)
    dump = (root / "catalog.sql").read_text().replace(ROOT_IN_DUMP, f"file://{root}")
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(dump.encode())
    if about(name)["formats"]["schema"] != HEAD:
        with pytest.raises(SchemaOutdatedError):
            ts.open_store(root, catalog=postgres_url, create=False)
        migrate(parse_url(postgres_url))
    with ts.open_store(root, catalog=postgres_url, create=False) as store:
        assert store.writable
        assert_as_kept(store, about(name))
        assert store.verify().ok
        with store.checkout() as checkpoint:
            model = checkpoint.model_state_dict()
        store.commit(10, model)
        store.gc(grace=timedelta(0))
        assert_all_read(store, name)
