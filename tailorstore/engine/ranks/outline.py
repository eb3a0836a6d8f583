"""What each rank has of the state, without a value of it, and what all of them have together.

Ranks that hold the same kinds of parts of the same tensors have equal structures, whatever their parts are: under FSDP
or DDP all of them have, so that one structure and a few boxes a rank is all that travels. Stages of a pipeline differ.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from tailorstore.domain.chunks import Box, box_of
from tailorstore.domain.errors import InvalidInputError, RanksDisagreeError
from tailorstore.domain.holdings import Holding, holdings_of
from tailorstore.domain.skeleton import SECTIONS, paths_in
from tailorstore.engine.ranks.words import listed
from tailorstore.engine.tensors.capture import Capture, LayerCapture
from tailorstore.engine.tensors.memory import DTYPES, name_of
from tailorstore.engine.tensors.shards import Sharded


@dataclass(frozen=True, slots=True)
class Outline:
    """What one rank has."""

    structure: bytes
    """JSON: layers with their skeletons, and of each array dtype, shape and kind."""
    digest: str
    """Of the structure."""
    boxes: list[list[Box]]
    """By kind: which boxes of such a tensor this rank holds."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What all ranks have together."""

    captured: Capture
    """All arrays are stand-ins on the meta device; those of ``@extra`` are this rank's own."""
    holdings: Mapping[str, Mapping[str, tuple[Holding, ...]]]
    """Layer → array path → who holds which box."""


