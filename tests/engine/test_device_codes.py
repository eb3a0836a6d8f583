"""Coding on a device: the same codes as on the host, here with the host as the device."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tailorstore.engine.tensors import device_codes
from tailorstore.engine.tensors.device_codes import encode_on_device
from tailorstore.engine.tensors.elements import elements_of
from tailorstore.storage import quantise

BLOCK = 64
SIZES = (1, 63, 64, 1000, 65536)


def on_host(
    tensor: torch.Tensor, base: torch.Tensor | None, bits: int, *, logarithmic: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16], float, float]:
    count = tensor.numel()
    codes = np.empty(quantise.packed_bytes(count, bits, BLOCK), np.uint8)
    words = np.empty(quantise.scale_words(count, BLOCK, logarithmic=logarithmic), np.uint16)
    encode = quantise.encode_log if logarithmic else quantise.encode_linear
    of = None if base is None else quantise.widened(elements_of(base, 0, count), "float32")
    with np.errstate(all="ignore"):
        error, norm = encode(quantise.widened(elements_of(tensor, 0, count), "float32"), of, bits, BLOCK, codes, words)
    return codes, words, error, norm


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("with_base", [True, False])
def test_linear_codes_are_those_of_the_host(bits: int, count: int, with_base: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    tensor = torch.randn(count, generator=generator)
    base = tensor + 1e-2 * torch.randn(count, generator=generator) if with_base else None
    codes, words, error, norm = on_host(tensor, base, bits, logarithmic=False)
    found = encode_on_device(tensor, base, 0, count, bits, BLOCK, logarithmic=False)
    same = found.words == words
    if quantise.clip_of(bits) is None:
        assert same.all()
    # Elsewhere a block's root mean square is summed in another order, and may round to the neighbouring scale.
    assert same.mean() > 0.98
    rows = found.codes.reshape(words.size, -1) == codes.reshape(words.size, -1)
    assert rows[same].all()
    assert found.squared_error == pytest.approx(error, rel=1e-3)
    assert found.squared_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("with_base", [True, False])
def test_logarithmic_codes_are_those_of_the_host(bits: int, count: int, with_base: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    tensor = torch.randn(count, generator=generator).square() * 1e-8
    tensor[torch.rand(count, generator=generator) < 0.1] = 0
    base = tensor * (0.5 + torch.rand(count, generator=generator)) if with_base else None
    codes, words, error, norm = on_host(tensor, base, bits, logarithmic=True)
    found = encode_on_device(tensor, base, 0, count, bits, BLOCK, logarithmic=True)
    # Logarithms are taken in float32 on the host and in float64 here: now and then one falls on the other side.
    assert np.abs(found.words.view(np.int16).astype(int) - words.view(np.int16).astype(int)).max() <= 1
    assert np.mean(found.codes == codes) > 0.95
    assert found.squared_error == pytest.approx(error, rel=0.05)
    assert found.squared_norm == norm
    decoded = np.empty(count, np.float32)
    of = None if base is None else base.numpy()
    quantise.decode_log(found.codes, found.words, bits, BLOCK, of, "float32", decoded)
    assert ((decoded == 0) == (tensor.numpy() == 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_of_halves_includes_their_rounding(dtype: torch.dtype) -> None:
    tensor = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = encode_on_device(tensor, torch.zeros_like(tensor), 0, 4096, 8, BLOCK, logarithmic=False)
    decoded = np.empty(4096, np.float32)
    quantise.decode_linear(found.codes, found.words, 8, BLOCK, np.zeros(4096, np.float32), decoded)
    rounded = torch.from_numpy(decoded).to(dtype).double()
    assert found.squared_error == pytest.approx(float((rounded - tensor.double()).square().sum()), rel=1e-6)


def test_what_cannot_be_coded_says_so() -> None:
    tensor = torch.ones(256)
    tensor[3] = torch.inf
    assert not np.isfinite(encode_on_device(tensor, None, 0, 256, 4, BLOCK, logarithmic=False).squared_error)
    tensor[3] = torch.nan
    assert not np.isfinite(encode_on_device(tensor, None, 0, 256, 4, BLOCK, logarithmic=False).squared_error)
    tensor[3] = torch.inf
    assert not np.isfinite(encode_on_device(tensor, None, 0, 256, 4, BLOCK, logarithmic=True).squared_error)


def test_pieces_give_the_codes_of_the_whole() -> None:
    tensor = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    whole = encode_on_device(tensor, None, 0, 10_000, 4, BLOCK, logarithmic=False)
    parts = [
        encode_on_device(tensor, None, low, min(low + 640, 10_000), 4, BLOCK, logarithmic=False)
        for low in range(0, 10_000, 640)
    ]
    assert (np.concatenate([part.codes for part in parts]) == whole.codes).all()
    assert (np.concatenate([part.words for part in parts]) == whole.words).all()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_layer_coded_on_the_device_restores_like_one_coded_on_the_host(
    blocking: bool, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tailorstore as ts
    from tailorstore.engine import commit
    from tailorstore.engine.light import encode

    torch.manual_seed(0)
    model = {"a.w": torch.randn(300, 50), "a.b": torch.randn(40, 40)}
    moved = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in model.items()}
    restored = []
    for number, on_device in enumerate((False, True)):
        for module in (encode, commit):
            monkeypatch.setattr(module, "codes_on_device", lambda _, answer=on_device: answer)
        with ts.open_store(f"{tmp_path}/{number}") as store:
            store.commit(1, model)
            if blocking:
                store.commit(2, moved, mask={"*": "light"})
            else:
                store.commit(2, moved, mask={"*": "light"}, block=False).result()
            assert store.checkout().fidelity["a"] == "light"
            restored.append(store.checkout().model_state_dict())
            assert store.verify().ok
    for name in model:
        assert torch.equal(restored[0][name], restored[1][name])
    assert device_codes.codes_on_device(model["a.w"]) is False
