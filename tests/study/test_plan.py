"""Plans, contenders and results: what is read from text, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorstore.domain.errors import InvalidInputError, MaskError
from tailorstore.domain.light import LightSettings
from tailorstore.study.contenders import FULL, default_contenders, parse_contender
from tailorstore.study.picture import frontier
from tailorstore.study.plan import TASKS, Plan
from tailorstore.study.results import Look, Losses, Record, Results, summarise
from tailorstore.study.table import table

PLAN = Plan("pretrain", "adamw")


def record(contender: str = "parity()", seed: int = 0, composites: tuple[float, ...] = (2.2, 2.1)) -> Record:
    looks = tuple(
        Look(at, 10 * at, 3.0, 1.5, None, Losses(2.0, 1.0), Losses(loss, loss / 2))
        for at, loss in enumerate(composites)
    )
    plan = dataclasses.replace(PLAN, seed=seed)
    return Record(plan, contender, contender, 1000, 5, (100, 20, 30), (100, 100, 100), (90, 90, 90), 120, looks, 0.5)


@given(commits=st.integers(1, 300), evaluations=st.integers(1, 20), every=st.integers(1, 30), resume=st.integers(1, 30))
def test_every_age_of_a_mask_that_takes_turns_is_looked_at(
    commits: int, evaluations: int, every: int, resume: int
) -> None:
    if evaluations > commits:
        with pytest.raises(InvalidInputError, match="fewer"):
            Plan("vision", "lion", commits=commits, evaluations=evaluations)
        return
    plan = Plan("vision", "lion", commits=commits, evaluations=evaluations, every=every, resume=resume)
    numbers = plan.evaluated()
    assert len(numbers) == len(set(numbers)) == evaluations
    assert numbers[-1] == commits - 1
    assert numbers[0] >= 0
    for turns in (2, 5):
        assert len({number % turns for number in numbers}) == min(turns, evaluations)
    assert plan.step_of(numbers[-1]) == plan.steps
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "sleep"}, "unknown task 'sleep'"),
        ({"optimizer": "sgd"}, "unknown optimizer"),
        ({"size": "huge"}, "unknown size"),
        ({"precision": "fp4"}, "unknown precision"),
        ({"task": "vision", "size": "300m"}, "no size '300m'"),
        ({"every": 0}, "every must be at least 1"),
    ],
)
def test_plans_that_mean_nothing_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        dataclasses.replace(PLAN, **change)


@pytest.mark.parametrize("task", TASKS)
def test_the_contenders_by_default_can_be_read(task: str) -> None:
    texts = default_contenders(task)
    assert len(set(texts)) == len(texts) >= 15
    for text in texts:
        contender = parse_contender(text)
        assert contender.text == text
        assert hasattr(contender.mask(filter_bytes=10**9), "select")


def test_bits_and_codec_become_settings_of_the_store() -> None:
    contender = parse_contender("staggered(10) @ 3/2 + zstd")
    options = contender.options()
    assert options["codec"] == "zstd"
    assert (options["light"].weight_bits, options["light"].bits_of_slot("exp_avg")) == (3, 2)
    assert options["light"].due_error > 1e6
    assert parse_contender("light()").options() == {"codec": "none", "light": LightSettings()}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("light() @ 7/4", InvalidInputError),
        ("light() @ 4", InvalidInputError),
        ("light() + snappy", InvalidInputError),
        ("lihgt()", MaskError),
        ("", InvalidInputError),
    ],
)
def test_contenders_that_cannot_be_read_are_refused(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_contender(text)


def test_who_asks_for_the_filter_needs_one() -> None:
    contender = parse_contender("budget(bytes_per_commit={filter})")
    assert str(contender.mask(5000)) == "budget(bytes_per_commit=5000)"
    with pytest.raises(InvalidInputError, match="filter"):
        contender.mask(None)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    results = Results(tmp_path)
    records = [record(), record(FULL), record(seed=1)]
    for one in records:
        results.add(one)
    assert list(Results(tmp_path)) == records
    assert Results(tmp_path).get(PLAN, "parity()") == records[0]
    assert Results(tmp_path).get(PLAN, "light()") is None


def test_a_line_that_was_cut_off_is_lost_alone(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(record())
    results.add(record("light()"))
    text = results.path.read_text()
    results.path.write_text(text[:-40])
    again = Results(tmp_path)
    assert [one.contender for one in again] == ["parity()"]
    again.add(record("all()"))
    assert [one.contender for one in Results(tmp_path)] == ["parity()", "all()"]


def test_summaries_are_means_over_looks_and_seeds() -> None:
    summary, other = summarise([record(), record(seed=1, composites=(2.0, 1.8)), record("light()")])
    assert (summary.contender, other.contender) == ("parity()", "light()")
    assert summary.share == pytest.approx(0.5)
    # 10, 5, 0 and -10 percent
    assert summary.restored.value == pytest.approx(1.25)
    assert summary.restored.error == pytest.approx(8.539 / 2, abs=1e-3)
    assert abs(summary.restored.farthest) == pytest.approx(10)
    assert (summary.seeds, other.seeds) == (2, 1)
    row = next(line for line in table([record(), record(seed=1, composites=(2.0, 1.8))]).splitlines() if "`p" in line)
    assert "0.5000 | 2.0×" in row
    assert "+1.250 ± 4.270" in row


@given(
    st.lists(
        st.tuples(st.floats(0.01, 1), st.floats(-5, 50)), min_size=1, max_size=20, unique_by=lambda point: point[0]
    )
)
def test_no_point_beats_one_of_the_frontier(points: list[tuple[float, float]]) -> None:
    front = frontier(points)
    for share, lost in front:
        assert not any(a <= share and max(b, 0) <= max(lost, 0) for a, b in points if (a, b) != (share, lost))
    for share, lost in points:
        assert any(a <= share and max(b, 0) <= max(lost, 0) for a, b in front)
