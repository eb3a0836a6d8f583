"""Short ways to commit, for tests of the catalog: no bytes, only rows."""

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import psycopg

from tailorstore.catalog import StoreCatalog
from tailorstore.catalog.urls import parse_url
from tailorstore.domain.names import new_id, parse_ref
from tailorstore.domain.records import EXTRA_LAYER, Commit, CommitDraft, Composite, LayerMeasures, LayerVersion

LEASE = timedelta(minutes=5)
LAPSED = timedelta(seconds=-1)


def version(layer: str, commit_id: str, step: int, base: str | None = None, size: int = 10) -> LayerVersion:
    """Return a layer version."""
    digest = f"xxh3-128:{step:032x}"
    if base is None:
        return LayerVersion(layer, commit_id, step, digest, 2 * size, size, 3)
    return LayerVersion(layer, commit_id, step, digest, 2 * size, size, 3, "light", base, 0.01)


def announce(store: StoreCatalog, step: int, branch: str = "main", lease: timedelta = LEASE) -> CommitDraft:
    """Announce a commit and return its draft."""
    commit_id = new_id()
    head = store.announce(commit_id, branch, step, lease)
    return CommitDraft(
        commit_id, step, branch, head.id if head else None, f"step {step}", {"loss": 1.0 / (step + 1)}, 100
    )


def publish(
    store: StoreCatalog,
    draft: CommitDraft,
    layers: Sequence[str | LayerVersion] = ("a", "b"),
    measures: Mapping[str, LayerMeasures] | None = None,
) -> Commit:
    """Publish a draft with versions of these layers and of ``@extra``."""
    made = [one if isinstance(one, LayerVersion) else version(one, draft.id, draft.step) for one in layers]
    return store.publish(draft, [version(EXTRA_LAYER, draft.id, draft.step), *made], measures or {})


def commit(store: StoreCatalog, step: int, layers: Sequence[str] = ("a", "b"), branch: str = "main") -> Commit:
    """Announce and publish."""
    return publish(store, announce(store, step, branch), layers)


def commit_light(store: StoreCatalog, step: int, layer: str, base: str, branch: str = "main") -> Commit:
    """Announce and publish a light version of a layer."""
    draft = announce(store, step, branch)
    return publish(store, draft, [version(layer, draft.id, step, base)])


def measured(figure: float) -> LayerMeasures:
    """Return measures that can be told apart; there is no gradient."""
    return LayerMeasures(figure, figure / 3, figure * 1e300, None, figure * 1e-300)


def at(store: StoreCatalog, ref: str | int, branch: str = "main") -> Composite:
    """Resolve a ref without a lease."""
    return store.resolve(parse_ref(ref), branch)[0]


def steps(store: StoreCatalog, branch: str = "main") -> list[int]:
    """Return the steps of a branch's log."""
    return [one.step for one in store.log(branch)]


@contextlib.contextmanager
def plain_sql(url: str) -> Iterator[psycopg.Connection | sqlite3.Connection]:
    """Open the database by its driver alone, as psql and sqlite3 would."""
    path = parse_url(url).path
    if path is None:
        with psycopg.connect(plain_postgres(url), autocommit=True) as connection:
            yield connection
    else:
        with contextlib.closing(open_file(path)) as local:
            yield local


def open_file(path: Path) -> sqlite3.Connection:
    """Open a SQLite file."""
    return sqlite3.connect(path, isolation_level=None)


def plain_postgres(url: str) -> str:
    """Return a URL as libpq reads it."""
    return url.replace("postgresql+psycopg:", "postgresql:")
