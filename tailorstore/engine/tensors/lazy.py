"""Tensors that are read when they are asked for."""

import math
from collections.abc import Callable
from typing import Any

import torch

from tailorstore.domain.chunks import Box


class LazyTensor:
    """A stored tensor: knows its shape, dtype, layer and source step; reads elements only when it is indexed or loaded.

    Examples:
        ``lazy[0:128]`` reads the chunks that hold the first 128 rows; ``lazy[...]`` and ``lazy.load()`` read all.
    """

    __slots__ = ("_read", "dtype", "layer", "shape", "source_step")

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layer: str,
        source_step: int,
        read: Callable[[Box], torch.Tensor],
    ) -> None:
        """Take what is known of the tensor, and how to read a box of it into a new host tensor."""
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.layer = layer
        """Name of the layer that it belongs to."""
        self.source_step = source_step
        """Step that its values come from."""
        self._read = read

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def load(self) -> torch.Tensor:
        """Read the whole tensor into new host memory.

        Raises:
            MissingObjectError, DigestMismatchError: an object is gone or not what was written.
        """
        return self._read(tuple((0, size) for size in self.shape))

    def __getitem__(self, index: Any) -> torch.Tensor:  # noqa: ANN401
        """Read part of the tensor, with the meaning that the index has for a ``torch.Tensor``.

        Integers, slices, ``...`` and ``None`` read only the chunks that they need; other indices read the whole tensor.

        Raises:
            IndexError: as torch does.
            MissingObjectError, DigestMismatchError: an object is gone or not what was written.
        """
        items = index if isinstance(index, tuple) else (index,)
        if not all(item is None or item is Ellipsis or type(item) is int or isinstance(item, slice) for item in items):
            return self.load()[index]
        box, inner = self._box_of(items)
        return self._read(box)[inner]

    def _box_of(self, items: tuple[Any, ...]) -> tuple[Box, tuple[Any, ...]]:
        """Return the smallest box that holds an index's elements, and the index within that box."""
        used = sum(item is not None and item is not Ellipsis for item in items)
        if used > self.ndim or sum(item is Ellipsis for item in items) > 1:
            msg = f"too many indices for a tensor of {self.ndim} dimensions: {items!r}"
            raise IndexError(msg)
        if not any(item is Ellipsis for item in items):
            items = (*items, Ellipsis)
        box: list[tuple[int, int]] = []
        inner: list[Any] = []
        for item in items:
            if item is None:
                inner.append(None)
            elif item is Ellipsis:
                for _ in range(self.ndim - used):
                    box.append((0, self.shape[len(box)]))
                    inner.append(slice(None))
            else:
                bounds, within = _bounds(item, self.shape[len(box)], len(box))
                box.append(bounds)
                inner.append(within)
        return tuple(box), tuple(inner)

    def __repr__(self) -> str:
        """Describe without reading."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"LazyTensor({list(self.shape)}, {dtype}, layer={self.layer!r}, source_step={self.source_step})"


def _bounds(item: Any, size: int, dim: int) -> tuple[tuple[int, int], Any]:  # noqa: ANN401
    if isinstance(item, slice):
        start, stop, step = item.indices(size)
        if step < 0:
            msg = "slices of tensors must have positive steps"
            raise IndexError(msg)
        stop = max(start, stop)
        return (start, stop), slice(0, stop - start, step)
    at = item + size if item < 0 else item
    if not 0 <= at < size:
        msg = f"index {item} is out of bounds for dimension {dim} with size {size}"
        raise IndexError(msg)
    return (at, at + 1), 0
