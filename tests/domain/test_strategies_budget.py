"""Budgets: the knapsack against every possibility, and bounds of age that are kept within the bytes."""

import math
import random
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tailorstore.domain.errors import MaskError
from tailorstore.domain.mask import LayerState, MaskContext
from tailorstore.domain.strategies import Budget
from tailorstore.domain.strategies.ages import Task, due_now
from tailorstore.domain.strategies.knapsack import CORE, Option, choose
from tests.domain.simulated import Branch, measures, model

# --- The knapsack


def total(items: list[list[Option]], chosen: list[int]) -> Option:
    taken = [options[index] for options, index in zip(items, chosen, strict=True) if index >= 0]
    return sum(size for size, _ in taken), math.fsum(worth for _, worth in taken)


def optimum(items: list[list[Option]], capacity: int) -> float:
    every = product(*(range(-1, len(options)) for options in items))
    return max(worth for size, worth in (total(items, list(chosen)) for chosen in every) if size <= capacity)


def relaxed(items: list[list[Option]], capacity: int) -> float:
    """Return an upper bound of the optimum: by Lagrange's multiplier, the least that any price of a byte gives."""

    def bound(price: float) -> float:
        return capacity * price + sum(max(0.0, *(worth - price * size for size, worth in options)) for options in items)

    prices = {worth / size for options in items for size, worth in options}
    prices |= {
        (fuller[1] - lighter[1]) / (fuller[0] - lighter[0])
        for options in items
        for lighter, fuller in pairwise(options)
    }
    return min(bound(price) for price in prices | {0.0} if price >= 0)


