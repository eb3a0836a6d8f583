"""A process may be killed at any moment: what it leaves is the old head or the new one, whole, and GC sweeps the rest.

The kills and the checks are in :mod:`tests.crash`, which runs as a program of its own: it forks, and pytest's process
has threads. Here is a share of them; ``make crash`` has them all. DESIGN.md, invariants 1 to 5.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit.postgres import PostgresServer
from tests.kit.s3 import S3Server

CHECKOUT = Path(__file__).parent.parent
WRITES = {"open", "write", "confirm"}
SQL = {"BEGIN", "SELECT", "COMMIT", "after COMMIT"}
Plan = str | int | tuple[str | int, int]


def kill_at(
    servers: dict[str, Any] | None = None, *, at_writes: bool = False, **scenarios: Plan
) -> dict[str, dict[str, Any]]:
    """Run scenarios, each killed at the calls that its plan says; fail if any is found broken.

    Args:
        servers: what :class:`tests.crash.places.Servers` takes.
        at_writes: at the calls by which SQLite changes its files.
        scenarios: with the plan that ``points_of`` takes, and perhaps a number of pairs of kills.
    """
    plans = {name.replace("_", " "): plan if isinstance(plan, tuple) else (plan, 0) for name, plan in scenarios.items()}
    asked = {"scenarios": plans, "servers": servers or {}, "at_writes": at_writes}
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash", "--json", json.dumps(asked)],
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
    assert calls <= report["killed_at"].keys(), report
    assert report["points"] >= points, report


@pytest.mark.slow
def test_killed_while_it_commits() -> None:
    reports = kill_at(commit=("changes", 2), first_commit=5, commit_behind=9, full_commit=19, partial_commit=17)
    assert_covered(reports["commit"], {*WRITES, *SQL, "INSERT", "DELETE", "UPDATE", "makedirs", "get"}, 65)
    assert_covered(reports["first commit"], {"open", "write", "SELECT"}, 14)
    assert_covered(reports["commit behind"], {"open"}, 7)
    assert reports["commit"]["outlived"]
    assert reports["commit"]["pairs"] >= 1


@pytest.mark.slow
def test_killed_while_it_commits_light_versions_or_on_two_branches() -> None:
    reports = kill_at(light_commit=3, light_commit_behind=19, two_branches=23)
    assert_covered(reports["light commit"], {"open", "write"}, 30)
    assert_covered(reports["light commit behind"], set(), 4)
    assert_covered(reports["two branches"], set(), 9)


@pytest.mark.slow
def test_killed_while_it_collects_bases_or_restores() -> None:
    reports = kill_at(gc_of_bases=5, restore=4)
    assert_covered(reports["gc of bases"], {"unlink"}, 15)
    assert_covered(reports["restore"], {"SELECT"}, 5)


@pytest.mark.slow
def test_killed_while_it_collects_names_or_repairs() -> None:
    reports = kill_at(gc=(4, 2), names=4, repair=17)
    assert_covered(reports["gc"], {"unlink"}, 25)
    assert_covered(reports["names"], set(), 20)
    assert_covered(reports["repair"], set(), 8)
    assert reports["gc"]["pairs"] >= 1


@pytest.mark.slow
def test_killed_while_it_makes_a_store_upgrades_one_or_takes_one_over() -> None:
    reports = kill_at(opening=6, rebuild=(3, 2), take_over=7, upgrade=7)
    assert_covered(reports["opening"], {"CREATE"}, 12)
    assert_covered(reports["rebuild"], set(), 18)
    assert_covered(reports["take over"], {"SELECT"}, 7)
    assert_covered(reports["upgrade"], set(), 3)


@pytest.mark.slow
def test_killed_while_sqlite_writes() -> None:
    reports = kill_at(at_writes=True, commit=(3, 2), gc=9, names=11, take_over=11, upgrade=11, opening=17)
    assert_covered(reports["commit"], {"pwrite64 .sqlite-wal", "pwrite64 .sqlite"}, 15)
    assert_covered(reports["gc"], set(), 4)
    assert_covered(reports["opening"], set(), 8)
    assert reports["commit"]["pairs"] >= 1


@pytest.mark.slow
def test_killed_on_postgres(postgres_server: PostgresServer) -> None:
    """Sparser: each kill takes a database of its own."""
    reports = kill_at({"postgres": postgres_server.url()}, commit=(7, 1), gc=17, names=23, take_over=29, upgrade=13)
    assert_covered(reports["commit"], set(), 12)
    assert_covered(reports["gc"], set(), 6)
    assert_covered(reports["names"], set(), 3)


@pytest.mark.slow
def test_killed_between_requests_to_s3(s3_server: S3Server) -> None:
    servers = {"bucket": s3_server.bucket, "storage_options": s3_server.storage_options()}
    reports = kill_at(servers, commit=(11, 1), gc=15)
    assert_covered(reports["commit"], set(), 9)
    assert_covered(reports["gc"], set(), 5)