def outline_of(captured: Capture) -> Outline:
    """Return what this rank has of the state."""
    kinds: dict[Any, int] = {}
    boxes: list[list[Box]] = []
    layers = []
    for layer in captured.layers.values():
        arrays = {}
        for path, tensor in layer.arrays.items():
            held = layer.held.get(path)
            kind = _kind(tuple(tensor.shape), held)
            if kind not in kinds:
                kinds[kind] = len(boxes)
                boxes.append(_boxes(tuple(tensor.shape), held))
            arrays[path] = [name_of(tensor.dtype), list(tensor.shape), kinds[kind]]
        layers.append([layer.name, layer.content, arrays])
    described = {
        "layers": layers,
        "tied": captured.tied,
        "groups": captured.param_groups,
        "shared": captured.shared,
        "classes": captured.classes,
    }
    # Not sorted: the order of tensors is the model's.
    structure = json.dumps(described, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Outline(structure, xxhash.xxh3_128_hexdigest(structure), boxes)


def _kind(shape: tuple[int, ...], held: Sharded | None) -> Any:  # noqa: ANN401 - any hashable
    """Return what tensors have in common of which every rank holds the same boxes."""
    if held is not None:
        return (shape, held.layout) if held.layout is not None else (shape, tuple(part.box for part in held.parts))
    return shape


def _boxes(shape: tuple[int, ...], held: Sharded | None) -> list[Box]:
    return [part.box for part in held.parts] if held is not None else [box_of(shape)]


@dataclass(frozen=True, slots=True)
class _Group:
    """Ranks of one structure."""

    ranks: tuple[int, ...]
    structure: Mapping[str, Any]
    boxes: Sequence[Mapping[int, list[Box]]]
    """By kind: rank → its boxes."""


def unite(
    digests: Sequence[str],
    boxes: Sequence[Sequence[Sequence[Box]]],
    structures: Mapping[str, bytes],
    mine: Capture,
) -> Whole:
    """Put together what the ranks have.

    Args:
        digests: of each rank's structure.
        boxes: of each rank, by kind.
        structures: by digest.
        mine: this rank's own capture.

    Raises:
        RanksDisagreeError: a tensor has other shapes or dtypes on other ranks.
        InvalidInputError: no rank holds some part of a tensor.
    """
    groups = [
        _Group(
            ranks := tuple(rank for rank, found in enumerate(digests) if found == digest),
            json.loads(structures[digest]),
            [{rank: list(boxes[rank][kind]) for rank in ranks} for kind in range(len(boxes[ranks[0]]))],
        )
        for digest in dict.fromkeys(digests)
    ]
    union = _Union()
    for group in groups:
        union.add(group)
    return Whole(union.capture(groups, mine), union.holdings())


class _Union:
    """Gathers the structures of all groups, those of low ranks first."""

    def __init__(self) -> None:
        self._contents: dict[str, dict[str, Any]] = {}
        self._arrays: dict[str, dict[str, tuple[str, tuple[int, ...], int]]] = {}
        """Layer → path → dtype, shape, and the lowest rank that has it."""
        self._places: dict[tuple[str, str], list[tuple[_Group, int]]] = {}
        """(layer, path) → the groups that have it, and of which kind it is there."""

    def add(self, group: _Group) -> None:
        for name, content, arrays in group.structure["layers"]:
            known = self._contents.setdefault(name, {section: {} for section in SECTIONS})
            told = self._told_already(name, content)
            for section in SECTIONS:
                for key, value in content[section].items():
                    _merge(known[section], key, value, whole=section == "states")
            for path, (dtype, shape, kind) in arrays.items():
                if path not in told or self._arrays[name].get(path, ())[:2] == (dtype, tuple(shape)):
                    self._add_array(group, name, path, dtype, tuple(shape), kind)

    def _told_already(self, layer: str, content: Mapping[str, Any]) -> set[str]:
        """Return the arrays of those extra states of a group that lower ranks have too: theirs count."""
        known = self._contents[layer]["states"]
        return {path for key, value in content["states"].items() if key in known for path in paths_in(value)}

    def _add_array(self, group: _Group, layer: str, path: str, dtype: str, shape: tuple[int, ...], kind: int) -> None:
        arrays = self._arrays.setdefault(layer, {})
        found = arrays.setdefault(path, (dtype, shape, group.ranks[0]))
        if found[:2] != (dtype, shape):
            msg = (
                f"ranks disagree on the model: {path!r} of layer {layer!r} is {found[0]} {list(found[1])} on rank"
                f" {found[2]}, {dtype} {list(shape)} on rank {group.ranks[0]}; nothing was written"
            )
            raise RanksDisagreeError(msg)
        self._places.setdefault((layer, path), []).append((group, kind))

    def capture(self, groups: Sequence[_Group], mine: Capture) -> Capture:
        """Return everything as one capture."""
        layers = {
            name: LayerCapture(
                name,
                content,
                {
                    path: torch.empty(shape, dtype=DTYPES[dtype], device="meta")
                    for path, (dtype, shape, _) in self._arrays.get(name, {}).items()
                },
            )
            for name, content in self._contents.items()
        }
        tied: dict[str, str] = {}
        for group in groups:
            tied = {**group.structure["tied"], **tied}
        first = groups[0].structure
        return Capture(
            layers,
            {name: target for name, target in tied.items() if name not in layers},
            _merge_groups([group.structure["groups"] for group in groups]),
            list(first["shared"]),
            list(first["classes"]),
            mine.shared_arrays,
        )

    def holdings(self) -> dict[str, dict[str, tuple[Holding, ...]]]:
        """Return who holds which box of every array."""
        found: dict[str, dict[str, tuple[Holding, ...]]] = {}
        known: dict[Any, tuple[Holding, ...]] = {}
        for layer in self._contents:
            arrays = self._arrays.get(layer, {})
            lowest_only = _told_by_one(self._contents[layer])
            held = found.setdefault(layer, {})
            for path, (_, shape, _) in arrays.items():
                places = self._places[layer, path]
                key = (path in lowest_only, shape, *((id(group), kind) for group, kind in places))
                if key not in known:
                    name = f"array {path!r} of layer {layer!r}"
                    boxes = _boxes_by_rank(places, shape, lowest_only=path in lowest_only)
                    try:
                        known[key] = holdings_of(name, shape, boxes)
                    except InvalidInputError as error:
                        msg = (
                            f"the ranks hold parts of different models: {error}. {_who_has(places)}; nothing is written"
                        )
                        raise RanksDisagreeError(msg) from error
                held[path] = known[key]
        return found


def _merge(known: dict[str, Any], key: str, value: Any, *, whole: bool) -> None:  # noqa: ANN401 - JSON
    """Add what a rank has; where several have it, the lowest counts.

    Unless ``whole``, that goes for each item of it: slots of one parameter may lie on several.
    """
    if whole:
        known.setdefault(key, value)
    elif key not in known:
        known[key] = (
            dict(value) if isinstance(value, dict) and not any(name.startswith("$") for name in value) else value
        )
    elif isinstance(value, dict) and isinstance(known[key], dict):
        for name, held in value.items():
            known[key].setdefault(name, held)


def _merge_groups(of_ranks: Sequence[Sequence[Any]]) -> list[Any]:
    """Return per optimizer its parameter groups, each with the parameters of all ranks; options are the lowest's."""
    merged: list[Any] = []
    for optimizers in of_ranks:
        for number, groups in enumerate(optimizers):
            if number == len(merged):
                merged.append([])
            for at, group in enumerate(groups):
                if at == len(merged[number]):
                    merged[number].append({**group, "params": []})
                members = merged[number][at]["params"]
                present = set(members)
                members.extend(name for name in group["params"] if name not in present)
    return merged


def _told_by_one(content: Mapping[str, Any]) -> set[str]:
    """Return the arrays of buffers and extra states: ranks may have others, and those of the lowest count."""
    return {path for section in ("buffers", "states") for path in paths_in(content[section])}


def _who_has(places: Sequence[tuple[_Group, int]]) -> str:
    ranks = sorted(rank for group, _ in places for rank in group.ranks)
    return f"It is in the model of rank {listed(ranks)}"


def _boxes_by_rank(
    places: Sequence[tuple[_Group, int]], shape: tuple[int, ...], *, lowest_only: bool
) -> dict[int, Sequence[Box]]:
    whole = box_of(shape)
    by_rank: dict[int, Sequence[Box]] = {
        rank: held for group, kind in places for rank, held in group.boxes[kind].items()
    }
    with_all = [rank for rank in sorted(by_rank) if list(by_rank[rank]) == [whole]]
    if lowest_only and with_all:
        return {with_all[0]: [whole]}
    return by_rank
