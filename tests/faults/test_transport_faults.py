"""Faults at the transport seam: transient ones are invisible, permanent ones leave the store as it was."""

import hashlib
import itertools
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tailorstore as ts
from tailorstore.domain.errors import AccessDeniedError, StorageFullError, StorageUnavailableError, TailorError
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.retrying import Patience, Retrying
from tests.crash.content import commit
from tests.faults.work import SETTINGS, check_after, work_through
from tests.kit.faults import PERMANENT, TRANSIENT, FaultyObjects, Plan, at_random, faulty_store, faulty_stores, nth

QUICK = Patience(seconds=20, pause_seconds=0.002)
ONCE = Patience(attempts=2, pause_seconds=0.002)
ERRORS: dict[str, type[TailorError]] = {
    "error": StorageUnavailableError,
    "full": StorageFullError,
    "denied": AccessDeniedError,
    "swallowed put": StorageUnavailableError,
    "truncated put": StorageUnavailableError,
}


@pytest.mark.parametrize("light", [False, True], ids=["full", "light"])
@pytest.mark.parametrize("kind", TRANSIENT)
def test_transient_faults_are_invisible(tmp_path: Path, kind: str, light: bool) -> None:
    made: list[FaultyObjects] = []
    plan = at_random(7, 0.2, {kind: TRANSIENT[kind]})

    def opened(**kwargs: Any) -> ts.Store:
        with faulty_stores(QUICK, made, plan):
            return ts.open_store(tmp_path / "root", **SETTINGS, **kwargs)

    work_through(opened, tmp_path, light=light, listings_lag=kind == "stale listing")
    injected = sum((faulty.injected for faulty in made), Counter[tuple[str, str]]())
    assert injected.total() >= (3 if kind == "stale listing" else 10), injected
    name, steps = ("first", [40, 20]) if kind == "stale listing" else ("second", [90, 40, 20])
    check_after(partial(ts.open_store, tmp_path / "root", **SETTINGS), f"sqlite:///{tmp_path}/{name}.db", steps)


