"""The data types that zarr-python lacks, over `ml_dtypes`; see :mod:`tailorstore.storage.dtypes`."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.dtype import ZDType

if TYPE_CHECKING:
    from zarr.core.dtype.common import DTypeJSON

_NOT_FINITE = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}


@dataclass(frozen=True, kw_only=True)
class SmallFloat(ZDType[Any, Any], HasItemSize):
    """A floating-point type of `ml_dtypes`. Scalars are read and written as their bits, so that none is rounded."""

    _zarr_v3_name: ClassVar[str]
    scalar_type: ClassVar[type[Any]]

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return np.dtype(self.scalar_type).itemsize

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:  # noqa: ANN401 - any numpy dtype
        """Return the data type for a numpy dtype.

        Raises:
            DataTypeValidationError: it is another dtype.
        """
        if cls._check_native_dtype(dtype):
            return cls()
        msg = f"{dtype} is not {cls._zarr_v3_name}"
        raise DataTypeValidationError(msg)

    def to_native_dtype(self) -> np.dtype[Any]:
        """Return the numpy dtype."""
        native: np.dtype[Any] = np.dtype(self.scalar_type)
        return native

    @classmethod
    def _from_json_v2(cls, data: "DTypeJSON") -> Self:
        # Zarr's second format has no name for these types.
        msg = f"{data!r} is not {cls._zarr_v3_name}"
        raise DataTypeValidationError(msg)

    @classmethod
    def _from_json_v3(cls, data: "DTypeJSON") -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        msg = f"{data!r} is not {cls._zarr_v3_name}"
        raise DataTypeValidationError(msg)

    def to_json(self, zarr_format: int) -> Any:  # noqa: ANN401 - overloaded on the format in the base class
        """Return the registered name.

        Raises:
            ValueError: for Zarr's second format, which has no such type.
        """
        if zarr_format != 3:
            msg = f"{self._zarr_v3_name} exists in Zarr format 3 only"
            raise ValueError(msg)
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, (int, float, np.integer, np.floating, self.scalar_type))

    def cast_scalar(self, data: object) -> Any:  # noqa: ANN401 - a scalar of `ml_dtypes`, which has no type stubs
        """Return ``data`` as a scalar of this type.

        Raises:
            TypeError: it is no number.
        """
        if isinstance(data, self.scalar_type):
            return data
        if not self._check_scalar(data):
            msg = f"cannot make a {self._zarr_v3_name} of {data!r}"
            raise TypeError(msg)
        return self._from_number(float(data))  # type: ignore[arg-type]

    def default_scalar(self) -> Any:  # noqa: ANN401
        """Return the scalar whose bits are all zero."""
        return self._from_bits(0)

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:  # noqa: ANN401
        """Return the scalar for a fill value: a number, ``NaN``, ``Infinity``, ``-Infinity`` or hexadecimal bits.

        Raises:
            TypeError: it is none of these.
        """
        if isinstance(data, str) and data.startswith("0x"):
            try:
                return self._from_bits(int(data, 16))
            except (ValueError, OverflowError) as error:
                msg = f"{data!r} are not the bits of a {self._zarr_v3_name}"
                raise TypeError(msg) from error
        if isinstance(data, str) and data in _NOT_FINITE:
            return self.scalar_type(_NOT_FINITE[data])
        return self.cast_scalar(data)

    def to_json_scalar(self, data: object, *, zarr_format: int) -> str | float:
        """Return a fill value as its bits, which says exactly what is meant, NaN payloads and all."""
        bits = np.asarray(self.cast_scalar(data), dtype=self.scalar_type).view(f"u{self.item_size}")
        return f"0x{int(bits):0{2 * self.item_size}x}"

    def _from_number(self, number: float) -> Any:  # noqa: ANN401
        return self.scalar_type(number)

    def _from_bits(self, bits: int) -> Any:  # noqa: ANN401
        return np.array(bits, dtype=f"u{self.item_size}").view(self.scalar_type)[()]


@dataclass(frozen=True, kw_only=True)
class BFloat16(SmallFloat, HasEndianness):
    """The upper half of a float32. Its bytes are little-endian, as numpy's are on every machine torch runs on."""

    _zarr_v3_name = "bfloat16"
    scalar_type = ml_dtypes.bfloat16
    dtype_cls = type(np.dtype(ml_dtypes.bfloat16))

    def to_native_dtype(self) -> np.dtype[Any]:
        """Return the numpy dtype.

        Raises:
            ValueError: for big-endian data, which `ml_dtypes` cannot express.
        """
        if self.endianness != "little":
            msg = "bfloat16 is read and written in little-endian order only"
            raise ValueError(msg)
        return super().to_native_dtype()

    def to_json_scalar(self, data: object, *, zarr_format: int) -> str | float:
        """Return a fill value as a number, as all readers take it, or as bits where a number would not say all."""
        number = float(self.cast_scalar(data))
        if not math.isfinite(number) or (number == 0 and math.copysign(1, number) < 0):
            return super().to_json_scalar(data, zarr_format=zarr_format)
        return number


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(SmallFloat):
    """Four bits of exponent, no infinities. TensorStore's name; the registry has none for it."""

    _zarr_v3_name = "float8_e4m3fn"
    scalar_type = ml_dtypes.float8_e4m3fn
    dtype_cls = type(np.dtype(ml_dtypes.float8_e4m3fn))


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FNUZ(SmallFloat):
    """Four bits of exponent, one NaN, no negative zero."""

    _zarr_v3_name = "float8_e4m3fnuz"
    scalar_type = ml_dtypes.float8_e4m3fnuz
    dtype_cls = type(np.dtype(ml_dtypes.float8_e4m3fnuz))


@dataclass(frozen=True, kw_only=True)
class Float8E5M2(SmallFloat):
    """Five bits of exponent: the upper half of a float16."""

    _zarr_v3_name = "float8_e5m2"
    scalar_type = ml_dtypes.float8_e5m2
    dtype_cls = type(np.dtype(ml_dtypes.float8_e5m2))


@dataclass(frozen=True, kw_only=True)
class Float8E5M2FNUZ(SmallFloat):
    """Five bits of exponent, one NaN, no negative zero."""

    _zarr_v3_name = "float8_e5m2fnuz"
    scalar_type = ml_dtypes.float8_e5m2fnuz
    dtype_cls = type(np.dtype(ml_dtypes.float8_e5m2fnuz))


@dataclass(frozen=True, kw_only=True)
class Float8E8M0FNU(SmallFloat):
    """Powers of two, for block scales. It has no zero: bits of zero mean 2⁻¹²⁷, and a fill value of 0 means that."""

    _zarr_v3_name = "float8_e8m0fnu"
    scalar_type = ml_dtypes.float8_e8m0fnu
    dtype_cls = type(np.dtype(ml_dtypes.float8_e8m0fnu))

    def _from_number(self, number: float) -> Any:  # noqa: ANN401
        # As TensorStore does; plain casting would make it NaN.
        return self._from_bits(0) if number == 0 else self.scalar_type(number)


ALL: tuple[type[SmallFloat], ...] = (
    BFloat16, Float8E4M3FN, Float8E4M3FNUZ, Float8E5M2, Float8E5M2FNUZ, Float8E8M0FNU,
)  # fmt: skip
