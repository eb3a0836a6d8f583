"""The parameters of a capture, each with the optimizer group that it is in and what its slots say of its movement."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from tailorstore.engine.tensors.capture import Capture, LayerCapture
from tailorstore.engine.tensors.motion import IDLE, STILL, UNKNOWN, Motion, motion_of
from tailorstore.engine.tensors.packing import unpack
from tailorstore.engine.tensors.sampling import reals, samples_of


@dataclass(frozen=True, slots=True)
class Owner:
    """The optimizer group that a parameter is in."""

    number: int | None = None
    """Which optimizer."""
    optimizer: str | None = None
    """Name of its class; ``None`` where there is none."""
    options: Mapping[str, Any] = field(default_factory=dict)


NOBODY = Owner()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of one layer, or some of its samples."""

    layer: str
    name: str
    tensor: torch.Tensor
    """Live, as it was captured."""
    values: torch.Tensor
    """Its memory as real numbers."""
    span: range
    """Which of its samples."""
    owner: Owner = NOBODY
    motion: Motion = STILL


def parameter(layer: str, name: str, tensor: torch.Tensor) -> Parameter:
    """Return a parameter of which nothing but its values is known."""
    values = reals(tensor)
    return Parameter(layer, name, tensor, values, range(samples_of(values.numel())))


def measurable(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers whose change has a size."""
    return tensor.numel() > 0 and (tensor.is_floating_point() or tensor.is_complex())


def weights_by_layer(captured: Capture) -> dict[str, dict[str, torch.Tensor]]:
    """Return layer → name → parameter; of a layer without any, its buffers, as in a dictionary of tensors."""
    return {
        layer.name: {
            name: tensor
            for name, value in (layer.content["params"] or layer.content["buffers"]).items()
            if measurable(tensor := layer.arrays[value["$array"]])
        }
        for layer in captured.layers.values()
    }


def buffer_layers(layers: Mapping[str, Sequence[Parameter]]) -> set[str]:
    """Return the layers that have nothing but buffers, in a model that has parameters."""
    trained = {
        name for name, members in layers.items() if any(isinstance(one.tensor, torch.nn.Parameter) for one in members)
    }
    return layers.keys() - trained if trained else set()


def parameters_of(captured: Capture) -> list[Parameter]:
    """Return every parameter with its motion, in the model's order."""
    owners = _owners(captured)
    found = []
    for layer, weights in weights_by_layer(captured).items():
        for name, tensor in weights.items():
            owner = owners.get(name, NOBODY)
            motion = _motion(captured.layers[layer], name, tensor, owner, grouped=bool(owners))
            found.append(replace(parameter(layer, name, tensor), owner=owner, motion=motion))
    # Where an optimizer has slots for others, a parameter without any was never updated.
    active = {one.owner.number for one in found if one.motion.known and one.motion is not STILL}
    return [replace(one, motion=STILL) if one.motion is IDLE and one.owner.number in active else one for one in found]


def _owners(captured: Capture) -> dict[str, Owner]:
    """Return parameter → the optimizer group that it is in."""
    aliases: dict[str, str] = {}
    for layer in captured.layers.values():
        aliases |= layer.content["aliases"]
    found: dict[str, Owner] = {}
    for number, (packed, optimizer) in enumerate(zip(captured.param_groups, captured.classes, strict=True)):
        for group in unpack(packed, captured.shared_arrays.__getitem__):
            owner = Owner(number, optimizer or f"optimizer {number}", group)
            found |= {aliases.get(name, name): owner for name in group.get("params", ())}
    return found


def _motion(layer: LayerCapture, name: str, tensor: torch.Tensor, owner: Owner, *, grouped: bool) -> Motion:
    slots = layer.content["optim"].get(name)
    if slots:
        held = {
            slot: layer.arrays[value["$array"]] if isinstance(value, dict) and "$array" in value else value
            for slot, value in slots.items()
        }
        return motion_of(held, owner.options, owner.optimizer, tensor.shape)
    frozen = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
    if owner is NOBODY:
        return STILL if grouped or frozen else UNKNOWN
    return STILL if frozen else IDLE


def batches(parameters: Iterable[Parameter], size: int) -> Iterator[list[Parameter]]:
    """Sort parameters by device, optimizer and kind of motion, and deal them out, in the model's order.

    A batch has at most ``size`` samples; a parameter that has more is dealt out in parts.
    """
    groups: dict[Any, list[Parameter]] = {}
    for one in parameters:
        groups.setdefault((one.values.device, one.owner.optimizer, one.motion.kind), []).append(one)
    for group in groups.values():
        batch: list[Parameter] = []
        room = size
        for part in (part for one in group for part in _parts(one, size)):
            if len(part.span) > room:
                yield batch
                batch, room = [], size
            batch.append(part)
            room -= len(part.span)
        yield batch


def _parts(one: Parameter, size: int) -> list[Parameter]:
    if len(one.span) <= size:
        return [one]
    return [replace(one, span=one.span[start : start + size]) for start in range(0, len(one.span), size)]


def runs(batch: Sequence[Parameter]) -> list[tuple[str, int]]:
    """Return the layers of a batch, each with the samples that it has there one after the other."""
    return [(layer, sum(len(one.span) for one in run)) for layer, run in groupby(batch, key=lambda one: one.layer)]
