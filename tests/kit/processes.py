"""What the servers have in common: free ports, and processes that die with the one that started them.

A server listens on 127.0.0.1 only, keeps its files in a temporary directory, and asks for keys made for this
run, so that whoever answers to them is the server that was started and no other.
"""

import contextlib
import glob
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

HOST: Final = "127.0.0.1"
TEMP: Final = "/tmp"
"""Not `tempfile.gettempdir()`: the path of a Unix socket holds 107 bytes, and that may be longer."""

START_SECONDS: Final = 60.0
"""How long a server may take to answer. It takes about one; a machine under full load takes its time."""

PORT_ATTEMPTS: Final = 5
"""How often a server is started anew because somebody took one of its ports in the moment before."""


class ServerMissingError(Exception):
    """The server's program is not installed."""


class ServerStartError(Exception):
    """The server's program is installed and did not come up; the message ends with its log."""


class PortTakenError(ServerStartError):
    """Somebody else answers on the port that was chosen: choose another."""


@contextlib.contextmanager
def reserve_ports(count: int) -> Iterator[list[int]]:
    """Give `count` different ports of 127.0.0.1 on which nobody listens, and keep others from getting the same ones.

    They lie below the range from which the kernel takes the ports of outgoing connections, of which a test run makes
    thousands.
    """
    with contextlib.ExitStack() as holders:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(10_000, 32_000)
            holder = holders.enter_context(socket.socket())
            try:
                holder.bind((HOST, port))
            except OSError:
                continue
            # Set only now, it lets the server in, which sets it too, and not whoever tries the line above.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            ports.append(port)
        if sys.platform != "linux":  # Elsewhere it would keep the server out as well.
            holders.close()
        yield ports


class Leash:
    """A server's process, from the side of the one who holds it.

    Args:
        argv: the server's command line.
        directory: where it runs and logs; removed when it has ended.
        port_taken: what it says when it ends because somebody has one of its ports.
        before: a command line to run first, as the same user.
        env: what its environment has beyond this one's.
        owner: the ids of the user and the group to run it as.
        stop_signal: what makes it stop; if it has not within some seconds, it is killed.
        leftovers: glob patterns of what it leaves elsewhere.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        directory: Path,
        port_taken: str,
        before: Sequence[str | Path] | None = None,
        env: Mapping[str, str] | None = None,
        owner: tuple[int, int] | None = None,
        stop_signal: signal.Signals = signal.SIGKILL,
        leftovers: Sequence[str] = (),
    ) -> None:
        self._port_taken = port_taken
        spec = {
            "before": before and [str(part) for part in before],
            "argv": [str(part) for part in argv],
            "env": dict(env or {}),
            "cwd": str(directory),
            "owner": owner,
            "signal": stop_signal,
            "remove": [glob.escape(str(directory)), *leftovers],
        }
        with (directory / "log").open("wb") as log:
            # A session of its own, so that Ctrl-C reaches the tests alone, which then stop the server.
            self._process = subprocess.Popen(
                [sys.executable, "-I", Path(__file__).with_name("leash.py"), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
            # Read through a handle: the file is removed with the directory as soon as the server ends.
            self._log = (directory / "log").open("rb")
        first_line = _pipe(self._process.stdout).readline()
        if not first_line:
            reason = self.explain("the server did not start")
            self.release()
            raise ServerStartError(reason)
        self.pid = int(first_line)

    def running(self) -> bool:
        """Return whether the server has not ended."""
        return self._process.poll() is None

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return once `ready()` is true.

        Raises:
            ServerStartError: the server ended, or was not ready in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if not self.running():
                reason = self.explain("the server ended while it started")
                raise (PortTakenError if self._port_taken in reason else ServerStartError)(reason)
            if time.monotonic() > deadline:
                raise ServerStartError(self.explain(f"the server was not ready after {START_SECONDS:.0f} s"))
            time.sleep(0.03)
        if not self.running():
            raise PortTakenError(self.explain("another server answered in its place"))

    def explain(self, what: str) -> str:
        """Return `what` happened, followed by what the server said last."""
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")
        return "\n".join([f"{what}; the end of its log:", *log.splitlines()[-25:]])

    def release(self) -> None:
        """Stop the server, remove what it left, and return once both are done."""
        _pipe(self._process.stdin).close()
        try:
            self._process.wait(timeout=20)
        finally:
            _pipe(self._process.stdout).close()
            self._log.close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise TypeError("the process was started without this pipe")
    return pipe


def temporary_directory(kind: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"ts-{kind}-", dir=TEMP))


def with_fresh_ports(start: Callable[[], Leash]) -> Leash:
    for _ in range(PORT_ATTEMPTS - 1):
        with contextlib.suppress(PortTakenError):
            return start()
    return start()


def in_ci() -> bool:
    """Whether a missing server is a failure (in CI) or a reason to skip (elsewhere)."""
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}
