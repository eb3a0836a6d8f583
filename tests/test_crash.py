"""A process may be killed at any moment: what it leaves is the old head or the new one, whole, and GC sweeps the rest.

The kills and the checks are in :mod:`tests.kit.crash`, which runs as a program of its own: it forks, and pytest's
process has threads. DESIGN.md, invariants 1 to 5.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit.postgres import PostgresServer

CHECKOUT = Path(__file__).parent.parent
WRITES = {"open", "write", "sync"}
SQL = {"BEGIN", "SELECT", "COMMIT", "after COMMIT"}


def kill_at(server: str | None = None, **scenarios: str | int) -> dict[str, dict[str, Any]]:
    """Run scenarios, each killed at the calls that its plan says; fail if any is found broken."""
    spec = {"scenarios": {name.replace("_", " "): plan for name, plan in scenarios.items()}, "server": server}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kit.crash", json.dumps(spec)],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "ignore::DeprecationWarning"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=290,
    )
    reports = {report["scenario"]: report for report in json.loads(done.stdout)}
    failures = [f"{name}, {failure}" for name, report in reports.items() for failure in report["failures"]]
    assert not failures, "\n".join([f"{len(failures)} failures", *failures])
    return reports


def assert_covered(report: dict[str, Any], calls: set[str], points: int) -> None:
    """Fail unless the process was killed at all these kinds of calls, and at no fewer points."""
    assert calls <= report["calls"].keys(), report
    assert report["points"] >= points, report


@pytest.mark.slow
def test_killed_while_it_commits() -> None:
    reports = kill_at(commit="calls", first_commit=3, commit_behind=7)
    assert_covered(reports["commit"], {*WRITES, *SQL, "INSERT", "DELETE", "UPDATE", "makedirs", "get"}, 65)
    assert_covered(reports["first commit"], {"open", "write", "SELECT"}, 22)
    assert_covered(reports["commit behind"], {"open", "SELECT"}, 9)
    assert reports["commit"]["outlived"]


@pytest.mark.slow
def test_killed_while_it_commits_light_versions() -> None:
    reports = kill_at(light_commit="calls", light_commit_behind=11)
    assert_covered(reports["light commit"], {*WRITES, *SQL, "INSERT", "DELETE", "UPDATE", "get", "read_into"}, 65)
    assert_covered(reports["light commit behind"], set(), 6)
    assert reports["light commit"]["outlived"]


@pytest.mark.slow
def test_killed_while_it_collects_bases() -> None:
    reports = kill_at(gc_of_bases="changes")
    assert_covered(reports["gc of bases"], {"unlink", "DELETE", "UPDATE", "COMMIT", "after COMMIT"}, 30)


@pytest.mark.slow
def test_killed_while_it_collects_or_names() -> None:
    reports = kill_at(gc="changes", names="changes")
    assert_covered(reports["gc"], {"unlink", "DELETE", "UPDATE", "COMMIT", "after COMMIT"}, 35)
    assert_covered(reports["names"], {*WRITES, "COMMIT", "after COMMIT"}, 30)


@pytest.mark.slow
def test_killed_while_it_makes_a_store_or_takes_one_over() -> None:
    reports = kill_at(opening="changes", rebuild="changes", take_over=7)
    assert_covered(reports["opening"], {*WRITES, "CREATE", "INSERT", "COMMIT", "after COMMIT"}, 15)
    assert_covered(reports["rebuild"], {"write", "rename", "INSERT", "DELETE", "COMMIT", "after COMMIT"}, 25)
    assert_covered(reports["take over"], {"SELECT"}, 7)


@pytest.mark.slow
def test_killed_on_postgres(postgres_server: PostgresServer) -> None:
    """Sparser: each kill takes a database of its own."""
    reports = kill_at(postgres_server.url(), commit=5, gc=12)
    assert_covered(reports["commit"], {"SELECT"}, 14)
    assert_covered(reports["gc"], set(), 6)