class Trial:
    """A store with two commits, copied for each way to fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prepared = folder / "prepared"
        self._numbers = itertools.count()
        with ts.open_store(self.prepared, **SETTINGS) as store:
            commit(store, 10)
            commit(store, 20)

    def open(self) -> tuple[ts.Store, FaultyObjects, Path]:
        """Return a store whose storage may fail, with a fresh copy of the prepared one."""
        root = self.folder / f"trial{next(self._numbers)}"
        shutil.copytree(self.prepared, root)
        # Its catalog is inside of the root, and goes along.
        return *faulty_store(str(root), ONCE, **SETTINGS), root

    def survives(self, plan: Plan, act: Callable[[ts.Store], object]) -> tuple[TailorError | None, int]:
        """Act under a plan; return what was raised and how many faults struck."""
        store, faulty, root = self.open()
        raised: TailorError | None = None
        with store, faulty.faults(plan) as injected:
            try:
                act(store)
            except TailorError as error:
                raised = error
        steps = [20, 10] if raised is not None else [30, 20, 10]
        check_after(
            lambda **kwargs: ts.open_store(root, **SETTINGS, **kwargs), f"sqlite:///{root}/catalog.sqlite", steps
        )
        shutil.rmtree(root)
        return raised, injected.total()


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(tmp_path_factory.mktemp("trials"))


@pytest.fixture(scope="module")
def calls(trial: Trial) -> Counter[str]:
    """Count the calls that a commit makes, by verb."""
    store, faulty, _ = trial.open()
    with store:
        before = Counter(faulty.calls)
        commit(store, 30)
        return faulty.calls - before


@pytest.mark.parametrize(
    ("kind", "block", "every"),
    [
        ("error", True, 2),
        ("error", False, 7),
        ("full", True, 5),
        ("denied", True, 7),
        ("swallowed put", True, 3),
        ("swallowed put", False, 7),
        ("truncated put", True, 3),
    ],
)
def test_permanent_faults_at_calls_of_a_commit_leave_the_store_as_it_was(
    trial: Trial, calls: Counter[str], kind: str, block: bool, every: int
) -> None:
    lie = kind in ("swallowed put", "truncated put")
    reached = 0
    last = sum(calls[verb] for verb in PERMANENT[kind])
    for at in {*range(1, last + 1, every), last}:
        plan = nth(kind, at, verbs=PERMANENT[kind], times=1 if lie else None)
        raised, struck = trial.survives(plan, lambda store: commit(store, 30, block=block))
        assert struck, f"nothing was injected at call {at}"
        assert type(raised) is ERRORS[kind], f"call {at}: {raised!r}"
        reached += 1
    assert reached >= 3


@pytest.fixture
def faulty(tmp_path: Path) -> FaultyObjects:
    return FaultyObjects(LocalObjects(str(tmp_path / "root")))


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_read_that_is_repeated_shows_every_byte_once(faulty: FaultyObjects, pieces: int) -> None:
    data = random.Random(pieces).randbytes(3 << 20)
    objects = Retrying(faulty, QUICK)
    objects.put("a", data)
    target = memoryview(bytearray(len(data)))
    step = len(data) // pieces
    seen = hashlib.sha256()
    with faulty.faults(nth("cut read", verbs=("read",), times=2)) as injected:
        objects.read_into("a", [target[at * step : (at + 1) * step] for at in range(pieces)], seen.update)
    assert injected.total() == 2
    assert bytes(target) == data
    assert seen.digest() == hashlib.sha256(data).digest()


def test_a_repeated_read_that_differs_from_the_first_is_not_taken_for_it(faulty: FaultyObjects) -> None:
    objects = Retrying(faulty, QUICK)
    objects.put("a", b"0" * 1000)
    seen: list[bytes] = []
    target = memoryview(bytearray(1000))

    def turned(block: memoryview) -> None:
        seen.append(bytes(block))
        if len(seen) == 1:
            # What lies there is another object from now on; only what was shown may count.
            faulty.inner.delete(["a"])
            faulty.inner.put("a", b"1" * 1000)

    with faulty.faults(nth("cut read", verbs=("read",))):
        objects.read_into("a", target, turned)
    assert b"".join(seen) == bytes(target) == b"0" * 500 + b"1" * 500


def test_a_put_that_is_repeated_is_hashed_once(faulty: FaultyObjects) -> None:
    objects = Retrying(faulty, QUICK)
    for kind in ("error", "lost reply"):
        seen = hashlib.sha256()
        with faulty.faults(nth(kind, verbs=("put",))) as injected:
            assert objects.put(kind, b"abc", seen.update) == 3
        assert injected.total() == 1
        assert seen.digest() == hashlib.sha256(b"abc").digest()
        assert bytes(faulty.inner.get(kind)) == b"abc"


def test_a_listing_that_breaks_off_shows_every_object_once(faulty: FaultyObjects) -> None:
    objects = Retrying(faulty, QUICK)
    keys = [f"a/{number:03}" for number in range(40)]
    for key in keys:
        faulty.inner.put(key, b"x")
    with faulty.faults(nth("cut read", verbs=("list",), times=2)) as injected:
        assert sorted(info.key for info in objects.list("a/")) == keys
    assert injected.total() == 2


def test_retries_end_and_say_how_often_it_was_tried(faulty: FaultyObjects) -> None:
    with faulty.faults(nth("error", times=None)) as injected:
        with pytest.raises(StorageUnavailableError, match=r"no answer about 'a' \[tried 3 times in [01] s\]"):
            Retrying(faulty, Patience(attempts=3)).get("a")
        assert injected.total() == 3
        with pytest.raises(StorageUnavailableError, match="tried"):
            Retrying(faulty, Patience(seconds=0.3)).exists("a")
        with pytest.raises(StorageUnavailableError, match="tried"):
            list(Retrying(faulty, Patience(attempts=2)).list())


def test_it_is_told_once_that_storage_is_waited_for(
    faulty: FaultyObjects, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    objects = Retrying(faulty, Patience(seconds=20, pause_seconds=0.01))
    objects.put("a", b"x")
    with faulty.faults(nth("error", times=2)):
        objects.get("a")
    assert caplog.records == [], "what passes at once is nobody's business"
    monkeypatch.setattr("tailorstore.storage.retrying._SILENT_SECONDS", 0)
    for call in (lambda: objects.get("a"), lambda: objects.exists("a"), lambda: list(objects.list())):
        with faulty.faults(nth("error", times=2)):
            call()
    (record,) = caplog.records
    assert record.getMessage() == f"waiting for the storage {objects.url} (up to 20 s)"


@pytest.mark.parametrize("kind", ["full", "denied"])
def test_what_cannot_pass_is_not_repeated(faulty: FaultyObjects, kind: str) -> None:
    with faulty.faults(nth(kind, times=None)) as injected, pytest.raises(ERRORS[kind], match="injected"):
        Retrying(faulty).put("a", b"x")
    assert injected.total() == 1


def test_objects_that_a_listing_does_not_show_yet_are_asked_for(faulty: FaultyObjects) -> None:
    objects = Retrying(faulty, Patience(attempts=1))
    sizes = {f"layers/l/v/p{number}/c": objects.put(f"layers/l/v/p{number}/c", b"abc") for number in range(9)}
    with faulty.faults(nth("stale listing", verbs=("list",))) as injected:
        objects.confirm(sizes)
    assert injected.total() == 1
    assert faulty.calls["exists"] == 9


def test_objects_that_arrive_late_are_waited_for(faulty: FaultyObjects) -> None:
    objects = Retrying(faulty, QUICK)
    with faulty.faults(nth("swallowed put", verbs=("put",))):
        sizes = {"commits/a": objects.put("commits/a", b"abc")}
    late = iter([False, False, True])
    asked = faulty._size_of

    def size_of(key: str) -> int | None:
        if next(late):
            faulty.inner.put(key, b"abc")
        return asked(key)

    faulty._size_of = size_of  # type: ignore[method-assign]
    objects.confirm(sizes)
    assert list(late) == []
