"""A multiple-choice knapsack: for each item nothing or one of its options, worth the most within a capacity.

Greedy by density, then a search among the items whose density is nearest to where the capacity ends: those are the
ones that greed gets wrong. The result is worth at least half of the optimum, and misses it by less than one item's
worth; it is the optimum with no more than ``CORE`` items, unless the search must drop partial solutions. The time is
that of sorting.
"""

from collections.abc import Sequence
from heapq import nlargest
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

CORE = 12
"""Items that the search decides anew."""

WIDTH = 64
"""Partial solutions that the search keeps: with more, those whose bound promises least are dropped."""

Option = tuple[int, float]
"""Size and worth, both of the whole option."""


class _Upgrade(NamedTuple):
    """From one option of an item to the next larger that is worth considering.

    A tuple, as a thousand of them are made at each commit, in the trainer's time.
    """

    item: int
    before: int
    after: int
    size: int
    worth: float
    density: float


_Trail = tuple[int, int, "_Trail"] | None
_Partial = tuple[int, float, _Trail]


def choose(items: Sequence[Sequence[Option]], capacity: int) -> list[int]:
    """Return for each item the index of the option to take, or -1.

    Deterministic; of equals the earlier item wins. Options that are worth nothing are never taken.

    Examples:
        >>> choose([[(10, 6.0)], [(20, 10.0)], [(30, 12.0)]], 50)
        [-1, 0, 0]
        >>> choose([[(2, 9.0), (20, 10.0)], [(2, 9.0), (20, 10.0)]], 22)
        [1, 0]
    """
    upgrades = [upgrade for item, options in enumerate(items) for upgrade in _hull(item, options, capacity)]
    upgrades.sort(key=lambda upgrade: -upgrade.density)
    broken = _broken(upgrades, capacity)
    start = [-1] * len(items)
    for upgrade in upgrades[:broken]:
        start[upgrade.item] = upgrade.after
    candidates = [_filled(items, start, upgrades, capacity), _best_alone(items, capacity)]
    if broken < len(upgrades):
        incumbent = max(_total(items, chosen)[1] for chosen in candidates)
        improved = _searched(items, start, _core(upgrades, broken), capacity, incumbent)
        candidates.append(_filled(items, improved, upgrades, capacity))
    return max(candidates, key=lambda chosen: _total(items, chosen)[1])


def _hull(item: int, options: Sequence[Option], capacity: int) -> list[_Upgrade]:
    """Return the upgrades of falling density that lead through an item's options."""
    path: list[_Upgrade] = []
    for index in sorted(range(len(options)), key=lambda index: (options[index][0], -options[index][1])):
        size, worth = options[index]
        if size > capacity:
            break
        while True:
            before, size_before, worth_before = (path[-1].after, *options[path[-1].after]) if path else (-1, 0, 0.0)
            density = (worth - worth_before) / max(1, size - size_before)
            if not path or density <= path[-1].density:
                break
            path.pop()
        if worth > worth_before:
            path.append(_Upgrade(item, before, index, size - size_before, worth - worth_before, density))
    return path


def _broken(upgrades: Sequence[_Upgrade], capacity: int) -> int:
    """Return the index of the first upgrade that does not fit any more."""
    for index, total in enumerate(accumulate(upgrade.size for upgrade in upgrades)):
        if total > capacity:
            return index
    return len(upgrades)


def _filled(
    items: Sequence[Sequence[Option]], start: Sequence[int], upgrades: Sequence[_Upgrade], capacity: int
) -> list[int]:
    """Add to a solution whatever still fits, densest first."""
    chosen = list(start)
    left = capacity - _total(items, chosen)[0]
    for upgrade in upgrades:
        if upgrade.size <= left and chosen[upgrade.item] == upgrade.before:
            chosen[upgrade.item] = upgrade.after
            left -= upgrade.size
    return chosen


def _best_alone(items: Sequence[Sequence[Option]], capacity: int) -> list[int]:
    """Return the solution of the single option that is worth most: greed may be left with crumbs."""
    chosen = [-1] * len(items)
    best = 0.0
    at: tuple[int, int] | None = None
    for item, options in enumerate(items):
        for index, (size, worth) in enumerate(options):
            if size <= capacity and worth > best:
                best, at = worth, (item, index)
    if at:
        chosen[at[0]] = at[1]
    return chosen


def _core(upgrades: Sequence[_Upgrade], broken: int) -> list[int]:
    """Return the items nearest to where the capacity ends, densest first."""
    near = sorted(range(len(upgrades)), key=lambda index: (abs(index - broken), index))
    core: dict[int, int] = {}
    for index in near:
        core.setdefault(upgrades[index].item, index)
        if len(core) == CORE:
            break
    return sorted(core, key=lambda item: core[item])


def _searched(
    items: Sequence[Sequence[Option]], start: Sequence[int], core: Sequence[int], capacity: int, incumbent: float
) -> list[int]:
    """Decide the items of the core anew, the others staying as they are.

    What is kept from item to item are partial solutions of which none is both larger and worth less than another, and
    each of which could still beat the incumbent.
    """
    chosen = list(start)
    for item in core:
        chosen[item] = -1
    size, worth = _total(items, chosen)
    densities = [max((w / max(1, s) for s, w in items[item] if s <= capacity), default=0.0) for item in core]
    ahead = [*reversed(list(accumulate(reversed(densities), max))), 0.0]
    partials: list[_Partial] = [(size, worth, None)]
    for at, item in enumerate(core):
        grown = list(partials)
        for index, (more, extra) in enumerate(items[item]):
            grown += [
                (size + more, worth + extra, (item, index, trail))
                for size, worth, trail in partials
                if size + more <= capacity
            ]
        partials = _promising(grown, capacity, ahead[at + 1], incumbent)
    best = max(partials, key=itemgetter(1), default=None)
    if best is None:
        return list(start)
    trail = best[2]
    while trail is not None:
        item, index, trail = trail
        chosen[item] = index
    return chosen


def _promising(grown: list[_Partial], capacity: int, density: float, incumbent: float) -> list[_Partial]:
    """Keep what could still become worth more than the incumbent, if the rest were of the given density."""
    kept: list[_Partial] = []
    best = -1.0
    for partial in sorted(grown, key=lambda partial: (partial[0], -partial[1])):
        size, worth, _ = partial
        if worth > best:
            best = worth
            if worth + (capacity - size) * density > incumbent:
                kept.append(partial)
    if len(kept) > WIDTH:
        kept = nlargest(WIDTH, kept, key=lambda partial: partial[1] + (capacity - partial[0]) * density)
    return kept


def _total(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Option:
    """Return the size and worth of a solution."""
    size, worth = 0, 0.0
    for options, index in zip(items, chosen, strict=True):
        if index >= 0:
            size += options[index][0]
            worth += options[index][1]
    return size, worth
