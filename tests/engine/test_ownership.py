"""One root, one catalog: others read; they write only after the explicit take-over, and the first one finds out."""

import json
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import (
    CatalogOutdatedError,
    FormatTooNewError,
    NotAStoreError,
    RootTakenError,
    StoreNotFoundError,
)
from tailorstore.domain.names import manifest_key
from tailorstore.domain.records import RefRecord
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.manifests import write_ref_record
from tailorstore.storage.transport import ObjectInfo, Objects
from tests.conftest import Root
from tests.kit.audit import refs


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.w": torch.full((64,), value), "b.w": torch.full((64,), value)}


def test_a_second_catalog_reads_and_may_not_write(root: Root, catalog_url: str, tmp_path: Path) -> None:
    other = f"sqlite:///{tmp_path}/other.db"
    with (
        ts.open_store(root.url, catalog=catalog_url, storage_options=root.storage_options) as owner,
        ts.open_store(root.url, catalog=other, storage_options=root.storage_options) as guest,
    ):
        owner.commit(1, weights(1))
        owner.commit(2, weights(2), mask=["a"])
        owner.tag("t", 1)
        owner.branch("side", 1)
        assert not guest.writable
        assert [commit.step for commit in guest.log()] == [2, 1]
        assert guest.checkout().sources == {"@extra": 2, "a": 2, "b": 1}
        assert guest.checkout("t").model_state_dict()["a.w"][0] == 1
        assert guest.checkout("side").step == 1
        assert guest.verify().ok
        for write in (
            lambda: guest.commit(3, weights(3)),
            lambda: guest.tag("x"),
            lambda: guest.branch("x", 1),
            guest.gc,
        ):
            with pytest.raises(RootTakenError, match="rebuild"):
                write()
        owner.commit(3, weights(3))
        assert guest.checkout().step == 3
    assert not (tmp_path / "other.db").exists()


def test_the_catalog_that_lost_the_root_finds_out_in_time(root: Root, catalog_url: str, tmp_path: Path) -> None:
    other = f"sqlite:///{tmp_path}/other.db"
    with (
        ts.open_store(root.url, catalog=catalog_url, storage_options=root.storage_options) as first,
        ts.open_store(root.url, catalog=other, storage_options=root.storage_options) as second,
    ):
        for step in (1, 2, 3):
            first.commit(step, weights(step), metrics={"loss": 1 / step}, message=f"step {step}")
        first.tag("kept", 2)
        report = second.rebuild_catalog()
        assert (report.commits, report.branches, report.tags, report.epoch) == (3, ("main",), ("kept",), 2)
        assert second.writable
        before = {info.key for info in second._objects.list()}
        for write in (
            lambda: first.commit(4, weights(9)),
            lambda: first.gc(ts.KeepLast(1), grace=timedelta(0)),
            lambda: first.tag("x", 1),
        ):
            with pytest.raises(RootTakenError):
                write()
        assert {info.key for info in second._objects.list()} == before
        second.commit(4, weights(4))
        assert [commit.step for commit in second.log()] == [4, 3, 2, 1]
        assert second.log()[1].message == "step 3"
        assert second.checkout("kept").step == 2
        # … and back again.
        assert first.rebuild_catalog().epoch == 3
        first.commit(5, weights(5))
        with pytest.raises(RootTakenError):
            second.commit(5, weights(5))


