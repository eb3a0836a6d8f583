"""Where a stored optimizer slot goes: into the tensor that is there, or into a new one laid out like the parameter."""

from typing import Any, TypeGuard

import torch

from tailorstore.engine.tensors.memory import DTYPES
from tailorstore.engine.tensors.shards import is_distributed


def array_path(value: object) -> str | None:
    """Return where a packed slot lies, if it is one array."""
    return value.get("$array") if isinstance(value, dict) and len(value) == 1 else None


def slot_for(shape: tuple[int, ...], dtype: str, param: torch.Tensor, current: object = None) -> torch.Tensor:
    """Return the tensor that takes a slot: the current one if it fits, else a new one with undefined elements.

    Args:
        shape: of the stored slot.
        dtype: its name.
        param: whose slot it is; of a ``DTensor``, the new slot is one as well.
        current: what the optimizer has in its place.
    """
    return current if _fits(current, shape, DTYPES[dtype], param) else _new_slot(shape, DTYPES[dtype], param)


def _fits(current: object, shape: tuple[int, ...], dtype: torch.dtype, param: torch.Tensor) -> TypeGuard[torch.Tensor]:
    if is_distributed(current):
        if any(placement.is_partial() for placement in current.placements):
            return False
    elif type(current) is not torch.Tensor:
        return False
    same = tuple(current.shape) == shape and current.dtype == dtype
    return same and (current.shape != param.shape or current.stride() == param.stride())


def _new_slot(shape: tuple[int, ...], dtype: torch.dtype, param: torch.Tensor) -> torch.Tensor:
    if shape == tuple(param.shape):
        # Of the parameter's own strides (channels_last, …): fused optimizers walk both as flat memory.
        return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format).detach()
    whole = torch.empty(shape, dtype=dtype, device=param.device)
    return _replicated(whole, param) if is_distributed(param) else whole


def _replicated(whole: torch.Tensor, param: Any) -> torch.Tensor:  # noqa: ANN401 - a DTensor
    """Return a tensor as a ``DTensor`` that every rank of the parameter's mesh holds whole."""
    from torch.distributed.tensor import DTensor, Replicate  # imported already, or there would be no such parameter

    placements = [Replicate()] * param.device_mesh.ndim
    found: torch.Tensor = DTensor.from_local(whole, param.device_mesh, placements, run_check=False)
    return found
