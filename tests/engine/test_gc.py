"""GC drops what no policy keeps, sweeps what nothing refers to, and nothing else."""

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tailorstore.storage.objects import open_objects
from tests.conftest import Root

NOW = timedelta(0)


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.w": torch.full((64,), value), "b.w": torch.full((64,), value)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ts.Store]:
    with ts.open_store(tmp_path / "root") as opened:
        yield opened


def fill(store: ts.Store, *steps: int) -> None:
    for step in steps:
        store.commit(step, weights(step), metrics={"loss": abs(step - 30)})


def files(path: Path) -> set[Path]:
    return {file for file in (path / "root" / "layers").rglob("*") if file.is_file()}


def test_expired_steps_go_and_kept_ones_stay(root: Root, catalog_url: str) -> None:
    with ts.open_store(root.url, catalog=catalog_url, storage_options=root.storage_options) as store:
        fill(store, 10, 20, 30, 40, 50)
        store.tag("first", 10)
        report = store.gc(ts.KeepLast(1) | ts.KeepBest("loss"), grace=NOW)
        assert [commit.step for commit in report.expired] == [40, 20] or {c.step for c in report.expired} == {20, 40}
        assert report.deletes_failed == 0
        assert report.bytes_freed > 0
        assert report.versions_swept == report.versions_doomed == 6
        assert [commit.step for commit in store.log()] == [50, 30, 10]
        reasons = {commit.step: report.kept[commit.id] for commit in store.log()}
        assert "tag first" in reasons[10]
        assert any("best" in reason for reason in reasons[30])
        for step in (10, 30, 50):
            assert store.checkout(step).model_state_dict()["a.w"][0] == step
        assert store.verify().ok
        with pytest.raises(ts.NotFoundError):
            store.checkout(20)
        again = store.gc(ts.KeepLast(1) | ts.KeepBest("loss"), grace=NOW)
        assert (again.expired, again.versions_doomed, again.objects_deleted) == ((), 0, 0)


def test_versions_that_a_kept_composite_needs_outlive_their_commit(store: ts.Store) -> None:
    store.commit(1, weights(1))
    store.commit(2, weights(2), mask=["a"])
    store.commit(3, weights(3), mask=["a"])
    store.gc(ts.KeepLast(1), grace=NOW)
    assert [commit.step for commit in store.log()] == [3]
    assert store.checkout().sources == {"@extra": 3, "a": 3, "b": 1}
    assert store.verify().ok
    store.commit(4, weights(4), mask=["a"])
    assert store.checkout().model_state_dict()["b.w"][0] == 1


def test_nothing_is_deleted_within_the_grace_period(store: ts.Store, tmp_path: Path) -> None:
    fill(store, 1, 2)
    before = files(tmp_path)
    report = store.gc(ts.KeepLast(1))
    assert report.versions_doomed == 3
    assert report.versions_swept == 0
    assert report.bytes_to_free > 0
    assert files(tmp_path) == before
    assert store.stats().versions_doomed == 3
    report = store.gc(grace=NOW)
    assert report.versions_swept == 3
    assert store.stats().versions_doomed == 0


def test_a_dry_run_plans_the_same_and_changes_nothing(store: ts.Store, tmp_path: Path) -> None:
    fill(store, 1, 2, 3)
    before = files(tmp_path)
    plan = store.gc(ts.KeepLast(1), dry_run=True, grace=NOW)
    assert files(tmp_path) == before
    assert len(store.log()) == 3
    real = store.gc(ts.KeepLast(1), grace=NOW)
    assert plan.dry_run
    assert {c.id for c in plan.expired} == {c.id for c in real.expired}
    assert plan.kept == real.kept
    assert (plan.versions_doomed, plan.bytes_doomed) == (real.versions_doomed, real.bytes_doomed)
    assert plan.bytes_to_free == real.bytes_to_free == real.bytes_freed > 0


def test_what_a_reader_holds_is_kept(store: ts.Store) -> None:
    fill(store, 1, 2, 3)
    checkpoint = store.checkout(1)
    report = store.gc(ts.KeepLast(1), grace=NOW)
    assert {commit.step for commit in report.expired} == {2}
    assert checkpoint.model_state_dict()["a.w"][0] == 1
    checkpoint.close()
    assert {commit.step for commit in store.gc(ts.KeepLast(1), grace=NOW).expired} == {1}


