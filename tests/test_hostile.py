"""A store from a stranger is data: whatever stands in it is refused within bounded memory and time, or it is read."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import CorruptDocumentError, DigestMismatchError, MissingObjectError, NotAStoreError
from tailorstore.domain.names import COMMITS_PREFIX, REFS_PREFIX, ROOT_DOCUMENT
from tailorstore.engine.tensors.packing import unpack
from tailorstore.storage import codecs, parsing
from tailorstore.storage.layers import parse_document
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.manifests import read_binding, read_manifest, read_ref_record
from tests.fuzz.mutations import DEEP, TWICE, at, resealed
from tests.fuzz.samples import Sample, make_sample
from tests.fuzz.stores import forge
from tests.kit.models import assert_same, same_bits

OURS: Final = ("attributes", "tailorstore")
SECONDS: Final = 10.0
"""Processor time; none of this takes one."""
MEMORY: Final = 768 << 20
"""What the most values of one document take; all else here takes little."""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make_sample(tmp_path_factory.mktemp("hostile") / "root")


@pytest.fixture
def root(sample: Sample, tmp_path: Path) -> Path:
    """Give a copy of the store without its catalog."""
    return sample.copy(tmp_path / "root", catalog=False)


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes long, or the process grows by much."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def document_of(sample: Sample, *, light: bool = False) -> dict[str, Any]:
    """Return a layer version's document: of layer ``a``, with several chunks, slots and module state."""
    found = [json.loads((sample.root / key).read_bytes()) for key in sample.group_documents(light=light)]
    document = next(one for one in found if at(one, OURS)["layer"] == "a" and at(one, OURS)["content"]["params"])
    del document["consolidated_metadata"]
    chosen: dict[str, Any] = document
    return chosen


def refuses(document: dict[str, Any]) -> CorruptDocumentError:
    """Return the error with which a layer's document is refused, in bounded time and memory."""
    raw = resealed(document, OURS)
    with bounded(), pytest.raises(CorruptDocumentError, match=r"layers/a/zarr\.json .*verify") as caught:
        parse_document(memoryview(raw), "layers/a/zarr.json")
    return caught.value


def test_fuzzing_finds_nothing() -> None:
    """A bounded share of ``make fuzz``: in a process of its own, since hostile bytes could end it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--inputs", "40", "--json"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(done.stdout)
    assert len(counted["targets"]) >= 13
    for name, tally in counted["targets"].items():
        assert tally["inputs"] >= 2, name
        assert tally["findings"] == []
        assert tally["refused"] > 0 or "store" in name, name
    assert counted["memory_grown_bytes"] < 1 << 30


# --- Documents of layers


def test_the_document_that_is_changed_below_is_a_good_one(sample: Sample) -> None:
    for light in (False, True):
        document = document_of(sample, light=light)
        assert parse_document(memoryview(resealed(document, OURS)), "x").layer == "a"


def replaced(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Change fields of the array of ``a.weight``."""
    return lambda ours: ours["arrays"]["a.weight"].update(changes)


def named(path: str) -> Callable[[dict[str, Any]], None]:
    """Give the array of ``a.weight`` another path, wherever it is spoken of."""

    def change(ours: dict[str, Any]) -> None:
        ours["arrays"][path] = ours["arrays"].pop("a.weight")
        ours["documents"][f"{path}/zarr.json"] = ours["documents"].pop("a.weight/zarr.json")
        ours["content"]["params"]["a.weight"] = {"$array": path}

    return change


