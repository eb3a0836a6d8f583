"""A DeepSpeed engine's state, named and shaped as an unsharded model and optimizer have it; each rank has its part."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tailorstore.adapters.deepspeed.partitions import (
    Partition,
    Partitions,
    Run,
    check_engine,
    partitions_of,
    run_of_stage_3,
)
from tailorstore.domain.errors import InvalidInputError
from tailorstore.engine.tensors.capture import Tensorlike, model_tensors

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

STEP = "step"
"""The slot in which optimizers count their steps."""


@dataclass(frozen=True, slots=True, eq=False)
class EngineState:
    """An engine's live state; nothing is copied."""

    tensors: dict[str, Tensorlike]
    """By name: the master weight where there is one, all else as it is; tied names have one object."""
    states: dict[str, Any]
    """Extra state of modules (``get_extra_state``), by name."""
    partitions: Partitions
    optimizer: torch.optim.Optimizer
    """The one that DeepSpeed wraps."""

    def optim(self) -> dict[str, Any]:
        """Return the optimizer's state keyed by parameter name, and its groups.

        Raises:
            InvalidInputError: a slot that is neither one value for each element nor one for all.
        """
        state: dict[str, dict[str, Any]] = {}
        for partition in self.partitions.flats:
            for slot, value in self.optimizer.state.get(partition.master, {}).items():
                for name, run in partition.runs.items():
                    state.setdefault(name, {})[slot] = _slot_of(value, slot, partition, name, run)
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": names}
            for group, names in zip(self.optimizer.param_groups, self.partitions.groups, strict=True)
        ]
        return {"state": state, "param_groups": groups}


class Unsharded(torch.nn.Module):
    """A module of which nothing but the state is known: what ``store.commit`` takes weights and extra states from."""

    def __init__(self, state: EngineState) -> None:
        """Stand for the engine's model."""
        super().__init__()
        self._entries = {**state.tensors, **state.states}

    def state_dict(self, *_: Any, **__: Any) -> Any:  # noqa: ANN401 - overloaded in torch
        """Return weights, buffers and extra states by name."""
        return self._entries


def state_of(engine: "DeepSpeedEngine") -> EngineState:
    """Describe an engine's state. Asks no other rank.

    Raises:
        MissingDependencyError, InvalidInputError: as ``check_engine`` and ``partitions_of``.
    """
    check_engine(engine)
    tensors, states = model_tensors(engine.module)
    live: dict[str, Any] = dict(tensors)
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    partitions = partitions_of(engine, names)
    masters = {
        name: run.of(partition.master, live[name])
        for partition in partitions.flats
        for name, run in partition.runs.items()
    }
    # By the first of its names, so that all names of a tensor get the same object.
    weights = {first: masters.get(first) or _weight(live[first]) for first in names.values()}
    return EngineState(
        {name: weights[names[id(tensor)]] for name, tensor in tensors.items()},
        states,
        partitions,
        engine.optimizer.optimizer,
    )


def _weight(tensor: Any) -> Tensorlike:  # noqa: ANN401 - a tensor, perhaps with what ZeRO 3 adds to it
    """Return what of a tensor without a master is here: in stage 3, a run of a parameter; else all of it."""
    if not hasattr(tensor, "ds_tensor"):
        held: torch.Tensor = tensor
        return held
    if hasattr(tensor.ds_tensor, "ds_quant_scale"):
        msg = "the engine keeps frozen weights quantised (zero_quantized_nontrainable_weights); they cannot be stored"
        raise InvalidInputError(msg)
    return run_of_stage_3(tensor).of(tensor.ds_tensor, tensor)


def _slot_of(value: Any, slot: str, partition: Partition, name: str, run: Run) -> Any:  # noqa: ANN401
    """Return a parameter's part of a slot that the optimizer has for a whole flat tensor."""
    if isinstance(value, torch.Tensor) and value.shape == partition.master.shape:
        return run.of(value)
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        msg = (
            f"slot {slot!r} has shape {list(value.shape)} for a flat tensor that {name!r} is in: no part of it belongs"
            " to a parameter, so the commit could not be restored"
        )
        raise InvalidInputError(msg)
    if slot == STEP and isinstance(value, int | float):
        # What torch's own optimizers count with; DeepSpeed's count in integers.
        return torch.tensor(float(value))
    return value


def as_counted_by(optimizer: torch.optim.Optimizer, value: Any) -> Any:  # noqa: ANN401
    """Return a stored step counter as an optimizer counts: torch's own in a tensor, DeepSpeed's in an integer."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind is not torch.optim.Optimizer]
    if not isinstance(value, torch.Tensor) or any(kind.__module__.startswith("torch.optim.") for kind in kinds):
        return value
    return int(value.item())
