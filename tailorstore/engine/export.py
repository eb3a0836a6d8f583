"""Export: a composite checkpoint as one file that other programs read.

The file is written under a temporary name beside its final one and renamed when it is complete.
"""

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tailorstore.domain.errors import AccessDeniedError, AlreadyExistsError, InvalidInputError
from tailorstore.domain.records import EXTRA_LAYER
from tailorstore.engine.gc import Progress
from tailorstore.engine.tensors.files import unsupported_dtypes, write_safetensors, write_torch
from tailorstore.engine.tensors.lazy import LazyTensor
from tailorstore.engine.tensors.memory import Tensor
from tailorstore.engine.tensors.packing import unpack
from tailorstore.storage.failures import raise_os_error
from tailorstore.storage.threads import Job, run_jobs

if TYPE_CHECKING:
    from tailorstore.engine.checkout import Checkpoint

OPTIM_PREFIX = "@optim/"
"""In safetensors, slots are tensors named ``@optim/<slot>/<parameter>``, as below a layer in the root."""

_WORKERS = 4
_NAMES_SHOWN = 10

Key = TypeVar("Key")


def export_safetensors(
    checkpoint: "Checkpoint",
    path: str | os.PathLike[str],
    *,
    optim: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a composite's model tensors to a safetensors file.

    Tied tensors become copies, as the format knows no sharing. The header records ``tailorstore.commit``,
    ``tailorstore.step`` and, as JSON, ``tailorstore.sources``.

    Args:
        checkpoint: what to write.
        path: of the file.
        optim: also write the optimizer's slots, named ``@optim/<slot>/<parameter>``; slots that are no tensors and
            the parameter groups stand as JSON in the header, ``tailorstore.optim`` and ``tailorstore.param_groups``.
        overwrite: replace a file that is there.
        progress: is told how many tensors are read.

    Raises:
        AlreadyExistsError: there is a file, and ``overwrite`` is false.
        InvalidInputError: the format cannot hold a tensor's dtype, or a value that is no tensor; the message names it.
        MissingDependencyError: safetensors is not installed.
        AccessDeniedError, StorageFullError, StorageUnavailableError: the file could not be written.
        MissingObjectError, DigestMismatchError, CorruptDocumentError: the composite is damaged.

    In every case a file that was there is as it was, and no part of a new one is left.
    """
    with _written(path, overwrite=overwrite) as temporary:
        lazy: dict[str, LazyTensor] = dict(checkpoint.model)
        metadata = {
            # What the transformers library looks for.
            "format": "pt",
            "tailorstore.commit": checkpoint.commit.id,
            "tailorstore.step": str(checkpoint.step),
            "tailorstore.sources": json.dumps(checkpoint.sources),
        }
        _refuse(
            [f"{name!r} (extra state of a module)" for name in _module_states(checkpoint)],
            "safetensors holds tensors only, and not",
        )
        if optim:
            slots, rest = _slots_by_kind(checkpoint.optim)
            lazy |= slots
            metadata["tailorstore.optim"] = _as_json(rest, "optimizer state")
            metadata["tailorstore.param_groups"] = _as_json(_param_groups(checkpoint), "parameter groups")
        unsupported = unsupported_dtypes({tensor.dtype for tensor in lazy.values()})
        _refuse(
            [f"{name!r} ({tensor.dtype})" for name, tensor in lazy.items() if tensor.dtype in unsupported],
            "safetensors cannot hold the dtype of",
        )
        write_safetensors(temporary, _read_apart(lazy, progress), metadata)


def export_torch(
    checkpoint: "Checkpoint",
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a composite to a file that ``torch.load`` reads, with ``weights_only=True`` if the extra state is plain.

    It holds ``model`` and ``optim`` (state dicts; ``optim`` is a list where there were several optimizers, and ``None``
    where there was none), ``extra``, ``step`` and ``sources``.

    Args:
        checkpoint: what to write.
        path: of the file.
        overwrite: replace a file that is there.
        progress: is told what is being done.

    Raises:
        AlreadyExistsError: there is a file, and ``overwrite`` is false.
        AccessDeniedError, StorageFullError, StorageUnavailableError: the file could not be written.
        MissingObjectError, DigestMismatchError, CorruptDocumentError: the composite is damaged.

    In every case a file that was there is as it was, and no part of a new one is left.
    """
    tell = progress or (lambda *_: None)
    with _written(path, overwrite=overwrite) as temporary:
        tell("reading model", 0, None)
        model = checkpoint.model_state_dict()
        tell("reading optimizer", 0, None)
        optim: Any = checkpoint.optim_state_dict()
        if isinstance(optim, dict) and not optim["state"] and not optim["param_groups"]:
            optim = None
        tell("writing file", 0, None)
        content = {
            "model": model,
            "optim": optim,
            "extra": checkpoint.extra,
            "step": checkpoint.step,
            "sources": checkpoint.sources,
        }
        write_torch(temporary, content)


@contextmanager
def _written(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary name beside a file's, which takes that one's place when the block ends well."""
    target = Path(path)
    folder = str(target.parent)
    if target.is_dir():
        msg = f"{target} is a folder; give the name of a file"
        raise InvalidInputError(msg)
    if not target.parent.is_dir():
        msg = f"there is no folder {target.parent}; make it first"
        raise InvalidInputError(msg)
    if target.exists() and not overwrite:
        msg = f"{target} exists already; choose another name, or overwrite it (overwrite=True, --overwrite)"
        raise AlreadyExistsError(msg)
    if not os.access(target.parent, os.W_OK):
        msg = f"files cannot be written to {target.parent}"
        raise AccessDeniedError(msg)
    temporary = target.parent / f".tailorstore-{secrets.token_hex(8)}.tmp"
    try:
        # The libraries that write into it differ in who may read the result: as with any new file, the umask decides.
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        # Without this a crash of the machine could leave the name and not the bytes.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except OSError as error:
        if isinstance(error, PermissionError) and error.errno is None:
            raise  # one of ours
        raise_os_error(error, "exporting", folder, target.name)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _slots_by_kind(
    optim: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, LazyTensor], dict[str, dict[str, Any]]]:
    """Return the slots that are tensors under their names in the file, and all others."""
    tensors: dict[str, LazyTensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for name, slots in optim.items():
        for slot, value in slots.items():
            if isinstance(value, LazyTensor):
                tensors[f"{OPTIM_PREFIX}{slot}/{name}"] = value
            else:
                rest.setdefault(name, {})[slot] = value
    return tensors, rest


def _module_states(checkpoint: "Checkpoint") -> list[str]:
    """Return the names of states that modules keep beside their tensors."""
    documents = checkpoint.documents()
    return [name for layer, held in documents.items() if layer != EXTRA_LAYER for name in held.content["states"]]


def _param_groups(checkpoint: "Checkpoint") -> Any:  # noqa: ANN401
    """Return the optimizers' parameter groups; what stands for a tensor in them, JSON refuses later."""
    extra = checkpoint.documents().get(EXTRA_LAYER)
    return unpack(extra.content.get("param_groups", []), lambda _: object()) if extra else []


def _read_apart(lazy: Mapping[str, LazyTensor], progress: Progress | None) -> dict[str, Tensor]:
    """Read tensors in parallel; names that share one get a copy each."""
    owners: dict[int, str] = {}
    for name, tensor in lazy.items():
        owners.setdefault(id(tensor), name)
    read = _read_all({name: lazy[name].load for name in owners.values()}, progress)
    found = {}
    for name, tensor in lazy.items():
        owner = owners[id(tensor)]
        found[name] = read[owner] if owner == name else read[owner].clone()
    return found


def _read_all(loads: Mapping[Key, Callable[[], Tensor]], progress: Progress | None) -> dict[Key, Tensor]:
    tell = progress or (lambda *_: None)
    found: dict[Key, Tensor] = {}
    lock = threading.Lock()

    def job(key: Key, load: Callable[[], Tensor]) -> Job:
        def run() -> None:
            tensor = load()
            with lock:
                found[key] = tensor
                tell("reading tensors", len(found), len(loads))

        return run

    run_jobs([job(key, load) for key, load in loads.items()], _WORKERS)
    tell("writing file", 0, None)
    return found


def _as_json(value: Any, what: str) -> str:  # noqa: ANN401
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        msg = f"the {what} cannot be written as JSON: a tensor is among them; export to the torch format instead"
        raise InvalidInputError(msg) from error


def _refuse(culprits: list[str], why: str) -> None:
    if culprits:
        shown = ", ".join(culprits[:_NAMES_SHOWN])
        more = f" and {len(culprits) - _NAMES_SHOWN} more" if len(culprits) > _NAMES_SHOWN else ""
        msg = f"{why}: {shown}{more}; export to the torch format instead"
        raise InvalidInputError(msg)
