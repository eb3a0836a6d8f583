"""State as JSON with tensors as arrays: pack it for a document, unpack it again. No pickle, no code in data.

Values that JSON has are themselves. All else is an object with one key that begins with ``$``:

| key | holds |
|---|---|
| ``$array`` | path of an array: a tensor of one or more dimensions |
| ``$scalar`` | dtype and hex bytes of a zero-dimensional tensor |
| ``$ndarray`` | path of an array that was a NumPy array |
| ``$number`` | NumPy dtype and hex bytes of a NumPy scalar |
| ``$float`` | hex bits of a float that JSON has no word for: NaN, infinities |
| ``$tuple`` | list of a tuple's items |
| ``$dict`` | list of [key, value], for dictionaries with keys that are not plain strings |
| ``$bytes`` | base64 |
"""

import base64
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from tailorstore.domain.errors import CorruptDocumentError, ExtraStateError, InvalidInputError, TailorError
from tailorstore.domain.names import escape
from tailorstore.engine.tensors.memory import check_storable, dtype_name, scalar_from_hex, scalar_to_hex
from tailorstore.engine.tensors.shards import Layouts, Sharded, is_distributed, settled, sharded

Arrays = dict[str, torch.Tensor]
"""Array path below the layer version's prefix → tensor."""

_MAX_DEPTH = 64
_MAX_INT_BITS = 8192
"""Python refuses to read decimal numbers much longer than this."""
_NUMPY_KINDS = "biufc"
_NUMPY_DTYPE = re.compile(r"[<|][biufc]\d{1,2}")
_MOST_ALIKE = 64
"""How many keys of a dictionary may have one hash: a document full of them would take the square of its time."""


class Packer:
    """Packs values, gathering their tensors under unique paths.

    Attributes:
        arrays: path → tensor, in the order they were met; where a tensor is held by several processes, a stand-in of
            its shape and dtype on the meta device.
        held: path → what this process holds of such a tensor.
    """

    def __init__(self, folder: str = "", *, spread: bool = False, known: Layouts | None = None) -> None:
        """Start with no arrays.

        Args:
            folder: what their paths begin with.
            spread: take tensors of several processes.
            known: see :func:`sharded`.
        """
        self.arrays: Arrays = {}
        self.held: dict[str, Sharded] = {}
        self._folder = folder
        self._spread = spread
        self._known = known

    def pack(self, value: Any, path: str, *, array_path: str | None = None) -> Any:  # noqa: ANN401
        """Return the JSON skeleton of a value.

        Args:
            value: None, numbers, strings, bytes, lists, tuples, dictionaries, tensors, NumPy arrays, and objects
                with ``state_dict()``, nested to 64 levels.
            path: dotted path for error messages and array paths.
            array_path: where a tensor goes that is the whole value; default from ``path``.

        Raises:
            ExtraStateError: something else was found; the message has its path.
        """
        return self._pack(value, path, array_path, 0)

    def _pack(self, value: Any, path: str, array_path: str | None, depth: int) -> Any:  # noqa: ANN401
        if depth > _MAX_DEPTH:
            msg = f"extra state at {path} is nested more than {_MAX_DEPTH} levels deep, or holds itself"
            raise ExtraStateError(msg)
        if isinstance(value, Sharded) or is_distributed(value):
            return self._pack_held(value, path, array_path)
        if isinstance(value, torch.Tensor):
            return self._pack_tensor(value, path, array_path)
        if isinstance(value, np.generic | np.ndarray):
            return self._pack_numpy(value, path)
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            if value.bit_length() > _MAX_INT_BITS:
                msg = f"extra state at {path} is an integer of {value.bit_length()} bits; pass it as bytes"
                raise ExtraStateError(msg)
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if isinstance(value, bytes | bytearray):
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, tuple):
            return {"$tuple": self._pack_items(value, path, depth)}
        if isinstance(value, list):
            return self._pack_items(value, path, depth)
        if isinstance(value, Mapping):
            return self._pack_mapping(value, path, depth)
        state_dict = getattr(value, "state_dict", None)
        if callable(state_dict) and not isinstance(value, type):
            return self._pack(state_dict(), path, None, depth + 1)
        msg = (
            f"extra state at {path} is a {type(value).__module__}.{type(value).__qualname__}, which neither JSON nor a"
            " tensor can hold; pass its numbers, strings, lists, dictionaries or tensors instead"
        )
        raise ExtraStateError(msg)

    def _pack_items(self, items: Any, path: str, depth: int) -> list[Any]:  # noqa: ANN401
        return [self._pack(item, f"{path}.{index}", None, depth + 1) for index, item in enumerate(items)]

    def _pack_mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> Any:  # noqa: ANN401
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self._pack(item, f"{path}.{key}", None, depth + 1) for key, item in value.items()}
        pairs = []
        for key, item in value.items():
            if not isinstance(key, str | int | float | bool | tuple | None):
                msg = f"extra state at {path} has a key that is a {type(key).__qualname__}; use strings or numbers"
                raise ExtraStateError(msg)
            packed_key = self._pack(key, f"{path} key", None, depth + 1)
            pairs.append([packed_key, self._pack(item, f"{path}.{key}", None, depth + 1)])
        return {"$dict": pairs}

    def _pack_tensor(self, value: torch.Tensor, path: str, array_path: str | None) -> Any:  # noqa: ANN401
        try:
            check_storable(value, path)
        except InvalidInputError as error:
            raise ExtraStateError(str(error)) from error
        if value.dim() == 0 and array_path is None:
            return {"$scalar": [dtype_name(value.dtype, path), scalar_to_hex(value)]}
        return {"$array": self._place(value, array_path or self._folder + escape(path))}

    def _pack_held(self, value: Any, path: str, array_path: str | None) -> Any:  # noqa: ANN401 - Sharded or a DTensor
        if not self._spread:
            msg = f"extra state at {path} is a tensor that several ranks hold parts of; pass its full_tensor()"
            raise ExtraStateError(msg)
        if is_distributed(value):
            value = settled(value)
            if value.dim() == 0:
                return self._pack_tensor(value.to_local(), path, array_path)
            value = sharded(value, path, self._known)
        dtype_name(value.dtype, path)
        place = self._place(
            torch.empty(value.shape, dtype=value.dtype, device="meta"), array_path or self._folder + escape(path)
        )
        self.held[place] = value
        return {"$array": place}

    def _pack_numpy(self, value: Any, path: str) -> Any:  # noqa: ANN401
        if value.dtype.kind not in _NUMPY_KINDS or value.dtype.itemsize > 16 or value.dtype == np.longdouble:
            msg = f"extra state at {path} is a NumPy value of {value.dtype}, which no tensor can hold"
            raise ExtraStateError(msg)
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        if value.ndim == 0:
            return {"$number": [little.dtype.str, little.tobytes().hex()]}
        tensor = torch.from_numpy(np.ascontiguousarray(little).copy())
        return {"$ndarray": self._place(tensor, self._folder + escape(path))}

    def _place(self, tensor: torch.Tensor, wanted: str) -> str:
        unique, number = wanted, 1
        while unique in self.arrays:
            # A dotted path can be reached in two ways ({"a.b": …} and {"a": {"b": …}}); "=" keeps clear of real names.
            unique, number = f"{wanted}=={number}", number + 1
        self.arrays[unique] = tensor
        return unique


