"""A SQLite catalog that is locked, on a full disk, damaged, replaced or deleted: told, and put right as told."""

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tailorstore.catalog.sqlite import is_on_network
from tailorstore.domain.errors import (
    AccessDeniedError,
    CatalogDamagedError,
    CatalogUnavailableError,
    RootTakenError,
    TailorError,
)
from tests.kit.audit import assert_root_is_exact, let_claims_lapse
from tests.kit.models import assert_same
from tests.kit.small_disk import SmallDisk

NOW = timedelta(0)


def weights(step: int) -> dict[str, torch.Tensor]:
    """Return what is committed at a step."""
    return {f"{layer}.w": torch.full((5,), step + at / 100) for at, layer in enumerate("abcdefgh")}


def check_all(store: ts.Store, steps: list[int]) -> None:
    """Fail unless a store has commits of these steps, newest first, and all read back."""
    assert [one.step for one in store.log()] == steps
    for step in steps:
        with store.checkout(step) as checkpoint:
            assert_same(checkpoint.model_state_dict(), weights(step))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a store with three commits and a tag, whose catalog is a file of its own."""
    folder = tmp_path / "root"
    with ts.open_store(folder) as store:
        for step in (1, 2, 3):
            store.commit(step, weights(step))
        store.tag("second", 2)
    return folder


# --- Locked by another process


@contextlib.contextmanager
def held_by_another(path: Path, seconds: float) -> Iterator[None]:
    """Let another process hold the lock of a database for some seconds."""
    program = (
        "import sqlite3, sys, time; held = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "held.execute('BEGIN IMMEDIATE'); print('held', flush=True); time.sleep(float(sys.argv[2]))"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(path), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield
        finally:
            holder.kill()


def test_a_lock_is_waited_for_within_the_bound(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "catalog.sqlite"
    with ts.open_store(root) as store, held_by_another(path, 0.4):
        began = time.monotonic()
        store.commit(4, weights(4))
        assert time.monotonic() - began > 0.2
    for module in ("database", "sqlite"):
        monkeypatch.setattr(f"tailorstore.catalog.{module}.LOCK_SECONDS", 0.2)
    with ts.open_store(root) as store:
        objects = store._objects.list("layers/")
        before = sorted(info.key for info in objects)
        with (
            held_by_another(path, 60),
            pytest.raises(CatalogUnavailableError, match="stayed locked by another process"),
        ):
            store.commit(5, weights(5))
        assert sorted(info.key for info in store._objects.list("layers/")) == before
        check_all(store, [4, 3, 2, 1])
        store.commit(5, weights(5))
        let_claims_lapse(store)
        store.gc(grace=NOW)
        assert_root_is_exact(store)


# --- A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Give a small disk."""
    disk = SmallDisk(tmp_path / "small")
    yield disk
    disk.end()


def test_a_disk_that_is_full_at_any_write_of_the_catalog_leaves_it_as_it_was(
    small_disk: SmallDisk, tmp_path: Path
) -> None:
    """The root is elsewhere, so that it is the catalog alone that has no room."""
    outcomes: Counter[str] = Counter()
    catalog = f"sqlite:///{small_disk.folder}/catalog.db"
    with ts.open_store(tmp_path / "root", catalog=catalog) as store:
        head = store.commit(1, weights(1))
    room = 0
    while outcomes["published"] < 2:
        # Opened anew, so that the write-ahead log is to be made anew, too.
        with ts.open_store(tmp_path / "root", catalog=catalog) as store:
            store.log()
            with small_disk.full(room):
                try:
                    made = store.commit(head.step + 1, weights(head.step + 1))
                except CatalogUnavailableError:
                    outcomes["refused"] += 1
                    assert store.log(limit=1) == [head]
                    made = head
                else:
                    outcomes["published"] += 1
            assert store.log(limit=1) == [made]
            # There is room again, and the same store goes on.
            head = store.commit(made.step + 1, weights(made.step + 1))
            with store.checkout() as checkpoint:
                assert_same(checkpoint.model_state_dict(), weights(head.step))
        room += 4096
    assert outcomes["refused"] >= 6, outcomes
    with contextlib.closing(sqlite3.connect(small_disk.folder / "catalog.db")) as plain:
        assert plain.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with ts.open_store(tmp_path / "root", catalog=catalog) as store:
        let_claims_lapse(store)
        store.gc(grace=NOW)
        assert_root_is_exact(store)
        assert store.verify().ok


# --- Damaged


def garbled(content: bytes) -> bytes:
    return content[:4096] + random.Random(1).randbytes(len(content) - 4096)