def put(where: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(ours: dict[str, Any]) -> None:
        at(ours, where[:-1])[where[-1]] = value

    return change


HEX: Final = "0" * 32
LAYOUTS: Final[dict[str, Callable[[dict[str, Any]], None]]] = {
    "an extent beyond all integers": replaced(shape=[2**63, 48]),
    "a negative extent": replaced(shape=[-40, 48]),
    "an extent that is a truth": replaced(shape=[True, 48]),
    "an extent with a fraction": replaced(shape=[40.0, 48]),
    "thousands of dimensions": replaced(shape=[1] * 5000, chunk_shape=[1] * 5000, digests=[HEX], sizes=[4]),
    "a product beyond all integers": replaced(shape=[2**40] * 8, chunk_shape=[1] * 8),
    "a grid of 10**12 chunks": replaced(shape=[10**6, 10**6], chunk_shape=[1, 1]),
    "an empty tensor of absurd extents": replaced(shape=[0, 2**62], chunk_shape=[1, 2**62], digests=[], sizes=[]),
    "chunks larger than the array": replaced(chunk_shape=[2**20, 48], digests=[HEX], sizes=[2**20 * 192]),
    "a chunk of a petabyte": replaced(
        shape=[2**48], chunk_shape=[2**48], codec="none", digests=[HEX], sizes=[2**50]
    ),
    "chunks of no rows": replaced(chunk_shape=[0, 48]),
    "a size that is short": replaced(shape=[4], chunk_shape=[4], codec="none", digests=[HEX], sizes=[15]),
    "a terabyte in sixteen bytes": replaced(shape=[2**38], chunk_shape=[2**38], codec="lz4", digests=[HEX], sizes=[16]),
    "a compressed chunk that has grown": replaced(shape=[4], chunk_shape=[4], codec="lz4", digests=[HEX], sizes=[999]),
    "a size that is a text": replaced(shape=[4], chunk_shape=[4], codec="none", digests=[HEX], sizes=["16"]),
    "a digest that is a number": replaced(shape=[4], chunk_shape=[4], codec="none", digests=[7], sizes=[16]),
    "a digest of another kind": replaced(shape=[4], chunk_shape=[4], codec="none", digests=["g" * 32], sizes=[16]),
    "digests that are a text": replaced(digests=HEX),
    "an unknown dtype": replaced(dtype="object"),
    "an unknown codec": replaced(codec="pickle"),
}  # fmt: skip
PATHS: Final = (
    "", ".", "..", "../../../x", "/etc/passwd", "a/../../x", "a//b", "a\0b", "a\\b", "ａ", "﹒﹒", "é", "a b",
    "%2e%2e/x", "x" * 300, "a.bias/zarr.json", "a.bias/c.0", ".hidden", "zarr.json", "~", "\ud800", "a\nb", "con:",
)  # fmt: skip
CONTENTS: Final[dict[str, Callable[[dict[str, Any]], None]]] = {
    "a tensor that is not there": put(("content", "params", "a.weight"), {"$array": "nowhere"}),
    "a tensor named twice": put(("content", "states", "again"), [{"$array": "a.weight"}]),
    "one tensor a million times": put(("content", "states", "bomb"), [{"$array": "a.weight"}] * 1_000_000),
    "a parameter that is no tensor": put(("content", "params", "a.weight"), 7),
    "a path that is a list": put(("content", "params", "a.weight"), {"$array": ["a.weight"]}),
    "a slot whose path is an object": put(("content", "optim", "a.weight", "exp_avg"), {"$array": {}}),
    "an alias of a list": put(("content", "aliases", "b"), ["a.weight"]),
    "slots that are a list": put(("content", "optim", "a.weight"), []),
    "no sections": put(("content",), {}),
    "one section more": put(("content", "more"), {}),
    "a skeleton that is a list": put(("content",), []),
    "a skeleton as deep as parsers go": put(("content", "states", "deep"), json.loads("[" * 400 + "]" * 400)),
    "a skeleton deeper than parsers go": put(("content", "states", "deep"), DEEP),
    "more values than any": put(("content", "states", "many"), [0] * 4_100_000),
    "a number that is none": put(("content", "states", "nan"), float("nan")),
    "an infinite number": put(("content", "states", "inf"), float("inf")),
    "a key that is there twice": put(("content", "states", f"{TWICE}extra"), 1),
    "a layer that is a number": put(("layer",), 7),
    "a version that is a path": put(("version",), "../../../../etc"),
    "a step below zero": put(("step",), -1),
    "a step beyond all catalogs": put(("step",), 2**63),
    "a full version with a base": put(("base",), "0" * 20),
    "a light version without table": put(("fidelity",), "light"),
    "a fidelity of its own": put(("fidelity",), "perfect"),
    "a format that is a text": put(("format",), "1"),
    "a format below zero": put(("format",), -5),
    "documents outside": put(("documents", "../../x/zarr.json"), HEX),
    "a document's digest that is none": put(("documents", "a.weight/zarr.json"), None),
    "no arrays": put(("arrays",), None),
}


@pytest.mark.parametrize("what", [*LAYOUTS, *CONTENTS])
def test_documents_that_describe_what_cannot_be_are_refused(sample: Sample, what: str) -> None:
    document = document_of(sample)
    change = (LAYOUTS | CONTENTS)[what]
    change(at(document, OURS))
    if "twice" in what and "key" in what:
        at(document, OURS)["content"]["states"]["extra"] = 2
    refuses(document)


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_lead_elsewhere_are_refused(sample: Sample, path: str) -> None:
    document = document_of(sample)
    named("a.other")(at(document, OURS))
    assert "a.other" in parse_document(memoryview(resealed(document, OURS)), "x").arrays
    document = document_of(sample)
    named(path)(at(document, OURS))
    refuses(document)


def test_numbers_of_any_length_are_refused_in_little_time(sample: Sample) -> None:
    raw = resealed(document_of(sample), OURS)
    for digits in (b"9" * 1_000_000, b"1e999", b"-1e999", b"NaN", b"Infinity"):
        changed = raw.replace(b'"step": ', b'"step": ' + digits + b', "other": ')
        assert changed != raw
        with bounded(), pytest.raises(CorruptDocumentError):
            parse_document(memoryview(changed), "x")


LIGHT: Final[dict[str, Callable[[dict[str, Any]], None]]] = {
    "bits that there are not": lambda table: table["tensors"]["a.weight"].__setitem__(3, 7),
    "bits of an exact tensor": lambda table: table["tensors"]["a.bias"].__setitem__(3, 4),
    "a block of three": lambda table: table.__setitem__("block", 3),
    "a block beyond all tensors": lambda table: table.__setitem__("block", 2**40),
    "codes outside": lambda table: table["tensors"]["a.weight"].__setitem__(4, 2**40),
    "codes before the beginning": lambda table: table["tensors"]["a.weight"].__setitem__(4, -1),
    "scales outside": lambda table: table["tensors"]["a.weight"].__setitem__(5, 2**40),
    "a shape beyond its codes": lambda table: table["tensors"]["a.weight"].__setitem__(1, [2**30, 2**20]),
    "codes that two tensors share": lambda table: table["tensors"].__setitem__("copy", table["tensors"]["a.weight"]),
    "bytes that two tensors share": lambda table: table["tensors"].__setitem__("copy", table["tensors"]["a.bias"]),
    "a rounding of nothing": lambda table: table["tensors"].__setitem__(
        "copy", ["bfloat16", [40, 48], "rounded", 0, 0, 0, "nowhere", 0.0]
    ),
    "a rounding of itself": lambda table: table["tensors"].__setitem__(
        "copy", ["bfloat16", [40, 48], "rounded", 0, 0, 0, "copy", 0.0]
    ),
    "two roundings of one": lambda table: table["tensors"].update(
        {name: ["bfloat16", [40, 48], "rounded", 0, 0, 0, "a.weight", 0.0] for name in ("one", "two")}
    ),
    "an error that is none": lambda table: table["tensors"]["a.weight"].__setitem__(7, "0"),
    "a tensor with a path outside": lambda table: table["tensors"].__setitem__(
        "../x", ["float32", [0], "exact", 0, 0, 0, None, 0.0]
    ),
}


@pytest.mark.parametrize("what", LIGHT)
def test_tables_of_light_versions_that_lie_are_refused(sample: Sample, what: str) -> None:
    document = document_of(sample, light=True)
    assert {tensor[2] for tensor in at(document, OURS)["light"]["tensors"].values()} >= {"difference", "exact"}
    LIGHT[what](at(document, OURS)["light"])
    refuses(document)


# --- Values in skeletons


def test_values_that_a_packer_never_makes_are_refused() -> None:
    collisions = [[index * (2**61 - 1), 0] for index in range(20_000)]
    values: list[Any] = [
        {"$number": ["O", "00"]}, {"$number": ["<U9999999", "00"]}, {"$number": ["(9999999,)f8", "00"]},
        {"$number": ["<f8", ""]}, {"$number": ["<f8", "00" * 16]}, {"$number": ["f8,f8", "00" * 16]}, {"$number": 7},
        {"$scalar": ["float32", "0"]}, {"$scalar": ["object", "00"]}, {"$scalar": [[], []]}, {"$scalar": {}},
        {"$float": 1}, {"$float": "00"}, {"$bytes": "\ud800"}, {"$bytes": 5}, {"$tuple": "abc"}, {"$tuple": {"a": 1}},
        {"$dict": [[[], 1]]}, {"$dict": [[1]]}, {"$dict": {"a": 1}}, {"$dict": collisions}, {"$array": 5},
        {"$array": None}, {"$ndarray": []}, {"$eval": "1"}, {"$": 0},
    ]  # fmt: skip
    for value in values:
        with bounded(), pytest.raises(CorruptDocumentError, match=r"document holds .*; run 'tailorstore verify'"):
            unpack(value, lambda _: torch.zeros(1))


# --- Compressed chunks


@pytest.mark.parametrize("codec", ["lz4", "zstd", "entropy"])
def test_every_flipped_bit_of_a_frame_s_header_is_refused(sample: Sample, codec: str) -> None:
    raw, _, itemsize, size = sample.chunk(codec)
    for bit in range(8 * 16):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        target = memoryview(bytearray(size))
        try:
            codecs.decode(codec, itemsize, changed, target)
        except DigestMismatchError:
            continue
        # Of the header these may differ: how blocks were split, and how long they are; the digest is over all.
        assert bit // 8 in (2, *range(8, 12)), bit


def test_frames_that_claim_other_sizes_are_refused_before_they_are_decoded(sample: Sample) -> None:
    raw, codec, itemsize, size = sample.chunk("zstd")
    for claimed in (0, 1, size - 1, size + 1, 2**31, 2**32 - 1):
        frame = raw[:4] + claimed.to_bytes(4, "little") + raw[8:]
        with bounded(), pytest.raises(DigestMismatchError, match=f"says that it holds {claimed} bytes"):
            codecs.decode(codec, itemsize, frame, memoryview(bytearray(size)))
    for frame in (raw + b"\0", raw + raw, raw[:-1], raw[:15], b""):
        with bounded(), pytest.raises(DigestMismatchError):
            codecs.decode(codec, itemsize, frame, memoryview(bytearray(size)))


@pytest.mark.parametrize("codec", ["lz4", "zstd", "entropy"])
def test_nothing_compresses_better_than_a_document_may_say(codec: str) -> None:
    for itemsize in (1, 4, 8):
        for size in (8, 4096, 32 << 20):
            encoded = codecs.encode(codec, itemsize, bytes(size))
            least, most = codecs.stored_sizes(codec, size)
            assert least <= len(encoded) <= most
            assert len(codecs.encode(codec, itemsize, os.urandom(size))) <= most


# --- Whole stores


def test_a_petabyte_that_is_not_there_is_refused_before_memory_is_taken(sample: Sample, root: Path) -> None:
    """The document agrees with itself and with the manifests: only storage can tell."""
    key = next(key for key in sample.group_documents(light=False) if key.startswith("layers/b/"))
    document = json.loads((root / key).read_bytes())
    del document["consolidated_metadata"]
    ours = at(document, OURS)
    ours["arrays"]["b.weight"].update(
        dtype="uint8", shape=[2**50], chunk_shape=[2**40], codec="none", digests=[HEX] * 1024, sizes=[2**40] * 1024
    )
    forge(root, key, resealed(document, OURS))
    with ts.open_store(root) as store:
        store.rebuild_catalog()
        (held,) = [one for one in store.log() if one.id == ours["version"]]
        with store.checkout(held) as checkpoint, bounded():
            lazy = checkpoint.model["b.weight"]
            for read in (checkpoint.model_state_dict, lazy.load, lambda: lazy[5:]):
                with pytest.raises(MissingObjectError, match=r"layers/b/.*b\.weight/c\.0 .* is (short|missing)"):
                    read()
            assert same_bits(checkpoint.model["a.bias"].load(), sample.states[held.step]["a.bias"])


@pytest.mark.parametrize("key", [ROOT_DOCUMENT, COMMITS_PREFIX, REFS_PREFIX, "layers/b/"])
def test_huge_documents_are_refused_before_they_are_read(sample: Sample, root: Path, key: str) -> None:
    with ts.open_store(root) as store, store.checkout(1) as checkpoint:
        version = checkpoint.commit.id
    path = {ROOT_DOCUMENT: root / key, "layers/b/": root / key / version / "zarr.json"}.get(key) or next(
        (root / key).iterdir()
    )
    os.truncate(path, 2**40)  # sparse
    with bounded():
        if key == ROOT_DOCUMENT:
            with pytest.raises(NotAStoreError, match="choose another root"):
                read_binding(LocalObjects(str(root)))
            return
        with ts.open_store(root) as store:
            report = store.rebuild_catalog()
            if key != "layers/b/":
                assert report.unreadable == (str(path.relative_to(root)),)
                return
            assert not store.verify().ok
            with store.checkout(1) as checkpoint, pytest.raises(CorruptDocumentError, match="may have"):
                checkpoint.model_state_dict()


def changed_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(resealed(document))


EVIL_NAMES: Final = ("../../x", "/etc/passwd", "a\0b", "latest", "1200", "", "x" * 201, "\ud800", "a b", "-x", 7, None)


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_names_that_no_ref_can_have_are_left_behind(root: Path, name: Any) -> None:
    objects = LocalObjects(str(root))
    for path in (root / REFS_PREFIX).iterdir():
        changed_json(path, lambda record: record.update(name=name))
        with pytest.raises(CorruptDocumentError):
            read_ref_record(objects, path.stem)
    (path, *_) = sorted((root / COMMITS_PREFIX).iterdir())
    changed_json(path, lambda manifest: manifest["commit"].update(branch=name))
    with pytest.raises(CorruptDocumentError):
        read_manifest(objects, path.stem)


@pytest.mark.parametrize("epoch", [2**63 - 1, 2**63, 10**400, -1, 1.5, "1", True, None])
def test_absurd_epochs_are_refused(root: Path, epoch: Any) -> None:
    changed_json(root / ROOT_DOCUMENT, lambda binding: binding.update(epoch=epoch))
    with pytest.raises(NotAStoreError):
        read_binding(LocalObjects(str(root)))
    with ts.open_store(root) as store:
        # Whoever owned it: it can be read, and taken over.
        assert store.log()
        with pytest.raises(ts.ConflictError):
            store.commit(9, {"a.w": torch.ones(3)})


def test_commits_that_are_each_other_s_parents_come_to_an_end(root: Path) -> None:
    paths = sorted((root / COMMITS_PREFIX).iterdir())
    for path, other in zip(paths, [*paths[1:], paths[0]], strict=True):
        changed_json(path, lambda manifest, other=other: manifest["commit"].update(parent=other.stem))  # type: ignore[misc]
    with bounded(), ts.open_store(root) as store:
        store.rebuild_catalog()
        store.log()
        store.gc(ts.KeepLast(1), grace=timedelta(0), dry_run=True)


def test_names_tied_to_nothing_are_refused(sample: Sample, root: Path) -> None:
    for key in sample.group_documents(light=False):
        document = json.loads((root / key).read_bytes())
        ours = at(document, OURS)
        if ours["layer"] == "a":
            ours["content"]["aliases"] = {"tied.weight": "nowhere"}
            forge(root, key, resealed(document, OURS))
    with ts.open_store(root) as store:
        store.rebuild_catalog()
        with store.checkout(1) as checkpoint, pytest.raises(CorruptDocumentError, match=r"'nowhere'.*is in no layer"):
            checkpoint.model_state_dict()


def test_parameter_groups_that_are_none_are_refused(sample: Sample, root: Path) -> None:
    for key in sample.group_documents(light=False):
        document = json.loads((root / key).read_bytes())
        ours = at(document, OURS)
        if ours["layer"] == "@extra":
            ours["content"]["param_groups"] = [[{"lr": 1.0, "params": 7}]]
            forge(root, key, resealed(document, OURS))
    with ts.open_store(root) as store:
        store.rebuild_catalog()
        with store.checkout(1) as checkpoint, pytest.raises(CorruptDocumentError, match="parameter groups"):
            checkpoint.optim_state_dict()


# --- Files that are none


def test_links_and_pipes_below_a_root_are_no_objects(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    root = tmp_path / "root"
    objects = LocalObjects(str(root))
    objects.put("a/real", b"x")
    (root / "a/link").symlink_to(outside / "secret")
    (root / "b").symlink_to(outside)
    os.mkfifo(root / "a/pipe")
    for key in ("a/link", "b/secret", "a/pipe"):
        with bounded(), pytest.raises(MissingObjectError, match=key):
            objects.get(key)
        with pytest.raises(MissingObjectError, match=key):
            objects.read_into(key, memoryview(bytearray(6)))
        assert not objects.exists(key)
    assert [info.key for info in objects.list()] == ["a/real"]
    with pytest.raises(ts.TailorError, match="b/"):
        list(objects.list("b/"))
    with pytest.raises(ts.TailorError, match="b/new"):
        objects.put("b/new", b"x")
    assert [failure.key for failure in objects.delete(["b/secret", "a/link"])] == ["b/secret"]
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, {"a.w": torch.ones(3)})
        assert store.verify().ok
        assert_same(store.checkout().model_state_dict(), {"a.w": torch.ones(3)})


def test_gc_deletes_nothing_behind_a_link(tmp_path: Path) -> None:
    """A stranger's store could point at the reader's own, whose objects it does not know."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for root in (mine, theirs):
        with ts.open_store(root) as store:
            store.commit(1, {"a.w": torch.ones(3)})
    shutil.rmtree(theirs / "layers")
    (theirs / "layers").symlink_to(mine / "layers")
    with ts.open_store(theirs) as store:
        store.gc(ts.KeepLast(1), grace=timedelta(0))
        with pytest.raises(MissingObjectError):
            store.checkout().model_state_dict()
    with ts.open_store(mine) as store:
        assert store.verify().ok


def test_times_that_no_calendar_has_are_passed_over(tmp_path: Path) -> None:
    objects = LocalObjects(str(tmp_path))
    objects.put("a/b", b"x")
    try:
        os.utime(tmp_path / "a/b", (2**40, 2**40))
    except OSError:
        pytest.skip("the file system has no such times")
    ((modified),) = [info.modified for info in objects.list()]
    assert modified is None or modified.year > 2100


# --- What nobody could read is not written either


def test_state_that_nobody_could_read_is_refused_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parsing, "MOST_VALUES", 20_000)
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, {"a.w": torch.ones(3)})
        with pytest.raises(ts.InvalidInputError, match=r"layer '@extra'.*values.*pass large lists as tensors"):
            store.commit(2, {"a.w": torch.zeros(3)}, extra={"many": list(range(20_000))})
        assert [commit.step for commit in store.log()] == [1]
        assert store.verify().ok
        store.commit(3, {"a.w": torch.zeros(3)}, extra={"many": list(range(2_000))})
        assert store.checkout().extra == {"many": list(range(2_000))}


def test_the_deepest_state_that_is_written_can_be_read(tmp_path: Path) -> None:
    value: Any = 0
    for level in range(63):
        value = ({(level,): value}, [value], (value,))[level % 3]
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, {"a.w": torch.ones(3)}, extra=value)
        assert store.checkout().extra == value


def test_tensors_of_more_dimensions_than_zarr_knows_are_refused(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        with pytest.raises(ts.InvalidInputError, match="dimensions"):
            store.commit(1, {"a.w": torch.ones([1] * 65)})
        store.commit(1, {"a.w": torch.ones([1] * 64)})
        assert store.checkout().model["a.w"].load().shape == torch.Size([1] * 64)
