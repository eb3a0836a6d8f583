"""Data types: every bit pattern of every type comes back, through zarr-python and through TensorStore."""

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import torch
import zarr

from tailorstore.domain.chunks import chunks_of
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.records import ArraySpec
from tailorstore.storage import codecs, dtypes
from tailorstore.storage.documents import array_document, chunk_key

SHAPE, CHUNKS = (5, 3, 2), (2, 3, 2)
SMALL = [
    ("bfloat16", "bfloat16"),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("float8_e4m3fnuz", "float8_e4m3fnuz"),
    ("float8_e5m2", "float8_e5m2"),
    ("float8_e5m2fnuz", "float8_e5m2fnuz"),
    ("float8_e8m0fnu", "float8_e8m0fnu"),
]


def awkward_bytes(dtype: str, count: int) -> bytes:
    """Return elements with negative zero, NaN payloads, infinities and denormals among them."""
    size = dtypes.itemsize(dtype)
    if dtype == "bool":
        return bytes(number % 2 for number in range(count))
    patterns = [
        bytes(size),  # zero
        bytes(size - 1) + b"\x80",  # minus zero, little-endian
        b"\x01" + bytes(size - 1),  # the smallest denormal
        b"\xff" * size,  # NaN, all payload
        b"\x23" * (size - 2) + b"\xa5\x7f" if size > 1 else b"\x7d",  # NaN with a payload
        b"\x00" * (size - 2) + b"\x80\xff" if size > 1 else b"\xfc",  # minus infinity, or the like
    ]
    return b"".join(patterns[number % len(patterns)] for number in range(count))


