"""Files that other programs read: safetensors, and what ``torch.load`` reads."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tailorstore.domain.errors import MissingDependencyError


def write_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write what ``torch.load`` reads back; tensors that share memory go on sharing it."""
    torch.save(dict(content), path)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Args:
        path: of the file; replaced if it exists.
        tensors: contiguous and without shared memory, which the format does not know.
        metadata: texts for the file's header.

    Raises:
        MissingDependencyError: safetensors is not installed.
    """
    _safetensors().save_file(dict(tensors), path, metadata=dict(metadata))


def unsupported_dtypes(dtypes: set[torch.dtype]) -> set[torch.dtype]:
    """Return those of some dtypes that the installed safetensors cannot hold.

    Raises:
        MissingDependencyError: safetensors is not installed.
    """
    module = _safetensors()
    return {dtype for dtype in dtypes if not _can_hold(module, dtype)}


def _can_hold(module: ModuleType, dtype: torch.dtype) -> bool:
    # There is no public list, and it grows with each version; an empty tensor asks the library itself.
    try:
        module.save({"probe": torch.empty(0, dtype=dtype)})
    except Exception:  # noqa: BLE001 - which error it is differs between versions
        return False
    return True


def _safetensors() -> ModuleType:
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        msg = "writing safetensors needs the package safetensors; install it with: pip install safetensors"
        raise MissingDependencyError(msg) from error
