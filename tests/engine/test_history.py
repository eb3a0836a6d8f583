"""Steps, refs, branches, tags, diffs: the line of commits and the ways to name one."""

from collections.abc import Iterator
from pathlib import Path
from typing import SupportsFloat

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import (
    AmbiguousRefError,
    BadNameError,
    BranchExistsError,
    BranchNotFoundError,
    ClosedError,
    ModelMismatchError,
    RefNotFoundError,
    StepOrderError,
    TagExistsError,
)
from tests.conftest import Root
from tests.kit.models import adamw, assert_same, gpt, snapshot, train


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ts.Store]:
    with ts.open_store(tmp_path / "root") as opened:
        yield opened


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.w": torch.full((3,), float(value)), "b.w": torch.full((2,), float(value))}


def fill(store: ts.Store, *steps: int) -> list[ts.Commit]:
    return [store.commit(step, weights(step)) for step in steps]


def test_log_is_newest_first(store: ts.Store) -> None:
    fill(store, 10, 20, 30)
    assert [commit.step for commit in store.log()] == [30, 20, 10]
    assert [commit.step for commit in store.log(limit=2)] == [30, 20]
    assert store.log()[0].parent == store.log()[1].id


def test_every_form_of_ref(store: ts.Store) -> None:
    commits = fill(store, 10, 20, 30)
    store.tag("best", 20)
    store.branch("try", 10)
    refs: list[tuple[str | int, int]] = [
        ("latest", 30),
        (20, 20),
        ("20", 20),
        ("main", 30),
        ("main@10", 10),
        ("best", 20),
        ("try", 10),
        ("try@10", 10),
        (commits[0].id, 10),
        (commits[1].id[:14], 20),
    ]
    for ref, step in refs:
        with store.checkout(ref) as checkpoint:
            assert checkpoint.step == step, ref
            assert checkpoint.model_state_dict()["a.w"][0] == step


def test_refs_that_name_nothing_say_what_is_near(store: ts.Store) -> None:
    with pytest.raises(RefNotFoundError, match="main"):
        store.checkout()
    fill(store, 10, 20, 30)
    store.tag("release", 20)
    with pytest.raises(RefNotFoundError, match=r"10.*20|20.*10"):
        store.checkout(15)
    with pytest.raises(RefNotFoundError, match="release"):
        store.checkout("release2")
    with pytest.raises(RefNotFoundError):
        store.checkout("main@11")
    with pytest.raises(BranchNotFoundError, match="main"):
        store.log("nope")


def test_a_step_on_two_other_branches_is_ambiguous(tmp_path: Path) -> None:
    for branch in ("one", "two"):
        with ts.open_store(tmp_path / "root", branch=branch) as store:
            store.commit(5, weights(1))
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
        with pytest.raises(AmbiguousRefError, match=r"one@5.*two@5"):
            store.checkout(5)
        assert store.checkout("two@5").commit.branch == "two"


def test_steps_must_grow_and_the_error_names_both_ways_on(store: ts.Store) -> None:
    fill(store, 10, 20)
    for step in (20, 15):
        with pytest.raises(StepOrderError) as caught:
            store.commit(step, weights(0))
        assert "branch(" in str(caught.value)
        assert "move=True" in str(caught.value)
    assert [commit.step for commit in store.log()] == [20, 10]


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, None, 2**63])
def test_steps_that_are_none_are_refused(store: ts.Store, step: object) -> None:
    with pytest.raises(ts.InvalidInputError, match="step"):
        store.commit(step, weights(0))  # type: ignore[call-overload]


def test_a_fork_shares_its_layers_and_goes_on(root: Root, catalog_url: str) -> None:
    def opened(branch: str = "main") -> ts.Store:
        return ts.open_store(root.url, catalog=catalog_url, storage_options=root.storage_options, branch=branch)

    with opened() as store:
        fill(store, 10, 20, 30)
        store.branch("retry", "main@10")
        before = store.stats().versions
    with opened("retry") as store:
        assert store.stats().versions == before
        store.commit(15, {**weights(10), "b.w": torch.full((2,), 15.0)})
        assert [commit.step for commit in store.log()] == [15, 10]
        assert [commit.step for commit in store.log("main")] == [30, 20, 10]
        checkpoint = store.checkout()
        assert checkpoint.sources == {"@extra": 15, "a": 10, "b": 15}
        assert store.checkout("main@20").step == 20
        assert sorted((ref.name, ref.step) for ref in store.branches()) == [("main", 30), ("retry", 15)]


def test_moving_a_branch_back_lets_training_go_on_from_there(store: ts.Store) -> None:
    fill(store, 10, 20, 30)
    with pytest.raises(BranchExistsError, match="move"):
        store.branch("main", 10)
    store.branch("main", 10, move=True)
    assert [commit.step for commit in store.log()] == [10]
    store.commit(20, weights(21))
    assert [commit.step for commit in store.log()] == [20, 10]
    assert store.checkout(20).model_state_dict()["a.w"][0] == 21


def test_names_of_branches_and_tags(store: ts.Store) -> None:
    fill(store, 10)
    store.tag("v1")
    with pytest.raises(TagExistsError, match="v1"):
        store.tag("v1")
    with pytest.raises((BranchExistsError, TagExistsError)):
        store.branch("v1", 10)
    for bad in ("latest", "12", "a b", "../x", ""):
        with pytest.raises(BadNameError):
            store.tag(bad)
        with pytest.raises(BadNameError):
            store.branch(bad, 10)
    assert [(tag.name, tag.step) for tag in store.tags()] == [("v1", 10)]
    store.delete_tag("v1")
    assert store.tags() == []
    with pytest.raises(RefNotFoundError):
        store.delete_tag("v1")


