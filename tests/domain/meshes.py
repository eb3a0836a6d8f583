"""Layouts as meshes of ranks make them."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tailorstore.domain.chunks import Box, box_of
from tailorstore.domain.spread import SpreadArray, holdings_of


@dataclass(frozen=True)
class Mesh:
    """Ranks in C order of a grid; along each of its dimensions a tensor is replicated, or one of its is cut."""

    sizes: tuple[int, ...]
    cuts: tuple[int | None, ...]
    """The tensor's dimension that each one cuts, if it has so many."""

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    def boxes(self, shape: tuple[int, ...]) -> dict[int, list[Box]]:
        return {rank: self._box(shape, at) for rank, at in enumerate(itertools.product(*map(range, self.sizes)))}

    def _box(self, shape: tuple[int, ...], at: tuple[int, ...]) -> list[Box]:
        box = list(box_of(shape))
        for size, cut, index in zip(self.sizes, self.cuts, at, strict=True):
            if cut is not None and cut < len(shape):
                start, stop = box[cut]
                step = -(-(stop - start) // size)  # as torch.chunk: the last ones may be short or empty
                box[cut] = (min(stop, start + index * step), min(stop, start + (index + 1) * step))
        return [] if any(start >= stop for start, stop in box) else [tuple(box)]

    def replicas_like(self, rank: int) -> list[int]:
        """Return the ranks that hold other shards of the same replica."""
        mine = np.unravel_index(rank, self.sizes)
        return [
            other
            for other in range(self.ranks)
            if all(
                at == to
                for at, to, cut in zip(mine, np.unravel_index(other, self.sizes), self.cuts, strict=True)
                if cut is None
            )
        ]

    def array(self, shape: tuple[int, ...], chunk_shape: tuple[int, ...], itemsize: int = 4) -> SpreadArray:
        cut = holdings_of(f"a tensor of {shape}", shape, self.boxes(shape))
        return SpreadArray(f"a tensor of {shape}", shape, chunk_shape, itemsize, cut)


def ddp(ranks: int) -> Mesh:
    return Mesh((ranks,), (None,))


def fsdp(ranks: int) -> Mesh:
    return Mesh((ranks,), (0,))


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    sizes = draw(st.sampled_from([(1,), (2,), (3,), (5,), (2, 2), (2, 3), (4, 2), (2, 2, 2)]))
    return Mesh(sizes, tuple(draw(st.sampled_from([None, 0, 0, 1])) for _ in sizes))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw the shape of a tensor and of its chunks."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    return shape, tuple(draw(st.integers(1, max(1, extent))) for extent in shape)
