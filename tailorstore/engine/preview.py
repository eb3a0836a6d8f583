"""What a strategy would write at the next commit, from what the catalog knows of the last one."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tailorstore.domain.errors import NotFoundError
from tailorstore.domain.light import LightSettings
from tailorstore.domain.mask import LayerState, MaskContext, Strategy, resolve_mask
from tailorstore.domain.records import EXTRA_LAYER, MEASURES, Commit, Fidelity, LayerInfo, LayerMeasures
from tailorstore.engine.store import Store

_LIGHT_SHARE = 0.11
"""What a light version takes of its tensors' bytes, roughly, where the branch has none to go by."""

_GROWTH = {"drift": 0.5, "relative_drift": 0.5, "curvature": 1.0}
"""Measures that grow with the age of what they are taken from, and by which power of it: as in a random walk."""


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One layer, as the next commit would leave it."""

    layer: str
    write: Fidelity | None
    """``None``: left out."""
    age: int
    """In commits, once the commit is made."""
    bytes: int
    """That are expected to be written; 0 if it is left out."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What a strategy would write at the next commit."""

    branch: str
    after_step: int
    """Step of the newest commit."""
    number: int
    """Which commit of the branch the next one is, from 0, as far as the catalog still knows of those before."""
    layers: tuple[PlannedLayer, ...]
    bytes: int
    """Of all layers, ``@extra`` left out."""
    bytes_full: int
    """What the layers take in full."""


def preview(
    store: Store,
    strategy: Strategy,
    light: LightSettings | None = None,
    order: Callable[[str], Any] | None = None,
) -> Preview:
    """Ask a strategy what it would write at the next commit of a store's branch. Reads no tensors, changes nothing.

    An estimate, since the model that would be measured is not at hand: each layer is taken to move on as it did up to
    the newest commit, which is as far from it as the one before. What only the trainer knows is missing: learned
    importance (strategies fall back to the curvature) and the model's order of layers. A layer that turns out not to
    have changed costs nothing, and is not known for one here.

    Args:
        store: whose branch it is.
        strategy: to be asked.
        light: settings of the trainer's store; default the defaults.
        order: key that sorts the layers' names; default as texts.

    Raises:
        BranchNotFoundError: the branch has no commits; the first one writes every layer in full.
        MaskError: a budget that is too small for a bound of age.
    """
    commits = store.log()
    layers = [info for info in store.layers(commits[0]) if info.name != EXTRA_LAYER]
    layers.sort(key=(lambda info: order(info.name)) if order else (lambda info: info.name))
    steps = sorted(commit.step for commit in commits)
    measures = _expected_measures(store, commits, steps, layers)
    spacing = steps[-1] - steps[-2] if len(steps) > 1 else 1
    states = _states(layers, measures, steps, spacing, light or LightSettings())
    seconds = (commits[0].created_at - commits[1].created_at).total_seconds() if len(commits) > 1 else None
    context = MaskContext(store.branch_name, steps[-1] + spacing, states, {}, len(commits), seconds)
    chosen = resolve_mask(strategy, context)
    chosen |= {info.name: "full" for info in layers if info.quarantined is not None}
    planned = tuple(_planned(state, chosen.get(name)) for name, state in states.items())
    return Preview(
        branch=store.branch_name,
        after_step=steps[-1],
        number=len(commits),
        layers=planned,
        bytes=sum(layer.bytes for layer in planned),
        bytes_full=sum(state.bytes_full for state in states.values()),
    )


def _planned(state: LayerState, write: Fidelity | None) -> PlannedLayer:
    if write is None:
        return PlannedLayer(state.name, None, state.commits_since + 1, 0)
    return PlannedLayer(state.name, write, 0, state.bytes_light if write == "light" else state.bytes_full)


def _expected_measures(
    store: Store, commits: Sequence[Commit], steps: Sequence[int], layers: Sequence[LayerInfo]
) -> dict[str, LayerMeasures]:
    """Return the measures of the newest commit, carried on to the next: a layer written at the newest starts anew."""
    updates = store.updates(limit=1)
    try:
        before = {info.name: info.source_step for info in store.layers(commits[1])} if len(commits) > 1 else {}
    except NotFoundError:  # dropped by GC a moment ago
        before = {}
    now = {info.name: info.source_step for info in layers}
    found: dict[str, LayerMeasures] = {}
    for column, name in enumerate(updates.layers):
        if name not in now:
            continue
        figures = {measure: float(updates.of(measure)[0, column]) for measure in MEASURES}
        measured = LayerMeasures(
            **{measure: None if math.isnan(value) else value for measure, value in figures.items()},
            finite=bool(updates.finite[0, column]),
        )
        # The newest commit measured before it wrote: over the age that the layer had reached by then.
        past = _commits_after(steps, before.get(name, now[name]))
        found[name] = _carried_on(measured, (_commits_after(steps, now[name]) + 1) / max(1, past))
    return found


def _carried_on(measures: LayerMeasures, ratio: float) -> LayerMeasures:
    grown = {
        name: value * ratio**power for name, power in _GROWTH.items() if (value := getattr(measures, name)) is not None
    }
    return replace(measures, **grown)


def _states(
    layers: Sequence[LayerInfo],
    measures: Mapping[str, LayerMeasures],
    steps: Sequence[int],
    spacing: int,
    light: LightSettings,
) -> dict[str, LayerState]:
    full_share = _share([info for info in layers if info.fidelity == "full"], 1.0)
    light_share = _share([info for info in layers if info.fidelity == "light"], _LIGHT_SHARE)
    states = {}
    for info in layers:
        base_step = info.source_step if info.base_step is None else info.base_step
        base_since = _commits_after(steps, base_step)
        is_light = info.fidelity == "light"
        states[info.name] = LayerState(
            name=info.name,
            bytes_logical=info.bytes_logical,
            source_step=info.source_step,
            fidelity=info.fidelity,
            current_step=info.source_step,
            commits_since=_commits_after(steps, info.source_step),
            base_step=base_step,
            base_commits_since=base_since,
            error=info.error,
            due_full=light.is_due(
                error=info.error, base_commits=base_since + 1, base_steps=steps[-1] + spacing - base_step
            ),
            bytes_full=int(info.bytes_logical * full_share) if is_light else info.bytes_stored,
            bytes_light=info.bytes_stored if is_light else int(info.bytes_logical * light_share),
            measures=measures.get(info.name),
        )
    return states


def _share(layers: Sequence[LayerInfo], otherwise: float) -> float:
    """Return what layers take in storage of what their tensors take."""
    logical = sum(info.bytes_logical for info in layers)
    return sum(info.bytes_stored for info in layers) / logical if logical else otherwise


def _commits_after(steps: Sequence[int], step: int) -> int:
    return len(steps) - bisect_right(steps, step)
