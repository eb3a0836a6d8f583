"""Saving to a store by torch.distributed.checkpoint."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, SupportsFloat

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from tailorstore.adapters.dcp.ids import step_in
from tailorstore.adapters.dcp.plans import check_ranks
from tailorstore.adapters.dcp.saving import Save
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.mask import Mask
from tailorstore.engine.store import Store

if TYPE_CHECKING:
    from tailorstore.domain.records import Commit


class TailorWriter(StorageWriter):
    """Commits what ``dcp.save`` and ``dcp.async_save`` are given.

    The model and the optimizer in a state dict become layers; what is small and neither goes into ``@extra``. A part of
    a state dict is a mask: layers that it does not have stay as the branch has them. Averaged weights and other large
    tensors beside the model are layers of their own.

    Ranks that save together open the store together and make their writers at the same place; a writer is for one save,
    or for one after the other.
    """

    def __init__(
        self,
        store: Store | Callable[[], Store],
        step: int | None = None,
        *,
        mask: Mask = None,
        metrics: Mapping[str, SupportsFloat] | None = None,
        message: str | None = None,
    ) -> None:
        """Take a store and what ``Store.commit`` wants to know.

        Args:
            store: or, for ``async_save`` with ``AsyncCheckpointerType.PROCESS``, what opens one there:
                ``functools.partial(open_store, url)``.
            step: ``None``: the one that ``checkpoint_id`` ends in, as in ``"run/step-1200"``.
            mask: which layers of the state dict to write, and how.
            metrics: name → number.
            message: for people.

        Raises:
            RanksDisagreeError, RankLostError: the ranks did not open the same store; see ``open_store``.
        """
        self.commit: Commit | None = None
        """What was committed last; on every rank. Stays ``None`` where another process does the saving."""
        self._store = store
        self._step = step
        self._given_step = step
        self._options: dict[str, Any] = {"mask": mask, "metrics": metrics, "message": message}
        self._plans: list[SavePlan] | None = None
        if isinstance(store, Store):
            # Now, while all ranks are here: asynchronous saves go on in a thread, beside the trainer's collectives.
            store.ranks()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save, at the step that an id ends in where no other was given."""
        self._plans = None
        if self._given_step is None:
            self._step = step_in(checkpoint_id) if checkpoint_id is not None else None

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Make sure that a commit is possible.

        Raises:
            InvalidInputError: there is no step, or ranks save without collectives.
        """
        del is_coordinator
        if not kwargs.get("use_collectives", True):
            msg = "a commit is one for all ranks: save without use_collectives=False"
            raise InvalidInputError(msg)
        if self._step is None:
            msg = (
                "which step is this? Pass TailorWriter(store, step), or a checkpoint_id that ends in it (run/step-1200)"
            )
            raise InvalidInputError(msg)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Keep the plans of all ranks: only the coordinator ever sees them.

        Raises:
            InvalidInputError: the ranks that save are not those that use the store.
        """
        if isinstance(self._store, Store):
            check_ranks(plans, self._store.ranks())
        self._plans = plans
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Commit, on all ranks together.

        Raises:
            InvalidInputError: the state dict cannot be stored, or ranks disagree; nothing was written.
            TailorError: as ``Store.commit``.
        """
        assert self._step is not None  # noqa: S101 (set up before)
        with self._opened() as store:
            save = Save(store, store.ranks(), self._step)
            self.commit = save.carry_out(plan, self._plans, planner, self._options)
        self._plans = None
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, item.tensor_storage_size() or 0, None) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: the commit was published when all ranks had written."""

    @contextmanager
    def _opened(self) -> Iterator[Store]:
        if isinstance(self._store, Store):
            yield self._store
            return
        with self._store() as store:
            yield store

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether an id ends in a step."""
        return step_in(checkpoint_id) is not None

    def __getstate__(self) -> dict[str, Any]:
        """Return what goes to the process that saves.

        Raises:
            InvalidInputError: an open store's connections stay where they are.
        """
        if isinstance(self._store, Store):
            msg = (
                "an open store cannot go to another process, as AsyncCheckpointerType.PROCESS asks: give the writer"
                " what opens one there, TailorWriter(functools.partial(open_store, url), step), or save in a thread"
            )
            raise InvalidInputError(msg)
        return dict(self.__dict__)
