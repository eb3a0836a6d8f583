"""Memory that the ranks of one host share, so that what travels between them is copied once and not through sockets.

A box is an anonymous file in memory: the kernel frees it with the last process that has it open, however that ends.
"""

import mmap
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_ALIGNMENT = 64
_TOKEN_BYTES = 16
_PAGE = mmap.PAGESIZE


class Box:
    """Memory of this process that others of its host may look into."""

    def __init__(self) -> None:
        """Make a small one.

        Raises:
            OSError, AttributeError: the system has no such thing.
        """
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._file = os.memfd_create("tailorstore", os.MFD_CLOEXEC)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self.size_bytes = 0
        self._grow(_PAGE)

    def place(self, sizes: Mapping[int, int]) -> dict[int, tuple[int, Bytes]]:
        """Return, by rank, where its bytes begin and the memory for them; what was there before is overwritten."""
        offsets, end = {}, _PAGE
        for rank, size in sizes.items():
            offsets[rank] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        if end > self.size_bytes:
            self._grow(end)
        memory = np.frombuffer(self._map, np.uint8)
        return {rank: (at, memory[at : at + sizes[rank]]) for rank, at in offsets.items()}

    def close(self) -> None:
        """Let the memory go when nothing looks at it any more."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _grow(self, size: int) -> None:
        # In steps, so that a box is not mapped anew for a few bytes more.
        self.size_bytes = max(size, 2 * self.size_bytes) if self.size_bytes else size
        os.ftruncate(self._file, self.size_bytes)
        self._map = mmap.mmap(self._file, self.size_bytes)
        self._map[:_TOKEN_BYTES] = self.token


@dataclass(slots=True)
class Window:
    """A look into another process's box."""

    path: str
    token: bytes
    _map: mmap.mmap | None = field(default=None)

    def look(self, offset: int, size: int) -> Bytes:
        """Return bytes of the box; they change when its owner places others.

        Raises:
            OSError, ValueError: there is no such box.
        """
        if self._map is None or offset + size > len(self._map):
            file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._map = mmap.mmap(file, os.fstat(file).st_size)
            finally:
                os.close(file)
            if self._map[:_TOKEN_BYTES] != self.token:
                msg = f"{self.path} is another process's"
                raise ValueError(msg)
        return np.frombuffer(self._map, np.uint8)[offset : offset + size]

    def is_open(self) -> bool:
        """Whether the box can be looked into from here: hosts of one name may be two, or keep processes apart."""
        try:
            self.look(0, _TOKEN_BYTES)
        except (OSError, ValueError):
            return False
        return True
