"""A process that holds some layers of a model restores these, and takes nothing that others hold for a difference."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tailorstore as ts
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.contents import stored_tensor
from tailorstore.engine.light.decode import read_tensors
from tailorstore.engine.tensors.capture import model_tensors
from tailorstore.engine.tensors.restore import plan_model, plan_optim, plan_states
from tests.kit.models import assert_same, assert_same_optim, gpt, optim_snapshot, snapshot, train

HEAD = ("lm_head.weight",)


class Noted(nn.Module):
    """A module with state that is no tensor."""

    def __init__(self, note: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), float(len(note))))
        self.note = note

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


def grouped(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW with a group for matrices and one for the rest; either may be empty."""
    groups = [
        {"params": [param for param in named.values() if param.dim() == 2], "weight_decay": 0.1, "lr": 1e-2},
        {"params": [param for param in named.values() if param.dim() != 2], "weight_decay": 0.0, "lr": 3e-3},
    ]
    return torch.optim.AdamW(groups)


def stage(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of a stage, with values that a restore must overwrite."""
    found = {name: param for name, param in model.named_parameters(remove_duplicate=False) if name in names}
    with torch.no_grad():
        for param in found.values():
            param.fill_(-7)
    return found


def restore(checkpoint: Checkpoint, model: Any, optim: Any, elsewhere: Collection[str]) -> list[str]:
    """Restore as a rank does that knows what others have, if nothing differs; return the differences."""
    contents = checkpoint._contents
    arrays, aliases = contents.model_arrays()
    stored = {name: stored_tensor(array) for name, array in arrays.items()}
    stored |= {name: stored[target] for name, target in aliases.items()}
    problems: list[str] = []
    tensors, states = model_tensors(model)
    filling = plan_model(tensors, stored, problems, strict=True, elsewhere=elsewhere)

    def load(name: str, path: str) -> torch.Tensor:
        return contents.loader(name)(path)

    plan_states(model, states, contents.states(), load, problems, filling, strict=True, elsewhere=elsewhere)
    if optim is not None:
        known = contents.stored_optim(contents.documents(), aliases)
        plan_optim(tensors, optim, known, problems, filling, load, strict=True, elsewhere=elsewhere)
    if not problems:
        slots = [(contents.array(contents.layer_of(name), path), target) for name, path, target in filling.slots]
        weights = [(arrays[aliases.get(name, name)], target) for name, target in filling.model.items()]
        read_tensors(checkpoint._objects, [*weights, *slots])
        for finish in filling.finish:
            finish()
    return problems


@pytest.fixture
def model() -> nn.Module:
    return gpt()


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    found = grouped(dict(model.named_parameters()))
    train(model, [found], 2)
    found.param_groups[0]["lr"] = 0.5
    found.param_groups[1]["lr"] = 0.25
    return found


@pytest.fixture
def checkpoint(tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Checkpoint]:
    with ts.open_store(tmp_path / "root") as store:
        store.commit(2, model, optimizer)
        yield store.checkout()


def slots_of(optimizer: torch.optim.Optimizer, names: Collection[str], model: nn.Module) -> dict[str, Any]:
    """Return the slots of some parameters by name."""
    return {
        f"{name}.{slot}": value
        for name, param in model.named_parameters(remove_duplicate=False)
        if name in names
        for slot, value in optimizer.state[param].items()
    }


def named_slots(optimizer: torch.optim.Optimizer, held: dict[str, nn.Parameter]) -> dict[str, Any]:
    return {f"{name}.{slot}": value for name, param in held.items() for slot, value in optimizer.state[param].items()}


def test_stages_restore_what_they_hold(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    names = [name for name, _ in model.named_parameters()]
    # The last one holds no vector: one of its groups is empty.
    for mine in (names[:9], [name for name in names[9:] if name not in HEAD], HEAD):
        held = stage(gpt(seed=3), mine)
        again = grouped(held)
        elsewhere = set(names).difference(mine)
        assert restore(checkpoint, held, again, elsewhere) == []
        assert_same(held, {name: value for name, value in snapshot(model).items() if name in mine})
        assert_same_optim(named_slots(again, held), slots_of(optimizer, mine, model))
        assert [group["lr"] for group in again.param_groups] == [0.5, 0.25]


def test_what_nobody_holds_is_still_unexpected(checkpoint: Checkpoint, model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    held = stage(gpt(), names[:9])
    lost = names[-1]
    problems = restore(checkpoint, held, grouped(held), set(names[9:]) - {lost})
    assert len(problems) == 2
    assert problems[0].startswith(f"unexpected: {lost}")
    assert f"group 0 lacks {lost}" in problems[1]
    assert all(float(param.detach().sum()) < 0 for param in held.values()), "something was changed"


def test_a_stage_without_a_group_leaves_it_out(checkpoint: Checkpoint, model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    for mine, rate in ((HEAD, 0.5), ([name for name in names if name.endswith("bias")], 0.25)):
        held = stage(gpt(), mine)
        one = torch.optim.AdamW(held.values())
        assert restore(checkpoint, held, one, set(names).difference(mine)) == []
        assert [group["lr"] for group in one.param_groups] == [rate]


def test_groups_that_differ_within_a_stage_are_refused(checkpoint: Checkpoint, model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    mine = names[:9]
    elsewhere = set(names).difference(mine)
    held = stage(gpt(), mine)
    [problem] = restore(checkpoint, held, torch.optim.AdamW(held.values()), elsewhere)
    assert "1 parameter groups, 2 in the composite" in problem
    fewer = grouped({name: param for name, param in held.items() if name != names[0]})
    [problem] = restore(checkpoint, held, fewer, elsewhere)
    assert f"group 0 lacks {names[0]}" in problem


def test_a_parameter_that_the_composite_has_in_no_group_is_refused(tmp_path: Path) -> None:
    held = {"a.w": nn.Parameter(torch.ones(3)), "b.w": nn.Parameter(torch.ones(3))}
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, held, torch.optim.AdamW([held["a.w"]]))
        [problem] = restore(store.checkout(), {"b.w": held["b.w"]}, torch.optim.AdamW([held["b.w"]]), ["a.w"])
    assert "1 parameter groups, 0 in the composite" in problem


def test_a_tied_weight_on_the_last_stage_has_the_slots_of_the_first(tmp_path: Path) -> None:
    model = gpt(tied=True)
    optimizer = grouped(dict(model.named_parameters()))
    train(model, [optimizer], 2)
    names = [name for name, _ in model.named_parameters()]
    with ts.open_store(tmp_path / "root") as store:
        store.commit(2, model, optimizer)
        held = stage(gpt(seed=3), HEAD)
        again = grouped(held)
        assert restore(store.checkout(), held, again, names) == []
    assert_same(held, {name: value for name, value in snapshot(model).items() if name in HEAD})
    assert_same_optim(named_slots(again, held), slots_of(optimizer, HEAD, model))


def test_a_state_dict_takes_what_the_stage_holds(checkpoint: Checkpoint, model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    held = stage(gpt(), names[:9])
    target: dict[str, Any] = {"state": {}, "param_groups": []}
    assert restore(checkpoint, held, target, set(names[9:])) == []
    assert sorted(target["state"]) == sorted(names[:9])
    members = [name for group in target["param_groups"] for name in group["params"]]
    assert sorted(members) == sorted(names[:9])


def test_extra_states_of_other_ranks_are_not_unexpected(tmp_path: Path) -> None:
    whole = nn.ModuleDict({"a": Noted("first"), "b": Noted("the second")})
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, whole)
        checkpoint = store.checkout()
        part = nn.ModuleDict({"b": Noted("")})
        assert len(restore(checkpoint, part, None, ["a.scale"])) == 1
        assert restore(checkpoint, part, None, ["a.scale", "a._extra_state"]) == []
    found = part["b"]
    assert isinstance(found, Noted)
    assert (found.note, found.scale.tolist()) == ("the second", [10.0] * 3)


def test_a_slot_that_fits_is_filled_where_it_is(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    other = gpt(seed=4)
    again = grouped(dict(other.named_parameters()))
    train(other, [again], 1)
    kept = {id(value) for held in again.state.values() for value in held.values() if value.dim()}
    assert restore(checkpoint, other, again, []) == []
    assert {id(value) for held in again.state.values() for value in held.values() if value.dim()} == kept
    assert_same_optim(optim_snapshot(again), optim_snapshot(optimizer))
