"""Host copies of live tensors, so that training may go on while they are written.

One block of host memory is kept between commits and grows when a commit needs more: allocating and first touching
fresh pages costs several times the copy itself. For CUDA tensors the block is pinned and the copies run on a stream
of their own, behind the work that produced the values and beside the work that follows.

Host memory is copied by plain threads in pieces of a few MiB rather than by torch's own: those meet at a barrier after
every tensor, and on a machine whose cores are busy (data loaders, the commit before) each barrier waits for the
scheduler. On an idle machine both take the same time; on a busy one torch's took thirty times as long.
"""

import os
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch

from tailorstore.engine.tensors.memory import as_bytes, is_plain, nbytes, resolved
from tailorstore.storage.threads import Job, run_jobs

_ALIGNMENT = 64
_PIECE_BYTES = 4 << 20
_THREADS = min(4, os.cpu_count() or 1)
"""More do not help: a few cores use up the memory's bandwidth."""


class HostArena:
    """A reusable block of host memory that holds one commit's tensors at a time. Not thread-safe."""

    def __init__(self) -> None:
        """Start empty."""
        self._block = torch.empty(0, dtype=torch.uint8)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def size_bytes(self) -> int:
        """Host memory held."""
        return self._block.numel()

    def copy(self, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return contiguous host copies of some tensors, valid until the next call.

        When this returns every value has been copied: the originals may change.
        """
        offsets, total = {}, 0
        for key, tensor in arrays.items():
            offsets[key] = total
            total += -(-nbytes(tensor) // _ALIGNMENT) * _ALIGNMENT
        self._reserve(total, pinned=any(tensor.is_cuda for tensor in arrays.values()))
        copies = {key: self._view(tensor, offsets[key]) for key, tensor in arrays.items()}
        plain = [(copies[key], tensor) for key, tensor in arrays.items() if is_plain(tensor)]
        with torch.no_grad():
            for key, tensor in arrays.items():
                if tensor.is_cuda:
                    self._copy_from_cuda(copies[key], tensor)
                elif not is_plain(tensor):
                    copies[key].copy_(resolved(tensor))
        _copy_plain(plain)
        for stream in self._streams.values():
            stream.synchronize()
        return copies

    def release(self) -> None:
        """Give the memory back."""
        self._block = torch.empty(0, dtype=torch.uint8)

    def _reserve(self, size: int, *, pinned: bool) -> None:
        if self._block.numel() < size or (pinned and not self._block.is_pinned()):
            self.release()
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    def _view(self, like: torch.Tensor, offset: int) -> torch.Tensor:
        if like.numel() == 0:
            return torch.empty(like.shape, dtype=like.dtype)
        return self._block[offset : offset + nbytes(like)].view(like.dtype).view(like.shape)

    def _copy_from_cuda(self, target: torch.Tensor, source: torch.Tensor) -> None:
        stream = self._streams.setdefault(source.device, torch.cuda.Stream(source.device))  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            target.copy_(resolved(source), non_blocking=True)


def _copy_plain(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy (target, source) pairs of host tensors in C order."""
    jobs: list[Job] = []
    for target, source in pairs:
        if source.numel():
            to, of = np.asarray(as_bytes(target)), np.asarray(as_bytes(source))
            jobs += [
                partial(np.copyto, to[at : at + _PIECE_BYTES], of[at : at + _PIECE_BYTES])
                for at in range(0, of.size, _PIECE_BYTES)
            ]
    run_jobs(jobs, _THREADS)
