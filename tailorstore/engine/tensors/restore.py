"""Where stored values go: a model's tensors and an optimizer's slots, compared first, then filled in place."""

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tailorstore.domain.errors import InvalidInputError, RestoreMismatchError
from tailorstore.engine.tensors.capture import (
    Model,
    Optim,
    OptimizerLike,
    Tensorlike,
    find_aliases,
    optimizers_of,
    unwrap,
    without_wrappers,
)
from tailorstore.engine.tensors.groups import groups_differ, groups_here
from tailorstore.engine.tensors.memory import DTYPES
from tailorstore.engine.tensors.packing import unpack
from tailorstore.engine.tensors.shards import Sharded, is_distributed, sharded
from tailorstore.engine.tensors.slots import array_path, slot_for

_SHOWN = 40


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What is stored under a tensor's name, as far as a comparison needs it."""

    shape: tuple[int, ...]
    dtype: str
    digests: tuple[str, ...] = ()
    """Of its chunks."""


@dataclass(slots=True)
class Filling:
    """Which tensors to fill from which arrays, and what to do once all are filled."""

    model: dict[str, Sharded] = field(default_factory=dict)
    """Stored tensor name → what of the tensor that it is read into is here."""
    slots: list[tuple[str, str, torch.Tensor]] = field(default_factory=list)
    """(parameter name, array path, tensor) of every optimizer slot that is an array; some may be ``DTensor``."""
    finish: list[Callable[[], None]] = field(default_factory=list)
    """To be called in order after the last read: puts slots, options and scalars in place."""


def plan_model(
    tensors: Mapping[str, Tensorlike],
    stored: Mapping[str, StoredTensor],
    problems: list[str],
    *,
    strict: bool,
    elsewhere: Collection[str] = (),
) -> Filling:
    """Match a model's tensors with stored ones by name.

    Args:
        tensors: what is to be filled, by name.
        stored: every stored name, aliases included.
        problems: every difference is added here.
        strict: also count missing and unexpected names, and other dtypes, as differences.
        elsewhere: names that the models of other ranks have; a set, if there are many. None of them is unexpected.

    Raises:
        InvalidInputError: a tensor that cannot be filled in parts; names it. Nothing was changed.
    """
    filling = Filling()
    aliases = find_aliases(tensors)
    if strict:
        problems += [
            f"missing: {name} {list(tensor.shape)} is not in the composite"
            for name, tensor in tensors.items()
            if name not in stored
        ]
        problems += [
            f"unexpected: {name} {list(known.shape)} is not in the model"
            for name, known in stored.items()
            if name not in tensors and name not in elsewhere
        ]
    for name, target in aliases.items():
        if strict and name in stored and target in stored and stored[name] != stored[target]:
            problems.append(f"tied: {name} and {target} are one tensor in the model, two in the composite")
    for name, tensor in tensors.items():
        if name not in stored or name in aliases:
            continue
        known = stored[name]
        if tuple(tensor.shape) != known.shape:
            problems.append(f"shape: {name} is {list(tensor.shape)} in the model, {list(known.shape)} in the composite")
        elif strict and tensor.dtype != DTYPES[known.dtype]:
            mine = str(tensor.dtype).removeprefix("torch.")
            problems.append(f"dtype: {name} is {mine} in the model, {known.dtype} in the composite")
        else:
            filling.model[name] = _to_fill(tensor, name)
    return filling


def _to_fill(tensor: Tensorlike, name: str) -> Sharded:
    return tensor if isinstance(tensor, Sharded) else sharded(tensor.detach(), name)


def plan_states(
    model: Model,
    mine: Collection[str],
    states: Mapping[str, Any],
    load: Callable[[str, str], Any],
    problems: list[str],
    filling: Filling,
    *,
    strict: bool,
    elsewhere: Collection[str] = (),
) -> None:
    """Arrange for modules with ``set_extra_state`` to be given theirs back.

    Args:
        model: whose modules they are.
        mine: names of the extra states that the model has now.
        states: stored ones, packed, by name.
        load: reads an array (state name, path).
        problems: every difference is added here.
        filling: what to do once all is read is added here.
        strict: also count missing and unexpected names as differences.
        elsewhere: names of extra states that other ranks have; none of them is unexpected.
    """
    module = unwrap(model)
    if not isinstance(module, torch.nn.Module):
        return
    if strict:
        problems += [f"missing: extra state {name} is not in the composite" for name in mine if name not in states]
        unexpected = [name for name in states if name not in mine and name not in elsewhere]
        problems += [f"unexpected: extra state {name} is not in the model" for name in unexpected]
    modules = {without_wrappers(name): found for name, found in module.named_modules()}
    for name in mine:
        owner = modules.get(name.removesuffix("_extra_state").removesuffix("."))
        if name in states and owner is not None:
            filling.finish.append(partial(_set_state, owner, states[name], partial(load, name)))


