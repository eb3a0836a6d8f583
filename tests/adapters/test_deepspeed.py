import itertools
import math
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import tailorstore as ts
from tailorstore.adapters.deepspeed import commit, restore
from tailorstore.adapters.deepspeed.partitions import boxes_of_run
from tailorstore.domain.errors import MissingDependencyError
from tests.adapters import deepspeed_engines as engines
from tests.adapters.deepspeed_engines import KINDS
from tests.adapters.deepspeed_ranks import PAYLOAD, SPECIAL, bits, take, train_and_commit
from tests.kit.ranks import run_ranks

FP32 = [name for name, kind in KINDS.items() if kind.precision == "fp32"]
LOW = {"bf16": {"torch.bfloat16"}, "fp32": set[str]()}

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def trained(root: Path) -> Found:
    """Give what each of two ranks found; the root has a store for each kind of engine now."""
    return run_ranks(train_and_commit, 2, root, timeout=240)


@pytest.fixture(scope="module")
def plain(root: Path) -> None:
    """Put a store "plain" there, in which a model under torch's own AdamW is."""
    model, optimizer, scheduler = _plain(seed=4)
    with ts.open_store(root / "plain") as store:
        for step in range(3):
            _train(model, optimizer, scheduler, step)
        store.commit(3, model, optimizer, extra=[1, 2])


@pytest.mark.parametrize("name", KINDS)
def test_an_engine_goes_on_after_a_restore_as_if_it_had_never_stopped(trained: Found, name: str) -> None:
    for rank in range(2):
        found = trained[rank]["kinds"][name]
        assert found["extra"] == {"rank": rank, "epoch": [1, 2.5]}
        assert found["same"] == [True, True, True]
        assert found["changed"] == []
        assert found["counters"] == [7, 7 * 8, 14, 0]
        assert found["lr"][0] == found["lr"][1]
        assert found["calls"][0] == found["calls"][1]


