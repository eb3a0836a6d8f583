"""How long the catalog takes with a million layer versions in it.

    python -m tests.bench.catalog_scale sqlite:////tmp/scale.db
    python -m tests.bench.catalog_scale postgresql://…/empty_database --written-in 10

Fills an empty database by the drivers' own fast ways, then measures through the catalog's API. ``--written-in N``:
a layer is written by every N-th commit only, so that there are N times as many commits and composite entries.
``--light``: after the first commit all layers but ``@extra`` are written light, and measured at every commit.
"""

import argparse
import hashlib
import json
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice

import psycopg

from tailorstore.catalog import Catalog, StoreCatalog
from tailorstore.catalog.urls import parse_url
from tailorstore.domain.names import layer_component, new_id, parse_ref
from tailorstore.domain.records import EXTRA_LAYER, CommitDraft, LayerMeasures, LayerVersion

STORE_ID = "scale"
STEP = 100
LEASE = timedelta(minutes=5)
Row = tuple[object, ...]

COLUMNS = {
    "layers": "pk, store_pk, name, component",
    "lines": "pk, store_pk",
    "commits": "pk, store_pk, commit_id, line_pk, branch, parent_id, step, created_at, metrics, layers_written, "
    "bytes_written, bytes_logical",
    "versions": "pk, layer_pk, version_id, step, digest, fidelity, base_pk, error, bytes_logical, bytes_stored, "
    "objects, created_at",
    "composites": "commit_pk, layer_pk, version_pk",
    "measures": "commit_pk, layer_pk, drift, relative_drift, momentum, curvature, finite",
    "branches": "pk, store_pk, name, line_pk, head_pk, created_at",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of one verb."""

    verb: str
    median_ms: float
    p95_ms: float
    worst_ms: float


@dataclass(frozen=True, slots=True)
class History:
    """A made-up history, as rows."""

    layers: int
    commits: int
    written_in: int
    light: bool

    def names(self) -> list[str]:
        """Return the names of the layers."""
        return [EXTRA_LAYER, *(f"model.layers.{number}" for number in range(1, self.layers))]

    def commit_id(self, number: int) -> str:
        """Return an id that looks like the real ones."""
        return "a" + hashlib.sha256(str(number).encode()).hexdigest()[:19]

    def writes(self, number: int, layer: int) -> bool:
        """Tell whether a commit writes a layer."""
        return number == 0 or layer == 0 or (number + layer) % self.written_in == 0

    def commit_rows(self, now: object) -> Iterator[Row]:
        """Yield the commits, on one line."""
        names = self.names()
        for number in range(self.commits):
            written = json.dumps([names[one] for one in range(1, self.layers) if self.writes(number, one)])
            parent = self.commit_id(number - 1) if number else None
            step = number * STEP
            ids = (number + 1, 1, self.commit_id(number), 1, "main", parent, step, now)
            yield (*ids, '{"loss":1.25}', written, 10**9, 10**10)

    def version_rows(self, now: object) -> Iterator[Row]:
        """Yield the layer versions."""
        pk = 0
        for number in range(self.commits):
            commit_id = self.commit_id(number)
            for layer in range(self.layers):
                if self.writes(number, layer):
                    pk += 1
                    digest = f"xxh3-128:{pk:032x}"
                    # The first commit writes every layer, so there a version's key is its layer's.
                    light = self.light and number > 0 and layer > 0
                    kind = ("light", layer + 1, 0.01) if light else ("full", None, None)
                    sizes = (250_000_000, 20_000_000 if light else 200_000_000, 40)
                    yield (pk, layer + 1, commit_id, number * STEP, digest, *kind, *sizes, now)

    def measures_rows(self) -> Iterator[Row]:
        """Yield what was measured of every layer but ``@extra`` at every commit."""
        for number in range(self.commits if self.light else 0):
            for layer in range(1, self.layers):
                drift = (number + 1) / layer
                yield (number + 1, layer + 1, drift, drift / 100, drift / 1000, drift * drift, True)

    def composite_rows(self) -> Iterator[Row]:
        """Yield every commit's full map."""
        newest = [0] * self.layers
        pk = 0
        for number in range(self.commits):
            for layer in range(self.layers):
                if self.writes(number, layer):
                    pk += 1
                    newest[layer] = pk
                yield (number + 1, layer + 1, newest[layer])


def fill(
    url: str, *, layers: int = 400, versions: int = 1_000_000, written_in: int = 1, light: bool = False
) -> History:
    """Fill an empty database with a history of one branch that has so many layer versions."""
    catalog = Catalog.open(url)
    catalog.register(STORE_ID, "s3://bucket/scale", 1)
    history = History(layers, versions * written_in // layers, written_in, light)
    parsed = parse_url(url)
    now = datetime.now(UTC)
    stamp = now.strftime("%Y-%m-%d %H:%M:%S.%f") if parsed.path else now
    rows: dict[str, Iterator[Row]] = {
        "layers": ((pk, 1, name, layer_component(name)) for pk, name in enumerate(history.names(), start=1)),
        "lines": iter([(1, 1)]),
        "commits": history.commit_rows(stamp),
        "versions": history.version_rows(stamp),
        "composites": history.composite_rows(),
        "measures": history.measures_rows(),
        "branches": iter([(1, 1, "main", 1, history.commits, stamp)]),
    }
    if parsed.path is not None:
        _fill_sqlite(str(parsed.path), rows)
    else:
        _fill_postgres(url, rows)
    catalog.close()
    return history


def _fill_sqlite(path: str, rows: dict[str, Iterator[Row]]) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA synchronous = OFF")
    for table, values in rows.items():
        marks = ", ".join("?" for _ in COLUMNS[table].split(","))
        connection.executemany(f"INSERT INTO {table} ({COLUMNS[table]}) VALUES ({marks})", values)
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def _fill_postgres(url: str, rows: dict[str, Iterator[Row]]) -> None:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        # The rows refer to each other rightly; checking each of ten million takes minutes.
        connection.execute("SET session_replication_role = replica")
        for table, values in rows.items():
            copy = f"COPY {table} ({COLUMNS[table]}) FROM STDIN"
            with connection.cursor() as cursor, cursor.copy(copy.encode()) as target:
                for row in values:
                    target.write_row(row)
            if COLUMNS[table].startswith("pk,"):
                after = f"SELECT setval(pg_get_serial_sequence('{table}', 'pk'), max(pk)) FROM {table}"
                connection.execute(after.encode())
        connection.execute("VACUUM ANALYZE")


def measure(url: str, *, runs: int = 200) -> list[Measured]:
    """Measure the verbs that a trainer and a reader wait for, on a filled catalog."""
    catalog = Catalog.open(url, create=False)
    store = catalog.store(STORE_ID)
    if store is None:
        raise LookupError(STORE_ID)
    head = store.head("main")
    if head is None:
        raise LookupError("main")
    chance = random.Random(1)
    names = list(store.composite(head.id).versions)
    steps = [chance.randrange(head.step // STEP + 1) * STEP for _ in range(runs)]

    def resolve(number: int) -> None:
        store.resolve(parse_ref(steps[number]), "main")

    def resolve_leased(number: int) -> None:
        store.resolve(parse_ref(steps[number]), "main", LEASE)

    verbs: dict[str, Callable[[int], object]] = {
        "resolve any step": resolve,
        "resolve any step, with a lease": resolve_leased,
        "resolve latest": lambda _: store.resolve(parse_ref("latest"), "main"),
        "log(limit=20)": lambda _: store.log("main", 20),
        "steps(limit=200)": lambda _: store.steps("main", 200),
        "measures of a commit": lambda _: store.measures_of(head.id),
        "measures(limit=20)": lambda _: store.measures("main", 20),
        "head": lambda _: store.head("main"),
    }
    measured = [_time(verb, act, runs) for verb, act in verbs.items()]
    counts = (len(names), max(2, len(names) // 10))
    measured.extend(_time_publish(store, names[:count], runs) for count in counts)
    catalog.close()
    return measured


def _time(verb: str, act: Callable[[int], object], runs: int) -> Measured:
    act(0)
    times = []
    for number in range(runs):
        start = time.perf_counter()
        act(number)
        times.append(time.perf_counter() - start)
    return _summary(verb, times)


def _time_publish(store: StoreCatalog, names: Sequence[str], runs: int) -> Measured:
    times = []
    for _ in range(runs):
        head = store.head("main")
        step = STEP if head is None else head.step + STEP
        bases = {} if head is None else store.composite(head.id).bases
        commit_id = new_id()
        announced = store.announce(commit_id, "main", step, LEASE)
        parent = None if announced is None else announced.id
        draft = CommitDraft(commit_id, step, "main", parent, None, {"loss": 1.0}, 10**10)
        full = [LayerVersion(name, commit_id, step, "xxh3-128:" + "0" * 32, 9, 9, 40) for name in names]
        versions = [
            replace(one, fidelity="light", base_id=bases[one.layer].version_id) if one.layer in bases else one
            for one in full
        ]
        measures = dict.fromkeys(bases, LayerMeasures(1.0, 0.5, 0.25, None, 2.0))
        start = time.perf_counter()
        store.publish(draft, versions, measures)
        times.append(time.perf_counter() - start)
    return _summary(f"publish {len(names)} layers", times[1:])


def _summary(verb: str, times: Sequence[float]) -> Measured:
    ordered = [one * 1000 for one in sorted(times)]
    p95 = next(islice(ordered, int(len(ordered) * 0.95), None))
    return Measured(verb, ordered[len(ordered) // 2], p95, ordered[-1])


def main() -> None:
    """Fill, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--versions", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=400)
    parser.add_argument("--written-in", type=int, default=1)
    parser.add_argument("--light", action="store_true")
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args()
    start = time.perf_counter()
    history = fill(
        given.url, layers=given.layers, versions=given.versions, written_in=given.written_in, light=given.light
    )
    print(f"{history.commits} commits, filled in {time.perf_counter() - start:.0f} s")
    for row in measure(given.url, runs=given.runs):
        print(f"{row.verb:32} median {row.median_ms:7.2f}  p95 {row.p95_ms:7.2f}  worst {row.worst_ms:7.2f} ms")


if __name__ == "__main__":
    main()
