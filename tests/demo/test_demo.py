"""The demo from end to end, with a tiny model; and what it does to folders."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tailorstore.demo.model import Size, Transformer
from tailorstore.demo.story import MARKER, demo_plan, prepare
from tailorstore.demo.text import Batches, load_text
from tailorstore.demo.train import Plan, train
from tailorstore.domain.strategies import Budget, MaxAge

COMMAND = [sys.executable, "-m", "tailorstore.cli.main"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Run the demo once; return its folder, stdout and stderr."""
    folder: Path = tmp_path_factory.mktemp("demo") / "my store"
    ended = subprocess.run(
        [*COMMAND, "demo", "--quick", "--to", str(folder)], capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout, ended.stderr


@pytest.mark.slow
def test_it_tells_the_whole_story(told: tuple[Path, str, str]) -> None:
    _, output, story = told
    killed = re.search(
        r"in the middle of the commit of step (\d+): (\d+) objects?, .* written, nothing published", story
    )
    assert killed
    assert int(killed[2]) > 0
    assert "A new process restored the composite of step" in story
    for part in (
        "Commits",
        "Where the layers of step 24 come from",
        "Losses",
        "before the kill",
        "after the restart",
        "ratio",
    ):
        assert part in output
    assert re.search(r"gc would sweep [1-9]\d* leftovers?", output)


@pytest.mark.slow
def test_the_killed_commit_was_made_again_and_nothing_is_broken(told: tuple[Path, str, str]) -> None:
    folder, _, story = told
    killed = re.search(r"in the middle of the commit of step (\d+)", story)
    assert killed
    with ts.open_store(folder, create=False) as store:
        steps = [commit.step for commit in store.log()]
        assert steps == list(range(24, 0, -3))
        assert int(killed[1]) in steps
        assert store.verify().ok
        assert len(set(store.checkout().sources.values())) > 1


@pytest.mark.slow
def test_the_commands_that_it_prints_work(told: tuple[Path, str, str], tmp_path: Path) -> None:
    _, output, _ = told
    lines = [line.strip() for line in output.splitlines() if re.match(r"  \S*tailorstore [a-z]", line)]
    assert [line.split()[1] for line in lines] == [
        "log",
        "show",
        "diff",
        "heatmap",
        "strategies",
        "checkout",
        "gc",
        "verify",
    ]
    for line in lines:
        program, *arguments = shlex.split(line)
        command = [str(Path(program).absolute()) if "/" in program else program, *arguments]
        ended = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "model.safetensors").exists()


def test_a_stopped_trainer_goes_on_where_it_was(tmp_path: Path) -> None:
    size = Size(blocks=3, width=16, heads=2, context=16)
    events: list[tuple[str, dict[str, float]]] = []

    def run(store: str, steps: int) -> None:
        plan = Plan(
            str(tmp_path / store), steps=steps, commit_every=2, mask="all()", batch=2, held_out_batches=1, size=size
        )
        train(plan, lambda name, **values: events.append((name, values)))

    run("stopped", 4)
    run("stopped", 8)
    stopped = {values["step"]: values["loss"] for name, values in events if name == "step"}
    assert [values["step"] for name, values in events if name == "restored"] == [4]
    events.clear()
    run("through", 8)
    through = {values["step"]: values["loss"] for name, values in events if name == "step"}
    # Every commit is a full one: the losses must be the same to the bit.
    assert stopped == through


def test_it_trains_under_any_strategy_and_goes_on_from_light_versions(tmp_path: Path) -> None:
    plan = replace(demo_plan(tmp_path / "store", steps=24, quick=True, mask="staggered(2)"), steps=8, commit_every=2)
    assert plan.mask == "staggered(n=2)"
    train(replace(plan, steps=4), lambda *_, **__: None)
    events: list[str] = []
    train(plan, lambda name, **_: events.append(name))
    assert "restored" in events
    with ts.open_store(tmp_path / "store") as store:
        assert [commit.step for commit in store.log()] == [8, 6, 4, 2]
        assert set(store.checkout().fidelity.values()) == {"full", "light"}


def test_a_mask_that_is_no_strategy_is_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    prepare(folder)
    (folder / "catalog.sqlite").write_text("of an earlier demo")
    ended = subprocess.run(
        [*COMMAND, "demo", "--mask", "budgt('2 MB')", "--to", str(folder)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "nearest: 'budget'" in ended.stderr
    assert (folder / "catalog.sqlite").exists()


def test_the_budgets_leave_room_for_their_bounds_and_are_a_part_of_a_full_save() -> None:
    for quick in (False, True):
        plan = demo_plan(Path("x"), quick=quick)
        model = Transformer(plan.size)
        sizes = [12 * sum(one.numel() for one in layer.parameters()) for layer in _layers(model)]
        bounded = ts.parse_strategy(plan.mask)
        assert isinstance(bounded, MaxAge)
        assert isinstance(bounded.inner, Budget)
        budget = int(bounded.inner.bytes_per_commit or 0)
        assert sum(sizes) / ((bounded.commits or 0) + 1) + max(sizes) < budget < 0.4 * sum(sizes)


def _layers(model: Transformer) -> list[torch.nn.Module]:
    return [model.tokens, model.positions, *model.blocks, model.norm, model.head]


def test_batches_depend_on_their_position_alone() -> None:
    text, held_out = load_text()
    assert len(text) > 10 * len(held_out) > 100_000
    first, second = Batches(text, 16, 4), Batches(text, 16, 4)
    first.at(0)
    inputs, targets = first.at(7)
    assert torch.equal(inputs, second.at(7)[0])
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_model_does_not_look_ahead() -> None:
    model = Transformer(Size(blocks=2, width=16, heads=2, context=8)).eval()
    text = torch.randint(256, (1, 8))
    changed = text.clone()
    changed[0, 5] ^= 1
    assert torch.equal(model(text)[0, :5], model(changed)[0, :5])


def test_prepare_replaces_an_earlier_demo_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    prepare(folder)
    assert json.loads((folder / MARKER).read_text())["made_by"].startswith("tailorstore demo")
    with ts.open_store(folder) as store:
        store.commit(1, {"a.weight": torch.zeros(1)})
    prepare(folder)
    assert [path.name for path in folder.iterdir()] == [MARKER]

    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ts.AlreadyExistsError, match="--to"):
        prepare(folder)
    assert (folder / "thesis.txt").exists()

    own = tmp_path / "own"
    ts.open_store(own).close()
    with pytest.raises(ts.AlreadyExistsError):
        prepare(own)
    (tmp_path / "file").write_text("")
    with pytest.raises(ts.AlreadyExistsError):
        prepare(tmp_path / "file")


def test_steps_set_the_interval() -> None:
    assert demo_plan(Path("x"), steps=400).commit_every == 25
    assert demo_plan(Path("x"), steps=5).commit_every == 1
    plan = demo_plan(Path("x"), quick=True)
    assert Plan.from_json(plan.to_json()) == plan
