"""Light versions come back the same each time, within the error that they record, whatever is trained and how."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import nn

import tailorstore as ts
from tailorstore.domain.errors import CorruptDocumentError
from tailorstore.storage.layers import load_document
from tests.engine.test_optimizers import CASES, step
from tests.kit.light import assert_as_recorded, read, slots_in, stored_light
from tests.kit.models import adamw, assert_same, bits, gpt, nudge, optim_snapshot, same_bits, snapshot, train

LIGHT = {"*": "light"}
SMALL = ts.LightSettings(weight_bits=4, slot_bits=4, block=128, exact_below=64)
"""So that the tensors of small models are coded."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def open_small(root: Path, **settings: Any) -> ts.Store:
    return ts.open_store(root, **{"chunk_bytes": 1024, "light": SMALL, **settings})


@pytest.fixture
def store(root: Path) -> Iterator[ts.Store]:
    with open_small(root) as opened:
        yield opened


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drifted(tensor: torch.Tensor, seed: int = 1, by: float = 0.01) -> torch.Tensor:
    return (tensor + by * noise(*tensor.shape, seed=seed)).to(tensor.dtype)


def codings(store: ts.Store, ref: str | int = "latest") -> dict[str, str]:
    """Return array path → coding of all tensors of light versions."""
    with store.checkout(ref) as checkpoint:
        documents = checkpoint.documents().values()
    return {path: tensor.coding for one in documents if one.light for path, tensor in one.light.tensors.items()}


def fidelity(store: ts.Store, ref: str | int = "latest") -> dict[str, str]:
    with store.checkout(ref) as checkpoint:
        return {layer: found for layer, found in checkpoint.fidelity.items() if layer != "@extra"}


def documents(store: ts.Store) -> Any:
    with store.checkout() as checkpoint:
        return checkpoint.documents()


# --- Optimizers


@pytest.mark.parametrize("name", CASES)
def test_any_optimizer_comes_back_within_the_recorded_error(tmp_path: Path, root: Path, name: str) -> None:
    model = gpt()
    optimizers = CASES[name](model)
    given: Any = optimizers if len(optimizers) > 1 else optimizers[0]
    step(model, optimizers, 2, seed=1)
    with open_small(root) as store:
        store.commit(2, model, given)
        for number in (3, 4):
            step(model, optimizers, 1, seed=number)
            store.commit(number, model, given, mask=LIGHT)
        # L-BFGS keeps a history that grows, with its first parameter.
        grows = {"transformer.wte"} if name == "lbfgs" else set()
        assert {layer for layer, found in fidelity(store).items() if found != "light"} == grows
        live_slots: dict[str, Any] = {}
        names = {id(param): name for name, param in model.named_parameters()}
        for optimizer in optimizers:
            for param, held in optimizer.state.items():
                live_slots |= {f"{slot} of {names[id(param)]}": value for slot, value in held.items()}
        live = snapshot(model) | {name: value for name, value in live_slots.items() if isinstance(value, torch.Tensor)}
        weights, slots = read(store)
        chosen = assert_as_recorded(store, live, weights | slots)
        coded = {chosen[name] for name, param in model.named_parameters() if param.numel() >= 64 and name in chosen}
        assert coded <= {"difference", "exact"}
        assert "difference" in chosen.values()
        other = gpt(seed=5)
        again = CASES[name](other)
        step(other, again, 1, seed=9)
        store.checkout().restore(other, again)
        assert_same(snapshot(other), weights)
        for mine, theirs in zip(again, optimizers, strict=True):
            kept = optim_snapshot(theirs)
            found = optim_snapshot(mine)
            assert found.keys() == kept.keys()
            for slot, value in kept.items():
                if not isinstance(value, torch.Tensor | list) or (isinstance(value, torch.Tensor) and value.dim() == 0):
                    assert str(found[slot]) == str(value), slot
        loss = step(other, again, 3, seed=6)
        assert loss == pytest.approx(step(model, optimizers, 3, seed=6), rel=0.05)
        assert math.isfinite(loss)
        exported = tmp_path / "out.pt"
        with store.checkout() as checkpoint:
            checkpoint.export(exported, "torch")
            loaded = torch.load(exported, weights_only=True)
            assert_same(loaded["model"], weights)
            assert_same(slots_in(loaded["optim"]), slots)
        assert store.verify().ok


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [16, 128, 4096])
def test_any_bits_and_blocks(root: Path, bits: int, block: int) -> None:
    settings = ts.LightSettings(
        weight_bits=bits, slot_bits=bits, block=block, exact_below=64, max_weight_error=10, max_slot_error=10
    )
    model = gpt()
    optimizer = adamw(model)
    train(model, [optimizer], 3)
    with open_small(root, light=settings) as store:
        store.commit(1, model, optimizer)
        train(model, [optimizer], 2)
        store.commit(2, model, optimizer, mask=LIGHT)
        live = snapshot(model) | {
            f"{slot} of {name}": value
            for name, param in model.named_parameters()
            for slot, value in optimizer.state[param].items()
        }
        weights, slots = read(store)
        chosen = assert_as_recorded(store, live, weights | slots)
        light = {name: coding for name, coding in chosen.items() if live[name].numel() >= 64}
        assert {coding for name, coding in light.items() if name in weights} == {"difference"}
        assert {coding for name, coding in light.items() if "exp_avg_sq" in name} <= {"ratio", "log"}
        assert {coding for name, coding in light.items() if "exp_avg of" in name} <= {"difference", "value"}
        table = documents(store)["transformer.h.0"].light
        assert table.block == block
        assert {tensor.bits for tensor in table.tensors.values() if tensor.coding != "exact"} == {bits}


