"""The power may fail at any moment: what a call had done when it returned is there afterwards, whole.

The cuts and the checks are in :mod:`tests.crash.power`, a program of its own; here is a share of its moments, and
``make crash`` has them all. DESIGN.md, "Order of writing", has what is flushed when.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


@pytest.mark.slow
def test_nothing_that_was_done_is_lost_when_the_power_fails_and_all_would_be_without_flushes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.power", "--cuts", "10", "--seeds", "1", "--proofs", "4", "--json"],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "ignore::DeprecationWarning"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=290,
    )
    life, take_over, *without = json.loads(done.stdout)
    assert not life["failures"], life["failures"][0]
    assert not take_over["failures"], take_over["failures"][0]
    assert (life["cuts"], take_over["cuts"]) == (20, 20)
    assert life["flushes"] >= 100
    # The same moments of a process that leaves flushes out: else what is above could not fail.
    assert [report["without"] for report in without] == [["layers"], ["manifests"], ["folders"]]
    for report in without:
        assert report["failures"], report["without"]
