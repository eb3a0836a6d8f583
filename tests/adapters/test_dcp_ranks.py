"""torch.distributed.checkpoint with a store behind it, on several ranks: FSDP2, threads, processes, torchtitan."""

import copy
import functools
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import tailorstore as ts
from tailorstore.adapters.dcp import TailorReader, TailorWriter
from tests.adapters.dcp_training import (
    Progress,
    Titan,
    differences,
    leaves,
    only,
    state_of,
    take_over,
    train,
    training,
)
from tests.kit.ranks import run_ranks

Expected = dict[str, Any]


def keep(folder: str, name: str, state: dict[str, Any]) -> None:
    """Keep the whole of a state dict for the other runs to compare with; collective."""
    found = dict(leaves(state))
    if dist.get_rank() == 0:
        torch.save(found, f"{folder}/{name}.pt")


def kept(folder: str | Path, name: str) -> Expected:
    found: Expected = torch.load(f"{folder}/{name}.pt")
    return found


def failure(call: Callable[[], object]) -> dict[int, str]:
    """Return rank → its error's class and message."""
    try:
        call()
    except CheckpointException as error:
        return {rank: f"{type(found).__name__}: {found}" for rank, (found, _) in error.failures.items()}
    raise AssertionError


@functools.cache
def saving_group() -> dist.ProcessGroup:
    """DCP's own words about a save must not meet the trainer's."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def begin_save(state: dict[str, Any], **options: Any) -> Future[Any]:
    saving = async_save(state, process_group=saving_group(), **options)
    assert isinstance(saving, Future)
    return saving


def save_on_two(folder: str) -> dict[str, Any]:
    said: dict[str, Any] = {}
    rank = dist.get_rank()
    net, optim = training(shard=True)
    train(net, optim, 2)
    with ts.open_store(f"{folder}/run") as store:

        def save(step: int, state: dict[str, Any]) -> ts.Commit:
            writer = TailorWriter(store, step)
            dcp_save(state, storage_writer=writer)
            assert writer.commit is not None
            return writer.commit

        said["saved"] = save(1, state_of(net, optim, Progress(1))).layers_written
        keep(folder, "first", state_of(net, optim))
        said["committed"] = store.commit(2, net, optim).layers_written

        # The state is copied when async_save returns: what the trainer does then is not in the commit.
        train(net, optim, 1)
        keep(folder, "third", state_of(net, optim))
        writer = TailorWriter(store, 3)
        saving = begin_save(state_of(net, optim, Progress(3)), storage_writer=writer)
        train(net, optim, 1)
        saving.result()
        said["async"] = writer.commit.layers_written if writer.commit else None

        keep(folder, "fourth", state_of(net, optim))
        said["part"] = save(4, only("blocks.1", state_of(net, optim))).layers_written

        state = state_of(net, optim)
        said["steps"] = failure(lambda: save(5 + rank, state))
        odd = {**state, **({"odd": {"callback": print}} if rank else {})}
        said["odd"] = failure(lambda: save(5, odd))
        said["alone"] = failure(lambda: lone_save(store, net)) if rank == 0 else {}
        said["head"] = [commit.step for commit in store.log()]
    said["process"] = save_by_process(folder, net, optim)
    with ts.open_store(f"{folder}/titan") as store:
        said["titan"] = titan_run(store, folder)
    return said


def lone_save(store: ts.Store, net: torch.nn.Module) -> None:
    with pytest.warns(UserWarning, match="disabled"):
        dcp_save({"model": {"w": torch.ones(2)}}, storage_writer=TailorWriter(store, 5), no_dist=True)


def save_by_process(folder: str, net: torch.nn.Module, optim: torch.optim.Optimizer) -> list[str]:
    keep(folder, "process", state_of(net, optim))
    opener = functools.partial(ts.open_store, f"{folder}/run", branch="process")
    begin_save(
        state_of(net, optim, Progress(9)),
        storage_writer=TailorWriter(opener, 9),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    ).result()
    with ts.open_store(f"{folder}/run", branch="process", ranks="alone", create=False) as store:
        return list(store.show().layers_written)


def titan_run(store: ts.Store, folder: str) -> list[int]:
    """A torchtitan loop: flat names, a state for each rank's data, plans that are kept, saves behind the trainer."""
    titan = Titan(*training(shard=True), Progress(), dist.get_rank(), dist.get_world_size())
    writer, planner = TailorWriter(store), DefaultSavePlanner(enable_plan_caching=True)
    saving = None
    for step in (1, 2, 3):
        titan.train(1)
        if saving is not None:
            saving.result()
        saving = begin_save(
            titan.states(), storage_writer=writer, checkpoint_id=f"outputs/checkpoint/step-{step}", planner=planner
        )
    assert saving is not None
    saving.result()
    keep(folder, "titan", titan.states())
    return [commit.step for commit in store.log()]


