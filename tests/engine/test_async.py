"""Commits behind the caller's back: the copy is taken at once, one is under way at a time, nothing fails silently."""

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import StorageUnavailableError
from tailorstore.engine.tensors.staging import HostArena
from tests.kit.models import (
    adamw,
    assert_same,
    assert_same_optim,
    gpt,
    nudge,
    optim_snapshot,
    same_bits,
    snapshot,
    train,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ts.Store]:
    with ts.open_store(tmp_path / "root") as opened:
        yield opened


class Gate:
    """Lets a store's puts through when it is opened, or fails them."""

    def __init__(self, store: ts.Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.error: Exception | None = None
        put = store._objects.put

        def gated(key: str, data: Any, observe: Any = None) -> int:
            assert self.opened.wait(60)
            if self.error is not None:
                raise self.error
            return put(key, data, observe)

        monkeypatch.setattr(store._objects, "put", gated)


def test_the_model_may_change_as_soon_as_commit_returns(store: ts.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt()
    optim = adamw(model)
    train(model, [optim], 2)
    expected, slots = snapshot(model), optim_snapshot(optim)
    gate = Gate(store, monkeypatch)
    pending = store.commit(2, model, optim, extra={"t": (live := torch.ones(3))}, block=False)
    train(model, [optim], 2)
    nudge(model)
    live.zero_()
    assert not pending.done()
    with pytest.raises(TimeoutError, match="step 2"):
        pending.result(0.01)
    gate.opened.set()
    assert pending.result(60).step == 2
    assert pending.done()
    other = gpt(seed=3)
    other_optim = adamw(other)
    extra = store.checkout().restore(other, other_optim)
    assert_same(snapshot(other), expected)
    assert_same_optim(optim_snapshot(other_optim), slots)
    assert extra["t"].tolist() == [1, 1, 1]


def test_the_next_commit_waits_for_the_one_under_way(store: ts.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt()
    gate = Gate(store, monkeypatch)
    first = store.commit(1, model, block=False)
    nudge(model)
    threading.Timer(0.2, gate.opened.set).start()
    second = store.commit(2, model, block=False)
    assert first.done()
    assert second.result(60).parent == first.result().id
    assert [commit.step for commit in store.log()] == [2, 1]


def test_a_failure_is_raised_by_result(store: ts.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(store, monkeypatch)
    gate.error = StorageUnavailableError("the bucket is away")
    gate.opened.set()
    pending = store.commit(1, gpt(), block=False)
    with pytest.raises(StorageUnavailableError, match="away"):
        pending.result(60)
    gate.error = None
    # It was told; the next commit starts afresh.
    assert store.commit(1, gpt()).step == 1


def test_a_failure_nobody_asked_for_is_raised_by_the_next_commit(
    store: ts.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(store, monkeypatch)
    gate.error = StorageUnavailableError("the bucket is away")
    gate.opened.set()
    store.commit(1, gpt(), block=False)
    with pytest.raises(StorageUnavailableError, match="away"):
        store.commit(2, gpt())
    with pytest.raises(ts.NotFoundError):
        store.log()


def test_a_failure_nobody_asked_for_is_raised_by_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ts.open_store(tmp_path / "root")
    gate = Gate(store, monkeypatch)
    gate.error = StorageUnavailableError("the bucket is away")
    gate.opened.set()
    store.commit(1, gpt(), block=False)
    with pytest.raises(StorageUnavailableError, match="away"):
        store.close()
    assert "step 1" in caplog.text


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "store = None"])
def test_a_program_that_ends_finishes_its_last_commit(tmp_path: Path, ending: str) -> None:
    program = f"""
        import time, torch, tailorstore as ts
        store = ts.open_store({str(tmp_path / "root")!r})
        put = store._objects.put
        def slow(*args):
            time.sleep(0.02)
            return put(*args)
        store._objects.put = slow
        store.commit(1, {{f"m.{{i}}.w": torch.full((4,), float(i)) for i in range(20)}}, block=False)
        {ending}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)
    with ts.open_store(tmp_path / "root", create=False) as store:
        assert store.checkout(1).model_state_dict()["m.7.w"].tolist() == [7, 7, 7, 7]


def test_a_program_that_ends_says_that_its_last_commit_failed(tmp_path: Path) -> None:
    program = f"""
        import torch, tailorstore as ts
        store = ts.open_store({str(tmp_path / "root")!r})
        def broken(*args):
            raise ts.UnavailableError("no storage today")
        store._objects.put = broken
        store.commit(1, {{"w": torch.ones(4)}}, block=False)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120, capture_output=True, text=True
    )
    assert "no storage today" in done.stderr
    assert "step 1" in done.stderr


def test_an_interrupt_just_before_a_commit_begins_leaves_nothing_to_wait_for(
    store: ts.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_pending: ts.PendingCommit) -> None:
        raise KeyboardInterrupt

    model = {"a.w": torch.ones(8)}
    with monkeypatch.context() as patch:
        patch.setattr(ts.PendingCommit, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.commit(1, model, block=False)
    found: list[ts.Commit] = []
    # In a thread that need not end: what this is about is a wait without end.
    thread = threading.Thread(target=lambda: found.append(store.commit(2, model)), daemon=True)
    thread.start()
    thread.join(60)
    assert [commit.step for commit in found] == [2]
    assert [commit.step for commit in store.log()] == [2]


def test_staging_memory_is_reused(store: ts.Store) -> None:
    model = gpt()
    store.commit(1, model, block=False).result(60)
    block = store._commits._committer_of(None).arena._block.data_ptr()
    nudge(model)
    store.commit(2, model, mask=["lm_head"], block=False).result(60)
    assert store._commits._committer_of(None).arena._block.data_ptr() == block


def test_the_arena_copies_every_bit_of_any_layout() -> None:
    base = torch.randn(6, 8)
    arrays = {
        "plain": base,
        "transposed": base.t(),
        "conjugate": torch.complex(base, base).conj(),
        "half": base.to(torch.bfloat16)[:, ::3],
        "fp8": base.to(torch.float8_e5m2),
        "scalar": torch.tensor(float("nan")),
        "empty": torch.empty(0, 3),
        "flags": base > 0,
    }
    copies = HostArena().copy(arrays)
    for name, tensor in arrays.items():
        assert same_bits(copies[name], tensor), name
        assert copies[name].is_contiguous()
        assert tensor.numel() == 0 or copies[name].data_ptr() != tensor.data_ptr()


@pytest.mark.gpu
def test_copies_from_a_gpu_are_pinned_and_exact() -> None:
    live = torch.randn(1000, 100, device="cuda")
    arena = HostArena()
    copies = arena.copy({"w": live, "t": live.t()})
    assert arena._block.is_pinned()
    assert same_bits(copies["w"], live)
    assert same_bits(copies["t"], live.t())
