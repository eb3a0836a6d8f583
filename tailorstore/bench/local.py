"""Saving, restoring and what they cost a trainer, beside torch.save, safetensors and torch.distributed.checkpoint."""

import gc
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import tailorstore as ts
from tailorstore.bench.report import Row, interleaved
from tailorstore.bench.state import TrainingState, training_state

MEBIBYTE = 1 << 20


def measure(folder: Path, *, gigabytes: float, repeat: int, say: Callable[[str], None]) -> list[Row]:
    """Measure in a local folder; in tmpfs it is the software that is measured, not the disk.

    Args:
        folder: where to write; everything made there is removed.
        gigabytes: size of the state.
        repeat: how often; medians are reported.
        say: is told what is going on.
    """
    from safetensors.torch import load_file, save_file

    say(f"making {gigabytes} GB of training state")
    state = training_state(gigabytes)
    folder.mkdir(parents=True, exist_ok=True)
    bench = _Bench(folder, state)
    say("full saves")
    saves = interleaved(
        {
            "tailorstore": bench.commit,
            "torch.save": bench.anew("torch.pt", lambda path: torch.save(bench.nested(), path)),
            "safetensors": bench.anew("flat.safetensors", lambda path: save_file(state.flat, path)),
            "DCP": bench.anew("dcp", bench.dcp_save),
        },
        repeat,
    )
    say("restores")
    loads = interleaved(
        {
            "tailorstore": bench.timed(bench.restore),
            "torch.load": bench.timed(bench.torch_load),
            "safetensors": bench.timed(lambda: bench.copy_all(load_file(bench.path("flat.safetensors")))),
            "DCP": bench.timed(bench.dcp_load),
        },
        repeat,
    )
    say("commits behind the trainer's back")
    for _ in range(2):
        bench.commit_behind()  # the buffers are touched for the first time once in a run
    waits = interleaved({"wait": bench.commit_behind, "copy": bench.plain_copy}, repeat)
    say("commits in which nothing changed")
    still = interleaved({"unchanged": bench.commit_unchanged}, repeat)
    memory = bench.extra_memory()
    say("training while a commit is written")
    slow = bench.slowdown()
    size = f"{state.nbytes / 1e9:.2f} GB, {len(state.flat)} tensors"
    rows = [
        Row(f"full commit ({size})", saves["tailorstore"], "s", "torch.save", saves["torch.save"], 0.5),
        Row("full commit", saves["tailorstore"], "s", "safetensors save_file", saves["safetensors"], 1.0),
        Row("full commit", saves["tailorstore"], "s", "DCP save", saves["DCP"]),
        Row(
            "restore, digests checked",
            loads["tailorstore"],
            "s",
            "torch.load + load_state_dict",
            loads["torch.load"],
            0.25,
        ),
        Row(
            "restore, digests checked",
            loads["tailorstore"],
            "s",
            "safetensors load_file + copy",
            loads["safetensors"],
            0.8,
        ),
        Row("restore, digests checked", loads["tailorstore"], "s", "DCP load", loads["DCP"]),
        Row("wait of an asynchronous commit", waits["wait"], "s", "plain memory copy", waits["copy"], 1.5),
        Row(
            "commit in which nothing changed",
            still["unchanged"],
            "s",
            "full commit",
            saves["tailorstore"],
            0.25,
            note=f"layers: {bench.unchanged_layers}",
        ),
        Row("extra memory of a blocking commit", memory / MEBIBYTE, "MiB", target=256),
        Row(
            "training time lost to a commit written behind it",
            slow[0],
            "s",
            "blocking commit",
            saves["tailorstore"],
            note=f"a step takes {slow[1]:.3f} s",
        ),
    ]
    bench.close()
    return rows


