"""Learned importance on a run that really trains: whole measures of a small network, written in turn."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tailorstore.domain.importance import Importance
from tailorstore.domain.mask import LayerState, MaskContext
from tailorstore.domain.records import Fidelity, LayerMeasures

COMMITS, STEPS, WIDTH = 40, 5, 24


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


def measured(layer: nn.Module, saved: list[Tensor], optimizer: torch.optim.Optimizer, rate: float) -> LayerMeasures:
    parameters = [parameter.detach() for parameter in layer.parameters()]
    changes = [now - before for now, before in zip(parameters, saved, strict=True)]
    slots = [optimizer.state[parameter] for parameter in layer.parameters()]
    weighted = None
    if "exp_avg_sq" in slots[0]:
        debts = [1 - 0.999 ** float(slot["step"]) for slot in slots]
        seconds = [slot["exp_avg_sq"] / debt for slot, debt in zip(slots, debts, strict=True)]
        weighted = sum(float((change.square() * one).sum()) for change, one in zip(changes, seconds, strict=True))
        updates = [slot["exp_avg"] / (one.sqrt() + 1e-8) for slot, one in zip(slots, seconds, strict=True)]
    else:
        updates = [slot["momentum_buffer"] for slot in slots]
    gradient = norm([parameter.grad for parameter in layer.parameters() if parameter.grad is not None])
    return LayerMeasures(norm(changes), norm(changes) / norm(parameters), rate * norm(updates), gradient, weighted)


def optimizer_of(kind: str, layers: nn.Module) -> torch.optim.Optimizer:
    if kind == "AdamW":
        return torch.optim.AdamW(layers.parameters(), lr=2e-3)
    return torch.optim.SGD(layers.parameters(), lr=0.05, momentum=0.9)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for the other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_a_real_run_earns_trust_and_is_foretold_better_than_what_is_will_be(kind: str) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleDict({f"h{at}": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for at in range(6)})
    teacher = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH))
    optimizer = optimizer_of(kind, layers)
    peak = optimizer.param_groups[0]["lr"]
    saved: dict[str, list[Tensor]] = {}
    origins: dict[str, int] = {}
    importance = Importance()

    for commit in range(COMMITS):
        rate = peak * min(1.0, (commit + 1) / 5) * (1 - commit / COMMITS)
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(STEPS):
            inputs = torch.randn(16, WIDTH)
            outputs = inputs
            for layer in layers.values():
                outputs = outputs + layer(outputs)
            optimizer.zero_grad()
            (outputs - teacher(inputs).detach()).square().mean().backward()
            optimizer.step()
        step = (commit + 1) * STEPS
        states = {
            name: LayerState(
                name,
                1,
                origins.get(name),
                measures=measured(layer, saved[name], optimizer, rate) if name in saved else None,
            )
            for name, layer in layers.items()
        }
        context = MaskContext("main", step, states, number=commit)
        written: dict[str, Fidelity] = {
            name: "full" for at, name in enumerate(layers) if not commit or at % 3 == commit % 3
        }
        importance.observe(context, written, rate)
        for name in written:
            saved[name] = [parameter.detach().clone() for parameter in layers[name].parameters()]
            origins[name] = step

    report = importance.report()
    assert report.trusted
    assert report.error_left is not None
    assert report.error_written is not None
    assert report.fallback_error_left is not None
    assert report.fallback_error_written is not None
    assert report.error_left < 0.5 * report.fallback_error_left
    assert report.error_written < report.fallback_error_written
    assert all(abs(bias) < 0.3 for bias in report.bias.values())
