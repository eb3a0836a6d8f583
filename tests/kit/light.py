"""What a light version means, told from its definition in DESIGN.md, in float64 and with nothing of the engine's."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
import zarr

import tailorstore as ts
from tailorstore.domain.names import escape, layer_component, version_prefix
from tests.kit.models import assert_same, bits, same_bits

Floats = npt.NDArray[np.float64]

WIDTHS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
"""Bits that a code takes, by bits per element."""


def codes_of(packed: npt.NDArray[np.uint8], bits: int, block: int) -> npt.NDArray[np.int64]:
    """Return the codes of whole blocks, of shape (blocks, block).

    A byte holds ``8 / width`` codes, the first in its lowest bits, that lie a part of the block apart.
    """
    width = WIDTHS[bits]
    share = 8 // width
    rows = packed.reshape(-1, block // share).astype(np.int64)
    return np.concatenate([rows >> (at * width) & ((1 << width) - 1) for at in range(share)], axis=1)


def scales_of(words: npt.NDArray[np.uint16]) -> Floats:
    """Return the numbers whose bfloat16 bits these are."""
    return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def linear(packed: npt.NDArray[np.uint8], words: npt.NDArray[np.uint16], bits: int, block: int) -> Floats:
    """Return scale × code of every element of whole blocks."""
    levels = 2 ** (bits - 1) - 1
    values: Floats = (codes_of(packed, bits, block) - levels) * scales_of(words)[:, None]
    return values.reshape(-1)


def logarithmic(packed: npt.NDArray[np.uint8], words: npt.NDArray[np.uint16], bits: int, block: int) -> Floats:
    """Return the power of two of every element of whole blocks; zero where its code says so."""
    codes = codes_of(packed, bits, block)
    offsets, steps = words[0::2].copy().view(np.int16), words[1::2].astype(np.int64)
    octaves = offsets[:, None] / 64 + (codes - 1) * (steps[:, None] / 1024)
    return np.where(codes == 0, 0.0, np.exp2(octaves)).reshape(-1)


class StoredLight:
    """A light version and its base as zarr-python alone reads them."""

    def __init__(self, folder: Path, base: Path) -> None:
        light, full = zarr.open_group(str(folder), mode="r"), zarr.open_group(str(base), mode="r")
        described: Any = light.attrs["tailorstore"]
        assert (described["fidelity"], described["base"]) == ("light", base.name)
        self.block: int = described["light"]["block"]
        self.table: dict[str, list[Any]] = described["light"]["tensors"]
        self._arrays = {name: np.asarray(array[...]) for name, array in light["@light"].arrays()}  # type: ignore[union-attr]
        self._base: Any = full

    def tensor(self, path: str) -> npt.NDArray[Any]:
        """Return a tensor as its definition has it: in its own dtype, rounded once or, of 16 bits, twice."""
        dtype, shape, coding, bits, codes_at, scales_at, of, _ = self.table[path]
        kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
        count = int(np.prod(shape, dtype=np.int64))
        if coding == "exact":
            raw = self._arrays["exact"][codes_at : codes_at + count * kind.itemsize]
            exact: npt.NDArray[Any] = raw.view(kind).reshape(shape)
            return exact
        if coding == "rounded":
            return self.tensor(of).astype(kind)
        blocks = -(-count // self.block)
        packed = self._arrays["codes"][codes_at : codes_at + blocks * self.block * WIDTHS[bits] // 8]
        words = self._arrays["scales"][scales_at:]
        if coding in ("difference", "value"):
            values = linear(packed, words[:blocks], bits, self.block)[:count]
        else:
            values = logarithmic(packed, words[: 2 * blocks], bits, self.block)[:count]
        if coding in ("difference", "ratio"):
            base = np.asarray(self._base[path][...]).astype(np.float64).reshape(-1)
            values = base + values if coding == "difference" else np.where(base > 0, base, 1.0) * values
        wide = values if dtype == "float64" else values.astype(np.float32)
        return wide.astype(kind).reshape(shape)


def folder_of(root: Path, layer: str, version_id: str) -> Path:
    """Return where a layer version lies."""
    return root / version_prefix(layer, version_id)


def stored_light(store: ts.Store, root: Path, layer: str, ref: str | int = "latest") -> StoredLight:
    """Return a composite's light version of a layer, as zarr-python alone reads it."""
    with store.checkout(ref) as checkpoint:
        document = checkpoint.documents()[layer]
    assert document.base_id is not None
    return StoredLight(
        folder_of(root, layer, document.version_id).absolute(), folder_of(root, layer, document.base_id).absolute()
    )


Named = dict[str, torch.Tensor]


