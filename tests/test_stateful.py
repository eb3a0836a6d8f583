"""A store does what a few dictionaries would do, whatever is asked of it in whatever order: :mod:`tests.kit.model`.

``HYPOTHESIS_PROFILE`` chooses how long it is tried: ``dev``, ``ci`` (the default: the same runs each time) or
``nightly``.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

import tailorstore as ts
from tailorstore.domain.errors import BranchExistsError, StepOrderError, TagExistsError
from tailorstore.domain.retention import RetentionPolicy
from tests.kit.audit import all_commits, assert_root_is_exact
from tests.kit.model import Layer, Model, ModelCommit, State
from tests.kit.models import assert_same, same_bits

LAYERS = ("a", "b/x", "c")
BRANCHES = ("main", "side", "try/2")
TAGS = ("v1", "best", "paper")
NOW = timedelta(0)
PROFILES = {"dev": (8, 12), "ci": (30, 25), "nightly": (1000, 60)}
"""How many runs, and how many steps each."""

values = st.integers(0, 3)
metrics = st.dictionaries(
    st.sampled_from(["loss", "score"]), st.sampled_from([0.5, 1.0, 1.0, -2.5, math.nan, math.inf]), max_size=2
)
policies = st.one_of(
    st.none(),
    st.builds(ts.KeepLast, st.integers(1, 3)),
    st.builds(ts.KeepEvery, st.integers(1, 4)),
    st.builds(ts.KeepBest, st.sampled_from(["loss", "score"]), st.integers(1, 2), st.sampled_from(["min", "max"])),
    st.just(ts.KeepTagged()),
    st.builds(lambda n, every: ts.KeepLast(n) | ts.KeepEvery(every), st.integers(1, 2), st.integers(2, 4)),
    st.just(ts.KeepWithin(timedelta(days=1))),
)


def tensors_of(layer: str, value: int) -> State:
    """Return a layer's tensors: equal for equal values, bit by bit.

    Codes of four bits hold the difference of any two of them exactly, but for the sign of zero.
    """
    w = torch.full((300,), [0.0, -0.0, 1.75, math.nan][value])
    # Tensors of a dictionary count as buffers, which are stored exactly if they are never negative.
    w[0] = -7
    return {
        f"{layer}.w": w,
        f"{layer}.v": torch.full((3, 0) if layer == "c" else (2,), value, dtype=torch.bfloat16),
    }


def lightened(tensors: State, base: State) -> State:
    """Return what a light version of a layer restores: zeros lose their sign, unless they are stored exactly."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.numel() >= LIGHT.exact_below and not tensor.isnan().any() and not base[name].isnan().any():
            found[name] = tensor + 0.0
    return found


LIGHT = ts.LightSettings(weight_bits=4, exact_below=64, max_base_commits=None)


