"""Commit, checkout and restore give back every bit, on every kind of root and catalog."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

import tailorstore as ts
from tailorstore.domain.errors import ExtraStateError, RestoreMismatchError
from tests.conftest import Root
from tests.kit.models import (
    adamw,
    assert_same,
    assert_same_optim,
    gpt,
    nudge,
    optim_snapshot,
    same_bits,
    snapshot,
    train,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ts.Store]:
    with ts.open_store(tmp_path / "root") as opened:
        yield opened


def test_round_trip_on_every_root_and_catalog(root: Root, catalog_url: str) -> None:
    model = gpt()
    optim = adamw(model)
    train(model, [optim], 3)
    with ts.open_store(root.url, catalog=catalog_url, storage_options=root.storage_options) as store:
        commit = store.commit(3, model, optim, metrics={"loss": 0.5}, message="first", extra={"epoch": 1})
        assert commit.step == 3
        assert commit.branch == "main"
        assert set(commit.layers_written) == {"transformer.wte", "transformer.ln_f", "lm_head"} | {
            f"transformer.h.{i}" for i in range(3)
        }
    expected, slots = snapshot(model), optim_snapshot(optim)
    with ts.open_store(root.url, catalog=catalog_url, storage_options=root.storage_options, create=False) as store:
        other = gpt(seed=9)
        other_optim = adamw(other)
        checkpoint = store.checkout("latest")
        assert checkpoint.restore(other, other_optim) == {"epoch": 1}
        assert_same(snapshot(other), expected)
        assert_same_optim(optim_snapshot(other_optim), slots)
        assert checkpoint.metrics == {"loss": 0.5}
        assert store.log()[0].message == "first"
        assert train(other, [other_optim], 2) == train(model, [optim], 2)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8S = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
INTS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
COMPLEXES = [torch.complex64, torch.complex128, torch.complex32]


def every_bit_pattern(dtype: torch.dtype) -> torch.Tensor:
    """Random bytes as elements: NaN payloads, denormals, -0.0, infinities and all."""
    generator = torch.Generator().manual_seed(7)
    raw = torch.randint(0, 256, (6 * 7 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    raw[: dtype.itemsize] = 0
    raw[dtype.itemsize - 1] = 0x80  # -0.0 where there is one
    if dtype is torch.bool:
        return (raw % 2).bool().reshape(6, 7)
    return raw.view(dtype).reshape(6, 7)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_every_dtype_keeps_every_bit(tmp_path: Path, codec: Any) -> None:
    state = {str(dtype): every_bit_pattern(dtype) for dtype in [*FLOATS, *FLOAT8S, *INTS, *COMPLEXES, torch.bool]}
    state |= {f"{name}.scalar": tensor.reshape(-1)[3].clone() for name, tensor in list(state.items())}
    with ts.open_store(tmp_path / "root", codec=codec, chunk_bytes=1024) as store:
        store.commit(1, state)
        assert_same(store.checkout().model_state_dict(), state)
        blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        store.checkout().restore(blank)
        assert_same(blank, state)
        assert store.verify().ok


def odd_tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "empty_inside": torch.empty(3, 0, 2),
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 5),
        "shifted": base.reshape(-1)[3:11],
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "conjugate": torch.complex(base, -base).conj(),
        "negative_view": torch.complex(base, -base).conj().imag,
        "negative_zero": torch.full((5,), -0.0),
        "big": torch.arange(5000, dtype=torch.float32).reshape(50, 100),
        "prime_rows": torch.arange(1009 * 3, dtype=torch.float64).reshape(1009, 3),
        "wide_row": torch.arange(2 * 1024, dtype=torch.float32).reshape(2, 1024),
    }


@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize("block", [True, False])
def test_odd_tensors_round_trip(tmp_path: Path, codec: Any, *, block: bool) -> None:
    state = odd_tensors()
    with ts.open_store(tmp_path / "root", codec=codec, chunk_bytes=1024) as store:
        pending = store.commit(1, state, block=block)  # type: ignore[call-overload]
        if not block:
            pending.result(60)
        found = store.checkout().model_state_dict()
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert same_bits(found[name], tensor), name
        # Restore goes into tensors of the same odd strides.
        into = {
            name: tensor.clone(memory_format=torch.preserve_format)
            for name, tensor in state.items()
            if not tensor.is_conj() and not tensor.is_neg()
        }
        into["expanded"] = torch.zeros(2, 1).expand(2, 5)
        into["strided"] = torch.zeros(4, 6)[::2, 1::3]
        store.checkout().restore(into, strict=False)
        for name, tensor in into.items():
            assert same_bits(tensor, state[name]), name


def test_lazy_tensors_read_only_the_chunks_they_need(tmp_path: Path) -> None:
    values = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64)
    with ts.open_store(tmp_path / "root", chunk_bytes=1024) as store:
        store.commit(5, {"w": values})
        checkpoint = store.checkout()
        lazy = checkpoint.model["w"]
        assert (tuple(lazy.shape), lazy.dtype, lazy.nbytes, lazy.layer, lazy.source_step) == (
            (64, 64),
            torch.float32,
            16384,
            "w",
            5,
        )
        chunks = sorted((tmp_path / "root" / "layers").rglob("c.*"))
        assert len(chunks) == 16
        # Only the chunk with rows 8 to 11 is left: reading those rows must need no other.
        for chunk in chunks:
            if chunk.name != "c.2.0":
                chunk.unlink()
        for index in (slice(8, 12), 9, (10, slice(1, 60, 7)), (slice(8, 10), ..., 3), (None, 11)):
            assert same_bits(lazy[index], values[index].contiguous())
        with pytest.raises(ts.IntegrityError, match="'w'"):
            lazy[0:9]


def test_lazy_indexing_means_what_torch_means(store: ts.Store) -> None:
    values = torch.randn(5, 4, 3)
    store.commit(1, {"w": values})
    lazy = store.checkout().model["w"]
    for index in (
        ...,
        2,
        -1,
        slice(1, 3),
        (slice(None), -2),
        (..., 1),
        (1, None, ..., slice(None, None, 2)),
        torch.tensor([0, 3]),
        values[:, 0, 0] > 0,
        slice(4, 1),
    ):
        assert same_bits(lazy[index], values[index].contiguous()), index
    for bad in (5, (0, 0, 0, 0), slice(None, None, -1)):
        with pytest.raises(IndexError):
            lazy[bad]


def test_extra_state_comes_back_as_it_was(store: ts.Store) -> None:
    model = gpt()
    optim = adamw(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=10)
    train(model, [optim], 1)
    scheduler.step()
    extra = {
        "scheduler": scheduler,
        "position": (3, {"file": "a/b.txt", "offset": 2**70}),
        "floats": [0.1, -0.0, float("inf"), float("nan"), 1e-320],
        "flags": [True, False, None],
        "bytes": b"\x00\xff",
        "tensors": {"mask": torch.tensor([True, False]), "ema": torch.tensor(0.3, dtype=torch.bfloat16)},
        "numpy": np.arange(6, dtype=">i4").reshape(2, 3),
        "number": np.float32(0.1),
        "keys": {1: "int", (2, 3): "tuple", None: "none", "$odd": 4},
        "text": "naïve 模型 \udc80",
        "empty": {},
    }
    store.commit(1, model, optim, extra=extra)
    found = store.checkout().restore(model, optim)
    assert found["scheduler"] == scheduler.state_dict()
    assert found["position"] == extra["position"]
    assert [str(value) for value in found["floats"]] == ["0.1", "-0.0", "inf", "nan", "1e-320"]
    assert found["flags"] == [True, False, None]
    assert found["bytes"] == b"\x00\xff"
    assert found["text"] == extra["text"]
    assert found["keys"] == extra["keys"]
    assert found["empty"] == {}
    assert same_bits(found["tensors"]["mask"], torch.tensor([True, False]))
    assert same_bits(found["tensors"]["ema"], torch.tensor(0.3, dtype=torch.bfloat16))
    assert np.array_equal(found["numpy"], np.arange(6).reshape(2, 3))
    assert found["number"] == np.float32(0.1)
    assert isinstance(found["number"], np.float32)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {"b": object()}]}, r"extra\.a\.1\.b"),
        ({"f": lambda: None}, r"extra\.f"),
        ({"s": {1, 2}}, r"extra\.s"),
        ({"t": torch.empty(2, device="meta")}, r"extra\.t"),
        ({"n": np.array(["x"])}, r"extra\.n"),
        ({frozenset(): 1}, "extra has a key"),
    ],
)
def test_extra_state_that_json_cannot_hold_is_refused_with_its_path(store: ts.Store, value: Any, path: str) -> None:
    with pytest.raises(ExtraStateError, match=path):
        store.commit(1, gpt(), extra=value)
    with pytest.raises(ts.NotFoundError):
        store.log()


def test_extra_state_that_holds_itself_is_refused(store: ts.Store) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ExtraStateError, match="holds itself"):
        store.commit(1, gpt(), extra=loop)


def test_random_states_are_restored_on_request(store: ts.Store) -> None:
    store.commit(1, gpt())
    expected = (random.random(), np.random.random(), torch.rand(3))  # noqa: NPY002
    store.checkout().restore(gpt(), rng=True)
    found = (random.random(), np.random.random(), torch.rand(3))  # noqa: NPY002
    assert found[:2] == expected[:2]
    assert same_bits(found[2], expected[2])
    before = torch.get_rng_state()
    store.checkout().restore(model := gpt(seed=3))
    assert model is not None
    torch.set_rng_state(before)


def test_unchanged_layers_cost_nothing(store: ts.Store) -> None:
    """A frozen base with a small trained adapter, as LoRA has it."""
    model = gpt(layers=4)
    for name, param in model.named_parameters():
        param.requires_grad_("lm_head" in name)
    optim = torch.optim.AdamW([model.lm_head.weight], lr=1e-2)
    train(model, [optim], 1)
    first = store.commit(1, model, optim)
    train(model, [optim], 1)
    second = store.commit(2, model, optim)
    assert second.layers_written == ("lm_head",)
    assert second.bytes_written < first.bytes_written / 2
    checkpoint = store.checkout()
    assert checkpoint.sources["transformer.h.2"] == 1
    assert checkpoint.sources["lm_head"] == checkpoint.sources["@extra"] == 2
    restored = gpt(seed=5, layers=4)
    checkpoint.restore(restored)
    assert_same(snapshot(restored), snapshot(model))


def test_a_commit_in_which_nothing_changed_writes_no_layer(store: ts.Store) -> None:
    model = gpt()
    store.commit(1, model)
    commit = store.commit(2, model)
    assert commit.layers_written == ()
    assert store.checkout().staleness["lm_head"] == 1


def test_negative_zero_is_a_change(store: ts.Store) -> None:
    store.commit(1, {"w": torch.zeros(4)})
    assert store.commit(2, {"w": torch.full((4,), -0.0)}).layers_written == ("w",)
    assert same_bits(store.checkout().model_state_dict()["w"], torch.full((4,), -0.0))


def test_a_mask_composes_layers_of_several_steps(store: ts.Store) -> None:
    model = gpt()
    optim = adamw(model)
    train(model, [optim], 1)
    store.commit(1, model, optim)
    at_one = snapshot(model)
    train(model, [optim], 1)
    store.commit(2, model, optim, mask=["transformer.h.1", "lm_*"])
    at_two = snapshot(model)
    train(model, [optim], 1)
    store.commit(3, model, optim, mask={"transformer.h.*": True, "transformer.h.1": False, "lm_head": False})
    at_three = snapshot(model)
    checkpoint = store.checkout(3)
    assert checkpoint.sources == {
        "@extra": 3,
        "lm_head": 2,
        "transformer.h.0": 3,
        "transformer.h.1": 2,
        "transformer.h.2": 3,
        "transformer.ln_f": 1,
        "transformer.wte": 1,
    }
    found = checkpoint.model_state_dict()
    for name, tensor in found.items():
        source = {1: at_one, 2: at_two, 3: at_three}[checkpoint.model[name].source_step]
        assert same_bits(tensor, source[name]), name
    steps = {name: slots["step"].load().item() for name, slots in checkpoint.optim.items()}
    assert steps["transformer.h.1.attn.weight"] == 2
    assert steps["transformer.wte.weight"] == 1
    assert set(checkpoint.fidelity.values()) == {"full"}


def test_layers_never_stored_are_written_whatever_the_mask_says(store: ts.Store) -> None:
    commit = store.commit(1, gpt(), mask=["lm_head"])
    assert len(commit.layers_written) == 6


def test_layers_gain_slots_whatever_the_mask_says(store: ts.Store) -> None:
    model = gpt()
    optim = adamw(model)
    store.commit(0, model, optim)
    train(model, [optim], 1)
    assert len(store.commit(1, model, optim, mask=["lm_head"]).layers_written) == 6
    assert store.commit(2, model, optim, mask=[]).layers_written == ()


def test_tied_weights_are_stored_once(store: ts.Store) -> None:
    model = gpt(tied=True)
    optim = adamw(model)
    train(model, [optim], 1)
    commit = store.commit(1, model, optim)
    assert "lm_head" not in commit.layers_written
    # The mask may use either name of what is stored once.
    train(model, [optim], 1)
    assert store.commit(2, model, optim, mask=["lm_head"]).layers_written == ("transformer.wte",)
    checkpoint = store.checkout()
    assert checkpoint.model["lm_head.weight"].layer == "transformer.wte"
    other = gpt(seed=4, tied=True)
    other_optim = adamw(other)
    checkpoint.restore(other, other_optim)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert same_bits(other.lm_head.weight, model.lm_head.weight)
    untied = gpt(seed=4)
    checkpoint.restore(untied)
    assert same_bits(untied.lm_head.weight, model.lm_head.weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_compiled_and_plain_models_have_the_same_layers(store: ts.Store) -> None:
    model = gpt()
    store.commit(1, model)
    assert store.commit(2, cast("nn.Module", torch.compile(model))).layers_written == ()
    other = gpt(seed=8)
    store.checkout().restore(cast("nn.Module", torch.compile(other)))
    assert_same(snapshot(other), snapshot(model))


def test_strict_restore_lists_every_difference_and_changes_nothing(store: ts.Store) -> None:
    store.commit(1, {"same": torch.ones(2), "gone": torch.ones(1), "wide": torch.ones(3), "kind": torch.ones(2)})
    target = {
        "same": torch.zeros(2),
        "new": torch.zeros(1),
        "wide": torch.zeros(4),
        "kind": torch.zeros(2, dtype=torch.bfloat16),
    }
    with pytest.raises(RestoreMismatchError) as caught:
        store.checkout().restore(target)
    message = str(caught.value)
    for part in (
        "missing: new",
        "unexpected: gone",
        "shape: wide is [4]",
        "[3] in the composite",
        "dtype: kind is bfloat16",
    ):
        assert part in message
    assert all(not tensor.any() for tensor in target.values())
    del target["wide"]
    store.checkout().restore(target, strict=False)
    assert target["same"].tolist() == [1, 1]
    assert target["kind"].tolist() == [1, 1]
    assert target["new"].tolist() == [0]


def test_restore_needs_the_same_parameter_groups(store: ts.Store) -> None:
    model = gpt()
    optim = adamw(model)
    train(model, [optim], 1)
    store.commit(1, model, optim)
    groups: list[dict[str, Any]] = [
        {"params": [model.lm_head.weight]},
        {"params": list(model.transformer.parameters())},
    ]
    split = torch.optim.AdamW(groups)
    with pytest.raises(RestoreMismatchError, match="2 parameter groups, 1 in the composite"):
        store.checkout().restore(model, split)
    short = torch.optim.AdamW([param for name, param in model.named_parameters() if name != "lm_head.weight"])
    with pytest.raises(RestoreMismatchError, match=r"group 0 lacks lm_head\.weight"):
        store.checkout().restore(model, short)
    with pytest.raises(RestoreMismatchError, match="2 passed, 1 in the composite"):
        store.checkout().restore(model, [optim, optim])


def test_weights_only_commits_have_no_optimizer_state(store: ts.Store) -> None:
    model = gpt()
    store.commit(1, model)
    with pytest.raises(RestoreMismatchError, match="no optimizer state"):
        store.checkout().restore(model, adamw(model))


def test_buffers_and_extra_state_of_modules(store: ts.Store) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.calls = 0

        def get_extra_state(self) -> Any:
            return {"calls": self.calls, "history": torch.arange(self.calls)}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]
            self.history = state["history"]

    model = Counting()
    model.calls = 4
    model.norm(torch.randn(8, 3))
    store.commit(1, model)
    other = Counting()
    store.checkout().restore(other)
    assert other.calls == 4
    assert other.history.tolist() == [0, 1, 2, 3]
    assert same_bits(other.norm.running_mean, model.norm.running_mean)  # type: ignore[arg-type]
    assert same_bits(other.norm.num_batches_tracked, model.norm.num_batches_tracked)  # type: ignore[arg-type]
    fresh = Counting()
    fresh.load_state_dict(store.checkout().model_state_dict())
    assert fresh.calls == 4


def test_state_dicts_load_into_torch(store: ts.Store) -> None:
    model = gpt()
    optim = adamw(model)
    train(model, [optim], 2)
    store.commit(2, model, optim)
    other = gpt(seed=6)
    other_optim = adamw(other)
    checkpoint = store.checkout()
    other.load_state_dict(checkpoint.model_state_dict())
    state_dict = checkpoint.optim_state_dict()
    assert isinstance(state_dict, dict)
    other_optim.load_state_dict(state_dict)
    assert_same_optim(optim_snapshot(other_optim), optim_snapshot(optim))
    # … and such a state dict is itself something to commit and to restore into.
    again = store.commit(3, dict(checkpoint.model_state_dict()), state_dict)
    assert again.step == 3
    empty: dict[str, Any] = {"state": {}, "param_groups": []}
    store.checkout().restore(other, empty)
    assert same_bits(empty["state"]["lm_head.weight"]["exp_avg"], optim.state[model.lm_head.weight]["exp_avg"])


def test_nudged_layers_only(store: ts.Store) -> None:
    model = gpt()
    store.commit(1, model)
    nudge(model, lambda name: ".h.1." in name)
    assert store.commit(2, model).layers_written == ("transformer.h.1",)
