"""Calls that a process makes to its store, counted, and the one at which it is killed.

A *call* is a statement or a commit that reaches the database, a call that reads from the root or confirms what is
there, and each system call by which one writes to a local root: opening a new file, writing to it (it is killed with
half of the bytes written), renaming, linking, unlinking, making directories. On object stores it is a request that
changes something, before it is sent and after it was answered.
"""

import dataclasses
import mmap
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.engine.default import DefaultDialect

from tailorstore.storage import cloud, local

NEVER: Final = sys.maxsize
"""The call at which a process is killed that is to live."""

_READS = ("get", "read_into", "list", "exists", "confirm")
_CHANGES = ("put", "replace", "delete")


class Fuse:
    """Counts calls, from all threads, and does something at one of them.

    Args:
        at: the call, counted from 1.
        told: where calls are noted.
        strikes: signals that the process sends to itself, one at that call and one at each that follows.
    """

    def __init__(self, at: int, told: mmap.mmap, strikes: Sequence[signal.Signals] = (signal.SIGKILL,)) -> None:
        self._at = at
        self._told = told
        self._strikes = list(strikes)
        self._count = 0
        self._armed = False
        self._lock = threading.Lock()

    def arm(self) -> None:
        """Count from now on."""
        self._armed = True

    def call(self, what: str, half: Callable[[], object] | None = None) -> None:
        """Note a call that is about to be made; at the chosen one do ``half`` of it before what kills."""
        with self._lock:
            if not self._armed:
                return
            self._count += 1
            self._told.write(f"{what}\n".encode())
            if self._count < self._at or not self._strikes:
                return
            strike = self._strikes.pop(0)
            if half is not None and strike == signal.SIGKILL:
                half()
            os.kill(os.getpid(), strike)


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """How a child ended."""

    killed: bool
    """By SIGKILL."""
    calls: list[str]
    """That it made, the one at which it was killed last."""
    error: str
    """What it raised, if it did."""


def in_child(
    work: Callable[[Fuse], object], at: int = NEVER, strikes: Sequence[signal.Signals] = (signal.SIGKILL,)
) -> End:
    """Do ``work`` in a fork of this process, which has everything imported; strike it at its ``at``-th call."""
    with mmap.mmap(-1, 1 << 18) as told, mmap.mmap(-1, 1 << 16) as failed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(Fuse(at, told, strikes))
                status = 0
            except BaseException:
                failed.write(traceback.format_exc().encode()[-60_000:])
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        calls = told[:].rstrip(b"\0").decode().splitlines()
        error = failed[:].rstrip(b"\0").decode(errors="replace")
    killed = os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL
    return End(killed, calls, "" if killed or ended == 0 else error or f"wait status {ended}")


def wire(fuse: Fuse) -> None:
    """Lead every call of this process to its store past the fuse. There is no way back: for processes to be killed."""
    _wire_local(fuse)
    for name in _READS:
        setattr(cloud.CloudObjects, name, _before(name, getattr(cloud.CloudObjects, name), fuse))
    for name in _CHANGES:
        setattr(cloud.CloudObjects, name, _around(name, getattr(cloud.CloudObjects, name), fuse))
    in_order(cloud.CloudObjects)
    _wire_sql(fuse)


def in_order(transport: type) -> None:
    """Have a transport do one thing at a time, so that the n-th call is the same one each time."""
    initialise = transport.__init__  # type: ignore[misc]

    def alone(self: Any, *args: Any) -> None:
        initialise(self, *args)
        self.workers = 1

    transport.__init__ = alone  # type: ignore[misc]


class _Os:
    """Stands in for ``os`` in the local transport."""

    def __init__(self, fuse: Fuse) -> None:
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._fuse.call("open")
        return os.open(path, flags, mode)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._fuse.call("write", lambda: os.write(descriptor, data[: len(data) // 2]))
        return os.write(descriptor, data)

    def makedirs(self, path: str, *, exist_ok: bool) -> None:
        self._fuse.call("makedirs")
        os.makedirs(path, exist_ok=exist_ok)

    def replace(self, old: str, new: str) -> None:
        self._fuse.call("rename")
        os.replace(old, new)

    def link(self, old: str, new: str) -> None:
        self._fuse.call("link")
        os.link(old, new)

    def unlink(self, path: str) -> None:
        self._fuse.call("unlink")
        os.unlink(path)


def _wire_local(fuse: Fuse) -> None:
    local.os = _Os(fuse)  # type: ignore[assignment,attr-defined]
    in_order(local.LocalObjects)
    for name in _READS:
        setattr(local.LocalObjects, name, _before(name, getattr(local.LocalObjects, name), fuse))


def _before(name: str, method: Callable[..., Any], fuse: Fuse) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        fuse.call(name)
        return method(*args, **kwargs)

    return counted


def _around(name: str, method: Callable[..., Any], fuse: Fuse) -> Callable[..., Any]:
    def counted(self: Any, first: Any, *args: Any, **kwargs: Any) -> Any:
        # Of a request that deletes many, a server may have done a part.
        half = (lambda: method(self, first[: len(first) // 2])) if name == "delete" and len(first) > 1 else None
        fuse.call(name, half)
        answer = method(self, first, *args, **kwargs)
        fuse.call(f"after {name}")
        return answer

    return counted


def _wire_sql(fuse: Fuse) -> None:
    def statement(_connection: object, _cursor: object, sql: str, *_: object) -> None:
        fuse.call(sql.split(maxsplit=1)[0].upper())

    commit = DefaultDialect.do_commit

    def do_commit(self: DefaultDialect, connection: Any) -> None:
        fuse.call("COMMIT")
        if hasattr(connection, "pgconn"):
            fuse.call("COMMIT sent", lambda: connection.pgconn.send_query(b"COMMIT"))
        commit(self, connection)
        fuse.call("after COMMIT")

    event.listen(Engine, "connect", lambda *_: fuse.call("connect"))
    event.listen(Engine, "before_cursor_execute", statement)
    DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]
