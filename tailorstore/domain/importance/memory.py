"""What is seen of a commit, and what is remembered of it until the next."""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from tailorstore.domain.mask import MaskContext

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

WIDEST = 4.0
"""Bound of a feature, in natural logarithms."""

_DIGITS = 3
_LEAST_GAIN = 0.02
"""What the last interval is taken to have added at least, as a part of the damage."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The measures of a commit; arrays are (layers,) float64, NaN is unknown."""

    names: tuple[str, ...]
    step: int
    curvature: bool | None
    """Whether damages are curvature-weighted drifts rather than squared drifts; ``None`` where no layer moves."""
    origin: Floats
    """Step since which the damage has gathered."""
    damage: Floats
    light_damage: Floats
    """What the error of a light version costs, by the damage that the same change does; 0 where there is none."""
    update: Floats
    """Damage that the optimizer's present update does in one step."""


@dataclass(frozen=True, slots=True)
class Columns:
    """What is remembered of each layer, (layers,) float64, NaN is unknown. Logarithms are natural, and rounded."""

    damage: Floats
    """Logarithm of the damage."""
    origin: Floats
    """Step since which it has gathered."""
    gain: Floats
    """Logarithm of what the last interval added a step, over the pace; 0 where it added all, or unknown."""
    recent: Floats
    """Logarithm of the damage a step over the newest interval that followed a writing."""
    update: Floats
    """Logarithm of what the optimizer's present update adds a step, over the pace; 0 where unknown."""
    offset: Floats
    """The layer's own intercept."""
    bias: Floats
    """Forgetting mean of the logarithm of observed over predicted."""
    written: Floats
    """1 where the commit wrote the layer, else 0."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The newest commit, as it was seen."""

    names: tuple[str, ...]
    step: int
    interval: int | None
    """Steps since the commit before; ``None`` where that is unknown."""
    rate: float | None
    """Logarithm of the learning rate."""
    trend: float
    """Twice its change since the commit before, since damage is a square."""
    curvature: bool | None
    """As in :class:`Seen`, of this commit or, where no layer moved, of the one before."""
    columns: Columns


COLUMN_NAMES = tuple(one.name for one in fields(Columns))
GAPPED = frozenset({"damage", "origin", "recent"})
"""Columns in which a layer may be unknown."""


def read_measures(context: MaskContext) -> Seen:
    """Return what the context tells of the layers' damages. Impossible figures count as unknown."""
    rows: list[tuple[float | None, ...]] = []
    curvature: bool | None = None
    for layer in context.layers.values():
        since = layer.source_step if layer.current_step is None else layer.current_step
        missed = layer.error if layer.fidelity == "light" else None
        found = layer.measures
        if found is None or not found.finite or found.drift is None or not 0.0 <= found.drift < math.inf:
            rows.append((since, missed, None, None, None, None))
            continue
        if found.drift:
            curvature = found.curvature is not None and curvature is not False
        rows.append((since, missed, found.drift, found.relative_drift, found.momentum, found.curvature))
    origin, error, drift, relative, momentum, weighted = np.array(rows, np.float64).reshape(len(rows), 6).T
    with np.errstate(all="ignore"):
        damage = np.where(drift == 0.0, 0.0, weighted if curvature else drift**2)
        damage[~np.isfinite(damage) | (damage < 0.0)] = math.nan
        light = damage * (error / relative) ** 2
        update = damage * (momentum / drift) ** 2
    return Seen(
        names=tuple(context.layers),
        step=context.step,
        curvature=curvature,
        damage=damage,
        origin=origin,
        light_damage=np.where(np.isfinite(light), light, 0.0),
        update=update,
    )


def remembered(seen: Seen, before: Memory | None, learning_rate: float | None) -> Memory:
    """Return ``seen`` as memory, with what remains of ``before``, whose columns are in the order of ``seen``."""
    zeros, unknown = np.zeros(len(seen.names)), np.full(len(seen.names), math.nan)
    rate = math.log(learning_rate) if learning_rate and 0.0 < learning_rate < math.inf else None
    damage = rounded(logarithm(seen.damage))
    pace = damage - logarithm(seen.step - seen.origin)
    columns = Columns(
        damage=damage,
        origin=seen.origin,
        gain=zeros,
        recent=unknown,
        update=rounded(bounded(logarithm(seen.update) - pace)),
        offset=zeros,
        bias=zeros,
        written=zeros,
    )
    memory = Memory(seen.names, seen.step, None, rate, 0.0, seen.curvature, columns)
    if before is None:
        return memory
    columns = replace(columns, offset=before.columns.offset, bias=before.columns.bias)
    memory = replace(memory, interval=before.interval, columns=columns)
    if seen.curvature is None:
        memory = replace(memory, curvature=before.curvature)
    if seen.step > before.step:
        trend = 0.0 if rate is None or before.rate is None else 2.0 * (rate - before.rate)
        memory = replace(memory, interval=seen.step - before.step, trend=min(max(trend, -WIDEST), WIDEST))
    if memory.curvature != before.curvature:
        return memory
    recent = before.columns.recent
    if seen.step > before.step:
        interval = seen.step - before.step
        added = seen.damage - np.exp(before.columns.damage)
        gain = logarithm(np.maximum(added, _LEAST_GAIN * seen.damage) / interval) - pace
        same = seen.origin == before.columns.origin
        columns = replace(columns, gain=rounded(bounded(np.where(same, gain, 0.0))))
        recent = np.where((seen.origin == before.step) & np.isfinite(pace), rounded(pace), recent)
    return replace(memory, columns=replace(columns, recent=recent))


def aligned(memory: Memory, names: tuple[str, ...]) -> Memory:
    """Return ``memory`` for other layers, or others in order: what is new to it is unknown."""
    if names == memory.names:
        return memory
    places = {name: at for at, name in enumerate(memory.names)}
    at = np.array([places.get(name, -1) for name in names], np.intp)

    def moved(column: Floats, absent: float) -> Floats:
        return np.append(column, absent)[at]

    absent = {name: math.nan if name in GAPPED else 0.0 for name in COLUMN_NAMES}
    columns = {name: moved(getattr(memory.columns, name), absent[name]) for name in COLUMN_NAMES}
    return replace(memory, names=names, columns=Columns(**columns))


def logarithm(values: Floats) -> Floats:
    """Return natural logarithms, NaN where there is none."""
    return np.log(np.where(values > 0.0, values, math.nan))


def bounded(values: Floats) -> Floats:
    """Return ``values`` as a feature: within bounds, 0 where unknown."""
    return np.clip(np.nan_to_num(values, nan=0.0), -WIDEST, WIDEST)


def rounded(values: Floats) -> Floats:
    """Return ``values`` as precise as the state keeps them, so that a restart changes nothing."""
    return np.round(values, _DIGITS)