def unpack(value: Any, load: Callable[[str], Any]) -> Any:  # noqa: ANN401
    """Return the value that :meth:`Packer.pack` took apart; ``load`` gives the tensor of an array path.

    Raises:
        CorruptDocumentError: the skeleton is not one that a packer makes.
    """
    if isinstance(value, list):
        return [unpack(item, load) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(key, held)] = value.items()
        if key.startswith("$"):
            return _unpack_special(key, held, load)
    return {key: unpack(item, load) for key, item in value.items()}


def _unpack_special(key: str, held: Any, load: Callable[[str], Any]) -> Any:  # noqa: ANN401
    if key in ("$array", "$ndarray"):
        if not isinstance(held, str):
            raise _malformed(key)
        # What reading it raises says more than that the document is malformed.
        found = load(held)
        return found if key == "$array" else _as_numpy(found)
    try:
        match key:
            case "$scalar":
                dtype, digits = held
                return scalar_from_hex(dtype, digits)
            case "$number":
                return _number(*held)
            case "$float":
                return struct.unpack(">d", bytes.fromhex(held))[0]
            case "$tuple":
                return tuple(unpack(_items(held), load))
            case "$dict":
                pairs = [(unpack(item_key, load), unpack(item, load)) for item_key, item in _items(held)]
                return _dictionary(pairs)
            case "$bytes":
                return base64.b64decode(held, validate=True)
    except TailorError as error:
        if isinstance(error, InvalidInputError):
            raise _malformed(key) from error
        raise
    except (ValueError, TypeError, struct.error) as error:
        raise _malformed(key) from error
    msg = f"document holds an unknown kind of value, {key[:40]}; run 'tailorstore verify'"
    raise CorruptDocumentError(msg)


def _malformed(key: str) -> CorruptDocumentError:
    return CorruptDocumentError(f"document holds a malformed {key} value; run 'tailorstore verify'")


def _items(held: Any) -> list[Any]:  # noqa: ANN401
    if not isinstance(held, list):
        raise TypeError(type(held).__name__)
    return held


def _as_numpy(tensor: Any) -> Any:  # noqa: ANN401 - a tensor, or what stands for one
    try:
        return tensor.numpy()
    except (TypeError, AttributeError, RuntimeError) as error:
        raise _malformed("$ndarray") from error


def _number(name: str, digits: str) -> np.generic:
    if not _NUMPY_DTYPE.fullmatch(name):
        raise ValueError(name)
    (number,) = np.frombuffer(bytes.fromhex(digits), dtype=np.dtype(name))
    found: np.generic = number
    return found


def _dictionary(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    alike = Counter(hash(key) for key, _ in pairs)
    if max(alike.values(), default=0) > _MOST_ALIKE:
        raise ValueError(_MOST_ALIKE)
    return dict(pairs)
