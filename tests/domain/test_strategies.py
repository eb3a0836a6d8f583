"""Strategies: which layers each chooses, and what is refused."""

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tailorstore.domain.strategies as package
from tailorstore.domain.errors import MaskError
from tailorstore.domain.mask import LayerState, MaskContext, Strategy, resolve_mask
from tailorstore.domain.records import LayerMeasures
from tailorstore.domain.strategies import (
    All,
    Anchor,
    Budget,
    Filter,
    Intersection,
    Light,
    LightRest,
    MaxAge,
    Parity,
    RoundRobin,
    Staggered,
    StrategyBase,
    Threshold,
    TopK,
    Union,
)
from tests.domain.simulated import Branch, measures, model

UNKNOWN = LayerMeasures(None, None, None, None, None)
INFINITE = LayerMeasures(None, None, None, None, None, finite=False)


def context(layers: Mapping[str, LayerMeasures | None], number: int = 7, **others: Any) -> MaskContext:
    states = {
        name: LayerState(name, 100, 60, "full", 60, 0, 60, 0, None, False, 100, 10, measured)
        for name, measured in layers.items()
    }
    return MaskContext("main", 70, {name: replace(state, **others) for name, state in states.items()}, {}, number)


def names(strategy: Strategy, given_context: MaskContext) -> list[str]:
    return list(resolve_mask(strategy, given_context))


# --- By the number of the commit


def test_parity_writes_every_layer_once_in_two_commits() -> None:
    layers = dict.fromkeys("abcde")
    assert names(Parity(), context(layers, 0)) == ["a", "c", "e"]
    assert names(Parity(), context(layers, 1)) == ["b", "d"]
    assert names(Parity("odd"), context(layers, 0)) == ["b", "d"]
    assert names(Parity("odd"), context(layers, 1)) == ["a", "c", "e"]


def test_the_filter_writes_ends_and_auxiliaries_always_and_the_middle_every_nth_time() -> None:
    stack = [f"model.layers.{at}" for at in (0, 1, 2, 10, 9, 3)]
    layers = dict.fromkeys(["model.embed_tokens", *stack, "model.norm", "lm_head"])
    chosen = names(Filter(first=1, last=2, every=5), context(layers, 6))
    # By number, not by place: 9 and 10 are the last two.
    assert chosen == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.10",
        "model.layers.9",
        "model.norm",
        "lm_head",
    ]
    assert names(Filter(first=1, last=2, every=5), context(layers, 10)) == list(layers)
    assert names(Filter(first=0, last=1, every=5, auxiliaries=False), context(layers, 6)) == ["model.layers.10"]


def test_every_stack_has_its_own_ends_and_a_number_alone_makes_no_stack() -> None:
    encoder, decoder = ([f"{part}.h.{at}" for at in range(5)] for part in ("encoder", "decoder"))
    layers = dict.fromkeys([*encoder, *decoder, "heads.0"])
    assert names(Filter(first=1, last=1), context(layers)) == [
        "encoder.h.0",
        "encoder.h.4",
        "decoder.h.0",
        "decoder.h.4",
        "heads.0",
    ]


@given(st.integers(1, 12), st.integers(1, 15))
def test_round_robin_comes_to_every_layer_before_it_comes_to_one_again(count: int, k: int) -> None:
    layers = {f"h.{at}": None for at in range(count)}
    turns = [names(RoundRobin(k), context(layers, number)) for number in range(count)]
    assert {len(turn) for turn in turns} == {min(k, count)}
    rounds = -(-count // k)
    assert {name for turn in turns[:rounds] for name in turn} == set(layers)
    if k <= count:
        written = Counter(chain.from_iterable(turns))
        assert set(written.values()) == {k}  # in as many commits as there are layers, each k times


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 50))
def test_staggered_writes_each_layer_in_full_once_in_n_commits_and_keeps_the_bandwidth_level(
    sizes: list[int], n: int, since: int
) -> None:
    layers = {f"h.{at}": LayerState(f"h.{at}", size, 1) for at, size in enumerate(sizes)}
    full: list[list[str]] = []
    for number in range(since, since + n):
        mask = Staggered(n).select(MaskContext("main", 9, layers, {}, number))
        assert mask.keys() == layers.keys()
        full.append([name for name, how in mask.items() if how == "full"])
    assert sorted(name for part in full for name in part) == sorted(layers)
    totals = [sum(layers[name].bytes_logical for name in part) for part in full]
    assert max(totals) - min(totals) <= max(sizes)


def test_staggered_over_more_commits_than_layers_costs_no_more_than_the_layers() -> None:
    layers = {name: LayerState(name, 9 - at, 1) for at, name in enumerate("abc")}
    for number, full in ((0, ["a"]), (2, ["c"]), (3, []), (10**12 - 1, []), (10**12 + 1, ["b"])):
        mask = Staggered(10**12).select(MaskContext("main", 9, layers, {}, number))
        assert [name for name, how in mask.items() if how == "full"] == full


