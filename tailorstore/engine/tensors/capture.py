"""What there is to save: tensors of a model and slots of its optimizers, sorted into layers.

Nothing is copied here: a capture holds the live tensors themselves, and a JSON skeleton that says where each belongs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tailorstore.domain.errors import ExtraStateError, InvalidInputError
from tailorstore.domain.names import LayerRule, escape
from tailorstore.domain.records import EXTRA_LAYER
from tailorstore.engine.tensors.memory import check_storable, nbytes
from tailorstore.engine.tensors.packing import Arrays, Packer, unpack
from tailorstore.engine.tensors.shards import Layouts, Sharded, is_distributed

OPTIM_FOLDER = "@optim/"
STATE_FOLDER = "@state/"

Tensorlike = torch.Tensor | Sharded
Model = torch.nn.Module | Mapping[str, torch.Tensor] | Mapping[str, Tensorlike]
OptimizerLike = torch.optim.Optimizer | Mapping[str, Any]
Optim = None | OptimizerLike | Sequence[OptimizerLike]


@dataclass(frozen=True, slots=True)
class LayerCapture:
    """One layer's live state."""

    name: str
    content: dict[str, Any]
    """Skeleton: ``params``, ``buffers``, ``states``, ``optim`` (parameter → slot → value) and ``aliases``."""
    arrays: Arrays
    """Array path → live tensor; a stand-in on the meta device for what is in ``held``."""
    held: Mapping[str, Sharded] = field(default_factory=dict)
    """Array path → what this process holds of a tensor that several hold together."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(nbytes(tensor) for tensor in self.arrays.values())


@dataclass(frozen=True, slots=True)
class Capture:
    """A model's and its optimizers' live state."""

    layers: dict[str, LayerCapture]
    """In the model's order; without ``@extra``."""
    tied: dict[str, str]
    """Layers that hold nothing but tied tensors → the layer that stores those."""
    param_groups: list[Any]
    """Per optimizer, its groups with options packed and parameters by name; empty without optimizers."""
    shared: list[Any]
    """Per optimizer, state that belongs to no parameter; ``None`` where there is none."""
    classes: list[str | None]
    """Per optimizer, the name of its class; ``None`` for a state dict."""
    shared_arrays: Arrays = field(default_factory=dict)
    """Arrays of ``param_groups`` and ``shared``: they go into ``@extra``."""


def weights_of(layer: LayerCapture) -> dict[str, str]:
    """Return array path → name of a layer's parameters and buffers."""
    return {value["$array"]: name for kind in ("params", "buffers") for name, value in layer.content[kind].items()}


def slots_of(layer: LayerCapture) -> dict[str, tuple[str, str]]:
    """Return array path → (parameter, slot) of those optimizer slots that are arrays."""
    return {
        value["$array"]: (name, slot)
        for name, slots in layer.content["optim"].items()
        for slot, value in slots.items()
        if isinstance(value, dict) and value.keys() == {"$array"}
    }


def learning_rate(captured: Capture) -> float | None:
    """Return the greatest learning rate of any parameter group; ``None`` where there is none."""
    rates = []
    for group in [group for groups in captured.param_groups if isinstance(groups, list) for group in groups]:
        packed = group.get("lr") if isinstance(group, dict) else None
        rate = unpack(packed, captured.shared_arrays.__getitem__)
        if isinstance(rate, int | float) or (isinstance(rate, torch.Tensor) and rate.numel() == 1):
            rates.append(float(rate))
    return max(rates, default=None)


def unwrap(model: Model) -> Model:
    """Return the module inside ``torch.compile`` and DistributedDataParallel wrappers."""
    while isinstance(model, torch.nn.Module):
        if isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        else:
            break
    return model


def model_tensors(model: Model) -> tuple[dict[str, Tensorlike], dict[str, Any]]:
    """Return a model's tensors by full name, and what else its state dict holds (``get_extra_state``).

    Names inside compiled submodules lose their ``_orig_mod`` parts, so that compiling never changes a layer's name.

    Raises:
        InvalidInputError: not a model, or an empty one, or a dictionary that does not map names to tensors.
    """
    model = unwrap(model)
    if isinstance(model, torch.nn.Module):
        entries: Mapping[str, Any] = model.state_dict(keep_vars=True)
    elif isinstance(model, Mapping):
        entries = model
    else:
        msg = f"model must be a torch.nn.Module or a dictionary of tensors, not {type(model).__name__}"
        raise InvalidInputError(msg)
    tensors: dict[str, Tensorlike] = {}
    states: dict[str, Any] = {}
    for name, value in entries.items():
        if not isinstance(name, str):
            msg = f"model maps {name!r} to a tensor; names must be strings"
            raise InvalidInputError(msg)
        clean = without_wrappers(name) if isinstance(model, torch.nn.Module) else name
        if clean in tensors or clean in states:
            msg = f"two tensors of the model are named {clean!r} once 'torch.compile' is taken out of their names"
            raise InvalidInputError(msg)
        if isinstance(value, Sharded):
            tensors[clean] = value
        elif isinstance(value, torch.Tensor):
            check_storable(value, clean)
            tensors[clean] = value
        elif isinstance(model, torch.nn.Module):
            states[clean] = value
        else:
            msg = f"model entry {name!r} is a {type(value).__name__}, not a tensor; other state goes into extra="
            raise InvalidInputError(msg)
    if not tensors and not states:
        msg = "the model holds no tensors: nothing to commit or to restore into"
        raise InvalidInputError(msg)
    return tensors, states


