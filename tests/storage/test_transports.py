"""What every transport promises, over every place that it speaks."""

import concurrent.futures
import datetime
import hashlib
import random
from typing import TYPE_CHECKING

import pytest

from tailorstore.domain.errors import (
    CorruptDocumentError,
    InvalidInputError,
    MissingObjectError,
    StorageUnavailableError,
)
from tailorstore.storage.objects import Objects
from tailorstore.storage.retrying import Retrying
from tests.storage.conftest import Place

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = [
    "tailorstore.json",
    "layers/transformer.h.0/0f/zarr.json",
    "layers/@extra/0f/a=2Fb/zarr.json",
    "layers/a=20b/0f/@optim/exp_avg/w/c.0.0",
    "layers/a==0123/0f/=C3=BC/c/0/0",
    "layers/-_.x/0f/c",
    "layers/" + "n" * 160 + "/0f/zarr.json",
]


def test_what_is_put_is_got_under_exactly_its_key(objects: Objects) -> None:
    for number, key in enumerate(KEYS):
        assert objects.put(key, f"content {number}".encode()) == 9
    assert sorted(info.key for info in objects.list()) == sorted(KEYS)
    for number, key in enumerate(KEYS):
        assert bytes(objects.get(key)) == f"content {number}".encode()
        assert objects.exists(key)


def test_listing_tells_sizes_and_times_and_keeps_to_its_prefix(objects: Objects) -> None:
    for key in ("a/b/one", "a/b/two", "a/bc/three", "a.d/four"):
        objects.put(key, b"x" * len(key))
    found = {info.key: info for info in objects.list("a/b/")}
    assert sorted(found) == ["a/b/one", "a/b/two"]
    assert found["a/b/one"].size == 7
    now = datetime.datetime.now(datetime.UTC)
    modified = found["a/b/one"].modified
    assert modified is not None
    assert modified.utcoffset() == datetime.timedelta(0)
    assert abs(now - modified) < datetime.timedelta(minutes=2)
    assert sorted(info.key for info in objects.list("a/")) == ["a/b/one", "a/b/two", "a/bc/three"]
    assert list(objects.list("nothing/here/")) == []


def test_an_empty_root_has_no_objects(objects: Objects) -> None:
    assert list(objects.list()) == []
    assert not objects.exists("tailorstore.json")
    assert objects.delete(["layers/a/b", "tailorstore.json"]) == []


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, (1 << 20) + 1, 9_000_000])
def test_observers_see_every_byte_once_and_in_order(objects: Objects, size: int) -> None:
    data = random.Random(size).randbytes(size)
    written, read = hashlib.sha256(), hashlib.sha256()
    assert objects.put("a/chunk", data, written.update) == size
    target = memoryview(bytearray(size))
    objects.read_into("a/chunk", target, read.update)
    assert bytes(target) == data
    assert written.digest() == read.digest() == hashlib.sha256(data).digest()


def test_any_contiguous_buffer_can_be_put_and_no_other(objects: Objects) -> None:
    whole = memoryview(bytearray(range(24))).cast("B", (4, 6))
    objects.put("a", whole)
    assert bytes(objects.get("a")) == bytes(range(24))
    with pytest.raises(InvalidInputError, match="contiguous"):
        objects.put("b", memoryview(bytes(24))[::2])
    assert not objects.exists("b")


def test_the_beginning_of_an_object_can_be_read(objects: Objects) -> None:
    objects.put("padded", b"0123456789")
    target = memoryview(bytearray(4))
    seen: list[bytes] = []
    objects.read_into("padded", target, lambda block: seen.append(bytes(block)), size=10)
    assert bytes(target) == b"".join(seen) == b"0123"


@pytest.mark.parametrize(("length", "size", "what"), [(10, None, "short"), (3, None, "long"), (3, 6, "short")])
def test_objects_of_another_size_are_refused(objects: Objects, length: int, size: int | None, what: str) -> None:
    objects.put("five", b"01234")
    with pytest.raises(MissingObjectError, match=rf"five in .* is {what}: it has 5 bytes, not {size or length}"):
        objects.read_into("five", memoryview(bytearray(length)), size=size)


def test_missing_objects_are_named(objects: Objects, place: Place) -> None:
    objects.put("a/b", b"x")
    for key in ("a/c", "a", "a/b/c", "z/z/z"):
        assert not objects.exists(key)
        with pytest.raises(MissingObjectError, match=f"object {key} (is missing in|in .* (is a folder|lies below))"):
            objects.get(key)
        with pytest.raises(MissingObjectError, match=f"object {key} (is missing in|in .* (is a folder|lies below))"):
            objects.read_into(key, memoryview(bytearray(1)))
    assert place.url in repr(objects) or place.url.removeprefix("file://") in repr(objects)