class StoreMachine(RuleBasedStateMachine):
    """Drives a real store and its model side by side."""

    template: ClassVar[Path]
    """A root with an empty store, to be copied."""
    catalog: ClassVar[str | None] = None

    commits = Bundle("commits")
    checkpoints = Bundle("checkpoints")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ts-state-", dir=self.template.parent))
        self.root = self.folder / "root"
        self.model = Model()
        self.live: dict[str, int] = dict.fromkeys(LAYERS, 0)
        self.branch = "main"
        self.open_checkpoints: list[tuple[ts.Checkpoint, str]] = []
        self.store = self.open_first()

    def open_first(self) -> ts.Store:
        shutil.copytree(self.template, self.root)
        return self.open()

    def open(self) -> ts.Store:
        return ts.open_store(self.root, catalog=self.catalog, branch=self.branch, chunk_bytes=1024, light=LIGHT)

    def teardown(self) -> None:
        for checkpoint, _ in self.open_checkpoints:
            checkpoint.close()
        self.store.close()
        shutil.rmtree(self.folder)

    def state(self) -> State:
        return {name: tensor for layer, value in self.live.items() for name, tensor in tensors_of(layer, value).items()}

    # --- Commits

    @rule(
        target=commits,
        changes=st.dictionaries(st.sampled_from(LAYERS), values, max_size=3),
        mask=st.none() | st.dictionaries(st.sampled_from(LAYERS), st.sampled_from([True, "light", "light"])),
        metrics=metrics,
        ahead=st.integers(0, 2),
        block=st.booleans(),
    )
    def commit(
        self,
        changes: dict[str, int],
        mask: dict[str, Any] | None,
        metrics: dict[str, float],
        ahead: int,
        *,
        block: bool,
    ) -> str:
        self.live |= changes
        head = self.model.head(self.branch)
        step = self.model.next_step(self.branch) + ahead
        due: dict[str, Any] = dict.fromkeys(LAYERS, True) if mask is None or head is None else mask
        layers = dict(head.layers) if head is not None else {}
        for layer, fidelity in due.items():
            layers[layer] = self.layer_after(layers.get(layer), layer, step, light=fidelity == "light")
        written = {layer for layer in due if head is None or layers[layer] is not head.layers[layer]}
        pending: Any = self.store.commit(
            step,
            self.state(),
            mask=mask,
            metrics=metrics,
            extra={"at": step},
            block=block,
        )  # type: ignore[call-overload]
        commit: ts.Commit = pending if block else pending.result(60)
        assert (commit.step, commit.branch, commit.parent) == (step, self.branch, head.id if head else None)
        assert set(commit.layers_written) == written
        self.model.parents[commit.id] = commit.parent
        self.model.publish(ModelCommit(commit.id, step, self.branch, commit.parent, metrics, layers))
        return commit.id

    def layer_after(self, before: Layer | None, layer: str, step: int, *, light: bool) -> Layer:
        """Return a layer as a commit leaves that is to write it; what is equal to the bit keeps its version."""
        tensors = tensors_of(layer, self.live[layer])
        if before is None or not light:
            same = before is not None and before.base is None and _same_state(before.tensors, tensors)
            return before if before is not None and same else Layer(step, tensors)
        if before.base is None:
            if _same_state(before.tensors, tensors):
                return before
            return Layer(step, lightened(tensors, before.tensors), before.tensors)
        tensors = lightened(tensors, before.base)
        return before if _same_state(before.tensors, tensors) else Layer(step, tensors, before.base)

    @precondition(lambda self: self.model.head(self.branch) is not None)
    @rule(back=st.integers(0, 3))
    def commit_a_step_that_is_not_after_the_head(self, back: int) -> None:
        head = self.model.head(self.branch)
        assert head is not None
        with pytest.raises(StepOrderError, match=str(head.step)):
            self.store.commit(max(0, head.step - back), self.state())

    # --- Names

    @rule(name=st.sampled_from(TAGS), commit=commits)
    def tag(self, name: str, commit: str) -> None:
        if commit not in self.model.commits:
            with pytest.raises(ts.NotFoundError):
                self.store.tag(name, commit)
        elif name in self.model.tags:
            with pytest.raises(TagExistsError, match=name):
                self.store.tag(name, commit)
        else:
            assert self.store.tag(name, commit).id == commit
            self.model.tags[name] = commit

    @rule(name=st.sampled_from(TAGS))
    def delete_tag(self, name: str) -> None:
        if name in self.model.tags:
            self.store.delete_tag(name)
            del self.model.tags[name]
        else:
            with pytest.raises(ts.NotFoundError, match=name):
                self.store.delete_tag(name)

    @rule(name=st.sampled_from(BRANCHES), commit=commits, move=st.booleans())
    def point_branch(self, name: str, commit: str, *, move: bool) -> None:
        if commit not in self.model.commits:
            with pytest.raises(ts.NotFoundError):
                self.store.branch(name, commit, move=move)
        elif name in self.model.logs and not move:
            with pytest.raises(BranchExistsError, match="move"):
                self.store.branch(name, commit)
        else:
            assert self.store.branch(name, commit, move=move).id == commit
            self.model.point(name, commit)

    @rule(name=st.sampled_from(BRANCHES))
    def delete_branch(self, name: str) -> None:
        if list(self.model.logs) == [name]:
            with pytest.raises(ts.InvalidInputError, match="only one"):
                self.store.delete_branch(name)
        elif name in self.model.logs:
            self.store.delete_branch(name)
            del self.model.logs[name]
        else:
            with pytest.raises(ts.NotFoundError):
                self.store.delete_branch(name)

    @rule(name=st.sampled_from(BRANCHES))
    def work_on_another_branch(self, name: str) -> None:
        self.branch = name
        self.reopen()

    # --- Readers

    @rule(target=checkpoints, commit=commits)
    def hold(self, commit: str) -> Any:
        if commit not in self.model.commits:
            with pytest.raises(ts.NotFoundError):
                self.store.checkout(commit)
            return multiple()
        held = (self.store.checkout(commit), commit)
        self.open_checkpoints.append(held)
        self.model.held.append(commit)
        return held

    @rule(held=checkpoints)
    def read_what_is_held(self, held: tuple[ts.Checkpoint, str]) -> None:
        if held in self.open_checkpoints:
            self.compare(held[0], held[1])

    @rule(held=consumes(checkpoints))
    def let_go(self, held: tuple[ts.Checkpoint, str]) -> None:
        if held in self.open_checkpoints:
            held[0].close()
            self.open_checkpoints.remove(held)
            self.model.held.remove(held[1])

    @rule(commit=commits)
    def read(self, commit: str) -> None:
        if commit in self.model.commits:
            with self.store.checkout(commit) as checkpoint:
                self.compare(checkpoint, commit)

    def compare(self, checkpoint: ts.Checkpoint, commit: str) -> None:
        expected = self.model.commits[commit]
        assert checkpoint.commit.id == commit
        assert checkpoint.sources == {"@extra": expected.step, **expected.sources}
        assert checkpoint.fidelity == {"@extra": "full", **expected.fidelity}
        assert checkpoint.staleness == {layer: expected.step - at for layer, at in checkpoint.sources.items()}
        # As text, because a NaN does not equal itself.
        assert {k: repr(v) for k, v in checkpoint.metrics.items()} == {k: repr(v) for k, v in expected.metrics.items()}
        assert_same(checkpoint.model_state_dict(), expected.tensors)
        target = {name: torch.ones_like(tensor) for name, tensor in expected.tensors.items()}
        assert checkpoint.restore(target) == {"at": expected.step}
        assert_same(target, expected.tensors)

    # --- Upkeep

    @rule(policy=policies, long=st.booleans())
    def collect(self, policy: RetentionPolicy | None, *, long: bool) -> None:
        kept = self.kept_by(policy)
        preview = self.store.gc(policy, dry_run=True, grace=timedelta(hours=1) if long else NOW)
        before = set(self.model.commits)
        dropped = self.model.drop_all_but(kept)
        report = self.store.gc(policy, grace=timedelta(hours=1) if long else NOW)
        assert {commit.id for commit in report.expired} == {commit.id for commit in preview.expired} == dropped
        assert set(report.kept) == before - dropped
        assert all(report.kept.values())
        assert (report.versions_doomed, report.bytes_doomed) == (preview.versions_doomed, preview.bytes_doomed)
        assert report.deletes_failed == 0
        if long:
            assert report.versions_swept == report.objects_deleted - len(dropped) == 0
        else:
            assert_root_is_exact(self.store)

    def kept_by(self, policy: RetentionPolicy | None) -> set[str]:
        match policy:
            case None | ts.KeepWithin():
                return set(self.model.commits)
            case ts.KeepLast(n=n):
                return self.model.last(n)
            case ts.KeepEvery(steps=steps):
                return self.model.every(steps)
            case ts.KeepBest(metric=metric, n=n, mode=mode):
                return self.model.best(metric, n, mode)
            case ts.KeepTagged():
                return set()
            case _:
                return set().union(*(self.kept_by(one) for one in policy.policies))  # type: ignore[attr-defined]

    @rule()
    def reopen(self) -> None:
        """Open the store anew, as the next process does; the readers of this one are gone."""
        for checkpoint, _ in self.open_checkpoints:
            checkpoint.close()
        self.open_checkpoints.clear()
        self.model.held.clear()
        self.store.close()
        self.store = self.open()

    @precondition(lambda self: self.catalog is None)
    @rule(by_force=st.booleans())
    def rebuild(self, *, by_force: bool) -> None:
        """Lose the catalog, and make it again from the manifests; or take over what is one's own."""
        self.reopen()
        if not by_force:
            self.store.close()
            for left in self.root.glob("catalog.sqlite*"):
                left.unlink()
            self.store = self.open()
            assert not self.store.writable
            self.look()
        self.check_rebuilt(self.store)

    def check_rebuilt(self, store: ts.Store) -> None:
        report = store.rebuild_catalog()
        assert store.writable
        assert report.commits == len(self.model.commits)
        assert report.unreadable == report.unplaced == ()

    @rule()
    def verify(self) -> None:
        assert self.store.verify().ok

    # --- What must hold at any time

    @invariant()
    def look(self) -> None:
        self.look_at_names(self.store)
        for branch, log in self.model.logs.items():
            assert [commit.id for commit in self.store.log(branch)] == log
        head = self.model.head(self.branch)
        if head is not None:
            with self.store.checkout() as checkpoint:
                self.compare(checkpoint, head.id)

    def look_at_names(self, store: ts.Store) -> None:
        assert set(all_commits(store)) == set(self.model.commits)
        assert {ref.name: ref.commit for ref in store.branches()} == {n: log[0] for n, log in self.model.logs.items()}
        assert {ref.name: ref.commit for ref in store.tags()} == self.model.tags


