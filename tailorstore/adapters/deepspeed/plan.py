"""What a restore into an engine reads into which memory; all that differs is found before anything is changed."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tailorstore.adapters.deepspeed.partitions import Partition
from tailorstore.adapters.deepspeed.state import STEP, EngineState, as_counted_by
from tailorstore.engine.contents import CompositeContents, stored_tensor
from tailorstore.engine.tensors.memory import DTYPES
from tailorstore.engine.tensors.packing import unpack
from tailorstore.engine.tensors.restore import Filling, StoredOptim, plan_model, plan_states

if TYPE_CHECKING:
    from tailorstore.engine.light.sources import Source
    from tailorstore.engine.read import Target


class Plan:
    """What to read into which memory, and what to do then. Changes nothing by itself.

    Attributes:
        problems: every difference.
        pairs: what is stored, and the memory of this rank that it fills.
        finish: to be called in order after the last read.
    """

    def __init__(self, contents: CompositeContents, state: EngineState, *, strict: bool) -> None:
        """Begin with nothing; ``strict`` as for ``restore``."""
        self.problems: list[str] = []
        self.pairs: list[tuple[Source, Target]] = []
        self.finish: list[Callable[[], None]] = []
        self._contents = contents
        self._state = state
        self._strict = strict
        self._arrays, self._aliases = contents.model_arrays()

    def match_weights(self) -> None:
        """Compare names, shapes and dtypes of weights and buffers, and arrange for them to be read."""
        stored = {name: stored_tensor(array) for name, array in self._arrays.items()}
        stored |= {name: stored[target] for name, target in self._aliases.items() if target in stored}
        filling = plan_model(self._state.tensors, stored, self.problems, strict=self._strict)
        self.pairs += [(self._arrays[self._stored_name(name)], target) for name, target in filling.model.items()]

    def match_states(self, module: torch.nn.Module) -> None:
        """Compare the extra states of modules, and arrange for them to be set."""
        filling, packed = Filling(), self._contents.states()
        plan_states(module, self._state.states, packed, self._load, self.problems, filling, strict=self._strict)
        self.finish += filling.finish

    def match_optimizer(self, sources: Mapping[str, int]) -> None:
        """Compare groups and slots, and arrange for them to be read and set.

        Args:
            sources: layer → source step; of what a flat tensor has once, the newest layer's is taken.
        """
        stored = self._contents.stored_optim(self._contents.documents(), self._aliases)
        if not stored.groups:
            if self._strict:
                self.problems.append("missing: the composite holds no optimizer state (its commit was made without)")
            return
        if len(stored.groups) > 1:
            self.problems.append(f"optimizers: the engine has one, the composite {len(stored.groups)}")
            return
        mine, theirs = type(self._state.optimizer).__qualname__, stored.classes[0] if stored.classes else None
        if self._strict and theirs not in (None, mine):
            self.problems.append(f"optimizer: it is a {mine}, the composite's was a {theirs}")
        self._match_groups(stored.groups[0])
        for flat in self._state.partitions.flats:
            self._match_state(flat, stored, sources)

    def _match_groups(self, theirs: Any) -> None:  # noqa: ANN401 - groups as torch has them, parameters by name
        mine = self._state.partitions.groups
        if len(mine) != len(theirs):
            self.problems.append(f"{len(mine)} parameter groups, {len(theirs)} in the composite")
            return
        trained = {self._stored_name(name) for names in mine for name in names}
        for at, (group, names, known) in enumerate(zip(self._state.optimizer.param_groups, mine, theirs, strict=True)):
            here = {self._stored_name(name) for name in names}
            # Other optimizers keep frozen parameters in their groups, ZeRO does not.
            there = trained.intersection(known["params"])
            self.problems += [f"group {at} has {name}, the composite's has not" for name in sorted(here - there)]
            self.problems += [f"group {at} lacks {name}, the composite's has it" for name in sorted(there - here)]
            self.finish.append(partial(group.update, {key: known[key] for key in known if key != "params"}))

    def _match_state(self, flat: Partition, stored: StoredOptim, sources: Mapping[str, int]) -> None:
        """Arrange for a flat tensor's slots to be put together from those of its parameters."""
        state = self._state.optimizer.state
        held = {name: stored.slots.get(self._stored_name(name), {}) for name in flat.runs}
        slots = list(dict.fromkeys(slot for found in held.values() for slot in found))
        if not slots:
            # As before the first step.
            self.finish.append(lambda: state.pop(flat.master, None))
            return
        by_element = {slot for found in stored.slots.values() for slot in found if _is_array(found[slot])}
        fresh: dict[str, Any] = {}
        for slot in slots:
            packed = {name: found[slot] for name, found in held.items() if slot in found}
            if slot in by_element:
                fresh[slot] = self._match_slot(flat, slot, packed, stored)
            else:
                newest = max(packed, key=lambda name: sources[self._contents.layer_of(self._stored_name(name))])
                self.finish.append(partial(self._set_value, fresh, slot, flat, newest, packed[newest]))
        self.finish.append(lambda: state.__setitem__(flat.master, {slot: fresh[slot] for slot in slots}))

    def _match_slot(
        self, flat: Partition, slot: str, packed: Mapping[str, Any], stored: StoredOptim
    ) -> torch.Tensor | None:
        """Arrange for a slot to be read; return the flat tensor into which it goes, ``None`` if it does not fit."""
        paths = {name: value["$array"] for name, value in packed.items() if _is_array(value)}
        specs = {name: stored.specs[self._stored_name(name)][path] for name, path in paths.items()}
        shapes = {name: specs[name].shape if name in specs else () for name in packed}
        dtypes = sorted({spec.dtype for spec in specs.values()})
        wrong = [
            f"shape: {slot} of {name} is {list(shape)} in the composite, and ZeRO has one value for each element of"
            f" {list(flat.runs[name].shape)}"
            for name, shape in shapes.items()
            if shape != flat.runs[name].shape
        ]
        if len(dtypes) > 1:
            wrong.append(
                f"dtype: {slot} of group {flat.group} is of {' and '.join(dtypes)}, and ZeRO has one tensor of it"
            )
        if wrong:
            self.problems += wrong
            return None
        target = self._flat_slot(flat, slot, DTYPES[dtypes[0]] if dtypes else flat.master.dtype)
        for name, run in flat.runs.items():
            if name in paths:
                layer = self._contents.layer_of(self._stored_name(name))
                self.pairs.append((self._contents.array(layer, paths[name]), run.of(target)))
            else:
                # Never trained where it was committed: ZeRO has zeros there.
                self.finish.append(partial(_clear, run.within(target)))
        return target

    def _flat_slot(self, flat: Partition, slot: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the memory of a slot: what the optimizer has, or new."""
        current = self._state.optimizer.state.get(flat.master, {}).get(slot)
        if not self._strict and dtype.is_floating_point:
            dtype = current.dtype if isinstance(current, torch.Tensor) else flat.master.dtype
        if isinstance(current, torch.Tensor) and current.shape == flat.master.shape and current.dtype == dtype:
            return current
        return torch.zeros_like(flat.master, dtype=dtype).detach()

    def _set_value(self, fresh: dict[str, Any], slot: str, flat: Partition, name: str, packed: Any) -> None:  # noqa: ANN401
        """Unpack what a flat tensor has one value of, and put it where the optimizer keeps it."""
        value = unpack(packed, partial(self._load, self._stored_name(name)))
        if slot == STEP:
            value = as_counted_by(self._state.optimizer, value)
        if isinstance(value, torch.Tensor):
            group = self._state.optimizer.param_groups[flat.group]
            on_host = slot == STEP and not group.get("capturable") and not group.get("fused")
            value = value.to("cpu" if on_host else flat.master.device)
        fresh[slot] = value

    def _stored_name(self, name: str) -> str:
        return self._aliases.get(name, name)

    def _load(self, name: str, path: str) -> torch.Tensor:
        return self._contents.loader(name)(path)


def _clear(elements: torch.Tensor) -> None:
    elements.zero_()


def _is_array(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"$array"}
