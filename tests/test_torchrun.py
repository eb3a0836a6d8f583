"""The README's program for many ranks, as `torchrun` starts it."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import tailorstore as ts

README = (Path(__file__).parent.parent / "README.md").read_text()
[PROGRAM] = re.findall(r"```python train\.py\n(.*?)```", README, flags=re.DOTALL)


def torchrun(folder: Path, ranks: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "train.py"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(run: subprocess.Popen[str]) -> None:
    """Kill what `torchrun` has started, and itself: it gives each rank a session of its own."""
    if run.poll() is not None:
        return
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for pid in [*map(int, children), run.pid]:
        os.kill(pid, signal.SIGKILL)
    run.communicate()


def wait_for_commits(store: ts.Store, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(store.log() if store.branches() else []) < 4:
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_training_on_two_ranks_is_killed_and_goes_on_with_four(tmp_path: Path) -> None:
    # Long, and not endless: whoever kills this test leaves the ranks behind.
    long = PROGRAM.replace("while step < 200:", "while step < 2000:")
    assert long != PROGRAM
    (tmp_path / "train.py").write_text(long)
    first = torchrun(tmp_path, 2)
    with ts.open_store(tmp_path / "runs" / "ranks") as store:
        try:
            wait_for_commits(store, first)
        finally:
            kill(first)
        killed_at = store.log()[0].step
        assert killed_at >= 20
        ending = max(200, killed_at + 20)
        (tmp_path / "train.py").write_text(PROGRAM.replace("while step < 200:", f"while step < {ending}:"))
        second = torchrun(tmp_path, 4)
        try:
            said, _ = second.communicate(timeout=200)
        finally:
            kill(second)
        assert second.returncode == 0, said
        steps = [commit.step for commit in reversed(store.log())]
        assert steps == list(range(5, ending + 1, 5))
        assert store.verify().ok
        some_are_older = [layer for layer in store.layers() if layer.staleness]
        assert some_are_older
        losses = [commit.metrics["loss"] for commit in reversed(store.log())]
        assert losses[-1] < losses[0]
        store.gc(ts.KeepLast(1), grace=timedelta(0))
        assert store.verify().ok
