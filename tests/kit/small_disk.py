"""A place that takes few bytes: a file system of its own for root, else a limit on the size of files."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path


class SmallDisk:
    """A folder on a disk of 1.5 MB.

    Where nothing may be mounted, no file may be larger than the room that there is meant to be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._mounted = False
        with contextlib.suppress(FileNotFoundError):
            mount = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)]
            self._mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    @contextlib.contextmanager
    def full(self, room: int = 300_000) -> Iterator[None]:
        """Leave room for so many bytes only, while the block lasts."""
        if not self._mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, self._limits[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
            return
        ballast = self.folder / "ballast"
        left = os.statvfs(self.folder)
        ballast.write_bytes(bytes(max(0, left.f_bavail * left.f_frsize - room)))
        try:
            yield
        finally:
            ballast.unlink()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[bool]:
        """Let nothing be written while the block lasts; give whether that could be had."""
        if not self._mounted:
            yield False
            return
        self._remount("ro")
        try:
            yield True
        finally:
            self._remount("rw")

    def end(self) -> None:
        """Give the disk back."""
        if self._mounted:
            subprocess.run(["umount", self.folder], check=True)  # noqa: S607 - wherever the system has it

    def _remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", self.folder], check=True)  # noqa: S607 - as above