def test_replacing_changes_the_content(objects: Objects) -> None:
    objects.put("tailorstore.json", b"old and longer")
    objects.replace("tailorstore.json", b"new")
    assert bytes(objects.get("tailorstore.json")) == b"new"
    assert [info.key for info in objects.list()] == ["tailorstore.json"]


def test_deleting_leaves_the_rest_and_forgives_what_is_gone(objects: Objects) -> None:
    keys = [f"layers/l{number % 3}/v/p{number}/c.0" for number in range(30)]
    for key in keys:
        objects.put(key, b"x")
    assert objects.delete([*keys[:20], "layers/never/was", *keys[:1]]) == []
    assert sorted(info.key for info in objects.list()) == sorted(keys[20:])
    assert not objects.exists(keys[0])
    assert not objects.exists("layers/l0/v/p0")
    assert objects.delete(keys) == []
    assert list(objects.list()) == []
    # The keys' directories are gone too, and can come back.
    objects.put(keys[0], b"y")
    assert bytes(objects.get(keys[0])) == b"y"


def test_written_objects_can_be_made_durable(objects: Objects) -> None:
    keys = [f"layers/l/v/p{number}/c.0" for number in range(20)]
    objects.confirm({key: objects.put(key, key.encode()) for key in keys})
    objects.confirm({})


@pytest.mark.parametrize("count", [1, 20])
def test_objects_that_did_not_arrive_whole_are_not_confirmed(objects: Objects, count: int) -> None:
    # Without the minute in which it may still arrive.
    objects = objects._objects if isinstance(objects, Retrying) else objects
    sizes = {key: objects.put(key, key.encode()) for key in (f"layers/l/v/p{number}/c.0" for number in range(count))}
    missing, short = "layers/l/v/never/c.0", next(iter(sizes))
    with pytest.raises(StorageUnavailableError, match=rf"{missing} \(missing\); nothing was published"):
        objects.confirm({**sizes, missing: 3})
    with pytest.raises(StorageUnavailableError, match=rf"{short} \({sizes[short]} of 9999 bytes\)"):
        objects.confirm({**sizes, short: 9999})
    with pytest.raises(StorageUnavailableError, match="missing"):
        objects.confirm({"commits/never.json": 3})
    objects.confirm(sizes)


def test_objects_larger_than_they_may_be_are_not_read(objects: Objects) -> None:
    objects.put("a", b"12345")
    assert bytes(objects.get("a", limit=5)) == b"12345"
    with pytest.raises(CorruptDocumentError, match=r"object a in .* has 5 bytes and may have 4 at most"):
        objects.get("a", limit=4)
    with pytest.raises(MissingObjectError):
        objects.get("b", limit=4)


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "./a", "a/.", "a\0b"])
def test_keys_that_could_reach_elsewhere_are_refused(objects: Objects, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: objects.put(key, b"x"),
        lambda: objects.get(key),
        lambda: objects.replace(key, b"x"),
        lambda: objects.exists(key),
        lambda: objects.delete([key]),
        lambda: objects.read_into(key, memoryview(bytearray(1))),
    ]
    for call in calls:
        with pytest.raises(InvalidInputError, match="no object key"):
            call()


@pytest.mark.parametrize("prefix", ["a", "/", "../", "a//"])
def test_prefixes_are_whole_components(objects: Objects, prefix: str) -> None:
    with pytest.raises(InvalidInputError, match=r"prefix|key"):
        list(objects.list(prefix))


def test_many_threads_may_write_read_and_delete_at_once(objects: Objects) -> None:
    def work(number: int) -> None:
        mine = [f"layers/l{number % 2}/v{number}/p{part}/c.0" for part in range(8)]
        for key in mine:
            objects.put(key, key.encode() * 100)
        for key in mine:
            target = memoryview(bytearray(len(key) * 100))
            objects.read_into(key, target)
            assert bytes(target) == key.encode() * 100
        assert objects.delete(mine[1:]) == []

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert len(list(objects.list())) == 16


def test_two_transports_of_one_root_see_the_same_objects(place: Place) -> None:
    keys = KEYS[:5]
    others = ("fsspec",) if place.url.startswith("memory:") else ("fsspec", "obstore", None)
    mine = place.open()
    for key in keys:
        mine.put(key, key.encode())
    for transport in others:
        other = Place(place.url, transport, place.storage_options).open()
        assert sorted(info.key for info in other.list()) == sorted(keys)
        assert [bytes(other.get(key)) for key in keys] == [key.encode() for key in keys]
        other.close()
    mine.close()