def load_on_four(folder: str) -> dict[str, Any]:
    said: dict[str, Any] = {}
    net, optim = training(shard=True)
    with ts.open_store(f"{folder}/run") as store:
        for name, ref, step in (("first", 1, 1), ("third", 3, 3), ("process", "process", 9)):
            progress = Progress()
            state = state_of(net, optim, progress)
            dcp_load(state, storage_reader=TailorReader(store, ref))
            assert progress.step == step
            state.pop("train")
            said[name] = differences(state, kept(folder, name))

        # What the store itself committed, by rule; and only a part of what a state dict asks for.
        state = state_of(net, optim)
        dcp_load(state, storage_reader=TailorReader(store, 2))
        said["committed"] = differences(state, kept(folder, "first"))
        state = {**state_of(net, optim), "unseen": {"w": torch.full((3,), 7.0)}}
        missing = failure(lambda: dcp_load(copy.copy(state), storage_reader=TailorReader(store)))
        said["missing"] = sorted({message.rpartition(": ")[2] for message in missing.values()})
        dcp_load(state, storage_reader=TailorReader(store), planner=DefaultLoadPlanner(allow_partial_load=True))
        expected = {
            name: kept(folder, "fourth" if ".blocks.1." in name else "third")[name] for name in kept(folder, "third")
        }
        said["part"] = differences(state, {**expected, "unseen.w": torch.full((3,), 7.0)})

        # The next step is that of a training that was never stopped and never sharded.
        take_over(net, optim, state)
        train(net, optim, 1)
        plain, plain_optim = training()
        with ts.open_store(f"{folder}/run", ranks="alone") as alone, alone.checkout() as checkpoint:
            checkpoint.restore(plain, plain_optim)
        train(plain, plain_optim, 1)
        said["next"] = far_apart(state_of(net, optim), state_of(plain, plain_optim))
    said["titan"] = load_titan(folder)
    said["grid"] = grid(folder)
    return said


def grid(folder: str) -> list[str]:
    """Save and load tensors that are cut along two dimensions, in two ways."""
    full = torch.arange(7.0 * 9).reshape(7, 9)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    cut = {"model": {"w": distribute_tensor(full, mesh, [Shard(0), Shard(1)])}}
    other = {"model": {"w": distribute_tensor(torch.zeros(7, 9), mesh, [Replicate(), Shard(0)])}}
    whole = {"model": {"w": torch.zeros(7, 9)}}
    with ts.open_store(f"{folder}/grid") as store:
        dcp_save(cut, storage_writer=TailorWriter(store, 1))
        dcp_load(other, storage_reader=TailorReader(store))
        dcp_load(whole, storage_reader=TailorReader(store))
        dcp_save(other, storage_writer=TailorWriter(store, 2))
        cut["model"]["w"].to_local().zero_()
        dcp_load(cut, storage_reader=TailorReader(store))
        written = [name for commit in store.log() for name in commit.layers_written]
    return [*written, *(name for state in (cut, other, whole) for name in differences(state, {"model.w": full}))]


def far_apart(state: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    found = dict(leaves(state))
    pairs = [(name, found[name], value) for name, value in leaves(expected) if isinstance(value, torch.Tensor)]
    return [name for name, value, other in pairs if not torch.allclose(value, other, rtol=1e-4, atol=1e-6)]


def load_titan(folder: str) -> list[Any]:
    titan = Titan(*training(shard=True), Progress(), rank=0, size=2)
    with ts.open_store(f"{folder}/titan") as store:
        states = titan.states()
        dcp_load(states, checkpoint_id="outputs/checkpoint/step-3", storage_reader=TailorReader(store))
        found = differences(states, kept(folder, "titan"))
        titan.load(states)
        return [found, titan.progress.step]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dcp")


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(save_on_two, 2, folder, timeout=250)


@pytest.fixture(scope="module")
def loaded(saved: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    assert saved
    return run_ranks(load_on_four, 4, folder, timeout=250)


LAYERS = ["blocks.0", "blocks.1", "embed", "gate"]


def test_shards_are_saved_once_and_to_the_bytes_that_the_store_commits(saved: list[dict[str, Any]]) -> None:
    for said in saved:
        assert said["saved"] == said["async"] == said["process"] == LAYERS
        assert said["committed"] == []
        assert said["part"] == ["blocks.1"]


def test_ranks_that_disagree_are_refused_before_anything_is_written(saved: list[dict[str, Any]]) -> None:
    for said in saved:
        assert len(said["steps"]) == len(said["odd"]) == 2
        for message in said["steps"].values():
            assert message.startswith("RanksDisagreeError")
            assert "step 5" in message
            assert "step 6" in message
        for message in said["odd"].values():
            assert message.startswith("ExtraStateError")
            assert "odd.callback" in message
        assert said["head"] == [4, 3, 2, 1]
    [alone] = saved[0]["alone"].values()
    assert "DCP saves on 1 ranks, and 2 use the store together" in alone


def test_other_numbers_of_ranks_load_it(loaded: list[dict[str, Any]]) -> None:
    for said in loaded:
        for name in ("first", "third", "process", "committed", "part", "next"):
            assert said[name] == [], name


def test_tensors_that_are_cut_along_two_dimensions_are_the_same_bytes_however_they_are_cut(
    loaded: list[dict[str, Any]],
) -> None:
    assert [said["grid"] for said in loaded] == [["w"]] * 4


def test_what_is_not_there_is_named_or_passed_over(loaded: list[dict[str, Any]]) -> None:
    for said in loaded:
        assert said["missing"] == ["unseen.w."]


def test_a_torchtitan_loop_needs_no_other_change(saved: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    assert [said["titan"] for said in saved] == [[3, 2, 1]] * 2
    assert [said["titan"] for said in loaded] == [[[], 3]] * 4


@pytest.mark.usefixtures("saved")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_loads_what_two_saved_and_saves_the_same_bytes(folder: Path) -> None:
    net, optim = training()
    with ts.open_store(folder / "run", branch="one") as store:
        state = state_of(net, optim)
        dcp_load(state, storage_reader=TailorReader(store, 3))
        assert differences(state, kept(folder, "third")) == []
        take_over(net, optim, state)
        store.branch("one", 3)
        writer = TailorWriter(store, 4)
        dcp_save(state_of(net, optim), storage_writer=writer)
        assert writer.commit is not None
        assert writer.commit.layers_written == ()
        assert store.verify().ok
