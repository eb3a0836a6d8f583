"""Light commits in the background, after failures, over restarts, on forks, and many of them in a row."""

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tailorstore as ts
from tailorstore.domain.errors import StorageUnavailableError
from tailorstore.engine.light.bases import BaseCache
from tailorstore.storage.layers import layer_digest
from tests.kit.audit import assert_root_is_exact
from tests.kit.light import assert_as_recorded, read, slots_in, stored_light
from tests.kit.models import adamw, assert_same, bits, gpt, same_bits, snapshot, train

LIGHT = {"*": "light"}
SMALL = ts.LightSettings(weight_bits=4, slot_bits=4, block=128, exact_below=64)
NOW = timedelta(0)


def open_small(root: Path | str, **settings: Any) -> ts.Store:
    return ts.open_store(root, **{"chunk_bytes": 1024, "light": SMALL, **settings})


class Run:
    """A run of which every state is known: three layers with the slots of AdamW, and how they drift."""

    layers = ("a", "b", "c")

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = {f"{layer}.w": self.noise() for layer in self.layers}
        self.slots = {
            name: {
                "exp_avg": 0.01 * self.noise(),
                "exp_avg_sq": 1e-4 * self.noise().square(),
                "step": torch.tensor(0.0),
            }
            for name in self.weights
        }

    def noise(self) -> torch.Tensor:
        return torch.randn(24, 40, generator=self.generator)

    def advance(self) -> None:
        for name, weight in self.weights.items():
            gradient, held = 0.01 * self.noise(), self.slots[name]
            held["exp_avg"].mul_(0.9).add_(gradient, alpha=0.1)
            held["exp_avg_sq"].mul_(0.99).addcmul_(gradient, gradient, value=0.01)
            held["step"].add_(1)
            weight.sub_(0.01 * held["exp_avg"] / (held["exp_avg_sq"].sqrt() + 1e-8))

    def commit(self, store: ts.Store, step: int, mask: Any = None, *, block: bool = True) -> Any:
        return store.commit(step, self.weights, self.slots, mask, block=block)  # type: ignore[call-overload]

    def commit_and_wait(self, store: ts.Store, step: int, mask: Any, *, block: bool) -> ts.Commit:
        pending = self.commit(store, step, mask, block=block)
        commit: ts.Commit = pending if block else pending.result(60)
        return commit

    @property
    def live(self) -> dict[str, torch.Tensor]:
        found = {f"{slot} of {name}": value for name, held in self.slots.items() for slot, value in held.items()}
        return {name: tensor.clone() for name, tensor in (self.weights | found).items()}


def digests(store: ts.Store, ref: Any = "latest") -> dict[str, str]:
    """Return layer → content digest: of codes, scales and errors too, and of the base's id but for its name."""
    with store.checkout(ref) as checkpoint:
        versions = checkpoint._composite.versions
        return {name: version.digest for name, version in versions.items() if name != "@extra"}


def contents(store: ts.Store, ref: Any = "latest") -> dict[str, str]:
    """Return layer → digest of its content, on whatever base: in two stores ids differ."""
    with store.checkout(ref) as checkpoint:
        documents = checkpoint.documents()
        found = {name: replace(one, base_id="" if one.base_id else None) for name, one in documents.items()}
        return {name: layer_digest(one) for name, one in found.items() if name != "@extra"}


# --- In the background


def test_a_commit_in_the_background_holds_what_was_when_it_was_asked_for(tmp_path: Path) -> None:
    run = Run()
    lives = {}
    with open_small(tmp_path / "root") as store:
        pending = []
        for step in range(1, 8):
            run.advance()
            lives[step] = run.live
            pending.append(run.commit(store, step, LIGHT, block=False))
            for tensor in (*run.weights.values(), *run.slots["b.w"].values()):
                tensor.add_(0.001)
        commits = [one.result(60) for one in pending]
        for commit in commits[1:]:
            model, slots = read(store, commit.id)
            assert assert_as_recorded(store, lives[commit.step], model | slots, commit.id)
    run = Run()
    with open_small(tmp_path / "again") as store:
        for step in range(1, 8):
            run.advance()
            run.commit(store, step, LIGHT)
            for tensor in (*run.weights.values(), *run.slots["b.w"].values()):
                tensor.add_(0.001)
            behind = contents(store, step)
            with open_small(tmp_path / "root") as other:
                assert contents(other, step) == behind


# --- Failures


def broken_put(fail_at: int, put: Callable[..., Any]) -> Callable[..., Any]:
    count = 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == fail_at:
            msg = "the disk is on fire"
            raise StorageUnavailableError(msg)
        return put(*args, **kwargs)

    return broken


