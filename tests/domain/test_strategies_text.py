"""Strategies by name: what texts and config files mean, and what is refused."""

import json
import re
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorstore.domain.errors import MaskError
from tailorstore.domain.mask import MaskContext
from tailorstore.domain.records import MEASURES
from tailorstore.domain.strategies import (
    STRATEGIES,
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
    Threshold,
    TopK,
    Union,
    config_of,
    parse_bytes,
    parse_strategy,
    signature_of,
    strategy_from_config,
)

COUNTS = st.integers(1, 10**6)
MEASURE = st.sampled_from([*MEASURES, "importance"])
SIZE = st.one_of(st.integers(1, 10**13), st.sampled_from(["2GB", "500 MiB", "1.5kb", "1_000"]))

PLAIN = st.one_of(
    st.builds(All),
    st.builds(Light),
    st.builds(Parity, st.sampled_from(["even", "odd"])),
    st.builds(Filter, st.integers(0, 9), st.integers(0, 9), COUNTS, st.booleans()),
    st.builds(RoundRobin, COUNTS),
    st.builds(Staggered, COUNTS),
    st.builds(TopK, COUNTS, MEASURE, st.booleans()),
    st.builds(Threshold, st.one_of(st.integers(0, 9), st.floats(0, 1e300)), MEASURE),
    st.builds(Budget, SIZE, by=MEASURE, light=st.booleans(), aged=st.booleans()),
    st.builds(Budget, bytes_per_hour=SIZE, by=MEASURE, light=st.booleans(), aged=st.booleans()),
)
ANY = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.builds(Union, inner, inner),
        st.builds(Intersection, inner, inner),
        st.builds(MaxAge, inner, COUNTS, st.none() | COUNTS, st.booleans()),
        st.builds(MaxAge, inner, st.none(), COUNTS),
        st.builds(Anchor, inner, COUNTS),
        st.builds(LightRest, inner),
    ),
    max_leaves=8,
)


@given(ANY)
def test_the_text_of_a_strategy_parses_back_to_an_equal_one(strategy: Any) -> None:
    assert parse_strategy(str(strategy)) == strategy


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("parity", Parity()),
        (" all() ", All()),
        ("filter(first=2, last=2, every=5)", Filter(2, 2, 5)),
        ("filter(1, 3)", Filter(1, 3)),
        (
            "budget(bytes_per_commit='2GB', by='importance').max_age(commits=5)",
            Budget(2 * 10**9, by="importance").max_age(commits=5),
        ),
        ("max_age(budget('2GB'), commits=5)", Budget("2GB").max_age(5)),
        ("max_age(inner=light, steps=5)", Light().max_age(steps=5)),
        ("top_k(8, by='drift') | parity()", TopK(8) | Parity()),
        ("all & light | parity", (All() & Light()) | Parity()),
        ("all & (light | parity)", All() & (Light() | Parity())),
        ("(all | light).anchor(20).light_rest()", (All() | Light()).anchor(20).light_rest()),
        ("union(all, light)", All() | Light()),
        ("threshold(above=1e-3)", Threshold(0.001)),
        ("top_k(8, aged=False)", TopK(8, aged=False)),
        ("budget('2GB', aged=False)", Budget("2GB", aged=False)),
    ],
)
def test_texts(text: str, strategy: Any) -> None:
    assert parse_strategy(text) == strategy


def test_the_texts_are_short() -> None:
    assert str(Filter()) == "filter()"
    assert str(Budget("2GB", by="drift").max_age(commits=5) | Parity()) == (
        "budget(bytes_per_commit=2000000000, by='drift').max_age(commits=5) | parity()"
    )


