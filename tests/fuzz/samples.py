"""A small store that has one of everything: what the fuzzer changes."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tailorstore as ts

CHUNK_BYTES = 2048


class Net(torch.nn.Module):
    """Two layers, tied weights, buffers, and a module with state of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(48, 40)
        self.b = torch.nn.BatchNorm1d(40)
        self.tied = torch.nn.Linear(48, 40, bias=False)
        self.tied.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.b(self.a(x)) + self.tied(x)
        return found

    def get_extra_state(self) -> Any:
        return {"table": torch.arange(6), "words": ("x", None, 2.5)}

    def set_extra_state(self, state: Any) -> None:
        self.given = state  # whatever it is: what modules make of it is theirs


@dataclass(frozen=True)
class Sample:
    """The store, and what it holds."""

    root: Path
    states: dict[int, dict[str, Any]]
    """Step → the model's state, as each commit's composite gives it back."""

    def copy(self, to: Path, *, catalog: bool) -> Path:
        shutil.rmtree(to, ignore_errors=True)
        ignore = None if catalog else shutil.ignore_patterns("catalog.sqlite*")
        return Path(shutil.copytree(self.root, to, ignore=ignore))

    def group_documents(self, *, light: bool) -> list[str]:
        """Return the keys of the documents of all layer versions that are light, or that are not."""
        found = []
        for path in sorted((self.root / "layers").glob("*/*/zarr.json")):
            described = json.loads(path.read_bytes())["attributes"]["tailorstore"]
            if (described["light"] is not None) == light:
                found.append(str(path.relative_to(self.root)))
        return found

    def all_keys(self) -> list[str]:
        """Return the keys of all objects."""
        files = (path for path in self.root.rglob("*") if path.is_file() and not path.name.startswith("catalog.sqlite"))
        return sorted(str(path.relative_to(self.root)) for path in files)

    def chunk(self, codec: str) -> tuple[bytes, str, int, int]:
        """Return an object that a codec made, its codec's name, the size of an element and of all of them, padded."""
        for key in self.group_documents(light=codec == "entropy"):
            described = json.loads((self.root / key).read_bytes())["attributes"]["tailorstore"]
            for path, array in described["arrays"].items():
                if array["codec"] == codec and array["sizes"]:
                    dims = len(array["shape"])
                    raw = (self.root / key).parent.joinpath(path, ".".join(["c", *["0"] * dims])).read_bytes()
                    size = {"float32": 4, "int64": 8}.get(array["dtype"], 2 if array["dtype"] == "uint16" else 1)
                    return raw, codec, size, int(np.prod(array["chunk_shape"])) * size
        raise AssertionError(codec)


def make_sample(root: Path) -> Sample:
    """Make the store: four commits in all codecs, the last one light, a branch, tags."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    states: dict[int, dict[str, Any]] = {}
    masks: dict[int, Any] = {1: None, 2: ["a"], 3: ["b", "a"], 4: {"a": "light"}}
    for step, codec in ((1, "none"), (2, "lz4"), (3, "zstd"), (4, "zstd")):
        net(torch.randn(8, 48)).square().sum().backward()
        optimizer.step()
        extra = {
            "position": torch.arange(5), "pair": (1, 2.5, float("nan")), 3: b"bytes", "array": np.arange(4),
            "number": np.float32(step), "nested": [{"x": None}, {"y": torch.tensor(7)}],
        }  # fmt: skip
        settings = ts.LightSettings(exact_below=64)
        with ts.open_store(root, chunk_bytes=CHUNK_BYTES, codec=codec, light=settings) as store:  # type: ignore[arg-type]
            store.commit(step, net, optimizer, mask=masks[step], extra=extra, metrics={"loss": 1 / step}, message="m")
            if step == 2:
                store.tag("best", 2)
                store.branch("side", 2)
            states[step] = {
                name: value.clone() for name, value in store.checkout().model_state_dict().items() if _is_tensor(value)
            }
    return Sample(root, states)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
