import asyncio
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tailorstore.domain.chunks import chunks_of
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.records import ArraySpec
from tailorstore.storage.documents import (
    array_document,
    array_metadata,
    choose_chunks,
    chunk_grid,
    chunk_key,
    group_document,
)
from tailorstore.storage.dtypes import register

shapes = st.lists(st.integers(0, 12), max_size=4).map(tuple)


@given(shape=shapes, itemsize=st.sampled_from([1, 2, 4, 8, 16]), limit=st.integers(16, 3000))
def test_chunks_are_runs_of_memory_that_cover_the_tensor_once(
    shape: tuple[int, ...], itemsize: int, limit: int
) -> None:
    chunk_shape = choose_chunks(shape, itemsize, limit)
    assert len(chunk_shape) == len(shape)
    assert all(extent >= 1 for extent in chunk_shape)
    assert math.prod(chunk_shape) * itemsize <= max(limit, itemsize)
    end = 0
    for chunk in chunks_of(shape, chunk_shape):
        # One run: it begins where the one before ended, and is as long as it has elements.
        assert chunk.offset == end
        assert chunk.elements <= chunk.capacity
        box_end = sum((stop - 1) * math.prod(shape[at + 1 :]) for at, (_, stop) in enumerate(chunk.box))
        assert box_end == chunk.offset + chunk.elements - 1
        end += chunk.elements
    assert end == math.prod(shape)


@pytest.mark.parametrize(
    ("shape", "itemsize", "chunks"),
    [
        ((), 4, ()),
        ((0,), 4, (1,)),
        ((0, 7), 4, (1, 7)),
        ((4096, 4096), 2, (4096, 4096)),
        ((4096, 4096), 4, (2048, 4096)),
        ((128256, 4096), 4, (2004, 4096)),
        ((151936, 896), 4, (8938, 896)),
        ((3, 5000, 5000), 4, (1, 1250, 5000)),
        ((1, 100_000_000), 4, (1, 6_250_000)),
    ],
)
def test_rows_are_cut_evenly(shape: tuple[int, ...], itemsize: int, chunks: tuple[int, ...]) -> None:
    assert choose_chunks(shape, itemsize) == chunks


def test_a_limit_below_one_element_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="cannot hold an element"):
        choose_chunks((4,), 8, 4)


def test_array_documents_are_zarr_pythons_and_complete() -> None:
    spec = ArraySpec("float32", (5, 3), (2, 3), "lz4")
    document = json.loads(array_document(spec))
    assert document["zarr_format"] == 3
    assert document["shape"] == [5, 3]
    assert document["chunk_grid"]["configuration"]["chunk_shape"] == [2, 3]
    assert document["fill_value"] == 0
    assert [codec["name"] for codec in document["codecs"]] == ["bytes", "blosc"]
    assert document["codecs"][1]["configuration"]["typesize"] == 4
    assert array_metadata(spec) == document
    array_metadata(spec)["shape"].append(1)
    assert array_metadata(spec) == document
    plain = json.loads(array_document(ArraySpec("bool", (), ())))
    assert plain["codecs"] == [{"name": "bytes"}]


def test_documents_can_be_made_while_an_event_loop_runs() -> None:
    async def inside() -> bytes:
        return array_document(ArraySpec("int16", (77,), (77,)))

    assert json.loads(asyncio.run(inside()))["shape"] == [77]


@pytest.mark.parametrize("chunks", [(2,), (2, 3, 1), (0, 3), (2, -1)])
def test_chunks_that_do_not_fit_are_refused(chunks: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="do not fit"):
        array_document(ArraySpec("float32", (5, 3), chunks))


def test_chunk_keys_and_grids() -> None:
    spec = ArraySpec("float32", (5, 3), (2, 3))
    assert chunk_grid(spec) == (3, 1)
    assert chunk_key(spec, (2, 0)) == "c.2.0"
    assert chunk_key(ArraySpec("float32", (), ()), ()) == "c"
    assert chunk_key(ArraySpec("complex32", (5,), (2,)), (1,)) == "c.1.0"


def test_a_groups_document_tells_all_that_is_below(tmp_path: Path) -> None:
    specs = {
        "weight": ArraySpec("float32", (5, 3), (2, 3)),
        "@optim/exp_avg/weight": ArraySpec("bfloat16", (5, 3), (2, 3)),
        "@optim/exp_avg_sq/a=2Fb/w": ArraySpec("float32", (), ()),
    }
    register()
    (tmp_path / "zarr.json").write_bytes(group_document({"step": 3}, specs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(str(tmp_path), mode="r", zarr_format=3, use_consolidated=True)
    assert dict(group.attrs) == {"step": 3}
    members: dict[str, Any] = dict(group.members(max_depth=None))
    assert {name for name, member in members.items() if isinstance(member, zarr.Array)} == set(specs)
    assert {name for name, member in members.items() if isinstance(member, zarr.Group)} == {
        "@optim", "@optim/exp_avg", "@optim/exp_avg_sq", "@optim/exp_avg_sq/a=2Fb",
    }  # fmt: skip
    assert members["weight"].chunks == (2, 3)


def test_a_plain_group_has_no_consolidated_metadata() -> None:
    assert json.loads(group_document({}, {})) == {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def test_attributes_must_be_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        group_document({"nan": math.nan}, {})
