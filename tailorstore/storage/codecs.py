"""Codecs: what may happen to a chunk's bytes on their way to storage, as Zarr's codec chain says it too.

All of them are lossless. Compression is numcodecs' Blosc, which holds no global state of ours and works outside of
Python's lock, so threads may encode and decode side by side.
"""

import struct
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from tailorstore.domain.errors import CorruptDocumentError, DigestMismatchError
from tailorstore.storage.transport import flat_bytes

if TYPE_CHECKING:
    from numcodecs.blosc import Blosc  # type: ignore[import-untyped]
    from typing_extensions import Buffer

CODECS = ("none", "lz4", "zstd", "entropy")
"""``lz4``: 1 GB/s on one core, a fifth to a tenth off training state; ``zstd``: a little more off at 0.4 GB/s.
``entropy``: zstd without bit shuffling, for codes that are packed already: its Huffman stage comes within 1 % of their
entropy at 1 GB/s."""

_BLOSC: Mapping[str, Literal["lz4", "zstd"]] = {"lz4": "lz4", "zstd": "zstd", "entropy": "zstd"}
_UNSHUFFLED = ("entropy",)
_LEVEL = 1
_HEADER = struct.Struct("<BBBBIII")
"""Blosc's: version, its codec's version, flags, type size, then decoded, block and encoded size."""
_VERSIONS = (2, 1)
"""Of Blosc's format, and of those of LZ4's and Zstandard's that it knows."""
_FORMATS = {"lz4": 1, "zstd": 4}
_FORMAT_SHIFT = 5
_SHUFFLED = 0b101
"""Flags: by bytes, by bits."""
_BY_BITS = 0b100
_COPIED = 0b10
"""Flag: it did not compress, and stands there as it was."""

MOST_RATIO = 1 << 16
"""How many times smaller than its elements a chunk's object may be. Zeros, of which nothing compresses better, come to
1214 with zstd and 238 with lz4, whatever the chunk's size; blocks larger than Blosc's choice could come to 32 768."""


def zarr_compressors(codec: str, itemsize: int) -> list[Any]:
    """Return what zarr-python calls the compressors of a codec.

    Raises:
        CorruptDocumentError: no codec of that name.
    """
    if codec == "none":
        return []
    name = _check(codec)
    from zarr.codecs import BloscCodec

    shuffle: Literal["noshuffle", "bitshuffle"] = "noshuffle" if codec in _UNSHUFFLED else "bitshuffle"
    return [BloscCodec(cname=name, clevel=_LEVEL, shuffle=shuffle, typesize=itemsize, blocksize=0)]


def encode(codec: str, itemsize: int, data: "Buffer") -> memoryview:
    """Return the bytes of a chunk's object.

    Args:
        codec: a member of :data:`CODECS`.
        itemsize: bytes of one element: bits of like meaning are brought together before compressing.
        data: the chunk, contiguous; returned itself when the codec is ``none``.

    Raises:
        CorruptDocumentError: no codec of that name.
    """
    view = flat_bytes(data)
    if codec == "none":
        return view
    _check(codec)
    return memoryview(_blosc(codec, itemsize).encode(view))


def decode(codec: str, itemsize: int, encoded: "Buffer", target: memoryview) -> None:
    """Decode a chunk's object into memory of the size that the documents say.

    Nothing is allocated by what the object claims: all of its header is checked first, and Blosc takes no block that
    is larger than ``target``.

    Raises:
        DigestMismatchError: it does not decode to ``len(target)`` bytes; ``target`` may hold some of it.
        CorruptDocumentError: no codec of that name.
    """
    view = flat_bytes(encoded)
    if codec == "none":
        if view.nbytes != target.nbytes:
            msg = f"the chunk has {view.nbytes} bytes, not {target.nbytes}"
            raise DigestMismatchError(msg)
        target[:] = view
        return
    name = _check(codec)
    if view.nbytes < _HEADER.size:
        msg = f"the compressed chunk has only {view.nbytes} bytes, less than its header"
        raise DigestMismatchError(msg)
    version, inner, flags, typesize, decoded, block, stored = _HEADER.unpack_from(view)
    if decoded != target.nbytes or stored != view.nbytes:
        msg = (
            f"the compressed chunk says that it holds {decoded} bytes in {stored}; it should be {target.nbytes} "
            f"in {view.nbytes}"
        )
        raise DigestMismatchError(msg)
    shuffle = flags & _SHUFFLED
    if (
        (version, inner) != _VERSIONS
        or flags >> _FORMAT_SHIFT != _FORMATS[name]
        or typesize != itemsize
        or block > max(1, decoded)
        or shuffle not in ((0,) if codec in _UNSHUFFLED else (0, _BY_BITS))
        or (flags & _COPIED and stored != decoded + _HEADER.size)
    ):
        msg = f"the compressed chunk is not one of codec {codec!r}"
        raise DigestMismatchError(msg)
    if not decoded:
        return
    try:
        _blosc(codec, itemsize).decode(view, out=target)
    except (RuntimeError, ValueError) as error:
        msg = f"the compressed chunk cannot be decoded ({error})"
        raise DigestMismatchError(msg) from error


def stored_sizes(codec: str, decoded: int) -> tuple[int, int]:
    """Return the least and the greatest size that the object of a chunk can have; ``decoded`` counts padding."""
    if codec == "none":
        return decoded, decoded
    return max(_HEADER.size, -(-decoded // MOST_RATIO)), decoded + _HEADER.size


def _check(codec: str) -> Literal["lz4", "zstd"]:
    if codec in _BLOSC:
        return _BLOSC[codec]
    msg = f"unknown codec {codec!r}; this version of tailorstore knows {', '.join(CODECS)}"
    raise CorruptDocumentError(msg)


@cache
def _blosc(codec: str, itemsize: int) -> "Blosc":
    from numcodecs.blosc import Blosc

    shuffle = Blosc.NOSHUFFLE if codec in _UNSHUFFLED else Blosc.BITSHUFFLE
    return Blosc(cname=_check(codec), clevel=_LEVEL, shuffle=shuffle, blocksize=0, typesize=itemsize)
