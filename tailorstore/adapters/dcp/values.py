"""Values that are no large tensors, on their way between ranks and to a planner."""

import base64
import io
from typing import Any

import torch

from tailorstore.engine.tensors.memory import as_bytes, empty_host, name_of, resolved
from tailorstore.engine.tensors.packing import Packer, unpack

STREAM = "stream"
"""Marks what was a ``BytesIO``: some scripts keep things in one."""


def to_json(value: Any, owner: str) -> list[Any]:  # noqa: ANN401
    """Return a value as JSON.

    Args:
        value: what :class:`Packer` takes, or a ``BytesIO``.
        owner: its name, for messages.

    Raises:
        ExtraStateError: neither JSON nor a tensor can hold it; the message has its path.
    """
    packer = Packer()
    bare, kind = bare_of(value)
    packed = packer.pack(bare, owner)
    return [kind, packed, {path: _array_to_json(tensor) for path, tensor in packer.arrays.items()}]


def from_json(described: list[Any]) -> Any:  # noqa: ANN401
    """Return the value that :func:`to_json` described."""
    kind, packed, arrays = described
    return clothed(unpack(packed, lambda path: _array_from_json(arrays[path])), kind)


def bare_of(value: Any) -> tuple[Any, str]:  # noqa: ANN401
    """Return what of a value can be packed, and what it was."""
    return (value.getvalue(), STREAM) if isinstance(value, io.BytesIO) else (value, "")


def clothed(value: Any, kind: str) -> Any:  # noqa: ANN401
    """Return the value that :func:`bare_of` was given."""
    return io.BytesIO(value) if kind == STREAM else value


def as_stream(value: Any) -> io.BytesIO:  # noqa: ANN401
    """Return a value as planners want it to be loaded: in memory, as ``torch.save`` writes it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def _array_to_json(tensor: torch.Tensor) -> list[Any]:
    plain = resolved(tensor).to("cpu").contiguous()
    return [name_of(plain.dtype), list(plain.shape), base64.b64encode(as_bytes(plain)).decode("ascii")]


def _array_from_json(described: list[Any]) -> torch.Tensor:
    dtype, shape, data = described
    tensor = empty_host(tuple(shape), dtype)
    as_bytes(tensor)[:] = base64.b64decode(data)
    return tensor
