"""Strategies that go by the number of the commit alone."""

import heapq
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from tailorstore.domain.mask import MaskContext
from tailorstore.domain.strategies.ages import Outlook
from tailorstore.domain.strategies.checks import check_flag, check_one_of, check_whole
from tailorstore.domain.strategies.composing import Chosen, StrategyBase


@dataclass(frozen=True, slots=True)
class All(StrategyBase):
    """Every layer, in full."""

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose all."""
        del outlook
        return dict.fromkeys(context.layers, "full")


@dataclass(frozen=True, slots=True)
class Light(StrategyBase):
    """Every layer, light; in full where a light version is out of the question."""

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose all."""
        del outlook
        return dict.fromkeys(context.layers, "light")


@dataclass(frozen=True, slots=True)
class Parity(StrategyBase):
    """The layers at even places of the model at one commit, those at odd places at the next."""

    start: Literal["even", "odd"] = "even"
    """Which half commit 0 writes."""

    def __post_init__(self) -> None:
        """Refuse halves that there are not."""
        check_one_of("parity", "start", self.start, ("even", "odd"))

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose one half."""
        del outlook
        parity = (context.number + (self.start == "odd")) % 2
        return {name: "full" for place, name in enumerate(context.layers) if place % 2 == parity}


@dataclass(frozen=True, slots=True)
class RoundRobin(StrategyBase):
    """``k`` layers at each commit, in the model's order, starting over at its end."""

    k: int

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        check_whole("round_robin", "k", self.k)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose the next k."""
        del outlook
        names = list(context.layers)
        turn = {(context.number * self.k + offset) % len(names) for offset in range(min(self.k, len(names)))}
        return {name: "full" for place, name in enumerate(names) if place in turn}


@dataclass(frozen=True, slots=True)
class Filter(StrategyBase):
    """LLMTailor's filter: the ends of each stack of blocks at every commit, its middle at every n-th.

    A block is a layer whose name ends in a number and that has siblings (``h.0``, ``h.1``, …); a model may have
    several stacks. All other layers are auxiliaries: embeddings, final norm, head.
    """

    first: int = 2
    """Blocks at the beginning of each stack that every commit writes."""
    last: int = 2
    """Blocks at its end."""
    every: int = 5
    auxiliaries: bool = True
    """Whether every commit writes the auxiliaries; otherwise they go with the middle."""

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        for name, least in (("first", 0), ("last", 0), ("every", 1)):
            check_whole("filter", name, getattr(self, name), least)
        check_flag("filter", "auxiliaries", self.auxiliaries)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose all, or all but the middle."""
        del outlook
        if context.number % self.every == 0:
            return dict.fromkeys(context.layers, "full")
        stacks = stacks_of(context)
        blocks = {name for stack in stacks for name in stack}
        ends = {name for stack in stacks for name in (*stack[: self.first], *stack[max(0, len(stack) - self.last) :])}
        return {name: "full" for name in context.layers if name in ends or (self.auxiliaries and name not in blocks)}


def stacks_of(context: MaskContext) -> list[list[str]]:
    """Return the model's stacks of blocks, each in the order of its numbers."""
    stacks: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in context.layers:
        prefix, _, last = name.rpartition(".")
        if last.isdecimal() and last.isascii():
            stacks[prefix].append((int(last), name))
    return [[name for _, name in sorted(stack)] for stack in stacks.values() if len(stack) > 1]


@dataclass(frozen=True, slots=True)
class Staggered(StrategyBase):
    """One n-th of the layers in full at each commit, by bytes, and the rest light.

    Each layer is written in full once in n consecutive commits, and what is written in full differs between commits
    by at most the largest layer. There is never a full commit but the first.
    """

    n: int

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        check_whole("staggered", "n", self.n)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose all, the commit's part in full."""
        del outlook
        part = context.number % self.n
        return {name: "full" if of == part else "light" for name, of in _parts(context, self.n).items()}


def _parts(context: MaskContext, count: int) -> dict[str, int]:
    """Return for each layer the part that it belongs to: the largest first, each to what is smallest so far.

    By logical bytes, which stay as they are during a run, so the parts do as well.
    """
    sizes = sorted(enumerate(context.layers.values()), key=lambda placed: (-placed[1].bytes_logical, placed[0]))
    parts = [(0, part) for part in range(min(count, len(sizes)))]
    found: dict[str, int] = {}
    for _, state in sizes:
        total, part = heapq.heappop(parts)
        found[state.name] = part
        heapq.heappush(parts, (total + state.bytes_logical, part))
    return {name: found[name] for name in context.layers}
