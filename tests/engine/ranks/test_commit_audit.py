"""What could lose a checkpoint of many ranks, or leave them of different minds: each looked for once."""

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import tailorstore as ts
from tailorstore.domain.errors import AccessDeniedError, StorageFullError
from tailorstore.engine.ranks import commit as committing
from tailorstore.engine.ranks import writing
from tailorstore.engine.ranks.writing import CollectiveWriter
from tailorstore.engine.tensors.shards import Part, Sharded
from tailorstore.storage.local import LocalObjects
from tests.kit.ranks import run_ranks

PATIENCE = timedelta(minutes=1)


def told(run: Callable[[], Any]) -> str:
    """Return the error or interrupt that something raised, or ``""``."""
    try:
        run()
    except (ts.TailorError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def layers(step: int = 0) -> dict[str, torch.Tensor]:
    """Return a model of four layers, the same on all ranks."""
    return {f"{name}.weight": torch.full((6, 4), float(step)) for name in "abcd"}


class Faults:
    """Lets a function of this process raise an error, if there is one, while the block runs."""

    def __init__(self, owner: object, name: str, error: BaseException | None) -> None:
        self._owner, self._name, self._error = owner, name, error
        self._kept: Any = None

    def __enter__(self) -> None:
        self._kept = getattr(self._owner, self._name)
        error = self._error
        if error is None:
            return

        def fail(*_args: Any, **_options: Any) -> None:
            raise error

        setattr(self._owner, self._name, fail)

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, self._kept)


# --- What the callers of two ranks do


def _extra_that_changes(url: str) -> Any:
    """Change what was passed as extra state, and a learning rate, as soon as commit has returned."""
    moving, rate = torch.zeros(1 << 20), torch.tensor([0.5])
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0]["warmup"] = rate
    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        pending = store.commit(1, {"weight": weight}, optimizer, extra={"moving": moving}, block=False)
        moving += 1
        rate += 1
        pending.result(60)
        with store.checkout() as found:
            groups: Any = found.optim_state_dict()
            return [float(found.extra["moving"].max()), float(groups["param_groups"][0]["warmup"])]


def _error_that_one_rank_has_seen(url: str) -> Any:
    """Look at a failed commit's error on one rank only; return what the next commits were told."""
    said = []
    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        store.commit(1, layers(1))
        with Faults(CollectiveWriter, "_put", StorageFullError("no space")):
            pending = store.commit(2, layers(2), block=False)
            pending.wait()
        if dist.get_rank() == 0:
            assert "no space" in told(pending.result)
        said.append(told(lambda: store.commit(3, layers(3))))
        said.append(told(lambda: store.commit(3, layers(3))))
        said.append(str(store.checkout().step))
    return said


def _failure_after_all_is_told(url: str) -> Any:
    """Let rank 1 fail, and be interrupted, when the coordinator has all; return what is said, and whether all is whole.

    Who publishes does so in the same moment.
    """
    said: list[Any] = []
    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        store.commit(1, layers(1))
        for step, error in ((2, MemoryError("no memory")), (3, KeyboardInterrupt())):
            with Faults(writing, "sealed_from_json", error if dist.get_rank() == 1 else None):
                said.append(told(lambda step=step: store.commit(step, layers(step))).partition(":")[0])  # type: ignore[misc]
        store.commit(4, {**layers(3), "a.weight": torch.ones(6, 4)})
        found = store.checkout()
        said += [found.step, [commit.step for commit in store.log()], store.verify().ok]
    return said


def _announced_in_vain(url: str) -> Any:
    """Fail on rank 1 when the commit is announced; return whether the coordinator still holds the claim."""
    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        store.commit(1, layers(1))
        with Faults(committing, "CollectivePrepared", MemoryError("no memory") if dist.get_rank() == 1 else None):
            first = told(lambda: store.commit(2, layers(2)))
        return [first, dist.get_rank() == 0 and bool(store._keeper._held), store.commit(2, layers(2)).step]


