"""Retention: what each policy keeps, and why."""

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.records import Commit
from tailorstore.domain.retention import (
    Inventory,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepTagged,
    KeepWithin,
    RetentionPolicy,
    decide,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def commit(step: int, loss: float = math.nan, age_hours: float = 0) -> Commit:
    return Commit(f"c{step}", step, "main", None, NOW - timedelta(hours=age_hours), None, {"loss": loss}, (), 0, 0)


def inventory(
    *commits: Commit,
    tags: dict[str, str] | None = None,
    leased: frozenset[str] = frozenset(),
    unreachable: tuple[Commit, ...] = (),
) -> Inventory:
    line = sorted(commits, key=lambda c: -c.step)
    return Inventory(NOW, {"main": line}, unreachable, tags or {}, leased)


def kept(policy: RetentionPolicy | None, given_inventory: Inventory) -> list[int]:
    return sorted(int(commit_id[1:]) for commit_id in decide(given_inventory, policy).kept)


TEN = [
    commit(step, loss=abs(step - 35) if step != 50 else math.nan, age_hours=100 - step) for step in range(10, 101, 10)
]


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (None, list(range(10, 101, 10))),
        (KeepLast(3), [80, 90, 100]),
        (KeepEvery(25), [10, 30, 50, 80, 100]),
        (KeepBest("loss", 2), [30, 40, 100]),
        (KeepBest("loss", 1, mode="max"), [100]),
        (KeepWithin(timedelta(hours=20)), [80, 90, 100]),
        (KeepTagged(), [100]),
        (KeepLast(1) | KeepEvery(50) | KeepBest("loss"), [10, 40, 50, 100]),
    ],
)
def test_policies(policy: RetentionPolicy | None, steps: list[int]) -> None:
    assert kept(policy, inventory(*TEN)) == steps


def test_a_metric_that_no_commit_has_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"'los'.*'loss'"):
        kept(KeepBest("los", 3), inventory(*TEN))
    assert kept(KeepBest("los", 3), inventory()) == []


def test_nan_and_infinities_are_never_best() -> None:
    commits = [commit(1, math.nan), commit(2, -math.inf), commit(3, 5.0), commit(4, math.inf), commit(5)]
    assert kept(KeepBest("loss", 3), inventory(*commits)) == [3, 5]
    assert kept(KeepBest("loss", 3, mode="max"), inventory(*commits)) == [3, 5]


def test_reasons_add_up_and_protection_beats_every_policy() -> None:
    decision = decide(inventory(*TEN, tags={"best": "c20"}, leased=frozenset({"c30"})), KeepLast(1) | KeepEvery(100))
    assert decision.kept["c100"] == ("newest of main", "last 1 of 1 on main", "every 100 steps (100)")
    assert decision.kept["c20"] == ("tag best",)
    assert decision.kept["c30"] == ("in use (lease)",)
    assert {c.step for c in decision.expired} == {40, 50, 60, 70, 80, 90}


def test_commits_on_no_branch_go_unless_young_or_tagged() -> None:
    old, young, tagged = commit(1, age_hours=50), commit(2, age_hours=1), commit(3, age_hours=50)
    given_inventory = inventory(commit(4), unreachable=(old, young, tagged), tags={"t": "c3"})
    assert kept(KeepLast(10) | KeepWithin(timedelta(hours=2)), given_inventory) == [2, 3, 4]
    assert kept(None, given_inventory) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLast(0),
        lambda: KeepEvery(-1),
        lambda: KeepBest("x", 0),
        lambda: KeepLast(True),
        lambda: KeepWithin(timedelta(0)),
        lambda: KeepBest("x", 1, mode="least"),  # type: ignore[arg-type]
    ],
)
def test_policies_that_mean_nothing_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidInputError):
        make()


@given(st.lists(st.integers(0, 500), unique=True, min_size=1), st.integers(1, 9), st.integers(1, 90))
def test_joining_policies_keeps_the_union(steps: list[int], last: int, every: int) -> None:
    given_inventory = inventory(*map(commit, steps))
    union = set(kept(KeepLast(last), given_inventory)) | set(kept(KeepEvery(every), given_inventory))
    assert set(kept(KeepLast(last) | KeepEvery(every), given_inventory)) == union
    assert max(steps) in union


# --- Commits that hold a layer in quarantine


def spoiled(*steps: int) -> Inventory:
    return replace(inventory(*TEN), quarantined=frozenset(f"c{step}" for step in steps))


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        # Three that can be restored, although the newest three cannot be; the head stays, as heads do.
        (KeepLast(3), [50, 60, 70, 100]),
        (KeepBest("loss", 2), [30, 40, 100]),
        (KeepEvery(50), [10, 50, 100]),
        (KeepWithin(timedelta(hours=40)), [60, 70, 100]),
        (KeepTagged(), [100]),
        (None, list(range(10, 101, 10))),
    ],
)
def test_commits_in_quarantine_are_neither_kept_by_policies_nor_counted(
    policy: RetentionPolicy | None, steps: list[int]
) -> None:
    assert kept(policy, spoiled(80, 90, 100)) == steps


def test_the_best_that_is_whole_outlives_better_ones_in_quarantine() -> None:
    assert kept(KeepBest("loss", 1), spoiled(30, 40)) == [20, 100]


def test_tags_and_leases_keep_commits_in_quarantine() -> None:
    given_inventory = replace(spoiled(20, 30, 40), tags={"t": "c20"}, leased=frozenset({"c30"}))
    assert kept(KeepLast(1), given_inventory) == [20, 30, 100]


def test_the_last_good_commit_stays_however_many_bad_ones_follow() -> None:
    assert kept(KeepLast(1), spoiled(*range(20, 101, 10))) == [10, 100]


def test_commits_in_quarantine_on_no_branch_are_kept_by_no_policy() -> None:
    loose = (commit(1, age_hours=1), commit(2, age_hours=1))
    given_inventory = replace(inventory(*TEN, unreachable=loose), quarantined=frozenset({"c2"}))
    assert {1, 2} & set(kept(KeepWithin(timedelta(hours=2)), given_inventory)) == {1}
