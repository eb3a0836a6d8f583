"""What all strategies share, and the strategies that are made of others."""

import re
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from typing import Any

from tailorstore.domain.errors import MaskError
from tailorstore.domain.mask import MaskContext, Strategy, resolve_mask
from tailorstore.domain.records import Fidelity
from tailorstore.domain.strategies.ages import AgeBound, Outlook
from tailorstore.domain.strategies.checks import check_flag, check_strategy, check_whole

Chosen = dict[str, Fidelity]


class StrategyBase(ABC):
    """A frozen dataclass that chooses layers; joined by ``|`` and ``&``, bounded by its methods.

    Its text (``str``) is what :func:`parse_strategy` makes an equal strategy of.
    """

    __slots__ = ()

    def select(self, context: MaskContext) -> Chosen:
        """Return the layers to write and how.

        Raises:
            MaskError: a budget is too small for what a bound of age makes due.
        """
        return self.choose(context, Outlook())

    @abstractmethod
    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Return the layers to write and how, knowing what stands around this strategy.

        Whoever set a bound adds what is due and not chosen; only a strategy that must count it looks at the outlook.
        """

    def max_age(self, commits: int | None = None, steps: int | None = None, *, full: bool = False) -> "MaxAge":
        """Return this strategy with a bound on the age of every layer."""
        return MaxAge(self, commits, steps, full)

    def anchor(self, every: int) -> "Anchor":
        """Return this strategy with a full commit of everything every so many commits."""
        return Anchor(self, every)

    def light_rest(self) -> "LightRest":
        """Return this strategy with everything that it leaves out written light."""
        return LightRest(self)

    def __or__(self, other: Strategy) -> "Union":
        return Union(self, other) if isinstance(other, Strategy) else NotImplemented

    def __and__(self, other: Strategy) -> "Intersection":
        return Intersection(self, other) if isinstance(other, Strategy) else NotImplemented

    def __str__(self) -> str:
        shown = ", ".join(
            f"{name}={value if isinstance(value, Strategy) else repr(value)}"
            for name, value in given_arguments(self).items()
        )
        return f"{name_of(type(self))}({shown})"


def given_arguments(strategy: StrategyBase) -> dict[str, Any]:
    """Return the arguments of a strategy, without those that are what they are by default."""
    given = [(field, getattr(strategy, field.name)) for field in fields(strategy) if field.init]  # type: ignore[arg-type]
    return {field.name: value for field, value in given if field.default is MISSING or value != field.default}


def name_of(strategy: type[StrategyBase]) -> str:
    """Return the name of a strategy in texts and config files.

    Examples:
        >>> name_of(MaxAge)
        'max_age'
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", strategy.__name__).lower()


def chosen_by(strategy: Strategy, context: MaskContext, outlook: Outlook) -> Chosen:
    """Ask any strategy, also one that knows nothing of outlooks."""
    if isinstance(strategy, StrategyBase):
        return strategy.choose(context, outlook)
    return resolve_mask(strategy, context)


@dataclass(frozen=True, slots=True)
class Union(StrategyBase):
    """What either chooses; in full if one of them says so."""

    left: Strategy
    right: Strategy

    def __post_init__(self) -> None:
        """Refuse what is no strategy."""
        _check_pair(self)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose with both."""
        left, right = (chosen_by(strategy, context, outlook) for strategy in (self.left, self.right))
        return {
            name: "full" if "full" in (left.get(name), right.get(name)) else "light"
            for name in context.layers
            if name in left or name in right
        }

    def __str__(self) -> str:
        return f"{self.left} | {_within(self.right, Union)}"


@dataclass(frozen=True, slots=True)
class Intersection(StrategyBase):
    """What both choose; light if one of them says so."""

    left: Strategy
    right: Strategy

    def __post_init__(self) -> None:
        """Refuse what is no strategy."""
        _check_pair(self)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose with both."""
        left, right = (chosen_by(strategy, context, outlook) for strategy in (self.left, self.right))
        return {
            name: "light" if "light" in (left[name], right[name]) else "full"
            for name in context.layers
            if name in left and name in right
        }

    def __str__(self) -> str:
        return f"{_within(self.left, Union)} & {_within(self.right, Union, Intersection)}"


