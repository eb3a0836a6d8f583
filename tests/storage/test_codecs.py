import concurrent.futures
import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorstore.domain.errors import CorruptDocumentError, DigestMismatchError
from tailorstore.storage import codecs


@given(
    codec=st.sampled_from(codecs.CODECS),
    itemsize=st.sampled_from([1, 2, 4, 8, 16]),
    data=st.binary(max_size=5000),
    repeat=st.integers(1, 5),
)
def test_what_is_encoded_comes_back(codec: str, itemsize: int, data: bytes, repeat: int) -> None:
    data = data * repeat
    encoded = codecs.encode(codec, itemsize, data)
    target = memoryview(bytearray(len(data)))
    codecs.decode(codec, itemsize, encoded, target)
    assert target == data


def test_like_numbers_get_smaller() -> None:
    values = np.random.default_rng(0).normal(0, 0.02, 1 << 16).astype(np.float32).view(np.uint8)
    for codec in ("lz4", "zstd"):
        assert codecs.encode(codec, 4, values.tobytes()).nbytes < 0.95 * values.nbytes
        assert codecs.encode(codec, 4, bytes(values.nbytes)).nbytes < 0.02 * values.nbytes


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_damaged_chunks_are_refused_or_differ(codec: str) -> None:
    data = random.Random(1).randbytes(4000) + bytes(4000)
    encoded = bytes(codecs.encode(codec, 4, data))
    for damaged in (b"", encoded[:7], encoded[:-1], encoded + b"x", encoded[: len(encoded) // 2]):
        with pytest.raises(DigestMismatchError):
            codecs.decode(codec, 4, damaged, memoryview(bytearray(len(data))))


@given(st.sampled_from(["lz4", "zstd"]), st.integers(0, 3000), st.integers(1, 255), st.booleans())
def test_a_flipped_bit_never_does_more_than_change_the_content(codec: str, at: int, flip: int, small: bool) -> None:
    data = bytes(range(256)) * (4 if small else 40)
    encoded = bytearray(codecs.encode(codec, 4, data))
    encoded[at % len(encoded)] ^= flip
    target = bytearray(len(data))
    try:
        codecs.decode(codec, 4, encoded, memoryview(target))
    except DigestMismatchError:
        return
    assert len(target) == len(data)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_chunk_that_claims_to_be_huge_is_not_believed(codec: str) -> None:
    encoded = bytearray(codecs.encode(codec, 4, bytes(4000)))
    struct.pack_into("<I", encoded, 4, 0xFFFFFFF0)
    with pytest.raises(DigestMismatchError, match="says that it holds 4294967280 bytes"):
        codecs.decode(codec, 4, encoded, memoryview(bytearray(4000)))


def test_threads_do_not_disturb_each_other() -> None:
    chunks = [random.Random(seed).randbytes(50_000) + bytes(seed * 1000) for seed in range(24)]

    def work(number: int) -> bool:
        codec = codecs.CODECS[1 + number % 2]
        target = memoryview(bytearray(len(chunks[number])))
        codecs.decode(codec, 4, codecs.encode(codec, 4, chunks[number]), target)
        return target == chunks[number]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(len(chunks))))


def test_unknown_codecs_are_named() -> None:
    with pytest.raises(CorruptDocumentError, match="unknown codec 'gzip'"):
        codecs.encode("gzip", 4, b"")
    with pytest.raises(CorruptDocumentError, match="unknown codec 'gzip'"):
        codecs.decode("gzip", 4, b"", memoryview(bytearray(0)))
    with pytest.raises(CorruptDocumentError, match="unknown codec 'gzip'"):
        codecs.zarr_compressors("gzip", 4)
