"""Host copies of live tensors, so that training may go on while they are written.

One block of host memory is kept between commits and grows when a commit needs more: allocating and first touching
fresh pages costs several times the copy itself. For CUDA tensors the block is pinned and the copies run on a stream
of their own, behind the work that produced the values and beside the work that follows.
"""

from collections.abc import Mapping

import torch

from tailorstore.engine.tensors.memory import nbytes, resolved

_ALIGNMENT = 64


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
        with torch.no_grad():
            for key, tensor in arrays.items():
                if tensor.is_cuda:
                    self._copy_from_cuda(copies[key], tensor)
                else:
                    copies[key].copy_(resolved(tensor))
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
