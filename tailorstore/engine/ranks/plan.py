"""Who writes what of a commit: every chunk exactly one rank, the same plan on every rank, from shapes alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import numpy.typing as npt

from tailorstore.domain.records import ArraySpec, Fidelity
from tailorstore.domain.spread import Piece, SpreadArray, assign, owners, pieces_of
from tailorstore.engine.plan import Layout
from tailorstore.engine.ranks.outline import Whole
from tailorstore.engine.tensors.memory import name_of
from tailorstore.storage.dtypes import itemsize

_SHARE_BYTES = 512 << 20
"""What a rank receives at once, about."""


@dataclass(frozen=True, slots=True)
class DueArray:
    """One array of a layer that is to be written."""

    layer: str
    path: str
    spec: ArraySpec
    """As the store lays it out."""
    pieces: tuple[Piece, ...]
    """Of what this rank writes or sends, in an order that all ranks keep to."""
    travels: bool
    """Whether any rank sends a piece of it to another."""


@dataclass(frozen=True, slots=True)
class Round:
    """Layers whose pieces travel at once."""

    arrays: tuple[DueArray, ...]

    @property
    def travels(self) -> bool:
        """Whether any rank sends a piece to another."""
        return any(array.travels for array in self.arrays)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """This rank's part of writing a commit."""

    full: tuple[Round, ...]
    light: tuple[Round, ...]
    """Of layers that one rank each codes as a whole; a rank has at most one in a round."""
    owners: Mapping[str, int]
    """Light layer → the rank that codes and writes it."""
    sealers: Mapping[str, int]
    """Full layer → the rank that writes its documents."""

    def pieces(self) -> Iterator[tuple[DueArray, Piece]]:
        """Yield every piece that this rank writes or sends."""
        for one in (*self.full, *self.light):
            for array in one.arrays:
                for piece in array.pieces:
                    yield array, piece


def plan_writing(
    whole: Whole, due: Mapping[str, Fidelity], layout: Layout, hosts: Sequence[int], rank: int
) -> WritePlan:
    """Deal the work out.

    Args:
        whole: what all ranks have.
        due: which layers are to be written, and how.
        layout: settings of the store.
        hosts: number of every rank's host.
        rank: whose part is asked for.
    """
    full = [name for name in whole.captured.layers if due.get(name) == "full"]
    light = [name for name in whole.captured.layers if due.get(name) == "light"]
    owned = light_owners(whole, hosts)
    spread = [(layer, path, spec, array) for layer in full for path, spec, array in _arrays(whole, layer, layout)]
    writers = assign([array for *_, array in spread], hosts)
    full_arrays = [
        DueArray(layer, path, spec, tuple(pieces_of(array, chosen, rank, hosts)), len(array.holdings) > 1)
        for (layer, path, spec, array), chosen in zip(spread, writers, strict=True)
    ]
    sizes = {name: whole.captured.layers[name].nbytes for name in whole.captured.layers}
    everybody = range(len(hosts))
    sealers = owners([len(whole.captured.layers[name].arrays) for name in full], [everybody] * len(full), hosts)
    return WritePlan(
        full=tuple(_rounds(full_arrays, sizes, len(hosts))),
        light=tuple(_light_rounds(whole, light, owned, layout, hosts, rank)),
        owners={name: owned[name] for name in light},
        sealers=dict(zip(full, sealers, strict=True)),
    )


def light_owners(whole: Whole, hosts: Sequence[int]) -> dict[str, int]:
    """Return which rank codes a layer if it is to be light: the same at every commit, so that it can keep the base."""
    layers = list(whole.captured.layers)
    candidates = [
        sorted({rank for held in whole.holdings[name].values() for holding in held for rank in holding.ranks})
        or list(range(len(hosts)))
        for name in layers
    ]
    found = owners([whole.captured.layers[name].nbytes for name in layers], candidates, hosts)
    return dict(zip(layers, found, strict=True))


def _arrays(whole: Whole, layer: str, layout: Layout) -> Iterator[tuple[str, ArraySpec, SpreadArray]]:
    for path, tensor in whole.captured.layers[layer].arrays.items():
        spec = layout.spec(tuple(tensor.shape), name_of(tensor.dtype))
        name = f"array {path!r} of layer {layer!r}"
        holdings = whole.holdings[layer][path]
        yield path, spec, SpreadArray(name, spec.shape, spec.chunk_shape, itemsize(spec.dtype), holdings)


def _rounds(arrays: Sequence[DueArray], sizes: Mapping[str, int], ranks: int) -> Iterator[Round]:
    """Put layers together, for ranks wait for each other after each round, as far as memory allows.

    What a rank receives of a round is its share of it: on average no more than the largest layer, and no more than
    ``_SHARE_BYTES``.
    """
    limit = min(max(sizes.values(), default=0), _SHARE_BYTES) * ranks
    gathered: list[DueArray] = []
    total = 0
    for layer, members in groupby(arrays, key=lambda array: array.layer):
        if gathered and total + sizes[layer] > limit:
            yield Round(tuple(gathered))
            gathered, total = [], 0
        gathered += members
        total += sizes[layer]
    if gathered:
        yield Round(tuple(gathered))


def _light_rounds(
    whole: Whole, light: Sequence[str], owned: Mapping[str, int], layout: Layout, hosts: Sequence[int], rank: int
) -> Iterator[Round]:
    turns: dict[int, list[str]] = {}
    for name in light:
        turns.setdefault(owned[name], []).append(name)
    for turn in range(max(map(len, turns.values()), default=0)):
        arrays = []
        for layer in [names[turn] for names in turns.values() if turn < len(names)]:
            for path, spec, array in _arrays(whole, layer, layout):
                one = replace(array, chunk_shape=tuple(max(1, extent) for extent in array.shape))
                count = 1 if math.prod(array.shape) else 0
                writer: npt.NDArray[np.int32] = np.full(count, owned[layer], np.int32)
                held_by_owner = len(one.holdings) == 1 and owned[layer] in one.holdings[0].ranks
                pieces = tuple(pieces_of(one, writer, rank, hosts))
                arrays.append(DueArray(layer, path, spec, pieces, not held_by_owner))
        yield Round(tuple(arrays))