@dataclass(frozen=True, slots=True)
class MaxAge(StrategyBase):
    """No layer of a composite is older than so many commits, or so many steps, whatever the strategy inside says.

    A light version is as fresh as a full one, unless ``full`` asks for the age of the newest full version. What is
    due and not chosen is written in full. A :class:`Budget` inside counts what is due, now and at the commits to
    come, against its bytes, and says so where it cannot hold it.

    Both bounds count from the last commit at which the layer was known to be current.
    """

    inner: Strategy
    commits: int | None = None
    steps: int | None = None
    full: bool = False

    def __post_init__(self) -> None:
        """Refuse bounds that mean nothing."""
        check_strategy("max_age", "inner", self.inner)
        if self.commits is None and self.steps is None:
            msg = "max_age: neither commits nor steps is given; write max_age(commits=5), max_age(steps=500) or both"
            raise MaskError(msg)
        for name in ("commits", "steps"):
            if (value := getattr(self, name)) is not None:
                check_whole("max_age", name, value)
        check_flag("max_age", "full", self.full)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose with the strategy inside, and whatever else is due."""
        bound = AgeBound(self.commits, self.steps, self.full)
        chosen = chosen_by(self.inner, context, outlook.bounded(bound))
        met = {name for name, fidelity in chosen.items() if fidelity == "full" or not self.full}
        added: Chosen = dict.fromkeys(bound.due(context, met), "full")
        return _in_order(context, chosen | added) if added else chosen

    def __str__(self) -> str:
        bounds = [f"{name}={value}" for name in ("commits", "steps") if (value := getattr(self, name)) is not None]
        return f"{_receiver(self.inner)}.max_age({', '.join(bounds + ['full=True'] * self.full)})"


@dataclass(frozen=True, slots=True)
class Anchor(StrategyBase):
    """Everything in full at every n-th commit of the branch; between them what the strategy inside says."""

    inner: Strategy
    every: int

    def __post_init__(self) -> None:
        """Refuse intervals that mean nothing."""
        check_strategy("anchor", "inner", self.inner)
        check_whole("anchor", "every", self.every)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose all, or with the strategy inside."""
        if context.number % self.every == 0:
            return dict.fromkeys(context.layers, "full")
        return chosen_by(self.inner, context, outlook.anchored(self.every))

    def __str__(self) -> str:
        return f"{_receiver(self.inner)}.anchor(every={self.every})"


@dataclass(frozen=True, slots=True)
class LightRest(StrategyBase):
    """What the strategy inside leaves out is written light: beyond its budget, if it has one."""

    inner: Strategy

    def __post_init__(self) -> None:
        """Refuse what is no strategy."""
        check_strategy("light_rest", "inner", self.inner)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose all, light where the strategy inside does not."""
        chosen = chosen_by(self.inner, context, outlook.only_full())
        return {name: chosen.get(name, "light") for name in context.layers}

    def __str__(self) -> str:
        return f"{_receiver(self.inner)}.light_rest()"


def _check_pair(pair: Union | Intersection) -> None:
    for name in ("left", "right"):
        check_strategy(name_of(type(pair)), name, getattr(pair, name))


def _within(strategy: Strategy, *weaker: type[StrategyBase]) -> str:
    return f"({strategy})" if isinstance(strategy, weaker) else str(strategy)


def _receiver(strategy: Strategy) -> str:
    return _within(strategy, Union, Intersection)


def _in_order(context: MaskContext, chosen: Chosen) -> Chosen:
    return {name: chosen[name] for name in context.layers if name in chosen}
