"""Who holds which box of a tensor, and where those boxes meet chunks. Pure geometry.

A model has thousands of tensors that are cut in a few dozen ways: what depends on the cut alone is found once for each
way, and remembered.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from tailorstore.domain.chunks import Box, box_of, grid_of, meet
from tailorstore.domain.errors import InvalidInputError

Ints = npt.NDArray[np.int64]

WAYS = 128
"""Ways to cut tensors that are remembered at once, more than models have: half a megabyte each with 1000 ranks."""


@dataclass(frozen=True, slots=True)
class Holding:
    """A box of a tensor, and who holds it."""

    box: Box
    ranks: tuple[int, ...]
    """Ascending; several hold replicas, equal to the bit."""


def holdings_of(name: str, shape: tuple[int, ...], boxes: Mapping[int, Sequence[Box]]) -> tuple[Holding, ...]:
    """Return disjoint boxes that make up a tensor, each with every rank that holds it, in order of their corners.

    Boxes that are equal or disjoint stay as they are. Where they overlap without being equal (one rank holds all,
    others shards of it) they are cut along each other's edges.

    Args:
        name: for the message.
        shape: of the tensor.
        boxes: rank → the boxes it holds, of those that know the tensor.

    Returns:
        For a tensor without elements one holding, its whole box, with all ranks that know it. Equal layouts give the
        same object.

    Raises:
        InvalidInputError: elements that no rank holds, or a box that is none of the tensor's; names the tensor.
    """
    found = _holdings(shape, tuple((rank, tuple(boxes[rank])) for rank in sorted(boxes)))
    if isinstance(found, str):
        msg = f"{name}: {found}"
        raise InvalidInputError(msg)
    return found


class _Holdings(tuple[Holding, ...]):
    """Holdings that remember their hash: there may be thousands, looked up for each of thousands of arrays."""

    _hash: int

    def __new__(cls, holdings: Iterable[Holding]) -> Self:
        self = super().__new__(cls, holdings)
        self._hash = tuple.__hash__(self)
        return self

    def __hash__(self) -> int:
        return self._hash


@lru_cache(WAYS)
def _holdings(shape: tuple[int, ...], boxes: tuple[tuple[int, tuple[Box, ...]], ...]) -> _Holdings | str:
    """Return the holdings, or what is wrong with the boxes."""
    whole = box_of(shape)
    if math.prod(shape) == 0:
        return _Holdings([Holding(whole, tuple(rank for rank, _ in boxes))])
    ranks_of: dict[Box, list[int]] = {}
    for rank, held in boxes:
        for box in dict.fromkeys(held):
            if any(start >= stop for start, stop in box):
                continue
            if len(box) != len(whole) or meet(box, whole) != box:
                return f"rank {rank} holds box {box}, which is none of a tensor of shape {shape}"
            ranks_of.setdefault(box, []).append(rank)
    return _cut(whole, ranks_of)


def _cut(whole: Box, ranks_of: Mapping[Box, Sequence[int]]) -> _Holdings | str:
    """Cut boxes along each other's edges where they overlap; return the holdings, or which elements are missing."""
    edges = [
        sorted({*ends, *(end for box in ranks_of for end in box[dimension])}) for dimension, ends in enumerate(whole)
    ]
    at = [{edge: index for index, edge in enumerate(along)} for along in edges]

    def cells(box: Box) -> list[range]:
        return [range(along[start], along[stop]) for along, (start, stop) in zip(at, box, strict=True)]

    def box_at(cell: Iterable[int]) -> Box:
        return tuple((along[index], along[index + 1]) for along, index in zip(edges, cell, strict=True))

    held = np.zeros([len(along) - 1 for along in edges], np.int32)
    for box in ranks_of:
        held[tuple(slice(along.start, along.stop) for along in cells(box))] += 1
    if not held.all():
        gap = box_at(int(index) for index in np.argwhere(held == 0)[0])
        return (
            f"no rank holds the elements {gap}; every rank that holds a part of the model has to take part, so look"
            " whether one is missing from the process group"
        )
    if held.max() == 1:
        return _Holdings(Holding(box, tuple(ranks_of[box])) for box in sorted(ranks_of))
    sharers: dict[tuple[int, ...], set[int]] = {}
    for box, ranks in ranks_of.items():
        for cell in itertools.product(*cells(box)):
            sharers.setdefault(cell, set()).update(ranks)
    return _Holdings(Holding(box_at(cell), tuple(sorted(sharers[cell]))) for cell in sorted(sharers))


