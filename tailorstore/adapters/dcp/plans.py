"""What DCP's plans say: which values there are on all ranks, and what of them this one gives."""

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from tailorstore.adapters.dcp.names import Entry, Path
from tailorstore.adapters.dcp.values import to_json
from tailorstore.domain.chunks import Box
from tailorstore.domain.errors import InvalidInputError
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.tensors.memory import DTYPES, check_storable, dtype_name
from tailorstore.engine.tensors.shards import Part


def check_ranks(plans: Sequence[SavePlan], ranks: Ranks | None) -> None:
    """Make sure that the ranks that save are those that use the store.

    Raises:
        InvalidInputError: they are not.
    """
    size = ranks.size if ranks is not None else 1
    if len(plans) != size:
        msg = (
            f"DCP saves on {len(plans)} ranks, and {size} use the store together: open it with ranks='alone' where one"
            " saves, with ranks=GROUP where dcp has process_group=GROUP. Nothing was written"
        )
        raise InvalidInputError(msg)


def all_plans(plans: Sequence[SavePlan] | None, planner: SavePlanner) -> Sequence[SavePlan]:
    """Return the plans of all ranks, as the coordinator knows them.

    Raises:
        InvalidInputError: the planner does not tell.
    """
    if plans is not None and not all(plan.usable for plan in plans):
        # A planner that keeps plans sends only what has changed since the last save.
        plans = getattr(planner, "global_plan", None)
    if plans is None or not all(plan.usable for plan in plans):
        msg = (
            f"{type(planner).__name__} does not tell what all ranks save; use DefaultSavePlanner, or one that sends"
            " whole plans. Nothing was written"
        )
        raise InvalidInputError(msg)
    return plans


def describe(plans: Sequence[SavePlan]) -> list[list[Any]]:
    """Return path, shape, dtype and whether it is spread of every value, in the order of the state dict.

    Raises:
        InvalidInputError: tensors of a dtype that cannot be stored; names one.
    """
    paths: dict[str, Path] = {}
    rows: dict[str, list[Any]] = {}
    for plan in plans:
        for name, path in (plan.planner_data if isinstance(plan.planner_data, Mapping) else {}).items():
            paths.setdefault(name, path)
    for item in (item for plan in plans for item in plan.items):
        name, data = item.index.fqn, item.tensor_data
        path = list(paths.get(name, (name,)))
        if data is None:
            rows[name] = [path, None, "", False]
        else:
            dtype = dtype_name(data.properties.dtype, name)
            rows[name] = [path, list(data.size), dtype, item.type == WriteItemType.SHARD]
    return [rows[name] for name in dict.fromkeys([*paths, *rows]) if name in rows]


def entry_of(path: list[str | int], shape: list[int] | None, dtype: str, spread: bool) -> Entry:
    """Return what :func:`describe` has a row of."""
    if shape is None:
        return Entry(tuple(path))
    return Entry(tuple(path), tuple(shape), dtype, prod(shape) * DTYPES[dtype].itemsize, spread)


def values_of(plan: SavePlan, planner: SavePlanner, parts: Collection[str]) -> dict[str, Any]:
    """Return this rank's values as JSON, by name: all but the tensors that are held in parts.

    Raises:
        ExtraStateError: one cannot be stored; names it.
        InvalidInputError: the planner gives it pickled only.
    """
    return {
        item.index.fqn: to_json(_value(item, planner), item.index.fqn)
        for item in plan.items
        if item.index.fqn not in parts
    }


def _value(item: WriteItem, planner: SavePlanner) -> Any:  # noqa: ANN401
    if item.tensor_data is not None:
        return planner.resolve_data(item)
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        msg = (
            f"{type(planner).__name__} gives {item.index.fqn!r} pickled only, and a store holds no pickles; use"
            " DefaultSavePlanner, or a planner with lookup_object. Nothing was written"
        )
        raise InvalidInputError(msg)
    return look_up(item.index)


def parts_of(plan: SavePlan, planner: SavePlanner, dtypes: Mapping[str, str]) -> dict[str, list[Part]]:
    """Return which boxes of tensors this rank is to write, by name.

    Args:
        plan: of this rank.
        planner: gives the tensors.
        dtypes: of the tensors that are held in parts, by name.

    Raises:
        InvalidInputError: a tensor cannot be stored, or is not what was planned; names it.
    """
    found: dict[str, list[Part]] = {}
    for item in plan.items:
        name, data = item.index.fqn, item.tensor_data
        if data is None or name not in dtypes:
            continue
        tensor = planner.resolve_data(item)
        if not isinstance(tensor, torch.Tensor) or dtype_name(tensor.dtype, name) != dtypes[name]:
            msg = f"{name}: {type(planner).__name__} planned for {dtypes[name]}, and gives something else"
            raise InvalidInputError(msg)
        check_storable(tensor, name)
        if tensor.numel():
            found.setdefault(name, []).append(Part(_box(data.chunk), tensor.detach()))
    return found


def _box(chunk: ChunkStorageMetadata) -> Box:
    return tuple((at, at + extent) for at, extent in zip(chunk.offsets, chunk.sizes, strict=True))
