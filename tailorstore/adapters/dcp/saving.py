"""One save: from the plans that DCP made to a commit. Ranks call all of it together."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from tailorstore.adapters.dcp.names import Entry, Names, Path, Place, find_places, name_of
from tailorstore.adapters.dcp.options import groups_of, names_in, options_of
from tailorstore.adapters.dcp.plans import all_plans, check_ranks, describe, entry_of, parts_of, values_of
from tailorstore.adapters.dcp.stored import RECORD, StoredState, names_to_json
from tailorstore.adapters.dcp.ties import Ties, agreed, find_ties, find_vetoes
from tailorstore.adapters.dcp.values import bare_of, from_json
from tailorstore.domain.errors import BranchNotFoundError, InvalidInputError
from tailorstore.domain.names import LATEST
from tailorstore.domain.records import Commit
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.together import together
from tailorstore.engine.store import Store
from tailorstore.engine.tensors.memory import DTYPES
from tailorstore.engine.tensors.shards import Part, Sharded


@dataclass(frozen=True, slots=True)
class Save:
    """A save that is under way."""

    store: Store
    ranks: Ranks | None
    step: int

    def carry_out(
        self, plan: SavePlan, plans: Sequence[SavePlan] | None, planner: SavePlanner, options: Mapping[str, Any]
    ) -> Commit:
        """Commit what all ranks have.

        Args:
            plan: what this rank is to write.
            plans: of all ranks; on the coordinator.
            planner: gives the values.
            options: of ``Store.commit``.
        """
        entries = self._entries(plans, planner)
        what = f"sorting the state dict of step {self.step}"
        with self._head() or nullcontext() as head:
            with together(self.ranks, what):
                before = _before(head) if head is not None else None
                sorted_ = _sort(entries, before)
                mine = [values_of(plan, planner, sorted_.parts()), find_ties(planner, sorted_.tensors())]
            every = self._gather(mine)
            ties = self._without_vetoes(agreed([found for _, found in every]), planner)
            with together(self.ranks, what):
                values = {sorted_.paths[name]: from_json(found) for one, _ in every for name, found in one.items()}
                state = _State(sorted_, values, before, parts_of(plan, planner, sorted_.parts()), ties)
                model, optim, extra = state.model(), state.optim(), {RECORD: state.record()}
        return self.store.commit(self.step, model, optim, extra=extra, partial=True, block=True, **options)

    def _entries(self, plans: Sequence[SavePlan] | None, planner: SavePlanner) -> list[Entry]:
        """Return what all ranks have together: DCP tells it to the coordinator only."""
        described = None
        with together(self.ranks, f"reading the plans of step {self.step}"):
            if self.ranks is None or self.ranks.is_coordinator:
                check_ranks(plans or (), self.ranks)
                described = describe(all_plans(plans, planner))
        found = self.ranks.share(described) if self.ranks is not None else described
        return [entry_of(*row) for row in found or ()]

    def _without_vetoes(self, ties: Ties, planner: SavePlanner) -> Ties:
        """Return those ties that hold on all ranks."""
        if not ties:
            return ties
        vetoes = {name for found in self._gather(find_vetoes(planner, ties)) for name in found}
        return {name: target for name, target in ties.items() if name not in vetoes}

    def _gather(self, value: Any) -> list[Any]:  # noqa: ANN401 - JSON
        return self.ranks.gather(value) if self.ranks is not None else [value]

    def _head(self) -> Checkpoint | None:
        """Return the branch's newest composite; ``None`` before its first commit."""
        try:
            return self.store.checkout(LATEST)
        except BranchNotFoundError:
            return None


@dataclass(frozen=True, slots=True)
class _Before:
    """What the branch has."""

    names: Names | None
    """``None`` if DCP had no part in its newest commit."""
    tensors: frozenset[str]
    slots: Mapping[str, Any]
    options: Mapping[Path, Any]
    kept: Mapping[Path, Any]
    """Path → what reads it."""


def _before(head: Checkpoint) -> _Before:
    state = StoredState(head.contents, Names())
    return _Before(
        state.names if state.recorded else None,
        frozenset(state.tensors()),
        state.slots(),
        options_of(state.names, state.groups()) if state.recorded else {},
        {path: stored.value for path, stored in state.kept().items()} if state.recorded else {},
    )


