"""Faults of storage at the transport seam: objects that fail by plan, and the plans.

A plan sees every call or request before it is carried out and names the fault that strikes it, if any; what did strike
is counted, so that a test can fail where nothing did.
"""

import contextlib
import dataclasses
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import pytest

import tailorstore as ts
from tailorstore.domain.errors import AccessDeniedError, MissingObjectError, StorageFullError, StorageUnavailableError
from tailorstore.engine import front_door
from tailorstore.storage.arrivals import check_arrivals
from tailorstore.storage.objects import open_objects
from tailorstore.storage.retrying import Patience, Retrying
from tailorstore.storage.transport import (
    DeleteFailures,
    Memory,
    ObjectInfo,
    Objects,
    Observe,
    joined,
    size_in_bytes,
)

Kinds = Mapping[str, Sequence[str]]
"""Kind of fault → verbs that it can strike."""

ALL: Final = ("put", "get", "read", "replace", "exists", "list", "delete", "confirm")
TRANSIENT: Final[Kinds] = {
    "error": ALL,
    "lost reply": ("put", "replace", "delete", "confirm"),
    "cut read": ("get", "read", "list"),
    "stale listing": ("list",),
    "slow": ALL,
}
"""Nobody should notice them as long as they pass. ``cut read``: an answer that breaks off in the middle."""
PERMANENT: Final[Kinds] = {
    "error": ALL,
    "full": ("put", "replace"),
    "denied": ALL,
    "swallowed put": ("put",),
    "truncated put": ("put",),
}
"""Of the last two the storage says that all went well."""


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """A call or request, as a plan sees it."""

    verb: str
    key: str
    """Of a listing its prefix; empty for calls about many objects."""


Plan = Callable[[Asked], str | None]
"""Says which fault strikes a call. May be called from several threads."""


def at_random(seed: int, rate: float, kinds: Kinds) -> Plan:
    """Return a plan that strikes a share of all calls, by each kind that can strike them equally often.

    The draws of a seed are the same ones each time; which calls they meet depends on the order in which threads ask.
    """
    generator, lock = random.Random(seed), threading.Lock()

    def plan(asked: Asked) -> str | None:
        possible = [kind for kind, verbs in kinds.items() if asked.verb in verbs]
        with lock:
            return generator.choice(possible) if possible and generator.random() < rate else None

    return plan


def nth(
    kind: str, at: int = 1, *, verbs: Sequence[str] = ALL, key: str = "", times: int | None = 1, skip: str = "\0"
) -> Plan:
    """Return a plan that strikes from the ``at``-th fitting call on, ``times`` times or (``None``) for ever.

    Args:
        kind: of the fault.
        at: first call to strike, from 1.
        verbs: that fit.
        key: part of the keys that fit.
        times: how many calls to strike.
        skip: part of keys that do not fit.
    """
    lock, seen = threading.Lock(), [0]

    def plan(asked: Asked) -> str | None:
        fits = asked.verb in verbs and key in asked.key and skip not in asked.key
        with lock:
            seen[0] += fits
            return kind if fits and at <= seen[0] and (times is None or seen[0] < at + times) else None

    return plan


