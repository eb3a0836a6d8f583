"""What comes back from a root, exactly, and what is listed: of one whose catalog is lost, older, newer or foreign."""

import gc as memory
import os
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as given_any
from hypothesis import strategies as st

import tailorstore as ts
from tailorstore.domain.errors import (
    CatalogDamagedError,
    CatalogOutdatedError,
    CorruptDocumentError,
    HeadMovedError,
    LeaseExpiredError,
    RootTakenError,
)
from tailorstore.domain.names import COMMITS_PREFIX, manifest_key, version_prefix
from tailorstore.domain.records import Commit
from tailorstore.domain.retention import Inventory
from tailorstore.engine import publish as publishing
from tests.catalog.kit import plain_postgres
from tests.conftest import Root
from tests.kit.audit import all_commits, assert_root_is_exact, let_claims_lapse, refs

NOW = timedelta(0)
LAPSED = timedelta(seconds=-1)


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.w": torch.full((64,), value), "b.w": torch.full((64,), value)}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder in memory where there is one: flushes to a disk are slow, and tell nothing here."""
    memory_folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ts-rebuild-", dir=memory_folder) as made:
        yield Path(made)


def copy_root(root: Path, target: Path) -> Path:
    shutil.copytree(root, target, ignore=shutil.ignore_patterns("catalog.sqlite*"))
    return target


def back_up(catalog: Path, backup: Path) -> None:
    """Copy a SQLite catalog as its users are told to."""
    with sqlite3.connect(catalog) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    source.close()
    target.close()


def restore(backup: Path, catalog: Path) -> None:
    for left in catalog.parent.glob(f"{catalog.name}*"):
        left.unlink()
    shutil.copy(backup, catalog)


def everything(store: ts.Store) -> dict[str, Any]:
    """Return all that a store can say of its history."""
    catalog = store._catalog
    commits = all_commits(store)
    stats = store.stats()
    return {
        "logs": {ref.name: store.log(ref.name) for ref in store.branches()},
        "names": refs(store),
        "unreachable": {commit.id for commit in catalog.inventory().unreachable},
        "composites": {one: catalog.composite(one) for one in commits},
        "measures": {one: catalog.measures_of(one) for one in commits},
        "sizes": (stats.commits, stats.versions, stats.bytes_stored, stats.bytes_logical, stats.tags),
    }


