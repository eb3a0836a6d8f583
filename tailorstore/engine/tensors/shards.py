"""Tensors of which a process holds only a part: what of them is here, and where in the whole it belongs."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import torch

from tailorstore.domain.chunks import Box, box_of
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


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """A tensor that no process holds as a box: all of them together can make it, one tensor at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    gather: Callable[[], torch.Tensor]
    """Returns the whole tensor on every rank. All ranks call it, for the same tensors in the same order."""
    trained: bool = False
    """Whether it is a parameter."""


Held: TypeAlias = Sharded | Gathered
"""What may stand in the place of a tensor."""


def is_distributed(value: object) -> TypeGuard[Any]:
    """Whether a value is a ``DTensor``. Does not import what defines it: without that, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def sharded(tensor: torch.Tensor, owner: str = "tensor") -> Sharded:
    """Return which boxes of a tensor this process holds: of a plain one, all of it.

    Raises:
        InvalidInputError: a ``DTensor`` with pending sums, or cut in a way that is no box; names the tensor.
    """
    shape, trained = tuple(tensor.shape), isinstance(tensor, torch.nn.Parameter)
    if not is_distributed(tensor):
        return Sharded(shape, tensor.dtype, (Part(box_of(shape), tensor),), trained)
    _check_placements(tensor, owner)
    local = tensor.detach().to_local()
    found = []
    for chunk in tensor.__create_chunk_list__() if local.numel() or math.prod(shape) == 0 else ():
        box = tuple((at, at + extent) for at, extent in zip(chunk.offsets, chunk.sizes, strict=True))
        found.append(Part(box, local))
    return Sharded(shape, tensor.dtype, tuple(found), trained)


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
