"""One training state in every layout that ranks hold it in: replicated, sharded, cut by tensor parallelism, both."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

WIDTH = 10


class Net(nn.Module):
    """Blocks of odd widths, so that shards are uneven and some ranks hold nothing of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(WIDTH, 33, bias=False)
        self.register_buffer("seen", torch.arange(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * (1 + self.gate.mean())
        for block in self.blocks:
            x = x + block(x)
        logits: torch.Tensor = self.head(self.norm(x)).clone()  # FSDP2 warns of views
        return logits


class Block(nn.Module):
    """Two linear layers, the first cut by columns under tensor parallelism, the second by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(nn.functional.gelu(self.up(x))).clone()
        return out


def reference(seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    """Return a model and an optimizer that has trained for two steps; the same wherever it is called."""
    # Sums depend on how many threads share them.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        train_step(model, optimizer, seed=step)
    with torch.no_grad():
        # What arithmetic would lose, storage must not.
        model.head.weight[0, :3] = torch.tensor([-0.0, float("nan"), 1e-42])
        model.head.weight[-1, -1] = -0.0
    return model, optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """Train on random tokens, the same on every rank, and return the loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 33, (4, 9), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def replicated(model: Net, _mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: Net, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def mixed(model: Net, mesh: DeviceMesh) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def cut(model: Net, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def both(model: Net, mesh: DeviceMesh) -> nn.Module:
    cut(model, mesh["cut"])
    return sharded(model, mesh["shard"])


def hybrid(model: Net, mesh: DeviceMesh) -> nn.Module:
    return sharded(model, mesh)


SHAPES: dict[str, tuple[Callable[[Net, DeviceMesh], nn.Module], Callable[[int], dict[str, Any]]]] = {
    "replicated": (replicated, lambda size: {"mesh_shape": (size,)}),
    "sharded": (sharded, lambda size: {"mesh_shape": (size,)}),
    "mixed": (mixed, lambda size: {"mesh_shape": (size,)}),
    "cut": (cut, lambda size: {"mesh_shape": (size,)}),
    "both": (both, lambda size: {"mesh_shape": (size // 2, 2), "mesh_dim_names": ("shard", "cut")}),
    "hybrid": (hybrid, lambda size: {"mesh_shape": (2, size // 2), "mesh_dim_names": ("replicate", "shard")}),
}
"""Layouts by name."""


def in_layout(layout: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the reference in a layout over all ranks, slots included."""
    model, optimizer = reference(seed)
    names = {id(param): name for name, param in model.named_parameters()}
    slots = {names[id(param)]: dict(held) for param, held in optimizer.state.items()}
    wrap, mesh_of = SHAPES[layout]
    # A wrapper that sends anything would change NaN payloads by no bit, and -0.0 neither: values are split, not summed.
    wrapped = wrap(model, init_device_mesh("cpu", **mesh_of(dist.get_world_size())))
    fresh = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    for name, param in plain(wrapped).named_parameters():
        fresh.state[param] = {slot: like(value, param) for slot, value in slots[name].items()}
    return wrapped, fresh


def plain(model: nn.Module) -> nn.Module:
    """Return the module inside a wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def like(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return a slot laid out as its parameter is."""
    if value.dim() == 0 or not isinstance(param, DTensor):
        return value.clone()
    return distribute_tensor(value, param.device_mesh, param.placements)


def emptied(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Overwrite all that a restore is to bring back."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(-7)
    optimizer.state.clear()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what of a tensor is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bits(tensor: torch.Tensor) -> list[int]:
    """Return a tensor's bytes."""
    return list(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def local_bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[int]]:
    """Return every byte that this rank holds, by name."""
    inner = plain(model)
    found = {name: bits(local(value)) for name, value in inner.state_dict().items()}
    for name, param in inner.named_parameters():
        held = optimizer.state.get(param, {})
        found |= {f"{name}/{slot}": bits(local(value)) for slot, value in held.items()}
    return found
