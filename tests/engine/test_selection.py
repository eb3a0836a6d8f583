"""What masks are decided upon stays true over restarts, dropped commits, moved branches and damage."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.mask import LayerState, MaskContext
from tailorstore.domain.strategies import Budget, Threshold, TopK
from tailorstore.engine.light import bases
from tailorstore.engine.light.bases import BaseCache
from tailorstore.engine.selection import Selector

NOTHING = Threshold(1e9)
"""Chooses no layer whose drift is known."""


class Seen:
    """A strategy that writes down what it is told, and chooses the first layer."""

    def __init__(self) -> None:
        self.contexts: list[MaskContext] = []

    def select(self, context: MaskContext) -> list[str]:
        self.contexts.append(context)
        return [next(iter(context.layers))]

    def last(self, tell: Callable[[LayerState], Any]) -> list[Any]:
        return [tell(state) for state in self.contexts[-1].layers.values()]


def stack(layers: int) -> torch.nn.Sequential:
    torch.manual_seed(layers)
    return torch.nn.Sequential(*(torch.nn.Linear(24, 24) for _ in range(layers)))


def move(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


def test_a_branch_that_was_deleted_begins_anew(root: str) -> None:
    model, seen = stack(3), Seen()
    with ts.open_store(root) as store:
        for step in (10, 20, 30):
            move(model)
            store.commit(step, model, mask=seen)
        store.branch("kept")
        store.delete_branch("main")
        for step in (5, 15, 25):
            move(model)
            store.commit(step, model, mask=seen)
        assert [context.number for context in seen.contexts] == [0, 1, 2, 0, 1, 2]
        assert seen.last(lambda state: state.commits_since) == [0, 1, 1]
        assert seen.last(lambda state: state.source_step) == [15, 5, 5]
        assert store.updates().finite.all()
        assert torch.tensor(store.updates().of("drift")).isnan().all(dim=1).tolist() == [True, False, False]


def test_ages_and_bounds_hold_over_restarts_and_dropped_commits(root: str) -> None:
    model, seen = stack(3), Seen()
    for step in range(0, 120, 10):
        with ts.open_store(root) as store:
            move(model)
            store.commit(step, model, mask=NOTHING.max_age(commits=3))
            store.gc(ts.KeepLast(2), grace=timedelta(0))
            assert max(store.checkout().staleness.values()) <= 30
    with ts.open_store(root) as store:
        store.commit(200, model, mask=seen)
    assert seen.contexts[-1].number == 12
    assert seen.last(lambda state: state.commits_since) == [3, 3, 3]
    assert seen.last(lambda state: state.base_commits_since) == [3, 3, 3]


@pytest.mark.parametrize("restarts", [(), (10,), (7, 8, 9, 10, 11)])
def test_frozen_layers_stay_current_over_restarts(root: str, restarts: tuple[int, ...]) -> None:
    model = stack(8)
    for block in list(model)[1:]:
        block.requires_grad_(requires_grad=False)
    store = ts.open_store(root)
    store.commit(0, model)
    layer = store.layers()[1].bytes_stored
    # Enough for two frozen layers at each commit, and far from enough for all of them at once.
    mask = Budget(bytes_per_commit=int(3.2 * layer)).max_age(commits=3)
    for step in range(1, 14):
        if step in restarts:
            store.close()
            store = ts.open_store(root)
        move(model)
        store.commit(step, model, mask=mask)
    assert all(source == 0 for name, source in store.checkout().sources.items() if name not in ("0", "@extra"))
    store.close()


@pytest.mark.parametrize(
    "kept",
    [
        None,
        3,
        [],
        {"number": "x", "current": [1], "numbers": {"1": 2}},
        {"number": 1, "current": {"0": "x", "1": None}, "numbers": [[1], ["a", 2], 3]},
    ],
)
def test_a_kept_state_that_is_none_is_passed_over(root: str, kept: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = stack(2), Seen()
    with monkeypatch.context() as patched:
        patched.setattr("tailorstore.engine.selection.Decision.state", kept)
        with ts.open_store(root) as store:
            store.commit(1, model)
            move(model)
            store.commit(2, model, mask=["0"])
    with ts.open_store(root) as store:
        store.commit(3, model, mask=seen)
    assert seen.contexts[-1].number == 2
    assert seen.last(lambda state: state.commits_since) == [0, 1]


def test_a_dictionary_of_tensors_is_measured_after_a_restart(root: str) -> None:
    model = stack(2)
    with ts.open_store(root) as store:
        store.commit(1, model.state_dict())
    with ts.open_store(root) as store:
        move(model)
        store.commit(2, model.state_dict())
        assert (store.updates().of("drift")[-1] > 0).all()


def test_optimizers_are_still_watched_after_the_catalog_was_rebuilt(root: str) -> None:
    model = stack(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ts.open_store(root) as store, store.watch(optimizer, every=1):
        store.commit(1, model, optimizer)
        store.rebuild_catalog()
        model(torch.ones(2, 24)).sum().backward()
        optimizer.step()
        store.commit(2, model, optimizer)
        assert (store.updates().of("gradient")[-1] > 0).all()


def test_a_damaged_version_does_not_keep_a_resumed_run_from_writing_the_layer_anew(root: str) -> None:
    model = stack(3)
    with ts.open_store(root) as store:
        store.commit(1, model)
    chunk = next(path for path in (Path(root) / "layers" / "1").rglob("1.weight/c*") if path.is_file())
    damaged = bytearray(chunk.read_bytes())
    damaged[100] ^= 1
    chunk.chmod(0o644)
    chunk.write_bytes(damaged)
    with ts.open_store(root) as store:
        move(model)
        assert store.commit(2, model, mask=TopK(1)).layers_written == ("1",)
        assert store.verify("latest").damages == ()
        store.checkout().restore(stack(3))


def test_a_layer_of_buffers_that_stand_still_is_not_urgent(root: str) -> None:
    model = stack(2)
    turns, angles = torch.nn.Module(), torch.arange(32.0)
    turns.register_buffer("angles", angles)
    model.register_module("turns", turns)
    with ts.open_store(root) as store:
        store.commit(0, model)
        written: list[str] = []
        for step in (1, 2):
            move(model)
            written += store.commit(step, model, mask=TopK(1)).layers_written
        assert sorted(written) == ["0", "1"]
        angles += 1
        assert store.commit(3, model, mask=TopK(1)).layers_written == ("turns",)


@pytest.mark.parametrize("away", ["moved", "deleted"])
def test_ages_of_a_composite_do_not_depend_on_where_its_branch_is_now(root: str, away: str) -> None:
    model = stack(2)
    with ts.open_store(root) as store:
        for step in (0, 10, 20, 30):
            move(model)
            store.commit(step, model, mask=["0"])
        store.tag("old")
        store.branch("other", "main@10")
        if away == "moved":
            store.branch("main", "main@0", move=True)
            store.commit(7, model, mask=["0"])
        else:
            store.delete_branch("main")
        with store.checkout("old") as old:
            assert {name: condition.age for name, condition in old.conditions.items()} == {"0": 0, "1": 3}


def test_a_commit_that_fails_once_it_is_announced_gives_its_claim_back(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Iterator[None]:
        raise RuntimeError

    with ts.open_store(root) as store:
        with monkeypatch.context() as patched:
            patched.setattr(Selector, "decide", failing)
            with pytest.raises(RuntimeError):
                store.commit(1, stack(1))
        assert not store._keeper._held
        assert store.commit(1, stack(1)).step == 1


def test_a_child_does_not_wait_for_a_thread_of_its_parents() -> None:
    cache = BaseCache()
    cache.put("a", "1", {"w": torch.ones(2)})
    with cache._lock:
        bases._after_fork_in_child()
        assert cache.get("a", "1") == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_element_that_is_no_number_makes_its_layer_urgent(tmp_path: Path, value: float) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(96, 96) for _ in range(4)))
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, model)
        with torch.no_grad():
            model[2].get_parameter("weight")[41, 7] = value
        commit = store.commit(2, model, mask=ts.strategies.TopK(1))
        assert commit.layers_written == ("2",)
        assert store.updates().finite[-1].tolist() == [True, True, False, True]


def test_settings_for_slots_that_no_optimizer_has_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(40, 40)
    optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 40)).sum().backward()
    optim.step()
    with ts.open_store(tmp_path / "root", light=ts.LightSettings(slot_bits={"momentum_bufer": 4})) as store:
        store.commit(1, model, optim)
        store.commit(2, model, optim)
    told = [record.getMessage() for record in caplog.records if "momentum_bufer" in record.getMessage()]
    assert told == ["light settings name slots 'momentum_bufer'; the optimizers have momentum_buffer"]