def _set_state(owner: torch.nn.Module, value: Any, load: Callable[[str], Any]) -> None:  # noqa: ANN401
    owner.set_extra_state(unpack(value, load))


@dataclass(frozen=True, slots=True)
class StoredOptim:
    """What a composite holds of optimizers."""

    groups: Sequence[Sequence[Mapping[str, Any]]]
    """Per optimizer, its groups: options, and ``params`` as names."""
    shared: Sequence[Mapping[Any, Any] | None]
    classes: Sequence[str | None]
    """Per optimizer, the name of its class; ``None`` where it was a state dict."""
    slots: Mapping[str, Mapping[str, Any]]
    """Parameter name → slot → packed value."""
    specs: Mapping[str, Mapping[str, StoredTensor]]
    """Parameter name → array path → what is stored there."""
    aliases: Mapping[str, str]


def plan_optim(
    tensors: dict[str, Tensorlike],
    optim: Optim,
    stored: StoredOptim,
    problems: list[str],
    filling: Filling,
    load: Callable[[str, str], Any],
    *,
    strict: bool,
    elsewhere: Collection[str] = (),
) -> None:
    """Match optimizers with stored ones, group by group and parameter by parameter.

    Args:
        tensors: of the model whose parameters the optimizers hold, by name.
        optim: what was passed to ``restore``.
        stored: what the composite holds.
        problems: every difference is added here.
        filling: what to read and do is added here; nothing is changed before its ``finish`` runs.
        load: reads an array (parameter name, path) that is no plain slot.
        strict: also count optimizer state that is missing altogether as a difference.
        elsewhere: names that the models of other ranks have. What is stored of those that are not in this one is left
            out before groups are compared.
    """
    optimizers = optimizers_of(optim)
    if optimizers and not stored.groups:
        # Layers of older commits may hold slots, but those of this commit's own step are missing.
        if strict:
            problems.append("missing: the composite holds no optimizer state (its commit was made without optim)")
        return
    if stored.groups and len(optimizers) != len(stored.groups):
        problems.append(f"optimizers: {len(optimizers)} passed, {len(stored.groups)} in the composite")
        return
    names = {id(tensor): stored.aliases.get(name, name) for name, tensor in reversed(tensors.items())}
    absent = {stored.aliases.get(name, name) for name in elsewhere}.difference(names.values())
    for number, optimizer in enumerate(optimizers):
        groups = stored.groups[number] if stored.groups else []
        if isinstance(optimizer, torch.optim.Optimizer):
            mine, theirs = type(optimizer).__qualname__, stored.classes[number] if stored.classes else None
            if strict and theirs is not None and mine != theirs:
                problems.append(f"optimizer {number}: it is a {mine}, the composite's was a {theirs}")
                continue
            plan = _OptimizerPlan(optimizer, number, names, absent, stored, filling, load)
            plan.match(groups, problems)
            shared = stored.shared[number] if stored.shared else None
            if shared:
                filling.finish.append(partial(optimizer.state.update, shared))
        else:
            by_name = {names[id(tensor)]: tensor for tensor in tensors.values()}
            _fill_state_dict(optimizer, groups, by_name, absent, stored, filling, load)


