"""A small training for the tests of torch.distributed.checkpoint, sharded or not, and ways to compare state dicts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Net(nn.Module):
    """Two blocks between a tied embedding and head; rows that 2 and 4 do not divide, and more ranks than rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(65, 12)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12)) for _ in range(2))
        self.gate = nn.Linear(12, 3)
        self.head = nn.Linear(12, 65, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        out: torch.Tensor = self.head(x * self.gate(x).sigmoid().mean(-1, keepdim=True))
        return out


def training(*, shard: bool = False) -> tuple[Net, torch.optim.AdamW]:
    net = Net()
    if shard:
        for block in net.blocks:
            fully_shard(block)
        fully_shard(net)
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2, foreach=False)


def train(net: nn.Module, optim: torch.optim.Optimizer, steps: int) -> None:
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        net(torch.randint(65, (16,), generator=data)).square().mean().backward()
        optim.step()
        optim.zero_grad()


class Progress:
    """What a script saves beside model and optimizer."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.noise = torch.Generator().manual_seed(7 + step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": torch.tensor(self.step, dtype=torch.int32),
            "noise": self.noise.get_state(),
            "best": (1.5, None),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["best"] == (1.5, None)
        self.step = int(state["step"])
        self.noise.set_state(state["noise"])


def state_of(net: nn.Module, optim: torch.optim.Optimizer, progress: Progress | None = None) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(net),
        "optim": get_optimizer_state_dict(net, optim),
        **({"train": progress} if progress is not None else {}),
    }


def take_over(net: nn.Module, optim: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    set_model_state_dict(net, state["model"])
    set_optimizer_state_dict(net, optim, state["optim"])


def only(layer: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict of one layer."""
    return {
        "model": {name: tensor for name, tensor in state["model"].items() if name.startswith(layer)},
        "optim": {"state": {name: slots for name, slots in state["optim"]["state"].items() if name.startswith(layer)}},
    }


class Titan:
    """What torchtitan's checkpointer does with a training: the model at the top, the optimizer's keys joined."""

    def __init__(self, net: Net, optim: torch.optim.Optimizer, progress: Progress, rank: int, size: int) -> None:
        self.net = net
        self.optim = optim
        self.progress = progress
        self.schedule = torch.optim.lr_scheduler.StepLR(optim, 2)
        self.data = {f"dp_rank_{rank}": f"position of {rank}".encode(), "world_size": size}

    def train(self, steps: int) -> None:
        train(self.net, self.optim, steps)
        self.schedule.step()
        self.progress = Progress(self.progress.step + steps)

    def states(self) -> dict[str, Any]:
        return {
            **get_model_state_dict(self.net),
            "optimizer": get_optimizer_state_dict(self.net, self.optim, options=FLAT),
            "lr_scheduler": self.schedule.state_dict(),
            "train_state": self.progress.state_dict(),
            "dataloader": dict(self.data),
        }

    def load(self, states: dict[str, Any]) -> None:
        names = self.net.state_dict().keys()
        set_model_state_dict(self.net, {name: states[name] for name in names})
        set_optimizer_state_dict(self.net, self.optim, states["optimizer"], options=FLAT)
        self.schedule.load_state_dict(states["lr_scheduler"])
        self.progress.load_state_dict(states["train_state"])


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield everything in a state dict, with whole tensors; collective where they are spread."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from leaves(item, (*path, at))
    else:
        yield ".".join(map(str, path)), value.full_tensor() if isinstance(value, DTensor) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def differences(state: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    found = dict(leaves(state))
    names = sorted(found.keys() | expected.keys())
    return [
        name for name in names if name not in found or name not in expected or not same(found[name], expected[name])
    ]
