"""What verify says of a store: by kind, by composite, of strangers in the root; and the newest commit that verifies."""

import logging
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from sqlalchemy import select

import tailorstore as ts
from tailorstore.catalog.tables import versions
from tailorstore.domain.errors import IntegrityError
from tailorstore.domain.names import manifest_key, new_id
from tailorstore.domain.records import LayerVersion, Loss, Unknown
from tailorstore.engine.verify import Verification
from tailorstore.storage import layers as storage_layers
from tests.conftest import Root
from tests.kit.audit import let_claims_lapse
from tests.kit.damage import files_of, flip, lengthen, prefix_of, remove, shorten
from tests.kit.models import assert_same
from tests.kit.ranks import run_ranks

LIGHT = ts.LightSettings(exact_below=16)


def weights(step: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(step)
    return {f"{layer}.w": torch.randn(40, 20, generator=chance) for layer in ("a", "b", "c")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give the root of a store: a at 1, 2, 3; b at 1; c light at 3 on its base of 1."""
    place = tmp_path / "root"
    with ts.open_store(place, chunk_bytes=1024, light=LIGHT) as store:
        for step, mask in ((1, None), (2, ["a"]), (3, {"a": True, "c": "light"})):
            store.commit(step, weights(step), mask=mask)
    return place


def fresh(root: Path) -> ts.Store:
    return ts.open_store(root, create=False)


@pytest.mark.parametrize(
    ("damage", "kind"), [(flip, "flipped"), (shorten, "short"), (lengthen, "long"), (remove, "missing")]
)
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_each_kind_of_damage_is_told_from_the_others(
    tmp_path: Path, damage: Callable[[Path], None], kind: str, codec: Literal["none", "zstd"]
) -> None:
    with ts.open_store(tmp_path / "root", chunk_bytes=1024, codec=codec) as store:
        commit = store.commit(1, weights(1))
        path = files_of(tmp_path / "root", prefix_of(store, "b"), "chunks")[1]
        damage(path)
        report = store.verify()
    (found,) = report.damages
    assert (found.kind, found.layer, found.step, found.commits) == (kind, "b", 1, (commit.id,))
    assert found.key == str(path.relative_to(tmp_path / "root"))
    assert not report.ok
    assert report.losses == (Loss(commit.id, 1, "main", ("b",)),)


def test_links_and_folders_in_the_place_of_objects_are_told_from_what_is_gone(root: Path, tmp_path: Path) -> None:
    with fresh(root) as store:
        commit = store.show(2)
        keys = {}
        for path, what in (
            (root / manifest_key(commit.id), "is a link, which is not followed"),
            (files_of(root, prefix_of(store, "a", 1), "group")[0], "is a link, which is not followed"),
            (files_of(root, prefix_of(store, "a", 2), "chunks")[0], "is a folder, not a plain file"),
            (files_of(root, prefix_of(store, "b", 1), "chunks")[0].parent, "lies behind a link, which is not followed"),
        ):
            below = [path] if path.is_file() else sorted(path.iterdir())
            keys.update({str(one.relative_to(root)): what for one in below})
            path.rename(tmp_path / path.name)
            if "folder" in what:
                path.mkdir()
            else:
                path.symlink_to(tmp_path / path.name)
        report = store.verify()
        assert {damage.key: damage.detail for damage in report.damages} == keys
        assert {damage.kind for damage in report.damages} == {"missing"}
        places = [prefix_of(store, "a", 1), prefix_of(store, "a", 2), prefix_of(store, "b", 1)]
        (root / manifest_key(store.show(1).id)).unlink()
        (root / manifest_key(store.show(1).id)).mkdir()
        repaired = store.verify(repair=True)
        assert repaired.quarantined == tuple(sorted(places))
        assert [damage.key for damage in repaired.damages if damage.mended] == [manifest_key(commit.id)]
        assert not (root / manifest_key(commit.id)).is_symlink()
        assert (tmp_path / f"{commit.id}.json").exists(), "what a link leads to stays as it is"
        assert store.commit(4, weights(4), mask=[]).layers_written == ("b",)


def test_it_says_what_every_composite_loses(root: Path) -> None:
    with fresh(root) as store:
        one, two, three = (store.show(step) for step in (1, 2, 3))
        for path in (
            *files_of(root, prefix_of(store, "c", base=True), "chunks")[:2],
            *files_of(root, prefix_of(store, "a", 2), "group"),
            *files_of(root, prefix_of(store, "a", 1), "documents")[:1],
            root / manifest_key(two.id),
        ):
            remove(path)
        report = store.verify()
        assert report.losses == (
            Loss(one.id, 1, "main", ("c",)),
            Loss(two.id, 2, "main", ("a", "c"), manifest=True),
            Loss(three.id, 3, "main", ("c",)),
        )
        readable = [damage.key for damage in report.damages if damage.readable]
        assert len(report.damages) == 5
        assert sorted(readable) == sorted([manifest_key(two.id), f"{prefix_of(store, 'a', 1)}a.w/zarr.json"]), (
            "values of which nothing is lost"
        )
        assert [loss.layers for loss in store.verify(1).losses] == [("c",), ("c",), ("c",)]


def test_objects_that_nothing_explains_are_listed_and_are_no_damage(root: Path) -> None:
    with fresh(root) as store:
        assert (store.verify().unknown, store.verify().awaiting_gc) == ((), 0)
        prefix, stray = prefix_of(store, "a", 1), new_id()
        strangers = [
            f"{prefix}a.w/c.0.1",
            f"{prefix}notes.txt",
            f"layers/gone/{stray}/zarr.json",
            f"layers/a/{stray}/a.w/c.0.0",
            "layers/a/readme",
            "commits/readme",
            f"quarantine/a/{stray}.json",
            "refs/half",
        ]
        for key in strangers:
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(b"12345")
        (root / "mine.txt").write_text("what lies beside the store is nobody's business")
        report = store.verify()
        assert report.ok
        assert report.damages == ()
        assert report.unknown == tuple(Unknown(key, 5) for key in sorted(strangers))


def test_a_stranger_that_stands_where_an_object_is_missing_is_found(root: Path) -> None:
    with fresh(root) as store:
        chunk = files_of(root, prefix_of(store, "b"), "chunks")[0]
        chunk.rename(chunk.with_name("c.9.9"))
        report = store.verify()
        assert [damage.kind for damage in report.damages] == ["missing"]
        assert [unknown.key.rpartition("/")[2] for unknown in report.unknown] == ["c.9.9"]


def test_what_waits_for_gc_or_is_being_written_is_not_unknown(root: Path) -> None:
    with fresh(root) as store:
        store.gc(ts.KeepLast(1), grace=timedelta(hours=1))
        doomed = store.stats().versions_doomed
        assert doomed
        pending = new_id()
        store._catalog.announce(pending, "main", 9, timedelta(minutes=5))
        store._objects.put(f"layers/a/{pending}/a.w/c.0.0", b"half")
        report = store.verify()
        assert report.unknown == ()
        assert report.awaiting_gc > doomed
        let_claims_lapse(store)
        store.gc(grace=timedelta(hours=1))
        withdrawn = store.verify()
        assert (withdrawn.unknown, withdrawn.awaiting_gc) == ((), report.awaiting_gc), "voided, and still explained"
        store.gc(grace=timedelta(0))
        report = store.verify()
        assert (report.unknown, report.awaiting_gc, report.ok) == ((), 0, True)


def test_progress_counts_versions_and_bytes(root: Path) -> None:
    told: dict[str, list[tuple[int, int | None]]] = {}
    with fresh(root) as store:
        report = store.verify(progress=lambda what, done, total: told.setdefault(what, []).append((done, total)))
        versions, stored = store.stats().versions, store.stats().bytes_stored
    assert told["verifying versions"] == [(done, versions) for done in range(1, versions + 1)]
    done = [done for done, _ in told["verifying bytes"]]
    assert done == sorted(done)
    assert {total for _, total in told["verifying bytes"]} == {stored}
    assert done[-1] <= report.bytes_read <= stored


def test_whatever_is_shared_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole store has each version once, and a fallback reads what composites share once."""
    read: list[str] = []
    real = storage_layers.read_chunk

    def counted(objects: object, key: str, *args: object) -> None:
        read.append(key)
        real(objects, key, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("tailorstore.engine.verify.read_chunk", counted)
    with fresh(root) as store:
        store.verify()
        assert len(read) == len(set(read))
        read.clear()
        flip(files_of(root, prefix_of(store, "a", 3), "chunks")[0])
        flip(files_of(root, prefix_of(store, "a", 2), "chunks")[0])
        with store.checkout(3, fallback=True) as found:
            assert found.step == 1
        assert len(read) == len(set(read))


def test_what_gc_takes_while_it_is_being_read_is_no_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh(root) as store:
        real = Verification.read

        def read_late(self: Verification, versions: Iterable[LayerVersion], commits: Iterable[str] = ()) -> None:
            listed, manifests = list(versions), list(commits)
            assert store.gc(ts.KeepLast(1), grace=timedelta(0)).versions_swept
            real(self, listed, manifests)

        monkeypatch.setattr(Verification, "read", read_late)
        report = store.verify()
        assert (report.damages, report.losses, report.unknown) == ((), (), ())
        assert report.versions > store.stats().versions


# --- The newest commit that verifies


def test_fallback_takes_what_was_asked_for_where_that_verifies(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fresh(root) as store, store.checkout(2, fallback=True) as found:
        assert (found.step, found.fallback_from) == (2, None)
        # A document that only other readers need, and a manifest, take nothing from a restore.
        remove(files_of(root, prefix_of(store, "a", 2), "documents")[0])
        remove(root / manifest_key(found.commit.id))
        assert store.checkout(2, fallback=True).fallback_from is None
    assert caplog.records == []


def test_fallback_walks_to_the_newest_that_verifies_and_says_so(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fresh(root) as store:
        for step in (3, 2):
            flip(files_of(root, prefix_of(store, "a", step), "chunks")[0])
        with caplog.at_level(logging.WARNING), store.checkout("latest", fallback=True) as found:
            assert found.step == 1
            assert found.fallback_from == store.show(3)
            assert_same(found.model_state_dict(), weights(1))
        (record,) = caplog.records
        assert "step 3 on 'main' does not verify; step 1 is the newest" in record.getMessage()
        assert "step 2 (layer 'a')" in record.getMessage()
        assert store.stats().leases == 0


def test_what_a_fallback_finds_broken_is_written_anew_by_the_next_commit(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with fresh(root) as store:
        newest = prefix_of(store, "a", 3)
        flip(files_of(root, newest, "chunks")[0])
        remove(files_of(root, prefix_of(store, "b", 3), "documents")[0])
        with caplog.at_level(logging.WARNING), store.checkout("latest", fallback=True) as found:
            assert (found.step, found.quarantined) == (2, {})
        (record,) = caplog.records
        assert "store.branch('main', 'main@2', move=True)" in record.getMessage()
        assert "'tailorstore branch main main@2 --move'" in record.getMessage()
        assert "commits on 'main' at steps up to 3 are refused" in record.getMessage()
        assert store.quarantined() == {store.show(3).id: ("a",)}, "not b, of which all values can be read"
        assert store.verify().quarantined == (newest,), "whoever looks later is told"
        with pytest.raises(ts.InvalidInputError, match="step 3"):
            store.commit(3, weights(4))
        commit = store.commit(4, weights(4), mask=["b"])
        assert commit.layers_written == ("a", "b")
        with store.checkout("latest", fallback=True) as found:
            assert (found.step, found.fallback_from) == (4, None)
            assert_same({"a.w": found.model["a.w"].load()}, {"a.w": weights(4)["a.w"]})


def test_a_branch_that_is_moved_as_a_fallback_says_goes_on_from_there(root: Path) -> None:
    with fresh(root) as store:
        flip(files_of(root, prefix_of(store, "a", 3), "chunks")[0])
        store.checkout("latest", fallback=True).close()
        store.branch("main", "main@2", move=True)
        assert store.commit(3, weights(7), mask=["b"]).layers_written == ("b",)
        with store.checkout("latest", fallback=True) as found:
            assert (found.fallback_from, found.sources) == (None, {"@extra": 3, "a": 2, "b": 3, "c": 1})


def test_a_fallback_that_may_not_write_gives_the_same(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh(root) as store:
        flip(files_of(root, prefix_of(store, "a", 3), "chunks")[0])
    for catalog in (f"sqlite:///{root}/catalog.sqlite?mode=ro", f"sqlite:///{root}/elsewhere.sqlite"):
        with ts.open_store(root, catalog=catalog, create=False) as reader:
            caplog.clear()
            assert reader.checkout("latest", fallback=True).step == 2
            assert "move=True" not in caplog.text, "which this one may not do either"
            assert reader.quarantined() == {}
    assert not (root / "quarantine").exists()
    with fresh(root) as store:

        def refuse(*_: object) -> None:
            msg = "access denied while replacing"
            raise ts.AccessDeniedError(msg)

        monkeypatch.setattr(type(store._objects), "replace", refuse)
        assert store.checkout("latest", fallback=True).step == 2
        assert "was not put into quarantine" in caplog.text
        assert store.quarantined() == {}


def test_fallback_never_leaves_the_commits_that_led_there(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fork's commit goes back to those before the fork, not to what its parent branch did after."""
    with fresh(root) as store:
        store.branch("fork", 1)
    with ts.open_store(root, branch="fork", chunk_bytes=1024) as fork:
        fork.commit(5, weights(5))
        flip(files_of(root, prefix_of(fork, "a", "fork"), "chunks")[0])
        with fork.checkout("latest", fallback=True) as found:
            assert (found.step, found.commit.branch) == (1, "main")
            assert found.fallback_from == fork.show("fork@5")
        assert "store.branch('fork', 'fork@1', move=True)" in caplog.text
        assert fork.branch("fork", "fork@1", move=True) == found.commit


def test_fallback_says_what_it_tried_where_none_verifies(root: Path) -> None:
    with fresh(root) as store:
        flip(files_of(root, prefix_of(store, "b", 1), "chunks")[0])
        with pytest.raises(
            IntegrityError, match=r"Tried: step 3 \(layer 'b'\); step 2 \(layer 'b'\); step 1"
        ) as caught:
            store.checkout("latest", fallback=True)
        assert "tailorstore verify" in str(caught.value)
        assert store.stats().leases == 0
        assert set(store.quarantined().values()) == {("b",)}
        with pytest.raises(ts.NotFoundError):
            store.checkout(77, fallback=True)


def test_fallback_skips_commits_that_gc_takes_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh(root) as store:
        flip(files_of(root, prefix_of(store, "a", 3), "chunks")[0])
        store.tag("kept", 1)
        real = Verification.read

        def read_and_expire(self: Verification, *args: object) -> None:
            real(self, *args)  # type: ignore[arg-type]
            store._catalog.expire([commit.id for commit in store.log() if commit.step == 2])

        monkeypatch.setattr(Verification, "read", read_and_expire)
        assert store.checkout("latest", fallback=True).step == 1


def _fall_back_together(url: str) -> list[Any]:
    with ts.open_store(url) as store:
        found = store.checkout("latest", fallback=True)
        assert found.fallback_from is not None
        state = {name: torch.zeros_like(tensor) for name, tensor in weights(1).items()}
        found.restore(state)
        assert_same(state, weights(1))
        asked = [found.step, found.fallback_from.step]
        found.close()
        try:
            store.checkout(1, fallback=True).close()
            store.checkout(2)
        except ts.IntegrityError as error:
            return [*asked, str(error)]
    return asked


def test_all_ranks_fall_back_to_the_same_commit(root: Path) -> None:
    with fresh(root) as store:
        flip(files_of(root, prefix_of(store, "a", 3), "chunks")[0])
        flip(files_of(root, prefix_of(store, "a", 2), "chunks")[0])
    assert run_ranks(_fall_back_together, 2, f"file://{root}") == [[1, 3], [1, 3]]
    with fresh(root) as store:
        assert store.quarantined() == {store.show(step).id: ("a",) for step in (2, 3)}


# --- Whoever may only read


def test_a_store_that_can_only_be_read_is_verified_and_nothing_is_remembered(root: Path, tmp_path: Path) -> None:
    other = f"sqlite:///{tmp_path}/other.sqlite"
    with ts.open_store(root, catalog=other, create=False) as guest:
        assert not guest.owned
        assert guest.verify().ok
        assert guest.verify(2).ok
        for refused in (lambda: guest.scrub(0.5), lambda: guest.verify(repair=True)):
            with pytest.raises(ts.ConflictError, match="belongs to"):
                refused()
        turns = guest._catalog._read(lambda connection: connection.execute(select(versions.c.verified_at)).all())
        assert {turn.verified_at for turn in turns} == {None}


def test_damage_on_s3_is_told_by_kind(s3_root: Root, tmp_path: Path) -> None:
    with ts.open_store(
        s3_root.url,
        catalog=f"sqlite:///{tmp_path}/c.sqlite",
        storage_options=s3_root.storage_options,
        chunk_bytes=1024,
    ) as store:
        store.commit(1, weights(1))
        objects = store._objects
        damaged = {}
        for layer, kind in (("a", "short"), ("b", "long"), ("c", "missing")):
            key = f"{prefix_of(store, layer)}{layer}.w/c.1.0"
            raw = bytes(objects.get(key))
            objects.delete([key])
            if kind != "missing":
                objects.put(key, raw[:-1] if kind == "short" else raw + b"\0")
            damaged[key] = kind
        report = store.verify()
        assert {damage.key: damage.kind for damage in report.damages} == damaged
        assert store.verify(repair=True).quarantined == tuple(prefix_of(store, layer) for layer in "abc")
        commit = store.commit(2, weights(2), mask=[])
        assert commit.layers_written == ("a", "b", "c")
        with store.checkout("latest", fallback=True) as found:
            assert_same(found.model_state_dict(), weights(2))