def slots_in(state: Any) -> Named:
    """Return the tensors of an optimizer state dict, or of several, by ``slot of parameter``."""
    found: Named = {}
    for one in state if isinstance(state, list) else [state]:
        for name, held in one["state"].items():
            found |= {f"{slot} of {name}": value for slot, value in held.items() if isinstance(value, torch.Tensor)}
    return found


def read(store: ts.Store, ref: str | int = "latest") -> tuple[Named, Named]:
    """Return a composite's model tensors and optimizer slots, after reading them in every way that there is.

    Fails unless all ways give the same bits.
    """
    with store.checkout(ref) as checkpoint, store.checkout(ref) as again:
        model, slots = checkpoint.model_state_dict(), slots_in(checkpoint.optim_state_dict())
        assert_same(again.model_state_dict(), model)
        assert_same(slots_in(again.optim_state_dict()), slots)
        lazy = {name: checkpoint.model[name] for name in model}
        lazy |= {
            f"{slot} of {name}": value
            for name, held in again.optim.items()
            for slot, value in held.items()
            if f"{slot} of {name}" in slots
        }
        whole = model | slots
        assert_same({name: tensor.load() for name, tensor in lazy.items()}, whole)
        assert_same({name: tensor[...] for name, tensor in lazy.items()}, whole)
        for name, tensor in lazy.items():
            _assert_same_parts(tensor, whole[name], name)
        target = {name: torch.full_like(tensor, 1) for name, tensor in model.items()}
        checkpoint.restore(target)
        assert_same(target, model)
        group = checkpoint.zarr()
        for name, tensor in model.items():
            path = f"{layer_component(lazy[name].layer)}/{escape(name)}"
            if tensor.dtype in _SAME_IN_ZARR and path in group:
                assert np.asarray(group[path][...]).tobytes() == bits(tensor)  # type: ignore[index]
    return model, slots


_SAME_IN_ZARR = (torch.float32, torch.float64, torch.float16, torch.int64)


def _assert_same_parts(lazy: Any, whole: torch.Tensor, name: str) -> None:
    """Fail unless rows, and boxes of rows, are those of the whole."""
    if whole.dim() == 0:
        return
    rows = whole.shape[0]
    step = max(1, (rows + 1) // 2)
    for low, high in [(at, min(rows, at + step)) for at in range(0, rows, step)] + [(0, 0)]:
        assert same_bits(lazy[low:high], whole[low:high]), (name, low, high)
    if rows:
        assert same_bits(lazy[rows - 1], whole[rows - 1]), name
    if whole.dim() > 1:
        assert same_bits(lazy[rows // 2 :, 1:3].contiguous(), whole[rows // 2 :, 1:3].contiguous()), name


def assert_as_recorded(store: ts.Store, live: Named, found: Named, ref: str | int = "latest") -> dict[str, str]:
    """Fail unless what was restored is as near to what was committed as the light versions say.

    Args:
        store: that it was committed to.
        live: what was committed: tensors of the model, and slots as :func:`slots_in` names them.
        found: the same, restored.
        ref: the composite; all of its layers are light or equal to ``live``.

    Returns:
        Name → coding of every tensor of the light layers.
    """
    codings: dict[str, str] = {}
    with store.checkout(ref) as checkpoint:
        documents = checkpoint.documents()
        versions = checkpoint._composite.versions
    for layer, document in documents.items():
        if document.light is None:
            continue
        names = {
            value["$array"]: name for kind in ("params", "buffers") for name, value in document.content[kind].items()
        }
        names |= {
            value["$array"]: f"{slot} of {name}"
            for name, held in document.content["optim"].items()
            for slot, value in held.items()
            if isinstance(value, dict) and value.keys() == {"$array"}
        }
        for path, name in names.items():
            tensor = document.light.tensors[path]
            codings[name] = tensor.coding
            _assert_error(live[name].detach(), found[name], tensor.coding, tensor.error, name)
            if tensor.of is not None:
                assert same_bits(found[name], found[names[tensor.of]].to(found[name].dtype)), name
        assert versions[layer].error == document.error
    return codings


def _assert_error(live: torch.Tensor, found: torch.Tensor, coding: str, error: float, name: str) -> None:
    if coding in ("exact", "rounded"):
        assert coding == "rounded" or same_bits(live, found), name
        assert error == 0
        return
    x, y = live.double(), found.double()
    if coding in ("ratio", "log"):
        assert bool(((x == 0) == (y == 0)).all()), name
        ratios = torch.where(x == 0, 1, y / torch.where(x == 0, 1, x))
        true = float(ratios.log().square().mean().sqrt())
    else:
        true = float((x - y).norm() / x.norm()) if float(x.norm()) else float((x - y).norm())
    # What is restored was rounded once more than what was measured.
    assert true <= error * 1.0001 + 1e-6, (name, coding, true, error)
    assert true >= error * 0.9 - 1e-6, (name, coding, true, error)
