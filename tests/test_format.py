"""What lies in a root is plain Zarr v3, for readers that know nothing of tailorstore, and has one form only."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import xxhash

import tailorstore as ts
from tailorstore.domain.names import is_id
from tests.conftest import Root
from tests.kit.light import StoredLight
from tests.kit.models import adamw, bits, gpt, train
from tests.kit.s3 import S3Server

PLAIN = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
PLAIN += ["float16", "float32", "float64", "complex64", "complex128"]
SMALL = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
DTYPES = [*PLAIN, *SMALL, "complex32"]


def any_bits(dtype: str, shape: tuple[int, ...] = (5, 30)) -> torch.Tensor:
    """Return random bytes as elements: NaN payloads, denormals, infinities and -0.0 among them."""
    kind: torch.dtype = getattr(torch, dtype)
    count = int(np.prod(shape))
    raw = torch.randint(0, 256, (count * kind.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return (raw % 2).bool().reshape(shape) if dtype == "bool" else raw.view(kind).reshape(shape)


def layer_folder(store: ts.Store, root: Path, layer: str) -> Path:
    """Return where the version of a layer in the newest composite lies."""
    (version,) = [one.version_id for one in store.layers() if one.name == layer]
    return root / "layers" / layer / version


ZARR_ALONE = """
import json, sys, zarr
folders, known = sys.argv[2:], sys.argv[1] == "known"
if known:
    from tailorstore.storage.dtypes import register
    register()
found = {}
for folder in folders:
    group = zarr.open_group(folder, mode="r")
    for path, array in group.members(max_depth=None):
        if isinstance(array, zarr.Array):
            alone = zarr.open_array(f"{folder}/{path}", mode="r")
            assert alone.metadata == array.metadata
            values = alone[...]
            found[path] = [str(array.dtype), list(array.shape), values.tobytes().hex()]
