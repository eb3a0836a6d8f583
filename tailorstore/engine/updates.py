"""How layers moved, over a branch's commits, as arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailorstore.domain.records import MEASURES, Commit, LayerMeasures

Figures = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Updates:
    """What was measured at each commit of a branch, before it wrote."""

    steps: npt.NDArray[np.int64]
    """Of the commits, growing; shape (commits,)."""
    layers: tuple[str, ...]
    values: Mapping[str, Figures]
    """Each of ``MEASURES`` → shape (commits, layers); NaN where there is no figure."""
    finite: npt.NDArray[np.bool_]
    """Shape (commits, layers); false where weights, slots or gradients held NaN or infinities."""


def collect_updates(
    rows: Sequence[tuple[Commit, Mapping[str, LayerMeasures]]], order: Sequence[str] | None = None
) -> Updates:
    """Return what the catalog has of a branch as arrays.

    Args:
        rows: of the commits, oldest first.
        order: of the layers; default as they are met.
    """
    met = dict.fromkeys(name for _, measured in rows for name in measured)
    layers = tuple(met if order is None else [*(n for n in order if n in met), *(n for n in met if n not in order)])
    values = {name: np.full((len(rows), len(layers)), np.nan) for name in MEASURES}
    finite = np.ones((len(rows), len(layers)), dtype=np.bool_)
    for at, (_, measured) in enumerate(rows):
        for column, layer in enumerate(layers):
            found = measured.get(layer)
            if found is None:
                continue
            finite[at, column] = found.finite
            for name in MEASURES:
                value = getattr(found, name)
                values[name][at, column] = np.nan if value is None else value
    return Updates(np.array([commit.step for commit, _ in rows], dtype=np.int64), layers, values, finite)
