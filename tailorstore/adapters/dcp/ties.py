"""Tensors of a state dict that are one tensor under two names: stored once, as ``Store.commit`` does."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner

from tailorstore.engine.tensors.shards import local_of

Ties = dict[str, str]
"""Name → the first name of the same tensor."""


def find_ties(planner: SavePlanner, names: Iterable[str]) -> Ties:
    """Return which names mean the same memory on this rank; none where a planner does not show its state dict.

    Asks the whole state dict: of what several ranks have alike, each writes another part.
    """
    first: dict[Any, str] = {}
    ties: Ties = {}
    for name in names:
        key = _memory(planner, name)
        if key is not None and first.setdefault(key, name) != name:
            ties[name] = first[key]
    return ties


def find_vetoes(planner: SavePlanner, ties: Mapping[str, str]) -> list[str]:
    """Return which names are tied elsewhere and not here. A rank that holds no elements of them cannot tell."""
    known = {name: _memory(planner, name) for name in {*ties, *ties.values()}}
    return sorted(name for name, target in ties.items() if known[name] is not None and known[name] != known[target])


def agreed(ties: Sequence[Mapping[str, str]]) -> Ties:
    """Return the ties that some rank knows; where they differ, those of the lowest."""
    found: Ties = {}
    for one in reversed(ties):
        found.update(one)
    return {name: target for name, target in found.items() if target not in found}


def _memory(planner: SavePlanner, name: str) -> tuple[Any, ...] | None:
    """Return what two names of one memory have in common; ``None`` where there is none to share."""
    state = getattr(planner, "state_dict", None)
    tensor = state.get(name) if isinstance(state, Mapping) else None
    if not isinstance(tensor, torch.Tensor):
        return None
    local = local_of(tensor.detach())
    if type(local) is not torch.Tensor or local.layout is not torch.strided or local.numel() == 0:
        return None
    return (
        local.device,
        local.dtype,
        local.data_ptr(),
        tuple(tensor.shape),
        tuple(local.shape),
        local.stride(),
        local.is_conj(),
        local.is_neg(),
    )
