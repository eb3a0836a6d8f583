"""What is added up of layers to tell how they move: by each rank of what it holds, then over all ranks. Pure.

A layer's measures are roots of sums over its elements, so that the sums of all ranks, each over the parts that it
speaks for, tell of the whole layer. All ranks that are given the same tallies find the same measures, to the bit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tailorstore.domain.records import LayerMeasures


class Sums(NamedTuple):
    """What elements add up to; squares, but for the first."""

    bad: float = 0.0
    """NaN and infinities that were found, in weights or slots."""
    change: float = 0.0
    weight: float = 0.0
    step: float = 0.0
    curvature: float = 0.0
    """Second moment times squared change."""
    uncurved: float = 0.0
    """The part of ``change`` that has no second moment."""


def added(sums: Iterable[Sums]) -> Sums:
    """Return what sums add up to, one after the other."""
    return Sums(*map(sum, zip(*sums, strict=True)))


@dataclass(frozen=True, slots=True)
class LayerTally:
    """What is added up of those parts of a layer's parameters that one rank speaks for."""

    parts: int = 0
    """How many there are; without any, nothing else is said."""
    trained: bool = False
    """Whether some are a module's parameters, rather than its buffers."""
    based: bool = False
    """Whether all have a baseline."""
    known: bool = False
    """Whether the step can be told of all, but those of ``idle``."""
    idle: frozenset[int] = frozenset()
    """Optimizers without slots for some of the parts: these were never updated, if it has slots for others."""
    active: frozenset[int] = frozenset()
    """Optimizers that are known to move some of the parts."""
    sums: Sums = field(default_factory=Sums)
    gradient: float | None = None
    """Sum of the mean squared norms of gradients; ``None`` where none was observed."""

    def as_json(self) -> list[Any]:
        """Return it as JSON data, floats as exact text: NaN and infinities too."""
        flags = [self.trained, self.based, self.known]
        gradient = None if self.gradient is None else self.gradient.hex()
        sums = [float(value).hex() for value in self.sums]
        return [self.parts, *flags, sorted(self.idle), sorted(self.active), sums, gradient]


def tally_from_json(described: Sequence[Any]) -> LayerTally:
    """Return the tally that :meth:`LayerTally.as_json` wrote."""
    parts, trained, based, known, idle, active, texts, text = described
    sums = Sums(*map(float.fromhex, texts))
    gradient = None if text is None else float.fromhex(text)
    return LayerTally(parts, trained, based, known, frozenset(idle), frozenset(active), sums, gradient)


def figures(tallies: Sequence[Mapping[str, LayerTally]]) -> dict[str, LayerMeasures]:
    """Return how layers move, from the tallies of all ranks, in rank order.

    Layers are in the order of the first rank that has them, those of the first rank first. What cannot be told is
    ``None``.
    """
    layers: dict[str, list[LayerTally]] = {}
    for tally in tallies:
        for name, one in tally.items():
            layers.setdefault(name, []).append(one)
    found = {name: _added(ones) for name, ones in layers.items()}
    active = frozenset().union(*(one.active for one in found.values()))
    has_parameters = any(one.trained for one in found.values())
    return {name: _measures(one, active, beside_trained=has_parameters) for name, one in found.items()}


def _added(ones: Iterable[LayerTally]) -> LayerTally:
    """Return one tally for what several ranks have of a layer."""
    speaking = [one for one in ones if one.parts]
    # Buffers stand for a layer that has no parameters on any rank.
    speaking = [one for one in speaking if one.trained] or speaking
    if not speaking:
        return LayerTally()
    gradients = [one.gradient for one in speaking if one.gradient is not None]
    return LayerTally(
        parts=sum(one.parts for one in speaking),
        trained=any(one.trained for one in speaking),
        based=all(one.based for one in speaking),
        known=all(one.known for one in speaking),
        idle=frozenset().union(*(one.idle for one in speaking)),
        active=frozenset().union(*(one.active for one in speaking)),
        sums=added(one.sums for one in speaking),
        gradient=sum(gradients) if gradients else None,
    )


def _measures(one: LayerTally, active: frozenset[int], *, beside_trained: bool) -> LayerMeasures:
    sums = one.sums
    if beside_trained and not one.trained and (sums.change or sums.bad):
        # Buffers that moved did so by no step of an optimizer: nothing is known of them.
        return LayerMeasures(None, None, None, None, None)
    if sums.bad or not math.isfinite(one.gradient or 0.0):
        return LayerMeasures(None, None, None, None, None, finite=False)
    drift = _root(sums.change) if one.based else None
    return LayerMeasures(
        drift=drift,
        relative_drift=None if drift is None else _ratio(drift, math.sqrt(sums.weight)),
        momentum=_root(sums.step) if one.known and one.idle <= active else None,
        gradient=None if one.gradient is None else _root(one.gradient),
        curvature=sums.curvature if one.based and not sums.uncurved and math.isfinite(sums.curvature) else None,
    )


def _root(square: float) -> float | None:
    return math.sqrt(square) if math.isfinite(square) else None


def _ratio(part: float, whole: float) -> float | None:
    if part == 0:
        return 0.0
    return part / whole if whole else None
