"""What a composite holds, in the words of a state dict."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tailorstore.adapters.dcp.names import Names, Path, Place, name_of
from tailorstore.adapters.dcp.options import Groups, options_of
from tailorstore.adapters.dcp.values import clothed
from tailorstore.domain.records import EXTRA_LAYER
from tailorstore.engine.contents import CompositeContents
from tailorstore.engine.light.sources import Source
from tailorstore.engine.tensors.memory import DTYPES
from tailorstore.engine.tensors.packing import unpack

RECORD = "@dcp"
"""Key in the extra state of commits that DCP made: how they are named, and all that is in no layer."""


@dataclass(frozen=True, slots=True)
class StoredValue:
    """One value of a state dict, as it is stored."""

    path: Path
    source: Source | None
    """Where the elements of a tensor are that has an array of its own."""
    value: Callable[[], Any]
    """Reads anything else."""
    tensor: torch.Tensor | None = None
    """A tensor that stood in a document."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of a tensor; ``None`` for what is none."""
        if self.source is not None:
            return self.source.shape
        return tuple(self.tensor.shape) if self.tensor is not None else None

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of a tensor."""
        if self.source is not None:
            return DTYPES[self.source.dtype]
        return self.tensor.dtype if self.tensor is not None else None


class StoredState:
    """The state dict that a composite holds. Reads documents; elements and values only when they are asked for."""

    def __init__(self, contents: CompositeContents, names: Names) -> None:
        """Take a composite, and how to name what ``Store.commit`` made without knowing of DCP."""
        self._contents = contents
        extra = contents.extra_content().get("extra")
        record = extra.get(RECORD) if isinstance(extra, dict) else None
        self.recorded = record is not None
        """Whether DCP made the commit."""
        self.names = names_from_json(record) if record is not None else names
        """How its values are named."""
        self._kept = record["values"] if record is not None else []

    def tensors(self) -> dict[str, Source]:
        """Return the tensors of all layers by their stored names, tied ones included."""
        arrays, aliases = self._contents.model_arrays()
        return arrays | {name: arrays[target] for name, target in aliases.items()}

    def slots(self) -> Mapping[str, Mapping[str, Any]]:
        """Return stored name → slot → skeleton."""
        return self._contents.slots()

    def groups(self) -> Groups:
        """Return the optimizer's parameter groups; those of several optimizers one after the other."""
        return [group for groups in self._contents.extra_part("param_groups", []) for group in groups]

    def kept(self) -> dict[Path, StoredValue]:
        """Return what is in no layer, by path."""
        found = {}
        for path, packed, kind in self._kept:
            stored = self._described(EXTRA_LAYER, tuple(path), packed)
            found[stored.path] = StoredValue(
                stored.path, stored.source, partial(_read, stored.value, kind), stored.tensor
            )
        return found

    def values(self) -> dict[str, StoredValue]:
        """Return everything, by the name that DCP gives it."""
        found = [*self._in_layers(), *self.kept().values()]
        found += [
            StoredValue(path, None, partial(_itself, value), value if isinstance(value, torch.Tensor) else None)
            for path, value in options_of(self.names, self.groups()).items()
        ]
        return {name_of(value.path): value for value in found}

    def _in_layers(self) -> Iterator[StoredValue]:
        tensors = self.tensors()
        slots = {
            Place(name, slot): (self._contents.layer_of(name), packed)
            for name, held in self.slots().items()
            for slot, packed in _flattened(held)
        }
        paths = self.names.paths([*map(Place, tensors), *slots])
        for name, source in tensors.items():
            yield StoredValue(paths[Place(name)], source, partial(self._contents.read, source))
        for place, (layer, packed) in slots.items():
            yield self._described(layer, paths[place], packed)
        for name, packed in self._contents.states().items():
            yield self._described(self._contents.layer_of(name), (*self.names.model, name), packed)

    def _described(self, layer: str, path: Path, packed: Any) -> StoredValue:  # noqa: ANN401 - a skeleton
        def load(array: str) -> torch.Tensor:
            return self._contents.read(self._contents.array(layer, array))

        value = partial(unpack, packed, load)
        kind = next(iter(packed)) if isinstance(packed, dict) and len(packed) == 1 else None
        if kind == "$array":
            return StoredValue(path, self._contents.array(layer, packed["$array"]), value)
        return StoredValue(path, None, value, value() if kind == "$scalar" else None)


def _flattened(held: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield slots; those of slots that are mappings by their joined keys, as DCP has them."""
    for slot, packed in held.items():
        if isinstance(packed, dict) and not any(key.startswith("$") for key in packed):
            yield from _flattened(packed, f"{above}{slot}.")
        else:
            yield f"{above}{slot}", packed


def _read(value: Callable[[], Any], kind: str) -> Any:  # noqa: ANN401
    return clothed(value(), kind)


def _itself(value: Any) -> Any:  # noqa: ANN401
    return value


def names_to_json(names: Names) -> dict[str, Any]:
    """Return names as JSON."""
    return {
        "model": list(names.model),
        "optim": list(names.optim) if names.optim is not None else None,
        "flat": names.flat,
        "others": [[list(path), place.tensor, place.slot] for path, place in names.others.items()],
    }


def names_from_json(found: Mapping[str, Any]) -> Names:
    """Return the names that :func:`names_to_json` described."""
    optim = tuple(found["optim"]) if found["optim"] is not None else None
    others = {tuple(path): Place(tensor, slot) for path, tensor, slot in found["others"]}
    return Names(tuple(found["model"]), optim, found["flat"], others)
