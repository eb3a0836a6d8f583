"""Tasks and trainers: the same plan gives the same run, and every state can be left and taken up to the bit."""

import dataclasses
from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import AlreadyExistsError
from tailorstore.study.fullrun import FullRun
from tailorstore.study.mixed import MixedState
from tailorstore.study.optimizers import set_rates
from tailorstore.study.plan import OPTIMIZERS, TASKS, Plan
from tailorstore.study.training import Trainer


def tiny(task: str = "pretrain", optimizer: str = "adamw", **more: int | str) -> Plan:
    settings: dict[str, int | str] = {"size": "tiny", "commits": 5, "every": 2, "evaluations": 2, "resume": 2, **more}
    return Plan(task, optimizer, **settings)  # type: ignore[arg-type]


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_learned_and_depends_on_its_plan_alone(task: str) -> None:
    plan = tiny(task, commits=10)
    first, second, other = Trainer(plan), Trainer(plan), Trainer(dataclasses.replace(plan, seed=1))
    before = first.held_out()
    assert before == first.held_out() == second.held_out()
    assert before > 0.5
    assert other.held_out() != before
    assert first.advance(0, 12) == second.advance(0, 12)
    assert first.held_out() == second.held_out()
    assert first.advance(12, 2) != other.advance(12, 2)
    if task != "finetune":  # whose tiny encoder knows nothing yet
        assert first.held_out() < before


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_is_left_and_taken_up_to_the_bit(optimizer: str, precision: str, tmp_path: Path) -> None:
    trainer = Trainer(tiny(optimizer=optimizer, precision=precision, freeze="*embed*, lm_head*"))
    frozen = [name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight", "lm_head.weight"]
    trainer.advance(0, 2)
    with ts.open_store(tmp_path) as store:
        store.commit(2, *trainer.state())
        stood, loss = trainer.held_out(), trainer.advance(2, 3)
        ended = trainer.held_out()
        with store.checkout() as checkpoint:
            trainer.load(checkpoint)
            dtypes = {lazy.dtype for lazy in checkpoint.model.values()}
    assert dtypes == {torch.bfloat16 if precision == "mixed" else torch.float32}
    assert trainer.held_out() == stood
    assert trainer.advance(2, 3) == loss
    assert trainer.held_out() == ended


def test_mixed_states_hold_masters_of_what_is_trained() -> None:
    trainer = Trainer(tiny(freeze="lm_head*"))
    trainer.advance(0, 1)
    weights, optim = MixedState(trainer.model, trainer.optimizers).collect()
    assert optim["state"].keys() == weights.keys() - {"lm_head.weight"}
    for name, slots in optim["state"].items():
        assert slots.keys() == {"master", "step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(slots["master"].bfloat16(), weights[name])


def test_a_nudge_moves_every_weight_by_one_unit_in_the_last_place() -> None:
    trainer = Trainer(tiny())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.nudge()
    for name, value in trainer.model.state_dict().items():
        # A bit pattern away: neighbours of the same sign differ by one as integers.
        away = value.view(torch.int32) - before[name].view(torch.int32)
        assert torch.all((away.abs() == 1) | (before[name] == 0)), name
    away_norm = trainer.model.state_dict()["model.norm.weight"] - 1
    assert away_norm.min() < 0 < away_norm.max()


def test_rates_rise_and_fall() -> None:
    trainer = Trainer(tiny())
    rates = []
    for step in range(100):
        set_rates(trainer.optimizers, step, 100)
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    top = rates.index(max(rates))
    assert 3 <= top <= 5
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 * max(rates), rel=0.01)


class Stopped(Exception):  # noqa: N818
    """Somebody pulled the plug."""


class ShortLived(Trainer):
    """A trainer that stops in the middle."""

    def advance(self, step: int, steps: int) -> float:
        if step >= 6:
            raise Stopped
        return super().advance(step, steps)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    stopped = FullRun(ShortLived(tiny()), tmp_path / "stopped")
    with pytest.raises(Stopped):
        stopped.train(quiet)
    stopped.close()
    runs = [FullRun(Trainer(tiny()), tmp_path / name) for name in ("stopped", "through")]
    states = []
    for run in runs:
        points = list(run.points(quiet))
        assert [point.step for point in points] == [2, 4, 6, 8, 10]
        states.append({name: value.clone() for name, value in run.trainer.model.state_dict().items()})
        run.close()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_all_bytes_of_a_run_are_counted(tmp_path: Path) -> None:
    run = FullRun(Trainer(tiny()), tmp_path)
    counted = sum(point.bytes_full for point in run.points(quiet))
    run.close()
    root = tmp_path / run.plan.name / "full"
    files = [path for path in root.rglob("*") if path.is_file() and "catalog" not in path.name]
    there = sum(path.stat().st_size for path in files if path.name != "tailorstore.json")
    assert counted == there


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    FullRun(Trainer(tiny()), tmp_path).close()
    FullRun(Trainer(tiny(evaluations=1)), tmp_path).close()
    with pytest.raises(AlreadyExistsError, match="--work"):
        FullRun(Trainer(tiny(every=3)), tmp_path)


def test_a_point_can_be_gone_back_to(tmp_path: Path) -> None:
    run = FullRun(Trainer(tiny("vision")), tmp_path)
    for point in run.points(quiet):
        loss = run.trainer.held_out()
        run.trainer.advance(point.step, 2)
        assert run.trainer.held_out() != loss
        point.reload()
        assert run.trainer.held_out() == loss
    run.close()