def test_a_lost_catalog_is_rebuilt_to_what_it_was(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with ts.open_store(root) as store:
        for step in (1, 2, 3, 4):
            store.commit(step, weights(step), mask=["a"] if step % 2 else None, metrics={"loss": float("nan")})
        store.branch("side", 2)
        store.tag("old", 1)
        store.tag("gone", 1)
        store.delete_tag("gone")
        store.branch("main", 3, move=True)
        store.commit(4, weights(44))
        with ts.open_store(root, branch="side") as side:
            side.commit(9, weights(9))
        log, side_log = store.log(), store.log("side")
        sources = {commit.id: store.checkout(commit.id).sources for commit in log}
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    with ts.open_store(root) as store:
        assert not store.writable
        report = store.rebuild_catalog()
        assert report.unreadable == ()
        assert [commit.id for commit in store.log()] == [commit.id for commit in log]
        assert [commit.id for commit in store.log("side")] == [commit.id for commit in side_log]
        assert [(tag.name, tag.step) for tag in store.tags()] == [("old", 1)]
        assert {commit.id: store.checkout(commit.id).sources for commit in log} == sources
        store.commit(5, weights(5))
        assert store.verify().ok
        assert store.gc(ts.KeepLast(1), grace=timedelta(0)).deletes_failed == 0
        assert store.verify().ok


def test_a_copied_root_with_its_catalog_is_a_store_of_its_own(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
    shutil.copytree(tmp_path / "root", tmp_path / "copy")
    with ts.open_store(tmp_path / "copy") as copy, ts.open_store(tmp_path / "root") as store:
        copy.commit(2, weights(2))
        store.commit(3, weights(3))
        assert [commit.step for commit in copy.log()] == [2, 1]
        assert [commit.step for commit in store.log()] == [3, 1]


def test_what_is_no_store_is_not_made_into_one(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="no store"):
        ts.open_store(tmp_path / "nothing", create=False)
    assert not (tmp_path / "nothing").exists()
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "tailorstore.json").write_text('{"hello": 1}')
    with pytest.raises(NotAStoreError, match="not a tailorstore document"):
        ts.open_store(odd)
    (odd / "tailorstore.json").write_bytes(b"\x00\xff")
    with pytest.raises(NotAStoreError):
        ts.open_store(odd)
    assert sorted(path.name for path in odd.iterdir()) == ["tailorstore.json"]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root"):
        pass
    path = tmp_path / "root" / "tailorstore.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(FormatTooNewError, match=r"99.*newer tailorstore"):
        ts.open_store(tmp_path / "root")


def test_a_root_that_lost_its_document_is_read_and_taken_over(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
    (tmp_path / "root" / "tailorstore.json").unlink()
    with ts.open_store(tmp_path / "root") as store:
        assert not store.writable
        assert store.checkout(1).model_state_dict()["a.w"][0] == 1
        with pytest.raises(RootTakenError):
            store.commit(2, weights(2))
        assert store.rebuild_catalog().commits == 1
        store.commit(2, weights(2))
    with ts.open_store(tmp_path / "root", create=False) as store:
        assert [commit.step for commit in store.log()] == [2, 1]


def test_a_taken_root_is_found_even_when_the_take_over_comes_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ts.open_store(tmp_path / "root") as first:
        first.commit(1, weights(1))
        put = first._objects.put
        taken: list[int] = []

        def put_while_taken(key: str, data: object, observe: object = None) -> int:
            if "/a.w/" in key and not taken:
                taken.append(1)
                with ts.open_store(tmp_path / "root", catalog=f"sqlite:///{tmp_path}/other.db") as second:
                    second.rebuild_catalog()
            return put(key, data, observe)  # type: ignore[arg-type]

        monkeypatch.setattr(first._objects, "put", put_while_taken)
        with pytest.raises(RootTakenError):
            first.commit(2, weights(2))
    with ts.open_store(tmp_path / "root", catalog=f"sqlite:///{tmp_path}/other.db") as second:
        assert [commit.step for commit in second.log()] == [1]
        assert second.verify().ok


def test_a_name_that_a_take_over_may_have_missed_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = f"sqlite:///{tmp_path}/other.db"

    def write_too_late(objects: Objects, record: RefRecord) -> str:
        with ts.open_store(tmp_path / "root", catalog=other) as second:
            second.rebuild_catalog()
        return write_ref_record(objects, record)

    with ts.open_store(tmp_path / "root") as first:
        first.commit(1, weights(1))
        monkeypatch.setattr("tailorstore.engine.references.write_ref_record", write_too_late)
        # The new owner knows nothing of the tag, and its GC would drop the commit.
        with pytest.raises(RootTakenError):
            first.tag("best")


def test_a_rebuild_by_the_owner_needs_no_listing_to_show_what_it_has_just_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ts.open_store(tmp_path / "root") as store:
        for step in (1, 2, 3):
            store.commit(step, weights(step))
        store.tag("best", 2)
        before, commits, began = refs(store), store.log(), time.time()
        for document in (tmp_path / "root" / "refs").iterdir():
            document.unlink()
        for commit in commits[:2]:
            (tmp_path / "root" / manifest_key(commit.id)).unlink()
        listing = LocalObjects.list

        def lagging(objects: LocalObjects, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
            for info in listing(objects, prefix, after=after):
                if info.modified is not None and info.modified.timestamp() < began:
                    yield info

        monkeypatch.setattr(LocalObjects, "list", lagging)
        assert len(store.rebuild_catalog().written) == 3
        assert (refs(store), store.log()) == (before, commits)


def test_a_store_goes_on_saying_that_its_catalog_is_outdated_when_others_publish(tmp_path: Path) -> None:
    root, newer = tmp_path / "root", f"sqlite:///{tmp_path}/newer.db"
    with ts.open_store(root) as store:
        store.commit(1, weights(1))
    shutil.copy(root / "catalog.sqlite", tmp_path / "backup.db")
    with ts.open_store(root) as store:
        store.commit(2, weights(2))
    shutil.move(root / "catalog.sqlite", tmp_path / "newer.db")
    shutil.copy(tmp_path / "backup.db", root / "catalog.sqlite")
    with ts.open_store(root) as outdated:
        with pytest.raises(CatalogOutdatedError):
            outdated.commit(3, weights(3))
        with ts.open_store(root, catalog=newer) as owner:
            owner.commit(3, weights(3))
        assert [commit.step for commit in outdated.log()] == [3, 2, 1]
        with pytest.raises(CatalogOutdatedError):
            outdated.commit(4, weights(4))