def _masks(url: str) -> Any:
    """Pass masks that can be looked at once, and some that are none."""
    written: list[Any] = []

    def once() -> Iterator[str]:
        yield "a"
        yield "b"

    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        store.commit(1, layers(1))
        written.append(list(store.commit(2, layers(2), mask=once()).layers_written))
        wrong: Any = 5
        written.append(told(lambda: store.commit(3, layers(3), mask=wrong)).partition(":")[0])
        wrong = ts.strategies.TopK
        written.append(told(lambda: store.commit(3, layers(3), mask=wrong)).partition(":")[0])
    return written


def _another_model(url: str) -> Any:
    """Come back with a model of other tensors, and of other shapes."""
    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        store.commit(1, layers(1))
    said = []
    for other in ({"a.bias": torch.zeros(4)}, {"a.weight": torch.zeros(6, 5)}, {"a.weight": torch.zeros(7, 4)}):
        with ts.open_store(url, ranks_timeout=PATIENCE) as store:
            params = {name: nn.Parameter(value) for name, value in {**layers(1), **other}.items()}
            said.append(told(lambda store=store, params=params: store.commit(2, params)))  # type: ignore[misc]
    return said


def _another_writer(url: str) -> Any:
    """Let somebody else write, and one rank fail at the next commit; then commit what has not moved since one's own."""
    model = layers(1)
    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        store.commit(1, model)
        if dist.get_rank() == 0:
            with ts.open_store(url, ranks="alone") as other:
                other.commit(2, layers(2))
        dist.barrier()
        failed = told(lambda: store.commit(3, model, extra=object() if dist.get_rank() else None))
        commit = store.commit(3, model, mask=ts.strategies.Threshold(0.0))
        with store.checkout() as found:
            same = all(torch.equal(found.model[name].load(), value) for name, value in model.items())
    return [failed.partition(":")[0], len(commit.layers_written), same]


def _another_spokesman(url: str) -> Any:
    """Commit a layer that another rank then measures, and come back to the first: it looks as it did to that one."""

    def params(**values: float) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": nn.Parameter(torch.full((6, 4), value)) for name, value in values.items()}

    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        store.commit(1, params(a=1.0, b=1.0, c=1.0))
        store.commit(2, params(b=2.0), partial=True)
        commit = store.commit(3, params(a=1.0, b=1.0, c=1.0), mask=ts.strategies.Threshold(0.0))
    return list(commit.layers_written)


def _take_over(url: str) -> Any:
    """Rebuild the catalog on the coordinator between two commits."""
    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        store.commit(1, layers(1))
        if dist.get_rank() == 0:
            store.rebuild_catalog()
        dist.barrier()
        return [store.commit(2, {**layers(1), "a.weight": torch.ones(6, 4) * 3}).layers_written, store.verify().ok]


def _local_slots(url: str) -> Any:
    """Commit slots that are plain tensors of each rank's own shard: equal shapes, other values."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    said = []
    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        optimizer.state[weight] = {"scale": torch.arange(4.0) + dist.get_rank()}
        said.append(told(lambda: store.commit(1, {"weight": weight}, optimizer)))
        optimizer.state[weight] = {"scale": torch.arange(4.0)}
        said.append(told(lambda: store.commit(1, {"weight": weight}, optimizer)))
    return said


class Talkative(nn.Module):
    """Has extra state of another size on each rank, in a layer of its own without tensors too."""

    def __init__(self, *, inner: bool = True) -> None:
        super().__init__()
        self.quiet = Talkative(inner=False) if inner else None
        if inner:
            self.scale = nn.Parameter(torch.ones(3))

    def get_extra_state(self) -> Any:
        if self.quiet is None:
            return {"seen": 3}
        rank = dist.get_rank() if dist.is_initialized() else 0
        return {"history": torch.arange(3 + rank), f"rank {rank}": rank}

    def set_extra_state(self, state: Any) -> None:
        self.given = state


def _extra_state_of_modules(url: str) -> Any:
    model = Talkative()
    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        store.commit(1, model)
        again = store.commit(2, model)
        with store.checkout() as found:
            found.restore(model)
    return [again.layers_written, model.given["history"].tolist(), sorted(model.given)]


def odd_tensors() -> dict[str, torch.Tensor]:
    """Return parameters of every awkward kind, the same wherever it is called."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(60, 5, dtype=torch.complex64, generator=generator)
    raw = torch.randint(0, 256, (700, 3), dtype=torch.uint8, generator=generator)
    found = {
        "conj": numbers.conj(),
        "scalar_conj": numbers[0, 0].conj(),
        "negative": numbers.conj().imag,
        "turned": numbers.t(),
        "scalar": torch.tensor(-0.0),
        "empty": torch.zeros(0, 4),
        "empty_inside": torch.zeros(3, 0),
        "bool": raw > 100,
        "fp8": raw.view(torch.float8_e4m3fn),
        "fp8_turned": raw.view(torch.float8_e5m2).t(),
        "spread": torch.arange(3.0).expand(4, 3),
        "stepped": torch.arange(2000, dtype=torch.int16)[::3],
        "nan": torch.tensor([0x7FC00001, -1, -(2**31), 1], dtype=torch.int32).view(torch.float32),
    }
    return {name: nn.Parameter(value, requires_grad=False) for name, value in found.items()}