DAMAGES = {
    "pages of noise": garbled,
    "cut in half": lambda content: content[: len(content) // 2],
    "cut within a page": lambda content: content[:5000],
    "not a database": lambda content: b"Not a database. " * (len(content) // 16),
    "header of noise": lambda content: random.Random(2).randbytes(100) + content[100:],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_catalog_is_told_and_rebuilt_as_the_error_says(root: Path, tmp_path: Path, kind: str) -> None:
    path = root / "catalog.sqlite"
    path.write_bytes(DAMAGES[kind](path.read_bytes()))
    with pytest.raises(CatalogDamagedError) as caught, ts.open_store(root) as store:
        store.log()
    told = str(caught.value)
    assert "is damaged" in told
    assert f"move {path} away, with catalog.sqlite-wal and catalog.sqlite-shm" in told
    assert "rebuild_catalog()" in told
    for beside in root.glob("catalog.sqlite*"):
        beside.rename(tmp_path / beside.name)
    with ts.open_store(root) as store:
        assert not store.writable
        check_all(store, [3, 2, 1])
        assert store.rebuild_catalog().commits == 3
        check_all(store, [3, 2, 1])
        assert store.show("second").step == 2
        store.commit(4, weights(4))
        store.gc(grace=NOW)
        assert_root_is_exact(store)
        assert store.verify().ok


def test_an_empty_catalog_is_none_and_the_root_is_read(root: Path) -> None:
    (root / "catalog.sqlite").write_bytes(b"")
    with ts.open_store(root) as store:
        check_all(store, [3, 2, 1])
        with pytest.raises(RootTakenError, match="rebuild_catalog"):
            store.commit(4, weights(4))
        store.rebuild_catalog()
        store.commit(4, weights(4))
        check_all(store, [4, 3, 2, 1])


def test_noise_in_the_file_is_told_by_no_other_error(root: Path, tmp_path: Path) -> None:
    """SQLite has no checksums: noise may go unseen, but what comes out is the store's error or a plain answer."""
    path = root / "catalog.sqlite"
    sound = path.read_bytes()
    chance = random.Random(7)
    outcomes: Counter[str] = Counter()
    catalog = tmp_path / "flipped.db"
    url = f"sqlite:///{catalog}"
    for _ in range(25):
        flipped = bytearray(sound)
        for _ in range(chance.choice([1, 4, 16])):
            at = chance.randrange(len(flipped) - 64)
            flipped[at : at + 64] = chance.randbytes(64)
        catalog.write_bytes(flipped)
        try:
            with ts.open_store(root, catalog=url, create=False) as store:
                for branch in store.branches():
                    store.log(branch.name)
                store.tags()
                store.stats()
                store.layers()
                store.updates()
                store.verify()
                store.gc(dry_run=True)
        except TailorError as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes["answered"] += 1
        for beside in tmp_path.glob("flipped.db*"):
            beside.unlink(missing_ok=True)
    assert outcomes["CatalogDamagedError"] > 5, outcomes
    with ts.open_store(root) as store:
        check_all(store, [3, 2, 1])


# --- Replaced or removed while it is open


@pytest.mark.parametrize("how", ["removed", "replaced by a copy", "replaced by an older one", "the whole folder moved"])
def test_a_catalog_that_vanishes_under_a_running_process_publishes_nothing(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "catalogs"
    path = folder / "catalog.db"
    root = tmp_path / "root"
    url = f"sqlite:///{path}"
    with ts.open_store(root, catalog=url) as store:
        store.commit(1, weights(1))
    shutil.copy(path, tmp_path / "older.db")
    store = ts.open_store(root, catalog=url)
    store.commit(2, weights(2))
    if how == "removed":
        path.unlink()
    elif how == "the whole folder moved":
        folder.rename(tmp_path / "elsewhere")
    else:
        copy = tmp_path / "copy.db"
        shutil.copy(path if how == "replaced by a copy" else tmp_path / "older.db", copy)
        copy.replace(path)
    before = sorted(info.key for info in store._objects.list())
    for call in (lambda: store.commit(3, weights(3)), lambda: store.tag("x"), lambda: store.log(), lambda: store.gc()):
        with pytest.raises(CatalogDamagedError, match="removed or replaced while it was open"):
            call()
    assert sorted(info.key for info in store._objects.list()) == before
    assert path.exists() == how.startswith("replaced")
    store.close()
    for beside in folder.glob("catalog.db*") if folder.exists() else ():
        beside.unlink()
    with ts.open_store(root, catalog=url) as store:
        store.rebuild_catalog()
        check_all(store, [2, 1])
        store.commit(3, weights(3))
        check_all(store, [3, 2, 1])


def test_logs_of_another_time_beside_a_restored_file_are_found_or_harmless(tmp_path: Path) -> None:
    """Whoever restores the file and leaves ``-wal`` and ``-shm`` of the newer one beside it mixes two databases."""
    root = tmp_path / "root"
    path = root / "catalog.sqlite"
    with ts.open_store(root) as store:
        store.commit(1, weights(1))
    older = path.read_bytes()
    store = ts.open_store(root)
    for step in range(2, 13):
        store.commit(step, weights(step))
    logs = {name: (root / name).read_bytes() for name in ("catalog.sqlite-wal", "catalog.sqlite-shm")}
    store.close()
    path.write_bytes(older)
    for name, content in logs.items():
        (root / name).write_bytes(content)
    found: list[int] = []
    with contextlib.suppress(TailorError), ts.open_store(root) as store:
        found = [one.step for one in store.log()]
        for step in found:
            with store.checkout(step) as checkpoint:
                assert_same(checkpoint.model_state_dict(), weights(step))
    assert found in ([], list(range(12, 0, -1)))
    for beside in root.glob("catalog.sqlite*"):
        beside.unlink()
    with ts.open_store(root) as store:
        store.rebuild_catalog()
        check_all(store, list(range(12, 0, -1)))


# --- Where it may not be written, or not with a write-ahead log


def test_a_store_on_a_file_system_that_is_read_only_is_read(small_disk: SmallDisk) -> None:
    root = small_disk.folder / "root"
    with ts.open_store(root) as store:
        store.commit(1, weights(1))
    with small_disk.read_only() as mounted, ts.open_store(root) as store:
        check_all(store, [1])
        assert store.verify().ok
        if mounted:
            assert not store.writable
            for write in (lambda: store.commit(2, weights(2)), lambda: store.tag("x"), lambda: store.gc()):
                with pytest.raises(AccessDeniedError):
                    write()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mounts_of_file_systems_that_machines_share_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_on_network(tmp_path / "catalog.db")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"40 22 0:50 / {tmp_path}/my\\040home rw shared:9 - nfs4 server:/home rw\n"
        f"41 40 0:51 / {tmp_path}/my\\040home/scratch rw - xfs /dev/sdb rw\n"
        f"42 22 0:52 / {tmp_path}/s3 rw - fuse.s3fs s3fs rw\n"
        f"43 22 0:53 / {tmp_path}/over rw - nfs server:/x rw\n"
        f"44 43 0:54 / {tmp_path}/over rw - tmpfs tmpfs rw\n"
        f"45 22 8:32 / {tmp_path}/cluster rw - ocfs2 /dev/sdc rw\n"
    )
    monkeypatch.setattr("tailorstore.catalog.sqlite._MOUNTS", mounts)
    shared = {
        name: is_on_network(tmp_path / name / "run" / "c.db")
        for name in ("my home", "my home/scratch", "s3", "over", "cluster", "x")
    }
    assert shared == {
        "my home": True,
        "my home/scratch": False,
        "s3": True,
        "over": False,
        "cluster": True,
        "x": False,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_on_a_shared_file_system_there_is_no_write_ahead_log(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stores and a reader at once, as on two machines; what a file system shares is its files alone."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text("22 1 8:1 / / rw,relatime shared:1 - nfs4 server:/export rw\n")
    monkeypatch.setattr("tailorstore.catalog.sqlite._MOUNTS", mounts)
    # What was made elsewhere has a log; whoever may write does away with it.
    ts.open_store(root).close()
    over = threading.Event()
    logs: list[str] = []

    def train(branch: str) -> list[ts.Commit]:
        with ts.open_store(root, branch=branch) as store:
            return [store.commit(step, weights(step)) for step in range(10, 20)]

    def watch() -> int:
        looks = 0
        while not over.is_set():
            logs.extend(path.name for path in root.glob("catalog.sqlite-wal"))
            with ts.open_store(f"{root}", catalog=f"sqlite:///{root}/catalog.sqlite?mode=ro") as store:
                check_all(store, [3, 2, 1])
            looks += 1
        return looks

    with ThreadPoolExecutor(3) as pool:
        watching = pool.submit(watch)
        made = {branch: pool.submit(train, branch) for branch in ("one", "two")}
        try:
            commits = {branch: run.result(60) for branch, run in made.items()}
        finally:
            over.set()
        assert watching.result(60) > 0
    assert logs == []
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite")) as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    with ts.open_store(root) as store:
        for branch, expected in commits.items():
            assert store.log(branch) == expected[::-1]
        assert os.path.exists(root / "catalog.sqlite")
