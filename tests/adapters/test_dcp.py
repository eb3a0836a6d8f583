"""torch.distributed.checkpoint with a store behind it, in one process."""

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import tailorstore as ts
from tailorstore.adapters.dcp import TailorReader, TailorWriter
from tailorstore.adapters.dcp.names import SMALL_BYTES
from tailorstore.domain.errors import (
    BranchNotFoundError,
    ExtraStateError,
    InvalidInputError,
    MissingObjectError,
    ModelMismatchError,
    StepOrderError,
)
from tailorstore.engine.tensors.memory import DTYPES
from tests.adapters.dcp_training import FLAT, Progress, differences, leaves, only, state_of, take_over, train, training

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ts.Store]:
    with ts.open_store(tmp_path / "run") as opened:
        yield opened


def save(store: ts.Store, step: int, state: dict[str, Any], **options: Any) -> ts.Commit:
    writer = TailorWriter(store, step, **options)
    dcp_save(state, storage_writer=writer)
    assert writer.commit is not None
    return writer.commit


def failure(call: Callable[[], object]) -> BaseException:
    """Return what went wrong on rank 0, which DCP wraps."""
    with pytest.raises(CheckpointException) as caught:
        call()
    return caught.value.failures[0][0]


def trained(steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    net, optim = training()
    train(net, optim, steps)
    return net, optim


def test_what_was_saved_is_loaded_and_training_goes_on_the_same(store: ts.Store) -> None:
    net, optim = training()
    schedule = torch.optim.lr_scheduler.StepLR(optim, 1, gamma=0.5)
    train(net, optim, 2)
    schedule.step()
    commit = save(
        store, 7, {**state_of(net, optim, Progress(7)), "schedule": schedule}, metrics={"loss": 2.0}, message="m"
    )
    assert (commit.step, commit.metrics, commit.message) == (7, {"loss": 2.0}, "m")

    other, other_optim = training()
    progress, other_schedule = Progress(), torch.optim.lr_scheduler.StepLR(other_optim, 1, gamma=0.5)
    state = {**state_of(other, other_optim, progress), "schedule": other_schedule}
    dcp_load(state, storage_reader=TailorReader(store))
    take_over(other, other_optim, state)
    assert (progress.step, other_schedule.last_epoch) == (7, 1)
    assert torch.equal(progress.noise.get_state(), Progress(7).noise.get_state())
    assert differences(state_of(other, other_optim), whole(net, optim)) == []

    for one, one_optim in ((net, optim), (other, other_optim)):
        train(one, one_optim, 2)
    assert differences(state_of(other, other_optim), whole(net, optim)) == []


def whole(net: torch.nn.Module, optim: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(dict(leaves(state_of(net, optim))))


def test_a_save_is_the_commit_that_the_store_makes_of_the_same_state(store: ts.Store) -> None:
    net, optim = trained()
    saved = save(store, 1, state_of(net, optim))
    committed = store.commit(2, net, optim)
    assert set(saved.layers_written) == {"embed", "gate", "blocks.0", "blocks.1"}
    assert committed.layers_written == ()
    assert save(store, 3, state_of(net, optim)).layers_written == ()

    other, other_optim = training()
    with store.checkout(3) as checkpoint:
        checkpoint.restore(other, other_optim)
    assert differences(state_of(other, other_optim), whole(net, optim)) == []
    assert store.verify().ok


@pytest.mark.parametrize("flat", [False, True])
def test_what_the_store_committed_is_loaded_by_rule(store: ts.Store, flat: bool) -> None:
    net, optim = trained()
    store.commit(1, net, optim)
    other, other_optim = training()
    options = FLAT if flat else None
    state = {"net": other.state_dict(), "adamw": get_optimizer_state_dict(other, other_optim, options=options)}
    dcp_load(state, storage_reader=TailorReader(store, model="net", optim="adamw", flat=flat))
    expected = {"net": net.state_dict(), "adamw": get_optimizer_state_dict(net, optim, options=options)}
    assert differences(state, dict(leaves(expected))) == []


def test_a_part_of_a_state_dict_is_a_mask(store: ts.Store) -> None:
    net, optim = trained()
    save(store, 1, state_of(net, optim, Progress(1)))
    before = whole(net, optim)
    train(net, optim, 1)
    after = whole(net, optim)
    commit = save(store, 2, only("blocks.0", state_of(net, optim)))
    assert commit.layers_written == ("blocks.0",)
    with store.checkout() as checkpoint:
        assert checkpoint.sources == {"@extra": 2, "blocks.0": 2, "blocks.1": 1, "embed": 1, "gate": 1}

    other, other_optim = training()
    progress = Progress()
    state = state_of(other, other_optim, progress)
    dcp_load(state, storage_reader=TailorReader(store))
    assert progress.step == 1
    state.pop("train")
    assert differences(state, {name: (after if ".blocks.0." in name else before)[name] for name in before}) == []
    with store.checkout() as checkpoint:
        checkpoint.restore(other, other_optim)


def test_a_part_may_bring_a_new_layer(store: ts.Store) -> None:
    save(store, 1, {"model": {"a.w": torch.ones(3)}})
    save(store, 2, {"model": {"b.w": torch.ones(4)}})
    state = {"model": {"a.w": torch.zeros(3), "b.w": torch.zeros(4)}}
    dcp_load(state, storage_reader=TailorReader(store))
    assert differences(state, {"model.a.w": torch.ones(3), "model.b.w": torch.ones(4)}) == []


def test_a_part_of_a_layer_is_refused(store: ts.Store) -> None:
    net, optim = trained()
    save(store, 1, state_of(net, optim))
    state = state_of(net, optim)
    weights = {"model": {"gate.weight": state["model"]["gate.weight"]}, "optim": {"state": {}, "param_groups": []}}
    refused = failure(lambda: save(store, 2, {**weights, "optim": only("gate.weight", state)["optim"]}))
    assert isinstance(refused, ModelMismatchError)
    assert "gate.bias" in str(refused)
    bare = failure(lambda: save(store, 2, {"model": state["model"]}))
    assert isinstance(bare, InvalidInputError)
    assert "no optimizer state" in str(bare)
    alone = failure(lambda: save(store, 2, {"optim": state["optim"]}))
    assert isinstance(alone, InvalidInputError)
    assert store.show().step == 1


def test_a_mask_holds_for_the_layers_of_a_state_dict(store: ts.Store) -> None:
    net, optim = trained()
    save(store, 1, state_of(net, optim, Progress(1)))
    train(net, optim, 1)
    commit = save(store, 2, state_of(net, optim, Progress(2)), mask=["blocks.*"])
    assert commit.layers_written == ("blocks.0", "blocks.1")
    progress = Progress()
    dcp_load({"train": progress}, storage_reader=TailorReader(store))
    assert progress.step == 2


def test_light_versions_are_loaded_as_they_are_restored(store: ts.Store) -> None:
    torch.manual_seed(3)
    tensors = {f"{layer}.w": torch.randn(300, 70) for layer in "ab"}
    save(store, 1, {"model": tensors})
    save(
        store,
        2,
        {"model": {name: tensor + 1e-3 * tensor.cos() for name, tensor in tensors.items()}},
        mask={"*": "light"},
    )
    state = {"model": {name: torch.zeros(300, 70, dtype=torch.float64) for name in tensors}}
    dcp_load(state, storage_reader=TailorReader(store))
    with store.checkout() as checkpoint:
        assert set(checkpoint.fidelity.values()) == {"light", "full"}
        for name, tensor in checkpoint.model_state_dict().items():
            assert torch.equal(state["model"][name], tensor.double())
            assert not torch.equal(tensor, tensors[name])


def test_loading_is_strict_unless_it_is_told_otherwise(store: ts.Store) -> None:
    save(store, 1, {"model": {"a.w": torch.ones(3)}, "seen": 5})
    state = {"model": {"a.w": torch.zeros(3), "b.w": torch.zeros(2)}, "seen": 0, "unseen": "as it was"}
    missing = failure(lambda: dcp_load(dict(state), storage_reader=TailorReader(store)))
    assert "Missing key in checkpoint state_dict: model.b.w" in str(missing)
    dcp_load(state, storage_reader=TailorReader(store), planner=DefaultLoadPlanner(allow_partial_load=True))
    expected = {"model.a.w": torch.ones(3), "model.b.w": torch.zeros(2), "seen": 5, "unseen": "as it was"}
    assert differences(state, expected) == []
    wrong = failure(lambda: dcp_load({"model": {"a.w": torch.zeros(4)}}, storage_reader=TailorReader(store)))
    assert "Size mismatch" in str(wrong)


def test_a_state_dict_is_rebuilt_from_nothing(store: ts.Store) -> None:
    net, optim = trained()
    save(store, 1, state_of(net, optim, Progress(1)))
    state: dict[str, Any] = {}
    # What torch's own tools do that turn a checkpoint into a file for torch.load.
    _load_state_dict(state, TailorReader(store), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    expected = whole(net, optim) | {f"train.{name}": value for name, value in Progress(1).state_dict().items()}
    assert differences(state, expected) == []
    assert isinstance(state["optim"]["param_groups"], list)
    part: dict[str, Any] = {}
    _load_state_dict(part, TailorReader(store), planner=_EmptyStateDictLoadPlanner(keys={"train"}), no_dist=True)
    assert part.keys() == {"train"}


def test_only_what_is_asked_for_is_read(store: ts.Store, tmp_path: Path) -> None:
    save(store, 1, {"model": {"a.w": torch.arange(6.0), "b.w": torch.arange(4.0)}})
    for chunk in (tmp_path / "run" / "layers" / "b").glob("*/b.w/c*"):
        chunk.unlink()
    state = {"model": {"a.w": torch.zeros(6)}}
    dcp_load(state, storage_reader=TailorReader(store))
    assert torch.equal(state["model"]["a.w"], torch.arange(6.0))
    gone = failure(lambda: dcp_load({"model": {"b.w": torch.zeros(4)}}, storage_reader=TailorReader(store)))
    assert isinstance(gone, MissingObjectError)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_bit_of_every_dtype_comes_back(store: ts.Store) -> None:
    random = torch.Generator().manual_seed(1)
    model: dict[str, torch.Tensor] = {}
    for name, dtype in DTYPES.items():
        raw = torch.randint(256, (24 * dtype.itemsize,), dtype=torch.uint8, generator=random)
        tensor = (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(4, 6)
        model |= {f"{name}.w": tensor, f"{name}.turned": tensor.t(), f"{name}.none": tensor[:0]}
        model[f"{name}.one"] = tensor[0, 0].clone()
    saved = {"model": model, "beside": {name: tensor for name, tensor in model.items() if name.endswith("w")}}
    save(store, 1, saved)
    found = {key: {name: torch.empty_like(tensor) for name, tensor in held.items()} for key, held in saved.items()}
    dcp_load(found, storage_reader=TailorReader(store))
    for key, held in saved.items():
        for name, tensor in held.items():
            assert found[key][name].dtype == tensor.dtype
            assert bits(found[key][name]) == bits(tensor), name


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_values_that_are_no_tensors_come_back_as_they_were(store: ts.Store, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "number": 3,
        "large": 1 << 80,
        "half": 0.5,
        "nothing": None,
        "yes": True,
        "text": "größer",
        "raw": b"\x00\xff",
        "pair": (1, (2.0, "three")),
        "words": ["a", "b"],
        "infinite": float("-inf"),
        "rng": np.random.RandomState(3).get_state(),
        "odd": ({1: "one", "$x": torch.arange(3)},),
    }
    save(store, 1, {"model": {"w": torch.ones(2)}, "values": values, "stream": io.BytesIO(b"inside")})
    state: dict[str, Any] = {"values": dict.fromkeys(values, 0), "stream": io.BytesIO()}
    dcp_load(state, storage_reader=TailorReader(store))
    assert state["stream"].getvalue() == b"inside"
    rng, expected_rng = state["values"].pop("rng"), values.pop("rng")
    assert all(np.array_equal(found, expected) for found, expected in zip(rng, expected_rng, strict=True))
    odd, expected_odd = state["values"].pop("odd")[0], values.pop("odd")[0]
    assert torch.equal(odd.pop("$x"), expected_odd.pop("$x"))
    assert odd == expected_odd
    assert state["values"] == values
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and not path.name.startswith("catalog")]
    assert files
    for path in files:
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError)):
            pickle.loads(path.read_bytes())  # noqa: S301 - shows that it is none


def test_what_cannot_be_stored_is_refused_with_its_path(store: ts.Store) -> None:
    refused = failure(lambda: save(store, 1, {"model": {"w": torch.ones(2)}, "train": {"callback": print}}))
    assert isinstance(refused, ExtraStateError)
    assert "train.callback" in str(refused)
    sparse = failure(lambda: save(store, 1, {"model": {"w": torch.ones(2).to_sparse()}}))
    assert isinstance(sparse, InvalidInputError)
    assert "model.w" in str(sparse)
    with pytest.raises(BranchNotFoundError):
        store.show()


def test_averaged_weights_are_layers_of_their_own(store: ts.Store) -> None:
    rows = SMALL_BYTES // 4 + 1
    model, ema = {"a.w": torch.ones(3)}, {"a.w": torch.full((rows,), 0.5), "b.w": torch.zeros(2)}
    commit = save(store, 1, {"model": model, "ema": ema})
    assert commit.layers_written == ("a", "ema.a", "ema.b")
    commit = save(store, 2, {"model": {"a.w": torch.zeros(3)}, "ema": {"a.w": ema["a.w"] + 1}}, mask=["ema.*"])
    assert commit.layers_written == ("ema.a",)
    state = {"model": {"a.w": torch.zeros(3)}, "ema": {name: torch.zeros_like(held) for name, held in ema.items()}}
    dcp_load(state, storage_reader=TailorReader(store))
    expected = {"model.a.w": model["a.w"], "ema.a.w": ema["a.w"] + 1, "ema.b.w": ema["b.w"]}
    assert differences(state, expected) == []


def test_one_tensor_under_two_names_is_stored_once(store: ts.Store) -> None:
    shared = torch.arange(4.0)
    commit = save(store, 1, {"model": {"a.w": shared, "b.w": shared}})
    assert commit.layers_written == ("a",)
    state = {"model": {"a.w": torch.zeros(4), "b.w": torch.zeros(4)}}
    dcp_load(state, storage_reader=TailorReader(store))
    assert differences(state, {"model.a.w": shared, "model.b.w": shared}) == []


def test_optimizers_without_tensors_and_state_that_is_no_tensor(store: ts.Store) -> None:
    net = torch.nn.Linear(3, 2)
    momentum = {"weight": {"step": 4, "on": torch.ones(2, 3), "deep": {"inner": torch.zeros(5)}}, "bias": {"step": 4}}
    state = {
        "model": net.state_dict(),
        "optim": {"state": momentum, "param_groups": [{"lr": 0.1, "params": ["weight", "bias"]}]},
    }
    save(store, 1, state)
    with store.checkout() as checkpoint:
        assert checkpoint.optim["bias"]["step"] == 4
        assert checkpoint.optim_state_dict()["param_groups"] == [{"lr": 0.1, "params": ["weight", "bias"]}]  # type: ignore[call-overload]
    expected = dict(leaves(state))
    blank: dict[str, Any] = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()},
        "optim": {
            "state": {
                "weight": {"step": 0, "on": torch.zeros(2, 3), "deep": {"inner": torch.ones(5)}},
                "bias": {"step": 0},
            },
            "param_groups": [{"lr": 0.0, "params": []}],
        },
    }
    dcp_load(blank, storage_reader=TailorReader(store))
    assert differences(blank, expected) == []


