"""Commits and restores of a sharded model by several ranks, beside torch.distributed.checkpoint on the same model.

Each rank is a process of its own: ``python -m tailorstore.bench.ranks FOLDER GIGABYTES REPEAT``, with the variables
that ``torchrun`` sets.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.fsdp import fully_shard

import tailorstore as ts
from tailorstore.bench.local import MEBIBYTE, resident
from tailorstore.bench.report import Row, interleaved
from tailorstore.bench.state import Llama, training_state

TIMEOUT_SECONDS = 1800
SAME = 1.01
"""A process's memory varies by so much from run to run."""


def measure(folder: Path, *, gigabytes: float, repeat: int, say: Callable[[str], None], size: int = 2) -> list[Row]:
    """Measure FSDP2 on some ranks of this machine in a local folder, which is removed afterwards.

    Args:
        folder: where to write.
        gigabytes: size of the state of all ranks together.
        repeat: how often; medians are reported.
        say: is told what is going on.
        size: how many ranks.
    """
    say(f"{size} ranks: a sharded state of {gigabytes} GB")
    folder.mkdir(parents=True, exist_ok=True)
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    command = [sys.executable, "-m", __name__, str(folder), str(gigabytes), str(repeat)]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(meeting.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    try:
        ranks = [
            subprocess.Popen(command, env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)  # noqa: S603
            for rank in range(size)
        ]
        outputs = [rank.communicate(timeout=TIMEOUT_SECONDS)[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            msg = f"a rank failed ({[rank.returncode for rank in ranks]}); what it said is above"
            raise RuntimeError(msg)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _rows(json.loads(outputs[0].splitlines()[-1]), size)


def _rows(found: dict[str, float], size: int) -> list[Row]:
    what = f"{size} ranks, FSDP2, {found['gigabytes']:.2f} GB: "
    return [
        Row(f"{what}blocking commit", found["commit"], "s", "DCP save", found["save"], 0.6),
        Row(f"{what}wait of an asynchronous commit", found["wait"], "s", "DCP async_save", found["async_save"], 0.5),
        Row(f"{what}restore, digests checked", found["restore"], "s", "DCP load", found["load"], 0.6),
        *(
            Row(
                f"{what}peak memory of a rank, {ours.replace('_', ' ')}",
                found[f"memory_{ours}"] / MEBIBYTE,
                "MiB",
                f"DCP {theirs}",
                found[f"memory_{theirs}"] / MEBIBYTE,
                SAME,
            )
            for ours, theirs in (("commit", "save"), ("asynchronous_commit", "async_save"), ("restore", "load"))
        ),
    ]


class _Rank:
    """One rank's side."""

    def __init__(self, folder: Path, gigabytes: float) -> None:
        self.folder = folder
        self.rank = dist.get_rank()
        state = training_state(gigabytes)
        self.model: Llama = state.model
        self.gigabytes = state.nbytes / 1e9
        slots = {name: dict(state.optim.state[param]) for name, param in self.model.named_parameters()}
        for block in self.model.layers:
            fully_shard(block)
        fully_shard(self.model)
        self.optim = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for name, param in self.model.named_parameters():
            held = slots.pop(name)
            self.optim.state[param] = {
                "step": held["step"],
                **{slot: self._like(held[slot], param) for slot in ("exp_avg", "exp_avg_sq")},
            }
        del state
        gc.collect()
        self.store = ts.open_store(folder / "store", catalog=f"sqlite:///{folder}/catalog.sqlite")
        self.step = 0

    @staticmethod
    def _like(full: torch.Tensor, param: Any) -> torch.Tensor:  # noqa: ANN401 - a DTensor
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(full, param.device_mesh, param.placements)

    def flat(self) -> dict[str, torch.Tensor]:
        """Return the state as DCP wants it; the tensors themselves."""
        found: dict[str, torch.Tensor] = {}
        for name, param in self.model.named_parameters():
            found[name] = param.detach()
            found |= {f"{name}/{slot}": value for slot, value in self.optim.state[param].items()}
        return found

    def touch(self) -> None:
        """Change every tensor, as a training step does."""
        with torch.no_grad():
            for tensor in self.flat().values():
                local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                local.reshape(-1)[:1].add_(1e-3)

    def timed(self, run: Callable[[], Any]) -> float:
        """Return the seconds until the last rank is done."""
        gc.collect()
        dist.barrier()
        start = time.perf_counter()
        run()
        taken = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return taken.item()

    def memory(self, run: Callable[[], Any]) -> float:
        """Return the most memory that a rank takes while something runs, in bytes: its model, all buffers and torch."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        run()
        most = torch.tensor(float(resident("VmHWM")))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.item()

    def commit(self) -> float:
        self._next()
        return self.timed(lambda: self.store.commit(self.step, self.model, self.optim))

    def commit_behind(self) -> float:
        self._next()
        pending: list[ts.PendingCommit] = []
        taken = self.timed(lambda: pending.append(self.store.commit(self.step, self.model, self.optim, block=False)))
        pending[0].result()
        return taken

    def _next(self) -> None:
        self.touch()
        self.step += 1
        # Right before, as the other's old files go right before it writes anew.
        if self.rank == 0 and self.step > 2:
            self.store.gc(ts.KeepLast(1), grace=timedelta(0))

    def restore(self) -> None:
        with self.store.checkout() as checkpoint:
            checkpoint.restore(self.model, self.optim)

    def _anew(self, name: str) -> str:
        path = self.folder / name
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        dist.barrier()
        return str(path)

    def save(self) -> float:
        self.touch()
        path, flat = self._anew("dcp"), self.flat()
        return self.timed(lambda: save(flat, checkpoint_id=path))

    def save_behind(self) -> float:
        self.touch()
        path, flat = self._anew("dcp-async"), self.flat()
        pending: list[Any] = []
        taken = self.timed(lambda: pending.append(async_save(flat, checkpoint_id=path)))
        pending[0].result()
        return taken

    def load(self) -> None:
        load(self.flat(), checkpoint_id=str(self.folder / "dcp"))

    def run(self, repeat: int) -> dict[str, float]:
        """Measure everything, interleaved."""
        for first in (self.commit, self.save, self.commit_behind, self.save_behind):
            first()  # buffers are touched for the first time, process groups are made
        found = interleaved({"commit": self.commit, "save": self.save}, repeat)
        found |= interleaved({"wait": self.commit_behind, "async_save": self.save_behind}, repeat)
        found |= interleaved(
            {"restore": lambda: self.timed(self.restore), "load": lambda: self.timed(self.load)}, repeat
        )
        found["gigabytes"] = self.gigabytes
        found["memory_commit"] = self.memory(self.commit)
        found["memory_save"] = self.memory(self.save)
        found["memory_asynchronous_commit"] = self.memory(self.commit_behind)
        found["memory_async_save"] = self.memory(self.save_behind)
        found["memory_restore"] = self.memory(self.restore)
        found["memory_load"] = self.memory(self.load)
        return found


def main() -> None:
    """Measure as one rank; the first prints what all found."""
    folder, gigabytes, repeat = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo")
    rank = _Rank(folder, gigabytes)
    found = rank.run(repeat)
    if rank.rank == 0:
        print(json.dumps(found), flush=True)  # noqa: T201 - for the process that started this one
    rank.store.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
