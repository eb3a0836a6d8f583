"""The shared regression: from what is remembered of a commit to the damages at the next. Formulae: the package."""

import math
from dataclasses import dataclass, replace

import numpy as np

from tailorstore.domain.importance.memory import Bools, Floats, Memory, Seen, bounded, logarithm, rounded

WEIGHTS = 10

_KEPT = 0.95
"""Of all experience, at each commit."""
_RIDGE = 1.0
_OFFSET_RATE = 0.1
_OFFSET_SHRINKAGE = 0.02
_OUTLIER = 3.0
"""Bound of a surprise and of an error, in natural logarithms."""
_SETTLED_COMMITS = 8
_BETTER = 0.8
_LARGEST_ERROR = math.log(2)


@dataclass(frozen=True, slots=True)
class Fit:
    """What was learned for all layers; pairs are (left out, written)."""

    gram: Floats
    """(10, 10), forgetting sum of products of features."""
    moment: Floats
    """(10,), the same of features and targets."""
    weights: Floats
    """(10,), what follows from both."""
    error: Floats
    """(2,), forgetting sum over commits of the mean error of the predictions."""
    reference: Floats
    """(2,), the same of "what is will be"."""
    seen: Floats
    """(2,), the same of 1."""
    commits: tuple[int, int]
    predictions: int

    @property
    def trusted(self) -> bool:
        """Whether both cases were seen often enough, and predicted well enough."""
        if min(self.commits) < _SETTLED_COMMITS:
            return False
        error, reference = float(np.mean(self.error / self.seen)), float(np.mean(self.reference / self.seen))
        return error < _BETTER * reference and error < _LARGEST_ERROR


UNFITTED = Fit(
    gram=np.zeros((WEIGHTS, WEIGHTS)),
    moment=np.zeros(WEIGHTS),
    weights=np.zeros(WEIGHTS),
    error=np.zeros(2),
    reference=np.zeros(2),
    seen=np.zeros(2),
    commits=(0, 0),
    predictions=0,
)


def _design(memory: Memory, written: Bools, interval: float) -> tuple[Floats, Floats, Floats]:
    """Return the features, (10, layers), log(r + u) and q, (layers,); NaN where the damage is unknown."""
    columns = memory.columns
    with np.errstate(all="ignore"):
        age = np.log(memory.step - columns.origin)
        pace = columns.damage - age
        added = pace + math.log(interval)
        anchor = np.logaddexp(added, np.where(written, -math.inf, columns.damage))
        share = np.exp(added - anchor)
        cross = np.log1p(2.0 * np.sqrt(share * (1.0 - share)))
    ones = np.ones(len(memory.names))
    of_pace = [
        ones,
        bounded(age - math.log(memory.interval or interval)),
        columns.gain,
        bounded(columns.recent - pace),
        columns.update,
        ones * memory.trend,
        np.linspace(-0.5, 0.5, len(memory.names)),
    ]
    of_rest = [ones, ones * memory.trend]
    features = [*(share * one for one in of_pace), *((1.0 - share) * one for one in of_rest), cross]
    return np.stack(features), anchor, share


def forecast(fit: Fit, memory: Memory, written: Bools) -> Floats:
    """Return the logarithm of the damage at the next commit, one more interval like the last one from here."""
    if memory.interval is None:
        return np.full(len(memory.names), math.nan)
    features, anchor, share = _design(memory, written, memory.interval)
    return anchor + fit.weights @ features + share * memory.columns.offset


def settled(fit: Fit, before: Memory, seen: Seen) -> tuple[Fit, Memory]:
    """Learn from what became of the layers since ``before``; its columns are in the order of ``seen``."""
    columns = before.columns
    written = columns.written > 0.0
    predicted = forecast(fit, before, written)
    # Learned with the interval that came about, though predicted, and scored, with the one that was expected.
    features, anchor, share = _design(before, written, seen.step - before.step)
    observed = logarithm(seen.damage)
    borne_out = seen.origin == np.where(written, before.step, columns.origin)
    known = np.isfinite(predicted) & np.isfinite(observed) & borne_out
    if not known.any():
        return fit, before
    features, share = np.where(known, features, 0.0), np.where(known, share, 0.0)
    expected = fit.weights @ features + share * columns.offset
    surprise = np.where(known, observed - anchor - expected, 0.0)
    target = expected + np.clip(surprise, -_OUTLIER, _OUTLIER)
    gram = _KEPT * fit.gram + features @ features.T
    fit = fitted(fit, gram, _KEPT * fit.moment + features @ target)

    rest = target - fit.weights @ features
    offset = columns.offset + _OFFSET_RATE * share * (rest - share * columns.offset)
    offset = np.where(known, (1.0 - _OFFSET_SHRINKAGE) * offset, columns.offset)
    error = np.where(known, np.clip(observed - predicted, -_OUTLIER, _OUTLIER), 0.0)
    bias = np.where(known, _KEPT * columns.bias + (1.0 - _KEPT) * error, columns.bias)
    columns = replace(columns, offset=rounded(offset), bias=rounded(bias))

    pace = columns.damage - np.log(np.where(known, before.step - columns.origin, 1.0))
    reference = observed - np.where(written, pace + math.log(before.interval or 1), columns.damage)
    fit = _scored(fit, np.abs(error), np.clip(np.abs(reference), 0.0, _OUTLIER), known, written)
    return fit, replace(before, columns=columns)


def _scored(fit: Fit, error: Floats, reference: Floats, known: Bools, written: Bools) -> Fit:
    sums = {"error": fit.error.copy(), "reference": fit.reference.copy(), "seen": fit.seen.copy()}
    commits = list(fit.commits)
    for case in (0, 1):
        which = known & (written == bool(case))
        if which.any():
            for name, one in (("error", error[which].mean()), ("reference", reference[which].mean()), ("seen", 1.0)):
                sums[name][case] = _KEPT * sums[name][case] + one
            commits[case] += 1
    count = fit.predictions + int(known.sum())
    return replace(fit, **sums, commits=(commits[0], commits[1]), predictions=count)


def fitted(fit: Fit, gram: Floats, moment: Floats) -> Fit:
    """Return ``fit`` with these sums, and the weights that follow."""
    weights = np.asarray(np.linalg.solve(gram + _RIDGE * np.eye(WEIGHTS), moment), np.float64)
    return replace(fit, gram=gram, moment=moment, weights=weights)


def means(fit: Fit, total: Floats) -> list[float | None]:
    """Return a forgetting sum's means in both cases; ``None`` for a case that was never seen."""
    return [float(one / seen) if seen else None for one, seen in zip(total, fit.seen, strict=True)]
