"""Lets storage fail in every way for as long as is wanted, and prints what came of it.

``python -m tests.faults --minutes 10``: rounds over the transport seam (with plain files below) and, through a real
proxy, over both transports to a real S3 server. A round takes one kind of fault and one seed. Of a transient kind, a
store does all that a store can do while a share of all calls or requests fails; of a permanent kind, a commit meets it
at a call drawn by the seed, and must end in an error. After each, the store is asked without faults: every composite
must read back to the bit, ``verify`` be clean, the root hold exactly what the catalog accounts for.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import random
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import tailorstore as ts
from tailorstore.domain.errors import AccessDeniedError, UnavailableError
from tailorstore.storage.retrying import Patience
from tests.crash.content import commit, weights
from tests.faults.work import SETTINGS, Open, check_after, work_through
from tests.kit import faults, s3_proxy
from tests.kit.s3 import S3Server, run_s3
from tests.kit.s3_proxy import S3Proxy, run_proxy

_SEAM_SHARE, _PROXY_SHARE = 0.2, 0.15
_PATIENT = Patience(seconds=30, pause_seconds=0.005)
_ONCE = Patience(attempts=2, pause_seconds=0.005)
_ATTENTIVE: Final = {"connect_timeout": 5, "read_timeout": 1.0}
_ONE_TRY: Final = {"connect_timeout": 5, "read_timeout": 10, "retries": {"total_max_attempts": 1}}


@dataclasses.dataclass(slots=True)
class Row:
    """What came of one kind of fault over one transport."""

    kind: str
    transport: str
    permanent: bool
    rounds: int = 0
    injected: int = 0
    survived: int = 0
    """Faults of rounds that ended as they should."""
    lost_bytes: int = 0
    """Tensors of stores that did not; all of them are counted."""


class Scene:
    """A place for stores, and a way to let it fail."""

    def __init__(self, name: str, folder: Path, proxy: S3Proxy | None) -> None:
        self.name = name
        self.transient = faults.TRANSIENT if proxy is None else s3_proxy.TRANSIENT
        self.permanent = faults.PERMANENT if proxy is None else {**s3_proxy.PERMANENT, "500": ("put", "get")}
        self._folder = folder
        self._proxy = proxy

    def transient_round(self, kind: str, seed: int) -> int:
        """Work through everything; return how many faults struck."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        url, lag = self._url(folder), kind == "stale listing"
        share = _SEAM_SHARE if self._proxy is None else _PROXY_SHARE
        plan = faults.at_random(seed, 1.0 if lag else share, {kind: self.transient[kind]})
        with self._failing(url, plan, _PATIENT, _ATTENTIVE) as (opened, struck):
            work_through(opened, folder, light=seed % 2 == 0, listings_lag=lag)
            count = struck()
        name, steps = ("first", [40, 20]) if lag else ("second", [90, 40, 20])
        check_after(self._directly(url), f"sqlite:///{folder}/{name}.db", steps)
        return count

    def permanent_round(self, kind: str, seed: int) -> int:
        """Let a commit meet a fault that stays; return how many faults struck."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        url, catalog = self._url(folder), f"sqlite:///{folder}/first.db"
        with self._directly(url)(catalog=catalog) as store:
            commit(store, 10)
            commit(store, 20)
        at = random.Random(seed).randint(1, 12)
        lie = kind in ("swallowed put", "truncated put")
        plan = faults.nth(kind, at, verbs=self.permanent[kind], times=1 if lie else None)
        steps = [30, 20, 10]
        with self._failing(url, None, _ONCE, _ONE_TRY) as (opened, struck), opened(catalog=catalog) as store:
            self._follow(store, plan)
            try:
                commit(store, 30, block=seed % 2 == 0)
            except (UnavailableError, AccessDeniedError):
                steps = [20, 10]
            count = struck()
            self._follow(store, None)
        if lie and count and steps[0] == 30:
            raise AssertionError(f"published although object {at} is not what was put")
        check_after(self._directly(url), catalog, steps)
        return count

    def _url(self, folder: Path) -> str:
        if self._proxy is None:
            return str(folder / "root")
        return f"s3://{self._proxy.server.bucket}/{uuid.uuid4().hex}/run"

    def _directly(self, url: str) -> Open:
        options = self._proxy.server.storage_options() if self._proxy is not None else None
        return partial(ts.open_store, url, storage_options=options, **SETTINGS)

    @contextlib.contextmanager
    def _failing(
        self, url: str, plan: faults.Plan | None, patience: Patience, config: dict[str, Any]
    ) -> Iterator[tuple[Open, Callable[[], int]]]:
        """Give a way to open the store over storage that fails, and one to count the faults."""
        if self._proxy is not None:
            options = self._proxy.storage_options(config_kwargs=config)
            with self._proxy.faults(plan or (lambda _: None)):
                named: dict[str, Any] = {"transport": self.name, "storage_options": options, **SETTINGS}
                opened = partial(ts.open_store, url, **named)
                yield opened, self._proxy.count
            return
        made: list[faults.FaultyObjects] = []
        with faults.faulty_stores(patience, made, plan):
            yield partial(ts.open_store, url, **SETTINGS), lambda: sum(one.injected.total() for one in made)

    def _follow(self, store: ts.Store, plan: faults.Plan | None) -> None:
        if self._proxy is not None:
            self._proxy.plan = plan
        else:
            # Below the retrying.
            store._objects._objects.plan = plan  # type: ignore[attr-defined]


def run(minutes: float, seed: int, tell: Callable[[str], None]) -> list[Row]:
    """Go round by round until the time is up, each kind over each transport at least once."""
    rows: list[Row] = []
    ends = time.monotonic() + minutes * 60
    with (
        tempfile.TemporaryDirectory(prefix="tailorstore-faults-") as folder,
        run_s3() as server,
        _proxied(server) as proxy,
    ):
        scenes = [Scene("seam", Path(folder), None), *(Scene(n, Path(folder), proxy) for n in ("obstore", "fsspec"))]
        jobs: list[tuple[Row, Callable[[str, int], int]]] = []
        for scene in scenes:
            jobs += [(Row(kind, scene.name, permanent=False), scene.transient_round) for kind in scene.transient]
            jobs += [(Row(kind, scene.name, permanent=True), scene.permanent_round) for kind in scene.permanent]
        rows = [row for row, _ in jobs]
        for number, (row, act) in enumerate(itertools.cycle(jobs)):
            if time.monotonic() > ends and number >= len(jobs):
                break
            _one_round(row, act, seed + number, tell)
    return rows


def _proxied(server: S3Server) -> contextlib.AbstractContextManager[S3Proxy]:
    return run_proxy(server, hang_seconds=5, trickle_seconds=0.2)


def _one_round(row: Row, act: Callable[[str, int], int], seed: int, tell: Callable[[str], None]) -> None:
    row.rounds += 1
    try:
        struck = act(row.kind, seed)
    except Exception:  # noqa: BLE001 - told, counted, and the others go on
        row.lost_bytes += sum(tensor.nbytes for tensor in weights(40).values())
        tell(f"{row.transport}, {row.kind}, seed {seed}:\n{traceback.format_exc()}")
        return
    row.injected += struck
    row.survived += struck


def table(rows: list[Row]) -> str:
    """Return the rows for people."""
    lines = [f"{'fault':16} {'transport':9} {'':10} {'rounds':>6} {'injected':>8} {'survived':>8} {'lost bytes':>10}"]
    for row in sorted(rows, key=lambda row: (row.permanent, row.kind, row.transport)):
        what = "permanent" if row.permanent else "transient"
        figures = f"{row.rounds:6} {row.injected:8} {row.survived:8} {row.lost_bytes:10}"
        lines.append(f"{row.kind:16} {row.transport:9} {what:10} {figures}")
    totals = [sum(getattr(row, name) for row in rows) for name in ("rounds", "injected", "survived", "lost_bytes")]
    lines.append(f"{'all':16} {'':9} {'':10} {totals[0]:6} {totals[1]:8} {totals[2]:8} {totals[3]:10}")
    return "\n".join(lines)


def _complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> int:
    """Parse the arguments, run, print; 1 where anything was lost or a kind of fault never struck."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long; each kind has its turn in any case")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each later one has the next")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    rows = run(arguments.minutes, arguments.seed, _complain)
    told = json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if arguments.json else table(rows)
    sys.stdout.write(f"{told}\n")
    return int(any(row.lost_bytes or not row.injected for row in rows))


if __name__ == "__main__":
    sys.exit(main())
