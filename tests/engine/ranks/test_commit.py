"""Commits that several ranks make: the same bytes whatever the layout, one mask, one publication, one error."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tailorstore as ts
from tailorstore.domain.errors import StorageFullError
from tailorstore.engine.ranks.commit import CollectiveCommitter
from tailorstore.engine.ranks.writing import CollectiveWriter
from tests.kit.layouts import SHAPES, emptied, in_layout, local, local_bits, plain, reference, train_step
from tests.kit.ranks import die, run_ranks


def digests(store: ts.Store, ref: str = "latest") -> dict[str, str]:
    with store.checkout(ref) as found:
        return {name: version.digest for name, version in found._composite.versions.items() if name != "@extra"}


def _commit_in_every_layout(url: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layout in SHAPES:
        model, optimizer = in_layout(layout)
        with ts.open_store(url, branch=f"{layout}-{dist.get_world_size()}", chunk_bytes=1024) as store:
            first = store.commit(5, model, optimizer, extra={"layout": layout}, metrics={"loss": float("nan")})
            again = store.commit(6, model, optimizer)
            later = store.commit(7, model, optimizer, mask=[], block=False).result(60)
            found[layout] = [first.id, list(again.layers_written), list(later.layers_written)]
    return found


def test_the_bytes_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/root"
    model, optimizer = reference()
    with ts.open_store(url, branch="alone", chunk_bytes=1024) as store:
        store.commit(5, model, optimizer)
        expected = digests(store)
    for size in (2, 4):
        ids = run_ranks(_commit_in_every_layout, size, url, timeout=240)
        assert all(found == ids[0] for found in ids)
        for layout, (_, again, later) in ids[0].items():
            assert (layout, again, later) == (layout, [], [])
            with ts.open_store(url, branch=f"{layout}-{size}") as store:
                assert digests(store) == expected, layout
                assert store.verify().ok


def _restore_in_every_layout(url: str, refs: list[str]) -> list[str]:
    wrong = []
    for layout in SHAPES:
        model, optimizer = in_layout(layout)
        expected = local_bits(model, optimizer)
        with ts.open_store(url) as store:
            for ref in refs:
                emptied(plain(model), optimizer)
                with store.checkout(ref) as found:
                    found.restore(model, optimizer)
                if local_bits(model, optimizer) != expected:
                    wrong.append(f"{ref} into {layout}")
    return wrong


def test_a_commit_of_any_layout_is_restored_into_any_other(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/root"
    model, optimizer = reference()
    with ts.open_store(url, branch="alone", chunk_bytes=1024) as store:
        store.commit(5, model, optimizer)
    run_ranks(_commit_in_every_layout, 4, url, timeout=240)
    run_ranks(_commit_in_every_layout, 2, url, timeout=240)
    refs = ["alone", *(f"{layout}-{size}" for layout in SHAPES for size in (2, 4))]
    assert run_ranks(_restore_in_every_layout, 4, url, refs, timeout=240) == [[]] * 4
    assert run_ranks(_restore_in_every_layout, 2, url, refs[:4], timeout=240) == [[]] * 2
    expected = local_bits(model, optimizer)
    for ref in refs:
        emptied(model, optimizer)
        with ts.open_store(url) as store, store.checkout(ref) as found:
            found.restore(model, optimizer)
        assert local_bits(model, optimizer) == expected


def _mistakes(folder: str) -> dict[str, str]:
    """Return what each mistake was told, on this rank."""
    rank = dist.get_rank()
    model, optimizer = in_layout("sharded")
    said: dict[str, str] = {}

    def trying(what: str, run: Callable[[], Any]) -> None:
        try:
            run()
        except ts.TailorError as error:
            said[what] = f"{type(error).__name__}: {error}"
        else:
            said[what] = "no error"

    with ts.open_store(f"{folder}/root") as store:
        store.commit(1, model, optimizer, extra={"rank": rank})
        trying("step", lambda: store.commit(2 + rank, model, optimizer))
        trying("mask", lambda: store.commit(2, model, optimizer, mask=["head"] if rank else None))
        trying("strategy", lambda: store.commit(2, model, optimizer, mask=ts.strategies.TopK(1 + rank)))
        trying("unknown layer", lambda: store.commit(2, model, optimizer, mask=["nose"]))
        trying("one rank's extra", lambda: store.commit(2, model, optimizer, extra=object() if rank else None))
        trying("old step", lambda: store.commit(1, model, optimizer))
        other = {"head.weight": torch.zeros(3 + rank, 3)}
        trying("shapes", lambda: store.commit(2, other))
        tail = nn.Linear(3, 3)
        fully_shard(tail, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        longer = nn.ModuleDict({"tail": tail} if rank else {"head": nn.Linear(3, 3)})
        trying("models", lambda: store.commit(2, longer))
        head = nn.Linear(3, 3)
        nn.init.constant_(head.weight, rank)
        apart = nn.ModuleDict({"head": head})
        trying("replicas", lambda: store.commit(2, apart))
        said["head"] = str(store.checkout().step)
    elsewhere = ts.open_store(f"{folder}/root-{rank}")
    trying("other store", lambda: elsewhere.commit(1, model))
    elsewhere.close()
    with ts.open_store("memory://place/run") as nowhere:
        trying("memory", lambda: nowhere.commit(1, model))
    with ts.open_store(f"{folder}/root", ranks="alone", branch=f"alone-{rank}") as own:
        trying("alone and sharded", lambda: own.commit(1, model))
        said["alone"] = str(own.commit(1, {"w": torch.zeros(2)}).step)
    return said


def test_mistakes_are_told_to_all_ranks_and_nothing_is_written(tmp_path: Path) -> None:
    first, second, third = run_ranks(_mistakes, 3, tmp_path, timeout=120)
    for what in (
        "step",
        "mask",
        "strategy",
        "shapes",
        "replicas",
        "other store",
        "memory",
        "unknown layer",
        "old step",
    ):
        assert first[what] == second[what] == third[what], what
    assert "step: 2 on rank 0; 3 on rank 1; 4 on rank 2" in first["step"]
    assert first["mask"].startswith("RanksDisagreeError")
    assert "mask: None on rank 0; ['head'] on ranks 1, 2" in first["mask"]
    assert first["strategy"].startswith("RanksDisagreeError")
    assert first["unknown layer"].startswith("MaskError")
    assert first["one rank's extra"].startswith("ExtraStateError")
    assert "rank 1" in first["one rank's extra"]
    assert first["old step"].startswith("StepOrderError")
    assert "[3, 3] on rank 0" in first["shapes"]
    assert "[4, 3] on rank 1" in first["shapes"]
    assert "'head.weight' on ranks 0 and 1" in first["replicas"]
    assert first["models"] == second["models"]
    assert "different models" in first["models"]
    assert "in the model of rank 1, 2;" in first["models"]
    assert "different stores" in first["other store"]
    assert first["memory"].startswith("RanksDisagreeError")
    assert first["head"] == "1"
    assert first["alone"] == "1"
    assert first["alone and sharded"].startswith("InvalidInputError")
    with ts.open_store(tmp_path / "root") as store:
        assert [commit.step for commit in store.log("main")] == [1]
        assert store.verify().ok


def _stages(url: str) -> list[Any]:
    """Commit a pipeline of two stages, each on two ranks, and restore each stage's part of it."""
    rank = dist.get_rank()
    model, optimizer = reference()
    stage = nn.Module()
    if rank < 2:
        stage.embed, stage.blocks = model.embed, nn.ModuleDict({"0": model.blocks[0], "1": model.blocks[1]})
    else:
        stage.blocks, stage.norm, stage.head = nn.ModuleDict({"2": model.blocks[2]}), model.norm, model.head
    own = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    for param in stage.parameters():
        own.state[param] = optimizer.state[param]
    expected = local_bits(stage, own)
    with ts.open_store(url, chunk_bytes=1024) as store:
        store.commit(5, stage, own, extra={"rank": rank}, mask=ts.strategies.Budget(bytes_per_commit=10**9))
        store.commit(6, stage, own, extra={"rank": rank}, mask=ts.strategies.Parity())
        emptied(stage, own)
        with store.checkout() as found:
            extra = found.restore(stage, own)
            layers = sorted(found.sources)
    return [local_bits(stage, own) == expected, extra, layers]


