"""Which stored tensor a value of a state dict stands for, and the way back.

DCP knows a value by its path: the keys that lead to it, in ``{"model": …, "optim": {"state": …}}`` for instance
``("optim", "state", "blocks.0.weight", "exp_avg")``; joined by dots, that is its name. A store knows tensors of a
model, and slots of these. One model and one optimizer of a state dict go by a rule, so that a commit is what
``Store.commit`` of the same training would have made; what does not is listed, path by path.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tailorstore.domain.errors import InvalidInputError

Path = tuple[str | int, ...]
"""Keys of mappings and indices of lists."""

SMALL_BYTES = 1 << 20
"""What is no part of a model and no larger than this is kept with each commit, whatever the mask says: a step counter,
a random number generator's state. Larger things beside the model (averaged weights) are layers of their own."""

_STATE = "state"
_GROUPS = "param_groups"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a store keeps a value."""

    tensor: str
    """Name of a model's tensor."""
    slot: str | None = None
    """For an optimizer slot of that tensor."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of a state dict."""

    path: Path
    shape: tuple[int, ...] | None = None
    """``None`` for what is no tensor."""
    dtype: str = ""
    nbytes: int = 0
    spread: bool = False
    """Whether several processes may hold parts of it."""


@dataclass(frozen=True, slots=True)
class Names:
    """How a branch's state dicts are stored."""

    model: Path = ("model",)
    """What leads to the model's tensors."""
    optim: Path | None = ("optim",)
    """What leads to its optimizer's state; ``None`` where there is none."""
    flat: bool = False
    """Whether the optimizer's keys are joined (``"state.blocks.0.weight.exp_avg"``) rather than nested."""
    others: Mapping[Path, Place] = field(default_factory=dict)
    """Everything that does not go by the rule."""

    def paths(self, places: Iterable[Place]) -> dict[Place, Path]:
        """Return the path of each place."""
        listed = {place: path for path, place in self.others.items()}
        return {place: listed.get(place) or self.by_rule(place) for place in places}

    def by_rule(self, place: Place) -> Path:
        """Return the path of a place that is not listed."""
        if place.slot is None:
            return (*self.model, place.tensor)
        optim = self.optim or ()
        if self.flat:
            return (*optim, f"{_STATE}.{place.tensor}.{place.slot}")
        return (*optim, _STATE, place.tensor, place.slot)


@dataclass(frozen=True, slots=True)
class _SlotPath:
    """A path that looks like that of an optimizer slot."""

    key: Path
    """What leads to the optimizer's state."""
    flat: bool
    rest: str
    """Parameter and slot, joined by a dot."""


def name_of(path: Path) -> str:
    """Return the name that DCP gives a value."""
    return ".".join(map(str, path))


def slot_of(path: Path) -> _SlotPath | None:
    """Return what a path says of an optimizer slot; ``None`` if it is none."""
    if _STATE in path[:-2]:
        at = path.index(_STATE)
        return _SlotPath(path[:at], flat=False, rest=name_of(path[at + 1 :]))
    last = path[-1]
    if isinstance(last, str) and last.startswith(f"{_STATE}.") and last.count(".") > 1:
        return _SlotPath(path[:-1], flat=True, rest=last.removeprefix(f"{_STATE}."))
    return None


def find_names(entries: Sequence[Entry]) -> Names:
    """Find the model and the optimizer of a state dict.

    An optimizer belongs to the one mapping of tensors that has all its parameters; where several have (averaged
    weights), to the one whose key is ``"model"``. Of several optimizers, the one with the most slots counts. Without
    slots, the model is what has the key ``"model"``, or else the most bytes.
    """
    sizes: dict[Path, int] = defaultdict(int)
    tensors: dict[Path, dict[str, None]] = defaultdict(dict)
    slots: dict[tuple[Path, bool], list[str]] = defaultdict(list)
    for entry in entries:
        found = slot_of(entry.path)
        if found is not None:
            slots[found.key, found.flat].append(found.rest)
        if entry.shape is not None and _options_of(entry.path) is None:
            tensors[entry.path[:-1]][str(entry.path[-1])] = None
            sizes[entry.path[:-1]] += entry.nbytes if found is None else 0
    owned = {key: owner for key, rests in slots.items() if (owner := _owner(rests, tensors)) is not None}
    if owned:
        optim, flat = max(owned, key=lambda key: len(slots[key]))
        return Names(owned[optim, flat], optim, flat)
    named = [path for path in sizes if path and path[-1] == "model"]
    model = named[0] if named else max(sizes, key=lambda path: sizes[path], default=())
    # An optimizer may have no slots at all.
    bare = {key for entry in entries if (key := _options_of(entry.path)) is not None and key not in slots}
    return Names(model, *bare.pop()) if len(bare) == 1 else Names(model, None)


def _owner(rests: Sequence[str], tensors: Mapping[Path, Mapping[str, Any]]) -> Path | None:
    able = [path for path, names in tensors.items() if all(split(rest, names) for rest in rests)]
    if len(able) > 1:
        able = [path for path in able if path and path[-1] == "model"]
    return able[0] if len(able) == 1 else None