@pytest.mark.parametrize("fail_at", [1, 2, 7, 12, 13, 14, 15, 16])
@pytest.mark.parametrize("block", [True, False])
def test_a_commit_that_fails_leaves_the_next_one_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int, *, block: bool
) -> None:
    """Puts 1 to 12 are of codes, scales, … and documents of light layers, 13 and on of ``@extra`` and the manifest."""
    failing, sound = Run(), Run()
    with open_small(tmp_path / "sound") as store:
        for step in (1, 2, 4):
            sound.advance()
            if step == 4:
                sound.advance()
            sound.commit(store, step, LIGHT)
        expected = contents(store)
    with open_small(tmp_path / "root") as store:
        for step in (1, 2):
            failing.advance()
            failing.commit(store, step, LIGHT)
        failing.advance()
        with monkeypatch.context() as patch:
            patch.setattr(store._objects, "put", broken_put(fail_at, store._objects.put))
            with pytest.raises(ts.UnavailableError, match="fire"):
                failing.commit_and_wait(store, 3, LIGHT, block=block)
        assert [one.step for one in store.log()] == [2, 1]
        failing.advance()
        failing.commit(store, 4, LIGHT)
        assert contents(store) == expected
        model, slots = read(store)
        assert_as_recorded(store, failing.live, model | slots)
        assert store.verify().ok
        store.gc(grace=NOW)
        assert_root_is_exact(store)


def test_a_base_that_cannot_be_read_fails_the_commit_and_harms_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    run = Run()
    with open_small(root) as store:
        first = run.commit(store, 1)
        run.advance()
        run.commit(store, 2, LIGHT)
        before = read(store)
    (chunk,) = (root / "layers" / "b" / first.id / "b.w").glob("c.0.*")
    kept = chunk.read_bytes()
    run.advance()
    for damage in (b"", kept[:-1], bytes([kept[0] ^ 1]) + kept[1:]):
        chunk.write_bytes(damage)
        with open_small(root) as store:
            with pytest.raises(ts.IntegrityError, match="'b'"):
                run.commit(store, 3, LIGHT)
            assert [one.step for one in store.log()] == [2, 1]
            assert not store.verify().ok
            # In full it does not need its base.
            assert store.gc(grace=NOW, dry_run=True).versions_doomed == 0
    chunk.write_bytes(kept)
    with open_small(root) as store:
        after = read(store)
        assert_same(after[0], before[0])
        assert_same(after[1], before[1])
        run.commit(store, 3, LIGHT)
        assert_as_recorded(store, run.live, {**read(store)[0], **read(store)[1]})


# --- One form, whatever is in memory


@pytest.mark.parametrize("way", ["no cache", "small cache", "cleared", "restarted"])
def test_bytes_do_not_depend_on_what_is_in_memory(tmp_path: Path, way: str) -> None:
    masks = [None, LIGHT, LIGHT, {"a": "light", "b": "full"}, LIGHT, LIGHT, {"c": True}, LIGHT, LIGHT]
    found: list[list[dict[str, str]]] = []
    for name in ("plain", way):
        run = Run()
        seen = []
        store = open_small(tmp_path / name)
        if name == "no cache":
            store._commits._committer_of(None).bases = BaseCache(limit_bytes=0)
        if name == "small cache":
            store._commits._committer_of(None).bases = BaseCache(limit_bytes=3 * 24 * 40 * 4)
        for step, mask in enumerate(masks):
            run.advance()
            if name == "restarted":
                store.close()
                store = open_small(tmp_path / name)
            if name == "cleared":
                store._commits._committer_of(None).bases.clear()
            run.commit(store, step, mask)
            if name == "no cache":
                assert store._commits._committer_of(None).bases.size_bytes == 0
            seen.append(contents(store))
        store.close()
        found.append(seen)
    assert found[0] == found[1]


def test_a_copy_of_a_store_goes_on_to_make_the_same_versions(tmp_path: Path) -> None:
    """To the digest, which covers the base: one process had made all of the history, the other one opened it."""
    one, two = Run(), Run()
    with open_small(tmp_path / "root") as store:
        for step in (1, 2):
            for run in (one, two):
                run.advance()
            one.commit(store, step, LIGHT)
        shutil.copytree(tmp_path / "root", tmp_path / "copy")
        one.advance()
        one.commit(store, 3, LIGHT)
        expected = digests(store)
    two.advance()
    with open_small(tmp_path / "copy") as store:
        two.commit(store, 3, LIGHT)
        assert digests(store) == expected


