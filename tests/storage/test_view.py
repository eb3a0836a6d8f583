import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from tailorstore.domain.chunks import chunks_of
from tailorstore.domain.errors import DigestMismatchError, MissingObjectError
from tailorstore.domain.records import ArrayRecord, ArraySpec, LayerDocument
from tailorstore.storage import codecs
from tailorstore.storage.documents import chunk_key
from tailorstore.storage.dtypes import data_type, itemsize, register
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.view import CompositeStore, ViewedLayer, composite_group

SHAPE, CHUNKS = (5, 3), (2, 3)


def put_array(objects: LocalObjects, prefix: str, path: str, dtype: str, codec: str) -> tuple[ArrayRecord, Any]:
    values = np.arange(1, 16).reshape(SHAPE).astype(data_type(dtype).numpy)
    spec = ArraySpec(dtype, SHAPE, CHUNKS, codec)
    digests, sizes = [], []
    size = itemsize(dtype)
    for chunk in chunks_of(SHAPE, CHUNKS):
        elements = values.tobytes()[chunk.offset * size : (chunk.offset + chunk.elements) * size]
        digests.append(xxhash.xxh3_128(elements).hexdigest())
        encoded = codecs.encode(codec, size, elements + bytes((chunk.capacity - chunk.elements) * size))
        sizes.append(objects.put(f"{prefix}{path}/{chunk_key(spec, chunk.index)}", encoded))
    return ArrayRecord(path, spec, tuple(digests), tuple(sizes)), values


@pytest.fixture
def composite(tmp_path: Path) -> tuple[CompositeStore, dict[str, Any]]:
    """Give two layers of different steps as one hierarchy, and what its arrays hold."""
    objects = LocalObjects(str(tmp_path))
    layers, values = {}, {}
    for layer, version, step, codec in (("h.0", "v1", 10, "none"), ("h=2F1", "v2", 20, "lz4")):
        prefix = f"layers/{layer}/{version}/"
        arrays = {}
        for path, dtype in (("weight", "float32"), ("@optim/exp_avg/weight", "bfloat16")):
            arrays[path], values[f"{layer}/{path}"] = put_array(objects, prefix, path, dtype, codec)
        document = LayerDocument(layer.replace("=2F", "/"), version, step, {}, arrays)
        layers[layer] = ViewedLayer(prefix, document)
    return CompositeStore(objects, {"commit": "c0ffee", "step": 20}, layers), values


def opened(composite: tuple[CompositeStore, dict[str, Any]]) -> zarr.Group:
    register()
    return zarr.open_group(composite[0], mode="r", zarr_format=3)


def test_a_composite_reads_as_one_hierarchy(composite: tuple[CompositeStore, dict[str, Any]]) -> None:
    group = opened(composite)
    assert dict(group.attrs) == {"commit": "c0ffee", "step": 20}
    assert sorted(group.group_keys()) == ["h.0", "h=2F1"]
    for path, values in composite[1].items():
        array = group[path]
        assert isinstance(array, zarr.Array)
        assert np.array_equal(np.asarray(array[...]), values)
        assert np.array_equal(np.asarray(array[3:5, 1:]), values[3:5, 1:])
        assert array.dtype == values.dtype