def _odd_tensors(url: str) -> Any:
    said = []
    with ts.open_store(url, branch="copies", chunk_bytes=1024, ranks_timeout=PATIENCE) as store:
        said.append(told(lambda: store.commit(1, odd_tensors(), block=False).result(60)))
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    held: dict[str, Any] = {}
    for name, value in odd_tensors().items():
        if name in ("empty", "empty_inside"):
            held[name] = distribute_tensor(value.detach(), mesh, [Shard(0)])
        elif value.dim() == 0 or name in ("spread", "fp8", "fp8_turned"):
            rows = value.shape[0] if value.dim() else 0
            # One has it all, the other a part of the same.
            boxes = [[(0, size) for size in value.shape], [(rows // 2, rows), *((0, size) for size in value.shape[1:])]]
            box = tuple(boxes[rank if value.dim() else 0])
            part = value.detach()[tuple(slice(*ends) for ends in box)]
            held[name] = Sharded(tuple(value.shape), value.dtype, (Part(box, part),), trained=True)
        else:
            rows = value.shape[0]
            box = ((rows // 3, rows) if rank else (0, rows // 3), *((0, size) for size in value.shape[1:]))
            part = value.detach()[tuple(slice(*ends) for ends in box)]
            held[name] = Sharded(tuple(value.shape), value.dtype, (Part(box, part),), trained=True)
    held = {name: nn.Parameter(v, requires_grad=False) if isinstance(v, DTensor) else v for name, v in held.items()}
    for block in (True, False):
        with ts.open_store(url, branch=f"parts-{block}", chunk_bytes=1024, ranks_timeout=PATIENCE) as store:
            said.append(told(lambda store=store, block=block: _waited(store.commit(1, held, block=block))))  # type: ignore[misc]
    return said


def _waited(found: Any) -> None:
    if isinstance(found, ts.PendingCommit):
        found.result(60)


def _groups(url: str) -> Any:
    """Let ranks 0 and 2 share a store, twice at once, and rank 1 have one of its own; close them in turn."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    mine: Any = groups[rank % 2]
    name = "pair" if rank != 1 else "alone"
    first = ts.open_store(url, branch=f"{name}-1", ranks=mine, ranks_timeout=PATIENCE)
    second = ts.open_store(url, branch=f"{name}-2", ranks=mine, ranks_timeout=PATIENCE)
    pending = [
        store.commit(step, layers(sign * step), block=False)
        for step in (1, 2)
        for store, sign in ((first, 1), (second, -1))
    ]
    steps = [one.result(60).step for one in pending]
    with second.checkout() as found:
        lowest = float(found.model["a.weight"].load().min())
    if rank == 0:
        time.sleep(0.5)
    second.commit(3, layers(3))
    second.close()
    last = first.commit(3, layers(3), mask=["a"])
    first.close()
    return [steps, lowest, last.layers_written, told(lambda: first.commit(4, layers(4))).partition(":")[0]]


def _root_that_can_only_be_read(url: str) -> Any:
    """Check out what one may not write to."""
    with ts.open_store(url, ranks_timeout=PATIENCE) as store:
        store.commit(1, layers(1))
    refused = AccessDeniedError("only reading is allowed")
    with ts.open_store(url, ranks_timeout=PATIENCE) as store, Faults(LocalObjects, "put", refused):
        model = layers(0)
        with store.checkout() as found:
            found.restore(model)
        return [float(model["a.weight"].min()), told(lambda: store.commit(2, layers(2))).partition(":")[0]]


SCENES = (
    _extra_that_changes,
    _error_that_one_rank_has_seen,
    _failure_after_all_is_told,
    _announced_in_vain,
    _masks,
    _another_model,
    _another_writer,
    _another_spokesman,
    _take_over,
    _local_slots,
    _extra_state_of_modules,
    _odd_tensors,
    _root_that_can_only_be_read,
)


def _scenes(folder: str) -> dict[str, Any]:
    return {scene.__name__: scene(f"file://{folder}/{scene.__name__}") for scene in SCENES}


def test_no_rank_is_left_behind_and_no_checkpoint_is_lost(tmp_path: Path) -> None:
    first, second = run_ranks(_scenes, 2, tmp_path)
    assert first["_extra_that_changes"] == second["_extra_that_changes"] == [0.0, 0.5]

    seen, then, step = first["_error_that_one_rank_has_seen"]
    assert [seen, then, step] == second["_error_that_one_rank_has_seen"]
    assert seen.startswith("StorageFullError: rank 1, while ending the commit before")
    assert [then, step] == ["", "3"]

    assert first["_failure_after_all_is_told"] == ["UnavailableError", "UnavailableError", 4, [4, 3, 2, 1], True]
    assert second["_failure_after_all_is_told"] == ["UnavailableError", "KeyboardInterrupt", 4, [4, 3, 2, 1], True]

    error, claimed, step = first["_announced_in_vain"]
    assert error == "UnavailableError: rank 1, while preparing a commit: MemoryError: no memory"
    assert [claimed, step] == [False, 2]

    assert first["_masks"] == second["_masks"] == [["a", "b"], "MaskError", "MaskError"]

    assert first["_another_model"] == second["_another_model"]
    new, wider, longer = first["_another_model"]
    assert "tensor 'a.bias' is new in layer 'a'" in new
    assert "tensor 'a.weight' has shape (6, 5), was (6, 4)" in wider
    assert "tensor 'a.weight' has shape (7, 4), was (6, 4)" in longer

    assert first["_another_writer"] == second["_another_writer"] == ["ExtraStateError", 4, True]
    assert first["_another_spokesman"] == ["b"]
    assert first["_take_over"] == second["_take_over"] == [["a"], True]

    differ, same = first["_local_slots"]
    assert [differ, same] == second["_local_slots"]
    assert "'weight (scale)' on ranks 0 and 1" in differ
    assert same == ""

    assert first["_extra_state_of_modules"] == second["_extra_state_of_modules"]
    assert first["_extra_state_of_modules"] == [[], [0, 1, 2], ["history", "rank 0"]]

    assert first["_root_that_can_only_be_read"] == [1.0, "AccessDeniedError"]

    assert first["_odd_tensors"] == second["_odd_tensors"] == ["", "", ""]
    found = {}
    with ts.open_store(tmp_path / "_odd_tensors", branch="alone", chunk_bytes=1024) as store:
        store.commit(1, odd_tensors())
        for branch in ("alone", "copies", "parts-True", "parts-False"):
            with store.checkout(branch) as checkpoint:
                versions = checkpoint._composite.versions
                found[branch] = {name: version.digest for name, version in versions.items() if name != "@extra"}
    assert len(found["alone"]) == len(odd_tensors())
    assert [branch for branch in found if found[branch] != found["alone"]] == []


def test_groups_of_ranks_have_stores_of_their_own_and_several_at_once(tmp_path: Path) -> None:
    found = run_ranks(_groups, 3, f"file://{tmp_path}/root")
    assert found == [[[1, 1, 2, 2], -2.0, ["a"], "ClosedError"]] * 3
    with ts.open_store(tmp_path / "root") as store:
        assert {branch.name: branch.step for branch in store.branches()} == {
            f"{name}-{number}": 3 for name in ("pair", "alone") for number in (1, 2)
        }
        assert store.verify().ok
