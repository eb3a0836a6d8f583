"""The parameters of a capture, each with the optimizer group that it is in and what its slots say of its movement.

Of a parameter that several processes hold together, the parts that are here; each part is sampled by itself.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from tailorstore.domain.chunks import box_of, meet, within
from tailorstore.engine.tensors.capture import Capture, LayerCapture
from tailorstore.engine.tensors.motion import IDLE, STILL, UNKNOWN, Motion, motion_of
from tailorstore.engine.tensors.packing import unpack
from tailorstore.engine.tensors.sampling import reals, samples_of
from tailorstore.engine.tensors.shards import Part, Sharded, sharded


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
    """One part of a parameter of one layer (a plain tensor is one part), or some of its samples."""

    layer: str
    name: str
    """The parameter's, with the part's place if that is not all of it."""
    whole: Sharded
    part: Part
    values: torch.Tensor
    """The part's memory as real numbers."""
    span: range
    """Which of its samples."""
    owner: Owner = NOBODY
    motion: Motion = STILL

    @property
    def is_frozen(self) -> bool:
        """Whether it is known not to be trained."""
        return self.whole.trained and self.whole.live is not None and not self.whole.live.requires_grad


def parts_of(layer: str, name: str, whole: Sharded) -> list[Parameter]:
    """Return the parts of a parameter that this process holds; nothing but their values is known of them."""
    everything, found = box_of(whole.shape), []
    for part in whole.parts:
        values = reals(part.tensor)
        # The same places in all parts would be a sample of some columns only.
        place = name if part.box == everything else f"{name} {part.box}"
        found.append(Parameter(layer, place, whole, part, values, range(samples_of(values.numel()))))
    return found


def measurable(whole: Sharded) -> bool:
    """Whether this process holds numbers of a tensor whose change has a size."""
    return bool(whole.parts and math.prod(whole.shape)) and (whole.dtype.is_floating_point or whole.dtype.is_complex)


def held_of(layer: LayerCapture, path: str) -> Sharded:
    """Return what this process holds of an array."""
    held = layer.held.get(path)
    return sharded(layer.arrays[path], path) if held is None else held


def weights_by_layer(captured: Capture) -> dict[str, dict[str, Sharded]]:
    """Return layer → name → parameter; of a layer without any, its buffers, as in a dictionary of tensors."""
    return {
        layer.name: {
            name: whole
            for name, value in (layer.content["params"] or layer.content["buffers"]).items()
            if measurable(whole := held_of(layer, value["$array"]))
        }
        for layer in captured.layers.values()
    }


def parameters_of(captured: Capture) -> list[Parameter]:
    """Return every part of a parameter with its motion, in the model's order."""
    owners = _owners(captured)
    found: list[Parameter] = []
    for layer, weights in weights_by_layer(captured).items():
        for name, whole in weights.items():
            owner, slots = owners.get(name, NOBODY), _slots(captured.layers[layer], name)
            found += [
                replace(one, owner=owner, motion=_motion(one, owner, slots, grouped=bool(owners)))
                for one in parts_of(layer, name, whole)
            ]
    # Where an optimizer has slots for others, a parameter without any was never updated.
    active = active_owners(found)
    return [replace(one, motion=STILL) if one.motion is IDLE and one.owner.number in active else one for one in found]


def active_owners(parameters: Iterable[Parameter]) -> frozenset[int]:
    """Return the optimizers that are known to move some of the parameters."""
    numbers = {one.owner.number for one in parameters if one.motion.known and one.motion is not STILL}
    return frozenset(number for number in numbers if number is not None)


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


def _slots(layer: LayerCapture, name: str) -> dict[str, Any]:
    """Return a parameter's slots: what this process holds of those that are arrays, the others as packed."""
    return {
        slot: held_of(layer, value["$array"]) if isinstance(value, dict) and "$array" in value else value
        for slot, value in layer.content["optim"].get(name, {}).items()
    }


def _motion(one: Parameter, owner: Owner, slots: Mapping[str, Any], *, grouped: bool) -> Motion:
    if slots:
        here = {slot: _beside(one, value) if isinstance(value, Sharded) else value for slot, value in slots.items()}
        if any(isinstance(value, Sharded) and here[slot] is None for slot, value in slots.items()):
            return UNKNOWN
        return motion_of(here, owner.options, owner.optimizer, one.part.tensor.shape, one.whole.shape)
    if owner is NOBODY:
        return STILL if grouped or one.is_frozen else UNKNOWN
    return STILL if one.is_frozen else IDLE


def _beside(one: Parameter, slot: Sharded) -> torch.Tensor | None:
    """Return the elements of a slot that belong to a part of its parameter; ``None`` if they are not here."""
    if slot.shape != one.whole.shape:
        return slot.parts[0].tensor if len(slot.parts) == 1 else None
    box = one.part.box
    for part in slot.parts:
        if part.box == box:
            return part.tensor
        if meet(part.box, box) == box:
            return part.tensor[within(box, part.box)]
    return None


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
