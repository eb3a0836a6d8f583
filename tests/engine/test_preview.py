"""What a strategy would write next, against what is then written."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import BranchNotFoundError, MaskError
from tailorstore.domain.mask import LayerState, MaskContext, MaskEntries, Strategy
from tailorstore.domain.records import LayerMeasures
from tailorstore.domain.strategies import All, Budget, Filter, Light, Parity, Staggered, Threshold, TopK
from tailorstore.engine.preview import preview

LAYERS = [f"h.{at}" for at in range(6)]
SPEEDS = dict(zip(LAYERS, (0.0, 0.01, 0.02, 0.05, 0.1, 0.4), strict=True))


class Spy:
    """Passes a strategy's masks on, and keeps what it was told last."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner
        self.told: MaskContext

    def select(self, context: MaskContext) -> MaskEntries:
        self.told = context
        return self.inner.select(context)


class Run:
    """A model whose layers go for a walk, each at its own speed."""

    def __init__(self, store: ts.Store) -> None:
        self.store = store
        self.model = {f"{layer}.weight": torch.randn(256, 256) for layer in LAYERS}
        self.step = 0

    def commit(self, strategy: Strategy) -> ts.Commit:
        self.step += 10
        for name, tensor in self.model.items():
            tensor += SPEEDS[name.removesuffix(".weight")] * torch.randn_like(tensor)
        return self.store.commit(self.step, self.model, mask=strategy)


@pytest.mark.parametrize(
    "strategy", [Parity("odd"), Filter(1, 1, 3), Staggered(3), Light(), Parity().max_age(commits=4), Threshold(1e9)]
)
def test_what_was_foretold_is_what_is_written(tmp_path: Path, strategy: Strategy) -> None:
    torch.manual_seed(0)
    with ts.open_store(tmp_path / "root") as store:
        run, spy = Run(store), Spy(strategy)
        run.commit(strategy)
        # From one commit nobody can tell how far the next is, nor how layers move.
        run.commit(strategy)
        for _ in range(5):
            plan = preview(store, strategy)
            foretold = {one.layer for one in plan.layers if one.write}
            seen = Spy(strategy)
            preview(store, seen)
            commit = run.commit(spy)
            # A layer that stands still is left alone even where it was chosen.
            assert set(commit.layers_written) == foretold - {"h.0"}
            assert plan.after_step == commit.step - 10
            for name, state in spy.told.layers.items():
                if name != "h.0":
                    assert known(seen.told.layers[name]) == known(state)
            assert (seen.told.number, seen.told.step) == (spy.told.number, spy.told.step)
            after = {info.name: info for info in store.layers()}
            for one in plan.layers:
                if one.write and one.layer != "h.0":
                    assert after[one.layer].fidelity == one.write
                    assert one.bytes == pytest.approx(after[one.layer].bytes_stored, rel=0.35)


def test_a_base_that_will_be_too_old_by_then_is_foretold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    light = ts.LightSettings(max_base_steps=25)
    with ts.open_store(tmp_path / "root", light=light) as store:
        run = Run(store)
        for _ in range(3):
            run.commit(Light())
        assert store.checkout().fidelity["h.1"] == "light"
        foretold = {one.layer: one.write for one in preview(store, Light(), light).layers}
        run.commit(Light())
        assert foretold == {name: how for name, how in store.checkout().fidelity.items() if name != "@extra"}
        assert foretold["h.1"] == "full"


def known(state: LayerState) -> LayerState:
    """Leave out of a state what the catalog cannot know or only estimates."""
    return replace(state, measures=None, importance=None, bytes_light=0, bytes_full=0, due_full=False)


def test_measures_are_carried_on_as_layers_went_on_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with ts.open_store(tmp_path / "root") as store:
        run, spy, seen = Run(store), Spy(Parity()), Spy(All())
        for number in range(8):
            if number > 3:
                preview(store, seen)
            run.commit(spy)
            if number > 3:
                for name in LAYERS[1:]:
                    foretold, found = (told.layers[name].measures for told in (seen.told, spy.told))
                    assert isinstance(foretold, LayerMeasures)
                    assert isinstance(found, LayerMeasures)
                    assert foretold.drift == pytest.approx(found.drift, rel=0.2)


def test_a_budget_is_previewed_with_the_fast_layers_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with ts.open_store(tmp_path / "root") as store:
        run = Run(store)
        run.commit(All())
        run.commit(All())
        plan = preview(store, TopK(2))
        assert [one.layer for one in plan.layers if one.write] == ["h.4", "h.5"]
        each = plan.layers[5].bytes
        assert (plan.bytes, plan.bytes_full) == (2 * each, 6 * each)
        assert [one.age for one in plan.layers[1:]] == [1, 1, 1, 0, 0]
        with pytest.raises(MaskError, match="too small for max_age"):
            preview(store, Budget(each).max_age(commits=2))


def test_it_reads_the_catalog_alone_and_changes_nothing(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root", catalog=f"sqlite:///{tmp_path}/catalog.db") as store:
        run = Run(store)
        for _ in range(3):
            run.commit(Staggered(2))
        first = preview(store, Staggered(2))
        shutil.rmtree(tmp_path / "root" / "layers")
        shutil.rmtree(tmp_path / "root" / "commits")
        assert preview(store, Staggered(2)) == first
        assert len(store.log()) == 3


def test_names_are_in_the_order_that_is_asked_for_and_gc_may_have_dropped_the_commit_before(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        run = Run(store)
        for _ in range(3):
            run.commit(All())
        store.gc(ts.KeepLast(1))
        plan = preview(store, Parity(), order=lambda name: -int(name[2:]))
        assert [one.layer for one in plan.layers] == LAYERS[::-1]
        assert plan.number == 1


def test_a_branch_without_commits_has_no_next_one(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store, pytest.raises(BranchNotFoundError):
        preview(store, All())