def test_an_optimizer_without_slots_is_restored_too(store: ts.Store) -> None:
    net = torch.nn.Linear(3, 2)
    optim = torch.optim.SGD(net.parameters(), lr=0.25)
    save(store, 1, {"model": net.state_dict(), "optim": get_optimizer_state_dict(net, optim)})
    other = torch.nn.Linear(3, 2)
    other_optim = torch.optim.SGD(other.parameters(), lr=1.0)
    with store.checkout() as checkpoint:
        checkpoint.restore(other, other_optim)
    assert torch.equal(other.weight, net.weight)
    assert other_optim.param_groups[0]["lr"] == 0.25


def test_ids_of_scripts_name_the_step(store: ts.Store) -> None:
    for step in (10, 20):
        state = {"model": {"w": torch.full((2,), float(step))}}
        dcp_save(state, checkpoint_id=f"out/step-{step}", storage_writer=TailorWriter(store))
    for checkpoint_id, expected in (("out/step-10", 10.0), ("latest", 20.0), ("main", 20.0)):
        state = {"model": {"w": torch.zeros(2)}}
        dcp_load(state, checkpoint_id=checkpoint_id, storage_reader=TailorReader(store))
        assert torch.equal(state["model"]["w"], torch.full((2,), expected))
    nameless = failure(lambda: dcp_save(state, checkpoint_id="out/last", storage_writer=TailorWriter(store)))
    assert isinstance(nameless, InvalidInputError)


