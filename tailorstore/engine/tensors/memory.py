"""Tensors as bytes: dtype names, views of memory, copies that keep every bit."""

from collections.abc import Iterable
from typing import Any

import torch

from tailorstore.domain.chunks import Chunk
from tailorstore.domain.errors import InvalidInputError
from tailorstore.engine.tensors.shards import is_distributed

Tensor = torch.Tensor
"""For floors that handle tensors without importing torch."""

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
        *("complex128", "complex64", "complex32"),
    )
    if hasattr(torch, name)
}
"""Every dtype that can be stored, by the name that documents use."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype, owner: str) -> str:
    """Return the stored name of a dtype.

    Raises:
        InvalidInputError: quantised, sub-byte and bit dtypes have no exact stored form; names the tensor.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        msg = f"{owner}: tensors of {dtype} cannot be stored; view them as one of {', '.join(DTYPES)}"
        raise InvalidInputError(msg) from None


def name_of(dtype: torch.dtype) -> str:
    """Return torch's name of any dtype, without its module."""
    return str(dtype).removeprefix("torch.")


def check_storable(tensor: torch.Tensor, owner: str) -> None:
    """Refuse tensors whose elements, or those of a ``DTensor`` that are here, are not plain strided memory.

    Raises:
        InvalidInputError: sparse, meta, nested, quantised or wrapper-subclass tensors; names the tensor.
    """
    if torch.nn.parameter.is_lazy(tensor):
        msg = f"{owner}: a lazy parameter has no shape yet; run the model once before it is committed or restored"
        raise InvalidInputError(msg)
    dtype_name(tensor.dtype, owner)
    if is_distributed(tensor):
        tensor = tensor.detach().to_local()
    if hasattr(tensor, "__tensor_flatten__"):
        msg = f"{owner}: a {type(tensor).__name__} wraps other tensors; pass its plain tensors instead"
        raise InvalidInputError(msg)
    if tensor.is_meta:
        msg = f"{owner}: a tensor on the meta device has no values; materialise the model first (to_empty)"
        raise InvalidInputError(msg)
    if tensor.layout is not torch.strided or tensor.is_nested:
        msg = f"{owner}: only strided tensors can be stored, not {tensor.layout}; pass its parts or to_dense()"
        raise InvalidInputError(msg)


def nbytes(tensor: torch.Tensor) -> int:
    """Return the size of a tensor's elements in bytes, whatever its strides."""
    return tensor.numel() * tensor.element_size()


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the elements lie on the host, in C order, without lazy conjugation: usable as bytes as they are."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a plain tensor as writable bytes; nothing is copied."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    flat = tensor.detach().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements in C order as bytes in host memory; a copy only where it is not plain."""
    if is_plain(tensor):
        return as_bytes(tensor)
    return as_bytes(resolved(tensor).to("cpu", memory_format=torch.contiguous_format).contiguous())


def resolved(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor detached, with lazy conjugation and negation carried out."""
    return tensor.detach().resolve_conj().resolve_neg()


def chunk_bytes(tensor: torch.Tensor, chunk: Chunk) -> memoryview:
    """Return the bytes of one chunk, padding left out; a copy only where the tensor is not plain host memory."""
    if is_plain(tensor):
        size = tensor.element_size()
        return as_bytes(tensor)[chunk.offset * size : (chunk.offset + chunk.elements) * size]
    return host_bytes(tensor[chunk.slices] if chunk.slices else tensor)


def scalar_to_hex(tensor: torch.Tensor) -> str:
    """Return the bytes of a zero-dimensional tensor in hex, little-endian as everywhere."""
    return bytes(as_bytes(resolved(tensor).cpu().reshape(1))).hex()


def scalar_from_hex(dtype: str, text: str) -> torch.Tensor:
    """Return the zero-dimensional tensor that :func:`scalar_to_hex` wrote.

    Raises:
        InvalidInputError: no such dtype, or the wrong number of digits.
    """
    if dtype not in DTYPES or len(text) != 2 * DTYPES[dtype].itemsize:
        msg = f"{text!r} is no {dtype} scalar"
        raise InvalidInputError(msg)
    return torch.frombuffer(bytearray(bytes.fromhex(text)), dtype=DTYPES[dtype]).reshape(()).clone()


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy values into a tensor of any strides, also one whose elements share memory (``expand``)."""
    with torch.no_grad():
        target = target.detach()
        for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
            if stride == 0 and size > 1:
                target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
        target.copy_(source)


def wait_for_devices(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until what the calling thread has queued on the tensors' devices is done.

    Streams belong to threads: without this, other threads could read values that are not computed yet, or write values
    that queued work still overwrites.
    """
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def empty_host(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Return a new contiguous host tensor with undefined elements."""
    return torch.empty(shape, dtype=DTYPES[dtype])