class FaultyObjects:
    """Objects whose calls fail by plan."""

    lag_seconds = 0.5
    """How long a stale listing shows neither what was put nor that something was deleted."""
    slow_seconds = 0.02

    def __init__(self, objects: Objects) -> None:
        self.inner = objects
        self.plan: Plan | None = None
        self.injected: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[str] = Counter()
        self._put_at: dict[str, float] = {}
        self._deleted: dict[str, tuple[float, ObjectInfo]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return repr(self.inner)

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def workers(self) -> int:
        return self.inner.workers

    @property
    def copies_on_put(self) -> int:
        return self.inner.copies_on_put

    @contextlib.contextmanager
    def faults(self, plan: Plan) -> Iterator[Counter[tuple[str, str]]]:
        """Follow a plan for as long as a ``with`` block lasts; gives what struck in it, by kind and verb."""
        self.injected, self.plan = Counter(), plan
        try:
            yield self.injected
        finally:
            self.plan = None

    def put(self, key: str, data: Any, observe: Observe | None = None) -> int:
        kind = self._ask("put", key)
        if kind == "swallowed put":
            return joined(data).nbytes
        if kind == "truncated put":
            whole = joined(data)
            self.inner.put(key, whole[: whole.nbytes // 2])
            return whole.nbytes
        self._raise_before(kind, key)
        if not isinstance(self.inner, FaultyObjects) and self.inner.exists(key):
            # What object stores do when a put is repeated; plain files refuse it.
            self.inner.delete([key])
        size = self.inner.put(key, data, observe)
        self._put_at[key] = time.monotonic()
        self._raise_after(kind, key)
        return size

    def get(self, key: str, *, limit: int | None = None) -> memoryview:
        kind = self._ask("get", key)
        self._raise_before(kind, key)
        found = self.inner.get(key, limit=limit)
        self._raise_after(kind, key)
        return found

    def read_into(self, key: str, target: Memory, observe: Observe | None = None, size: int | None = None) -> None:
        kind = self._ask("read", key)
        self._raise_before(kind, key)
        if kind != "cut read":
            self.inner.read_into(key, target, observe, size)
            return
        wanted = size_in_bytes(target)
        whole = memoryview(bytearray(wanted))
        self.inner.read_into(key, whole, None, wanted if size is None else size)
        _arrive(target, whole, wanted // 2, observe)
        self._raise_after(kind, key)

    def replace(self, key: str, data: Any, *, exclusive: bool = False) -> None:
        kind = self._ask("replace", key)
        self._raise_before(kind, key)
        # Where replies are lost, nothing can tell one's own object from another's: as on object stores.
        self.inner.replace(key, data, exclusive=exclusive and kind != "lost reply" and not self.inner.exists(key))
        self._raise_after(kind, key)

    def exists(self, key: str) -> bool:
        self._raise_before(self._ask("exists", key), key)
        return self.inner.exists(key)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        kind = self._ask("list", prefix)
        self._raise_before(kind, prefix)
        found = list(self.inner.list(prefix, after=after))
        if kind == "stale listing":
            now = time.monotonic()
            found = [info for info in found if now - self._put_at.get(info.key, -1e9) > self.lag_seconds]
            gone = [info for at, info in list(self._deleted.values()) if now - at < self.lag_seconds]
            found += [info for info in gone if info.key.startswith(prefix) and info.key > after]
        if kind == "cut read":
            yield from found[: len(found) // 2]
            self._raise_after(kind, prefix)
        yield from found

    def delete(self, keys: Sequence[str]) -> DeleteFailures:
        kind = self._ask("delete", keys[0] if keys else "")
        self._raise_before(kind, "")
        now = time.monotonic()
        for folder in {key.rpartition("/")[0] for key in keys}:
            for info in self.inner.list(f"{folder}/" if folder else ""):
                if info.key in keys:
                    self._deleted[info.key] = now, info
        failures = self.inner.delete(keys)
        self._raise_after(kind, "")
        return failures

    def confirm(self, sizes: Mapping[str, int]) -> None:
        kind = self._ask("confirm", next(iter(sizes), ""))
        self._raise_before(kind, "")
        check_arrivals(self.url, sizes, self.list, self._size_of, self.workers)
        self.inner.confirm(sizes)
        self._raise_after(kind, "")

    def close(self) -> None:
        self.inner.close()

    def _size_of(self, key: str) -> int | None:
        self._raise_before(self._ask("exists", key), key)
        try:
            return self.inner.get(key).nbytes
        except MissingObjectError:
            return None

    def _ask(self, verb: str, key: str) -> str | None:
        kind = self.plan(Asked(verb, key)) if self.plan is not None else None
        with self._lock:
            self.calls[verb] += 1
            if kind is not None:
                self.injected[kind, verb] += 1
        if kind == "slow":
            time.sleep(self.slow_seconds)
        return kind

    def _raise_before(self, kind: str | None, key: str) -> None:
        if kind == "error":
            raise StorageUnavailableError(f"injected: no answer about {key!r}")
        if kind == "full":
            raise StorageFullError(f"injected: no space for {key!r}")
        if kind == "denied":
            raise AccessDeniedError(f"injected: no permission for {key!r}")

    def _raise_after(self, kind: str | None, key: str) -> None:
        if kind in ("lost reply", "cut read"):
            raise StorageUnavailableError(f"injected: {kind} about {key!r}")


def _arrive(target: Memory, whole: memoryview, count: int, observe: Observe | None) -> None:
    """Fill the first ``count`` bytes of the target as a stream does: in blocks, each shown once it is there."""
    done = 0
    for part in [target] if isinstance(target, memoryview) else target:
        taken = min(part.nbytes, count - done)
        part[:taken] = whole[done : done + taken]
        if observe is not None and taken:
            observe(part[:taken])
        done += taken


@contextlib.contextmanager
def faulty_stores(patience: Patience, faulty: "list[FaultyObjects]", plan: Plan | None = None) -> Iterator[None]:
    """Put faults between every store that is opened in a ``with`` block and its root; gives each of them to a list.

    Above the faults there is the retrying that object stores have, on local directories too.
    """

    def opened(*args: Any, **kwargs: Any) -> Objects:
        objects = FaultyObjects(open_objects(*args, **kwargs))
        objects.plan = plan
        faulty.append(objects)
        return Retrying(objects, patience)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front_door, "open_objects", opened)
        yield


def faulty_store(url: str, patience: Patience, **kwargs: Any) -> tuple[ts.Store, FaultyObjects]:
    """Open a store with faults, which start with a plan, between it and its root."""
    made: list[FaultyObjects] = []
    with faulty_stores(patience, made):
        store = ts.open_store(url, **kwargs)
    return store, made[0]