# --- A catalog that is lost ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keep:
    """A policy that keeps certain commits, and nothing else."""

    ids: frozenset[str]

    def keep(self, inventory: Inventory) -> Iterable[tuple[str, str]]:
        del inventory
        return ((one, "chosen") for one in self.ids)


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given_any(chance=st.randoms(use_true_random=False), steps=st.integers(12, 22))
def test_whatever_was_moved_or_expired_all_that_is_left_comes_back_exactly(
    folder: Path, chance: random.Random, steps: int
) -> None:
    here = Path(tempfile.mkdtemp(dir=folder))
    opened: dict[str, ts.Store] = {}
    main = opened["main"] = ts.open_store(here / "root")
    main.commit(1, weights(0))
    for step in range(2, steps):
        branch = chance.choice([ref.name for ref in main.branches()])
        commits = sorted(all_commits(main))
        match chance.randrange(8):
            case 0:
                main.branch(f"b{step}", chance.choice(commits))
            case 1 | 2:
                main.branch(branch, chance.choice(commits), move=True)
            case 3 if len(main.branches()) > 1:
                main.delete_branch(branch)
            case 4:
                main.tag(f"t{step}", chance.choice(commits))
            case 5:
                main.gc(Keep(frozenset(chance.sample(commits, len(commits) // 2))), grace=NOW)
            case _:
                store = opened.setdefault(branch, ts.open_store(here / "root", branch=branch))
                mask = chance.choice([None, ["a"], {"b": "light"}, []])
                store.commit(step, weights(chance.randrange(3)), mask=mask, metrics={"loss": 1 / step})
    main.gc(grace=NOW)
    before = everything(main)
    with ts.open_store(copy_root(here / "root", here / "copy")) as copy:
        # What is read through a catalog made for the occasion is exact, too.
        assert not copy.writable
        assert everything(copy) == before
        report = copy.rebuild_catalog()
        assert everything(copy) == before
        assert (report.commits, report.unplaced, report.unreadable, report.incomplete) == (
            len(before["composites"]),
            (),
            (),
            (),
        )
        for name, log in before["logs"].items():
            assert copy._catalog.lines_of(name) == main._catalog.lines_of(name)
            with ts.open_store(here / "copy", branch=name) as other:
                other.commit(1000, weights(7))
                assert other.log()[1:] == log
        assert_root_is_exact(copy)
    for store in opened.values():
        store.close()
    shutil.rmtree(here)


def test_a_rebuild_can_be_tried_without_changing_anything(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
        store.commit(2, weights(2))
        store.tag("t", 1)
    root = copy_root(tmp_path / "root", tmp_path / "copy")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with ts.open_store(root) as copy:
        report = copy.rebuild_catalog(dry_run=True)
        assert (report.dry_run, report.commits, report.branches, report.tags) == (True, 2, ("main",), ("t",))
        assert not copy.writable
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    with ts.open_store(root) as copy:
        done = copy.rebuild_catalog()
        assert (done.dry_run, done.commits, done.versions, done.epoch) == (False, 2, report.versions, 2)


# --- A catalog that is older than its root ---------------------------------------------------------------------------


@pytest.fixture
def restored(root: Root, tmp_path: Path) -> tuple[Root, str]:
    """Give a root and its catalog as a backup from before the last commits had it."""
    catalog, backup = tmp_path / "catalog.db", tmp_path / "backup.db"
    url = f"sqlite:///{catalog}"
    with ts.open_store(root.url, catalog=url, storage_options=root.storage_options) as store:
        for step in (1, 2, 3):
            store.commit(step, weights(step))
        back_up(catalog, backup)
        for step in (4, 5):
            store.commit(step, weights(step))
        store.branch("side", 2)
    with ts.open_store(root.url, catalog=url, branch="side", storage_options=root.storage_options) as side:
        side.commit(9, weights(9))
    restore(backup, catalog)
    return root, url


def test_a_catalog_that_is_older_than_its_root_decides_nothing(
    restored: tuple[Root, str], caplog: pytest.LogCaptureFixture
) -> None:
    root, url = restored
    with ts.open_store(root.url, catalog=url, storage_options=root.storage_options) as store:
        assert "older than the root" in caplog.text
        assert "3 of the commits there (main@4 to 5, side@9)" in caplog.text
        assert (store.writable, store.owned) == (False, False)
        assert [commit.step for commit in store.log()] == [5, 4, 3, 2, 1]
        assert store.checkout().model_state_dict()["a.w"][0] == 5
        keys = {info.key for info in store._objects.list()}
        for write in (lambda: store.commit(6, weights(6)), lambda: store.gc(grace=NOW), lambda: store.tag("t", 1)):
            with pytest.raises(CatalogOutdatedError, match="rebuild"):
                write()
        assert {info.key for info in store._objects.list()} == keys
        report = store.rebuild_catalog()
        assert (report.commits, report.branches, report.unplaced) == (6, ("main", "side"), ())
        store.commit(6, weights(6))
        assert store.gc(grace=NOW).leftovers_swept == 0
        assert store.verify().ok
        assert [commit.step for commit in store.log("side")] == [9, 2, 1]
    with ts.open_store(root.url, catalog=url, storage_options=root.storage_options) as store:
        assert store.writable
        assert [commit.step for commit in store.log()] == [6, 5, 4, 3, 2, 1]


def test_an_older_catalog_in_postgres_is_found_out_too(postgres_url: str, tmp_path: Path) -> None:
    backup = f"{postgres_url}_backup"
    with ts.open_store(tmp_path / "root", catalog=postgres_url) as store:
        store.commit(1, weights(1))
    name = postgres_url.rpartition("/")[2]
    plain = plain_postgres(postgres_url).removesuffix(name) + "postgres"
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}_backup" TEMPLATE "{name}"'.encode())
    try:
        with ts.open_store(tmp_path / "root", catalog=postgres_url) as store:
            store.commit(2, weights(2))
        with ts.open_store(tmp_path / "root", catalog=backup) as store:
            assert [commit.step for commit in store.log()] == [2, 1]
            with pytest.raises(CatalogOutdatedError, match=r"1 of the commits there \(main@2\)"):
                store.commit(3, weights(3))
            store.rebuild_catalog()
            store.commit(3, weights(3))
        with ts.open_store(tmp_path / "root", catalog=postgres_url) as lost, pytest.raises(RootTakenError):
            lost.commit(3, weights(3))
    finally:
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{name}_backup" WITH (FORCE)'.encode())


def test_gc_finds_out_whatever_the_clocks_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer whose clock was a year behind makes ids that the look at opening does not reach."""
    catalog, backup = tmp_path / "root" / "catalog.sqlite", tmp_path / "backup.db"
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
        back_up(catalog, backup)
        now = time.time()
        monkeypatch.setattr("tailorstore.domain.names.time.time", lambda: now - 365 * 86400)
        late = store.commit(2, weights(2))
        monkeypatch.undo()
    restore(backup, catalog)
    with ts.open_store(tmp_path / "root") as store:
        assert store.writable
        for dry_run in (True, False):
            with pytest.raises(CatalogOutdatedError, match=r"main@2.*Nothing was deleted"):
                store.gc(ts.KeepLast(1), grace=NOW, dry_run=dry_run)
        assert (tmp_path / "root" / manifest_key(late.id)).exists()
        assert store.log()[0].step == 1
        assert store.rebuild_catalog().commits == 2
        assert store.gc(ts.KeepLast(1), grace=NOW).expired[0].step == 1


def test_opening_looks_only_at_what_is_new(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tailorstore.engine import currency

    url = f"sqlite:///{tmp_path}/catalog.db"
    now = time.time()
    with ts.open_store(root.url, catalog=url, storage_options=root.storage_options) as store:
        for step in range(1, 12):
            monkeypatch.setattr("tailorstore.domain.names.time.time", lambda step=step: now - 86400 + step)
            store.commit(step, weights(step), mask=["a"])
        monkeypatch.undo()
        newest = store.commit(12, weights(12))
    seen: list[str] = []
    ask = currency.manifest_ids  # type: ignore[attr-defined]

    def watch(*args: Any, **kwargs: Any) -> Iterator[str]:
        for one in ask(*args, **kwargs):
            seen.append(one)
            yield one

    monkeypatch.setattr(currency, "manifest_ids", watch)
    with ts.open_store(root.url, catalog=url, storage_options=root.storage_options) as store:
        assert seen == [newest.id]
        seen.clear()
        store.gc()
        assert len(seen) == 12


def test_a_commit_that_is_published_while_a_store_is_opened_is_no_surprise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailorstore.engine import currency

    ask = currency.manifest_ids  # type: ignore[attr-defined]
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
        steps = iter((2, 3))

        def list_amid_commits(*args: Any, **kwargs: Any) -> list[str]:
            store.commit(next(steps), weights(2))
            listed = list(ask(*args, **kwargs))
            store.commit(next(steps), weights(3))
            return listed

        monkeypatch.setattr(currency, "manifest_ids", list_amid_commits)
        with ts.open_store(tmp_path / "root") as other:
            assert other.writable
            assert other.log()[0].step == 3


def test_what_was_refused_is_not_taken_for_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loses a race, lets its lease lapse or loses the root leaves a manifest; the catalog has a word on it."""
    other = f"sqlite:///{tmp_path}/other.db"
    with ts.open_store(tmp_path / "root") as first, ts.open_store(tmp_path / "root") as second:
        first.commit(1, weights(1))
        publish = second._catalog.publish

        def after(what: Callable[[], object]) -> Callable[..., Commit]:
            def late(*args: Any) -> Commit:
                what()
                return publish(*args)

            return late

        def void() -> None:
            let_claims_lapse(first)
            first._catalog.void_lapsed()

        monkeypatch.setattr(second._catalog, "publish", after(lambda: first.commit(2, weights(2))))
        with pytest.raises(HeadMovedError):
            second.commit(2, weights(9))
        monkeypatch.setattr(second._catalog, "publish", after(void))
        with pytest.raises(LeaseExpiredError):
            second.commit(3, weights(9))
        assert len(list((tmp_path / "root" / COMMITS_PREFIX).iterdir())) == 4
        with ts.open_store(tmp_path / "root") as third:
            assert third.writable
        write = publishing.write_manifest  # type: ignore[attr-defined]

        def write_after_take_over(*args: Any) -> str:
            with ts.open_store(tmp_path / "root", catalog=other) as taker:
                taker.rebuild_catalog()
            return write(*args)

        monkeypatch.setattr(publishing, "write_manifest", write_after_take_over)
        with pytest.raises(RootTakenError):
            first.commit(5, weights(5))
        monkeypatch.undo()
        assert len(list((tmp_path / "root" / COMMITS_PREFIX).iterdir())) == 5
        with ts.open_store(tmp_path / "root", catalog=other) as taker:
            assert taker.writable
            taker.gc(grace=NOW)
            assert_root_is_exact(taker)


def test_a_root_copied_with_its_catalog_while_commits_go_on_is_read_and_rebuilt(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
        (tmp_path / "copy").mkdir()
        back_up(tmp_path / "root" / "catalog.sqlite", tmp_path / "copy" / "catalog.sqlite")
        store.commit(2, weights(2))
        shutil.copytree(
            tmp_path / "root", tmp_path / "copy", dirs_exist_ok=True, ignore=shutil.ignore_patterns("catalog.sqlite*")
        )
        with ts.open_store(tmp_path / "copy") as copy:
            assert not copy.writable
            assert [commit.step for commit in copy.log()] == [2, 1]
            copy.rebuild_catalog()
            copy.commit(3, weights(30))
        store.commit(3, weights(3))
        assert store.checkout().model_state_dict()["a.w"][0] == 3
        assert store.verify().ok


def test_a_catalog_file_that_is_replaced_under_a_process_is_noticed(tmp_path: Path) -> None:
    catalog, backup = tmp_path / "root" / "catalog.sqlite", tmp_path / "backup.db"
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
        back_up(catalog, backup)
        store.commit(2, weights(2))
        restore(backup, catalog)
        with pytest.raises(CatalogDamagedError):
            store.commit(3, weights(3))
    with ts.open_store(tmp_path / "root") as store:
        with pytest.raises(CatalogOutdatedError):
            store.commit(3, weights(3))
        store.rebuild_catalog()
        assert [commit.step for commit in store.log()] == [2, 1]


# --- A catalog that is newer than its root ---------------------------------------------------------------------------


def test_a_root_that_was_restored_from_a_backup_is_reported_and_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalog.db"
    root = tmp_path / "root"
    with ts.open_store(root, catalog=url) as store:
        store.commit(1, weights(1))
        shutil.copytree(root, tmp_path / "backup")
        lost = store.commit(2, weights(2))
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "backup", root)
    with ts.open_store(root, catalog=url) as store:
        assert store.writable
        report = store.verify()
        assert manifest_key(lost.id) in {damage.key for damage in report.damages}
        assert {damage.kind for damage in report.damages} == {"missing"}
        assert store.checkout(1).model_state_dict()["a.w"][0] == 1
        store.gc(grace=NOW)
        store.branch("again", 1)
    with ts.open_store(root, catalog=url, branch="again") as store:
        store.commit(3, weights(3))
        assert store.checkout().model_state_dict()["b.w"][0] == 3
        # What the catalog alone still knows of is not forgotten, and said to be without its layers.
        rebuilt = store.rebuild_catalog()
        assert rebuilt.written[:1] == (manifest_key(lost.id),)
        assert [(one.id, one.layers) for one in rebuilt.incomplete] == [(lost.id, ("@extra", "a", "b"))]
        assert [commit.step for commit in store.log()] == [3, 1]
        assert store.verify("again").ok
        assert store.log("main")[0] == lost
    # A rebuild from the root alone forgets what the root has lost.
    (root / manifest_key(lost.id)).unlink()
    with ts.open_store(root, catalog=f"sqlite:///{tmp_path}/new.db", branch="again") as store:
        assert store.rebuild_catalog().written == ()
        assert [commit.step for commit in store.log()] == [3, 1]
        assert store.verify().ok


def test_a_root_from_before_a_take_over_can_be_taken_over_again(tmp_path: Path) -> None:
    url, root = f"sqlite:///{tmp_path}/catalog.db", tmp_path / "root"
    with ts.open_store(root) as store:
        store.commit(1, weights(1))
    shutil.copytree(root, tmp_path / "backup")
    with ts.open_store(root, catalog=url) as store:
        for epoch in (2, 3):
            assert store.rebuild_catalog().epoch == epoch
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "backup", root)
    with ts.open_store(root, catalog=url) as store:
        assert not store.writable
        assert store.rebuild_catalog().epoch == 4
        store.commit(2, weights(2))


# --- A root that lost something --------------------------------------------------------------------------------------


def lose_catalog_and_age(root: Path) -> None:
    """Take the catalog away, and make all that is in the root two days old."""
    for path in [*root.glob("catalog.sqlite*")]:
        path.unlink()
    then = time.time() - 2 * 86400
    for path in root.rglob("*"):
        os.utime(path, (then, then))


def withdraw_earlier(root: Path, by: str) -> None:
    catalog = sqlite3.connect(root / "catalog.sqlite")
    with catalog:
        catalog.execute("UPDATE withdrawn SET withdrawn_at = strftime('%Y-%m-%d %H:%M:%f000', withdrawn_at, ?)", (by,))
    catalog.close()


def test_layers_whose_manifest_is_gone_are_kept_for_the_grace_period_from_the_take_over_on(folder: Path) -> None:
    root = folder / "root"
    with ts.open_store(root) as store:
        first, lost, last = (store.commit(step, weights(step)) for step in (1, 2, 3))
    manifest, layers = root / manifest_key(lost.id), [root / version_prefix(name, lost.id) for name in ("a", "b")]
    kept = manifest.read_bytes()
    manifest.unlink()
    lose_catalog_and_age(root)
    with ts.open_store(root) as store:
        found = store.rebuild_catalog(dry_run=True), store.rebuild_catalog()
        assert [(one.commits, one.unclaimed, one.unplaced) for one in found] == [(2, (lost.id,), ())] * 2
        assert store.gc(dry_run=True).leftovers_swept == store.gc().leftovers_swept == 0
        assert all(layer.exists() for layer in layers)
        assert store.verify().unknown == ()
    # In that time whoever has the manifest can put it back.
    manifest.write_bytes(kept)
    lose_catalog_and_age(root)
    with ts.open_store(root) as store:
        report = store.rebuild_catalog()
        assert (report.commits, report.unclaimed) == (3, ())
        assert store.checkout(2).model_state_dict()["a.w"][0] == 2
    manifest.unlink()
    lose_catalog_and_age(root)
    with ts.open_store(root) as store:
        assert store.rebuild_catalog().unclaimed == (lost.id,)
        withdraw_earlier(root, "-23 hours")
        assert store.gc().leftovers_swept == 0
        withdraw_earlier(root, "-2 hours")
        assert store.gc().leftovers_swept == 3
        assert not any(layer.exists() for layer in layers)
        assert [commit.id for commit in store.log()] == [last.id, first.id]
        assert store.verify().ok


def test_layers_whose_manifest_is_damaged_are_told_of_by_that(folder: Path) -> None:
    root = folder / "root"
    with ts.open_store(root) as store:
        spoilt, _ = (store.commit(step, weights(step)) for step in (1, 2))
    (root / manifest_key(spoilt.id)).write_bytes(b"half")
    lose_catalog_and_age(root)
    with ts.open_store(root) as store:
        report = store.rebuild_catalog()
        assert (report.unreadable, report.unclaimed) == ((manifest_key(spoilt.id),), ())
        assert store._catalog.standings([spoilt.id]) == {spoilt.id: "unreadable"}


def test_layers_that_outlived_their_commit_are_claimed_by_those_who_need_them(folder: Path) -> None:
    root = folder / "root"
    with ts.open_store(root, light=ts.LightSettings(exact_below=16)) as store:
        store.commit(1, weights(1))
        store.commit(2, weights(2), mask={"a": "light"})
        store.gc(ts.KeepLast(1), grace=NOW)
    lose_catalog_and_age(root)
    with ts.open_store(root) as store:
        report = store.rebuild_catalog()
        assert (report.commits, report.unclaimed, report.incomplete) == (1, (), ())
        assert store.gc(grace=NOW).leftovers_swept == 0
        assert store.verify().ok


def test_commits_without_all_of_their_layers_come_back_and_are_listed(root: Root, tmp_path: Path) -> None:
    with ts.open_store(root.url, storage_options=root.storage_options, catalog=f"sqlite:///{tmp_path}/1.db") as store:
        first = store.commit(1, weights(1))
        second = store.commit(2, weights(2), mask=["a"])
        third = store.commit(3, weights(3), mask={"a": "light"})
        store._objects.delete([version_prefix("a", second.id) + "zarr.json"])
    with ts.open_store(root.url, storage_options=root.storage_options, catalog=f"sqlite:///{tmp_path}/2.db") as store:
        report = store.rebuild_catalog()
        assert [(one.id, one.step, one.branch, one.layers) for one in report.incomplete] == [
            (second.id, 2, "main", ("a",)),
            # Its own version of the layer is there, and useless without the base.
            (third.id, 3, "main", ("a",)),
        ]
        assert (report.commits, report.unreadable) == (3, ())
        damages = store.verify().damages
        assert {damage.layer for damage in damages} == {"a"}
        assert second.id in {commit for damage in damages for commit in damage.commits}
        assert first.id not in {commit for damage in damages for commit in damage.commits}


def files_of(root: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith("catalog.sqlite")
    }


def assert_gc_refuses(store: ts.Store, *keys: str) -> None:
    """Fail unless GC, dry or not, names these keys, and neither drops nor deletes anything."""
    before, log = files_of(Path(store.url.removeprefix("file://"))), store.log()
    for dry_run in (True, False):
        with pytest.raises(
            CorruptDocumentError, match=rf"{', '.join(keys)}.*Nothing was deleted.*rebuild.*delete them"
        ):
            store.gc(ts.KeepLast(1), grace=NOW, dry_run=dry_run)
    assert (files_of(Path(store.url.removeprefix("file://"))), store.log()) == (before, log)


def test_what_a_manifest_that_cannot_be_read_may_stand_for_is_kept_until_it_is_deleted(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with ts.open_store(root) as store:
        lent = store.commit(1, weights(1))
        damaged = store.commit(2, weights(2), mask=["a"])
        store.tag("best", damaged)
        store.commit(3, weights(3))
    manifest = root / manifest_key(damaged.id)
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-20])
    layers = root / version_prefix("a", damaged.id)
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    with ts.open_store(root) as store:
        found = store.rebuild_catalog(dry_run=True), store.rebuild_catalog()
        assert [(one.unreadable, one.dangling) for one in found] == [((manifest_key(damaged.id),), ("tag best",))] * 2
        assert (found[1].commits, [commit.step for commit in store.log()]) == (2, [3, 1])
        # The policy would drop the commit whose layer the tagged one borrowed.
        assert_gc_refuses(store, manifest_key(damaged.id))
        assert (root / version_prefix("b", lent.id)).exists()
    with ts.open_store(root) as store:
        assert store.writable
        # As long as it is damaged verify says so, and no repair touches it.
        for repair in (False, True):
            report = store.verify(repair=repair)
            assert [(one.kind, one.key, one.mended) for one in report.damages] == [
                ("document", manifest_key(damaged.id), False)
            ]
            assert (report.ok, report.losses, report.unknown, report.awaiting_gc) == (False, (), (), 0)
        # Somebody has a backup.
        manifest.write_bytes(whole)
        (damage,) = store.verify().damages
        assert "tailorstore rebuild" in damage.detail
        assert_gc_refuses(store, manifest_key(damaged.id))
        again = store.rebuild_catalog()
        assert (again.commits, again.tags, again.dangling, store.verify().ok) == (3, ("best",), (), True)
        assert store.checkout("best").model_state_dict()["b.w"][0] == 1
    manifest.write_bytes(whole[:-20])
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    with ts.open_store(root) as store:
        store.rebuild_catalog()
        # Nobody has one.
        manifest.unlink()
        assert store.gc(grace=NOW).leftovers_swept == 2
        assert not layers.exists()
        store.gc(grace=NOW)
        assert store._catalog.standings([damaged.id]) == {}
        assert store.verify().ok


def test_a_manifest_that_was_damaged_since_and_that_nobody_knows_keeps_its_layers_too(tmp_path: Path) -> None:
    """One that a newer state of the catalog published, and that then was damaged: nothing tells whose it was."""
    catalog, backup = tmp_path / "root" / "catalog.sqlite", tmp_path / "backup.db"
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
        back_up(catalog, backup)
        lost = store.commit(2, weights(2))
    restore(backup, catalog)
    manifest = tmp_path / "root" / manifest_key(lost.id)
    manifest.write_bytes(b"{")
    with ts.open_store(tmp_path / "root") as store:
        assert_gc_refuses(store, manifest_key(lost.id))
        report = store.verify()
        assert [one.key for one in report.damages] == [manifest_key(lost.id)]
        assert {one.key.partition("/")[0] for one in report.unknown} == {"layers"}, "nothing is told twice"
        manifest.unlink()
        assert store.gc(grace=NOW).leftovers_swept == 3


def test_a_guest_names_manifests_that_cannot_be_read_and_says_so_of_an_empty_history(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with ts.open_store(root) as store:
        commits = [store.commit(step, weights(step)) for step in (1, 2)]
    keys = tuple(sorted(manifest_key(one.id) for one in commits))
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    with ts.open_store(root) as guest:
        assert (guest.unread(), guest.verify().damages) == ((), ())
    (root / keys[1]).write_bytes(b"{")
    with ts.open_store(root) as guest:
        report = guest.verify()
        assert (report.ok, tuple(one.key for one in report.damages), guest.unread()) == (False, keys[1:], keys[1:])
    (root / keys[0]).write_bytes(b"{")
    with ts.open_store(root) as guest:
        assert guest.unread() == keys
        with pytest.raises(
            ts.NotFoundError, match="2 manifests could not be read, and 'tailorstore rebuild --dry-run'"
        ):
            guest.log()


def test_damaged_records_are_listed_and_the_rest_comes_back(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
        store.tag("one", 1)
        store.tag("two", 1)
    records = sorted((tmp_path / "root" / "refs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    records[0].write_bytes(b"")
    with ts.open_store(copy_root(tmp_path / "root", tmp_path / "copy")) as store:
        report = store.rebuild_catalog()
        assert report.unreadable == (f"refs/{records[0].name}",)
        assert (report.tags, report.dangling) == (("two",), ())


def test_a_record_that_no_catalog_has_read_is_all_that_is_left_of_a_name_and_stays(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with ts.open_store(root) as store:
        store.commit(1, weights(1))
        tagged = store.commit(2, weights(2))
        store.commit(3, weights(3))
        store.tag("best", tagged)
    (record,) = (root / "refs").iterdir()
    whole, key = record.read_bytes(), f"refs/{record.name}"
    record.write_bytes(whole[:-20])
    lose_catalog_and_age(root)
    with ts.open_store(root) as store:
        store.rebuild_catalog()
        assert store._catalog.standings([record.stem]) == {record.stem: "unreadable"}
        for _ in range(2):
            report = store.verify(repair=True)
            assert [(one.key, one.mended) for one in report.damages] == [(key, False)]
            assert "tailorstore tag" in report.damages[0].detail
            assert record.read_bytes() == whole[:-20]
            assert_gc_refuses(store, key)
            # The owner's own rebuild forgets nothing of it.
            assert store.rebuild_catalog().unreadable == (key,)
        # Put back, it is not contradicted by a catalog that never read it.
        record.write_bytes(whole)
        assert [(one.key, one.mended) for one in store.verify(repair=True).damages] == [(key, False)]
        assert_gc_refuses(store, key)
        assert (store.rebuild_catalog().tags, list((root / "refs").iterdir())) == (("best",), [record])
        assert store.gc(ts.KeepLast(1), grace=NOW).kept[tagged.id] == ("tag best",)
        assert store.verify().ok
    record.write_bytes(whole[:-20])
    lose_catalog_and_age(root)
    with ts.open_store(root) as store:
        store.rebuild_catalog()
        # Or the name is set again, and the file deleted; here the backup comes while gc is at it.
        store.tag("best", tagged)
        record.unlink()

        def put_back(*_: object) -> None:
            record.write_bytes(whole)

        store.gc(grace=NOW, progress=put_back)
        assert store._catalog.standings([record.stem]) == {record.stem: "unreadable"}
        record.unlink()
        assert store.gc(ts.KeepLast(1), grace=NOW).kept[tagged.id] == ("tag best",)
        assert store.verify().ok
        assert store._catalog.standings([record.stem]) == {}, "nothing is left of it"


def test_a_guest_does_not_judge_records_that_the_owner_may_know(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with ts.open_store(root) as store:
        store.commit(1, weights(1))
        store.tag("best", 1)
        (record,) = (root / "refs").iterdir()
        record.write_bytes(b"{")
        with ts.open_store(root, catalog=f"sqlite:///{tmp_path}/other.db") as guest:
            (damage,) = guest.verify().damages
            assert "delete" not in damage.detail
        assert store.verify(repair=True).recorded == ("tag best",)
        assert not record.exists()


# --- A catalog made for the occasion ---------------------------------------------------------------------------------


def test_a_store_that_nobody_closes_leaves_no_copy_behind(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
    guest = ts.open_store(tmp_path / "root", catalog=f"sqlite:///{tmp_path}/other.db")
    remove: Any = guest._session._opened.remove
    assert remove.atexit
    folder = Path(remove.peek()[2][0])
    assert folder.is_dir()
    child = os.fork()
    if child == 0:
        remove()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert folder.is_dir()
    assert guest.log()[0].step == 1
    del guest
    memory.collect()
    assert not folder.exists()


def test_the_listing_behind_a_key_is_that_of_the_rest(root: Root, tmp_path: Path) -> None:
    with ts.open_store(root.url, storage_options=root.storage_options, catalog=f"sqlite:///{tmp_path}/c.db") as store:
        keys = [f"commits/{number:020x}.json" for number in (1, 2, 3, 10, 11)]
        for key in keys:
            store._objects.put(key, b"x")
        listed = list(store._objects.list("commits/", after=keys[1]))
        assert sorted(info.key for info in listed) == keys[2:]
        assert list(store._objects.list("commits/", after=keys[-1])) == []
        assert sorted(info.key for info in store._objects.list("commits/", after="commits/")) == keys