assert known or not any(name.startswith("tailorstore") for name in sys.modules)
print(json.dumps(found))
"""


def read_with_zarr_alone(folders: list[Path], cwd: Path, *, known: bool) -> dict[str, tuple[str, list[int], bytes]]:
    """Read all arrays of some groups in a process of its own, which knows tailorstore's data types or nothing of it."""
    done = subprocess.run(
        [sys.executable, "-c", ZARR_ALONE, "known" if known else "alone", *folders],
        cwd=cwd,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {path: (kind, shape, bytes.fromhex(raw)) for path, (kind, shape, raw) in json.loads(done.stdout).items()}


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_zarr_python_alone_reads_every_bit(tmp_path: Path, codec: Any) -> None:
    root = tmp_path / "root"
    plain = {f"plain.{name}": any_bits(name) for name in PLAIN}
    # Sizes that leave the last chunk partly empty, several chunks along two dimensions, no elements, no dimensions.
    plain |= {"plain.odd": any_bits("float32", (7, 3, 11)), "plain.none": any_bits("int16", (0, 3))}
    plain |= {"plain.wide": any_bits("float64", (2, 300)), "plain.one": any_bits("float64", ())}
    small = {f"small.{name}": any_bits(name) for name in SMALL}
    with ts.open_store(root, codec=codec, chunk_bytes=1024) as store:
        store.commit(1, plain | small)
        folders = [layer_folder(store, root, layer) for layer in ("plain", "small")]
    found = read_with_zarr_alone(folders[:1], tmp_path, known=False)
    assert {name: raw for name, (_, _, raw) in found.items()} == {name: bits(value) for name, value in plain.items()}
    assert {name: shape for name, (_, shape, _) in found.items()} == {n: list(v.shape) for n, v in plain.items()}
    for name in PLAIN:
        assert found[f"plain.{name}"][0] == name
    found = read_with_zarr_alone(folders[1:], tmp_path, known=True)
    assert {name: raw for name, (_, _, raw) in found.items()} == {name: bits(value) for name, value in small.items()}
    for name in SMALL:
        assert found[f"small.{name}"][0] == name


def open_with_tensorstore(kvstore: dict[str, Any]) -> Any:
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_tensorstore_reads_every_bit(tmp_path: Path, codec: Any) -> None:
    root = tmp_path / "root"
    state = {f"m.{name}": any_bits(name) for name in DTYPES}
    state |= {"m.odd": any_bits("bfloat16", (7, 3, 11)), "m.one": any_bits("float32", ())}
    with ts.open_store(root, codec=codec, chunk_bytes=1024) as store:
        store.commit(1, state)
        folder = layer_folder(store, root, "m")
    for name, tensor in state.items():
        array = open_with_tensorstore({"driver": "file", "path": f"{folder}/{name}/"})
        assert array.read().result().tobytes() == bits(tensor), name
        if tensor.dtype is not torch.complex32:
            assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
            assert tuple(array.shape) == tuple(tensor.shape)


def test_tensorstore_reads_optimizer_slots_from_s3(s3_server: S3Server, s3_root: Root, tmp_path: Path) -> None:
    model = gpt(layers=1)
    optim = adamw(model)
    train(model, [optim], 1)
    with ts.open_store(
        s3_root.url, catalog=f"sqlite:///{tmp_path}/c.db", storage_options=s3_root.storage_options
    ) as store:
        store.commit(1, model, optim)
        (version,) = {one.version_id for one in store.layers()}
    bucket, _, prefix = s3_root.url.removeprefix("s3://").partition("/")
    environment = s3_server.environment()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for path, expected in {
            "lm_head.weight": model.lm_head.weight,
            "@optim/exp_avg/lm_head.weight": optim.state[model.lm_head.weight]["exp_avg"],
        }.items():
            array = open_with_tensorstore(
                {
                    "driver": "s3",
                    "bucket": bucket,
                    "endpoint": s3_server.endpoint_url,
                    "aws_region": environment["AWS_REGION"],
                    "path": f"{prefix}/layers/lm_head/{version}/{path}/",
                }
            )
            assert array.read().result().tobytes() == bits(expected), path


def test_optimizer_slots_lie_beside_their_tensors(tmp_path: Path) -> None:
    root = tmp_path / "root"
    model = gpt(layers=1)
    optim = adamw(model)
    train(model, [optim], 1)
    with ts.open_store(root) as store:
        store.commit(1, model, optim)
        folder = layer_folder(store, root, "transformer.h.0")
    found = read_with_zarr_alone([folder], tmp_path, known=False)
    mine = {name: param for name, param in model.named_parameters() if name.startswith("transformer.h.0.")}
    expected = {name: bits(param) for name, param in mine.items()}
    for slot in ("exp_avg", "exp_avg_sq"):
        expected |= {f"@optim/{slot}/{name}": bits(optim.state[param][slot]) for name, param in mine.items()}
    assert {path: raw for path, (_, _, raw) in found.items()} == expected


# --- Layout


ID = r"[0-9a-f]{20}"
KEYS = [
    r"tailorstore\.json",
    rf"commits/{ID}\.json",
    rf"refs/{ID}\.json",
    rf"layers/(a|b=2Fc|@extra)/{ID}/zarr\.json",
    rf"layers/(a|b=2Fc)/{ID}/[\w.=]+/(zarr\.json|c(\.\d+)*)",
    rf"layers/(a|b=2Fc)/{ID}/@optim(/[\w=]+)?/zarr\.json",
    rf"layers/(a|b=2Fc)/{ID}/@optim/[\w=]+/[\w.=]+/(zarr\.json|c(\.\d+)*)",
    rf"layers/@extra/{ID}/[\w.=]+(/[\w.=]+)*/(zarr\.json|c(\.\d+)*)",
    r"catalog\.sqlite(-wal|-shm)?",
]


def slots_of(value: torch.Tensor) -> dict[str, Any]:
    return {"exp_avg": value, "step": torch.tensor(3.0)}


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    root = tmp_path / "root"
    state = {"a.w": any_bits("float32", (6, 100)), "a.s": any_bits("float32", ()), "b/c.w": any_bits("bfloat16")}
    with ts.open_store(root, chunk_bytes=1024) as store:
        store.commit(1, state, {"a.w": slots_of(state["a.w"])}, extra={"t": torch.ones(3)})
        store.tag("t")
        keys = {info.key for info in store._objects.list()}
        folder = layer_folder(store, root, "a")
    assert [key for key in keys if not any(re.fullmatch(pattern, key) for pattern in KEYS)] == []
    used = {pattern for pattern in KEYS if any(re.fullmatch(pattern, key) for key in keys)}
    assert used == set(KEYS)
    assert is_id(folder.name)
    # A step of Adam is an attribute, no object of its own; two rows go into a chunk.
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "@optim/exp_avg/a.w/c.0.0",
        "@optim/exp_avg/a.w/c.1.0",
        "@optim/exp_avg/a.w/c.2.0",
        "@optim/exp_avg/a.w/zarr.json",
        "@optim/exp_avg/zarr.json",
        "@optim/zarr.json",
        "a.s/c",
        "a.s/zarr.json",
        "a.w/c.0.0",
        "a.w/c.1.0",
        "a.w/c.2.0",
        "a.w/zarr.json",
        "zarr.json",
    ]


