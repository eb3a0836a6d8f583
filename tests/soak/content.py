"""What is committed: every layer's bits follow from its name and its step, so that any process can say what they are.

Steps are given out once and never again, whatever happens to a branch, so a layer's source step tells all of it.
"""

import hashlib
from collections.abc import Iterable, Mapping

import torch

import tailorstore as ts

LAYERS = ("a", "b/x", "c")
FROZEN = "frozen"
"""The layer that never changes: a commit leaves it where it is."""

LIGHT = ts.LightSettings(weight_bits=4, slot_bits=4, exact_below=64)


def tensors_of(layer: str, step: int) -> dict[str, torch.Tensor]:
    """Return a layer's tensors as of a step.

    The differences between any two steps fit into codes of four bits exactly, so that a light version restores to the
    bit as a full one does.
    """
    if layer == FROZEN:
        return {f"{layer}.w": torch.full((40,), -0.0)}
    noise = hashlib.blake2b(f"{layer} {step}".encode()).digest()
    w = torch.full((300,), 1.75 * (noise[0] % 2))
    w[0] = -7
    return {
        f"{layer}.w": w,
        f"{layer}.step": torch.tensor([step, noise[1]], dtype=torch.int64),
        f"{layer}.bits": torch.frombuffer(bytearray(noise * 32), dtype=torch.uint8),
    }


def state_of(sources: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the tensors of a composite: layer → source step."""
    return {name: tensor for layer, step in sources.items() for name, tensor in tensors_of(layer, step).items()}


def state_at(step: int) -> dict[str, torch.Tensor]:
    """Return the model as of a step."""
    return state_of(dict.fromkeys((*LAYERS, FROZEN), step))


def sources_after(before: Mapping[str, int] | None, step: int, written: Iterable[str]) -> dict[str, int]:
    """Return the source steps of a commit that writes some layers; a branch's first one writes all."""
    if before is None:
        return dict.fromkeys((*LAYERS, FROZEN), step)
    return {**before, **dict.fromkeys(written, step)}


def compare(checkpoint: ts.Checkpoint) -> tuple[int, list[str]]:
    """Read all of a composite back; return its bytes, and in what it is not what was committed.

    The committer's own word for where layers come from stands in the extra state.
    """
    expected_sources: dict[str, int] = checkpoint.extra["sources"]
    found_sources = {layer: step for layer, step in checkpoint.sources.items() if layer != "@extra"}
    wrong: list[str] = []
    if not expected_sources.items() <= found_sources.items():
        wrong.append(f"layers come from {found_sources}, not {expected_sources}")
    if checkpoint.extra["step"] != checkpoint.step:
        wrong.append(f"extra state of step {checkpoint.extra['step']}, not {checkpoint.step}")
    found = checkpoint.model_state_dict()
    expected = state_of(found_sources)
    if found.keys() != expected.keys():
        wrong.append(f"tensors {sorted(found)}, not {sorted(expected)}")
    size = 0
    for name, tensor in found.items():
        size += tensor.nbytes
        if name in expected and not _same_bits(tensor, expected[name]):
            wrong.append(f"bits of {name} differ")
    return size, wrong


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())
