"""Committing to and restoring from a user's own storage; on S3 beside bare obstore moving the same objects."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import tailorstore as ts
from tailorstore.bench.report import Row, interleaved
from tailorstore.bench.state import TrainingState, training_state
from tailorstore.storage.cloud import CloudObjects
from tailorstore.storage.objects import Objects, open_objects

_REQUESTS_AT_ONCE = 16


def measure(
    url: str,
    storage_options: Mapping[str, Any] | None,
    *,
    gigabytes: float,
    repeat: int,
    say: Callable[[str], None],
    transport: str | None = None,
) -> list[Row]:
    """Measure below a fresh prefix of ``url``, which is emptied afterwards.

    Args:
        url: a root's URL; a folder ``tailorstore-bench-…`` is made below it.
        storage_options: as for ``open_store``.
        gigabytes: size of the state.
        repeat: how often; medians are reported.
        say: is told what is going on.
        transport: as for ``open_store``.
    """
    say(f"making {gigabytes} GB of training state")
    state = training_state(gigabytes)
    base = f"{url.rstrip('/')}/tailorstore-bench-{uuid.uuid4().hex[:12]}"
    with TemporaryDirectory() as folder:
        objects = open_objects(f"{base}/bare", storage_options, transport)
        try:
            bench = _Bench(state, base, storage_options, transport, Path(folder), objects)
            return bench.run(repeat, say)
        finally:
            objects.close()
            rest = open_objects(base, storage_options, transport)
            rest.delete([info.key for info in rest.list()])
            rest.close()
            if base.startswith(("/", ".", "file:")):
                with suppress(OSError):
                    Path(base.removeprefix("file://")).rmdir()


class _Bench:
    def __init__(
        self,
        state: TrainingState,
        base: str,
        storage_options: Mapping[str, Any] | None,
        transport: Any,  # noqa: ANN401
        folder: Path,
        objects: Objects,
    ) -> None:
        self.state = state
        self.objects = objects
        self.store = ts.open_store(
            f"{base}/store",
            catalog=f"sqlite:///{folder}/catalog.sqlite",
            storage_options=storage_options,
            transport=transport,
        )
        self.step = 0
        self.cpu: dict[str, list[float]] = {}

    def run(self, repeat: int, say: Callable[[str], None]) -> list[Row]:
        bare = isinstance(self.objects, CloudObjects)
        say("commits and restores" + (", and bare obstore" if bare else ""))
        runs = {"commit": self.timed("commit", self.commit), "restore": self.timed("restore", self.restore)}
        if bare:
            self.commit()  # so that there are objects to copy the sizes of
            runs = {
                "commit": runs["commit"],
                "put": self.timed("put", self.bare_put),
                "restore": runs["restore"],
                "get": self.timed("get", self.bare_get),
            }
        found = interleaved(runs, repeat)
        megabytes = self.state.nbytes / 1e6
        rows: list[Row] = []
        for ours, theirs, verb in (("commit", "put", "putting"), ("restore", "get", "getting")):
            what = f"{ours} ({megabytes / 1e3:.2f} GB)"
            if not bare:
                rows.append(Row(what, megabytes / found[ours], "MB/s"))
                continue
            against = f"bare obstore {verb} the same objects"
            rows.append(
                Row(what, megabytes / found[ours], "MB/s", against, megabytes / found[theirs], 0.9, at_least=True)
            )
            cpu = [min(self.cpu[name]) / megabytes * 1e3 for name in (ours, theirs)]
            rows.append(Row(f"{ours}, client CPU", cpu[0], "s/GB", against, cpu[1], 1.3))
        rows += self.small_commits()
        self.store.close()
        return rows

    def timed(self, name: str, run: Callable[[], object]) -> Callable[[], float]:
        def measured() -> float:
            start, cpu = time.perf_counter(), time.process_time()
            run()
            self.cpu.setdefault(name, []).append(time.process_time() - cpu)
            return time.perf_counter() - start

        return measured

    def commit(self) -> None:
        self.state.touch()
        self.step += 1
        self.store.commit(self.step, self.state.model, self.state.optim)

    def restore(self) -> None:
        with self.store.checkout() as checkpoint:
            checkpoint.restore(self.state.model, self.state.optim)

    def bare_put(self) -> None:
        """Put objects of the sizes of the newest commit's, from the tensors' memory."""
        import obstore

        cloud = self._cloud()
        buffers = self._buffers()
        self.keys = [f"{self.step}/{number:05d}" for number in range(len(buffers))]
        store, paths = cloud._store, [cloud._path(key) for key in self.keys]  # noqa: SLF001 - the very same client
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            list(
                pool.map(
                    lambda pair: obstore.put(store, pair[0], pair[1], use_multipart=False),
                    zip(paths, buffers, strict=True),
                )
            )

    def bare_get(self) -> None:
        """Get them again."""
        import obstore

        cloud = self._cloud()
        store, paths = cloud._store, [cloud._path(key) for key in self.keys]  # noqa: SLF001
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            list(pool.map(lambda path: len(memoryview(obstore.get(store, path).bytes())), paths))

    def _cloud(self) -> CloudObjects:
        assert isinstance(self.objects, CloudObjects)  # noqa: S101 - only called where it is one
        return self.objects

    def _buffers(self) -> list[memoryview]:
        newest = self.store.log(limit=1)[0].id
        sizes = [info.size for info in self.store._objects.list("layers/") if f"/{newest}/" in info.key]  # noqa: SLF001
        source = torch.empty(max(sizes), dtype=torch.uint8).random_()
        array: Any = source.numpy()
        view = memoryview(array)
        return [view[:size] for size in sorted(sizes, reverse=True)]

    def small_commits(self) -> Sequence[Row]:
        """Commit one norm of one layer: what a commit costs beside its bytes."""
        name = "norm"

        def small() -> None:
            with torch.no_grad():
                self.state.model.norm.weight.add_(1e-3)
            self.step += 1
            self.store.commit(self.step, self.state.model, self.state.optim, mask=[name])

        times = []
        for _ in range(10):
            start = time.perf_counter()
            small()
            times.append(time.perf_counter() - start)
        self.store.gc(ts.KeepLast(1), grace=timedelta(0))
        return [Row("commit of one small layer", sorted(times)[len(times) // 2] * 1e3, "ms")]
