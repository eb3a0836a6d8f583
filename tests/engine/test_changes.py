"""Records of tags and branches: whatever happens to them, no name is lost without a word, and a repair records it."""

import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.names import manifest_key, ref_record_key
from tailorstore.engine.changes import read_changes, record_again
from tailorstore.engine.rebuild import read_history
from tailorstore.storage.manifests import read_manifest, read_ref_record, write_manifest
from tests.kit.audit import all_commits, refs
from tests.kit.damage import flip, remove, shorten

NOW = timedelta(0)
Spoil = Callable[[Path], None]


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.w": torch.full((8,), value)}


@pytest.fixture
def root() -> Iterator[Path]:
    """Give the root of a store with a tag and two branches, in memory where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        place = Path(folder) / "root"
        with ts.open_store(place) as store:
            for step in (1, 2, 3):
                store.commit(step, weights(step))
            store.tag("best", 2)
            store.branch("side", 3)
        yield place


def record_of(root: Path, name: str) -> Path:
    """Return the newest record of a name."""
    records = {path: json.loads(path.read_text()) for path in (root / "refs").iterdir()}
    return max((path for path in records if records[path]["name"] == name), key=lambda one: records[one]["created_at"])


def lose_catalog(root: Path) -> None:
    for left in root.glob("catalog.sqlite*"):
        left.unlink()


@pytest.mark.parametrize("spoil", [flip, shorten, remove])
def test_a_tag_whose_record_is_damaged_is_named_recorded_and_found_again(root: Path, spoil: Spoil) -> None:
    with ts.open_store(root) as store:
        record = record_of(root, "best")
        spoil(record)
        report = store.verify()
        found = [(one.kind, one.key, one.readable) for one in report.damages]
        assert found == ([] if spoil is remove else [("document", ref_record_key(record.stem), True)])
        assert (report.unrecorded, report.ok) == (("tag best",), spoil is remove)
        assert report.losses == ()
        store.gc(grace=NOW)
        assert record.exists() == (spoil is not remove), "GC deletes no record"
        mended = store.verify(repair=True)
        assert (mended.recorded, mended.unrecorded, mended.ok) == (("tag best",), (), True)
        assert not record.exists()
        again = store.verify()
        assert (again.damages, again.unrecorded, again.unknown) == ((), (), ())
        names = refs(store)
    lose_catalog(root)
    with ts.open_store(root) as store:
        assert store.rebuild_catalog().unreadable == ()
        assert refs(store) == names


def test_without_the_repair_the_tag_is_lost_and_that_is_said(root: Path) -> None:
    """What the test above shows would mean nothing if it came back anyway."""
    record = record_of(root, "best")
    flip(record)
    lose_catalog(root)
    with ts.open_store(root) as store:
        report = store.rebuild_catalog()
        assert (report.unreadable, report.tags) == ((ref_record_key(record.stem),), ())


@pytest.mark.parametrize("spoil", [flip, remove])
def test_a_branch_is_recorded_again_on_its_own_line(root: Path, spoil: Spoil) -> None:
    with ts.open_store(root) as store:
        store.branch("side", 1, move=True)
        lines = store._catalog.lines_of("side")
        spoil(record_of(root, "side"))
        assert store.verify(repair=True).recorded == ("branch side",)
        record = record_of(root, "side")
        assert record.stem == lines[0].line
        with ts.open_store(root, branch="side") as side:
            side.commit(9, weights(9))
    lose_catalog(root)
    with ts.open_store(root) as store:
        store.rebuild_catalog()
        assert [commit.step for commit in store.log("side")] == [9, 1]
        assert store._catalog.lines_of("side") == lines


@pytest.mark.parametrize("spoil", [flip, remove])
def test_what_was_removed_is_not_made_again(root: Path, spoil: Spoil) -> None:
    with ts.open_store(root) as store:
        store.delete_tag("best")
        store.delete_branch("side")
        for record in [record_of(root, name) for name in ("best", "side")]:
            spoil(record)
        assert store.verify().unrecorded == ("branch side", "tag best")
        assert store.verify(repair=True).ok
    lose_catalog(root)
    with ts.open_store(root) as store:
        store.rebuild_catalog()
        assert refs(store) == {"branch main": 3}


def test_a_change_that_a_dying_process_did_not_record_is_no_damage_and_is_recorded(root: Path) -> None:
    with ts.open_store(root) as store:
        before = store._catalog.whole_history()
        store._catalog.tag("half", store.show(1).id)
        report = store.verify()
        assert (report.ok, report.unrecorded) == (True, ("tag half",))
        # Of what has changed since somebody looked, the record may just be on its way.
        assert read_changes(store._objects, store._catalog, before).missing == ()
        assert store.verify(repair=True).recorded == ("tag half",)
        assert read_history(store._objects).tags["half"] == store.show(1).id


def test_a_record_that_cannot_be_read_stays_while_any_name_may_depend_on_it(root: Path) -> None:
    with ts.open_store(root) as store:
        before = store._catalog.whole_history()
        store._catalog.tag("half", store.show(1).id)
        record = record_of(root, "best")
        flip(record)
        found, left = record_again(store._objects, store._catalog, before)
        assert [one.name for one in found.missing] == ["best"]
        assert [one.name for one in left.missing] == ["half"]
        assert record.exists()
        assert store.verify(repair=True).ok
        assert not record.exists()


def test_only_the_whole_store_and_its_owner_look_after_records(root: Path, tmp_path: Path) -> None:
    flip(record_of(root, "best"))
    with ts.open_store(root) as store:
        assert store.verify("latest").ok
    with ts.open_store(root, catalog=f"sqlite:///{tmp_path}/other.db") as guest:
        report = guest.verify()
        assert ([one.kind for one in report.damages], report.unrecorded) == (["document"], ())
        with pytest.raises(ts.TailorError):
            guest.verify(repair=True)


def test_records_are_written_at_once_as_a_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ts.open_store(root) as store:
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]) and (_ for _ in ()).throw(OSError(28)))
        with pytest.raises(ts.TailorError):
            store.tag("half", 1)
        monkeypatch.undo()
        assert store.verify().damages == ()
        assert store.verify(repair=True).recorded == ("tag half",)


@pytest.mark.parametrize("seed", range(3))
def test_any_record_of_any_history_can_be_lost(root: Path, seed: int) -> None:
    """One after the other, and then all at once: what is left and the catalog give back every name and every commit."""
    chance = random.Random(seed)
    opened: dict[str, ts.Store] = {}
    with ts.open_store(root) as main:
        for step in range(4, 26):
            branch = chance.choice([ref.name for ref in main.branches()])
            commits = sorted(all_commits(main))
            match chance.randrange(9):
                case 0:
                    main.branch(f"b{step}", chance.choice(commits))
                case 1 | 2:
                    main.branch(branch, chance.choice(commits), move=True)
                case 3 if len(main.branches()) > 1:
                    main.delete_branch(branch)
                case 4:
                    main.tag(f"t{step}", chance.choice(commits))
                case 5 if main.tags():
                    main.delete_tag(chance.choice(main.tags()).name)
                case 6:
                    main.gc(ts.KeepLast(3), grace=NOW)
                case _:
                    store = opened.setdefault(branch, ts.open_store(root, branch=branch))
                    store.commit(step, weights(step))
        for store in opened.values():
            store.close()
        records = sorted((root / "refs").iterdir())
        assert len(records) > 8

        def repair_and_compare() -> None:
            record_again(main._objects, main._catalog, main._catalog.whole_history())
            told, known = read_history(main._objects), main._catalog.whole_history()
            assert told.unreadable == ()
            assert told.tags == known.tags
            heads = {name: tip.commit for name, tip in known.branches.items()}
            assert {name: tip.commit for name, tip in told.branches.items()} == heads
            assert {one.commit.id for one in told.commits} == {one.commit.id for one in known.commits}

        repair_and_compare()
        for record in records:
            chance.choice([flip, remove])(record)
            repair_and_compare()
        for record in (root / "refs").iterdir():
            chance.choice([flip, shorten, remove])(record)
        repair_and_compare()


# --- A take-over by the owner itself


def test_a_rebuild_by_the_owner_loses_nothing_that_only_its_catalog_knows(root: Path) -> None:
    with ts.open_store(root) as store:
        before, commits = refs(store), store.log()
        (root / manifest_key(commits[1].id)).unlink()
        flip(root / manifest_key(commits[2].id))
        remove(record_of(root, "best"))
        flip(record_of(root, "side"))
        there = {path: path.read_bytes() for path in (*(root / "commits").iterdir(), *(root / "refs").iterdir())}
        dry = store.rebuild_catalog(dry_run=True)
        assert {
            path: path.read_bytes() for path in (*(root / "commits").iterdir(), *(root / "refs").iterdir())
        } == there
        assert (dry.commits, dry.tags, dry.branches, dry.unreadable) == (3, ("best",), ("main", "side"), ())
        report = store.rebuild_catalog()
        assert (report.commits, report.unreadable, len(report.written), len(dry.written)) == (3, (), 4, 4)
        assert (refs(store), store.log()) == (before, commits)
        assert store.verify().ok
        assert store.rebuild_catalog().written == ()


def test_a_catalog_that_lost_the_root_writes_nothing_of_its_own_there(root: Path, tmp_path: Path) -> None:
    with ts.open_store(root) as first:
        with ts.open_store(root, catalog=f"sqlite:///{tmp_path}/other.db") as second:
            second.rebuild_catalog()
            second.delete_tag("best")
        assert first.rebuild_catalog().written == ()
        assert refs(first) == {"branch main": 3, "branch side": 3}


# --- What a manifest says of a commit


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", 1),
        ("branch", "other"),
        ("parent", None),
        ("message", "x"),
        ("metrics", {"loss": -0.0}),
        ("created_at", timedelta(microseconds=1)),
        ("layers_written", ()),
        ("bytes_written", 1),
        ("bytes_logical", 1),
    ],
)
def test_verify_compares_every_field_of_a_commit(root: Path, field: str, value: Any) -> None:
    with ts.open_store(root) as store:
        store.commit(4, weights(4), metrics={"loss": 0.0, "nan": float("nan")})
        assert store.verify("latest").ok
        commit = store.show()
        manifest = read_manifest(store._objects, commit.id)
        if isinstance(value, timedelta):
            value = commit.created_at + value
        changed = replace(commit, **{field: value})
        document = root / "commits" / f"{commit.id}.json"
        write_manifest(store._objects, replace(manifest, commit=changed))
        written = document.read_bytes()
        (damage,) = store.verify("latest").damages
        assert f"its checksum holds: {field};" in damage.detail
        # It may be the catalog that is wrong.
        assert not store.verify("latest", repair=True).ok
        assert document.read_bytes() == written


def test_verify_compares_lines_and_whose_store_it_is(root: Path) -> None:
    with ts.open_store(root) as store:
        commit = store.show()
        manifest = read_manifest(store._objects, commit.id)
        other = replace(manifest.lines[0], line=store.show(2).id)
        foreign = replace(manifest.binding, store_id="another")
        for changed, what in (
            (replace(manifest, lines=(other,)), "lines"),
            (replace(manifest, binding=foreign), "store"),
        ):
            write_manifest(store._objects, changed)
            (damage,) = store.verify("latest").damages
            assert re.search(rf"commit: {what}$|its checksum holds: {what};", damage.detail)


def test_a_record_that_is_written_again_replaces_what_is_there(root: Path) -> None:
    with ts.open_store(root) as store:
        record = record_of(root, "side")
        whole = read_ref_record(store._objects, record.stem)
        flip(record)
        assert store.verify(repair=True).ok
        again = read_ref_record(store._objects, record.stem)
        assert replace(again, created_at=whole.created_at) == whole