def test_light_and_the_rest_of_a_strategy_are_light() -> None:
    layers = dict.fromkeys("ab")
    assert Light().select(context(layers)) == {"a": "light", "b": "light"}
    assert Parity().light_rest().select(context(layers, 0)) == {"a": "full", "b": "light"}


# --- By measures


def test_top_k_and_threshold_go_by_the_measure() -> None:
    layers: dict[str, LayerMeasures | None] = {
        "a": measures(1.0, gradient=9.0),
        "b": measures(3.0, gradient=2.0),
        "c": measures(2.0, gradient=4.0),
    }
    assert names(TopK(2), context(layers)) == ["b", "c"]
    assert names(TopK(2, "gradient"), context(layers)) == ["a", "c"]
    assert names(TopK(9), context(layers)) == ["a", "b", "c"]
    assert names(Threshold(2.0), context(layers)) == ["b"]
    assert names(Threshold(4.0, "gradient"), context(layers)) == ["a"]
    assert names(TopK(1, "importance"), context(layers, importance=5.0)) == ["a"]


def test_age_counts_as_much_as_the_measure_unless_told_otherwise() -> None:
    layers = {
        name: LayerState(name, 100, 1, "full", 1, age - 1, bytes_full=100, due_full=False, measures=measures(figure))
        for name, age, figure in (("fast", 1, 5.0), ("slow", 4, 2.0), ("still", 90, 0.0), ("slower", 9, 0.5))
    }
    given_context = MaskContext("main", 9, layers)
    assert names(TopK(1), given_context) == ["slow"]
    assert names(TopK(2), given_context) == ["fast", "slow"]
    assert names(TopK(1, aged=False), given_context) == ["fast"]
    for strategy in (Budget(100), Budget(199)):
        assert names(strategy, given_context) == ["slow"]
        assert names(replace(strategy, aged=False), given_context) == ["fast"]
    # A bound is in the measure's unit, whatever the age.
    assert names(Threshold(2.0, "curvature"), given_context) == ["fast"]


def test_without_ages_a_slow_layer_starves_and_with_them_it_has_its_turn() -> None:
    def written(strategy: Strategy) -> set[str]:
        ages = dict.fromkeys("abc", 0)
        found: set[str] = set()
        for _ in range(60):
            # Each layer moves at its own constant speed from its newest version.
            layers = {
                name: LayerState(name, 100, 1, "full", 1, age, bytes_full=100, measures=measures(speed * (age + 1)))
                for (name, age), speed in zip(ages.items(), (100.0, 50.0, 0.1), strict=True)
            }
            chosen = strategy.select(MaskContext("main", 9, layers))
            found |= set(chosen)
            ages = {name: 0 if name in chosen else age + 1 for name, age in ages.items()}
        return found

    assert written(TopK(1)) == written(Budget(100)) == set("abc")
    assert written(TopK(1, aged=False)) == written(Budget(100, aged=False)) == set("ab")


def test_layers_of_which_nothing_is_known_or_with_nan_are_the_most_urgent() -> None:
    layers: dict[str, LayerMeasures | None] = {
        "a": measures(1e300),
        "never measured": None,
        "no baseline": UNKNOWN,
        "nan": INFINITE,
        "nan in a figure": measures(math.nan),
        "frozen": measures(0.0),
    }
    urgent = ["never measured", "no baseline", "nan"]
    assert names(TopK(3, "curvature"), context(layers)) == urgent
    assert names(Threshold(1e308), context({**layers, "a": None})) == ["a", *urgent, "nan in a figure"]
    assert set(urgent) <= set(names(Budget(500), context(layers)))


def test_urgent_layers_take_turns_by_age_and_bytes() -> None:
    layers = {
        name: LayerState(name, size, 1, "full", 1, since, bytes_full=size)
        for name, size, since in (("old", 10, 9), ("new and large", 50, 0), ("new", 10, 0))
    }
    assert names(TopK(1), MaskContext("main", 9, layers)) == ["old"]
    assert names(Budget(20), MaskContext("main", 9, layers)) == ["old", "new"]
    assert names(Budget(50), MaskContext("main", 9, layers)) == ["old", "new"]