def test_a_light_version_is_a_group_of_three_arrays(tmp_path: Path) -> None:
    root = tmp_path / "root"
    state = {"a.w": any_bits("int16").float(), "a.n": any_bits("int64", (5,)), "b.w": any_bits("float32", (3,))}
    slots = {"a.w": {"exp_avg": any_bits("int8").float(), "exp_avg_sq": any_bits("uint8").float() + 1}}
    light = ts.LightSettings(exact_below=64, block=16, weight_bits=4, slot_bits=4)
    with ts.open_store(root, chunk_bytes=1024, light=light) as store:
        base = store.commit(1, state, slots)
        moved = {name: value + (name == "a.w") for name, value in state.items()}
        slots = {"a.w": {slot: value * 1.01 for slot, value in slots["a.w"].items()}}
        store.commit(2, moved, slots, mask={"*": "light"})
        folder = layer_folder(store, root, "a")
        with store.checkout() as checkpoint:
            restored = checkpoint.model_state_dict()
            optim: Any = checkpoint.optim_state_dict()
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "@light/codes/c.0",
        "@light/codes/zarr.json",
        "@light/exact/c.0",
        "@light/exact/zarr.json",
        "@light/scales/c.0",
        "@light/scales/zarr.json",
        "@light/zarr.json",
        "zarr.json",
    ]
    found = read_with_zarr_alone([folder], tmp_path, known=False)
    # 150 elements are ten blocks, and four bits are half a byte; logarithmic scales are two words.
    assert {path: (kind, shape) for path, (kind, shape, _) in found.items()} == {
        "@light/codes": ("uint8", [3 * 80]),
        "@light/scales": ("uint16", [10 + 10 + 20]),
        "@light/exact": ("uint8", [40]),
    }
    assert found["@light/exact"][2] == bits(state["a.n"])
    for path, (_, _, raw) in found.items():
        assert open_with_tensorstore({"driver": "file", "path": f"{folder}/{path}/"}).read().result().tobytes() == raw
    described = json.loads((folder / "zarr.json").read_text())["attributes"]["tailorstore"]
    assert (described["fidelity"], described["base"]) == ("light", base.id)
    assert 0 < described["error"] < 0.001
    light = described["light"]
    assert light["block"] == 16
    assert {path: entry[:4] for path, entry in light["tensors"].items()} == {
        "a.w": ["float32", [5, 30], "difference", 4],
        "a.n": ["int64", [5], "exact", 0],
        "@optim/exp_avg/a.w": ["float32", [5, 30], "difference", 4],
        "@optim/exp_avg_sq/a.w": ["float32", [5, 30], "ratio", 4],
    }
    # What these mean, told by nothing but zarr-python and the definition.
    reference = StoredLight(folder, root / "layers" / "a" / base.id)
    assert reference.tensor("a.w").tobytes() == bits(restored["a.w"])
    assert reference.tensor("a.n").tobytes() == bits(restored["a.n"])
    for slot, value in optim["state"]["a.w"].items():
        np.testing.assert_allclose(reference.tensor(f"@optim/{slot}/a.w"), value.numpy(), rtol=2e-7)


