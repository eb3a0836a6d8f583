"""Kills a process in the midst of a transaction of SQLite: at a system call by which it changes one of its files.

The process traces itself (ptrace(2)) and its parent follows it from one system call to the next. What SQLite writes in
shared memory, the index of its write-ahead log, is none, and is made anew after a crash.
"""

import ctypes
import dataclasses
import mmap
import os
import platform
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Final

from tests.crash.fuse import NEVER, End, Fuse

_CALLS: Final = {
    "x86_64": {
        1: "write",
        18: "pwrite64",
        74: "fsync",
        75: "fdatasync",
        77: "ftruncate",
        87: "unlink",
        263: "unlinkat",
    },
    "aarch64": {64: "write", 68: "pwrite64", 82: "fsync", 83: "fdatasync", 46: "ftruncate", 35: "unlinkat"},
}
"""Numbers of system calls, by processor."""
_FILES: Final = (".sqlite", ".sqlite-wal", ".sqlite-journal")

_TRACEME, _CONTINUE_TO_CALL, _SET_OPTIONS, _CALL_INFO = 0, 24, 0x4200, 0x420E
_MARK_CALLS, _END_WITH_TRACER = 0x1, 0x100000
_ENTRY: Final = 1


class _CallInfo(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("rest", ctypes.c_uint64 * 4),
    )


class _TracedFuse(Fuse):
    """Has the thread that arms it followed by the parent."""

    def __init__(self) -> None:
        self._followed = False

    def arm(self) -> None:
        if not self._followed:
            self._followed = True
            _ptrace(_TRACEME, 0)
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    def call(self, what: str, half: Callable[[], object] | None = None) -> None:
        del what, half


@dataclasses.dataclass(frozen=True, slots=True)
class _Write:
    """A system call that changes a file of SQLite, about to be made."""

    name: str
    file: str
    arguments: tuple[int, ...]


def in_traced_child(work: Callable[[Fuse], object], at: int = NEVER) -> End:
    """Do ``work`` in a fork of this process; kill it at the ``at``-th call by which SQLite changes a file.

    With half of the bytes in the file, where it is a call that writes some.
    """
    with mmap.mmap(-1, 1 << 16) as failed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(_TracedFuse())
                status = 0
            except BaseException:
                failed.write(traceback.format_exc().encode()[-60_000:])
            finally:
                os._exit(status)
        calls, ended = _follow(child, at)
        error = failed[:].rstrip(b"\0").decode(errors="replace")
    killed = os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL
    return End(killed, calls, "" if killed or ended == 0 else error or f"wait status {ended}")


def _follow(child: int, at: int) -> tuple[list[str], int]:
    calls: list[str] = []
    _, status = os.waitpid(child, 0)
    if os.WIFSTOPPED(status):
        _ptrace(_SET_OPTIONS, child, 0, _MARK_CALLS | _END_WITH_TRACER)
    passed_on = 0
    while os.WIFSTOPPED(status):
        _ptrace(_CONTINUE_TO_CALL, child, 0, passed_on)
        _, status = os.waitpid(child, 0)
        passed_on = 0
        if not os.WIFSTOPPED(status):
            break
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            passed_on = os.WSTOPSIG(status)
            continue
        write = _write_of(child)
        if write is None:
            continue
        calls.append(f"{write.name} {os.path.splitext(write.file)[1]}")
        if len(calls) == at:
            _do_half(child, write)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    return calls, status


def _write_of(child: int) -> _Write | None:
    """Return what a stopped process is about to do, if it changes a file of SQLite."""
    info = _CallInfo()
    _ptrace(_CALL_INFO, child, ctypes.sizeof(info), ctypes.addressof(info))
    name = _CALLS[platform.machine()].get(info.number)
    if info.op != _ENTRY or name is None:
        return None
    arguments = tuple(info.arguments)
    if name.startswith("unlink"):
        with open(f"/proc/{child}/mem", "rb", buffering=0) as memory:
            memory.seek(arguments[0 if name == "unlink" else 1])
            file = os.fsdecode(memory.read(4096).split(b"\0", 1)[0])
    else:
        file = os.readlink(f"/proc/{child}/fd/{arguments[0]}")
    return _Write(name, file, arguments) if file.endswith(_FILES) else None


def _do_half(child: int, write: _Write) -> None:
    if write.name != "pwrite64":
        return
    _, address, size, offset, *_ = write.arguments
    with open(f"/proc/{child}/mem", "rb", buffering=0) as memory, open(write.file, "r+b", buffering=0) as file:
        memory.seek(address)
        file.seek(offset)
        file.write(memory.read(size // 2))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")