def test_a_missing_measure_falls_back_for_all_layers_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    layers: dict[str, LayerMeasures | None] = {
        "a": measures(1.0, curvature=7.0),
        "b": measures(2.0, curvature=None),
        "frozen": LayerMeasures(0.0, 0.0, None, None, None),
    }
    strategy = TopK(1, "importance")
    with caplog.at_level(logging.WARNING, "tailorstore"):
        assert names(strategy, context(layers)) == ["b"]
        assert names(strategy, context(layers)) == ["b"]
        assert [record.message for record in caplog.records] == [
            "top_k(k=1, by='importance'): not every layer has importance at step 70; going by drift"
        ]
        # Another measure is another matter.
        layers["b"] = measures(2.0, curvature=3.0)
        assert names(strategy, context(layers)) == ["a"]
        assert len(caplog.records) == 2
    assert strategy == TopK(1, "importance")
    assert hash(strategy) == hash(TopK(1, "importance"))


def test_a_threshold_knows_no_other_unit_and_writes_what_lacks_the_figure(caplog: pytest.LogCaptureFixture) -> None:
    layers: dict[str, LayerMeasures | None] = {
        "a": measures(1.0),
        "b": measures(1.0, gradient=None, curvature=9.0),
        "frozen": LayerMeasures(0.0, 0.0, None, None, None),
    }
    with caplog.at_level(logging.WARNING, "tailorstore"):
        assert names(Threshold(2.0, "gradient"), context(layers)) == ["b"]
    assert "layer 'b' has no gradient" in caplog.text
    assert names(Threshold(2.0, "importance"), context(layers)) == ["b"]


# --- Joined


LAYERS = dict.fromkeys("abcd")


class Third:
    """A strategy that knows only the protocol."""

    def select(self, context: MaskContext) -> dict[str, bool | str]:
        return {"[ab]": "light", "d": context.number == 7}  # a glob among them


def test_a_union_takes_the_fuller_and_an_intersection_the_lighter() -> None:
    even, light = Parity("odd"), Light()
    assert (even | light).select(context(LAYERS)) == {"a": "full", "b": "light", "c": "full", "d": "light"}
    assert (even & light).select(context(LAYERS)) == {"a": "light", "c": "light"}
    assert (even & All()).select(context(LAYERS)) == {"a": "full", "c": "full"}
    assert isinstance(even | light, Union)
    assert isinstance(even & light, Intersection)


def test_strategies_of_others_can_be_joined() -> None:
    third: Any = Third()
    assert (Parity("odd") | third).select(context(LAYERS)) == {"a": "full", "b": "light", "c": "full", "d": "full"}
    assert MaxAge(third, commits=1).select(context(LAYERS, commits_since=1)) == {
        "a": "light",
        "b": "light",
        "c": "full",
        "d": "full",
    }
    with pytest.raises(TypeError):
        Parity() | ["a"]  # type: ignore[operator]


def test_an_anchor_writes_everything_every_nth_time() -> None:
    assert names(Parity().anchor(every=7), context(LAYERS)) == list(LAYERS)
    assert names(Parity().anchor(every=3), context(LAYERS)) == ["b", "d"]


def test_max_age_writes_what_would_pass_the_bound_in_commits_or_steps() -> None:
    nothing = Threshold(1e9)
    still = dict.fromkeys("ab", measures(1.0))
    at_bound = context({**still}, commits_since=4, current_step=20, source_step=10)
    assert names(nothing, at_bound) == []
    assert names(nothing.max_age(commits=5), at_bound) == []
    assert names(nothing.max_age(commits=4), at_bound) == ["a", "b"]
    assert names(nothing.max_age(steps=50), at_bound) == []
    assert names(nothing.max_age(steps=49), at_bound) == ["a", "b"]
    assert names(nothing.max_age(commits=9, steps=49), at_bound) == ["a", "b"]


def test_a_light_version_is_fresh_unless_a_full_one_is_asked_for() -> None:
    given_context = context({"a": measures(1.0)}, fidelity="light", base_step=10, base_commits_since=6, commits_since=0)
    assert Threshold(9).max_age(commits=5).select(given_context) == {}
    assert Threshold(9).max_age(commits=5, full=True).select(given_context) == {"a": "full"}
    assert Light().max_age(commits=5).select(given_context) == {"a": "light"}
    assert Light().max_age(commits=5, full=True).select(given_context) == {"a": "full"}
    assert Light().max_age(steps=60, full=True).select(given_context) == {"a": "light"}
    assert Light().max_age(steps=59, full=True).select(given_context) == {"a": "full"}


PLAIN = [All(), Light(), Parity(), Filter(1, 1, 4), RoundRobin(3), Staggered(3), TopK(2), Threshold(2.0)]


def joined(*plain: Strategy) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.sampled_from(plain),
        lambda inner: st.one_of(
            st.builds(Union, inner, inner),
            st.builds(Intersection, inner, inner),
            st.builds(LightRest, inner),
            st.builds(Anchor, inner, st.integers(2, 5)),
        ),
        max_leaves=4,
    )


