"""Whatever an optimizer keeps per parameter comes back to the bit, and its next step is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import nn

import tailorstore as ts
from tailorstore.domain.errors import InvalidInputError
from tests.kit.models import assert_same, assert_same_optim, gpt, optim_snapshot, snapshot, train

Optimizers = list[torch.optim.Optimizer]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.dim() == 2]


def others(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.dim() != 2]


def two_groups(model: nn.Module) -> Optimizers:
    groups = [
        {"params": matrices(model), "weight_decay": 0.1, "betas": (0.8, 0.99)},
        {"params": others(model), "weight_decay": 0.0, "lr": 3e-3},
    ]
    return [torch.optim.AdamW(groups, lr=1e-2)]


CASES: dict[str, Callable[[nn.Module], Optimizers]] = {
    "adamw": lambda m: [torch.optim.AdamW(m.parameters(), lr=1e-2)],
    "adamw amsgrad": lambda m: [torch.optim.AdamW(m.parameters(), lr=1e-2, amsgrad=True)],
    "adamw fused": lambda m: [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True)],
    "adamw tensor lr": lambda m: [torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-2), foreach=False)],
    "sgd": lambda m: [torch.optim.SGD(m.parameters(), lr=1e-2)],
    "sgd momentum": lambda m: [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9)],
    "adafactor": lambda m: [torch.optim.Adafactor(m.parameters(), lr=1e-2)],
    "lion": lambda m: [Lion(m.parameters(), lr=1e-3)],
    "adagrad": lambda m: [torch.optim.Adagrad(m.parameters(), lr=1e-2)],
    "nadam": lambda m: [torch.optim.NAdam(m.parameters(), lr=1e-2)],
    "lbfgs": lambda m: [torch.optim.LBFGS(m.parameters(), lr=1e-2, max_iter=3)],
    "muon and adamw": lambda m: [torch.optim.Muon(matrices(m), lr=1e-2), torch.optim.AdamW(others(m), lr=1e-2)],
    "two groups": two_groups,
}


def step(model: nn.Module, optimizers: Optimizers, steps: int, seed: int) -> float:
    if not isinstance(optimizers[0], torch.optim.LBFGS):
        return train(model, optimizers, steps, seed)
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(seed))

    def closure() -> float:
        optimizers[0].zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.item()

    loss = 0.0
    for _ in range(steps):
        loss = float(optimizers[0].step(closure))
    return loss


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh optimizer", "used optimizer"])
def test_state_comes_back_and_the_next_step_is_the_same(tmp_path: Path, name: str, *, fresh: bool) -> None:
    model = gpt()
    optimizers = CASES[name](model)
    step(model, optimizers, 2, seed=1)
    with ts.open_store(tmp_path / "root") as store:
        store.commit(2, model, optimizers if len(optimizers) > 1 else optimizers[0])
        expected, slots = snapshot(model), [optim_snapshot(optimizer) for optimizer in optimizers]
        loss = step(model, optimizers, 2, seed=2)
        after = snapshot(model)
        other = gpt(seed=5)
        again = CASES[name](other)
        if not fresh:
            step(other, again, 1, seed=3)
        store.checkout().restore(other, again)
        assert_same(snapshot(other), expected)
        for optimizer, kept in zip(again, slots, strict=True):
            assert_same_optim(optim_snapshot(optimizer), kept)
        assert step(other, again, 2, seed=2) == loss
        assert_same(snapshot(other), after)


def test_options_of_parameter_groups_come_back(tmp_path: Path) -> None:
    model = gpt()
    [optimizer] = two_groups(model)
    optimizer.param_groups[0]["lr"] = 0.123
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, model, optimizer)
        [other] = two_groups(model)
        store.checkout().restore(model, other)
    for found, expected in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in found.items() if k != "params"} == {k: v for k, v in expected.items() if k != "params"}
    assert other.param_groups[0]["betas"] == (0.8, 0.99)


def test_state_keeps_its_own_dtype(tmp_path: Path) -> None:
    """``Optimizer.load_state_dict`` would cast float32 moments of bfloat16 weights, and lose bits."""
    model = {"w": nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))}
    optimizer = torch.optim.SGD(model.values(), lr=0.1, momentum=0.9)
    optimizer.state[model["w"]] = {"momentum_buffer": torch.randn(4, 4), "note": "kept", "count": 3, "ratio": -0.0}
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, model, optimizer)
        other = torch.optim.SGD(model.values(), lr=0.1, momentum=0.9)
        store.checkout().restore(model, other)
    assert_same_optim(optim_snapshot(other), optim_snapshot(optimizer))
    assert str(other.state[model["w"]]["ratio"]) == "-0.0"


def test_a_value_slot_that_changes_its_sign_or_type_is_a_change(tmp_path: Path) -> None:
    model = {"w": nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.SGD(model.values(), lr=0.1)
    with ts.open_store(tmp_path / "root") as store:
        for number, value in enumerate([0.0, -0.0, 0, False], start=1):
            optimizer.state[model["w"]] = {"x": value}
            assert store.commit(number, model, optimizer).layers_written == ("w",)
            found = store.checkout().optim["w"]["x"]
            assert (type(found), str(found)) == (type(value), str(value))


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store, pytest.raises(InvalidInputError, match="not a tensor of the model"):
        store.commit(1, gpt(), torch.optim.SGD(gpt().parameters(), lr=0.1))


def test_a_parameter_in_two_optimizers_is_refused(tmp_path: Path) -> None:
    model = gpt()
    both = [torch.optim.AdamW(model.parameters()) for _ in range(2)]
    train(model, both, 1)
    with ts.open_store(tmp_path / "root") as store, pytest.raises(InvalidInputError, match="two optimizers"):
        store.commit(1, model, both)


@pytest.mark.parametrize("bad", ["adam", 3, [object()]])
def test_what_is_no_optimizer_is_refused(tmp_path: Path, bad: Any) -> None:
    with ts.open_store(tmp_path / "root") as store, pytest.raises(InvalidInputError):
        store.commit(1, gpt(), bad)