@dataclass(frozen=True, slots=True)
class _Sorted:
    """What all ranks have, and where it goes."""

    entries: Sequence[Entry]
    names: Names
    places: Mapping[Path, Place]
    paths: Mapping[str, Path]
    """By the name that DCP gives."""

    def tensors(self) -> list[str]:
        """Return the names, as DCP gives them, of what are tensors of layers and no slots."""
        return [name for name, path in self.paths.items() if (place := self.places.get(path)) and place.slot is None]

    def parts(self) -> dict[str, str]:
        """Return name → dtype of the tensors that ranks hold in parts; all know the rest, scalar slots among it."""
        return {
            name_of(entry.path): entry.dtype
            for entry in self.entries
            if entry.shape is not None
            and (place := self.places.get(entry.path)) is not None
            and (place.slot is None or entry.shape)
        }


def _sort(entries: Sequence[Entry], before: _Before | None) -> _Sorted:
    if before is None:
        names, places = find_places(entries, None, (), ())
    else:
        names, places = find_places(entries, before.names, before.tensors, before.kept)
        _check_optimizer(names, places, entries, before)
    return _Sorted(entries, names, places, {name_of(entry.path): entry.path for entry in entries})


def _check_optimizer(names: Names, places: Mapping[Path, Place], entries: Iterable[Entry], before: _Before) -> None:
    """Refuse weights without the optimizer state that the branch has of them: it would be lost.

    Raises:
        InvalidInputError: names a parameter.
    """
    if names.optim is not None and any(entry.path[: len(names.optim)] == names.optim for entry in entries):
        return
    bare = [place.tensor for place in places.values() if place.slot is None and before.slots.get(place.tensor)]
    if bare:
        msg = (
            f"the state dict has {bare[0]!r} and no optimizer state, which the branch has of it: a layer is stored as a"
            " whole. Save the optimizer's state too, or the weights alone on a branch of their own; nothing was written"
        )
        raise InvalidInputError(msg)


class _State:
    """What to commit: the same on every rank, but for the parts of tensors."""

    def __init__(
        self,
        sorted_: _Sorted,
        values: Mapping[Path, Any],
        before: _Before | None,
        parts: Mapping[str, Sequence[Part]],
        ties: Ties,
    ) -> None:
        self._sorted = sorted_
        self._values = values
        self._parts = parts
        self._ties = ties
        names, places = sorted_.names, sorted_.places
        loose = {path: value for path, value in values.items() if path not in places}
        if before is not None:
            # What the state dict does not have stays as the branch has it.
            loose = {
                **before.options,
                **{path: read() for path, read in before.kept.items() if path not in loose and path not in places},
                **loose,
            }
        known = dict.fromkeys(place.tensor for place in places.values()) | dict.fromkeys(
            before.tensors if before else ()
        )
        self._groups, told = groups_of(names, loose, known)
        self._kept = {path: value for path, value in loose.items() if path not in told}

    def model(self) -> dict[str, Sharded]:
        """Return stored name → what this rank has of the tensor."""
        trained = names_in(self._groups) | {
            place.tensor for place in self._sorted.places.values() if place.slot is not None
        }
        found: dict[str, Sharded] = {}
        for entry in self._sorted.entries:
            place = self._sorted.places.get(entry.path)
            if place is not None and place.slot is None:
                twin = self._twin(entry) if place.tensor not in trained else None
                found[place.tensor] = found[twin] if twin else self._sharded(entry, trained=place.tensor in trained)
        return found

    def _twin(self, entry: Entry) -> str | None:
        """Return the stored name of what a tensor is tied to."""
        target = self._ties.get(name_of(entry.path))
        return self._sorted.places[self._sorted.paths[target]].tensor if target is not None else None

    def optim(self) -> dict[str, Any] | None:
        """Return the optimizer's state, by stored name; ``None`` where there is none."""
        state: dict[str, dict[str, Any]] = {}
        for entry in self._sorted.entries:
            place = self._sorted.places.get(entry.path)
            if place is not None and place.slot is not None:
                held = self._values[entry.path] if entry.path in self._values else self._sharded(entry)
                state.setdefault(place.tensor, {})[place.slot] = held
        return {"state": state, "param_groups": self._groups} if state or self._groups else None

    def record(self) -> dict[str, Any]:
        """Return what goes into ``@extra``."""
        values = [[list(path), *bare_of(value)] for path, value in self._kept.items()]
        return {**names_to_json(self._sorted.names), "values": values}

    def _sharded(self, entry: Entry, *, trained: bool = False) -> Sharded:
        shape = entry.shape or ()
        return Sharded(shape, DTYPES[entry.dtype], tuple(self._parts.get(name_of(entry.path), ())), trained)
