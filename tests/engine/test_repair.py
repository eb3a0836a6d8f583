"""Repair: what follows from what is known is made again, the rest goes into quarantine, the next commit heals it."""

import json
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import DigestMismatchError, MissingObjectError
from tailorstore.domain.names import manifest_key, quarantine_key
from tailorstore.domain.records import CommitManifest, LayerVersion
from tailorstore.storage.manifests import read_manifest, write_manifest
from tailorstore.storage.quarantine import read_quarantine, write_quarantine
from tests.kit.audit import assert_root_is_exact, refs
from tests.kit.damage import files_of, flip, flip_format, make_newer, prefix_of, remove, shorten
from tests.kit.models import adamw, assert_same, assert_same_optim, gpt, optim_snapshot, snapshot, train
from tests.kit.ranks import run_ranks

NOW = timedelta(0)
LIGHT = ts.LightSettings(exact_below=16)


def weights(step: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(step)
    return {f"{layer}.w": torch.randn(40, 20, generator=chance) for layer in ("a", "b", "c")}


def open_small(root: Path, **settings: Any) -> ts.Store:
    return ts.open_store(root, **{"chunk_bytes": 1024, "light": LIGHT, **settings})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give the root of a store: b of step 1; a of 1, 2, 3; c light at 3 on its base of 1."""
    place = tmp_path / "root"
    with open_small(place) as store:
        for step, mask in ((1, None), (2, ["a"]), (3, {"a": True, "c": "light"})):
            store.commit(step, weights(step), mask=mask, metrics={"loss": step})
    return place


def versions_of(store: ts.Store, ref: int | str = "latest") -> dict[str, LayerVersion]:
    return dict(store._catalog.composite(store.show(ref).id).versions)


# --- What is made again


def test_documents_that_follow_from_others_are_made_again_exactly(root: Path) -> None:
    with open_small(root) as store:
        documents = [
            *files_of(root, prefix_of(store, "a"), "documents"),
            *files_of(root, prefix_of(store, "c"), "documents"),
        ]
        contents = {path: path.read_bytes() for path in documents}
        assert len(contents) > 3
        for path, damage in zip(documents, [remove, flip, shorten] * len(documents), strict=False):
            damage(path)
        broken = store.verify()
        assert len(broken.damages) == len(documents)
        assert broken.losses == ()
        report = store.verify(repair=True)
        assert report.ok
        assert all(damage.mended for damage in report.damages)
        assert (report.quarantined, store.quarantined()) == ((), {})
        assert {path: path.read_bytes() for path in documents} == contents
        assert store.verify().damages == ()


def test_manifests_are_made_again_from_the_catalog(root: Path) -> None:
    with open_small(root) as store:
        commits = store.log()
        for commit, damage in zip(commits, (remove, flip, shorten), strict=True):
            damage(root / manifest_key(commit.id))
        assert [loss.manifest for loss in store.verify().losses] == [True] * 3
        report = store.verify(repair=True)
        assert report.ok
        assert (len(report.damages), report.losses) == (3, ())
        assert store.verify().damages == ()
        assert [read_manifest(store._objects, commit.id).commit for commit in commits] == commits
        before = [(commit.id, versions_of(store, commit.id)) for commit in commits]
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    with open_small(root) as rebuilt:
        rebuilt.rebuild_catalog()
        assert rebuilt.log() == commits
        assert [(commit.id, versions_of(rebuilt, commit.id)) for commit in commits] == before
        assert_same(rebuilt.checkout(2).model_state_dict(), {**weights(1), "a.w": weights(2)["a.w"]})


def test_a_document_that_cannot_be_made_again_as_it_was_is_not_made(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later zarr-python may write it in another way."""
    with open_small(root) as store:
        path = files_of(root, prefix_of(store, "a"), "documents")[0]
        remove(path)
        monkeypatch.setattr("tailorstore.engine.repair.array_document", lambda _: b"{}")
        report = store.verify(repair=True)
        assert not report.ok
        assert report.quarantined == (prefix_of(store, "a"),)
        assert not path.exists()


def seem_newer(root: Path, change: Callable[[Path], None]) -> dict[Path, bytes]:
    """Change the manifest of step 2, the group document of a's newest version, and the records of a tag and a branch.

    Returns:
        What they are now.
    """
    with open_small(root) as store:
        store.tag("best", 2)
        store.branch("side", 1)
        paths = [root / manifest_key(store.show(2).id), *files_of(root, prefix_of(store, "a"), "group")]
    paths += [path for path in (root / "refs").iterdir() if json.loads(path.read_text())["name"] in ("best", "side")]
    assert len(paths) == 4
    for path in paths:
        change(path)
    return {path: path.read_bytes() for path in paths}


def test_what_a_newer_version_wrote_is_told_and_left_as_it_is(root: Path) -> None:
    written = seem_newer(root, make_newer)
    with open_small(root) as store:
        names, log = refs(store), store.log()
        for _ in range(2):
            report = store.verify(repair=True)
            assert {root / one.key for one in report.damages} == written.keys()
            assert all("install a newer tailorstore" in one.detail and not one.mended for one in report.damages)
            assert (report.quarantined, report.unrecorded) == ((), ("branch side",))
            assert not store.checkout().quarantined
        # The catalog knows what they said, and stays the one that does.
        assert store.rebuild_catalog(dry_run=True).written == store.rebuild_catalog().written == ()
        assert (refs(store), store.log()) == (names, log)
        store.gc(grace=NOW)
    assert {path: path.read_bytes() for path in written} == written


def test_the_record_of_a_newer_version_stays_when_the_name_is_recorded_again(root: Path) -> None:
    with open_small(root) as store:
        store.tag("best", 2)
        (record,) = (path for path in (root / "refs").iterdir() if json.loads(path.read_text())["name"] == "best")
        make_newer(record)
        written = record.read_bytes()
        for recorded in (("tag best",), ()):
            report = store.verify(repair=True)
            assert (report.recorded, report.unrecorded, report.ok) == (recorded, (), False)
            assert record.read_bytes() == written


def test_a_flipped_bit_in_the_number_of_a_format_is_damage_like_any_other(root: Path) -> None:
    seem_newer(root, flip_format)
    with open_small(root) as store:
        names = refs(store)
        report = store.verify(repair=True)
        assert [one.mended for one in report.damages if one.version_id is None] == [True, True, True]
        assert report.quarantined == (prefix_of(store, "a"),)
        assert set(report.recorded) == {"tag best", "branch side"}
        store.rebuild_catalog()
        assert refs(store) == names


def test_an_expired_commit_gets_no_manifest_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GC may drop it just before it is written; a rebuild would find it again then, with its layers going."""
    with open_small(root) as store:
        gone = store.show(2)
        remove(root / manifest_key(gone.id))
        dropped: list[ts.Commit] = []

        def write_late(objects: Any, manifest: CommitManifest) -> str:
            dropped.extend(store._catalog.expire([gone.id]).commits)
            return write_manifest(objects, manifest)

        monkeypatch.setattr("tailorstore.engine.repair.write_manifest", write_late)
        store.verify(repair=True)
        assert dropped == [gone]
        assert not (root / manifest_key(gone.id)).exists()


# --- Quarantine


def test_a_damaged_layer_is_marked_and_everybody_who_holds_it_says_so(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_small(root) as store:
        chunk, *_ = files_of(root, prefix_of(store, "b"), "chunks")
        flip(chunk)
        assert store.verify().quarantined == ()
        assert store.quarantined() == {}, "nothing is marked by looking"
        report = store.verify(repair=True)
        assert not report.ok
        assert report.quarantined == (prefix_of(store, "b"),)
        assert store.quarantined() == {commit.id: ("b",) for commit in store.log()}
        assert chunk.exists(), "what is damaged stays where it is"
        (why,) = {info.quarantined for info in store.layers() if info.name == "b"}
        assert why == f"flipped: {chunk.relative_to(root)}"
        caplog.clear()
        with caplog.at_level(logging.WARNING), store.checkout() as found:
            assert found.quarantined == {"b": why}
            assert_same({"a.w": found.model["a.w"].load()}, {"a.w": weights(3)["a.w"]})
            with pytest.raises(DigestMismatchError, match=r"'tailorstore checkout --fallback'"):
                found.model["b.w"].load()
        (record,) = caplog.records
        assert "'b' of step 1 (flipped: layers/b/" in record.getMessage()


def test_composites_whose_base_is_damaged_are_in_quarantine(root: Path) -> None:
    with open_small(root) as store:
        flip(files_of(root, prefix_of(store, "c", base=True), "chunks")[0])
        store.verify(repair=True)
        assert set(store.quarantined().values()) == {("c",)}
        assert len(store.quarantined()) == 3
        assert store.checkout(3).quarantined["c"].startswith("its base of step 1: flipped")


def test_what_is_put_back_leaves_quarantine(root: Path) -> None:
    with open_small(root) as store:
        chunk = files_of(root, prefix_of(store, "b"), "chunks")[1]
        whole = chunk.read_bytes()
        remove(chunk)
        store.verify(repair=True)
        chunk.write_bytes(whole)
        assert store.verify().ok
        assert store.checkout().quarantined, "only a repair changes anything"
        report = store.verify(2, repair=True)
        assert (report.lifted, report.quarantined) == ((prefix_of(store, "b"),), ())
        assert store.quarantined() == {}
        assert read_quarantine(store._objects) == {}
        assert store.commit(4, weights(1), mask=["a"]).layers_written == ("a",)


def test_a_record_that_a_dying_repair_left_is_taken_away(root: Path) -> None:
    with open_small(root) as store:
        prefix = prefix_of(store, "b")
        component, version_id = prefix.split("/")[1:3]
        write_quarantine(store._objects, component, version_id, "flipped")
        assert store.quarantined() == {}
        assert store.verify(repair=True).lifted == (prefix,)
        assert not (root / quarantine_key(component, version_id)).exists()


@pytest.mark.parametrize("spoil", [lambda _: None, flip, shorten])
def test_a_rebuilt_catalog_still_knows(root: Path, spoil: Any) -> None:
    with open_small(root) as store:
        flip(files_of(root, prefix_of(store, "b"), "chunks")[0])
        store.verify(repair=True)
        expected = store.quarantined()
        why = store.checkout().quarantined["b"]
        component, version_id = prefix_of(store, "b").split("/")[1:3]
    spoil(root / quarantine_key(component, version_id))
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    with open_small(root) as reader:
        assert not reader.owned
        assert reader.quarantined() == expected, "so does who reads it from its manifests"
        reader.rebuild_catalog()
        assert reader.quarantined() == expected
        found = reader.checkout().quarantined["b"]
        assert found == why if spoil not in (flip, shorten) else "record cannot be read" in found
        assert reader.commit(4, weights(4), mask=[]).layers_written == ("b",)


def test_gc_sweeps_the_record_with_its_version(root: Path) -> None:
    with open_small(root) as store:
        flip(files_of(root, prefix_of(store, "b"), "chunks")[0])
        store.verify(repair=True)
        assert len(read_quarantine(store._objects)) == 1
        store.gc(grace=NOW)
        assert len(read_quarantine(store._objects)) == 1, "the version still has its standing"
        store.commit(4, weights(4))
        store.gc(ts.KeepLast(1), grace=NOW)
        assert read_quarantine(store._objects) == {}
        assert not (root / "quarantine").exists()
        assert_root_is_exact(store)
        assert store.verify().unknown == ()


def test_gc_keeps_the_last_commit_that_is_whole(root: Path) -> None:
    with open_small(root) as store:
        for step in (2, 3):
            flip(files_of(root, prefix_of(store, "a", step), "chunks")[0])
        store.verify(repair=True)
        report = store.gc(ts.KeepLast(1), grace=NOW)
        assert [commit.step for commit in store.log()] == [3, 1]
        assert report.kept[store.show(1).id] == ("last 1 of 1 on main",)
        with store.checkout("latest", fallback=True) as found:
            assert found.step == 1
            assert_same(found.model_state_dict(), weights(1))


# --- Healing


@pytest.mark.parametrize(
    ("where", "restarted", "block"),
    [("chunks", False, True), ("chunks", True, False), ("group", False, False), ("group", True, True)],
)
def test_the_next_commit_heals_what_its_mask_leaves_out(
    tmp_path: Path, where: str, restarted: bool, block: bool
) -> None:
    """Whatever the mask says, and although the layer is to the bit what its document says is stored."""
    root, model = tmp_path / "root", gpt()
    optimizer = adamw(model)
    train(model, [optimizer], 1)
    store = open_small(root)
    store.commit(1, model, optimizer)
    layer = "transformer.h.1"
    remove(files_of(root, prefix_of(store, layer), where)[0])
    assert not store.verify(repair=True).ok
    if restarted:
        store.close()
        store = open_small(root)
    pending = store.commit(2, model, optimizer, mask=["lm_head"], block=block)  # type: ignore[call-overload]
    commit = pending if block else pending.result(60)
    assert commit.layers_written == (layer,), "lm_head is unchanged, the broken one is written all the same"
    assert store.verify("latest").ok
    with store.checkout() as found:
        assert found.quarantined == {}
        assert (found.fidelity[layer], found.sources[layer]) == ("full", 2)
        restored = gpt(seed=9)
        again = adamw(restored)
        train(restored, [again], 1)
        found.restore(restored, again)
    assert_same(snapshot(restored), snapshot(model))
    assert_same_optim(optim_snapshot(again), optim_snapshot(optimizer))
    assert store.commit(3, model, optimizer).layers_written == (), "healed once, it is compared as ever"
    store.close()


def test_the_others_are_measured_although_one_is_tied_to_a_layer_in_quarantine(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def tied(step: int) -> dict[str, torch.Tensor]:
        state = weights(step)
        return {**state, "b.tied": state["a.w"]}

    with ts.open_store(root, branch="tied", chunk_bytes=1024) as store:
        store.commit(1, tied(1))
        assert store.checkout().documents()["a"].content["aliases"] == {"b.tied": "a.w"}
        remove(files_of(root, prefix_of(store, "a"), "group")[0])
        store.verify(repair=True)
    caplog.clear()
    with ts.open_store(root, branch="tied") as store:
        commit = store.commit(2, tied(2), mask=[])
        assert caplog.records == []
        measures = store._catalog.measures_of(commit.id)
        assert [name for name, one in sorted(measures.items()) if one.drift is None] == ["a"]
        assert commit.layers_written == ("a",)
        assert_same({"b.tied": store.checkout().model_state_dict()["b.tied"]}, {"b.tied": weights(2)["a.w"]})


def test_without_repair_a_damaged_layer_that_did_not_change_is_not_written(root: Path) -> None:
    """What the others show would mean nothing if it were."""
    with open_small(root) as store:
        remove(files_of(root, prefix_of(store, "b"), "chunks")[0])
        store.verify()
        assert "b" not in store.commit(4, weights(1)).layers_written


@pytest.mark.parametrize("broken", ["own", "base"])
def test_a_layer_whose_base_is_broken_is_written_in_full_where_light_is_asked_for(root: Path, broken: str) -> None:
    with open_small(root) as store:
        remove(files_of(root, prefix_of(store, "c", base=broken == "base"), "chunks")[0])
        store.verify(repair=True)
        store.commit(4, weights(4), mask={"c": "light", "b": "light"})
        with store.checkout() as found:
            assert (found.fidelity["c"], found.fidelity["b"], found.quarantined) == ("full", "light", {})
            assert_same({"c.w": found.model["c.w"].load()}, {"c.w": weights(4)["c.w"]})
        store.commit(5, weights(5), mask={"c": "light"})
        versions = versions_of(store)
        assert versions["c"].base_id == store.show(4).id, "the new one is the base from now on"
        assert store.verify("latest").ok


def test_a_full_version_in_quarantine_is_no_base(root: Path) -> None:
    with open_small(root) as store:
        remove(files_of(root, prefix_of(store, "b"), "chunks")[0])
        store.verify(repair=True)
        store.commit(4, weights(4), mask={"*": "light"})
        versions = versions_of(store)
        assert (versions["b"].fidelity, versions["b"].base_id) == ("full", None)
        assert versions["a"].fidelity == "light"


def test_a_commit_that_does_not_capture_the_layer_leaves_it_in_quarantine(root: Path) -> None:
    with open_small(root) as store:
        flip(files_of(root, prefix_of(store, "b"), "chunks")[0])
        flip(files_of(root, prefix_of(store, "c", base=True), "chunks")[0])
        store.verify(repair=True)
        part = {"a.w": weights(4)["a.w"]}
        for step in (4, 5):
            store.commit(step, {"a.w": part["a.w"] * step}, partial=True)
            assert sorted(store.checkout().quarantined) == ["b", "c"]
        commit = store.commit(6, weights(6) | part, mask=[])
        assert commit.layers_written == ("b", "c")
        assert store.checkout().quarantined == {}


def test_a_model_that_lacks_a_layer_in_quarantine_is_refused(root: Path) -> None:
    with open_small(root) as store:
        remove(files_of(root, prefix_of(store, "b"), "group")[0])
        store.verify(repair=True)
        state = weights(4)
        del state["b.w"]
        with pytest.raises(ts.InvalidInputError, match="layer 'b' is gone"):
            store.commit(4, state)
        with pytest.raises(MissingObjectError):
            store.checkout().model_state_dict()


class Watching:
    """A strategy that writes nothing, and keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: dict[str, Any] = {}

    def select(self, context: ts.MaskContext) -> list[str]:
        self.shown = dict(context.layers)
        return []


def test_to_a_strategy_what_is_broken_was_never_stored(root: Path) -> None:
    with open_small(root) as store:
        flip(files_of(root, prefix_of(store, "b"), "chunks")[0])
        flip(files_of(root, prefix_of(store, "c", base=True), "chunks")[0])
        store.verify(repair=True)
        strategy = Watching()
        assert store.commit(4, weights(4), mask=strategy).layers_written == ("b", "c")
        assert {name: state.source_step for name, state in strategy.shown.items()} == {"a": 3, "b": None, "c": None}
        assert {name for name, state in strategy.shown.items() if state.due_full} == {"b", "c"}
        assert store.checkout().quarantined == {}


def test_extra_state_that_is_broken_heals_with_the_next_commit(root: Path) -> None:
    with open_small(root) as store:
        flip(files_of(root, prefix_of(store, "@extra"), "group")[0])
        assert store.verify(repair=True).quarantined == (prefix_of(store, "@extra"),)
        assert store.checkout().quarantined.keys() == {"@extra"}
    with open_small(root) as store:
        store.commit(4, weights(4), mask=[], extra={"x": 1})
        assert store.checkout().quarantined == {}
        assert store.checkout().extra == {"x": 1}


def _heal_together(url: str) -> list[Any]:
    with ts.open_store(url, chunk_bytes=1024) as store:
        state = weights(1)
        store.commit(4, state, mask=["a"])
        if os.environ["RANK"] == "0":
            root = Path(url.removeprefix("file://"))
            remove(files_of(root, prefix_of(store, "b"), "group")[0])
            assert not store.verify(repair=True).ok
        # The head in every rank's memory is still the one before the quarantine.
        commit = store.commit(5, state, mask=[])
        with store.checkout() as found:
            assert found.quarantined == {}
            restored = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            found.restore(restored)
        assert_same(restored, state)
        return [list(commit.layers_written), list(store.commit(6, state).layers_written)]


def test_many_ranks_heal_what_their_mask_leaves_out(tmp_path: Path) -> None:
    with open_small(tmp_path / "root") as store:
        store.commit(1, weights(1))
    assert run_ranks(_heal_together, 2, f"file://{tmp_path}/root") == [[["b"], []]] * 2


def test_repair_is_safe_beside_a_commit_that_decided_before(root: Path) -> None:
    """A commit that found the layer unchanged a moment ago keeps it, says so, and the next one writes it."""
    with open_small(root) as store, open_small(root) as verifier:
        state = {**weights(1), "a.w": weights(3)["a.w"], "c.w": weights(1)["c.w"]}
        remove(files_of(root, prefix_of(store, "b"), "chunks")[0])
        pending = store.commit(4, state, mask=["b"], block=False)
        pending.result(60)
        verifier.verify(repair=True)
        assert store.checkout().quarantined.keys() == {"b"}
        assert store.commit(5, state, mask=[]).layers_written == ("b",)
