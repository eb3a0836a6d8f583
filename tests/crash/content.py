"""What is committed, and how it must read back: to the bit."""

from datetime import timedelta
from typing import Any, Final

import torch

import tailorstore as ts
from tailorstore.domain.errors import BranchNotFoundError
from tests.kit.audit import assert_root_is_exact, let_claims_lapse
from tests.kit.models import assert_same

NOW: Final = timedelta(0)

Sources = dict[str, int]

OFFSETS: Final = {10: 0, 20: 7, 25: 10, 30: 14, 40: 28, 90: 56}
"""How far ``a`` has moved: what a light version's codes of four bits hold exactly, so that it restores to the bit."""

SOURCES: Final[dict[int, Sources]] = {
    10: {"a": 10, "b": 10, "c": 10},
    20: {"a": 20, "b": 10, "c": 10},
    25: {"a": 25, "b": 10, "c": 10},
    30: {"a": 30, "b": 10, "c": 30},
    40: {"a": 40, "b": 10, "c": 40},
    90: {"a": 90, "b": 10, "c": 90},
}
MASKS: Final[dict[int, list[str] | None]] = {10: None, 20: ["a"], 25: ["a"], 30: ["a", "c"], 40: None, 90: None}


def weights(step: int) -> dict[str, torch.Tensor]:
    """Layers ``a`` (two tensors, one of two chunks), ``b`` (never changes) and ``c``."""
    return {
        "a.w": torch.arange(300, dtype=torch.float32) - 100 + OFFSETS[step],
        "a.v": torch.full((3,), step, dtype=torch.bfloat16),
        "b.w": torch.full((5,), -0.0),
        "c.w": torch.full((), float(step)),
    }


def slots(step: int) -> dict[str, torch.Tensor]:
    """Optimizer state of ``a.w``."""
    return {"exp_avg": torch.full((300,), float(-OFFSETS[step])), "step": torch.tensor(float(step))}


def commit(store: ts.Store, step: int, *, block: bool = True, light: bool = False, partial: bool = False) -> None:
    """Commit what a step has; ``partial`` passes no other layers than those that are due."""
    due = MASKS[step] or ["a", "b", "c"]
    model = {name: tensor for name, tensor in weights(step).items() if not partial or name[0] in due}
    optim = {"state": {"a.w": slots(step)}, "param_groups": [{"params": ["a.w"], "lr": step / 3}]}
    pending: Any = store.commit(  # type: ignore[call-overload]
        step,
        model,
        optim,
        dict.fromkeys(due, "light" if light else "full"),
        extra={"at": step},
        metrics={"loss": step},
        partial=partial,
        block=block,
    )
    if not block:
        pending.result(60)


def check_composites(store: ts.Store, branch: str | None = None) -> list[int]:
    """Fail unless every composite of a branch reads back to the bit; return the steps, newest first."""
    try:
        log = store.log(branch)
    except BranchNotFoundError:
        return []
    for one in log:
        check_composite(store, one.id, alone=len(log) == 1)
    return [one.step for one in log]


def check_composite(store: ts.Store, ref: str, *, alone: bool = False) -> None:
    """Fail unless a composite reads back to the bit."""
    with store.checkout(ref) as checkpoint:
        step = checkpoint.step
        # A branch's first commit writes all of its layers.
        sources = dict.fromkeys(SOURCES[step], step) if alone else SOURCES[step]
        assert checkpoint.sources == {"@extra": step, **sources}, checkpoint.sources
        expected = {name: weights(sources[name[0]])[name] for name in weights(step)}
        assert_same(checkpoint.model_state_dict(), expected)
        state = checkpoint.optim_state_dict()
        assert isinstance(state, dict)
        assert_same(state["state"]["a.w"], slots(sources["a"]))
        assert state["param_groups"] == [{"params": ["a.w"], "lr": step / 3}]
        assert checkpoint.extra == {"at": step}
        assert checkpoint.metrics == {"loss": float(step)}


def check_whole(store: ts.Store) -> None:
    """Fail unless nothing is damaged, the next commit goes through, and GC leaves exactly what has standing."""
    damages = store.verify().damages
    assert not damages, damages
    commit(store, 90)
    let_claims_lapse(store)
    report = store.gc(grace=NOW)
    assert report.deletes_failed == 0
    assert report.expired == ()
    assert_root_is_exact(store)
    check_composite(store, "latest", alone=len(store.log()) == 1)