def test_diff_compares_content(store: ts.Store) -> None:
    store.commit(1, weights(1))
    store.commit(2, {**weights(1), "b.w": torch.zeros(2)})
    store.commit(3, weights(1))
    # `@extra` counts commits, so it is never the same.
    assert store.diff(1, 2).changed == ("@extra", "b")
    # Step 3 wrote `b` anew with the content of step 1.
    assert store.diff(1, 3).changed == ("@extra",)
    assert [entry.step_b for entry in store.diff(1, 3).entries if entry.layer == "b"] == [3]


def test_layers_and_stats(store: ts.Store) -> None:
    fill(store, 10)
    store.commit(20, weights(10) | {"a.w": torch.zeros(3)}, mask=["a"])
    layers = {layer.name: layer for layer in store.layers()}
    assert (layers["a"].source_step, layers["a"].staleness, layers["a"].versions) == (20, 0, 2)
    assert (layers["b"].source_step, layers["b"].staleness, layers["b"].bytes_logical) == (10, 10, 8)
    stats = store.stats()
    assert (stats.commits, stats.branches, stats.tags) == (2, 1, 0)
    assert stats.bytes_stored > 0


def test_a_model_that_is_another_is_refused_by_name(store: ts.Store) -> None:
    store.commit(1, weights(1))
    with pytest.raises(ModelMismatchError, match=r"layer 'c' is new"):
        store.commit(2, weights(1) | {"c.w": torch.ones(1)})
    with pytest.raises(ModelMismatchError, match=r"layer 'b' is gone"):
        store.commit(2, {"a.w": torch.ones(3)})
    with pytest.raises(ModelMismatchError, match=r"'a\.w' has shape \(4,\), was \(3,\)"):
        store.commit(2, weights(1) | {"a.w": torch.ones(4)}, mask=["b"])
    with pytest.raises(ModelMismatchError, match=r"'a\.v' is new.*branch='NEW'"):
        store.commit(2, weights(1) | {"a.v": torch.ones(4)})
    assert [commit.step for commit in store.log()] == [1]


def test_another_model_goes_on_a_new_branch(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
    with ts.open_store(tmp_path / "root", branch="wide") as store:
        store.commit(1, {"a.w": torch.ones(9)})
        assert [commit.step for commit in store.log()] == [1]
        assert store.checkout("main").model["a.w"].shape == (3,)


HOSTILE = [
    "../../etc/passwd",
    "a/b/c",
    "..",
    ".",
    "",
    " ",
    "zarr.json",
    "c",
    "@optim",
    "@optim.exp_avg",
    "__x",
    "naïve.模型",
    "x" * 300,
    "a\x00b",
    "C:\\x",
    "~root",
    "$HOME",
    "%2e%2e",
    "\udc80",
    "w.W",
    "W.w",
    "@extras",
]


def test_hostile_names_are_stored_safely_and_restored_exactly(root: Root, catalog_url: str, tmp_path: Path) -> None:
    state = {name: torch.full((2,), float(at)) for at, name in enumerate(HOSTILE)}
    with ts.open_store(root.url, catalog=catalog_url, storage_options=root.storage_options) as store:
        store.commit(1, state)
        assert_same(store.checkout().model_state_dict(), state)
        assert store.verify().ok
        optim = {name: {name: torch.ones(2), "s": torch.ones(1)} for name in HOSTILE if not name.startswith("$")}
        store.commit(2, state, optim)
        found = store.checkout().optim
        assert sorted(found) == sorted(optim)
        for name in optim:
            assert sorted(found[name]) == sorted(optim[name])
    if root.url.startswith("file:"):
        outside = [path for path in tmp_path.rglob("*") if path.is_file() and "root" not in path.parts]
        assert all(path.name.startswith("catalog.db") for path in outside)


def test_a_layer_of_the_name_of_ours_is_refused(store: ts.Store) -> None:
    with pytest.raises(ts.InvalidInputError, match="@extra"):
        store.commit(1, {"@extra": torch.ones(1)})


def test_metrics_that_are_not_numbers_are_stored_and_others_refused(store: ts.Store) -> None:
    metrics: dict[str, SupportsFloat] = {"loss": float("nan"), "up": float("inf"), "t": torch.tensor(2.0)}
    commit = store.commit(1, weights(1), metrics=metrics)
    assert str(store.log()[0].metrics["loss"]) == "nan"
    assert commit.metrics["up"] == float("inf")
    assert commit.metrics["t"] == 2.0
    with pytest.raises(ts.InvalidInputError, match="'loss'"):
        store.commit(2, weights(1), metrics={"loss": "low"})  # type: ignore[dict-item]


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = ts.open_store(tmp_path / "root")
    store.commit(1, weights(1))
    checkpoint = store.checkout()
    store.close()
    store.close()
    for use in (lambda: store.commit(2, weights(1)), store.log, store.checkout, store.gc, lambda: store.tag("x")):
        with pytest.raises(ClosedError):
            use()
    checkpoint.close()
    with pytest.raises(ClosedError):
        checkpoint.model_state_dict()


def test_two_stores_on_one_branch_take_turns(tmp_path: Path) -> None:
    model = gpt()
    optim = adamw(model)
    with ts.open_store(tmp_path / "root") as one, ts.open_store(tmp_path / "root") as two:
        one.commit(1, model, optim)
        train(model, [optim], 1)
        two.commit(2, model, optim)
        train(model, [optim], 1)
        one.commit(3, model, optim, mask=["lm_head"])
        assert one.checkout().sources["transformer.wte"] == 2
        expected = snapshot(model)["lm_head.weight"]
        assert torch.equal(two.checkout().model_state_dict()["lm_head.weight"], expected)