def test_slots_keep_their_coding_as_long_as_it_can_hold_them(tmp_path: Path) -> None:
    """A slot that was never negative and then is was taken for a second moment."""
    weight, slot = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)), torch.zeros(40, 50)
    with open_small(tmp_path / "root") as store:
        store.commit(1, {"a.w": weight}, {"a.w": {"x": slot}})
        codings = []
        for step in range(2, 6):
            weight = weight + 0.01
            slot = torch.randn(40, 50, generator=torch.Generator().manual_seed(step))
            store.commit(step, {"a.w": weight}, {"a.w": {"x": slot.abs() if step == 2 else slot}}, mask=LIGHT)
            with store.checkout() as checkpoint:
                table = checkpoint.documents()["a"].light
            assert table is not None
            codings.append(table.tensors["@optim/x/a.w"].coding)
            model, slots = read(store)
            live = {"a.w": weight, "x of a.w": slot.abs() if step == 2 else slot}
            assert_as_recorded(store, live, model | slots)
    assert codings == ["log", "exact", "value", "value"]


# --- Other branches, other verbs


def test_forks_of_a_light_commit_go_on_from_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    run = Run()
    with open_small(root) as store:
        first = run.commit(store, 1)
        run.advance()
        run.commit(store, 2, LIGHT)
        store.branch("side", 2)
        kept = read(store)
        before = digests(store)
        frozen = run.live
    with open_small(root, branch="side") as side:
        again = run.commit(side, 3, LIGHT)
        assert again.layers_written == ()
        assert digests(side) == before
        run.advance()
        run.commit(side, 4, {"a": "light"})
        assert {name: base.version_id for name, base in side._catalog.composite(side.log()[0].id).bases.items()} == (
            dict.fromkeys("abc", first.id)
        )
        run.advance()
        run.commit(side, 5, LIGHT)
        model, slots = read(side)
        assert_as_recorded(side, run.live, model | slots)
        run.commit(side, 6, {"*": "full"})
        run.advance()
        run.commit(side, 7, LIGHT)
        assert_as_recorded(side, run.live, {**read(side)[0], **read(side)[1]})
    with open_small(root) as store:
        for found, expected in zip(read(store), kept, strict=True):
            assert_same(found, expected)
        assert_as_recorded(store, frozen, kept[0] | kept[1])
        store.gc(ts.KeepLast(1), grace=NOW)
        assert_root_is_exact(store)
        for found, expected in zip(read(store), kept, strict=True):
            assert_same(found, expected)
        # Moved back to a light commit, and on from there.
        store.branch("main", "side", move=True)
    with open_small(root) as store:
        run.advance()
        run.commit(store, 8, LIGHT)
        assert_as_recorded(store, run.live, {**read(store)[0], **read(store)[1]})


def test_a_tag_keeps_the_base_of_a_light_commit(tmp_path: Path) -> None:
    run = Run()
    with open_small(tmp_path / "root") as store:
        run.commit(store, 1)
        run.advance()
        run.commit(store, 2, LIGHT)
        store.tag("good", 2)
        kept = read(store, "good")
        for step in (3, 4):
            run.advance()
            run.commit(store, step)
        assert {one.step for one in store.gc(ts.KeepLast(1), grace=NOW).expired} == {1, 3}
        assert_root_is_exact(store)
        for found, expected in zip(read(store, "good"), kept, strict=True):
            assert_same(found, expected)
        assert store.verify("good").ok
        store.delete_tag("good")
        assert store.gc(ts.KeepLast(1), grace=NOW).versions_swept == 7
        assert_root_is_exact(store)


def test_a_diff_tells_light_versions_apart(tmp_path: Path) -> None:
    run = Run()
    with open_small(tmp_path / "root") as store:
        run.commit(store, 1)
        run.commit(store, 2, LIGHT)
        assert store.diff(1, 2).changed in ((), ("@extra",))
        run.advance()
        run.commit(store, 3, {"a": "light", "b": "light"})
        run.commit(store, 4, LIGHT)
        run.commit(store, 5)
        changed = {pair: set(store.diff(*pair).changed) - {"@extra"} for pair in [(2, 3), (3, 4), (4, 5), (1, 5)]}
    assert changed == {(2, 3): {"a", "b"}, (3, 4): {"c"}, (4, 5): {"a", "b", "c"}, (1, 5): {"a", "b", "c"}}


