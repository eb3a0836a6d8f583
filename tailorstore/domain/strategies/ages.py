"""Ages of layers: when a bound makes a layer due, and what that asks of the commits before.

A layer has a *deadline*: how many commits may still leave it out. Whoever spends a budget must not wait for
deadlines to come, since all layers of a full commit reach them together: :func:`due_now` spreads the work.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from tailorstore.domain.mask import LayerState, MaskContext
from tailorstore.domain.records import Fidelity


@dataclass(frozen=True, slots=True)
class AgeBound:
    """No layer may be older than this after a commit."""

    commits: int | None
    steps: int | None
    full: bool
    """Whether the age is that of the newest full version; otherwise a light one is as fresh as a full one."""

    def deadline(self, state: LayerState, context: MaskContext, spacing: float) -> int | None:
        """Return how many commits, this one included, may leave a layer out; ``None`` if it was never stored.

        Args:
            state: of the layer.
            context: of the commit.
            spacing: steps from one commit to the next.
        """
        if state.source_step is None:
            return None
        since, step = state.commits_since, state.current_step
        if self.full and state.fidelity == "light":
            since, step = state.base_commits_since, state.base_step
        elif step is None:
            step = state.source_step
        if step is None:
            return 0
        left = math.inf if self.commits is None else self.commits - since
        if self.steps is not None:
            left = min(left, (self.steps - (context.step - step)) // spacing + 1)
        return max(0, int(left))

    def due(self, context: MaskContext, met: Collection[str]) -> list[str]:
        """Return the layers that would be too old after this commit, without those that ``met`` names."""
        spacing = spacing_of(context)
        return [
            name
            for name, state in context.layers.items()
            if name not in met and self.deadline(state, context, spacing) == 0
        ]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What stands around a strategy and concerns what it chooses now: bounds of age, and full commits to come."""

    bounds: tuple[AgeBound, ...] = ()
    anchors: tuple[int, ...] = ()
    """For each anchor, every how many commits there is a full one."""

    def bounded(self, bound: AgeBound) -> "Outlook":
        """Return the outlook with one more bound."""
        return replace(self, bounds=(*self.bounds, bound))

    def anchored(self, every: int) -> "Outlook":
        """Return the outlook with one more anchor."""
        return replace(self, anchors=(*self.anchors, every))

    def only_full(self) -> "Outlook":
        """Return the outlook of a strategy whose rest is written light: what asks for any version is met already."""
        return replace(self, bounds=tuple(bound for bound in self.bounds if bound.full))

    def deadlines(self, context: MaskContext, *, full: bool) -> dict[str, int]:
        """Return the earliest deadline of each layer that has one before the next full commit.

        Args:
            context: of the commit.
            full: which bounds to ask: those that only a full version meets, or the others.
        """
        asked = [bound for bound in self.bounds if bound.full is full]
        if not asked:
            return {}
        horizon = min((every - context.number % every for every in self.anchors), default=math.inf)
        spacing = spacing_of(context)
        found: dict[str, int] = {}
        for bound in asked:
            for name, state in context.layers.items():
                left = bound.deadline(state, context, spacing)
                if left is not None and left < found.get(name, horizon):
                    found[name] = left
        return found

    def period(self, *, full: bool) -> int | None:
        """Return in how many consecutive commits each layer must be written once; ``None``: there is no such rule."""
        periods = [bound.commits + 1 for bound in self.bounds if bound.full is full and bound.commits is not None]
        shortest = min(periods, default=None)
        return None if shortest is None or any(every <= shortest for every in self.anchors) else shortest


@dataclass(frozen=True, slots=True)
class Task:
    """A version of a layer that must be written by a deadline."""

    layer: str
    fidelity: Fidelity
    deadline: int
    """How many commits, this one included, may pass before it is written; 0: now."""
    bytes: int
    worth_per_byte: float
    """Decides between tasks of one deadline."""


def due_now(tasks: Sequence[Task], budget: int | None, free: int) -> list[Task]:
    """Return the tasks to do at this commit, so that each later one can be done in time within the budget.

    The earliest deadlines come first, as many as leave the rest no more than ``rate`` bytes a commit. If all layers
    together, over the number of commits within which each must be written, plus the largest layer, fit the budget,
    then with ``rate = budget − largest`` no commit ever has more to do than its budget: a commit takes at most
    ``rate`` bytes and what one layer goes beyond them, and leaves that to be true of the next. With less, the work is
    spread as evenly as layers of unequal sizes allow, which may or may not be enough.

    Args:
        tasks: at most one a layer and fidelity; where a layer has two, the later one takes the bytes that it adds.
        budget: bytes a commit, expected of the later ones too; ``None``: unknown.
        free: bytes that this commit has left.

    Returns:
        Those with deadline 0, whatever they take, and others within ``free``.
    """
    ordered = sorted(tasks, key=lambda task: (task.deadline, -task.worth_per_byte))
    chosen = [task for task in ordered if task.deadline == 0]
    if budget is None or not ordered:
        return chosen
    by_deadline = _cumulated(ordered)
    even = max(total / (deadline + 1) for deadline, total in by_deadline.items())
    rate = max(even, budget - max(task.bytes for task in ordered))
    needed = max(total - deadline * rate for deadline, total in by_deadline.items())
    taken = sum(task.bytes for task in chosen)
    left_out: set[str] = set()
    for task in ordered[len(chosen) :]:
        # Rates are floating-point numbers: less than a byte is no reason to write a layer.
        if taken > needed - 1:
            break
        if taken + task.bytes <= free and task.layer not in left_out:
            chosen.append(task)
            taken += task.bytes
        else:
            left_out.add(task.layer)
    return chosen


def _cumulated(ordered: Sequence[Task]) -> Mapping[int, int]:
    """Return for each deadline the bytes due by it."""
    found: dict[int, int] = {}
    total = 0
    for task in ordered:
        total += task.bytes
        found[task.deadline] = total
    return found


def spacing_of(context: MaskContext) -> float:
    """Return the steps from one commit to the next, as they were since the layer that is freshest."""
    ages = [
        (state.commits_since, context.step - state.current_step)
        for state in context.layers.values()
        if state.current_step is not None
    ]
    if not ages:
        return 1.0
    commits, steps = min(ages)
    return max(1.0, steps / (commits + 1))