class _OptimizerPlan:
    """Fills one torch optimizer by writing its ``state`` directly.

    ``Optimizer.load_state_dict`` would cast floating state to the parameter's dtype and lose bits.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        number: int,
        names: Mapping[int, str],
        absent: Collection[str],
        stored: StoredOptim,
        filling: Filling,
        load: Callable[[str, str], Any],
    ) -> None:
        self._optimizer = optimizer
        self._number = number
        self._names = names
        self._absent = absent
        self._stored = stored
        self._filling = filling
        self._load = load

    def match(self, groups: Sequence[Mapping[str, Any]], problems: list[str]) -> None:
        mine = [[self._names.get(id(param)) for param in group["params"]] for group in self._optimizer.param_groups]
        here = groups_here(groups, mine, self._absent)
        theirs = [group["params"] for group in here]
        if groups and mine != theirs:
            problems.append(f"optimizer {self._number}: {groups_differ(mine, theirs)}")
            return
        for at, group in enumerate(self._optimizer.param_groups):
            for name, param in zip(mine[at], group["params"], strict=True):
                if name is not None:
                    self._plan_param(name, param, group)
            if groups:
                options = {key: _like(value, group.get(key)) for key, value in here[at].items() if key != "params"}
                self._filling.finish.append(partial(group.update, options))

    def _plan_param(self, name: str, param: torch.Tensor, group: Mapping[str, Any]) -> None:
        slots = self._stored.slots.get(name)
        if not slots:
            self._filling.finish.append(lambda: self._optimizer.state.pop(param, None))
            return
        current = self._optimizer.state.get(param, {})
        on_device = bool(group.get("capturable")) or bool(group.get("fused"))
        fresh: dict[str, Any] = {}
        for slot, value in slots.items():
            path = array_path(value)
            if path is None:
                # Optimizers keep their step counter on the host unless told otherwise, and nothing else.
                host = slot == "step" and not on_device
                device = _device_of(current.get(slot), torch.device("cpu") if host else param.device)
                self._filling.finish.append(self._scalar(fresh, slot, name, value, device))
                continue
            known = self._stored.specs[name][path]
            fresh[slot] = slot_for(known.shape, known.dtype, param, current.get(slot))
            self._filling.slots.append((name, path, fresh[slot]))
        order = list(slots)
        self._filling.finish.append(
            lambda: self._optimizer.state.__setitem__(param, {slot: fresh[slot] for slot in order})
        )

    def _scalar(
        self,
        fresh: dict[str, Any],
        slot: str,
        name: str,
        value: Any,  # noqa: ANN401
        device: torch.device,
    ) -> Callable[[], None]:
        def finish() -> None:
            found = unpack(value, lambda path: self._load(name, path))
            fresh[slot] = found.to(device) if isinstance(found, torch.Tensor) else found

        return finish


def _like(option: Any, current: object) -> Any:  # noqa: ANN401
    """Return an option where the one that it replaces was: a learning rate may be a tensor on a device."""
    if isinstance(option, torch.Tensor) and isinstance(current, torch.Tensor):
        return option.to(current.device)
    return option


def _device_of(current: object, default: torch.device) -> torch.device:
    return current.device if isinstance(current, torch.Tensor) else default


def _fill_state_dict(
    target: OptimizerLike,
    groups: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensorlike],
    absent: Collection[str],
    stored: StoredOptim,
    filling: Filling,
    load: Callable[[str, str], Any],
) -> None:
    if not isinstance(target, MutableMapping):
        msg = f"an optimizer state dict to restore into must be a mutable mapping, not {type(target).__name__}"
        raise InvalidInputError(msg)
    wrapped = "state" in target and "param_groups" in target
    held = {name: slots for name, slots in stored.slots.items() if name not in absent}
    fresh: dict[tuple[str, str], torch.Tensor] = {}
    for name, slots in held.items():
        param = tensors.get(name)
        for slot, value in slots.items():
            path = array_path(value)
            if path is not None and is_distributed(param):
                # Never the whole of what several ranks hold.
                known = stored.specs[name][path]
                fresh[name, slot] = slot_for(known.shape, known.dtype, param)
                filling.slots.append((name, path, fresh[name, slot]))

    def slot_of(name: str, slot: str, value: Any) -> Any:  # noqa: ANN401
        return fresh[name, slot] if (name, slot) in fresh else unpack(value, partial(load, name))

    def finish() -> None:
        state = {
            name: {slot: slot_of(name, slot, value) for slot, value in slots.items()} for name, slots in held.items()
        }
        if wrapped:
            target["state"] = state
            here = [[name for name in group["params"] if name not in absent] for group in groups]
            target["param_groups"] = [{**group, "params": names} for group, names in zip(groups, here, strict=True)]
        else:
            target.clear()
            target.update(state)

    filling.finish.append(finish)


def raise_mismatch(problems: list[str], what: str) -> None:
    """Raise one error that lists every difference, if there are any.

    Raises:
        RestoreMismatchError: there are differences. Nothing was changed.
    """
    if not problems:
        return
    shown = "\n  ".join(problems[:_SHOWN])
    more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    msg = (
        f"{what} does not fit the model or optimizer (nothing was changed):\n  {shown}{more}\n"
        "With strict=False, missing and unexpected names and other dtypes are passed over; shapes and parameter groups"
        " must fit."
    )
    raise RestoreMismatchError(msg)
