"""Ctrl-C and SIGTERM at any moment: the process ends as it would without a store, soon, and cleans up behind itself.

The signals and the checks are in :mod:`tests.crash.interrupts`, a program of its own: pytest's process has threads, and
wants its own Ctrl-C. Here is a share of its moments; ``make crash`` has them all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parent.parent
COMMANDS = ("gc", "verify", "checkout")


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.interrupts", "--every", "11", "--moments", "6", "--json"],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "ignore::DeprecationWarning"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=290,
    )
    return {report["case"]: report for report in json.loads(done.stdout)}


def assert_whole(reports: dict[str, Any], *cases: str) -> None:
    """Fail unless these cases were tried, and what was left was as it must be."""
    for case in cases:
        assert not reports[case]["failures"], reports[case]["failures"][0]
        assert reports[case]["points"] >= 1, case


@pytest.mark.slow
def test_an_interrupted_commit_gives_its_claim_up_and_deletes_what_it_wrote(reports: dict[str, Any]) -> None:
    assert_whole(reports, "commit", "commit behind")
    assert reports["commit"]["points"] >= 8


@pytest.mark.slow
def test_a_second_interrupt_while_it_cleans_up_is_safe(reports: dict[str, Any]) -> None:
    assert_whole(reports, "commit, twice", "commit behind, twice")


@pytest.mark.slow
def test_after_an_interrupt_the_same_process_commits_again(reports: dict[str, Any]) -> None:
    assert_whole(reports, "commit, goes on", "commit behind, goes on")


@pytest.mark.slow
def test_a_trainer_that_takes_sigterm_leaves_cleanly_and_one_that_does_not_dies(reports: dict[str, Any]) -> None:
    assert_whole(reports, "commit, SystemExit", "commit, SIGTERM")


@pytest.mark.slow
def test_commands_end_with_one_line_and_give_their_leases_back(reports: dict[str, Any]) -> None:
    for strike, said in (("SIGINT", "Interrupted."), ("SIGTERM", "Terminated.")):
        for command in COMMANDS:
            assert_whole(reports, f"{command}, {strike}")
            for output in reports[f"{command}, {strike}"]["outputs"]:
                assert output.strip().splitlines()[-1] == said
                assert "Traceback" not in output


@pytest.mark.slow
def test_an_interrupt_from_outside_is_obeyed_at_once(reports: dict[str, Any]) -> None:
    """Not in the 40 s that the commit would take: a put of 0.1 s is finished, and what was put is deleted."""
    assert_whole(reports, "from outside")
    assert 0 < reports["from outside"]["slowest_seconds"] < 20
