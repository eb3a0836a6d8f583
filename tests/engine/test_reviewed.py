"""What reviewers broke, and must stay mended."""

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tailorstore as ts
from tailorstore.domain.errors import (
    ExtraStateError,
    RestoreMismatchError,
    RootTakenError,
    StorageUnavailableError,
)
from tailorstore.domain.names import COMMITS_PREFIX
from tailorstore.storage.transport import DeleteFailure
from tests.kit.models import adamw, assert_same, gpt, nudge, same_bits, snapshot, train

NOW = timedelta(0)


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.w": torch.full((64,), float(value)), "b.w": torch.full((64,), float(value))}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ts.Store]:
    with ts.open_store(tmp_path / "root") as opened:
        yield opened


def test_a_commit_that_loses_the_root_after_its_manifest_leaves_it_to_the_new_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = f"sqlite:///{tmp_path}/other.db"
    with ts.open_store(tmp_path / "root") as first:
        first.commit(1, weights(1))
        get = first._objects.get

        def get_after_take_over(key: str, *, limit: int | None = None) -> memoryview:
            if key == "tailorstore.json" and list((tmp_path / "root/commits").iterdir())[1:]:
                with ts.open_store(tmp_path / "root", catalog=other) as second:
                    second.rebuild_catalog()
            return get(key, limit=limit)

        monkeypatch.setattr(first._objects, "get", get_after_take_over)
        with pytest.raises(RootTakenError):
            first.commit(2, weights(2))
    with ts.open_store(tmp_path / "root", catalog=other) as second:
        assert second.checkout().step == 2
        assert_same(second.checkout().model_state_dict(), weights(2))
        assert second.verify().ok