def test_stages_of_a_pipeline_make_one_checkpoint(tmp_path: Path) -> None:
    found = run_ranks(_stages, 4, f"file://{tmp_path}/root", timeout=120)
    layers = ["@extra", "blocks.0", "blocks.1", "blocks.2", "embed", "head", "norm"]
    assert found == [[True, {"rank": rank}, layers] for rank in range(4)]


def _light(url: str) -> list[Any]:
    model, optimizer = in_layout("sharded")
    settings = ts.LightSettings(exact_below=16)
    found: list[Any] = []
    with ts.open_store(url, light=settings) as store:
        store.commit(1, model, optimizer)
        for step in (2, 3):
            with torch.no_grad():
                for param in plain(model).parameters():
                    local(param).mul_(1.001)
            pending = store.commit(step, model, optimizer, mask=ts.strategies.Light(), block=False)
            pending.result(60)
        expected = {name: local(value).double() for name, value in plain(model).state_dict().items()}
        with store.checkout() as checkpoint:
            found.append(dict(checkpoint.fidelity))
            emptied(plain(model), optimizer)
            checkpoint.restore(model, optimizer)
        worst = max(
            float(
                (local(value).double() - expected[name]).nan_to_num().norm()
                / (expected[name].nan_to_num().norm() + 1e-9)
            )
            for name, value in plain(model).state_dict().items()
        )
        found.append(worst < 0.01)
        found.append(store.updates().steps.tolist() if dist.get_rank() == 0 else None)
    return found