def test_exports_hold_what_a_restore_gives(tmp_path: Path) -> None:
    run = Run()
    with open_small(tmp_path / "root") as store:
        run.commit(store, 1)
        run.advance()
        run.commit(store, 2, LIGHT)
        model, slots = read(store)
        with store.checkout() as checkpoint:
            checkpoint.export(tmp_path / "out.safetensors", optim=True)
            checkpoint.export(tmp_path / "out.pt", "torch")
    found = load_file(tmp_path / "out.safetensors")
    assert_same({name: tensor for name, tensor in found.items() if name in model}, model)
    assert {bits(tensor) for tensor in slots.values() if tensor.dim()} <= {bits(tensor) for tensor in found.values()}
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_same(loaded["model"], model)
    assert_same(slots_in(loaded["optim"]), slots)


# --- Many in a row


def assert_is_defined(store: ts.Store, root: Path, found: Mapping[str, torch.Tensor]) -> None:
    """Fail unless what was restored is what the arrays of light versions mean, read by zarr-python alone."""
    with store.checkout() as checkpoint:
        documents = checkpoint.documents()
    for layer, document in documents.items():
        if document.light is None:
            continue
        reference = stored_light(store, root, layer)
        for path, tensor in document.light.tensors.items():
            name = path if not path.startswith("@optim/") else " of ".join(path.removeprefix("@optim/").split("/"))
            expected = reference.tensor(path)
            assert expected.shape == tuple(tensor.shape)
            if tensor.coding in ("ratio", "log"):
                # By another power of two than the table's.
                np.testing.assert_allclose(found[name].numpy(), expected, rtol=2e-7)
            else:
                assert bits(found[name]) == expected.tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_hundred_light_commits_mean_what_is_defined(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    root = tmp_path / "root"
    run = Run(seed)
    settings = ts.LightSettings(
        exact_below=64,
        weight_bits=chance.choice([2, 3, 4, 8]),
        slot_bits={"exp_avg": chance.choice([2, 3, 4, 8]), "exp_avg_sq": chance.choice([3, 4, 8])},
        block=chance.choice([16, 128]),
        max_base_commits=12,
    )
    # What each layer was when it was written last.
    written: dict[str, dict[str, torch.Tensor]] = {}
    frozen: set[str] = set()
    store = open_small(root, light=settings)
    for step in range(100):
        before = run.live
        run.advance()
        if chance.random() < 0.2:
            frozen = {layer for layer in run.layers if chance.random() < 0.3}
        for name in run.weights:
            if name[0] in frozen:
                run.weights[name].copy_(before[name])
                for slot, value in run.slots[name].items():
                    value.copy_(before[f"{slot} of {name}"])
        mask = {layer: chance.choice([False, True, "light", "light", "light"]) for layer in run.layers}
        block = chance.random() < 0.5
        commit = run.commit_and_wait(store, step, mask, block=block)
        live = run.live
        for layer in run.layers:
            if mask[layer] or not step:
                written[layer] = {name: tensor for name, tensor in live.items() if name.split(" of ")[-1][0] == layer}
        if chance.random() < 0.1:
            store.close()
            store = open_small(root, light=settings)
        if step % 6 == 0 or step > 95:
            with store.checkout() as checkpoint:
                found = {**checkpoint.model_state_dict(), **slots_in(checkpoint.optim_state_dict())}
                fidelity = checkpoint.fidelity
            expected = {name: tensor for held in written.values() for name, tensor in held.items()}
            assert_as_recorded(store, expected, found)
            assert_is_defined(store, root, found)
            for layer in run.layers:
                if fidelity[layer] == "full":
                    assert all(same_bits(found[name], tensor) for name, tensor in written[layer].items())
            assert commit.step == step
        if step % 25 == 24:
            store.gc(ts.KeepLast(3), grace=NOW)
            assert_root_is_exact(store)
    assert store.verify().ok
    store.close()


def test_training_goes_on_from_a_light_commit_as_if_nothing_had_been(tmp_path: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    train(model, [optimizer], 20)
    with open_small(tmp_path / "root") as store:
        store.commit(20, model, optimizer)
        train(model, [optimizer], 5, seed=1)
        store.commit(25, model, optimizer, mask=LIGHT)
        loss = train(model, [optimizer], 20, seed=2)
        found = []
        for _ in range(2):
            other = gpt(seed=7)
            again = adamw(other)
            store.checkout().restore(other, again)
            found.append((train(other, [again], 20, seed=2), snapshot(other)))
    assert found[0][0] == found[1][0] == pytest.approx(loss, rel=0.01)
    assert_same(found[0][1], found[1][1])
