"""Tensors of which a process holds only a part: what of them is here, and where in the whole it belongs."""

import math
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from tailorstore.domain.chunks import Box, box_of, within
from tailorstore.domain.errors import InvalidInputError


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The elements of one box of a tensor."""

    box: Box
    tensor: torch.Tensor
    """Plain, of the box's shape, on any device."""


@dataclass(frozen=True, slots=True, eq=False)
class Sharded:
    """A tensor of which this process holds some boxes, or none."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    parts: tuple[Part, ...]
    """Disjoint; parts without elements are left out."""
    trained: bool = False
    """Whether it is a parameter."""
    layout: Hashable = None
    """How all ranks hold tensors of this shape, where that has a name: equal layouts, equal boxes on every rank."""
    live: torch.Tensor | None = None
    """The tensor that the parts are of, where there is one."""

    def whole(self, owner: str) -> torch.Tensor:
        """Return the tensor, if this process holds all of it.

        Raises:
            InvalidInputError: it does not; names the tensor.
        """
        if len(self.parts) == 1 and self.parts[0].box == box_of(self.shape):
            return self.parts[0].tensor
        if sum(part.tensor.numel() for part in self.parts) == math.prod(self.shape):
            device = self.parts[0].tensor.device if self.parts else "cpu"
            whole = torch.empty(self.shape, dtype=self.dtype, device=device)
            for part in self.parts:
                whole[within(part.box, box_of(self.shape))] = part.tensor.detach()
            return whole
        msg = (
            f"{owner} of shape {list(self.shape)} is spread over processes, and this store is used by one alone:"
            " open it on every rank, after torch.distributed is initialised, with ranks='world'"
        )
        raise InvalidInputError(msg)


def is_distributed(value: object) -> TypeGuard[Any]:
    """Whether a value is a ``DTensor``. Does not import what defines it: without that, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


Layouts = dict[Hashable, tuple[Box, ...]]
"""Shape, placements and mesh of ``DTensor``s → the boxes of them that are here. Finding them out takes a while."""


def sharded(tensor: torch.Tensor, owner: str = "tensor", known: Layouts | None = None) -> Sharded:
    """Return which boxes of a tensor this process holds: of a plain one, all of it.

    Args:
        tensor: plain or ``DTensor``.
        owner: what it is, for messages.
        known: layouts that were met before, as long as nobody starts torch.distributed anew; more are added.

    Raises:
        InvalidInputError: a ``DTensor`` with pending sums, or cut in a way that is no box; names the tensor.
    """
    shape, trained = tuple(tensor.shape), isinstance(tensor, torch.nn.Parameter)
    if not is_distributed(tensor):
        return Sharded(shape, tensor.dtype, (Part(box_of(shape), tensor),), trained, "whole", tensor)
    layout = (shape, tuple(tensor.placements), tensor.device_mesh)
    boxes = known.get(layout) if known is not None else None
    if boxes is None:
        _check_placements(tensor, owner)
        boxes = tuple(
            tuple((at, at + extent) for at, extent in zip(chunk.offsets, chunk.sizes, strict=True))
            for chunk in tensor.__create_chunk_list__()
        )
        if known is not None:
            known[layout] = boxes
    local = tensor.detach().to_local()
    held = boxes if local.numel() or not math.prod(shape) else ()
    return Sharded(shape, tensor.dtype, tuple(Part(box, local) for box in held), trained, layout, tensor)


def settled(tensor: Any) -> Any:  # noqa: ANN401 - a DTensor
    """Return a ``DTensor`` with its pending sums carried out: collective, among the ranks of its mesh."""
    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    replicate = sys.modules["torch.distributed.tensor"].Replicate
    placements = [replicate() if placement.is_partial() else placement for placement in tensor.placements]
    return tensor.detach().redistribute(placements=placements)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what of a tensor is in this process: a ``DTensor``'s local tensor, a plain one itself."""
    found: torch.Tensor = tensor.to_local() if is_distributed(tensor) else tensor
    return found


def _check_placements(tensor: Any, owner: str) -> None:  # noqa: ANN401 - a DTensor
    """Refuse what ``__create_chunk_list__`` has no word for."""
    placements, sizes = tensor.placements, tensor.device_mesh.shape
    if any(placement.is_partial() for placement in placements):
        msg = f"{owner}: a DTensor with pending sums ({placements}) has no values yet; redistribute it first"
        raise InvalidInputError(msg)
    for at, placement in enumerate(placements):
        factor = getattr(placement, "split_factor", None)
        if factor is None:
            continue
        # FSDP over tensor parallelism: the later cuts come first, and together they undo the stride.
        later = [sizes[i] for i in range(at + 1, len(sizes)) if placements[i].is_shard(placement.dim)]
        if math.prod(later) != factor:
            msg = f"{owner}: a DTensor with placements {placements} holds no one box of its tensor; redistribute it"
            raise InvalidInputError(msg)
