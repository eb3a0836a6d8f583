"""Every layout in which ranks hold tensors is filled from a store that one process wrote."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement

import tailorstore as ts
from tailorstore.domain.errors import InvalidInputError
from tailorstore.engine.light.sources import Source
from tailorstore.storage.local import LocalObjects
from tests.kit.layouts import SHAPES, emptied, in_layout, local_bits, plain, reference
from tests.kit.models import adamw, gpt, same_bits, snapshot, train
from tests.kit.ranks import run_ranks
from tests.kit.reading import objects_with, sources_of

SMALL = ts.LightSettings(weight_bits=4, slot_bits=4, block=128, exact_below=64)


def state() -> dict[str, torch.Tensor]:
    """Return tensors that are cut evenly, unevenly, and into fewer shards than there are ranks."""
    generator = torch.Generator().manual_seed(0)
    found = {
        "a.even": torch.randn(64, 48, generator=generator),
        "a.uneven": torch.randn(61, 35, generator=generator),
        "a.few": torch.randn(3, 300, generator=generator),
        "a.one": torch.randn(1, 5, generator=generator),
        "b.experts": torch.randn(5, 12, 20, generator=generator),
        "b.vector": torch.randn(701, generator=generator),
        "b.empty": torch.empty(0, 3),
    }
    found["b.half"] = torch.randn(40, 33, generator=generator).bfloat16()
    found["b.eighth"] = torch.randint(0, 256, (40, 30), dtype=torch.uint8, generator=generator).view(torch.float8_e5m2)
    found["b.flags"] = torch.randn(90, 20, generator=generator) > 0
    found["b.complex"] = torch.complex(found["a.even"], -found["a.even"])
    found["a.even"][0, :3] = torch.tensor([-0.0, float("nan"), 1e-42])
    return found


def placements_of(size: int) -> Iterator[tuple[DeviceMesh, list[Placement]]]:
    line, grid = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (size // 2, 2))
    for one in (Replicate(), Shard(0), Shard(1)):
        yield line, [one]
    for outer, inner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        yield grid, [Shard(outer), Shard(inner)]
    yield grid, [Replicate(), Shard(0)]
    yield grid, [Shard(0), Replicate()]


@contextmanager
def reads() -> Iterator[Counter[str]]:
    """Count the chunks that this process reads."""
    found: Counter[str] = Counter()
    kept = {name: getattr(LocalObjects, name) for name in ("get", "read_into")}

    def counted(name: str) -> Any:
        def method(self: LocalObjects, key: str, *args: Any, **kwargs: Any) -> Any:
            if re.search(r"/c(\.\d+)*$", key):
                found[key] += 1
            return kept[name](self, key, *args, **kwargs)

        return method

    try:
        for name in kept:
            setattr(LocalObjects, name, counted(name))
        yield found
    finally:
        for name, method in kept.items():
            setattr(LocalObjects, name, method)


def needed(source: Source, tensor: Any) -> set[str]:
    """Return the objects that hold what of a ``DTensor`` is on this rank."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return objects_with(source, tuple((at, at + extent) for at, extent in zip(offset, shape, strict=True)))


