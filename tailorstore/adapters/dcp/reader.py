"""Loading from a store by torch.distributed.checkpoint."""

import os
from collections import defaultdict
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from tailorstore.adapters.dcp.ids import step_in
from tailorstore.adapters.dcp.names import Names, Path
from tailorstore.adapters.dcp.stored import StoredState, StoredValue
from tailorstore.adapters.dcp.values import as_stream
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.names import LATEST
from tailorstore.domain.records import Commit
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.store import Store
from tailorstore.engine.tensors.shards import Part, Sharded


class TailorReader(StorageReader):
    """Gives a composite checkpoint to ``dcp.load``; each rank reads what its plan asks for, straight into place.

    The names are those of the state dict that was saved. A commit that ``Store.commit`` made has names by rule:
    ``<model>.<tensor>``, ``<optim>.state.<tensor>.<slot>``, and ``<optim>.param_groups.<number>.<option>`` or, if
    ``flat``, ``<optim>.param_groups.<tensor>.<option>``.
    """

    def __init__(
        self,
        store: Store,
        ref: str | int | Commit = LATEST,
        *,
        model: str = "model",
        optim: str = "optim",
        flat: bool = False,
    ) -> None:
        """Take a store and what to load from it. Ranks that load together have opened it together.

        Args:
            store: where the commit is.
            ref: as for ``Store.checkout``; ``dcp.load``'s ``checkpoint_id`` is taken instead where it is given: the
                step that it ends in (``"run/step-1200"``), or else a ref.
            model: for a commit that DCP did not make: the key that the script has its model under; ``""`` for none.
            optim: the same for its optimizer.
            flat: the same: whether the script joins the optimizer's keys (``flatten_optimizer_state_dict``).
        """
        self._store = store
        self._ref = ref
        self._names = Names(_path(model), _path(optim), flat)
        self._checkpoint: Checkpoint | None = None
        self._values: dict[str, StoredValue] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Load what a checkpoint's id means, if one is given."""
        if checkpoint_id is not None:
            step = step_in(checkpoint_id)
            self._ref = os.fspath(checkpoint_id) if step is None else step

    def read_metadata(self) -> Metadata:
        """Check the composite out, and describe what is in it. All ranks of the store call it.

        Raises:
            RefNotFoundError, AmbiguousRefError: as ``Store.checkout``.
        """
        self._close()
        self._checkpoint = self._store.checkout(self._ref)
        self._values = StoredState(self._checkpoint.contents, self._names).values()
        paths: dict[str, Path] = {name: value.path for name, value in self._values.items()}
        return Metadata({name: _metadata(value) for name, value in self._values.items()}, planner_data=paths)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_options: Any) -> None:  # noqa: ANN401
        """Do nothing: all is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan: it needs nothing of a store's."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a plan asks for, in parallel.

        Raises:
            MissingObjectError, DigestMismatchError, CorruptDocumentError: an object is gone or not what was written;
                tensors may be overwritten in part, so load another step before training on.
            InvalidInputError: the metadata that was planned with is not this reader's.
        """
        if self._checkpoint is None:
            msg = "a plan can be read once, after read_metadata: dcp.load does it in this order"
            raise InvalidInputError(msg)
        _read(self._checkpoint, self._values, plan, planner)
        self._close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _close(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.close()
            self._checkpoint = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether something can be meant by an id; only a checkout can tell."""
        return bool(os.fspath(checkpoint_id))


def _path(key: str) -> Path:
    return tuple(part for part in key.split(".") if part)


def _metadata(value: StoredValue) -> STORAGE_TYPES:
    if value.shape is None or value.dtype is None:
        return BytesStorageMetadata()
    size = torch.Size(value.shape)
    # One chunk that is the whole: DCP then asks for each box that a process holds, and for nothing finer.
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(dtype=value.dtype), size, [chunk])


def _read(checkpoint: Checkpoint, values: dict[str, StoredValue], plan: LoadPlan, planner: LoadPlanner) -> None:
    parts: dict[str, list[Part]] = defaultdict(list)
    targets: list[tuple[ReadItem, torch.Tensor]] = []
    for item in plan.items:
        name = item.storage_index.fqn
        value = values[name]
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, as_stream(value.value()))
            continue
        target = planner.resolve_tensor(item)
        targets.append((item, target))
        box = tuple((at, at + extent) for at, extent in zip(item.storage_offsets, item.lengths, strict=True))
        if value.tensor is not None:
            target.detach().copy_(value.tensor[tuple(slice(start, stop) for start, stop in box)])
        elif target.numel():
            parts[name].append(Part(box, target.detach()))
    pairs = [
        (source, Sharded(source.shape, held[0].tensor.dtype, tuple(held)))
        for name, held in parts.items()
        if (source := values[name].source) is not None
    ]
    checkpoint.read_into(pairs)
    for item, target in targets:
        planner.commit_tensor(item, target)
