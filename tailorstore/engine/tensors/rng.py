"""States of the random number generators: Python's, NumPy's, torch's and CUDA's where there is one."""

import random
from typing import Any

import numpy as np
import torch

from tailorstore.domain.errors import CorruptDocumentError


def rng_states() -> dict[str, Any]:
    """Return the state of every generator, tensors as bytes: a few kilobytes that need no objects of their own."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global generator is the point
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), np.asarray(keys, dtype="<u4").tobytes(), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    return states


def set_rng_states(states: dict[str, Any]) -> None:
    """Set every generator that has a stored state.

    CUDA generators are set where the machine has as many devices as the commit's had; else they are left alone.

    Raises:
        CorruptDocumentError: a generator refuses its state; those before it have been set.
    """
    try:
        random.setstate(states["python"])
        name, keys, position, has_gauss, cached = states["numpy"]
        np.random.set_state((name, np.frombuffer(keys, dtype="<u4"), position, has_gauss, cached))  # noqa: NPY002
        torch.set_rng_state(_as_tensor(states["torch"]))
        cuda = states.get("cuda", [])
        if cuda and torch.cuda.is_available() and torch.cuda.device_count() == len(cuda):
            torch.cuda.set_rng_state_all([_as_tensor(state) for state in cuda])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        msg = f"the commit's RNG states cannot be set: {error}"
        raise CorruptDocumentError(msg) from error


def _as_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