def test_it_can_be_walked_without_consolidated_metadata(composite: tuple[CompositeStore, dict[str, Any]]) -> None:
    group = zarr.open_group(composite[0], mode="r", zarr_format=3, use_consolidated=False)
    found = {path for path, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    assert found == set(composite[1])
    assert dict(group["h=2F1"].attrs) == {"layer": "h/1", "version": "v2", "step": 20, "fidelity": "full"}


def test_composite_group_opens_it(tmp_path: Path) -> None:
    objects = LocalObjects(str(tmp_path))
    record, values = put_array(objects, "layers/a/v/", "w", "float8_e4m3fn", "zstd")
    group = composite_group(
        objects, {}, {"a": ViewedLayer("layers/a/v/", LayerDocument("a", "v", 1, {}, {"w": record}))}
    )
    array = group["a/w"]
    assert isinstance(array, zarr.Array)
    assert np.asarray(array[...]).tobytes() == values.tobytes()
    assert list(composite_group(objects, {"step": 1}, {}).keys()) == []


def test_missing_chunks_are_an_error_and_no_zeros(
    composite: tuple[CompositeStore, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "layers/h.0/v1/weight/c.1.0").unlink()
    array = opened(composite)["h.0/weight"]
    assert isinstance(array, zarr.Array)
    with pytest.raises(MissingObjectError, match=r"layer 'h\.0', array weight: object layers/h\.0/v1/weight/c\.1\.0"):
        array[...]
    assert np.array_equal(np.asarray(array[:2]), composite[1]["h.0/weight"][:2])


@pytest.mark.parametrize(("layer", "version"), [("h.0", "v1"), ("h=2F1", "v2")])
def test_damaged_and_short_chunks_are_an_error(
    composite: tuple[CompositeStore, dict[str, Any]], tmp_path: Path, layer: str, version: str
) -> None:
    path = tmp_path / f"layers/{layer}/{version}/weight/c.0.0"
    content = bytearray(path.read_bytes())
    array = opened(composite)[f"{layer}/weight"]
    assert isinstance(array, zarr.Array)
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DigestMismatchError, match="array weight"):
        array[:2]
    path.write_bytes(content[:-1])
    with pytest.raises(MissingObjectError, match="bytes, not"):
        array[:2]


def test_nothing_can_be_written(composite: tuple[CompositeStore, dict[str, Any]]) -> None:
    array = opened(composite)["h.0/weight"]
    assert isinstance(array, zarr.Array)
    with pytest.raises(ValueError, match="is a view"):
        array[...] = 0
    store = composite[0]
    nothing = default_buffer_prototype().buffer.from_bytes(b"")
    for action in (store.delete("zarr.json"), store.set("x", nothing)):
        with pytest.raises(ValueError, match="is a view"):
            asyncio.run(action)


def test_keys_that_no_document_mentions_are_not_there(composite: tuple[CompositeStore, dict[str, Any]]) -> None:
    store = composite[0]
    names = ["c.3.0", "c.0", "c.0.0.0", "c.00.0", "c.0.-1", "c/0/0", "x"]
    strays = ["", "h.9", "../tailorstore.json", *(f"h.0/weight/{name}" for name in names)]
    for key in strays:
        assert asyncio.run(store.get(key, default_buffer_prototype())) is None
        assert not asyncio.run(store.exists(key))
    assert asyncio.run(store.exists("h.0/weight/c.2.0"))


def test_parts_and_listings(composite: tuple[CompositeStore, dict[str, Any]]) -> None:
    store, values = composite
    prototype = default_buffer_prototype()
    key = "h.0/weight/c.0.0"
    whole = values["h.0/weight"][:2].tobytes()

    async def look() -> None:
        parts = await store.get_partial_values(
            prototype,
            [(key, None), (key, RangeByteRequest(4, 8)), (key, OffsetByteRequest(20)), (key, SuffixByteRequest(4))],
        )
        got = [part.to_bytes() for part in parts if part is not None]
        assert got == [whole, whole[4:8], whole[20:], whole[-4:]]
        listed = [name async for name in store.list()]
        assert len(listed) == len(set(listed)) == 4 * (1 + 3) + 7
        assert sorted([name async for name in store.list_dir("h.0")]) == ["@optim", "weight", "zarr.json"]
        assert [name async for name in store.list_dir("")] == ["h.0", "h=2F1", "zarr.json"]
        below = [name async for name in store.list_prefix("h.0/weight/")]
        assert sorted(below) == ["h.0/weight/c.0.0", "h.0/weight/c.1.0", "h.0/weight/c.2.0", "h.0/weight/zarr.json"]

    asyncio.run(look())
    assert store == store
    assert store != "something else"
    assert "CompositeStore('file://" in repr(store)