def split(rest: str, tensors: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return parameter and slot (or option): the longest name of a tensor that something is left of."""
    name = rest
    while "." in name:
        name = name.rpartition(".")[0]
        if name in tensors:
            return name, rest[len(name) + 1 :]
    return None


def _options_of(path: Path) -> tuple[Path, bool] | None:
    """Return what leads to the optimizer that a path gives an option of, and whether its keys are joined."""
    if _GROUPS in path:
        return path[: path.index(_GROUPS)], False
    last = path[-1]
    return (path[:-1], True) if isinstance(last, str) and last.startswith(f"{_GROUPS}.") else None


def find_places(
    entries: Sequence[Entry], before: Names | None, stored: Iterable[str], kept: Iterable[Path]
) -> tuple[Names, dict[Path, Place]]:
    """Find a place for every value of a state dict that is a tensor of some size, or a slot.

    Args:
        entries: the values that all processes have together.
        before: how the branch's state dicts are stored so far.
        stored: names of the tensors that the branch has.
        kept: paths that the branch keeps outside of layers, and goes on to.

    Returns:
        How state dicts are stored from now on, and path → place; values without one are kept outside of layers.

    Raises:
        InvalidInputError: slots come without their parameter.
    """
    known = dict.fromkeys(stored)
    names = _follow(before, find_names(entries)) if before is not None else find_names(entries)
    finder = _Finder(names, known, frozenset(kept))
    finder.add_model(entries)
    finder.add_slots(entries)
    finder.add_others([entry for entry in entries if slot_of(entry.path) is None])
    finder.add_slots_of_others(entries)
    finder.add_others(entries)
    return replace(names, others={**names.others, **finder.others}), finder.places


def _follow(before: Names, found: Names) -> Names:
    """Return the branch's ways; it takes an optimizer's from the first state dict that has one."""
    if before.optim is not None or found.optim is None or found.model != before.model:
        return before
    return replace(before, optim=found.optim, flat=found.flat)


class _Finder:
    """Gives places to the values of one state dict; what comes first has the first choice of names."""

    def __init__(self, names: Names, stored: Mapping[str, Any], kept: frozenset[Path]) -> None:
        self.places: dict[Path, Place] = {}
        self.others: dict[Path, Place] = {}
        self._names = names
        self._stored = stored
        self._kept = kept
        self._taken: dict[Place, Path] = {place: path for path, place in names.others.items()}
        self._homes: dict[Path, dict[str, str]] = defaultdict(dict)
        """What leads to some tensors → their names there → their stored names."""

    def add_model(self, entries: Iterable[Entry]) -> None:
        for path in (entry.path for entry in entries if entry.shape is not None):
            if path in self._names.others:
                self._put(path, self._names.others[path])
            elif path[:-1] == self._names.model and _options_of(path) is None:
                found = slot_of(path)
                if found is None or found.key != self._names.optim:
                    self._put(path, self._free(str(path[-1]), path))

    def add_slots(self, entries: Iterable[Entry]) -> None:
        for path in (entry.path for entry in entries if not self._is_kept(entry)):
            found = slot_of(path)
            if found is None or path in self.places or path in self._names.others:
                continue
            place = self._main_slot(found) if found.key == self._names.optim else None
            if place is not None and self._taken.get(place, path) == path:
                self._put(path, place)

    def _main_slot(self, found: _SlotPath) -> Place | None:
        here = self._homes[self._names.model]
        parts = split(found.rest, here)
        if parts is not None:
            return Place(here[parts[0]], parts[1])
        apart = split(found.rest, self._stored)
        if apart is None:
            return None
        msg = (
            f"{name_of(found.key)}.{_STATE}.{found.rest} is in the state dict and {apart[0]!r} is not: a parameter is"
            " stored together with its optimizer state. Save both, or neither; nothing was written"
        )
        raise InvalidInputError(msg)

    def add_slots_of_others(self, entries: Iterable[Entry]) -> None:
        """Place the slots of further optimizers with their parameters, where it is clear whose they are."""
        rests: dict[Path, dict[Path, _SlotPath]] = defaultdict(dict)
        for entry in entries:
            found = slot_of(entry.path)
            if found is not None and entry.path not in self.places and not self._is_kept(entry):
                rests[found.key][entry.path] = found
        for found_by_path in rests.values():
            owner = _owner([found.rest for found in found_by_path.values()], self._homes)
            if owner is None:
                continue
            for path, found in found_by_path.items():
                parts = split(found.rest, self._homes[owner])
                place = Place(self._homes[owner][parts[0]], parts[1]) if parts else None
                if place is not None and self._taken.get(place, path) == path:
                    self._put(path, place)

    def add_others(self, entries: Sequence[Entry]) -> None:
        homes: dict[Path, list[Entry]] = defaultdict(list)
        for entry in entries:
            if entry.shape is not None and entry.path not in self.places and not self._is_kept(entry):
                found = slot_of(entry.path)
                homes[(*found.key, _STATE) if found is not None else entry.path[:-1]].append(entry)
        for members in homes.values():
            small = sum(member.nbytes for member in members) <= SMALL_BYTES
            if not (small and not any(member.spread for member in members)):
                for member in members:
                    self._put(member.path, self._free(name_of(member.path), member.path))

    def _is_kept(self, entry: Entry) -> bool:
        """Whether the branch keeps a value outside of layers; what is held in parts now cannot be."""
        return entry.path in self._kept and not entry.spread

    def _free(self, wanted: str, path: Path) -> Place:
        """Return a place for a tensor that nothing else has, here or in the store."""
        place = Place(wanted)
        while self._taken.get(place, path) != path or (
            place.tensor in self._stored and self._names.by_rule(place) != path
        ):
            place = Place(f"{place.tensor}~")
        return place

    def _put(self, path: Path, place: Place) -> None:
        self.places[path] = place
        self._taken[place] = path
        if place.slot is None:
            self._homes[path[:-1]][str(path[-1])] = place.tensor
        if self._names.by_rule(place) != path:
            self.others[path] = place
