"""What a light version holds: three arrays for all of its tensors, and a table that says where each stands.

One array of codes for the whole layer rather than one for each tensor: a light version has a tenth of the bytes, and
dozens of small objects with a document each would cost more than they hold.
"""

import math
from collections.abc import Mapping
from typing import Any

from tailorstore.domain.light import BASED, BITS, CODINGS, Coding, LightTable, LightTensor
from tailorstore.domain.records import ArrayRecord
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.layouts import check_path, check_shape
from tailorstore.storage.quantise import packed_bytes, scale_words

CODES = "@light/codes"
"""uint8: packed codes of all tensors."""
SCALES = "@light/scales"
"""uint16: scales of all blocks."""
EXACT = "@light/exact"
"""uint8: the bytes of tensors that are stored exactly."""

LOGARITHMIC: tuple[Coding, ...] = ("ratio", "log")
CODED_DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Tensors of other dtypes are stored exactly."""

_BLOCKS = [1 << power for power in range(4, 13)]


def code_bytes(tensor: LightTensor, block: int) -> int:
    """Return how many bytes of ``codes``, or, if exact, of ``exact``, a tensor takes."""
    if tensor.coding == "exact":
        return tensor.elements * itemsize(tensor.dtype)
    return 0 if tensor.coding == "rounded" else packed_bytes(tensor.elements, tensor.bits, block)


def words_of(tensor: LightTensor, block: int) -> int:
    """Return how many words of ``scales`` a tensor takes."""
    if tensor.coding in ("exact", "rounded"):
        return 0
    return scale_words(tensor.elements, block, logarithmic=tensor.coding in LOGARITHMIC)


def table_to_json(table: LightTable) -> dict[str, Any]:
    """Return a table as JSON data."""
    tensors = {
        path: [
            tensor.dtype,
            list(tensor.shape),
            tensor.coding,
            tensor.bits,
            tensor.codes_at,
            tensor.scales_at,
            tensor.of,
            tensor.error,
        ]
        for path, tensor in table.tensors.items()
    }
    return {"block": table.block, "tensors": tensors}


def table_from_json(described: Mapping[str, Any], arrays: Mapping[str, ArrayRecord]) -> LightTable:
    """Parse a table, and make sure that everything it speaks of lies within the version's arrays.

    Each tensor has a place of its own there, and each rounded one a tensor of its own that it is the rounding of: so
    tensors are in sum no larger than arrays of that size can hold.

    Raises:
        KeyError, TypeError, ValueError: it is not a table, or not one of these arrays.
    """
    block = described["block"]
    if type(block) is not int or block not in _BLOCKS:
        raise ValueError(block)
    table = LightTable(block, {path: _tensor(path, entry) for path, entry in described["tensors"].items()})
    if not arrays.keys() <= {CODES, SCALES, EXACT}:
        raise ValueError(list(arrays))
    spans: dict[str, list[tuple[int, int]]] = {CODES: [], SCALES: [], EXACT: []}
    masters = set()
    for tensor in table.tensors.values():
        where = EXACT if tensor.coding == "exact" else CODES
        spans[where].append((tensor.codes_at, tensor.codes_at + code_bytes(tensor, block)))
        spans[SCALES].append((tensor.scales_at, tensor.scales_at + words_of(tensor, block)))
        if tensor.of is not None:
            source = table.tensors[tensor.of]
            if source.coding == "rounded" or source.shape != tensor.shape or tensor.of in masters:
                raise ValueError(tensor)
            masters.add(tensor.of)
    for path, taken in spans.items():
        if not _fit(taken, _extent(arrays, path)):
            raise ValueError(path)
    return table


def _fit(spans: list[tuple[int, int]], extent: int) -> bool:
    """Tell whether spans lie side by side within an extent."""
    end = 0
    for low, high in sorted(span for span in spans if span[0] < span[1]):
        if low < end:
            return False
        end = high
    return end <= extent


def _extent(arrays: Mapping[str, ArrayRecord], path: str) -> int:
    if path not in arrays:
        return 0
    spec = arrays[path].spec
    if spec.dtype != ("uint16" if path == SCALES else "uint8") or len(spec.shape) != 1:
        raise ValueError(path)
    return spec.shape[0]


def _tensor(path: str, entry: Any) -> LightTensor:  # noqa: ANN401
    dtype, shape, coding, bits, codes_at, scales_at, of, error = entry
    check_path(path)
    numbers = [*shape, codes_at, scales_at]
    if coding not in CODINGS or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(path)
    coded = coding in (*BASED, "value", "log")
    if type(bits) is not int or ((bits not in BITS or dtype not in CODED_DTYPES) if coded else bits != 0):
        raise ValueError(path)
    if not (isinstance(of, str) if coding == "rounded" else of is None) or type(error) not in (int, float):
        raise TypeError(path)
    check_shape(dtype, tuple(shape))
    if not 0 <= error < math.inf:
        raise ValueError(path)
    return LightTensor(dtype, tuple(shape), coding, bits, codes_at, scales_at, of, float(error))
