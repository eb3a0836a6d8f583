"""A minute of what ``python -m tests.soak`` does for as long as one likes: many processes at work on one store."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tailorstore as ts
from tests.conftest import require
from tests.kit.postgres import postgres_programs
from tests.soak.content import LAYERS, LIGHT, compare, sources_after, state_at, tensors_of
from tests.soak.ledger import COUNTED, Board, Ledger, Line
from tests.soak.run import MUST_HAPPEN, MUST_HAPPEN_IN_A_CONTEST

CHECKOUT = Path(__file__).parent.parent


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.soak", "--crew", "small", "--json", *arguments],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _outcomes(soak: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, errors = soak.communicate(timeout=240)
    assert soak.returncode == 0, errors[-5000:] + out[-5000:]
    found: list[dict[str, Any]] = json.loads(out)
    return found


@pytest.mark.slow
@pytest.mark.postgres
def test_a_minute_of_trainers_readers_gc_and_verify_loses_nothing() -> None:
    require(postgres_programs)
    # Side by side, half a minute each: most of the time they wait.
    soaks = [
        _start("--catalog", "sqlite", "--minutes", "0.35", "--takeovers", "also"),
        _start("--catalog", "postgres", "--minutes", "0.45", "--takeovers", "no"),
    ]
    try:
        found = {one["name"]: one for soak in soaks for one in _outcomes(soak)}
    finally:
        for soak in soaks:
            soak.kill()
            soak.communicate()
    assert found.keys() == {"sqlite", "sqlite, take-overs", "postgres"}
    for name, one in found.items():
        counts = one["counts"]
        must = MUST_HAPPEN_IN_A_CONTEST if "take-overs" in name else MUST_HAPPEN
        assert not {what for what in must if not counts[what]}, (name, counts)
        assert not one["complaints"]
        assert counts["unexpected errors"] == counts["wrong composites"] == 0
        assert one["left"]["composites"] > 0


def test_what_must_be_there_follows_from_what_was_acknowledged(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "one.jsonl")
    for step in (1, 2, 3):
        ledger.write(begin=step)
        ledger.write(done=step)
    assert Line.of(ledger).must_keep(2) == [2, 3]
    # Nobody heard of it again: it may be there, and have pushed another one out.
    ledger.write(begin=4)
    assert Line.of(ledger).must_keep(2) == [3]
    ledger.write(moved=1)
    ledger.write(begin=5)
    ledger.write(done=5)
    ledger.write(naming="tag")
    ledger.write(tagged="tag", at=5)
    ledger.write(naming="fork")
    line = Line.of(ledger)
    assert (line.must_keep(2), line.must_keep(6), line.last_step) == ([5], [1, 5], 5)
    assert (line.tags, line.forks, line.unsure) == ({"tag": 5}, {}, {"fork"})
    ledger.write(removing="tag")
    assert Line.of(ledger).tags == {}


def test_counts_of_all_processes_add_up() -> None:
    board = Board(2)
    board.add(0, "commits", 3)
    board.add(1, "commits")
    board.add(1, COUNTED[-1], 2)
    assert board.totals() == {what: {"commits": 4, COUNTED[-1]: 2}.get(what, 0) for what in COUNTED}
    assert not board.stopped
    board.stop()
    assert board.stopped


def test_a_composite_that_is_not_what_was_committed_is_found_out(tmp_path: Path) -> None:
    sources = sources_after(None, 10, LAYERS)
    with ts.open_store(tmp_path, light=LIGHT) as store:
        store.commit(10, state_at(10), extra={"sources": sources, "step": 10})
        light = dict.fromkeys(LAYERS, "light")
        store.commit(20, state_at(20), None, light, extra={"sources": sources_after(sources, 20, LAYERS), "step": 20})
        with store.checkout() as checkpoint:
            assert checkpoint.fidelity["a"] == "light"
            size, wrong = compare(checkpoint)
        assert (size > 5000, wrong) == (True, [])
        other = state_at(30)
        other["c.w"][7] = torch.nextafter(other["c.w"][7], torch.tensor(9.0))
        store.commit(30, other, extra={"sources": sources_after(sources, 30, ("a", "c")), "step": 31})
        with store.checkout() as checkpoint:
            _, wrong = compare(checkpoint)
    assert len(wrong) == 3
    assert [said.split()[0] for said in wrong] == ["layers", "extra", "bits"]
    assert tensors_of("a", 10).keys() == {"a.w", "a.step", "a.bits"}
