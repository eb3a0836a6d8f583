"""Geometry of chunks: which elements of a tensor lie in which chunk. Pure arithmetic.

Chunk shapes are chosen (``storage.documents.choose_chunks``) so that a chunk of a contiguous tensor is one contiguous
run of memory: leading dimensions of extent 1, then one that is cut, then whole ones.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]
"""Half-open (start, stop) for each dimension."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of an array's regular grid."""

    number: int
    """Position in C order of the grid: index into an array record's digests and sizes."""
    index: tuple[int, ...]
    """Position in the grid, as the chunk key spells it."""
    box: Box
    """The elements it holds, clipped to the array."""
    offset: int
    """Elements of the contiguous array that come before it."""
    elements: int
    """Elements it holds, padding left out."""
    capacity: int
    """Elements its object holds, padding included."""

    @property
    def cut(self) -> int:
        """The dimension along which its parts follow each other in memory: the first with more than one element."""
        return next((at for at, (start, stop) in enumerate(self.box) if stop - start > 1), 0)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index expression."""
        return tuple(slice(start, stop) for start, stop in self.box)


def box_of(shape: tuple[int, ...]) -> Box:
    """Return the box that is the whole of a tensor.

    Examples:
        >>> box_of((5, 4)), box_of(())
        (((0, 5), (0, 4)), ())
    """
    return tuple((0, extent) for extent in shape)


def meet(a: Box, b: Box) -> Box | None:
    """Return the box that two boxes share; ``None`` where they share no element.

    Examples:
        >>> meet(((0, 5),), ((3, 9),)), meet(((0, 5),), ((5, 9),)), meet((), ())
        (((3, 5),), None, ())
    """
    shared = tuple((max(start, low), min(stop, high)) for (start, stop), (low, high) in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in shared) else shared


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Return the index expression that takes a box out of a tensor that holds the elements of an outer box.

    Examples:
        >>> within(((3, 5),), ((2, 9),))
        (slice(1, 3, None),)
    """
    return tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(box, outer, strict=True))


def grid_of(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many chunks there are along each dimension; () for a scalar.

    Examples:
        >>> grid_of((5, 4), (2, 4)), grid_of((), ()), grid_of((0, 4), (1, 4))
        ((3, 1), (), (0, 1))
    """
    return tuple(-(-size // step) for size, step in zip(shape, chunk_shape, strict=True))


def chunks_of(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> Iterator[Chunk]:
    """Yield every chunk in C order; none for an array without elements, one for a scalar."""
    return chunks_in(box_of(shape), shape, chunk_shape)


def chunks_in(box: Box, shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> Iterator[Chunk]:
    """Yield the chunks that share elements with ``box``, in C order."""
    grid = grid_of(shape, chunk_shape)
    grid_strides = _strides(grid)
    strides = _strides(shape)
    capacity = math.prod(chunk_shape)
    ranges = [
        range(start // step, -(-stop // step)) if stop > start else range(0)
        for (start, stop), step in zip(box, chunk_shape, strict=True)
    ]
    for index in itertools.product(*ranges):
        clipped = tuple(
            (at * step, min((at + 1) * step, size)) for at, step, size in zip(index, chunk_shape, shape, strict=True)
        )
        yield Chunk(
            number=sum(at * stride for at, stride in zip(index, grid_strides, strict=True)),
            index=index,
            box=clipped,
            offset=sum(start * stride for (start, _), stride in zip(clipped, strides, strict=True)),
            elements=math.prod(stop - start for start, stop in clipped),
            capacity=capacity,
        )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)
