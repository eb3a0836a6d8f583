"""Masks: which layers a commit writes, and how. Pure functions over layer names."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

from tailorstore.domain.errors import MaskError
from tailorstore.domain.records import EXTRA_LAYER, Fidelity, LayerMeasures

_SHOWN = 10
_NESTED = 8
"""A strategy may return another one, to this depth."""

MaskValue = bool | Fidelity
MaskEntries = Mapping[str, MaskValue] | Iterable[str]


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a strategy knows of one layer before a byte is copied."""

    name: str
    bytes_logical: int
    """Size of its tensors."""
    source_step: int | None
    """Step of the newest version on the branch; ``None`` where there is none."""
    fidelity: Fidelity | None = None
    """Of that version."""
    current_step: int | None = None
    """The newest step at which that version is known to have been the layer: its source step, or, for a layer that
    was found unchanged since, the step at which it was."""
    commits_since: int = 0
    """Commits on the branch after ``current_step``. Left out now, the layer will be one commit older than this."""
    base_step: int | None = None
    """Step of the newest full version: what a light version would be a difference to."""
    base_commits_since: int = 0
    """Commits on the branch after ``base_step``."""
    error: float | None = None
    """Relative error of the weights of the newest version, if that is a light one."""
    due_full: bool = True
    """Whether a light version is out of the question: there is no base, or it is too old, or errs too much."""
    bytes_full: int = 0
    """What a full version is expected to take in storage."""
    bytes_light: int = 0
    """What a light version is expected to take in storage."""
    measures: LayerMeasures | None = None
    """How the layer has moved since its newest version; ``None`` where nothing could be measured."""
    importance: float | None = None
    """Learned: the damage that is expected, by the next commit, of leaving the layer out; ``None`` until trusted."""


@dataclass(frozen=True, slots=True)
class MaskContext:
    """What a strategy decides upon. Equal contexts give equal masks."""

    branch: str
    step: int
    layers: Mapping[str, LayerState]
    """Every layer of the model, in the model's order, ``@extra`` left out."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Layers that hold nothing but tied tensors → the layer that stores these; a mask may use either name."""
    number: int = 0
    """Which commit of the branch this is, counted from 0; goes on over restarts and garbage collection."""
    seconds_since_commit: float | None = None
    """Since the commit before, if this process made it."""


@runtime_checkable
class Strategy(Protocol):
    """An object that chooses a mask for each commit."""

    def select(self, context: MaskContext) -> MaskEntries:
        """Return a mask for this commit: layer names or globs, or a mapping of them to values."""
        ...


Mask = None | MaskEntries | Strategy


def resolve_mask(mask: Mask, context: MaskContext) -> dict[str, Fidelity]:
    """Return the layers to write and how.

    ``None`` means all. Names and globs may be mixed; in a mapping an exact name counts more than a glob, and of
    several globs the later one. A layer that is due in full is written in full where a light version is asked for.

    Raises:
        MaskError: an unknown layer, a glob that matches none, or a value that is none of True, "full", "light", False.
    """
    if isinstance(mask, type):
        msg = f"the mask is the class {mask.__name__} itself; make a strategy of it, as in mask={mask.__name__}(…)"
        raise MaskError(msg)
    for _ in range(_NESTED):
        if not isinstance(mask, Strategy):
            break
        strategy, mask = mask, mask.select(context)
        if mask is None:
            msg = f"the strategy {type(strategy).__name__} returned nothing; return [] to write no layer, ['*'] for all"
            raise MaskError(msg)
    if mask is None:
        return dict.fromkeys(context.layers, "full")
    if isinstance(mask, str):
        mask = [mask]
    names = _names(mask)
    entries = mask if isinstance(mask, Mapping) else dict.fromkeys(names, True)
    chosen: dict[str, Fidelity | None] = {}
    # Globs first and exact names after them, so that the more precise entry has the last word.
    for name, value in sorted(entries.items(), key=lambda item: item[0] in context.layers):
        fidelity = _fidelity(name, value)
        for layer in _matches(name, context):
            chosen[layer] = fidelity
    return {
        name: "full" if state.due_full else fidelity
        for name, state in context.layers.items()
        if (fidelity := chosen.get(name)) is not None
    }


def _names(mask: object) -> list[str]:
    if not isinstance(mask, Iterable):
        msg = f"a mask is None, layer names or globs, a mapping of them, or a strategy; not {type(mask).__name__}"
        raise MaskError(msg)
    names = list(mask)
    for name in names:
        if not isinstance(name, str):
            msg = f"a mask holds layer names, but {name!r} is a {type(name).__name__}"
            raise MaskError(msg)
    return names


def _fidelity(name: str, value: object) -> Fidelity | None:
    if value is True or value == "full":
        return "full"
    if value == "light":
        return "light"
    if value is False:
        return None
    msg = f"mask value of {name!r} is {value!r}; use True or 'full' to write the layer, 'light', or False to leave it"
    raise MaskError(msg)


def _matches(name: str, context: MaskContext) -> list[str]:
    if name in context.layers:
        return [name]
    if name in context.tied:
        return [context.tied[name]]
    if name == EXTRA_LAYER:
        msg = f"{EXTRA_LAYER} is written by every commit; leave it out of the mask"
        raise MaskError(msg)
    if any(char in name for char in "*?["):
        found = [layer for layer in context.layers if fnmatchcase(layer, name)]
        found += [context.tied[layer] for layer in context.tied if fnmatchcase(layer, name)]
        if found:
            return found
        msg = f"mask pattern {name!r} matches no layer at step {context.step} on {context.branch!r}"
    else:
        msg = f"mask names an unknown layer {name!r} at step {context.step} on {context.branch!r}"
        if "(" in name:
            raise MaskError(f"{msg}; if it is meant to be a strategy, write mask=ts.parse_strategy({name!r})")
    near = difflib.get_close_matches(name, context.layers, n=3, cutoff=0.3)
    if near:
        raise MaskError(f"{msg}; nearest: {', '.join(map(repr, near))}")
    shown = ", ".join(map(repr, list(context.layers)[:_SHOWN]))
    more = f" and {len(context.layers) - _SHOWN} more" if len(context.layers) > _SHOWN else ""
    raise MaskError(f"{msg}; the model's layers are {shown}{more}")