@pytest.mark.parametrize("name", KINDS)
def test_the_weight_that_is_stored_is_the_master_of_which_the_live_one_is_the_rounding(
    trained: Found, name: str
) -> None:
    found = trained[0]["kinds"][name]
    assert found["rounded"]
    assert set(found["dtypes"]) == {"torch.float32"} | LOW[KINDS[name].precision]


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("name", FP32)
def test_a_plain_model_and_optimizer_take_an_engines_commit_and_go_on_with_it(root: Path, name: str) -> None:
    model, optimizer, scheduler = _plain(seed=3)
    with ts.open_store(root / name) as store, store.checkout(3) as checkpoint, store.checkout(6) as after:
        extra = checkpoint.restore(model, optimizer)
        assert extra["epoch"] == [1, 2.5]
        for key, lazy in checkpoint.model.items():
            assert bits(model.state_dict()[key]) == bits(lazy.load())
        for key, param in model.named_parameters():
            if param.requires_grad:
                slots = checkpoint.optim[key]
                assert list(optimizer.state[param]) == list(slots)
                for slot, lazy in slots.items():
                    assert bits(optimizer.state[param][slot]) == bits(lazy.load())
        scheduler.load_state_dict(extra["@deepspeed"]["lr_scheduler"][1])
        for step in range(3, 6):
            _train(model, optimizer, scheduler, step)
        for key, param in model.named_parameters():
            torch.testing.assert_close(param.detach(), after.model[key].load(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("trained", "plain")
@pytest.mark.parametrize(("size", "each"), [(1, 3), (4, 1)])
def test_other_stages_and_world_sizes_take_to_the_bit_what_an_engine_or_a_plain_model_committed(
    root: Path, size: int, each: int
) -> None:
    others = itertools.islice(itertools.cycle(KINDS), 3, None)
    pairs = [
        (stored, live, KINDS[stored].precision == KINDS[live].precision)
        for stored, live in zip(KINDS, others, strict=False)
    ]
    pairs = [*pairs, *(("plain", name, True) for name in FP32)][::each]
    for ranks in run_ranks(take, size, root, pairs, timeout=240):
        for (stored, live, strict), changed in zip(pairs, ranks, strict=True):
            # In another precision, frozen weights are others: they have no master.
            assert changed in ([] if strict else ["frozen.weight"], []), (stored, live)


def test_what_does_not_fit_is_said_on_every_rank_and_changes_nothing(trained: Found) -> None:
    found = trained[0]["refused"]
    assert found == trained[1]["refused"]
    assert found["list"].startswith("InvalidInputError: ")
    assert "extra must be a dictionary" in found["list"]
    assert "rank 1" in found["one rank"]
    assert "'@deepspeed' of extra is the engine's own" in found["one rank"]
    assert "engine must be what deepspeed.initialize returns first, not Net" in found["module"]
    assert "only those of ZeRO stages 1, 2 and 3" in found["no ZeRO"]
    assert found["log"] == [1]
    assert found["larger"].startswith("RestoreMismatchError: ")
    assert "missing: blocks.2.up.weight [11, 7] is not in the composite" in found["larger"]
    assert "missing: extra state blocks.2.counting._extra_state" in found["larger"]
    assert "group 0 has blocks.2.up.weight, the composite's has not" in found["larger"]
    assert found["unchanged"]
    assert "optimizer: it is a SGD, the composite's was a AdamW" in found["momentum"]
    assert "dtype: frozen.weight is bfloat16 in the model, float32 in the composite" in found["low"]
    assert found["damaged"].startswith("MissingObjectError: ")


def test_before_the_first_step_there_are_no_slots_and_a_restore_takes_them_away(trained: Found) -> None:
    assert trained[0]["young"] == [0, [], True, True]


def test_the_slots_of_any_optimizer_are_found(trained: Found) -> None:
    assert trained[0]["slots"] == {
        "SGD": [["momentum_buffer"], []],
        "Lion": [["exp_avg"], []],
        "RMSprop": [["square_avg", "step"], []],
    }


def test_bits_that_arithmetic_would_lose_survive(trained: Found) -> None:
    expected = [*torch.tensor(SPECIAL).view(torch.int32).tolist(), PAYLOAD]
    assert trained[0]["special"] == [[], expected, expected]


def test_layers_of_different_steps_keep_their_values_and_get_the_newest_step_counter(trained: Found) -> None:
    found = trained[0]["mixed"]
    assert found["chosen"] == trained[1]["mixed"]["chosen"]
    assert found["chosen"]
    assert set(found["chosen"]) < set(found["sources"])
    assert found["moved"]
    assert found["sources"]["blocks.1"] == 3
    assert found["fidelity"] == "light"
    assert found["changed"]
    assert all(name.startswith("step of ") and "blocks.1" not in name for name in found["changed"])


def test_loss_scales_go_on(trained: Found) -> None:
    for before, losses, after in trained[0]["scaled"]:
        assert before[0] == before[1]
        assert losses[0] == losses[1]
        assert after[0] == after[1]
    [[dynamic, _], _, [later, _]], [[autocast, _], *_] = trained[0]["scaled"]
    assert dynamic[1] != 2**20
    assert dynamic[1] != later
    assert autocast[1]["_growth_tracker"] > 0


def test_without_deepspeed_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model = torch.nn.Linear(2, 2)
    with ts.open_store(tmp_path) as store:
        store.commit(1, model)
        with pytest.raises(MissingDependencyError, match=r"pip install 'tailorstore\[deepspeed\]'"):
            commit(store, 2, model)
        with pytest.raises(MissingDependencyError, match="the package deepspeed"):
            restore(store.checkout(), model)


@hypothesis.given(st.data())
def test_the_boxes_of_a_run_are_its_elements_in_order(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), max_size=4).map(tuple))
    elements = torch.arange(math.prod(shape)).reshape(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, elements.numel())] * 2)))
    boxes = list(boxes_of_run(shape, start, stop))
    found = [int(one) for box in boxes for one in elements[tuple(slice(*bounds) for bounds in box)].flatten()]
    assert found == list(range(start, stop))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


def _plain(seed: int) -> tuple[engines.Net, torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(seed)
    model = engines.Net()
    groups = [
        {**group, "params": [param for param in group["params"] if param.requires_grad]} for group in model.groups()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return model, optimizer, engines.halving(optimizer)


def _train(
    model: engines.Net,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    step: int,
) -> None:
    """Train on all that two ranks train on in a step."""
    optimizer.zero_grad()
    for rank, half in itertools.product(range(2), range(2)):
        (engines.loss_of(model, engines.tokens(step, half, rank)) / 4).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
