"""Runs a function of a test on several ranks: real processes, joined by torch.distributed.

    def rows_of(rank_count: int) -> list[int]: ...     # at the top of a test module; JSON in, JSON out

    assert run_ranks(rows_of, 2, 65) == [[0, 33], [33, 65]]

Each rank is a program of its own, ``python -m tests.kit.ranks DIRECTORY RANK``, set up as ``torchrun`` does it: the
starting process holds the store at which ranks meet, so that no rank is special to the others' survival. Warnings are
errors there too, from the call of the function on. It ends with the process that started it, however that ends.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

CHECKOUT: Final = Path(__file__).parent.parent.parent
HOST: Final = "127.0.0.1"

PATIENCE_SECONDS: Final = 15.0
"""How long the other ranks may go on after one has failed, so that they too can say what they saw."""

_POLL_SECONDS: Final = 0.02
_DUMP_SECONDS: Final = 1.0
_TAIL_LINES: Final = 40


class RanksFailedError(Exception):
    """A rank raised, died or did not end in time; the message has the end of what each of them said."""


def run_ranks(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 120.0,
    dying: Collection[int] = (),
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call ``function(*args)`` on `size` ranks, in a gloo world of one host, and return what each of them returned.

    Args:
        function: defined at the top of a module.
        size: how many ranks.
        args: what JSON can hold; a `Path` arrives as text.
        timeout: seconds until those that have not ended are killed.
        dying: ranks that kill themselves (``die()``): their result is None, and it is a failure if one lives.
        env: what the ranks' environment has beyond this one's.

    Raises:
        RanksFailedError: some rank did not do what it should. No process is left.
    """
    meeting = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    spec = {
        "module": function.__module__,
        "function": function.__qualname__,
        "args": args,
        "size": size,
        "port": meeting.port,
    }
    with tempfile.TemporaryDirectory(prefix="ts-ranks-") as name:
        directory = Path(name)
        (directory / "spec").write_text(json.dumps(spec, default=_text_of))
        with contextlib.ExitStack() as running:
            ranks = [running.enter_context(_started(directory, rank, env or {})) for rank in range(size)]
            late = _wait(ranks, time.monotonic() + timeout, dying)
        return _results(directory, ranks, dying, late)


def die() -> None:
    """End this process as a machine that fails does: at once, and without a word to the others."""
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _text_of(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    msg = f"{type(value).__name__} is not JSON"
    raise TypeError(msg)


@contextlib.contextmanager
def _started(directory: Path, rank: int, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    # Torch asks for the interface by the host's name otherwise, which does not resolve everywhere.
    defaults = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    with (directory / f"{rank}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.ranks", directory, str(rank)],
            cwd=CHECKOUT,
            env={**os.environ, **defaults, **env},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # The whole group: what a rank started goes with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float, dying: Collection[int]) -> list[int]:
    """Return which ranks have not ended in time (or soon after another failed), once their logs have their stacks."""
    failed = False
    while time.monotonic() < deadline:
        states = [process.poll() for process in ranks]
        if None not in states:
            return []
        if not failed and any(state for rank, state in enumerate(states) if rank not in dying):
            failed = True
            deadline = min(deadline, time.monotonic() + PATIENCE_SECONDS)
        time.sleep(_POLL_SECONDS)
    late = [rank for rank, process in enumerate(ranks) if process.poll() is None]
    for rank in late:
        ranks[rank].send_signal(signal.SIGUSR1)
    time.sleep(_DUMP_SECONDS)
    return late


def _results(
    directory: Path, ranks: list[subprocess.Popen[bytes]], dying: Collection[int], late: Collection[int]
) -> list[Any]:
    wrong = {}
    for rank, process in enumerate(ranks):
        if rank in late:
            wrong[rank] = "did not end in time"
        elif rank in dying and process.returncode != -signal.SIGKILL:
            wrong[rank] = f"should have been killed, and ended with status {process.returncode}"
        elif rank not in dying and process.returncode:
            wrong[rank] = f"ended with status {process.returncode}"
    if wrong:
        tails = [
            f"--- rank {rank} {wrong.get(rank, 'ended as it should')}; the end of what it said:\n"
            + "\n".join((directory / f"{rank}.log").read_text(errors="replace").splitlines()[-_TAIL_LINES:])
            for rank in range(len(ranks))
        ]
        raise RanksFailedError("\n".join([f"{len(wrong)} of {len(ranks)} ranks failed", *tails]))
    return [
        None if rank in dying else json.loads((directory / f"{rank}.result").read_text()) for rank in range(len(ranks))
    ]


# --- On the rank


def _end_with_the_starter() -> None:
    """Wait until standard input ends, because who held its other end has died; then take everything along."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.killpg(0, signal.SIGKILL)


def _main(directory: Path, rank: int) -> int:
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    spec = json.loads((directory / "spec").read_text())
    size = str(spec["size"])
    os.environ.update(
        MASTER_ADDR=HOST,
        MASTER_PORT=str(spec["port"]),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=size,
        LOCAL_WORLD_SIZE=size,
        # Nobody here holds the store at which ranks meet; the starter does.
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    function = importlib.import_module(spec["module"])
    for part in spec["function"].split("."):
        function = getattr(function, part)
    dist.init_process_group("gloo")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = function(*spec["args"])  # type: ignore[operator]
            if dist.is_initialized():
                dist.destroy_process_group()
        (directory / f"{rank}.result").write_text(json.dumps(result))
    except BaseException:  # noqa: BLE001 - whatever it was, it is told and the process ends
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: the others notice a closed connection, and nothing here waits for them.
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), int(sys.argv[2])))