def test_bits_by_slot(root: Path) -> None:
    settings = ts.LightSettings(weight_bits=8, slot_bits={"exp_avg": 2, "*": 3}, exact_below=64)
    model = gpt(layers=1)
    optimizer = adamw(model)
    train(model, [optimizer], 3)
    with open_small(root, light=settings) as store:
        store.commit(1, model, optimizer)
        train(model, [optimizer], 1)
        store.commit(2, model, optimizer, mask=LIGHT)
        tensors = documents(store)["lm_head"].light.tensors
    assert [tensors[path].bits for path in sorted(tensors)] == [2, 3, 8]


# --- 16-bit weights and their masters


def mixed(dtype: torch.dtype, *, master: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights of 16 bits, and optimizer state with the float32 that they are the rounding of."""
    full = {"a.w": noise(40, 50), "b.w": noise(33, 31, seed=2)}
    slots = {
        name: {
            "exp_avg": 0.01 * noise(*value.shape, seed=3),
            "exp_avg_sq": noise(*value.shape, seed=4).square(),
            "step": torch.tensor(7.0),
            **({"master": value} if master else {}),
        }
        for name, value in full.items()
    }
    return {name: value.to(dtype) for name, value in full.items()}, slots


def trained(weights: dict[str, Any], slots: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return them after an update."""
    moved = {
        name: {slot: drifted(value) if slot != "exp_avg_sq" and value.dim() else value for slot, value in held.items()}
        for name, held in slots.items()
    }
    return {
        name: moved[name]["master"].to(value.dtype) if "master" in moved[name] else drifted(value, by=0.05)
        for name, value in weights.items()
    }, moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_rounded_masters_are_derived(store: ts.Store, root: Path, dtype: torch.dtype) -> None:
    weights, slots = mixed(dtype)
    store.commit(1, weights, slots)
    weights, slots = trained(weights, slots)
    store.commit(2, weights, slots, mask=LIGHT)
    assert {name: codings(store)[name] for name in weights} == {"a.w": "rounded", "b.w": "rounded"}
    model, found = read(store)
    for name, weight in model.items():
        assert same_bits(weight, found[f"master of {name}"].to(dtype))
        assert float((found[f"master of {name}"] - slots[name]["master"]).norm()) > 0
    live = weights | {f"{slot} of {name}": value for name, held in slots.items() for slot, value in held.items()}
    assert_as_recorded(store, live, model | found)
    assert same_bits(
        torch.from_numpy(stored_light(store, root, "a").tensor("a.w").view("int16")).view(dtype), model["a.w"]
    )
    # Without the optimizer, and with just one of two.
    target = {name: torch.zeros_like(value) for name, value in weights.items()}
    store.checkout().restore(target)
    assert_same(target, model)
    part = {"a.w": torch.zeros_like(weights["a.w"])}
    store.checkout().restore(part, strict=False)
    assert same_bits(part["a.w"], model["a.w"])
    wide = {"a.w": torch.zeros(40, 50), "b.w": torch.zeros(33, 31, dtype=torch.float64)}
    store.checkout().restore(wide, strict=False)
    for name, value in wide.items():
        assert same_bits(value, model[name].to(value.dtype))


def test_a_weight_that_differs_from_its_master_in_one_element_is_stored(store: ts.Store) -> None:
    weights, slots = mixed(torch.bfloat16)
    store.commit(1, weights, slots)
    weights, slots = trained(weights, slots)
    raw = weights["b.w"].view(torch.int16)
    raw[5, 7] ^= 1
    store.commit(2, weights, slots, mask=LIGHT)
    assert codings(store)["a.w"] == "rounded"
    assert codings(store)["b.w"] in ("difference", "exact")
    live = weights | {f"{slot} of {name}": value for name, held in slots.items() for slot, value in held.items()}
    model, found = read(store)
    assert_as_recorded(store, live, model | found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_and_slots_of_other_dtypes_without_masters(store: ts.Store, root: Path, dtype: torch.dtype) -> None:
    weights = {"a.w": noise(40, 50, dtype=dtype), "b.w": noise(33, 31, seed=2, dtype=dtype)}
    slots = {
        name: {
            "exp_avg": noise(*value.shape, seed=5, dtype=dtype),
            "exp_avg_sq": noise(*value.shape, seed=6).square().to(dtype),
        }
        for name, value in weights.items()
    }
    store.commit(1, weights, slots)
    weights = {name: drifted(value, by=0.05) for name, value in weights.items()}
    slots = {
        name: {"exp_avg": drifted(held["exp_avg"]), "exp_avg_sq": (held["exp_avg_sq"] * 1.1).to(dtype)}
        for name, held in slots.items()
    }
    store.commit(2, weights, slots, mask=LIGHT)
    model, found = read(store)
    live = weights | {f"{slot} of {name}": value for name, held in slots.items() for slot, value in held.items()}
    chosen = assert_as_recorded(store, live, model | found)
    assert set(chosen.values()) <= {"difference", "value", "ratio", "log"}


# --- What is not finite


BAD = {
    "nan": lambda: torch.tensor([0x7FC01234, -0x3FEDCC], dtype=torch.int32).view(torch.float32),
    "inf": lambda: torch.tensor([math.inf, -math.inf]),
    "huge": lambda: torch.tensor([3e38, -3e38]),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("when", ["now", "in the base", "before"])
def test_what_is_not_finite_is_stored_to_the_bit(store: ts.Store, bad: str, where: str, when: str) -> None:
    weight, slots = noise(40, 50), {"exp_avg": noise(40, 50, seed=2), "exp_avg_sq": noise(40, 50, seed=3).square()}

    def spoilt() -> tuple[dict[str, Any], dict[str, Any]]:
        changed = {"weight": weight.clone(), **{slot: value.clone() for slot, value in slots.items()}}
        changed[where][3, 4:6] = BAD[bad]().abs() if where == "exp_avg_sq" and bad != "nan" else BAD[bad]()
        changed[where][5, 5] = -0.0
        return {"a.w": changed.pop("weight")}, {"a.w": changed}

    def good(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"a.w": drifted(weight, seed)}, {"a.w": {name: value * 1.05 for name, value in slots.items()}}

    commits = {
        "now": [good(1), spoilt()],
        "in the base": [spoilt(), good(2)],
        "before": [good(1), spoilt(), good(2)],
    }[when]
    for number, (model, optim) in enumerate(commits):
        store.commit(number, model, optim, mask=LIGHT)
    model, optim = commits[-1]
    weights, found = read(store)
    live = model | {f"{slot} of a.w": value for slot, value in optim["a.w"].items()}
    chosen = assert_as_recorded(store, live, weights | found)
    name = "a.w" if where == "weight" else f"{where} of a.w"
    if when == "now" and not (bad == "huge" and where == "exp_avg_sq"):
        assert same_bits((weights | found)[name], live[name])
        assert chosen[name] == "exact"
        assert store._catalog.measures("main")[-1][1]["a"].finite == (bad == "huge")
    if when == "before":
        assert chosen[name] != "exact"
        assert store._catalog.measures("main")[-1][1]["a"].finite


# --- Bounds


def test_bounds_of_zero_keep_every_bit(root: Path) -> None:
    settings = ts.LightSettings(exact_below=64, max_weight_error=0, max_slot_error=0)
    model = gpt()
    optimizer = adamw(model)
    train(model, [optimizer], 2)
    with torch.no_grad():
        model.transformer.wte.weight[0] = -0.0
    with open_small(root, light=settings) as store:
        store.commit(1, model, optimizer)
        with torch.no_grad():
            model.transformer.wte.weight[0] = 0.0
            model.transformer.wte.weight[1] *= -0.0
        store.commit(2, model, optimizer, mask=LIGHT)
        assert_same(read(store)[0], snapshot(model))
        train(model, [optimizer], 2)
        store.commit(3, model, optimizer, mask=LIGHT)
        assert set(codings(store).values()) == {"exact"}
        weights, slots = read(store)
        assert_same(weights, snapshot(model))
        names = {id(param): name for name, param in model.named_parameters()}
        for param, held in optimizer.state.items():
            for slot, value in held.items():
                assert same_bits(slots[f"{slot} of {names[id(param)]}"], value)
        assert {document.error for document in documents(store).values()} == {None, 0.0}


def test_a_tensor_beyond_its_bound_is_stored_exactly_and_others_are_not(root: Path) -> None:
    settings = ts.LightSettings(
        exact_below=64, weight_bits=4, slot_bits=4, max_weight_error=0.001, max_slot_error=0.001
    )
    weights = {"a.near": noise(64, 64), "a.far": noise(64, 64, seed=2)}
    slots = {"a.near": {"near": noise(64, 64, seed=3), "far": noise(64, 64, seed=4)}}
    with open_small(root, light=settings) as store:
        store.commit(1, weights, slots)
        weights = {"a.near": drifted(weights["a.near"]), "a.far": noise(64, 64, seed=5)}
        slots = {"a.near": {"near": drifted(slots["a.near"]["near"]), "far": noise(64, 64, seed=6)}}
        store.commit(2, weights, slots, mask=LIGHT)
        chosen = codings(store)
        assert chosen == {
            "a.near": "difference",
            "a.far": "exact",
            "@optim/near/a.near": "difference",
            "@optim/far/a.near": "exact",
        }
        model, found = read(store)
        assert_as_recorded(store, weights | {f"{k} of a.near": v for k, v in slots["a.near"].items()}, model | found)


def test_a_tensor_beyond_its_bound_is_first_coded_in_more_bits(root: Path) -> None:
    settings = ts.LightSettings(exact_below=64, weight_bits=2, slot_bits=2, max_weight_error=0.1, max_slot_error=0.1)
    weights, slots = {"a.w": noise(64, 64)}, {"a.w": {"x": noise(64, 64, seed=3)}}
    with open_small(root, light=settings) as store:
        store.commit(1, weights, slots)
        for step in (2, 3):
            weights = {"a.w": drifted(weights["a.w"])}
            slots = {"a.w": {"x": noise(64, 64, seed=3 + step)}}
            store.commit(step, weights, slots, mask=LIGHT)
            table = documents(store)["a"].light
            assert table is not None
            bits = {path: tensor.bits for path, tensor in table.tensors.items()}
            # Two bits do for a small change, and err by half where the value itself is coded.
            assert bits["a.w"] == 2
            assert bits["@optim/x/a.w"] == 5
            assert table.tensors["@optim/x/a.w"].error <= 0.1
            model, found = read(store)
            assert_as_recorded(store, weights | {"x of a.w": slots["a.w"]["x"]}, model | found)


def test_an_error_beyond_the_bound_makes_the_layer_due_in_full(root: Path) -> None:
    settings = ts.LightSettings(exact_below=64, due_error=0.01)
    weights = {"a.w": noise(64, 64), "b.w": noise(64, 64, seed=9)}
    with open_small(root, light=settings) as store:
        store.commit(1, weights)
        weights = {"a.w": drifted(weights["a.w"], by=0.5), "b.w": drifted(weights["b.w"])}
        store.commit(2, weights, mask=LIGHT)
        assert fidelity(store) == {"a": "light", "b": "light"}
        errors = {name: documents(store)[name].error for name in "ab"}
        assert errors["a"] > 0.01 > errors["b"] > 0
        weights = {name: drifted(value, seed=4) for name, value in weights.items()}
        store.commit(3, weights, mask=LIGHT)
        assert fidelity(store) == {"a": "full", "b": "light"}
        assert same_bits(read(store)[0]["a.w"], weights["a.w"])
        weights = {name: drifted(value, seed=5) for name, value in weights.items()}
        store.commit(4, weights, mask=LIGHT)
        assert fidelity(store) == {"a": "light", "b": "light"}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("bound", ["max_base_commits", "max_base_steps"])
def test_a_base_that_is_too_old_makes_the_layer_due_in_full(root: Path, bound: str, *, restart: bool) -> None:
    settings = ts.LightSettings(**{"exact_below": 64, bound: 3 if bound == "max_base_commits" else 30})
    weights = {"a.w": noise(64, 64)}
    seen = []
    store = open_small(root, light=settings)
    for number in range(1, 10):
        weights = {name: drifted(value, seed=number) for name, value in weights.items()}
        if restart:
            store.close()
            store = open_small(root, light=settings)
        store.commit(10 * number, weights, mask=LIGHT)
        seen.append(fidelity(store)["a"])
    store.close()
    assert seen == ["full", "light", "light", "light", "full", "light", "light", "light", "full"]


def test_what_was_never_stored_in_full_is(root: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    with open_small(root) as store:
        store.commit(1, model, mask=LIGHT)
        assert set(fidelity(store).values()) == {"full"}
        nudge(model)
        store.commit(2, model, mask=LIGHT)
        assert set(fidelity(store).values()) == {"light"}
        # An optimizer that begins later brings new slots.
        train(model, [optimizer], 1)
        store.commit(3, model, optimizer, mask=LIGHT)
        assert set(fidelity(store).values()) == {"full"}
        train(model, [optimizer], 1)
        store.commit(4, model, optimizer, mask=LIGHT)
        assert set(fidelity(store).values()) == {"light"}
        # One that ends takes slots along, and may come back.
        store.commit(5, model, mask=LIGHT)
        assert slots_in(store.checkout().optim_state_dict()) == {}
        store.commit(6, model, optimizer, mask=LIGHT)
        assert set(fidelity(store).values()) == {"full"}
        lion = Lion(model.parameters(), lr=1e-3)
        train(model, [lion], 1)
        store.commit(7, model, lion, mask=LIGHT)
        read(store)
        assert store.verify().ok


# --- What does not change


def test_frozen_layers_cost_nothing(root: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    train(model, [optimizer], 2)
    with open_small(root) as store:
        store.commit(1, model, optimizer)
        again = store.commit(2, model, optimizer, mask=LIGHT)
        assert again.layers_written == ()
        assert set(fidelity(store).values()) == {"full"}
        train(model, [optimizer], 1)
        changed = store.commit(3, model, optimizer, mask=LIGHT)
        assert set(changed.layers_written) == set(fidelity(store))
        before = read(store)
        for number in (4, 5, 6):
            again = store.commit(number, model, optimizer, mask=LIGHT)
            assert again.layers_written == ()
            assert store.checkout().sources == dict.fromkeys(fidelity(store), 3) | {"@extra": number}
        after = read(store)
        assert_same(after[0], before[0])
        assert_same(after[1], before[1])
        nudge(model, lambda name: name.startswith("lm_head"))
        assert store.commit(7, model, optimizer, mask=LIGHT).layers_written == ("lm_head",)
    with open_small(root) as store:
        assert store.commit(8, model, optimizer, mask=LIGHT).layers_written == ()
        # In full it is other bytes, once.
        assert set(store.commit(9, model, optimizer).layers_written) == set(fidelity(store))
        assert store.commit(10, model, optimizer).layers_written == ()
        assert store.commit(11, model, optimizer, mask=LIGHT).layers_written == ()
        assert set(fidelity(store).values()) == {"full"}
        assert_same(read(store)[0], snapshot(model))


# --- Tensors of any kind


def test_tied_weights_restored_into_an_untied_model_fill_both(store: ts.Store) -> None:
    model = gpt(tied=True)
    optimizer = adamw(model)
    train(model, [optimizer], 1)
    store.commit(1, model, optimizer)
    train(model, [optimizer], 1)
    store.commit(2, model, optimizer, mask=LIGHT)
    weights, _ = read(store)
    assert same_bits(weights["lm_head.weight"], weights["transformer.wte.weight"])
    untied = gpt(seed=4)
    store.checkout().restore(untied)
    assert_same(snapshot(untied), weights)
    again = gpt(seed=4, tied=True)
    store.checkout().restore(again, adamw(again))
    assert_same(snapshot(again), weights)


def test_rounded_weights_restored_twice_fill_both(store: ts.Store) -> None:
    weight, master = noise(40, 50, dtype=torch.bfloat16), noise(40, 50)
    store.commit(1, {"a.w": weight, "b.w": weight}, {"a.w": {"master": master}})
    master = drifted(master)
    weight = master.bfloat16()
    store.commit(2, {"a.w": weight, "b.w": weight}, {"a.w": {"master": master}}, mask=LIGHT)
    assert codings(store)["a.w"] == "rounded"
    weights, _ = read(store)
    target = {"a.w": torch.zeros_like(weight), "b.w": torch.zeros_like(weight)}
    store.checkout().restore(target)
    assert_same(target, weights)


def test_strides_do_not_matter(store: ts.Store) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plain = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3))

    def advance() -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(3))).square().sum().backward()
        optimizer.step()

    advance()
    store.commit(1, model, optimizer)
    advance()
    assert not model[0].weight.is_contiguous()
    store.commit(2, model, optimizer, mask=LIGHT)
    weights, slots = read(store)
    names = {id(param): name for name, param in model.named_parameters()}
    live = snapshot(model) | {
        f"{slot} of {names[id(param)]}": value
        for param, held in optimizer.state.items()
        for slot, value in held.items()
    }
    assert_as_recorded(store, live, weights | slots)
    # Another layout of memory, the same bytes.
    with torch.no_grad():
        for target in (model, plain):
            store.checkout().restore(target)
            assert_same(snapshot(target), weights)
    state = {"t.w": noise(50, 40).t(), "t.v": noise(100, 60)[::2, ::3], "t.e": noise(1, 80).expand(30, 80)}
    moved = {name: value * 1.01 for name, value in state.items()}
    for number, kept in enumerate([state, moved], start=10):
        with ts.open_store(store.url, branch="strides", chunk_bytes=1024, light=SMALL) as other:
            other.commit(number, kept, mask=LIGHT)
    with ts.open_store(store.url, branch="packed", chunk_bytes=1024, light=SMALL) as other:
        for number, kept in enumerate([state, moved], start=10):
            other.commit(number, {name: value.contiguous() for name, value in kept.items()}, mask=LIGHT)
        assert_same(read(other)[0], read(other, "strides")[0])
        one, two = (
            other._catalog.composite(other.checkout(ref).commit.id).versions["t"] for ref in ("packed", "strides")
        )
        assert one.fidelity == two.fidelity == "light"
    target = {name: torch.empty(value.shape[::-1]).t() for name, value in moved.items()}
    with ts.open_store(store.url, branch="packed") as other:
        other.checkout().restore(target)
        assert_same(target, read(other)[0])


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors_that_are_no_floats_stay_exact(store: ts.Store) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        raw = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        kinds = [torch.int8, torch.int32, torch.int64, torch.uint16, torch.complex64, torch.complex128, torch.complex32]
        kinds += [torch.float8_e4m3fn, torch.float8_e5m2]
        found = {f"a.{str(kind).removeprefix('torch.')}": raw.view(kind).reshape(-1, 16) for kind in kinds}
        return found | {
            "a.bool": (raw % 2).bool(),
            "a.none": torch.empty(0, 5),
            "a.flat": torch.empty(0),
            "a.scalar": torch.tensor(1.25 * seed),
            "a.small": noise(7, 9, seed=seed),
            "a.conj": torch.view_as_complex(noise(40, 50, 2, seed=seed)).conj(),
            "a.big": noise(50, 50, seed=3) * (1 + 0.01 * seed),
        }

    store.commit(1, state(1))
    store.commit(2, state(2), mask=LIGHT)
    chosen = codings(store)
    assert {name for name, coding in chosen.items() if coding != "exact"} == {"a.big"}
    with store.checkout() as checkpoint:
        found = checkpoint.model_state_dict()
        target = {name: torch.zeros_like(value) for name, value in state(1).items()}
        checkpoint.restore(target)
    for name, value in state(2).items():
        if name != "a.big":
            assert same_bits(found[name], value), name
            assert bits(target[name]) == bits(value), name


@pytest.mark.parametrize("kind", [torch.int32, torch.float32])
def test_layers_without_anything_to_code(store: ts.Store, kind: torch.dtype) -> None:
    for number in (1, 2):
        store.commit(number, {"a.w": torch.full((5,), number, dtype=kind), "b.w": torch.empty(0, 3)}, mask=LIGHT)
    assert fidelity(store) == {"a": "light", "b": "full"}
    weights, _ = read(store)
    assert weights["a.w"].tolist() == [2] * 5
    assert documents(store)["a"].error == 0


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_a_base_may_be_stored_in_any_codec_and_chunks(root: Path, codec: Any) -> None:
    model = gpt(layers=1, width=48)
    optimizer = adamw(model)
    train(model, [optimizer], 2)
    with ts.open_store(root, chunk_bytes=1024, codec=codec, light=SMALL) as store:
        store.commit(1, model, optimizer)
    train(model, [optimizer], 1)
    # Codes span chunks, and other ones than elements of the base do.
    with ts.open_store(root, chunk_bytes=1500, light=SMALL) as store:
        store.commit(2, model, optimizer, mask=LIGHT)
        document = documents(store)["transformer.h.0"]
        assert len(document.arrays["@light/codes"].digests) > 5
        names = {id(param): name for name, param in model.named_parameters()}
        live = snapshot(model) | {
            f"{slot} of {names[id(param)]}": value
            for param, held in optimizer.state.items()
            for slot, value in held.items()
        }
        weights, slots = read(store)
        assert_as_recorded(store, live, weights | slots)
        assert store.verify().ok


def test_large_tensors_are_coded_in_pieces(root: Path) -> None:
    """More elements than one job codes, and than one slice has."""
    weights = {"a.w": noise(1100, 1003)}
    seen = set()
    with ts.open_store(root) as store:
        store.commit(1, weights)
        moved = {"a.w": drifted(weights["a.w"])}
        store.commit(2, moved, mask=LIGHT)
        model, _ = read(store)
        assert_as_recorded(store, moved, model)
        seen.add(documents(store)["a"].error)
        assert stored_light(store, root, "a").tensor("a.w").tobytes() == bits(model["a.w"])
        # Whichever thread ends first.
        for number in range(3, 7):
            assert store.commit(number, moved, mask=LIGHT).layers_written == ()


def test_a_variance_is_never_restored_as_less_than_zero(store: ts.Store) -> None:
    norm = torch.nn.BatchNorm1d(2048)
    store.commit(0, nn.Sequential(norm))
    generator = torch.Generator().manual_seed(0)
    variance = torch.exp(0.4 * torch.randn(2048, generator=generator))
    variance[::64] = 0.01  # channels that are nearly dead
    norm.load_state_dict({"running_var": variance, "running_mean": variance - 1}, strict=False)
    store.commit(1, nn.Sequential(norm), mask={"*": "light"})
    with store.checkout() as checkpoint:
        restored = torch.nn.BatchNorm1d(2048)
        checkpoint.restore(nn.Sequential(restored))
        assert checkpoint.fidelity["0"] == "light"
    assert torch.equal(restored.state_dict()["running_var"], variance)
    assert restored.eval()(torch.ones(2, 2048)).isfinite().all()


def test_without_bounds_what_is_not_finite_is_still_stored_to_the_bit(tmp_path: Path) -> None:
    settings = ts.LightSettings(max_weight_error=math.inf, max_slot_error=math.inf)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with ts.open_store(tmp_path / "root", light=settings) as store:
        store.commit(0, {"a.w": weight})
        weight += 0.01
        weight[3, 4], weight[5, 6] = math.nan, math.inf
        store.commit(1, {"a.w": weight}, mask={"*": "light"})
        found = store.checkout().model_state_dict()["a.w"]
    assert torch.equal(found.view(torch.int32), weight.view(torch.int32))


def test_a_slot_that_was_negative_somewhere_in_its_base_is_restored_within_its_error(store: ts.Store) -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.rand(1 << 18, generator=generator) * 1e-4 + 1e-4
    now = 1.01 * before
    # In blocks that no sample looks at, the zero in another half of what is coded at once.
    before[5 * 128 + 3], before[40_000] = -1e-4, 0
    weight = torch.zeros(1 << 18)
    store.commit(0, {"a.w": weight}, {"a.w": {"slot": before}})
    store.commit(1, {"a.w": weight}, {"a.w": {"slot": now}}, mask={"*": "light"})
    checkpoint = store.checkout()
    table = checkpoint.documents()["a"].light
    assert table is not None
    state = checkpoint.optim_state_dict()
    assert isinstance(state, dict)
    errors = (state["state"]["a.w"]["slot"].double() / now.double()).log()
    assert errors.square().mean().sqrt().item() <= table.tensors["@optim/slot/a.w"].error


def test_a_light_version_is_not_read_on_another_base_than_it_was_coded_on(store: ts.Store) -> None:
    weight = torch.randn(64, 64)
    bases = []
    for number, how in enumerate(("full", "full", "light")):
        weight += 0.01 * torch.randn(64, 64)
        bases.append(store.commit(number, {"a.w": weight}, mask={"*": how}).id)
    version = store.checkout()._composite.versions["a"]
    assert version.base_id == bases[1]
    load_document(store._objects, version)
    with pytest.raises(CorruptDocumentError, match="not the one that was published"):
        load_document(store._objects, replace(version, base_id=bases[0]))
