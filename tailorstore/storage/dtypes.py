"""Data types: which Zarr data type and which numpy type stand for a torch dtype.

The small floating-point types that machine learning uses are data types of Zarr's extension registry (and one more,
``float8_e4m3fn``, of TensorStore), but zarr-python has none of them. They are defined in
:mod:`tailorstore.storage.zarr_types` and reach every program that uses zarr-python through its entry point group
``zarr.data_type``, which names them as attributes of this module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from tailorstore.domain.errors import InvalidInputError

if TYPE_CHECKING:
    from zarr.dtype import ZDType

_SMALL = (
    "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
"""Torch, `ml_dtypes`, TensorStore and the registry agree on these names."""


def register() -> None:
    """Make the types known to zarr-python, also where the entry points are not installed. Twice does no harm."""
    from zarr.dtype import data_type_registry

    from tailorstore.storage import zarr_types

    for cls in zarr_types.ALL:
        data_type_registry.register(cls._zarr_v3_name, cls)


@dataclass(frozen=True, slots=True)
class DataType:
    """How the elements of a torch dtype are stored."""

    zarr_name: str
    """Zarr's data type."""
    numpy: np.dtype[Any]
    itemsize: int
    """Bytes of one torch element."""
    trailing: tuple[int, ...] = ()
    """Dimensions that the Zarr array has beyond the tensor's: complex32, which numpy does not know, is stored as
    float16 with a last dimension of real and imaginary part. The bytes are the same."""


def _table() -> Mapping[str, DataType]:
    plain = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    plain += ["float16", "float32", "float64", "complex64", "complex128", "bool"]
    table = {name: DataType(name, np.dtype(name), np.dtype(name).itemsize) for name in plain}
    for name in _SMALL:
        dtype = np.dtype(getattr(ml_dtypes, name))
        table[name] = DataType(name, dtype, dtype.itemsize)
    table["complex32"] = DataType("float16", np.dtype("float16"), 4, (2,))
    return table


TABLE = _table()
"""By the torch dtype's name without its module."""


def data_type(dtype: str) -> DataType:
    """Return how a torch dtype is stored.

    Raises:
        InvalidInputError: there is no way to store it.
    """
    try:
        return TABLE[dtype]
    except KeyError:
        msg = f"tensors of dtype {dtype!r} cannot be stored; the store knows {', '.join(sorted(TABLE))}"
        raise InvalidInputError(msg) from None


def itemsize(dtype: str) -> int:
    """Return the size in bytes of one element of a torch dtype.

    Raises:
        InvalidInputError: there is no way to store it.
    """
    return data_type(dtype).itemsize


@cache
def zarr_data_type(dtype: str) -> "ZDType[Any, Any]":
    """Return zarr-python's data type for a torch dtype, without its trailing dimensions.

    Raises:
        InvalidInputError: there is no way to store it.
    """
    described = data_type(dtype)
    from zarr.dtype import data_type_registry

    from tailorstore.storage import zarr_types

    for cls in zarr_types.ALL:
        if cls._zarr_v3_name == described.zarr_name:
            return cls()
    return data_type_registry.match_dtype(described.numpy)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a class of `zarr_types`
    # Importing zarr takes longer than all else that opening a store needs, and most commands never get to use it.
    if name.startswith("_"):
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from tailorstore.storage import zarr_types

    return getattr(zarr_types, name)