def instance(rng: random.Random, count: int, *, light: bool) -> tuple[list[list[Option]], int]:
    kind = rng.choice(["any", "equal sizes", "dense", "one giant"])
    items: list[list[Option]] = []
    for at in range(count):
        size = 100 if kind == "equal sizes" else rng.randint(20, 1000) * (20 if kind == "one giant" and at == 0 else 1)
        worth = size * rng.uniform(0.9, 1.1) if kind == "dense" else rng.lognormvariate(0, 2)
        items.append([(size // 10, worth * 0.95), (size, worth)] if light else [(size, worth)])
    return items, rng.randint(10, sum(options[-1][0] for options in items))


@pytest.mark.parametrize("light", [False, True])
def test_few_layers_are_chosen_as_well_as_by_trying_every_possibility(light: bool) -> None:
    rng = random.Random(3)
    for _ in range(150):
        items, capacity = instance(rng, rng.randint(1, 6 if light else 9), light=light)
        chosen = choose(items, capacity)
        size, worth = total(items, chosen)
        assert size <= capacity
        assert worth == pytest.approx(optimum(items, capacity), rel=1e-9)


@pytest.mark.parametrize("light", [False, True])
def test_many_layers_miss_the_optimum_by_less_than_one_layers_worth_and_never_by_half(light: bool) -> None:
    rng = random.Random(4)
    lost = []
    for _ in range(60):
        items, capacity = instance(rng, rng.randint(CORE + 1, 150), light=light)
        chosen = choose(items, capacity)
        size, worth = total(items, chosen)
        assert size <= capacity
        bound = relaxed(
            [[option for option in options if option[0] <= capacity] or [(1, 0.0)] for options in items], capacity
        )
        dearest = max(worth for options in items for size, worth in options if size <= capacity)
        assert worth >= bound / 2
        assert worth >= bound - dearest * (1 + 1e-9)
        lost.append(1 - worth / bound)
    assert sum(lost) / len(lost) < 0.01


def test_the_search_mends_what_greed_gets_wrong() -> None:
    # By density: 60, then 50 does not fit, though 50 + 50 is worth more.
    assert choose([[(60, 66.0)], [(50, 52.0)], [(50, 52.0)]], 100) == [-1, 0, 0]
    # A small item of great density must not keep out a large one.
    assert choose([[(1, 2.0)], [(100, 100.0)]], 100) == [-1, 0]


def test_nothing_is_bought_that_is_worth_nothing_or_does_not_fit() -> None:
    assert choose([[(5, 0.0)], [(11, 3.0)], []], 10) == [-1, -1, -1]
    assert choose([[(0, 1.0)]], 0) == [0]
    assert choose([], 10) == []


# --- Budgets


def test_a_budget_buys_the_measure_at_the_least_bytes() -> None:
    layers = {
        name: LayerState(name, size, 1, "full", 1, 0, 1, 0, None, False, size, size // 10, measures(worth))
        for name, size, worth in (("dear", 100, 6.0), ("cheap", 20, 4.0), ("frozen", 1, 0.0), ("small", 10, 1.0))
    }
    context = MaskContext("main", 9, layers)
    assert Budget(30).select(context) == {"cheap": "full", "small": "full"}
    assert Budget(100).select(context) == {"dear": "full"}
    assert Budget(120).select(context) == {"dear": "full", "cheap": "full"}
    assert Budget(12, light=True).select(context) == {"dear": "light", "cheap": "light"}
    assert Budget(1000, light=True).select(context) == {"dear": "full", "cheap": "full", "small": "full"}
    layers["dear"] = replace(layers["dear"], due_full=True)
    assert Budget(20, light=True).select(context) == {"cheap": "light", "small": "full"}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_by_age_composites_carry_less_damage_for_the_bytes_in_the_long_run(power: int, seed: int) -> None:
    rng = random.Random(seed)
    sizes = {f"h.{at}": rng.randint(50, 200) for at in range(24)}
    speeds = {name: rng.lognormvariate(0, 1.5) for name in sizes}

    def carried(strategy: Budget) -> float:
        ages = dict.fromkeys(sizes, 0)
        total = 0.0
        for _ in range(200):
            damages = {name: speeds[name] * (age + 1) ** power for name, age in ages.items()}
            layers = {
                name: LayerState(
                    name, size, 1, "full", 1, ages[name], bytes_full=size, measures=measures(damages[name])
                )
                for name, size in sizes.items()
            }
            chosen = strategy.select(MaskContext("main", 9, layers))
            ages = {name: 0 if name in chosen else age + 1 for name, age in ages.items()}
            total += math.fsum(damage for name, damage in damages.items() if name not in chosen)
        return total

    assert carried(Budget(600)) < 0.95 * carried(Budget(600, aged=False))


def test_a_budget_by_the_hour_counts_the_time_since_the_last_commit() -> None:
    branch = Branch(model(5, block=100, outer=100))
    branch.commit(Budget(1))
    context = branch.context()
    by_hour = Budget(bytes_per_hour=3600)
    assert branch.bytes(by_hour.select(replace(context, seconds_since_commit=350.0))) in range(300, 351)
    assert by_hour.select(replace(context, seconds_since_commit=None)) == {}
    assert by_hour.select(replace(context, seconds_since_commit=0.0)) == {}
    old = {**context.layers, "h.1": replace(context.layers["h.1"], commits_since=9)}
    unknown = replace(context, layers=old, seconds_since_commit=None)
    assert by_hour.max_age(commits=5).select(unknown) == {"h.1": "full"}
    with pytest.raises(MaskError, match=r"budget of 99 bytes a commit \(3600 bytes an hour\).*'h\.1' must be written"):
        by_hour.max_age(commits=5).select(replace(unknown, seconds_since_commit=99.0))


def test_layers_never_stored_leave_less_for_others() -> None:
    branch = Branch({"a": 100, "b": 100})
    branch.commit(Budget(150))
    branch.sizes = {**branch.sizes, "new": 100}
    context = branch.context()
    assert Budget(150).select(context) == {"new": "full"}
    assert len(Budget(250).select(context)) == 2


SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=14)


def run(branch: Branch, strategy: Any, commits: int, budget: int) -> None:
    for _ in range(commits):
        assert branch.bytes(branch.commit(strategy)) <= budget


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 8), st.booleans(), st.integers(0, 999), st.floats(0, 2))
def test_within_its_promise_a_budget_keeps_every_bound_and_never_fails(
    sizes: list[int], commits: int, light: bool, seed: int, more: float
) -> None:
    branch = Branch({f"h.{at}": size for at, size in enumerate(sizes)}, seed)
    # Full ages cost full versions: the promise holds whether or not there are light ones besides.
    budget = int((math.ceil(sum(sizes) / (commits + 1)) + max(sizes)) * (1 + more))
    strategy = Budget(budget, light=light).max_age(commits=commits)
    for _ in range(100):
        assert branch.bytes(branch.commit(strategy)) <= budget
        assert branch.oldest() <= commits


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 8), st.integers(0, 999), st.floats(0.2, 1.5))
def test_any_budget_holds_with_the_bound_or_says_that_it_cannot(
    sizes: list[int], commits: int, seed: int, part: float
) -> None:
    branch = Branch({f"h.{at}": size for at, size in enumerate(sizes)}, seed)
    budget = max(1, int(sum(sizes) / (commits + 1) * part))
    strategy = Budget(budget).max_age(commits=commits)
    hopeless = max(sizes) > budget or sum(sizes) > budget * (commits + 1)
    if hopeless:
        # At once, and not when the first layers have become too old.
        with pytest.raises(MaskError, match=r"budget of .* too small for max_age at step 1000 on 'main'"):
            branch.commit(strategy)
        return
    for _ in range(100):
        try:
            written = branch.commit(strategy)
        except MaskError as error:
            assert "must be written at this commit" in str(error)  # noqa: PT017 - not every budget fails
            return
        assert branch.bytes(written) <= budget
        assert branch.oldest() <= commits