def test_the_codecs_of_a_light_version_are_zarrs_own(tmp_path: Path) -> None:
    root = tmp_path / "root"
    state = {"a.w": any_bits("int16", (40, 60)).float(), "a.n": torch.arange(400)}
    with ts.open_store(root, chunk_bytes=1024) as store:
        store.commit(1, state)
        store.commit(2, {"a.w": state["a.w"] + 1, "a.n": state["a.n"] + 1}, mask={"*": "light"})
        folder = layer_folder(store, root, "a")
        assert store.checkout().fidelity["a"] == "light"
    documents = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("@light/*/zarr.json")}
    assert sorted(documents) == ["codes", "exact", "scales"]
    for name, document in documents.items():
        assert document["codecs"][0]["name"] == "bytes"
        assert document["codecs"][1]["name"] == "blosc"
        assert document["codecs"][1]["configuration"]["cname"] == "zstd"
        expected = "bitshuffle" if name == "scales" else "noshuffle"
        assert document["codecs"][1]["configuration"]["shuffle"] == expected
    found = read_with_zarr_alone([folder], tmp_path, known=False)
    assert found["@light/exact"][2] == bits(state["a.n"] + 1)
    consolidated = json.loads((folder / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    assert {path.rpartition("/")[2] for path in consolidated} == {"@light", "codes", "exact", "scales"}


def test_an_uncoded_object_is_the_tensors_bytes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    value = any_bits("bfloat16", (40, 30))
    with ts.open_store(root, chunk_bytes=1024) as store:
        store.commit(1, {"a.w": value})
        folder = layer_folder(store, root, "a") / "a.w"
        record = store.checkout().documents()["a"].arrays["a.w"]
    chunks = sorted(folder.glob("c.*.0"), key=lambda path: int(path.name.split(".")[1]))
    assert len(chunks) > 2
    assert b"".join(chunk.read_bytes() for chunk in chunks) == bits(value)
    assert [xxhash.xxh3_128(chunk.read_bytes()).hexdigest() for chunk in chunks] == list(record.digests)
    assert [chunk.stat().st_size for chunk in chunks] == list(record.sizes)


def test_chunks_that_equal_the_fill_value_are_written(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with ts.open_store(root, chunk_bytes=1024) as store:
        store.commit(1, {"a.w": torch.zeros(600), "a.v": torch.full((600,), -0.0)})
        folder = layer_folder(store, root, "a")
    assert len(list(folder.rglob("c.*"))) == 6


def test_consolidated_metadata_agrees_with_the_documents(tmp_path: Path) -> None:
    root = tmp_path / "root"
    state = {f"a.{name}": any_bits(name) for name in DTYPES}
    with ts.open_store(root, chunk_bytes=1024, codec="lz4") as store:
        store.commit(1, state, {"a.float32": slots_of(state["a.float32"])})
        folder = layer_folder(store, root, "a")
    consolidated = json.loads((folder / "zarr.json").read_text())["consolidated_metadata"]
    assert (consolidated["kind"], consolidated["must_understand"]) == ("inline", False)
    documents = {
        str(path.parent.relative_to(folder)): json.loads(path.read_text())
        for path in folder.rglob("zarr.json")
        if path.parent != folder
    }
    assert len(documents) == len(DTYPES) + 3
    assert consolidated["metadata"] == documents


# --- One form


def digests(folder: Path, state: dict[str, torch.Tensor], slots: dict[str, Any], **settings: Any) -> dict[str, str]:
    with ts.open_store(folder, **settings) as store:
        store.commit(5, state, slots)
        return {
            version.layer: version.digest for version in store._catalog.live_versions() if version.layer != "@extra"
        }


def test_equal_content_has_equal_digests(tmp_path: Path) -> None:
    state = {"a.w": any_bits("float32"), "a.v": any_bits("int8"), "b.w": any_bits("bool")}
    slots = {"a.w": {"x": any_bits("float32"), "y": torch.tensor(1.0)}, "a.v": {"x": any_bits("float64")}}
    found = digests(tmp_path / "one", state, slots)
    assert sorted(found) == ["a", "b"]
    backwards = {name: dict(reversed(held.items())) for name, held in reversed(slots.items())}
    # Not of the order of dictionaries, nor the codec, nor the store.
    assert digests(tmp_path / "two", dict(reversed(state.items())), backwards, codec="zstd") == found
    # But of every bit, of names, and of what is a tensor and what is not.
    flipped = state["a.w"].clone()
    flipped.view(torch.uint8)[4, 7] ^= 1
    renamed = {"a.w": state["a.w"], "a.u": state["a.v"], "b.w": state["b.w"]}
    number = {**slots, "a.w": {**slots["a.w"], "y": 1.0}}
    others: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = [
        (state | {"a.w": flipped}, slots),
        (renamed, {"a.w": slots["a.w"]}),
        (state, number),
    ]
    different = [digests(tmp_path / f"other{at}", *one) for at, one in enumerate(others)]
    assert all(other["b"] == found["b"] for other in different)
    assert len({found["a"], *(other["a"] for other in different)}) == 4


def test_the_order_of_dictionaries_is_no_change(tmp_path: Path) -> None:
    state = {"a.w": any_bits("float32"), "a.v": any_bits("int8"), "b.w": any_bits("bool")}
    slots = {"a.w": {"x": any_bits("float32"), "y": torch.tensor(1.0)}, "a.v": {"x": any_bits("float64")}}
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, state, slots)
        again = store.commit(2, dict(reversed(state.items())), {n: dict(reversed(h.items())) for n, h in slots.items()})
        assert again.layers_written == ()


# --- The composite as one hierarchy


def test_a_composite_is_one_zarr_group_of_several_steps(tmp_path: Path) -> None:
    first = {"a.w": any_bits("float32", (6, 100)), "b.w": any_bits("bfloat16"), "c": any_bits("int64", ())}
    with ts.open_store(tmp_path / "root", chunk_bytes=1024) as store:
        store.commit(1, first, {"a.w": slots_of(first["a.w"])})
        second = {**first, "b.w": first["b.w"].flip(0)}
        store.commit(2, second, {"a.w": slots_of(first["a.w"] * 2)}, mask=["b"])
        with store.checkout() as checkpoint:
            group = checkpoint.zarr()
            assert checkpoint.sources == {"@extra": 2, "a": 1, "b": 2, "c": 1}
            expected = {"a/a.w": first["a.w"], "a/@optim/exp_avg/a.w": first["a.w"], "b/b.w": second["b.w"]}
            expected["c/c"] = first["c"]
            for path, tensor in expected.items():
                assert group[path][...].tobytes() == bits(tensor), path  # type: ignore[index,union-attr]
            assert group.attrs["sources"] == checkpoint.sources
            assert {name: held.attrs["step"] for name, held in group.groups()} == checkpoint.sources
            with pytest.raises(ValueError, match="view"):
                group.create_group("x")
            (chunk,) = (tmp_path / "root/layers/a").glob("*/a.w/c.1.0")
            chunk.unlink()
            assert group["a/a.w"][0:2].tobytes() == bits(first["a.w"][0:2])  # type: ignore[index,union-attr]
            # Zarr by itself would give zeros.
            with pytest.raises(ts.IntegrityError, match="'a'"):
                group["a/a.w"][...]  # type: ignore[index]
