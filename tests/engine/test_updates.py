"""What was measured comes back as arrays of commits × layers."""

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import BranchNotFoundError, InvalidInputError
from tailorstore.domain.records import MEASURES, Commit, LayerMeasures
from tailorstore.engine.updates import collect_updates
from tests.kit.models import adamw, gpt, train

COMMIT = Commit(
    id="c",
    step=0,
    branch="main",
    parent=None,
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    message=None,
    metrics={},
    layers_written=(),
    bytes_written=0,
    bytes_logical=0,
)


def at(step: int) -> Commit:
    return replace(COMMIT, step=step)


def test_figures_stand_by_commit_and_layer() -> None:
    rows = [
        (at(10), {"b": LayerMeasures(None, None, 0.5, None, None)}),
        (
            at(20),
            {"a": LayerMeasures(1.0, 0.1, 2.0, 3.0, 4.0), "b": LayerMeasures(None, None, None, None, None, False)},
        ),
    ]
    found = collect_updates(rows, order=["b", "a"])
    assert found.steps.tolist() == [10, 20]
    assert found.steps.dtype == np.int64
    assert found.layers == ("b", "a")
    assert tuple(found.values) == MEASURES
    assert {found.of(name).shape for name in MEASURES} == {(2, 2)}
    assert found.of("drift")[1].tolist()[1] == 1.0
    assert [math.isnan(value) for value in found.of("drift").flat] == [True, True, True, False]
    assert found.of("momentum")[:, 1].tolist()[1] == 2.0
    assert [float(found.of(name)[1, 1]) for name in MEASURES] == [1.0, 0.1, 2.0, 3.0, 4.0]
    assert found.finite.tolist() == [[True, True], [False, True]]


def test_layers_stand_in_the_order_that_is_asked_for() -> None:
    one = LayerMeasures(1.0, None, None, None, None)
    found = collect_updates([(at(1), dict.fromkeys(("c", "a", "b"), one))], order=["b", "missing", "a"])
    assert found.layers == ("b", "a", "c")


def test_a_branch_at_which_nothing_was_measured_gives_empty_arrays() -> None:
    assert collect_updates([]).of("drift").shape == (0, 0)
    found = collect_updates([(at(1), {}), (at(2), {})])
    assert found.of("gradient").shape == found.finite.shape == (2, 0)


def test_an_unknown_measure_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidInputError, match=r"no measure 'momentun'.*did you mean 'momentum'"):
        collect_updates([]).of("momentun")
    with pytest.raises(InvalidInputError, match="measures are drift, relative_drift"):
        collect_updates([]).of("xyz")


def test_a_store_tells_how_its_layers_moved(tmp_path: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    with ts.open_store(tmp_path / "root") as store:
        with store.watch(optimizer, every=1):
            for step in (2, 4, 6):
                train(model, [optimizer], 2, seed=step)
                store.commit(step, model, optimizer, mask=["transformer.h.0"])
        found = store.updates()
        assert found.steps.tolist() == [2, 4, 6]
        assert set(found.layers) == {layer.name for layer in store.layers()} - {"@extra"}
        written, left = found.layers.index("transformer.h.0"), found.layers.index("transformer.h.1")
        drift = found.of("drift")
        assert np.isnan(drift[0]).all()  # nothing had been saved
        assert drift[2, left] > drift[1, left] > 0
        assert drift[2, written] < drift[2, left]
        for name in ("momentum", "gradient"):
            assert (found.of(name) > 0).all()
        assert (found.of("curvature")[1:] > 0).all()
        assert found.finite.all()
        assert store.updates(limit=1).steps.tolist() == [6]
        with pytest.raises(BranchNotFoundError):
            store.updates("nowhere")


def test_a_layer_with_nan_is_recorded_as_not_finite(tmp_path: Path) -> None:
    model = {"a.weight": torch.ones(4), "b.weight": torch.ones(4)}
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, model)
        model["a.weight"][2] = math.nan
        store.commit(2, model)
        found = store.updates()
    assert found.layers == ("a", "b")
    assert found.finite.tolist() == [[True, True], [False, True]]
    assert np.isnan(found.of("drift")[:, 0]).all()
    assert found.of("drift")[1, 1] == 0.0