@pytest.mark.parametrize("seed", range(5))
def test_the_tightest_budget_that_can_hold_does_with_layers_of_one_size(seed: int) -> None:
    branch = Branch({f"h.{at}": 100 for at in range(24)}, seed)
    strategy = Budget(400).max_age(commits=5)
    for _ in range(100):
        assert branch.bytes(branch.commit(strategy)) <= 400
        assert branch.oldest() <= 5


def test_a_budget_that_has_bytes_to_spare_spends_them_by_worth_while_deadlines_are_far() -> None:
    branch = Branch(model(12))
    strategy = Budget(600, by="drift").max_age(commits=20)
    branch.commit(strategy)
    context = branch.context()
    assert strategy.select(context) == Budget(600, by="drift").select(context)


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(2, 5), st.integers(0, 99))
def test_light_versions_within_a_budget_keep_the_ages_of_both(sizes: list[int], commits: int, seed: int) -> None:
    full_commits = 4 * commits
    branch = Branch({f"h.{at}": size for at, size in enumerate(sizes)}, seed)
    # Enough for a light version of everything within one bound and a full one within the other.
    budget = math.ceil(sum(sizes) / (full_commits + 1) + sum(sizes) / 10 / (commits + 1) + 2 * max(sizes))
    assume(budget < sum(sizes))
    strategy = Budget(budget, light=True).max_age(commits=commits).max_age(commits=full_commits, full=True)
    for _ in range(80):
        assert branch.bytes(branch.commit(strategy)) <= budget
        assert branch.oldest() <= commits
        assert branch.oldest(full=True) <= full_commits


@pytest.mark.parametrize("inside", [False, True])
def test_full_commits_to_come_spare_a_budget_what_they_will_write(inside: bool) -> None:
    branch = Branch(model(12))
    budget = Budget(250)  # far too little for a bound of eight commits, but every sixth commit is full
    strategy = budget.anchor(6).max_age(commits=8) if inside else budget.max_age(commits=8).anchor(6)
    for number in range(30):
        written = branch.commit(strategy)
        assert branch.oldest() <= 8
        if number % 6:
            assert branch.bytes(written) <= 250
    branch = Branch(model(40))
    branch.commit(budget.max_age(commits=8).anchor(10))
    with pytest.raises(MaskError, match="must be written once in 9 commits"):
        branch.commit(budget.max_age(commits=8).anchor(10))


def test_bounds_in_steps_are_prepared_for_as_well() -> None:
    branch = Branch(model(12), spacing=50)
    # 500 steps are ten commits: eleven within which everything is written once.
    enough = math.ceil(sum(branch.sizes.values()) / 11) + 240
    strategy = Budget(enough).max_age(steps=500)
    for _ in range(60):
        assert branch.bytes(branch.commit(strategy)) <= enough
        assert branch.oldest() <= 10


def test_the_rest_that_is_light_meets_a_bound_without_the_budget() -> None:
    branch = Branch(model(12))
    strategy = Budget(240, by="drift").light_rest().max_age(commits=1)
    for _ in range(10):
        written = branch.commit(strategy)
        assert branch.bytes({name: how for name, how in written.items() if how == "full"}) <= 240
    assert branch.oldest() == 0


def test_the_error_says_what_would_be_enough_and_it_is() -> None:
    branch = Branch(model(12))
    with pytest.raises(
        MaskError,
        match=r"budget of 300 bytes .* layers 'embed', 'h\.0', 'h\.1', 'h\.2', 'h\.3' and 10 more must be written once"
        r" in 4 commits, and take 1681 bytes\. Raise the budget to 661 bytes",
    ):
        branch.commit(Budget(300).max_age(commits=3))
    run(branch, Budget(661).max_age(commits=3), 50, 661)
    with pytest.raises(MaskError, match=r"layer 'embed' must be written in one commit, and takes 240 bytes"):
        Branch(model(12)).commit(Budget(239).max_age(commits=99))


# --- What is due


def test_due_now_takes_the_worthiest_of_one_deadline_and_no_more_than_the_rest_can_spare() -> None:
    tasks = [Task(name, "full", 1, 100, worth) for name, worth in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    # Two commits, 300 bytes: with 200 a commit, one task now and two later.
    assert [task.layer for task in due_now(tasks, 200, 200)] == ["b", "c"]
    assert [task.layer for task in due_now(tasks, 300, 300)] == ["b"]
    assert due_now(tasks, 400, 400) == []
    assert due_now(tasks, None, 0) == []
    assert [task.layer for task in due_now([*tasks, Task("d", "full", 0, 900, 0.0)], 200, 200)] == ["d"]