def test_an_interrupted_wait_does_not_let_the_next_commit_use_memory_in_use(
    store: ts.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    put = store._objects.put
    monkeypatch.setattr(store._objects, "put", lambda *args: gate.wait(60) and put(*args))
    first = store.commit(1, weights(1), block=False)
    waiting = first.wait
    monkeypatch.setattr(first, "wait", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.commit(2, weights(2), block=False)
    monkeypatch.setattr(first, "wait", waiting)
    threading.Timer(0.2, gate.set).start()
    store.commit(2, weights(2), block=False).result(60)
    for step in (1, 2):
        assert_same(store.checkout(step).model_state_dict(), weights(step))


def test_layers_stay_as_long_as_a_manifest_means_them(
    store: ts.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        store.commit(step, weights(step))
    delete = store._objects.delete

    def no_manifests(keys: Sequence[str]) -> list[DeleteFailure]:
        kept = [key for key in keys if key.startswith(COMMITS_PREFIX)]
        return [*delete([key for key in keys if key not in kept]), *(DeleteFailure(key, "busy") for key in kept)]

    monkeypatch.setattr(store._objects, "delete", no_manifests)
    report = store.gc(ts.KeepLast(1), grace=NOW)
    assert report.deletes_failed == 2
    assert report.versions_swept == 0
    monkeypatch.undo()
    with ts.open_store(tmp_path / "root", catalog=f"sqlite:///{tmp_path}/other.db") as other:
        other.rebuild_catalog()
        assert [commit.step for commit in other.log()] == [3, 2, 1]
        assert other.verify().ok


def test_of_two_take_overs_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tailorstore.engine import session

    catalog = f"sqlite:///{tmp_path}/shared.db"
    with ts.open_store(tmp_path / "root") as owner:
        owner.commit(1, weights(1))
    with (
        ts.open_store(tmp_path / "root", catalog=catalog) as slow,
        ts.open_store(tmp_path / "root", catalog=catalog) as fast,
    ):
        read = session.read_history  # type: ignore[attr-defined]

        def read_slowly(*args: Any) -> Any:
            history = read(*args)
            monkeypatch.setattr(session, "read_history", read)
            monkeypatch.setattr(session, "read_binding", lambda _: slow._session.binding)
            fast.rebuild_catalog()
            monkeypatch.undo()
            fast.commit(2, weights(2))
            return history

        monkeypatch.setattr(session, "read_history", read_slowly)
        with pytest.raises(RootTakenError):
            slow.rebuild_catalog()
        assert [commit.step for commit in fast.log()] == [2, 1]


def test_a_tag_waits_for_the_commit_it_means(store: ts.Store) -> None:
    store.commit(1, weights(1))
    store.commit(2, weights(2), block=False)
    assert store.tag("best").step == 2
    store.commit(3, weights(3), block=False)
    assert store.checkout().step == 3
    assert store.checkout(store.log()[-1]).step == 1


def test_a_tag_does_not_land_on_the_old_head_when_the_commit_failed(
    store: ts.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit(1, weights(1))
    monkeypatch.setattr(store._objects, "put", lambda *_: (_ for _ in ()).throw(StorageUnavailableError("away")))
    store.commit(2, weights(2), block=False)
    with pytest.raises(StorageUnavailableError, match="away"):
        store.tag("best")
    assert store.tags() == []


def test_optimizer_state_of_some_layers_only_is_a_mismatch(store: ts.Store) -> None:
    model = gpt()
    optim = adamw(model)
    train(model, [optim], 1)
    store.commit(1, model, optim)
    nudge(model)
    store.commit(2, model, mask=["lm_head"])
    with pytest.raises(RestoreMismatchError, match="no optimizer state"):
        store.checkout().restore(model, optim)
    store.checkout().restore(model, optim, strict=False)


def test_slots_keep_the_strides_of_their_parameters(store: ts.Store) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model: nn.Module, optim: torch.optim.Optimizer, seed: int) -> None:
        data = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        optim.zero_grad()
        model(data).square().mean().backward()
        optim.step()

    model, optim = make()
    step(model, optim, 1)
    store.commit(1, model, optim)
    step(model, optim, 2)
    other, again = make()
    store.checkout().restore(other, again)
    step(other, again, 2)
    assert_same(snapshot(other), snapshot(model))


def test_another_kind_of_optimizer_is_a_mismatch(store: ts.Store) -> None:
    model = gpt()
    store.commit(1, model, adamw(model))
    with pytest.raises(RestoreMismatchError, match=r"it is a SGD.*AdamW"):
        store.checkout().restore(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_optimizer_around_another_keeps_its_own_state(store: ts.Store) -> None:
    class Slow(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.optimizer = torch.optim.AdamW(self.param_groups[0]["params"])

    model = {"w": nn.Parameter(torch.ones(3))}
    optim = Slow(model.values())
    optim.state[model["w"]] = {"slow": torch.full((3,), 7.0)}
    store.commit(1, model, optim)
    assert store.checkout().optim["w"]["slow"].load().tolist() == [7, 7, 7]


def test_negative_views_are_no_aliases(store: ts.Store) -> None:
    z = torch.complex(torch.ones(3), torch.full((3,), 2.0))
    state = {"a": z.imag, "b": z.conj().imag}
    store.commit(1, state)
    found = store.checkout().model_state_dict()
    assert found["a"].tolist() == [2, 2, 2]
    assert found["b"].tolist() == [-2, -2, -2]


def test_names_that_look_like_those_of_compiled_modules(store: ts.Store) -> None:
    state = {"x_orig_mod.y": torch.ones(1), "xy": torch.zeros(1), "_orig_mod.z": torch.ones(2)}
    store.commit(1, state)
    assert_same(store.checkout().model_state_dict(), state)


def test_untied_weights_do_not_fit_a_tied_model(store: ts.Store) -> None:
    store.commit(1, gpt())
    with pytest.raises(RestoreMismatchError, match=r"tied: lm_head\.weight"):
        store.checkout().restore(gpt(tied=True))


def test_extra_state_of_modules_counts_as_a_difference(store: ts.Store) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"n": 1}

        def set_extra_state(self, state: Any) -> None:
            self.n = state["n"]

    store.commit(1, Stateful(2, 2))
    plain = nn.Linear(2, 2)
    before = snapshot(plain)
    with pytest.raises(RestoreMismatchError, match="unexpected: extra state _extra_state"):
        store.checkout().restore(plain)
    assert_same(snapshot(plain), before)


def test_verify_beside_gc_reports_no_damage(store: ts.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        store.commit(step, weights(step))
    versions = list(store._catalog.live_versions())
    monkeypatch.setattr(store._catalog, "live_versions", lambda: iter(versions))
    commits = store._catalog.inventory()
    monkeypatch.setattr(store._catalog, "inventory", lambda: commits)
    with ts.open_store(store.url) as collector:
        collector.gc(ts.KeepLast(1), grace=NOW)
    assert store.verify().ok


def test_a_copy_of_a_root_can_only_be_read(tmp_path: Path) -> None:
    catalog = f"sqlite:///{tmp_path}/catalog.db"
    with ts.open_store(tmp_path / "root", catalog=catalog) as store:
        store.commit(1, weights(1))
    shutil.copytree(tmp_path / "root", tmp_path / "copy")
    with ts.open_store(tmp_path / "copy", catalog=catalog) as copy:
        assert copy.checkout().step == 1
        with pytest.raises(RootTakenError, match="rebuild"):
            copy.commit(2, weights(2))
    with ts.open_store(tmp_path / "root", catalog=catalog) as store:
        store.commit(2, weights(2))


@pytest.mark.parametrize("name", ["exp#1", "a%20b", "p ü 雪?x=y", "q?mode=ro"])
def test_odd_paths_hold_their_own_catalog(tmp_path: Path, name: str) -> None:
    with ts.open_store(tmp_path / name) as store:
        store.commit(1, weights(1))
    assert (tmp_path / name / "catalog.sqlite").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with ts.open_store(tmp_path / name, create=False) as store:
        assert store.writable


def test_the_only_branch_is_not_deleted(store: ts.Store) -> None:
    store.commit(1, weights(1))
    with pytest.raises(ts.InvalidInputError, match="only one"):
        store.delete_branch("main")


def test_a_child_leaves_its_parents_claims_alone(store: ts.Store) -> None:
    store.commit(1, weights(1))
    with store.checkout():
        assert store.stats().leases == 1
        child = os.fork()
        if child == 0:
            store.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert store.stats().leases == 1


@pytest.mark.parametrize(
    "arguments",
    [{"lease": 5}, {"lease": NOW}, {"layers": "x"}, {"storage_options": [1]}, {"codec": "gzip"}, {"chunk_bytes": 1}],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ts.InvalidInputError):
        ts.open_store(tmp_path / "root", **arguments)


def test_inputs_that_mean_nothing_are_refused(store: ts.Store) -> None:
    with pytest.raises(ExtraStateError, match=r"extra\.n"):
        store.commit(1, weights(1), extra={"n": 10**5000})
    with pytest.raises(ts.InvalidInputError, match="lazy"):
        store.commit(1, nn.LazyLinear(3))
    for metrics in ([1], {"m": 10**400}):
        with pytest.raises(ts.InvalidInputError, match="metric"):
            store.commit(1, weights(1), metrics=metrics)  # type: ignore[arg-type]
    store.commit(1, weights(1))
    with pytest.raises(ts.InvalidInputError, match="limit"):
        store.log(limit=-1)
    with pytest.raises(ts.InvalidInputError, match="policy"):
        store.gc("keep")  # type: ignore[arg-type]
    with pytest.raises(ts.InvalidInputError, match="layers are 'a', 'b'"):
        store.commit(2, weights(1), mask=["99999"])


def test_blocking_commits_bound_their_memory(tmp_path: Path) -> None:
    """Padded chunks on as many threads as an object store gets."""
    import tracemalloc

    state = {f"m.{at}.w": torch.zeros(16381, 256) for at in range(24)}
    with ts.open_store(tmp_path / "root", chunk_bytes=8 << 20) as store:
        store._objects.workers = 16  # type: ignore[misc]
        tracemalloc.start()
        try:
            store.commit(1, state)
            assert tracemalloc.get_traced_memory()[1] < 256 << 20
        finally:
            tracemalloc.stop()
        assert same_bits(store.checkout().model["m.3.w"][16380], state["m.3.w"][16380])
