"""What ranks measure of a model that they hold together, beside what one process measures of its unsharded twin."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from tailorstore.domain.records import MEASURES
from tailorstore.engine.ranks.local import local_capture
from tailorstore.engine.tensors.capture import capture
from tailorstore.engine.tensors.measures import Gauge
from tailorstore.engine.tensors.tallies import figures, tally_from_json
from tests.kit.models import gpt
from tests.kit.ranks import run_ranks

STEPS = 4
SIZE = 2

Speaks = Callable[[str, str], bool]


class Mlp(nn.Module):
    """What tensor parallelism cuts in every way: columns, rows, and copies."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return found


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


def measured_while_training(
    model: nn.Module, run: Callable[[nn.Module], torch.Tensor], speaks: Speaks
) -> dict[str, Any]:
    """Train, and return the tallies of what this rank speaks for, measured since the step in the middle."""
    # With the usual eps, gradients that are rounding errors alone would move their parameters as far as others.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    gauge = Gauge()
    with gauge.watch(optimizer, every=1):
        for step in range(STEPS):
            if step == STEPS // 2:
                local = local_capture(capture(model, optimizer, module_of), speaks)
                gauge.keep(gauge.sample(local, local.layers))
            optimizer.zero_grad()
            run(model).backward()
            optimizer.step()
    tallies = gauge.tally(local_capture(capture(model, optimizer, module_of), speaks))
    return {name: tally.as_json() for name, tally in tallies.items()}


def everywhere(_layer: str, _path: str) -> bool:
    return True


def predict(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(18).reshape(2, 9)
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def transform(model: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * 8 * 16).reshape(2, 8, 16)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Under sequence parallelism each rank is given its part of the sequence.
    found: torch.Tensor = model(x.chunk(size, dim=1)[rank]).square().sum()
    return found


def fully_sharded() -> dict[str, Any]:
    # 33 embeddings on two ranks: 17 rows and 16; three of a head: 2 and 1.
    model = gpt(vocabulary=33)
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    return measured_while_training(model, predict, everywhere)


def replicated() -> dict[str, Any]:
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(gpt(vocabulary=33))
    return measured_while_training(model, predict, lambda _, path: sum(path.encode()) % SIZE == rank)


def tensor_parallel() -> dict[str, Any]:
    torch.manual_seed(0)
    model, rank = Mlp(), dist.get_rank()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),
    }
    parallelize_module(model, init_device_mesh("cpu", (SIZE,)), plan)
    copied = {"norm.weight", "norm.bias", "down.bias"}
    found = measured_while_training(model, transform, lambda _, path: path not in copied or rank == 0)
    assert str(model.norm.weight.grad.placements) == "(Partial(sum),)"  # type: ignore[union-attr]
    return found


def all_layouts() -> dict[str, Any]:
    return {"fsdp": fully_sharded(), "ddp": replicated(), "tp": tensor_parallel()}


def alone(model: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> dict[str, Any]:
    return measured_while_training(model, run, everywhere)


def figures_of(tallies: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    measures = figures([{name: tally_from_json(one) for name, one in tally.items()} for tally in tallies])
    return {name: asdict(one) for name, one in measures.items()}


def test_all_ranks_together_measure_what_one_process_does() -> None:
    by_rank = run_ranks(all_layouts, SIZE)
    torch.manual_seed(0)
    twins = {"fsdp": alone(gpt(vocabulary=33), predict), "ddp": alone(gpt(vocabulary=33), predict)}
    torch.manual_seed(0)
    twins["tp"] = alone(Mlp(), transform)
    for layout, twin in twins.items():
        expected, found = figures_of([twin]), figures_of([tallies[layout] for tallies in by_rank])
        assert found.keys() == expected.keys()
        if layout == "tp":
            # Of a gradient whose sums are pending no rank knows a share.
            assert found["norm"].pop("gradient") is None
            assert expected["norm"].pop("gradient") > 0
        for layer, truth in expected.items():
            assert truth["drift"] > 0
            for name in [name for name in MEASURES if name in truth]:
                assert found[layer][name] == pytest.approx(truth[name], rel=1e-3), (layout, layer, name)
                assert math.isfinite(truth[name])