def put_by_hand(folder: Path, spec: ArraySpec, data: bytes) -> None:
    """Write an array as the store does: a document and chunk bytes."""
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_bytes(array_document(spec))
    size = dtypes.itemsize(spec.dtype)
    for chunk in chunks_of(spec.shape, spec.chunk_shape):
        elements = data[chunk.offset * size : (chunk.offset + chunk.elements) * size]
        padded = elements + bytes((chunk.capacity - chunk.elements) * size)
        path = folder / chunk_key(spec, chunk.index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(codecs.encode(spec.codec, size, padded))


@pytest.mark.parametrize("codec", codecs.CODECS)
@pytest.mark.parametrize("dtype", sorted(dtypes.TABLE))
def test_every_bit_comes_back_through_zarr_and_tensorstore(tmp_path: Path, dtype: str, codec: str) -> None:
    data = awkward_bytes(dtype, 30)
    put_by_hand(tmp_path / "array", ArraySpec(dtype, SHAPE, CHUNKS, codec), data)
    dtypes.register()
    with_zarr = zarr.open_array(str(tmp_path / "array"), mode="r")
    values: Any = with_zarr[...]
    assert np.ascontiguousarray(values).tobytes() == data
    assert values.dtype == dtypes.data_type(dtype).numpy
    with_tensorstore = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{tmp_path}/array"}).result()
    assert np.ascontiguousarray(with_tensorstore.read().result()).tobytes() == data
    assert with_tensorstore.dtype.name == dtypes.data_type(dtype).zarr_name
    part: Any = with_zarr[3:5, 1]
    assert np.array_equal(part.view(np.uint8), np.ascontiguousarray(values[3:5, 1]).view(np.uint8))


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex32", "float8_e8m0fnu"])
def test_scalars_and_empty_arrays_are_arrays_too(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    chunks = tuple(max(1, extent) for extent in shape)
    data = awkward_bytes(dtype, int(np.prod(shape)))
    put_by_hand(tmp_path / "array", ArraySpec(dtype, shape, chunks), data)
    dtypes.register()
    opened = zarr.open_array(str(tmp_path / "array"), mode="r")
    trailing = dtypes.data_type(dtype).trailing
    assert opened.shape == shape + trailing
    assert np.asarray(opened[...]).tobytes() == data
    with_tensorstore = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{tmp_path}/array"}).result()
    assert with_tensorstore.shape == shape + trailing
    assert np.asarray(with_tensorstore.read().result()).tobytes() == data


@pytest.mark.parametrize(("torch_name", "name"), SMALL)
def test_zarr_writes_what_it_reads(torch_name: str, name: str) -> None:
    dtypes.register()
    bits = np.arange(64, dtype="u2" if torch_name == "bfloat16" else "u1")
    values = bits.view(np.dtype(getattr(ml_dtypes, name)))
    array = zarr.create_array({}, shape=(64,), chunks=(16,), dtype=values.dtype, fill_value=0)
    array[...] = values
    again: Any = array[...]
    assert again.view(bits.dtype).tolist() == bits.tolist()
    assert array.metadata.to_dict()["data_type"] == name


@pytest.mark.parametrize(("torch_name", "name"), SMALL)
def test_fill_values_are_read_in_every_spelling(torch_name: str, name: str) -> None:
    kind = dtypes.zarr_data_type(torch_name)
    assert bytes(np.asarray(kind.default_scalar()).tobytes()) == bytes(kind.item_size)  # type: ignore[attr-defined]
    zero = kind.default_scalar()
    for spelled in (0, 0.0, "0x" + "0" * 2 * kind.item_size):  # type: ignore[attr-defined]
        assert np.asarray(kind.from_json_scalar(spelled, zarr_format=3)).tobytes() == np.asarray(zero).tobytes()
    assert np.isnan(float(kind.from_json_scalar("NaN", zarr_format=3)))
    one = kind.from_json_scalar(1, zarr_format=3)
    assert kind.from_json_scalar(kind.to_json_scalar(one, zarr_format=3), zarr_format=3) == one
    nan = kind.from_json_scalar("NaN", zarr_format=3)
    assert str(kind.to_json_scalar(nan, zarr_format=3)).startswith("0x")
    for nonsense in ("zero", "0xgg", "0x123456789", None, [0]):
        with pytest.raises(TypeError):
            kind.from_json_scalar(nonsense, zarr_format=3)
    with pytest.raises(ValueError, match="format 3 only"):
        kind.to_json(zarr_format=2)


def test_every_torch_dtype_with_plain_elements_can_be_stored() -> None:
    for name in dtypes.TABLE:
        assert getattr(torch, name).itemsize == dtypes.itemsize(name)
    known = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    # Quantised types, types of less than a byte, and one that stands for packed pairs of those.
    odd = re.compile(r"q|bits|u?int[1-7]$|float4_e2m1fn_x2|bcomplex32")
    assert {name for name in known - set(dtypes.TABLE) if not odd.match(name)} == set()


def test_unknown_dtypes_are_refused_with_what_is_known() -> None:
    for call in (dtypes.itemsize, dtypes.data_type, dtypes.zarr_data_type):
        with pytest.raises(InvalidInputError, match=r"'qint8' cannot be stored; the store knows .*bfloat16"):
            call("qint8")


def test_programs_that_use_zarr_can_know_them(tmp_path: Path) -> None:
    """Through the entry points, or, with zarr-python 3.1, which never loads those, by one call."""
    points = {point.name: point.load() for point in entry_points(group="zarr.data_type")}
    assert {name: points[name]._zarr_v3_name for _, name in SMALL} == {name: name for _, name in SMALL}
    for name, _ in SMALL:
        put_by_hand(tmp_path / name, ArraySpec(name, (4,), (4,)), awkward_bytes(name, 4))
    script = (
        "import sys, zarr\nfrom tailorstore.storage.dtypes import register\nregister()\n"
        "for path in sys.argv[1:]: print(zarr.open_array(path, mode='r')[...].dtype)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, *(tmp_path / name for name, _ in SMALL)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert ran.stdout.split() == [name for name, _ in SMALL]


def test_big_endian_bfloat16_is_refused(tmp_path: Path) -> None:
    put_by_hand(tmp_path / "array", ArraySpec("bfloat16", (4,), (4,)), awkward_bytes("bfloat16", 4))
    document = json.loads((tmp_path / "array/zarr.json").read_text())
    document["codecs"][0]["configuration"]["endian"] = "big"
    (tmp_path / "array/zarr.json").write_text(json.dumps(document))
    dtypes.register()
    with pytest.raises(ValueError, match="little-endian"):
        zarr.open_array(str(tmp_path / "array"), mode="r")[...]