def test_the_store_s_errors_come_through(store: ts.Store) -> None:
    save(store, 5, {"model": {"w": torch.ones(2)}})
    early = failure(lambda: save(store, 5, {"model": {"w": torch.ones(2)}}))
    assert isinstance(early, StepOrderError)
    assert isinstance(pickle.loads(pickle.dumps(early)), StepOrderError)  # noqa: S301 - as DCP sends it to other ranks
    missing = failure(lambda: dcp_load({"model": {}}, storage_reader=TailorReader(store, 7)))
    assert "no commit at step 7" in str(missing)


def test_a_writer_that_holds_a_store_does_not_travel(store: ts.Store, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="another process"):
        pickle.dumps(TailorWriter(store, 1))
    writer = TailorWriter(functools.partial(ts.open_store, str(tmp_path / "run")), 1)
    arrived = pickle.loads(pickle.dumps(writer))  # noqa: S301
    dcp_save({"model": {"w": torch.ones(2)}}, storage_writer=arrived)
    assert store.show().step == 1


class _Pickling(DefaultSavePlanner):
    """A planner that says nothing but what the interface asks of it."""

    lookup_object = None  # type: ignore[assignment]


def test_planners_that_only_pickle_are_refused(store: ts.Store) -> None:
    state = {"model": {"w": torch.ones(2)}, "seen": 3}
    writer, planner = TailorWriter(store, 1), _Pickling()
    refused = failure(lambda: dcp_save(state, storage_writer=writer, planner=planner))
    assert isinstance(refused, InvalidInputError)
    assert "'seen'" in str(refused)


def test_plans_that_are_kept_from_save_to_save_are_understood(store: ts.Store) -> None:
    try:
        for step in (1, 2, 3):
            state = {"model": {"w": torch.full((2,), float(step))}, "seen": step}
            planner = DefaultSavePlanner(enable_plan_caching=True)
            dcp_save(state, storage_writer=TailorWriter(store, step), planner=planner)
        found: dict[str, Any] = {"model": {"w": torch.zeros(2)}, "seen": 0}
        dcp_load(found, storage_reader=TailorReader(store))
        assert differences(found, {"model.w": torch.full((2,), 3.0), "seen": 3}) == []
    finally:
        for name in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
            getattr(SavePlanner, f"_cached_{name}").clear()


def test_saving_apart_is_refused(store: ts.Store) -> None:
    writer = TailorWriter(store, 1)
    with pytest.raises(InvalidInputError, match="use_collectives"):
        dcp_save({"model": {"w": torch.ones(2)}}, storage_writer=writer, use_collectives=False)