def test_light_versions_of_a_sharded_model_are_those_of_one_process(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/root"
    found = run_ranks(_light, 2, url, timeout=120)
    assert found[0][0] == found[1][0]
    assert found[0][0]["blocks.0"] == "light"
    assert found[0][1]
    assert found[1][1]
    model, optimizer = reference()
    with ts.open_store(url, branch="alone", light=ts.LightSettings(exact_below=16)) as store:
        store.commit(1, model, optimizer)
        for step in (2, 3):
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(1.001)
            store.commit(step, model, optimizer, mask=ts.strategies.Light())
        alone = {name: (d.light, d.error) for name, d in store.checkout().documents().items()}
    with ts.open_store(url) as store:
        together = {name: (d.light, d.error) for name, d in store.checkout("main").documents().items()}
        assert store.verify().ok
    assert together == alone


def _death(url: str, when: str) -> list[str]:
    """Kill rank 1 in the middle of a commit; return what the others were told, and how long that took."""
    model, optimizer = in_layout("sharded")
    said = []
    with ts.open_store(url, ranks_timeout=timedelta(seconds=20)) as store:
        store.commit(1, model, optimizer)
        if dist.get_rank() == 1:
            arm(when)
        with torch.no_grad():
            for param in plain(model).parameters():
                local(param).add_(1)
        began = time.monotonic()
        try:
            store.commit(2, model, optimizer)
        except ts.TailorError as error:
            said += [type(error).__name__, str(time.monotonic() - began < 25)]
        try:
            store.commit(3, model, optimizer)
        except ts.TailorError as error:
            said.append(type(error).__name__)
    return said


def arm(when: str) -> None:
    """Let this process die the next time it comes to some point of a commit."""
    owner, name = {
        "describing": (CollectiveCommitter, "_agree"),
        "writing": (CollectiveWriter, "_put"),
        "sealing": (CollectiveWriter, "_seal"),
    }[when]
    setattr(owner, name, lambda *_args: die())


@pytest.mark.parametrize("when", ["describing", "writing", "sealing"])
def test_a_rank_that_dies_in_a_commit_leaves_the_old_head_and_no_rank_waiting(tmp_path: Path, when: str) -> None:
    url = f"file://{tmp_path}/root"
    found = run_ranks(_death, 3, url, when, timeout=120, dying=[1])
    assert found == [["RankLostError", "True", "RankLostError"], None, ["RankLostError", "True", "RankLostError"]]
    with ts.open_store(url) as store:
        assert [commit.step for commit in store.log("main")] == [1]
        assert store.verify().ok
        store.gc(grace=timedelta(0))
        assert store.verify().ok
    assert run_ranks(_commit_again, 2, url, timeout=120) == [2, 2]


def _commit_again(url: str) -> int:
    model, optimizer = in_layout("sharded")
    with ts.open_store(url) as store:
        with store.checkout() as found:
            found.restore(model, optimizer)
        return store.commit(2, model, optimizer).step


def _failing(url: str) -> list[Any]:
    """Let one rank's storage fail in the middle of writing."""
    model, optimizer = in_layout("sharded")
    said = []
    with ts.open_store(url) as store:
        store.commit(1, model, optimizer)
        if dist.get_rank() == 1:
            refuse = StorageFullError("no space is left")

            def put(*_args: Any) -> None:
                raise refuse

            kept = CollectiveWriter._put
            setattr(CollectiveWriter, "_put", put)  # noqa: B010 - mypy does not like it otherwise
        with torch.no_grad():
            for param in plain(model).parameters():
                local(param).add_(1)
        for block in (True, False):
            try:
                found = store.commit(2, model, optimizer, block=block)
                if isinstance(found, ts.PendingCommit):
                    found.result(60)
            except ts.TailorError as error:
                said.append(f"{type(error).__name__}: {error}")
        if dist.get_rank() == 1:
            setattr(CollectiveWriter, "_put", kept)  # noqa: B010
        said.append(str(store.commit(2, model, optimizer).step))
    return said


def test_storage_that_fails_on_one_rank_fails_the_commit_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/root"
    first, second = run_ranks(_failing, 2, url, timeout=120)
    assert first == second
    assert first[0].startswith("StorageFullError: ")
    assert "rank 1" in first[0]
    assert first[1:] == [first[0], "2"]
    with ts.open_store(url) as store:
        assert store.verify().ok
        ids = {commit.id for commit in store.log("main")}
    assert {path.name for path in (tmp_path / "root" / "layers").glob("*/*")} <= ids


def _behind(url: str) -> list[Any]:
    """Train on, with collectives of the trainer's own, while commits are written."""
    model, optimizer = in_layout("sharded")
    losses = []
    with ts.open_store(url) as store:
        for step in range(1, 6):
            losses.append(train_step(model, optimizer, step))
            pending = store.commit(step, model, optimizer, block=False)
            for _ in range(20):
                dist.all_reduce(torch.ones(100))
        last = pending.result(60)
        expected = local_bits(model, optimizer)
        emptied(plain(model), optimizer)
        with store.checkout() as found:
            found.restore(model, optimizer)
        same = local_bits(model, optimizer) == expected
    return [last.step, same, len(losses)]


def test_commits_behind_the_trainers_back_do_not_meet_its_collectives(tmp_path: Path) -> None:
    found = run_ranks(_behind, 2, f"file://{tmp_path}/root", timeout=120)
    assert [one[:2] for one in found] == [[5, True]] * 2


def _extras(url: str) -> list[Any]:
    model, optimizer = in_layout("sharded")
    rank, size = dist.get_rank(), dist.get_world_size()
    with ts.open_store(url) as store:
        store.commit(size, model, optimizer, extra={"rank": rank, "seen": torch.full((2,), rank)})
        with store.checkout("2") as found:
            own = found.restore(model, optimizer)
            return [own["rank"], own["seen"].tolist(), [one["rank"] for one in found.extras]]


def test_each_rank_gets_its_own_extra_back_and_other_numbers_of_ranks_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/root"
    assert run_ranks(_extras, 2, url) == [[0, [0, 0], [0, 1]], [1, [1, 1], [0, 1]]]
    assert run_ranks(_extras, 3, url) == [[0, [0, 0], [0, 1]]] * 3
    model, optimizer = reference()
    with ts.open_store(url) as store, store.checkout("2") as found:
        assert found.restore(model, optimizer)["rank"] == 0
    assert "committed by 2 ranks, each with extra state of its own, and is restored by 1" in caplog.text