def test_a_lapsed_lease_protects_no_more(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root", lease=timedelta(seconds=1)) as store:
        fill(store, 1, 2)
        checkpoint = store.checkout(1)
        store._keeper.forget(next(iter(store._keeper._held)))  # a reader that was stopped renews nothing
        time.sleep(1.1)
        assert {commit.step for commit in store.gc(ts.KeepLast(1), grace=NOW).expired} == {1}
        assert checkpoint.step == 1


def test_leftovers_of_crashed_commits_are_swept_after_the_grace_period(store: ts.Store, tmp_path: Path) -> None:
    fill(store, 1)
    objects = open_objects(str(tmp_path / "root"))
    left = "0123456789abcdef0123"
    store._catalog.announce(left, "main", 20, timedelta(seconds=-1))
    for key in (f"layers/a/{left}/zarr.json", f"layers/a/{left}/a.w/c.0", f"commits/{left}.json"):
        objects.put(key, b"half")
    objects.put("layers/note.txt", b"not ours")
    assert store.gc().leftovers_swept == 0
    report = store.gc(grace=NOW)
    assert report.leftovers_swept == 2
    assert report.objects_deleted == 3
    assert not objects.exists(f"layers/a/{left}/zarr.json")
    assert objects.exists("layers/note.txt")
    assert store.verify().ok


def test_commits_on_no_branch_stay_until_a_policy_drops_them(store: ts.Store) -> None:
    fill(store, 1, 2, 3)
    lost = store.log()[0].id
    store.branch("main", 1, move=True)
    assert store.gc(grace=NOW).expired == ()
    assert store.checkout(lost).step == 3
    store.checkout(lost).close()
    import gc

    gc.collect()
    for _ in range(2):
        report = store.gc(ts.KeepLast(9), grace=NOW)
    assert [commit.step for commit in store.log()] == [1]
    assert report.deletes_failed == 0


def test_a_failed_delete_is_counted_and_retried_by_the_next_run(
    store: ts.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, 1, 2)
    objects = store._objects
    delete = objects.delete

    def stubborn(keys: Sequence[str]) -> list[object]:
        from tailorstore.storage.transport import DeleteFailure

        kept = [key for key in keys if key.endswith("/c.0") and "/a/" in key]
        return [*delete([key for key in keys if key not in kept]), *(DeleteFailure(key, "busy") for key in kept)]

    monkeypatch.setattr(objects, "delete", stubborn)
    report = store.gc(ts.KeepLast(1), grace=NOW)
    assert report.deletes_failed == 1
    assert report.versions_swept == 2
    assert store.stats().versions_doomed == 1
    monkeypatch.undo()
    report = store.gc(grace=NOW)
    assert (report.versions_swept, report.deletes_failed) == (1, 0)
    assert store.verify().ok


@pytest.mark.s3
def test_more_than_a_thousand_objects_on_s3(s3_root: Root, tmp_path: Path) -> None:
    many = {f"m.{at}.w": torch.full((1,), float(at)) for at in range(180)}
    with ts.open_store(
        s3_root.url, catalog=f"sqlite:///{tmp_path}/c.db", storage_options=s3_root.storage_options
    ) as store:
        store.commit(1, many)
        store.commit(2, {name: tensor + 1 for name, tensor in many.items()})
        store.commit(3, {name: tensor + 2 for name, tensor in many.items()})
        report = store.gc(ts.KeepLast(1), grace=NOW)
        assert report.objects_deleted > 1000
        assert report.deletes_failed == 0
        left = sum(1 for _ in store._objects.list("layers/"))
        assert left == sum(version.objects for version in store._catalog.live_versions())
        assert store.verify().ok


def test_policies_and_graces_that_mean_nothing_are_refused(store: ts.Store) -> None:
    fill(store, 1)
    with pytest.raises(ts.InvalidInputError):
        store.gc(grace=timedelta(seconds=-1))
    with pytest.raises(ts.InvalidInputError):
        store.gc(grace=5)  # type: ignore[arg-type]
