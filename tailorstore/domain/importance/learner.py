"""The learned importance, for those who commit."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tailorstore.domain.importance.memory import Memory, Seen, aligned, read_measures, remembered
from tailorstore.domain.importance.regression import UNFITTED, Fit, forecast, means, settled
from tailorstore.domain.importance.state import parse_state, state_of
from tailorstore.domain.mask import MaskContext
from tailorstore.domain.records import Fidelity

logger = logging.getLogger("tailorstore")

_LARGEST_LOG = 600.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """How good the predictions have been; errors are means of ``abs(log(observed / predicted))``, newest first."""

    trusted: bool
    predictions: int
    """Settled so far, over all layers."""
    commits_left: int
    """Commits at which the prediction for a layer left out was settled."""
    commits_written: int
    """The same for a written layer."""
    error_left: float | None
    """Of the predictions for layers left out; ``None`` where there are none yet, as in the other errors."""
    error_written: float | None
    fallback_error_left: float | None
    """Of "what is will be", on the same layers and commits."""
    fallback_error_written: float | None
    bias: Mapping[str, float]
    """Layer → running mean of ``log(observed / predicted)``: above 0 where the prediction is too low."""


class Importance:
    """Predicts, per layer, the damage that leaving it out of a commit will do by the next commit.

    At each commit first :meth:`predict`, then, once the mask is decided, :meth:`observe`. Not safe for threads.

    Args:
        state: What :meth:`state` of another object returned, through JSON or not; the new object goes on from there,
            bit for bit. What cannot be understood is logged, and all starts anew.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._fit: Fit = UNFITTED
        self._memory: Memory | None = None
        if state is not None:
            try:
                self._fit, self._memory = parse_state(state)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                logger.warning("the stored state of learned importance is of no use, it starts anew: %r", error)

    @property
    def trusted(self) -> bool:
        """Whether predictions were good enough to be given out, as of the newest commit that was observed."""
        return self._fit.trusted

    def predict(self, context: MaskContext, learning_rate: float | None) -> dict[str, float] | None:
        """Return the importance of every layer whose damage is known. Changes nothing.

        Args:
            context: The commit at hand.
            learning_rate: At the commit; ``None`` where it is unknown.

        Returns:
            Layer → expected damage at the next commit if left out, less that if written: finite, at least 0, in the
            unit of the curvature (or of the squared drift). ``None`` until predictions are trusted.
        """
        seen, fit, memory = self._advance(context, learning_rate)
        if not fit.trusted:
            return None
        left, written = (
            np.exp(np.minimum(forecast(fit, memory, case), _LARGEST_LOG))
            for case in (np.zeros(len(seen.names), bool), np.ones(len(seen.names), bool))
        )
        # Without any damage there is no logarithm of it, and nothing to expect from a layer that stands still.
        value = np.where(seen.damage == 0.0, 0.0, np.maximum(left - written, 0.0) + seen.light_damage)
        return {name: one for name, one in zip(seen.names, value.tolist(), strict=True) if math.isfinite(one)}

    def observe(self, context: MaskContext, written: Mapping[str, Fidelity], learning_rate: float | None) -> None:
        """Settle the predictions of the commit before, learn from them, and remember this commit.

        A prediction is settled only where the context bears out what was remembered: the layer's newest version is
        of the step that it should be of. So a commit that failed, or a branch that was moved, teaches nothing wrong.

        Args:
            context: The commit at hand, with the measures as they were before its mask.
            written: The layers that it writes; light versions count as full ones, since the measures start anew.
            learning_rate: As in :meth:`predict`.
        """
        _, fit, memory = self._advance(context, learning_rate)
        flags = np.array([name in written for name in memory.names], np.float64)
        self._fit, self._memory = fit, replace(memory, columns=replace(memory.columns, written=flags))

    def state(self) -> dict[str, Any]:
        """Return all that was learned as JSON data with finite numbers only: some 4 kB, and 70 bytes a layer."""
        return state_of(self._fit, self._memory)

    def report(self) -> Calibration:
        """Return how well the predictions and the fallback have done."""
        fit, memory = self._fit, self._memory
        errors, fallbacks = means(fit, fit.error), means(fit, fit.reference)
        return Calibration(
            trusted=fit.trusted,
            predictions=fit.predictions,
            commits_left=fit.commits[0],
            commits_written=fit.commits[1],
            error_left=errors[0],
            error_written=errors[1],
            fallback_error_left=fallbacks[0],
            fallback_error_written=fallbacks[1],
            bias={} if memory is None else dict(zip(memory.names, memory.columns.bias.tolist(), strict=True)),
        )

    def _advance(self, context: MaskContext, learning_rate: float | None) -> tuple[Seen, Fit, Memory]:
        """Return the measures, and what is known once they have been learned from."""
        seen, fit, before = read_measures(context), self._fit, self._memory
        if before is not None:
            before = aligned(before, seen.names)
            if seen.step > before.step and seen.curvature in (before.curvature, None):
                fit, before = settled(fit, before, seen)
        return seen, fit, remembered(seen, before, learning_rate)