class _Bench:
    def __init__(self, folder: Path, state: TrainingState) -> None:
        self.folder = folder
        self.state = state
        self.store = ts.open_store(folder / "store", catalog=f"sqlite:///{folder}/catalog.sqlite")
        self.step = 0
        self.unchanged_layers = 0
        self._host: dict[str, torch.Tensor] = {}

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def timed(self, run: Callable[[], Any]) -> Callable[[], float]:
        def measured() -> float:
            gc.collect()
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return measured

    def anew(self, name: str, run: Callable[[str], Any]) -> Callable[[], float]:
        """Time writing a file or folder that is not there: taking the old one away is not what is compared."""
        path = self.folder / name

        def measured() -> float:
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            return self.timed(lambda: run(str(path)))()

        return measured

    def _trim(self) -> None:
        """Keep one commit, so that tmpfs does not fill up."""
        if self.step > 1:
            self.store.gc(ts.KeepLast(1), grace=timedelta(0))

    def commit(self) -> float:
        self.state.touch()
        self.step += 1
        # Right before, as the others' old files go right before they write anew: on a virtual machine, memory that was
        # freed a while ago has gone back to the host, and is slow to come again.
        self._trim()
        return self.timed(lambda: self.store.commit(self.step, self.state.model, self.state.optim))()

    def commit_behind(self) -> float:
        self.state.touch()
        self.step += 1
        pending: list[ts.PendingCommit] = []
        taken = self.timed(
            lambda: pending.append(self.store.commit(self.step, self.state.model, self.state.optim, block=False))
        )()
        pending[0].result()
        self._trim()
        return taken

    def commit_unchanged(self) -> float:
        self.step += 1
        commits: list[ts.Commit] = []
        taken = self.timed(lambda: commits.append(self.store.commit(self.step, self.state.model, self.state.optim)))()
        self.unchanged_layers += len(commits[0].layers_written)
        return taken

    def plain_copy(self) -> float:
        flat = self.state.flat
        if not self._host:
            self._host = {name: torch.empty_like(tensor) for name, tensor in flat.items()}

        def copy() -> None:
            for name, tensor in flat.items():
                self._host[name].copy_(tensor)

        copy()  # the first touch of fresh pages is not what is compared
        return self.timed(copy)()

    def restore(self) -> None:
        with self.store.checkout() as checkpoint:
            checkpoint.restore(self.state.model, self.state.optim)

    def nested(self) -> dict[str, Any]:
        return {"model": self.state.model.state_dict(), "optim": self.state.optim.state_dict()}

    def torch_load(self) -> None:
        loaded = torch.load(self.path("torch.pt"), weights_only=True)
        self.state.model.load_state_dict(loaded["model"])
        self.state.optim.load_state_dict(loaded["optim"])

    def copy_all(self, loaded: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.state.flat.items():
            tensor.copy_(loaded[name])

    def dcp_save(self, path: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(self.state.flat, checkpoint_id=path, no_dist=True)

    def dcp_load(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(self.state.flat, checkpoint_id=self.path("dcp"), no_dist=True)

    def extra_memory(self) -> int:
        """Return how far the process's memory rises during a blocking commit, in bytes."""
        self.state.touch()
        self.step += 1
        self._host.clear()
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        self.store.commit(self.step, self.state.model, self.state.optim)
        extra = resident("VmHWM") - before
        self._trim()
        return extra

    def slowdown(self) -> tuple[float, float]:
        """Return seconds that training loses to a commit written behind it, and of a training step."""
        torch.manual_seed(1)
        model = torch.nn.Sequential(*(torch.nn.Linear(768, 768) for _ in range(8)))
        optim = torch.optim.AdamW(model.parameters())
        data = torch.randn(512, 768)

        def steps(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                optim.zero_grad()
                model(data).square().mean().backward()
                optim.step()
            return time.perf_counter() - start

        steps(3)
        count = max(5, int(2 / (steps(5) / 5)))  # two seconds: longer than a commit takes
        lost = []
        for _ in range(5):
            alone = steps(count)
            self.state.touch()
            self.step += 1
            pending = self.store.commit(self.step, self.state.model, self.state.optim, block=False)
            lost.append(steps(count) - alone)
            pending.result()
            self._trim()
        return sorted(lost)[len(lost) // 2], alone / count

    def close(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def resident(field: str) -> int:
    """Return a memory figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def default_folder() -> Path:
    """Return a folder in memory where there is one: then the software is measured and not the disk."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path.cwd()  # noqa: S108
    return base / f"tailorstore-bench-{os.getpid()}-{threading.get_ident() % 10000}"