@given(joined(*PLAIN), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_a_bound_around_anything_without_a_budget_holds(inner: Any, commits: int, full: bool, seed: int) -> None:
    branch = Branch(model(5), seed)
    strategy = inner.max_age(commits=commits, full=full)
    for _ in range(15):
        branch.commit(strategy)
        assert branch.oldest(full=full) <= commits


@given(joined(*PLAIN, Budget(300), Budget(300, light=True)), st.integers(0, 99), st.integers(0, 20))
def test_equal_contexts_give_equal_masks_in_the_order_of_the_model(
    strategy: StrategyBase, seed: int, number: int
) -> None:
    branch = Branch(model(5), seed)
    for _ in range(number % 4):
        branch.commit(strategy)
    chosen = strategy.select(branch.context())
    assert chosen == strategy.select(branch.context())
    assert list(chosen) == [name for name in branch.sizes if name in chosen]


def test_no_strategy_minds_a_model_without_layers_or_a_branch_without_commits() -> None:
    for strategy in (All(), Light(), Parity(), Filter(), RoundRobin(2), Staggered(2), TopK(1), Threshold(0), Budget(1)):
        assert strategy.max_age(commits=2).anchor(4).select(MaskContext("main", 0, {})) == {}
    first = Branch(model(5)).context()
    assert names(Budget(500), first) == list(first.layers)
    assert names(TopK(2).max_age(steps=3), first) == ["embed", "head"]


def test_layers_may_come_and_go_between_commits() -> None:
    strategy = Budget(400).max_age(commits=6)
    rng = random.Random(1)
    branch = Branch(model(10))
    for _ in range(40):
        gone = f"h.{rng.randrange(10)}"
        branch.sizes = {name: size for name, size in model(10).items() if name != gone}
        branch.written.pop(gone, None)
        assert branch.bytes(branch.commit(strategy)) <= 400
        assert branch.oldest() <= 6


# --- Refused

untyped: Any = package


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: untyped.Parity("evn"), "start is 'evn'; nearest: 'even'"),
        (lambda: untyped.Filter(first=-1), "first is -1"),
        (lambda: untyped.Filter(every=0), "every is 0"),
        (lambda: untyped.Filter(auxiliaries="no"), "auxiliaries is 'no'; it must be True or False"),
        (lambda: untyped.TopK(0), "k is 0; it must be a whole number of at least 1"),
        (lambda: untyped.TopK(True), "k is True"),
        (lambda: untyped.TopK(2.0), r"k is 2\.0"),
        (lambda: untyped.TopK(2, "drif"), "by is 'drif'; nearest: 'drift'.*known are .*curvature, importance"),
        (lambda: untyped.TopK(2, ["drift"]), "by is"),
        (lambda: untyped.Threshold(-1), "above is -1"),
        (lambda: untyped.Threshold(math.nan), "above is nan"),
        (lambda: untyped.Threshold(True), "above is True"),
        (lambda: untyped.RoundRobin(-3), "k is -3"),
        (lambda: untyped.Staggered(0), "n is 0"),
        (lambda: untyped.Budget(), "give one of"),
        (lambda: untyped.Budget(1, 2), "give one of"),
        (lambda: untyped.Budget(0), "bytes_per_commit is 0"),
        (lambda: untyped.Budget(-5), "bytes_per_commit is -5"),
        (lambda: untyped.Budget(True), "bytes_per_commit is True"),
        (lambda: untyped.Budget("2 gigs"), "bytes_per_commit is '2 gigs'"),
        (lambda: untyped.Budget("1__0"), "bytes_per_commit is '1__0'"),
        (lambda: untyped.Budget("0.4 B"), "bytes_per_commit is"),
        (lambda: untyped.Budget(math.inf), "bytes_per_commit is inf"),
        (lambda: untyped.Budget(5, by="norm"), "by is 'norm'"),
        (lambda: untyped.Budget(5, light=1), "light is 1"),
        (lambda: untyped.Parity().max_age(), "neither commits nor steps"),
        (lambda: untyped.Parity().max_age(0), "commits is 0"),
        (lambda: untyped.Parity().max_age(steps=-1), "steps is -1"),
        (lambda: untyped.Parity().max_age(1, full=3), "full is 3"),
        (lambda: untyped.Parity().anchor(0), "every is 0"),
        (lambda: untyped.MaxAge("parity", 5), "inner is 'parity'"),
        (lambda: untyped.MaxAge(Parity, 5), "inner is <class"),
        (lambda: untyped.Union(untyped.Parity(), None), "right is None"),
        (lambda: untyped.Intersection("*", Parity()), r"left is '\*'"),
        (lambda: untyped.LightRest(3), "inner is 3"),
        (lambda: untyped.Anchor(None, 3), "inner is None"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        make()
