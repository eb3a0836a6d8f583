"""Export of composites to safetensors and to files that torch.load reads."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tailorstore as ts
from tailorstore.domain.errors import MissingDependencyError, MissingObjectError
from tests.kit.models import gpt, train


@pytest.fixture
def store(tmp_path: Path) -> ts.Store:
    return ts.open_store(tmp_path / "root")


@pytest.fixture
def trained(store: ts.Store) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Commit a tied model with AdamW at steps 1 (all) and 2 (one block)."""
    model = gpt(tied=True)
    optim = torch.optim.AdamW(model.parameters())
    for step, mask in ((1, None), (2, ["transformer.h.1"])):
        train(model, [optim], 1)
        store.commit(step, model, optim, mask, extra={"epoch": 3, "best": torch.tensor(1.5)})
    return model, optim


def test_safetensors_holds_the_composite(store: ts.Store, trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint = store.checkout()
    checkpoint.export(path)

    expected = checkpoint.model_state_dict()
    found = load_file(path)
    assert found.keys() == expected.keys() == trained[0].state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert header["tailorstore.commit"] == checkpoint.commit.id
    assert header["tailorstore.step"] == "2"
    assert json.loads(header["tailorstore.sources"]) == checkpoint.sources


def test_safetensors_with_optimizer_state(store: ts.Store, trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    checkpoint = store.checkout()
    checkpoint.export(path, optim=True)

    state = checkpoint.optim_state_dict()
    assert isinstance(state, dict)
    found = load_file(path)
    for name, slots in state["state"].items():
        for slot, value in slots.items():
            assert torch.equal(found[f"@optim/{slot}/{name}"], value)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["tailorstore.param_groups"])[0][0]["lr"] == 1e-3


def test_torch_file_restores_a_training(store: ts.Store, trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "resume.pt"
    checkpoint = store.checkout()
    checkpoint.export(path, "torch")

    loaded = torch.load(path, weights_only=True)
    assert loaded.keys() == {"model", "optim", "extra", "step", "sources"}
    assert (loaded["step"], loaded["sources"]) == (2, checkpoint.sources)
    assert loaded["extra"]["epoch"] == 3
    expected = checkpoint.model_state_dict()
    assert all(torch.equal(loaded["model"][name], expected[name]) for name in expected)
    model = gpt(seed=1, tied=True)
    model.load_state_dict(loaded["model"])
    assert loaded["optim"]["state"].keys() == dict(model.named_parameters()).keys()


def test_torch_file_of_a_commit_without_optimizer(store: ts.Store, tmp_path: Path) -> None:
    store.commit(1, {"a.weight": torch.ones(2)})
    store.checkout().export(tmp_path / "m.pt", "torch")
    assert torch.load(tmp_path / "m.pt", weights_only=True)["optim"] is None


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
)
def test_dtypes_survive(store: ts.Store, tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    store.commit(1, {"a.weight": tensor, "a.empty": tensor[:0], "a.scalar": tensor[0, 1].clone()})
    for kind, load in (("safetensors", load_file), ("torch", lambda path: torch.load(path)["model"])):
        path = tmp_path / kind
        store.checkout().export(path, kind)  # type: ignore[arg-type]
        found = load(path)
        assert found["a.weight"].dtype == dtype
        assert torch.equal(found["a.weight"].view(torch.uint8), tensor.view(torch.uint8))
        assert found["a.empty"].shape == (0, 3)
        assert found["a.scalar"].shape == ()


def test_a_dtype_that_safetensors_cannot_hold_is_named(store: ts.Store, tmp_path: Path) -> None:
    store.commit(1, {"good.weight": torch.ones(2), "bad.weight": torch.ones(2, dtype=torch.complex128)})
    with pytest.raises(ts.InvalidInputError, match=r"'bad.weight' \(torch.complex128\).*torch format"):
        store.checkout().export(tmp_path / "m.safetensors")
    assert list(tmp_path.glob("*m.safetensors*")) == []
    store.checkout().export(tmp_path / "m.pt", "torch")


def test_existing_files_are_kept_unless_told(store: ts.Store, trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("mine")
    for kind in ("safetensors", "torch"):
        with pytest.raises(ts.AlreadyExistsError, match="overwrite"):
            store.checkout().export(path, kind)
    assert path.read_text() == "mine"
    store.checkout().export(path, overwrite=True)
    assert load_file(path)


def test_a_failed_export_leaves_nothing(store: ts.Store, trained: Any, tmp_path: Path) -> None:
    checkpoint = store.checkout()
    for chunk in (tmp_path / "root" / "layers" / "transformer.h.1").rglob("c.*"):
        chunk.unlink()
    target = tmp_path / "out"
    target.mkdir()
    (target / "m.pt").write_text("old")
    for kind in ("safetensors", "torch"):
        with pytest.raises(MissingObjectError):
            checkpoint.export(target / "m.pt", kind, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["m.pt"]
    assert (target / "m.pt").read_text() == "old"


def test_paths_that_cannot_be_written(store: ts.Store, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ts.InvalidInputError, match="no folder"):
        store.checkout().export(tmp_path / "none" / "m.pt", "torch")
    with pytest.raises(ts.InvalidInputError, match="is a folder"):
        store.checkout().export(tmp_path, overwrite=True)
    with pytest.raises(ts.InvalidInputError, match="unknown format"):
        store.checkout().export(tmp_path / "m.gguf", "gguf")  # type: ignore[arg-type]


def test_a_missing_safetensors_is_named(
    store: ts.Store, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingDependencyError, match="pip install safetensors"):
        store.checkout().export(tmp_path / "m.safetensors")


def test_progress_is_told(store: ts.Store, trained: Any, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    store.checkout().export(tmp_path / "m.safetensors", progress=lambda *what: seen.append(what))
    reading = [told for told in seen if told[0] == "reading tensors"]
    assert reading[-1][1] == reading[-1][2]
