"""Run a server that cannot outlive the process that wanted it.

A program of its own, started by `tests.kit.servers` as `python -I leash.py SPEC`, where SPEC is JSON:

    before  the command line of a program to run first, or null
    argv    the server's command line
    env     what its environment has beyond this one's
    cwd     its working directory
    owner   the ids of the user and the group to run it as, or null for one's own
    signal  the number of the signal that stops it
    remove  glob patterns of what to delete once it has stopped

It prints the server's process id and waits. When its standard input ends (because it was closed, or because
the process that held the other end died, however it died) it stops the server and removes what it left.
"""

import contextlib
import functools
import glob
import json
import os
import shutil
import subprocess
import sys
import threading
from typing import Any

PATIENCE_SECONDS = 5.0


def run(spec: dict[str, Any]) -> int:
    user, group = spec["owner"] or (None, None)
    start = functools.partial(
        subprocess.Popen,
        env=os.environ | spec["env"],
        cwd=spec["cwd"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        user=user,
        group=group,
        extra_groups=None if user is None else [],
    )
    if spec["before"]:
        status = int(start(spec["before"]).wait())
        if status:
            return status
    server = start(spec["argv"])
    print(server.pid, flush=True)  # noqa: T201
    ended = threading.Event()

    def stop_at_end_of_input() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(spec["signal"])
        if not ended.wait(PATIENCE_SECONDS):
            server.kill()

    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    status = server.wait()
    ended.set()
    return status


def remove(patterns: list[str]) -> None:
    for path in (path for pattern in patterns for path in glob.glob(pattern)):
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)


def main() -> int:
    spec = json.loads(sys.argv[1])
    try:
        return run(spec)
    finally:
        remove(spec["remove"])


if __name__ == "__main__":
    sys.exit(main())