def without_wrappers(name: str) -> str:
    """Drop what ``torch.compile`` adds to the names inside a compiled submodule."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def find_aliases(tensors: Mapping[str, Tensorlike]) -> dict[str, str]:
    """Return name → the first name that shares exactly its memory (tied parameters)."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = _identity(tensor)
        if key is None:
            continue
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases


def _identity(tensor: Tensorlike) -> tuple[Any, ...] | None:
    """Return what two names of one memory have in common; ``None`` where there is no memory to share."""
    if isinstance(tensor, Sharded) or is_distributed(tensor):
        # A rank may hold no element of it: memory tells nothing there, and all ranks must find the same.
        return (id(tensor),)
    if tensor.numel() == 0:
        return None
    return (
        tensor.device,
        tensor.dtype,
        tensor.data_ptr(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def is_parameter(tensor: Tensorlike) -> bool:
    """Whether a tensor is a module's parameter rather than a buffer."""
    return tensor.trained if isinstance(tensor, Sharded) else isinstance(tensor, torch.nn.Parameter)


def optimizers_of(optim: Optim) -> list[OptimizerLike]:
    """Return the optimizers or optimizer state dicts that were passed, as a list.

    Raises:
        InvalidInputError: something that is neither.
    """
    if optim is None:
        return []
    found = list(optim) if isinstance(optim, Sequence) and not isinstance(optim, str) else [optim]
    unwrapped = []
    for item in found:
        inner = _unwrap_optimizer(item)
        if type(inner).__name__ == "ZeroRedundancyOptimizer":
            msg = (
                "optim: a ZeroRedundancyOptimizer keeps each parameter's state on one rank only, where no slot of the"
                " others can be found; use FSDP2 (fully_shard), whose slots are stored from every rank"
            )
            raise InvalidInputError(msg)
        if not isinstance(inner, torch.optim.Optimizer | Mapping):
            msg = f"optim must be torch optimizers or state dicts keyed by parameter name, not {type(item).__name__}"
            raise InvalidInputError(msg)
        unwrapped.append(inner)
    return unwrapped


def _unwrap_optimizer(item: Any) -> Any:  # noqa: ANN401
    """Return the optimizer that accelerate, lightning and others wrap; one with state of its own is no mere wrapper."""
    inner = getattr(item, "optimizer", None)
    if not isinstance(inner, torch.optim.Optimizer):
        return item
    return inner if not isinstance(item, torch.optim.Optimizer) or item.state is inner.state else item


def capture(model: Model, optim: Optim, rule: LayerRule) -> Capture:
    """Sort a model's tensors and its optimizers' slots into layers. Copies nothing.

    Args:
        model: module or flat dictionary of tensors.
        optim: optimizer, several, state dict keyed by parameter name, or ``None``.
        rule: tensor name → layer name.

    Raises:
        InvalidInputError: a tensor or slot that cannot be stored, an optimizer parameter that the model does not
            have, or a layer named ``@extra``.
    """
    tensors, states = model_tensors(model)
    aliases = find_aliases(tensors)
    sorter = _Sorter(rule)
    for name, tensor in tensors.items():
        if name in aliases:
            sorter.add_alias(name, aliases[name])
        else:
            sorter.add_tensor(name, tensor)
    for name, value in states.items():
        sorter.add_state(name, value)
    names = {id(tensor): aliases.get(name, name) for name, tensor in reversed(tensors.items())}
    names |= {id(tensor): name for name, tensor in tensors.items() if name not in aliases}
    extra = Packer()
    groups, shared, classes = [], [], []
    for number, optimizer in enumerate(optimizers_of(optim)):
        named = _named_state(optimizer, names, tensors, number)
        for name, slots in named.state.items():
            sorter.add_slots(aliases.get(name, name), slots, number)
        classes.append(type(optimizer).__qualname__ if isinstance(optimizer, torch.optim.Optimizer) else None)
        groups.append(extra.pack(named.groups, f"optim.{number}.groups"))
        shared.append(extra.pack(named.shared, f"optim.{number}.shared") if named.shared else None)
    layers = sorter.layers()
    tied = {rule(name): rule(target) for name, target in aliases.items() if rule(name) not in layers}
    return Capture(layers, tied, groups, shared, classes, extra.arrays)


@dataclass(frozen=True, slots=True)
class _NamedState:
    state: dict[str, Mapping[str, Any]]
    groups: list[dict[str, Any]]
    shared: dict[Any, Any]


def _named_state(
    optimizer: OptimizerLike, names: Mapping[int, str], tensors: Mapping[str, Tensorlike], number: int
) -> _NamedState:
    if isinstance(optimizer, torch.optim.Optimizer):
        groups = []
        for at, group in enumerate(optimizer.param_groups):
            members = [
                _name_of(param, names, f"optimizer {number}, group {at}, item {i}")
                for i, param in enumerate(group["params"])
            ]
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": members})
        # Annotated as keyed by tensors; optimizers of the wild keep state of their own under other keys.
        held: Mapping[Any, Any] = optimizer.state
        state = {names[id(key)]: slots for key, slots in held.items() if id(key) in names}
        shared = {key: value for key, value in held.items() if not isinstance(key, torch.Tensor)}
        return _NamedState(state, groups, shared)
    by_name = optimizer["state"] if "state" in optimizer and "param_groups" in optimizer else optimizer
    for name, slots in by_name.items():
        if name not in tensors or not isinstance(slots, Mapping):
            msg = (
                f"optimizer state dict {number} has an entry {name!r} that is no parameter of the model; key it by"
                " parameter name, as torch.distributed.checkpoint.state_dict.get_optimizer_state_dict does"
            )
            raise InvalidInputError(msg)
    groups = [dict(group) for group in optimizer["param_groups"]] if by_name is not optimizer else []
    return _NamedState(dict(by_name), groups, {})


def _name_of(param: torch.Tensor, names: Mapping[int, str], where: str) -> str:
    try:
        return names[id(param)]
    except KeyError:
        msg = (
            f"{where}: a parameter of shape {tuple(param.shape)} is not a tensor of the model; pass the model it trains"
        )
        raise InvalidInputError(msg) from None


class _Sorter:
    """Gathers tensors, slots and aliases into layers."""

    def __init__(self, rule: LayerRule) -> None:
        self._rule = rule
        self._contents: dict[str, dict[str, Any]] = {}
        self._packers: dict[str, Packer] = {}
        self._known: Layouts = {}

    def layers(self) -> dict[str, LayerCapture]:
        return {
            name: LayerCapture(name, content, self._packers[name].arrays, self._packers[name].held)
            for name, content in self._contents.items()
        }

    def _layer(self, tensor_name: str) -> tuple[dict[str, Any], Packer]:
        layer = self._rule(tensor_name)
        if not isinstance(layer, str):
            msg = f"the layer rule gave {layer!r} for {tensor_name!r}; it must give a string"
            raise InvalidInputError(msg)
        if layer == EXTRA_LAYER:
            msg = (
                f"tensor {tensor_name!r} would be in a layer named {EXTRA_LAYER}, which is tailorstore's own; rename it"
            )
            raise InvalidInputError(msg)
        empty: dict[str, Any] = {"params": {}, "buffers": {}, "states": {}, "optim": {}, "aliases": {}}
        return self._contents.setdefault(layer, empty), self._packers.setdefault(
            layer, Packer(spread=True, known=self._known)
        )

    def add_tensor(self, name: str, tensor: Tensorlike) -> None:
        content, packer = self._layer(name)
        kind = "params" if is_parameter(tensor) else "buffers"
        content[kind][name] = packer.pack(tensor, name, array_path=escape(name))

    def add_alias(self, name: str, target: str) -> None:
        content, _ = self._layer(target)
        content["aliases"][name] = target

    def add_state(self, name: str, value: Any) -> None:  # noqa: ANN401
        content, packer = self._layer(name)
        content["states"][name] = _pack_state(packer, value, name)

    def add_slots(self, name: str, slots: Mapping[str, Any], number: int) -> None:
        content, packer = self._layer(name)
        if name in content["optim"]:
            msg = f"parameter {name!r} has state in two optimizers (the second is number {number}); each may have one"
            raise InvalidInputError(msg)
        content["optim"][name] = {
            _slot_name(slot, name): _pack_slot(packer, name, slot, value, self._known) for slot, value in slots.items()
        }


def _slot_name(slot: object, name: str) -> str:
    if not isinstance(slot, str) or slot.startswith("$"):
        msg = f"optimizer state of {name!r} has a slot {slot!r}; slots must be strings that do not begin with $"
        raise InvalidInputError(msg)
    return slot


def _pack_slot(packer: Packer, name: str, slot: str, value: Any, known: Layouts) -> Any:  # noqa: ANN401
    if isinstance(value, Sharded) or (isinstance(value, torch.Tensor) and value.dim() > 0):
        return packer.pack(value, f"{slot} of {name}", array_path=f"{OPTIM_FOLDER}{escape(slot)}/{escape(name)}")
    nested = Packer(f"{OPTIM_FOLDER}{escape(slot)}/", spread=True, known=known)
    packed = nested.pack(value, name)
    packer.arrays.update(nested.arrays)
    packer.held.update(nested.held)
    return packed


def _pack_state(packer: Packer, value: Any, name: str) -> Any:  # noqa: ANN401
    nested = Packer(STATE_FOLDER)
    try:
        packed = nested.pack(value, name)
    except ExtraStateError as error:
        msg = f"{error} (returned by the module's get_extra_state)"
        raise ExtraStateError(msg) from error
    packer.arrays.update(nested.arrays)
    return packed
