"""Strategies that go by what a measure says of each layer."""

import math
from dataclasses import dataclass, field

from tailorstore.domain.errors import MaskError
from tailorstore.domain.mask import MaskContext
from tailorstore.domain.strategies.ages import Outlook
from tailorstore.domain.strategies.checks import check_flag, check_measure, check_whole
from tailorstore.domain.strategies.composing import Chosen, StrategyBase
from tailorstore.domain.strategies.worth import same_unit, stale_bytes, with_fallback, worth


@dataclass(frozen=True, slots=True)
class TopK(StrategyBase):
    """The ``k`` layers of which a measure times the age says most; of equals those with the most bytes for longest.

    The age is there for the reason that :class:`Budget` gives; and without it a layer that moves less than others
    would never be written.
    """

    k: int
    by: str = "drift"
    """A name of :data:`MEASURES`, or ``importance``; where layers lack it, curvature or drift."""
    aged: bool = True
    """Whether the measure counts times the age; otherwise alone."""
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing and unknown measures."""
        check_whole("top_k", "k", self.k)
        check_measure("top_k", self.by)
        check_flag("top_k", "aged", self.aged)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose k layers."""
        del outlook
        worths = worth(context, with_fallback(self.by), owner=str(self), told=self._told, aged=self.aged)
        ranked = sorted(worths, key=lambda name: (-worths[name], -stale_bytes(context.layers[name])))
        top = set(ranked[: self.k])
        return {name: "full" for name in context.layers if name in top}


@dataclass(frozen=True, slots=True)
class Threshold(StrategyBase):
    """The layers of which a measure says more than a bound; also those that lack it, as no other has its unit."""

    above: float
    by: str = "relative_drift"
    """A name of :data:`MEASURES`, or ``importance``, for which curvature stands in."""
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse bounds that mean nothing and unknown measures."""
        if (
            not isinstance(self.above, int | float)
            or isinstance(self.above, bool)
            or not math.isfinite(self.above)
            or self.above < 0
        ):
            msg = f"threshold: above is {self.above!r}; it must be a number of at least 0"
            raise MaskError(msg)
        check_measure("threshold", self.by)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose the layers above the bound."""
        del outlook
        worths = worth(context, same_unit(self.by), owner=str(self), told=self._told)
        return {name: "full" for name in context.layers if worths[name] > self.above}