def blank(value: torch.Tensor, mesh: DeviceMesh, placements: list[Placement], *, turned: bool) -> Any:
    """Return a ``DTensor`` of a value's shape, all zeros; ``turned``: its local tensor is not contiguous."""
    shape, _ = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    local = torch.zeros(tuple(shape)[::-1], dtype=value.dtype).permute(tuple(reversed(range(len(shape)))))
    return DTensor.from_local(
        local if turned else local.contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def _tensors_in_every_placement(root: str) -> list[str]:
    wrong = []
    for ref in (1, 2):
        with ts.open_store(root) as store, store.checkout(ref) as checkpoint:
            whole = checkpoint.model_state_dict()
            sources = sources_of(checkpoint)
            for number, (mesh, placements) in enumerate(placements_of(dist.get_world_size())):
                fitting = {
                    name: value
                    for name, value in whole.items()
                    if all(not one.is_shard() or one.dim < value.dim() for one in placements)  # type: ignore[attr-defined]
                }
                targets = {
                    name: blank(value, mesh, placements, turned=number % 2 == 1) for name, value in fitting.items()
                }
                with reads() as found:
                    checkpoint.restore(targets, strict=False)
                for name, target in targets.items():
                    own = distribute_tensor(fitting[name], mesh, placements, src_data_rank=None).to_local()
                    if not same_bits(target.to_local(), own):
                        wrong.append(f"step {ref}: {name} in {placements}")
                expected = set[str]().union(*(needed(sources[name], target) for name, target in targets.items()))
                beside = {key for key in found if "/@extra/" in key or "/%40extra/" in key}
                if found.keys() - beside != expected or any(count > 1 for count in found.values()):
                    wrong.append(f"step {ref}: chunks of {placements}: {sorted(found.keys() ^ expected)[:5]}")
    return wrong


def _models_in_every_layout(root: str) -> list[str]:
    wrong = []
    for layout in SHAPES:
        model, optimizer = in_layout(layout)
        expected = local_bits(model, optimizer)
        emptied(model, optimizer)
        with ts.open_store(root) as store, store.checkout() as checkpoint:
            checkpoint.restore(model, optimizer)
        found = local_bits(model, optimizer)
        wrong += [f"{layout}: {name}" for name in expected if found.get(name) != expected[name]]
        for name, param in plain(model).named_parameters():
            held = optimizer.state[param]
            if type(held["step"]) is not torch.Tensor or held["step"].device.type != "cpu":
                wrong.append(f"{layout}: step of {name} is {held['step']!r}")
            for slot in ("exp_avg", "exp_avg_sq"):
                if getattr(held[slot], "placements", None) != getattr(param, "placements", None):
                    wrong.append(f"{layout}: {slot} of {name} is not laid out as its parameter is")
                if isinstance(param, DTensor) and held[slot].to_local().stride() != param.to_local().stride():
                    wrong.append(f"{layout}: {slot} of {name} has strides of its own")
    return wrong


def _factored_moments(root: str) -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole, adafactor = factored()
    rows, columns = (adafactor.state[whole["w"]][slot] for slot in ("row_var", "col_var"))
    wrong = []
    param = nn.Parameter(distribute_tensor(torch.zeros(40, 50), mesh, [Shard(0)]))
    optimizer = torch.optim.Adafactor([param], lr=1e-2)
    with ts.open_store(root) as store, store.checkout() as checkpoint:
        checkpoint.restore({"w": param}, optimizer)
        fresh = optimizer.state[param]
        for slot, value in (("row_var", rows), ("col_var", columns)):
            if fresh[slot].placements != (Replicate(),) or not same_bits(fresh[slot].to_local(), value):
                wrong.append(f"fresh {slot}")
        kept = distribute_tensor(torch.zeros(40, 1), mesh, [Shard(0)])
        optimizer.state[param]["row_var"] = kept
        checkpoint.restore({"w": param}, optimizer)
        own = distribute_tensor(rows, mesh, [Shard(0)], src_data_rank=None).to_local()
        if optimizer.state[param]["row_var"] is not kept or not same_bits(kept.to_local(), own):
            wrong.append("row_var that was there")
        target: dict[str, Any] = {"state": {}, "param_groups": []}
        checkpoint.restore({"w": param}, target)
        if not same_bits(target["state"]["w"]["row_var"].to_local(), rows):
            wrong.append("row_var in a state dict")
    return wrong


def _tied_weights(root: str) -> list[str]:
    model = gpt(seed=3, tied=True)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    whole, kept = tied()
    names = {id(param): name for name, param in whole.named_parameters()}
    expected = snapshot(whole) | {
        f"{slot} of {names[id(param)]}": value for param, held in kept.state.items() for slot, value in held.items()
    }
    with ts.open_store(root) as store, store.checkout() as checkpoint:
        checkpoint.restore(model, optimizer)
    found: dict[str, Any] = dict(model.state_dict())
    for name, param in model.named_parameters():
        found |= {f"{slot} of {name}": value for slot, value in optimizer.state[param].items()}
    whole_now = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    return [name for name, value in expected.items() if not same_bits(whole_now[name], value)]


def _refusals(root: str) -> list[str]:
    """Return what each target that holds no values of its own is refused with."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    targets: dict[str, Any] = {
        "pending": DTensor.from_local(torch.zeros(40, 50), mesh, [Partial()], run_check=False),
        "meta": DTensor.from_local(torch.zeros(40, 50, device="meta"), mesh, [Replicate()], run_check=False),
    }
    found = []
    for target in targets.values():
        with ts.open_store(root) as store, store.checkout() as checkpoint:
            try:
                checkpoint.restore({"w": target})
            except InvalidInputError as error:
                found.append(str(error))
    return found


def factored() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(4)
    model = {"w": nn.Parameter(torch.randn(40, 50, generator=generator))}
    optimizer = torch.optim.Adafactor(model.values(), lr=1e-2)
    model["w"].grad = torch.randn(40, 50, generator=generator)
    optimizer.step()
    return model, optimizer


def tied() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.set_num_threads(1)
    model = gpt(seed=2, tied=True)
    optimizer = adamw(model)
    train(model, [optimizer], 2)
    return model, optimizer


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return roots that this process alone has written."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("tensors", "model", "factored", "tied")}
    with ts.open_store(found["tensors"], chunk_bytes=1024, light=SMALL) as store:
        values = state()
        store.commit(1, values)
        moved = {
            name: value + 0.01 * torch.randn(value.shape) if value.dtype is torch.float32 else value
            for name, value in values.items()
        }
        store.commit(2, moved, mask={"*": "light"})
    trained: dict[str, tuple[Any, torch.optim.Optimizer]] = {
        "model": reference(),
        "factored": factored(),
        "tied": tied(),
    }
    for name, (model, optimizer) in trained.items():
        with ts.open_store(found[name], chunk_bytes=1024) as store:
            store.commit(1, model, optimizer)
    return found


def _everything(roots: dict[str, str]) -> dict[str, list[str]]:
    return {
        "tensors": _tensors_in_every_placement(roots["tensors"]),
        "model": _models_in_every_layout(roots["model"]),
        "factored": _factored_moments(roots["factored"]),
        "tied": _tied_weights(roots["tied"]),
        "refusals": _refusals(roots["factored"]),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_every_layout_is_filled_from_the_chunks_that_it_needs(roots: dict[str, Path], size: int) -> None:
    for found in run_ranks(_everything, size, {name: str(root) for name, root in roots.items()}):
        pending, meta = found.pop("refusals")
        assert "w: a DTensor with pending sums" in pending
        assert "w: a tensor on the meta device" in meta
        assert found == {"tensors": [], "model": [], "factored": [], "tied": []}