def test_every_name_is_the_one_in_the_texts() -> None:
    assert sorted(STRATEGIES) == [
        "all",
        "anchor",
        "budget",
        "filter",
        "intersection",
        "light",
        "light_rest",
        "max_age",
        "parity",
        "round_robin",
        "staggered",
        "threshold",
        "top_k",
        "union",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no strategy"),
        ("parity(", "is no strategy"),
        ("paritty()", r"unknown strategy 'paritty'; nearest: 'parity'; known are all, light, parity"),
        ("top-k(8)", r"'top-k\(8\)' is no strategy"),
        ("8", "'8' is no strategy"),
        ("parity() + all()", "is no strategy"),
        ("top_k(8, by=drift)", "'drift' stands bare.*quotes"),
        ("top_k(8, by='drft')", "'drft'; nearest: 'drift'"),
        ("top_k(8, of='drift')", "top_k has no argument 'of'; known are k, by, aged"),
        ("top_k(8, bt='drift')", "no argument 'bt'; nearest: 'by'"),
        ("top_k()", "top_k needs k"),
        ("top_k(8, k=8)", "k is given twice"),
        ("top_k(1, 'drift', 3)", "aged is 3; it must be True or False"),
        ("top_k(1, 'drift', True, 4)", "4 arguments are too many; it takes k, by, aged"),
        ("top_k(1, _told=3)", "no argument '_told'"),
        ("all(3)", "1 arguments are too many; it takes none"),
        ("all(of=3)", "all has no arguments"),
        ("top_k(k=1, k=2)", "k is given twice"),
        ("top_k(-1)", "k is -1"),
        ("top_k(2.0)", r"k is 2\.0"),
        ("top_k([1])", r"'\[1\]' is no strategy"),
        ("top_k(*[1])", "is no strategy"),
        ("top_k(**{'k': 1})", r"\*\* has no meaning"),
        ("parity().top_k(3)", "'top_k' does not follow a strategy"),
        ("parity().__class__()", "unknown strategy '__class__'"),
        ("__import__('os').system('ls')", "unknown strategy 'system'"),
        ("parity.max_age", "is no strategy"),
        ("(lambda: 1)()", "is no strategy"),
        ("max_age(parity())", "neither commits nor steps"),
        ("max_age('parity()', 5)", r"inner is 'parity\(\)'"),
        ("budget('2 parsecs')", "2 parsecs.*'2GB'"),
        ("a\x00b", "is no strategy"),
        ("(" * 3000, "is no strategy"),
        ("x" * 20_000, "at most 10000 characters"),
        (" | ".join(["all"] * 500), "more than 100 deep"),
        ("all" + ".anchor(2)" * 500, "more than 100 deep"),
        (7, "a strategy is a text"),
    ],
)
def test_texts_that_are_no_strategies_are_refused(text: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        parse_strategy(text)


@given(st.text(alphabet="abflmopt_()|&.,='\"0123 *-", max_size=40))
def test_any_other_text_is_refused_in_the_same_way(text: str) -> None:
    try:
        parsed = parse_strategy(text)
    except MaskError:
        return
    assert parse_strategy(str(parsed)) == parsed


def test_a_config_file_describes_strategies_within_strategies() -> None:
    toml = """
    strategy = "union"
    right = "parity('odd')"
    [left]
    strategy = "max_age"
    commits = 5
    inner = { strategy = "budget", bytes_per_commit = "2GB", by = "drift", light = true }
    """
    expected = Budget("2GB", by="drift", light=True).max_age(commits=5) | Parity("odd")
    assert strategy_from_config(tomllib.loads(toml)) == expected
    assert strategy_from_config({"strategy": "filter", "first": 2}) == Filter(first=2)
    assert strategy_from_config(json.loads('{"strategy": "budget", "bytes_per_hour": 2e9}')) == Budget(
        bytes_per_hour=2 * 10**9
    )
    assert strategy_from_config("parity") == Parity()


@given(ANY)
def test_the_config_of_a_strategy_describes_an_equal_one(strategy: Any) -> None:
    config = json.loads(json.dumps(config_of(strategy)))
    assert strategy_from_config(config) == strategy


def test_strategies_of_others_have_no_config() -> None:
    class Mine:
        def select(self, context: MaskContext) -> list[str]:
            return list(context.layers)

    with pytest.raises(MaskError, match="has no name to be configured by"):
        config_of(Parity() | Mine())


@pytest.mark.parametrize("name", STRATEGIES)
def test_signatures_are_strategies_once_their_arguments_are_given(name: str) -> None:
    text = signature_of(name).replace("STRATEGY", "parity()")
    for argument, value in {"k": "3", "n": "4", "above": "0.5", "every": "5"}.items():
        text = re.sub(rf"(?<=[(, ]){argument}(?=[,)])", f"{argument}={value}", text)
    if "bytes_per_commit" in text or "commits" in text:
        text = text.replace("commit=None", "commit=5").replace("commits=None", "commits=5")
    assert type(parse_strategy(text)) is STRATEGIES[name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "describes no strategy"),
        ({"first": 2}, "describes no strategy"),
        ({"strategy": 3}, "describes no strategy"),
        (None, "describes no strategy"),
        ({"strategy": "filtr"}, "nearest: 'filter'"),
        ({"strategy": "filter", "firsts": 2}, "nearest: 'first'"),
        ({"strategy": "filter", 3: 2}, "no argument 3"),
        ({"strategy": "max_age", "inner": 3, "commits": 5}, "3 describes no strategy"),
        ({"strategy": "max_age", "commits": 5}, "max_age needs inner"),
        ({"strategy": "top_k", "k": 3, "by": ["drift"]}, "by is"),
    ],
)
def test_configs_that_describe_no_strategy_are_refused(config: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        strategy_from_config(config)


def test_configs_do_not_nest_without_end() -> None:
    config: dict[str, Any] = {"strategy": "light_rest"}
    config["inner"] = config
    with pytest.raises(MaskError, match="deep"):
        strategy_from_config(config)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (1, 1),
        ("1", 1),
        ("12 B", 12),
        ("2kB", 2000),
        ("2 KiB", 2048),
        ("0.5 MB", 500_000),
        ("500 MiB", 500 * 2**20),
        ("1_000_000", 10**6),
        ("3gb", 3 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("1 PB", 10**15),
        (2e9, 2 * 10**9),
    ],
)
def test_sizes(size: Any, count: int) -> None:
    assert parse_bytes(size) == count


@pytest.mark.parametrize(
    "size", ["", "B", "GB", "-1", "1 G", "1e9", "1,5 GB", "1.", "9" * 5000, 0, 0.5, None, b"1", "٣GB"]
)
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(MaskError, match="write bytes, at least 1"):
        parse_bytes(size)
