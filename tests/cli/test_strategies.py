"""strategies: the list, what a text means, and what it would write."""

import json
from pathlib import Path

import pytest

from tailorstore.domain.strategies import STRATEGIES, Budget, parse_strategy, strategy_from_config
from tests.cli.conftest import LAYERS, Run, answer, refusal

OFFLINE = {"TAILORSTORE_URL": ""}


def test_the_list_has_every_strategy_with_what_it_writes(run: Run) -> None:
    text = run("strategies", env=OFFLINE).stdout
    document = answer(run("strategies", "--json", env=OFFLINE))
    assert [one["name"] for one in document["strategies"]] == list(STRATEGIES)
    assert all(one["writes"].endswith(".") for one in document["strategies"])
    for one in document["strategies"]:
        assert one["signature"] in text
        assert one["writes"] in text


def test_a_text_is_checked_and_explained(run: Run) -> None:
    given = "budget(bytes_per_commit='2GB').max_age(commits=5) | parity"
    text = run("strategies", given, env=OFFLINE).stdout
    assert "budget(bytes_per_commit=2000000000).max_age(commits=5) | parity()" in text
    lines = [line.split()[0] for line in text.splitlines()[2:]]
    assert lines == ["part", "union", "max_age", "budget", "parity"]
    document = answer(run("strategies", given, "--json", env=OFFLINE))
    assert document["preview"] is None
    assert parse_strategy(document["text"]) == strategy_from_config(document["config"]) == parse_strategy(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paritty()", "nearest: 'parity'"),
        ("top_k(8, by='drft')", "nearest: 'drift'"),
        ("budget(0)", "at least 1"),
        ("__import__('os')", "unknown strategy"),
    ],
)
def test_what_is_no_strategy_is_refused(run: Run, text: str, message: str) -> None:
    result = run("strategies", text)
    assert result.exit_code == 2
    assert message in result.stderr
    assert message in refusal(run("strategies", text, "--json"))["message"]


def test_with_a_store_it_shows_what_would_be_written(run: Run) -> None:
    text = run("strategies", "parity").stdout
    assert "The commit after step 50 on main, by estimate" in text
    assert "It would write 2 of 5 layers" in text
    plan = answer(run("strategies", "parity", "--json"))["preview"]
    assert (plan["branch"], plan["after_step"], plan["number"]) == ("main", 50, 5)
    # In the order in which people count, and commit 5 writes the odd places.
    assert [layer["layer"] for layer in plan["layers"]] == list(LAYERS)
    assert [layer["write"] for layer in plan["layers"]] == [None, "full", None, "full", None]
    assert plan["bytes"] == sum(layer["bytes"] for layer in plan["layers"])
    assert answer(run("strategies", "all", "--json"))["preview"]["bytes"] == plan["bytes_full"]


def test_a_budget_is_previewed_within_its_bytes(run: Run) -> None:
    budget = 3500
    plan = answer(run("strategies", str(Budget(budget, by="drift")), "--json"))["preview"]
    assert 0 < plan["bytes"] <= budget
    # Every layer moves by the same each time, and what was written longest ago is furthest off.
    ages = {
        layer["layer"]: layer["age"]
        for layer in answer(run("strategies", "threshold(1e9)", "--json"))["preview"]["layers"]
    }
    written = {layer["layer"] for layer in plan["layers"] if layer["write"]}
    assert written == set(sorted(ages, key=lambda name: -ages[name])[: len(written)])
    small = run("strategies", "budget(900).max_age(commits=2)")
    assert small.exit_code == 2
    assert "too small for max_age" in small.stderr


def test_a_store_without_commits_has_no_next_commit_to_show(run: Run, tmp_path: Path) -> None:
    empty = str(tmp_path / "empty")
    assert run("init", "--store", empty).exit_code == 0
    result = run("strategies", "parity", "--store", empty, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"] == "branch_not_found"