def _same_state(a: State, b: State) -> bool:
    return all(same_bits(a[name], tensor) for name, tensor in b.items())


@pytest.mark.parametrize("way", ["deleted", "moved"])
def test_a_rebuild_keeps_what_a_branch_has_left(tmp_path: Path, way: str) -> None:
    """Found by the machine: two commits with one parent look like two that raced, of which one was never published."""
    with ts.open_store(tmp_path / "root") as store:
        store.commit(0, {"a.w": torch.zeros(3)})
        first = store.commit(1, {"a.w": torch.ones(3)})
        if way == "deleted":
            store.branch("other", 0)
            store.delete_branch("main")
            second = store.commit(0, {"a.w": torch.zeros(3)})
        else:
            store.branch("main", 0, move=True)
            second = store.commit(1, {"a.w": torch.full((3,), 2.0)})
        before = set(all_commits(store))
        report = store.rebuild_catalog()
        assert set(all_commits(store)) == before
        assert {first.id, second.id} <= before
        assert report.unplaced == ()
        assert store.log()[0].id == second.id
        store.gc(grace=NOW)
        assert store.checkout(first.id).model_state_dict()["a.w"].tolist() == [1, 1, 1]


def run(machine: type[StoreMachine], *, divide: int = 1) -> None:
    profile = os.environ.get("HYPOTHESIS_PROFILE", "ci")
    runs, steps = PROFILES[profile]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, runs // divide),
            stateful_step_count=steps,
            deadline=None,
            derandomize=profile == "ci",
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            # Shrinking a failure takes longer than a run may last in CI; `nightly` has the time.
            phases=[Phase.explicit, Phase.generate] + ([Phase.shrink] if profile == "nightly" else []),
        ),
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder in memory where there is one: thousands of flushes to a disk would take minutes."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ts-state-", dir=memory) as made:
        yield Path(made)


@pytest.mark.slow
def test_a_store_does_what_a_few_dictionaries_would(folder: Path) -> None:
    with ts.open_store(folder / "template"):
        pass

    class OnSqlite(StoreMachine):
        template = folder / "template"

    run(OnSqlite)


@pytest.mark.slow
def test_a_store_on_postgres_does_so_too(folder: Path, postgres_url: str) -> None:
    (folder / "template").mkdir()

    class OnPostgres(StoreMachine):
        """Every run is a store of its own in the one catalog."""

        template = folder / "template"
        catalog = postgres_url

    run(OnPostgres, divide=6)