class Meetings(NamedTuple):
    """Every pair of a chunk and a holding that share elements, and the box they share, by (chunk number, box)."""

    chunks: Ints
    holdings: Ints
    elements: Ints
    starts: Ints
    """Of the box, a row for each pair."""
    stops: Ints
    first: Ints
    """Index of each chunk's first pair, and the end."""


@lru_cache(WAYS)
def meetings_of(shape: tuple[int, ...], chunk_shape: tuple[int, ...], holdings: tuple[Holding, ...]) -> Meetings:
    """Return where the chunks of a tensor meet disjoint holdings of it."""
    grid, steps = grid_of(shape, chunk_shape), np.array(chunk_shape, np.int64)
    boxes = np.array([holding.box for holding in holdings], np.int64).reshape(len(holdings), len(shape), 2)
    low, high = boxes[:, :, 0], boxes[:, :, 1]
    lowest = low // steps
    spans = -(-high // steps) - lowest
    counts = spans.prod(axis=1)
    which = np.repeat(np.arange(len(holdings)), counts)
    rest = np.arange(len(which)) - np.repeat(counts.cumsum() - counts, counts)
    # Each holding meets a small grid of chunks; its pairs are counted through in C order.
    index = np.empty((len(which), len(shape)), np.int64)
    number, stride = np.zeros(len(which), np.int64), 1
    for dimension in reversed(range(len(shape))):
        rest, inner = np.divmod(rest, spans[which, dimension])
        index[:, dimension] = lowest[which, dimension] + inner
        number += index[:, dimension] * stride
        stride *= grid[dimension]
    starts = np.maximum(low[which], index * steps)
    stops = np.minimum(high[which], (index + 1) * steps)
    order = np.lexsort((*starts.T[::-1], number))
    number, starts, stops = number[order], starts[order], stops[order]
    return Meetings(
        chunks=number,
        holdings=which[order],
        elements=(stops - starts).prod(axis=1),
        starts=starts,
        stops=stops,
        first=np.searchsorted(number, np.arange(math.prod(grid) + 1)),
    )


class Holders(NamedTuple):
    """All pairs of a holding and a rank that holds it, in order of (holding, host, rank)."""

    alone: bool
    """Whether each holding has one rank only."""
    ranks: Ints
    first: Ints
    """Index of each holding's first pair, and the end."""
    by_host: Ints
    """Ascending: holding × ranks + host."""
    by_rank: Ints
    """Ascending: holding × ranks + rank."""
    host: Ints
    """By rank, numbered from 0."""


@lru_cache(WAYS)
def holders_of(holdings: tuple[Holding, ...], hosts: tuple[int, ...]) -> Holders:
    """Return who holds each holding, given the number of each rank's host."""
    host = np.unique(np.array(hosts, np.int64), return_inverse=True)[1]
    counts = np.array([len(holding.ranks) for holding in holdings], np.int64)
    which = np.repeat(np.arange(len(holdings)), counts) * len(hosts)
    ranks = np.array([rank for holding in holdings for rank in holding.ranks], np.int64)
    order = np.lexsort((ranks, host[ranks], which))
    return Holders(
        alone=bool((counts == 1).all()),
        ranks=ranks[order],
        first=np.append(0, counts.cumsum()),
        by_host=(which + host[ranks])[order],
        by_rank=which + ranks,
        host=host,
    )
