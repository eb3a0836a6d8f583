"""What writing a layer now is worth, by a measure; and what stands in where a layer lacks it."""

import logging
import math
from collections.abc import Mapping, Sequence

from tailorstore.domain.mask import LayerState, MaskContext
from tailorstore.domain.strategies.checks import IMPORTANCE

_log = logging.getLogger("tailorstore")

_FALLBACK = (IMPORTANCE, "curvature", "drift")


def with_fallback(by: str) -> tuple[str, ...]:
    """Return the measures to try in turn.

    Examples:
        >>> with_fallback("importance"), with_fallback("momentum"), with_fallback("drift")
        (('importance', 'curvature', 'drift'), ('momentum', 'curvature', 'drift'), ('drift',))
    """
    if by in _FALLBACK:
        return _FALLBACK[_FALLBACK.index(by) :]
    return (by, *_FALLBACK[1:])


def same_unit(by: str) -> tuple[str, ...]:
    """Return the measures that can stand in for one without a change of unit: importance is expected curvature."""
    return (IMPORTANCE, "curvature") if by == IMPORTANCE else (by,)


def worth(
    context: MaskContext, measures: Sequence[str], *, owner: str, told: set[str], aged: bool = False
) -> dict[str, float]:
    """Return for each layer what the first measure says that all layers have; figures of two would not compare.

    A layer that nothing is known of, or that holds NaN or infinities, is worth infinitely much. One that has not moved
    is worth nothing where it lacks a figure (a frozen layer has no optimizer slots). Of the last measure, also a layer
    that merely lacks the figure is worth infinitely much. :func:`stale_bytes` ranks the infinite ones.

    Args:
        context: of the commit.
        measures: names to try in turn.
        owner: the strategy's name, for what is logged.
        told: measures that were spoken of already; the one used is added. Each is spoken of once.
        aged: multiply by the age in commits that the layer would have if left out.
    """
    found: dict[str, float] = {}
    for measure in measures:
        known = {name: _figure(state, measure) for name, state in context.layers.items()}
        lacking = next((name for name, figure in known.items() if figure is None), None)
        found = {name: math.inf if figure is None else figure for name, figure in known.items()}
        if lacking is None:
            if measure != measures[0] and measure not in told:
                told.add(measure)
                _log.warning(
                    "%s: not every layer has %s at step %d; going by %s", owner, measures[0], context.step, measure
                )
            break
    else:
        if "" not in told:
            told.add("")
            _log.warning(
                "%s: layer %r has no %s at step %d; such layers count as most urgent",
                owner,
                lacking,
                measures[-1],
                context.step,
            )
    return {name: figure * age_of(context.layers[name]) for name, figure in found.items()} if aged else found


def age_of(state: LayerState) -> int:
    """Return the age in commits that a layer would have after this commit, if left out."""
    return state.commits_since + 1


def _figure(state: LayerState, measure: str) -> float | None:
    """Return what a layer is worth; ``None`` where it has moved, but lacks this figure."""
    measures = state.measures
    if measures is None or not measures.finite:
        return math.inf
    figure: float | None = state.importance if measure == IMPORTANCE else getattr(measures, measure)
    if figure is not None and not math.isnan(figure):
        return max(0.0, figure)
    if measures.drift is None:
        return math.inf
    return 0.0 if measures.drift == 0 else None


def stale_bytes(state: LayerState) -> int:
    """Return a layer's bytes times the age in commits that it would have: ranks layers that nothing else ranks."""
    return max(1, state.bytes_logical) * age_of(state)


def finite(context: MaskContext, worths: Mapping[str, float]) -> dict[str, float]:
    """Replace infinities, so that the least of them outweighs all finite ones together a thousand times."""
    urgent = {name: stale_bytes(context.layers[name]) for name, figure in worths.items() if math.isinf(figure)}
    if not urgent:
        return dict(worths)
    # Scaled to at most 1, as finite figures may be of any size.
    greatest = max((figure for figure in worths.values() if not math.isinf(figure)), default=0.0) or 1.0
    scaled = {name: figure / greatest for name, figure in worths.items() if name not in urgent}
    unit = 1000 * (1 + sum(scaled.values())) / min(urgent.values())
    return {name: scaled.get(name, unit * urgent.get(name, 0)) for name in worths}
