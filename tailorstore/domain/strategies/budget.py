"""A byte budget: the layers that are worth most within so many bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tailorstore.domain.errors import MaskError
from tailorstore.domain.mask import LayerState, MaskContext
from tailorstore.domain.records import Fidelity
from tailorstore.domain.strategies.ages import Outlook, Task, due_now
from tailorstore.domain.strategies.checks import check_flag, check_measure, parse_bytes, show_bytes
from tailorstore.domain.strategies.composing import Chosen, StrategyBase
from tailorstore.domain.strategies.knapsack import Option, choose
from tailorstore.domain.strategies.worth import finite, with_fallback, worth

LIGHT_WORTH = 0.95
"""Part of a full version's worth that a light one has: what it leaves is its own error."""

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Budget(StrategyBase):
    """The layers that a measure says most of, within a budget of bytes: a knapsack over measure per byte.

    Worth is the measure times the layer's age. A layer that took ten commits to get this far from its newest version
    will take as long again, so what writing it saves lasts: where the damage of layers grows as any one power of their
    age, the damage that composites carry in the long run is least for the bytes when each layer is written at the same
    measure × age per byte. It also brings every layer that moves at all to its turn.

    The first version of a layer is written whatever a budget says, and leaves the less for others. Sizes are those
    that the context expects.

    Within a :class:`MaxAge` the budget is spent so that no commit to come has more due than it may write. That never
    fails where it is at least the bytes of all layers, divided by one more than the bound's commits, plus the largest
    layer. A budget for a commit that no order of layers could keep is refused at the first commit; any other, once a
    commit has more due than its budget. Light versions need a full one every so often: with ``light``, a second bound
    with ``full=True`` spreads these, too.
    """

    bytes_per_commit: int | str | None = None
    bytes_per_hour: int | str | None = None
    """Of the time since the commit before; where that is unknown, only what is due is written."""
    by: str = "curvature"
    """A name of :data:`MEASURES`, or ``importance``; where layers lack it, curvature or drift."""
    light: bool = False
    """Whether layers may be written light, too."""
    aged: bool = True
    """Whether worth is the measure times the age; otherwise the measure alone: the least damage right now."""
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Take sizes as people write them; refuse those that mean nothing and unknown measures."""
        if (self.bytes_per_commit is None) == (self.bytes_per_hour is None):
            msg = "budget: give one of bytes_per_commit and bytes_per_hour, as in budget(bytes_per_commit='2GB')"
            raise MaskError(msg)
        for name in ("bytes_per_commit", "bytes_per_hour"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, parse_bytes(value, f"budget: {name}"))
        check_measure("budget", self.by)
        check_flag("budget", "light", self.light)
        check_flag("budget", "aged", self.aged)

    def choose(self, context: MaskContext, outlook: Outlook) -> Chosen:
        """Choose what is due, and what is worth most of the rest.

        Raises:
            MaskError: the layers due take more than the budget, or will; names budget, layers and bytes.
        """
        budget = self._bytes(context)
        stored = {name: state for name, state in context.layers.items() if state.source_step is not None}
        fresh: Chosen = {name: "full" for name in context.layers if name not in stored}
        free = max(0, (budget or 0) - sum(_size(context.layers[name], "full") for name in fresh))
        worths = worth(context, with_fallback(self.by), owner=str(self), told=self._told, aged=self.aged)
        worths = finite(context, worths)
        self._check_bounds(context, outlook)
        due: Chosen = {}
        for task in due_now(self._tasks(stored, context, outlook, worths), budget, free):
            due[task.layer] = "full" if "full" in (task.fidelity, due.get(task.layer)) else "light"
        taken = sum(_size(stored[name], fidelity) for name, fidelity in due.items())
        if budget is not None and taken > budget:
            raise MaskError(
                self._too_small(context, list(due), taken, "must be written at this commit, and take", taken)
            )
        chosen = fresh | due | self._bought(stored, due, worths, free - taken)
        return {name: chosen[name] for name in context.layers if name in chosen}

    def _bytes(self, context: MaskContext) -> int | None:
        """Return what this commit may write; ``None``: unknown."""
        if self.bytes_per_commit is not None:
            return int(self.bytes_per_commit)
        if context.seconds_since_commit is None:
            return None
        return int(int(self.bytes_per_hour or 0) * max(0.0, context.seconds_since_commit) / 3600)

    def _cheapest(self, state: LayerState) -> Fidelity:
        can_be_light = self.light and not state.due_full and state.bytes_light < _size(state, "full")
        return "light" if can_be_light else "full"

    def _tasks(
        self, stored: dict[str, LayerState], context: MaskContext, outlook: Outlook, worths: dict[str, float]
    ) -> list[Task]:
        """Return what the bounds of age ask for: of each layer some version, a full one, or both in turn."""
        deadlines = outlook.deadlines(context, full=False)
        full_deadlines = outlook.deadlines(context, full=True)
        tasks = []
        for name, state in stored.items():
            any_by, full_by = deadlines.get(name), full_deadlines.get(name)
            cheapest = self._cheapest(state)
            spent = 0
            if any_by is not None and not (full_by is not None and full_by <= any_by):
                spent = _size(state, cheapest)
                tasks.append(Task(name, cheapest, any_by, spent, worths[name] / max(1, spent)))
            if full_by is not None and not (spent and cheapest == "full"):
                size = _size(state, "full")
                tasks.append(Task(name, "full", full_by, size - spent, worths[name] / max(1, size)))
        return tasks

    def _bought(self, stored: dict[str, LayerState], due: Chosen, worths: dict[str, float], capacity: int) -> Chosen:
        """Return what to write beyond what is due, or more fully than is due."""
        offers: list[tuple[str, list[Fidelity], list[Option]]] = []
        for name, state in stored.items():
            have = due.get(name)
            if have == "full" or not worths[name]:
                continue
            cheapest = self._cheapest(state)
            fidelities: list[Fidelity] = ["full"] if have or cheapest == "full" else ["light", "full"]
            paid = _size(state, have) if have else 0
            got = LIGHT_WORTH if have else 0.0
            options = [
                (_size(state, fidelity) - paid, worths[name] * ((1.0 if fidelity == "full" else LIGHT_WORTH) - got))
                for fidelity in fidelities
            ]
            offers.append((name, fidelities, options))
        taken = choose([options for _, _, options in offers], max(0, capacity))
        return {
            name: fidelities[index] for (name, fidelities, _), index in zip(offers, taken, strict=True) if index >= 0
        }

    def _check_bounds(self, context: MaskContext, outlook: Outlook) -> None:
        """Refuse at the first commit a budget that no order of layers could keep within a bound of age."""
        if self.bytes_per_commit is None:
            return
        budget = int(self.bytes_per_commit)
        for full in (False, True):
            period = outlook.period(full=full)
            if period is None or not context.layers:
                continue
            least = {
                name: _size(state, "full" if full or not self.light else "light")
                for name, state in context.layers.items()
            }
            largest = max(least, key=lambda name: least[name])
            total = sum(least.values())
            if least[largest] > budget:
                what, layers, size = "must be written in one commit, and takes", [largest], least[largest]
            elif total > budget * period:
                what, layers, size = f"must be written once in {period} commits, and take", list(least), total
            else:
                continue
            # That much is enough whatever the sizes: see due_now.
            raise MaskError(self._too_small(context, layers, size, what, -(-total // period) + least[largest]))

    def _too_small(self, context: MaskContext, layers: Sequence[str], size: int, what: str, enough: int) -> str:
        more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
        of = "" if self.bytes_per_hour is None else f" ({show_bytes(int(self.bytes_per_hour))} an hour)"
        return (
            f"the budget of {show_bytes(self._bytes(context) or 0)} a commit{of} is too small for max_age at step"
            f" {context.step} on {context.branch!r}: {'layer' if len(layers) == 1 else 'layers'}"
            f" {', '.join(map(repr, layers[:_SHOWN]))}{more} {what} {show_bytes(size)}. Raise the budget to"
            f" {enough:_} bytes a commit{'' if self.light else ', let it write light versions (light=True)'}, or allow"
            " a greater age"
        )


def _size(state: LayerState, fidelity: Fidelity) -> int:
    """Return the bytes that a version is expected to take."""
    return state.bytes_light if fidelity == "light" else state.bytes_full or state.bytes_logical
