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
    find_aliases,
    optimizers_of,
    unwrap,
    without_wrappers,
)
from tailorstore.engine.tensors.memory import DTYPES
from tailorstore.engine.tensors.packing import unpack

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

    model: dict[str, torch.Tensor] = field(default_factory=dict)
    """Stored tensor name → the tensor it is read into."""
    slots: list[tuple[str, str, torch.Tensor]] = field(default_factory=list)
    """(parameter name, array path, tensor) of every optimizer slot that is an array."""
    finish: list[Callable[[], None]] = field(default_factory=list)
    """To be called in order after the last read: puts slots, options and scalars in place."""


def plan_model(
    tensors: Mapping[str, torch.Tensor], stored: Mapping[str, StoredTensor], problems: list[str], *, strict: bool
) -> Filling:
    """Match a model's tensors with stored ones by name.

    Args:
        tensors: what is to be filled, by name.
        stored: every stored name, aliases included.
        problems: every difference is added here.
        strict: also count missing and unexpected names, and other dtypes, as differences.
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
            if name not in tensors
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
            filling.model[name] = tensor.detach()
    return filling


def plan_states(
    model: Model,
    mine: Collection[str],
    states: Mapping[str, Any],
    load: Callable[[str, str], Any],
    problems: list[str],
    filling: Filling,
    *,
    strict: bool,
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
    """
    module = unwrap(model)
    if not isinstance(module, torch.nn.Module):
        return
    if strict:
        problems += [f"missing: extra state {name} is not in the composite" for name in mine if name not in states]
        problems += [f"unexpected: extra state {name} is not in the model" for name in states if name not in mine]
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
    tensors: dict[str, torch.Tensor],
    optim: Optim,
    stored: StoredOptim,
    problems: list[str],
    filling: Filling,
    load: Callable[[str, str], Any],
    *,
    strict: bool,
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
    for number, optimizer in enumerate(optimizers):
        groups = stored.groups[number] if stored.groups else []
        if isinstance(optimizer, torch.optim.Optimizer):
            mine, theirs = type(optimizer).__qualname__, stored.classes[number] if stored.classes else None
            if strict and theirs is not None and mine != theirs:
                problems.append(f"optimizer {number}: it is a {mine}, the composite's was a {theirs}")
                continue
            plan = _OptimizerPlan(optimizer, number, names, stored, filling, load)
            plan.match(groups, problems)
            shared = stored.shared[number] if stored.shared else None
            if shared:
                filling.finish.append(partial(optimizer.state.update, shared))
        else:
            _fill_state_dict(optimizer, groups, stored, filling, load)


class _OptimizerPlan:
    """Fills one torch optimizer by writing its ``state`` directly.

    ``Optimizer.load_state_dict`` would cast floating state to the parameter's dtype and lose bits.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        number: int,
        names: Mapping[int, str],
        stored: StoredOptim,
        filling: Filling,
        load: Callable[[str, str], Any],
    ) -> None:
        self._optimizer = optimizer
        self._number = number
        self._names = names
        self._stored = stored
        self._filling = filling
        self._load = load

    def match(self, groups: Sequence[Mapping[str, Any]], problems: list[str]) -> None:
        mine = [[self._names.get(id(param)) for param in group["params"]] for group in self._optimizer.param_groups]
        theirs = [list(group["params"]) for group in groups]
        if groups and mine != theirs:
            problems.append(f"optimizer {self._number}: {_groups_differ(mine, theirs)}")
            return
        for at, group in enumerate(self._optimizer.param_groups):
            for name, param in zip(mine[at], group["params"], strict=True):
                if name is not None:
                    self._plan_param(name, param, group)
            if groups:
                options = {key: _like(value, group.get(key)) for key, value in groups[at].items() if key != "params"}
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
            path = value.get("$array") if isinstance(value, dict) and len(value) == 1 else None
            if path is None:
                # Optimizers keep their step counter on the host unless told otherwise, and nothing else.
                host = slot == "step" and not on_device
                device = _device_of(current.get(slot), torch.device("cpu") if host else param.device)
                self._filling.finish.append(self._scalar(fresh, slot, name, value, device))
                continue
            known = self._stored.specs[name][path]
            reused = _reusable(current.get(slot), known, param)
            fresh[slot] = _new_slot(known, param) if reused is None else reused
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


def _reusable(current: object, known: StoredTensor, param: torch.Tensor) -> torch.Tensor | None:
    if type(current) is not torch.Tensor:
        return None
    fits = tuple(current.shape) == known.shape and current.dtype == DTYPES[known.dtype]
    return current if fits and (current.shape != param.shape or current.stride() == param.stride()) else None


def _new_slot(known: StoredTensor, param: torch.Tensor) -> torch.Tensor:
    if known.shape == tuple(param.shape):
        # Of the parameter's own strides (channels_last, …): fused optimizers walk both as flat memory.
        return torch.empty_like(param, dtype=DTYPES[known.dtype], memory_format=torch.preserve_format).detach()
    return torch.empty(known.shape, dtype=DTYPES[known.dtype], device=param.device)


def _like(option: Any, current: object) -> Any:  # noqa: ANN401
    """Return an option where the one that it replaces was: a learning rate may be a tensor on a device."""
    if isinstance(option, torch.Tensor) and isinstance(current, torch.Tensor):
        return option.to(current.device)
    return option


def _device_of(current: object, default: torch.device) -> torch.device:
    return current.device if isinstance(current, torch.Tensor) else default


def _groups_differ(mine: list[list[str | None]], theirs: list[list[str]]) -> str:
    if len(mine) != len(theirs):
        return f"{len(mine)} parameter groups, {len(theirs)} in the composite"
    notes = []
    for at, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        missing = [name for name in here if name not in there]
        unexpected = [name for name in there if name not in here]
        notes += [f"group {at} has {name}, the composite's has not" for name in missing]
        notes += [f"group {at} lacks {name}, the composite's has it" for name in unexpected]
        if here != there and not missing and not unexpected:
            notes.append(f"group {at} holds its parameters in another order")
    return "; ".join(notes)


def _fill_state_dict(
    target: OptimizerLike,
    groups: Sequence[Mapping[str, Any]],
    stored: StoredOptim,
    filling: Filling,
    load: Callable[[str, str], Any],
) -> None:
    if not isinstance(target, MutableMapping):
        msg = f"an optimizer state dict to restore into must be a mutable mapping, not {type(target).__name__}"
        raise InvalidInputError(msg)
    wrapped = "state" in target and "param_groups" in target

    def finish() -> None:
        state = {
            name: {slot: unpack(value, partial(load, name)) for slot, value in slots.items()}
            for name, slots in stored.slots.items()
        }
        if wrapped:
            target["state"] = state
            target["param_groups"] = [dict(group) for group in groups]
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
