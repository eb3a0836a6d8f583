"""How far each layer of a composite is from what the model was at its step, and what a caller will put up with."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.records import EXTRA_LAYER, Composite, Fidelity, LayerMeasures, LayerVersion

_SHOWN = 10


class CompositeWarning(UserWarning):
    """A composite's layers are further from what the model was than the caller allows, who asked to be warned only."""


@dataclass(frozen=True, slots=True)
class LayerCondition:
    """What is known of one layer of a composite. A full version of the composite's own step is all zeros."""

    layer: str
    source_step: int
    staleness: int
    """Steps from the source step to the composite's."""
    age: int
    """Commits of the branch after the layer's version, that of the composite included."""
    fidelity: Fidelity
    error: float
    """Relative L2 error of the weights that was recorded when the version was written; 0 for a full one."""
    damage: float | None
    """Estimate, to first order, of what it costs that the layer is not what it was: sum over its parameters of second
    moment times squared difference, in units of the loss up to a factor that all layers share. ``None``: never
    measured, or the optimizer keeps no second moments."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that a composite's layers may be off for ``restore``; ``None`` bounds nothing."""

    staleness: int | None = None
    """Steps."""
    age: int | None = None
    """Commits."""
    error: float | None = None
    """Relative error of a light version's weights."""
    damage: float | None = None
    """Estimated damage of one layer; one whose damage is not known does not pass."""
    warn: bool = False
    """Warn (``CompositeWarning``) where a bound is passed, rather than refuse (``BoundsExceededError``)."""

    def __post_init__(self) -> None:
        """Refuse bounds that mean nothing.

        Raises:
            InvalidInputError: names the bound.
        """
        for bound in ("staleness", "age", "error", "damage"):
            value = getattr(self, bound)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and value >= 0):
                msg = f"bound {bound} is {value!r}; it must be a number of at least 0, or None"
                raise InvalidInputError(msg)

    def passed_by(self, conditions: Iterable[LayerCondition]) -> list[str]:
        """Return a sentence for every layer that passes a bound."""
        found = []
        for condition in conditions:
            for bound in ("staleness", "age", "error", "damage"):
                limit, value = getattr(self, bound), getattr(condition, bound)
                if limit is None:
                    continue
                if value is None:
                    found.append(f"layer {condition.layer!r}: its {bound} is not known")
                elif not value <= limit:
                    found.append(f"layer {condition.layer!r} has {bound} {value:.4g}, more than {limit:.4g}")
        return found


def conditions_of(
    composite: Composite, steps: Sequence[int], measures: Mapping[str, LayerMeasures]
) -> dict[str, LayerCondition]:
    """Return the condition of every layer but ``@extra``.

    Args:
        composite: whose layers they are.
        steps: of the branch's commits, in any order; later ones than the composite's do not count.
        measures: taken when the composite's commit was made, before it wrote.
    """
    step = composite.commit.step
    known = sorted(one for one in steps if one <= step)
    return {
        name: LayerCondition(
            layer=name,
            source_step=version.step,
            staleness=step - version.step,
            age=len(known) - bisect_right(known, version.step),
            fidelity=version.fidelity,
            error=version.error or 0.0,
            damage=_damage(version, step, measures.get(name)),
        )
        for name, version in composite.versions.items()
        if name != EXTRA_LAYER
    }


def _damage(version: LayerVersion, step: int, measures: LayerMeasures | None) -> float | None:
    stale = version.step < step
    if not stale and version.fidelity == "full":
        return 0.0
    if measures is None or measures.curvature is None:
        return None
    if measures.curvature == 0:
        return 0.0
    # What was measured is the damage of the drift; that of quantisation stands to it as the squares of their sizes.
    error = version.error or 0.0
    quantised = (error / measures.relative_drift) ** 2 if measures.relative_drift else 0.0
    return measures.curvature * ((1.0 if stale else 0.0) + quantised)


def shown(problems: Sequence[str]) -> str:
    """Return problems as one text, the first few of them."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
