"""How layers moved, over a branch's commits, as arrays."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.names import natural
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

    def of(self, measure: str) -> Figures:
        """Return the figures of a measure, of shape (commits, layers); NaN where there is none.

        Raises:
            InvalidInputError: no such measure; the message has those that there are.
        """
        try:
            return self.values[measure]
        except KeyError:
            near = difflib.get_close_matches(str(measure), self.values, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            msg = f"there is no measure {measure!r}; measures are {', '.join(self.values)}{hint}"
            raise InvalidInputError(msg) from None


def collect_updates(
    rows: Sequence[tuple[Commit, Mapping[str, LayerMeasures]]], order: Sequence[str] | None = None
) -> Updates:
    """Return what the catalog has of a branch as arrays.

    Args:
        rows: of the commits, oldest first.
        order: of the layers, those that it leaves out at the end; default as people count.
    """
    met = sorted({name for _, measured in rows for name in measured}, key=natural)
    columns = {name: at for at, name in enumerate(dict.fromkeys([*(n for n in order or () if n in met), *met]))}
    shape = len(rows), len(columns)
    values = {name: np.full(shape, np.nan) for name in MEASURES}
    finite = np.ones(shape, dtype=np.bool_)
    for at, (_, measured) in enumerate(rows):
        for layer, found in measured.items():
            column = columns[layer]
            finite[at, column] = found.finite
            for name, figures in values.items():
                # None becomes NaN.
                figures[at, column] = getattr(found, name)
    return Updates(np.array([commit.step for commit, _ in rows], dtype=np.int64), tuple(columns), values, finite)
