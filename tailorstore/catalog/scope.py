"""One store's rows: the transactions, queries and conversions that all its verbs share."""

import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Connection,
    CursorResult,
    Row,
    Select,
    Table,
    and_,
    insert,
    literal,
    select,
)

from tailorstore.catalog.database import Database
from tailorstore.catalog.failures import damaged
from tailorstore.catalog.tables import branches, commits, composites, layers, lines, stores, tags, versions, withdrawn
from tailorstore.domain.errors import BranchNotFoundError, CatalogDamagedError, RootTakenError
from tailorstore.domain.names import layer_component
from tailorstore.domain.proof import proof_of_versions
from tailorstore.domain.records import Binding, Commit, Composite, LayerVersion

T = TypeVar("T")

AnyRow = Row[*tuple[Any, ...]]
"""A row whose columns the type checker does not follow."""

MAX_STEP = 2**63 - 1
"""Steps are 64-bit integers in both databases."""

BATCH = 500
"""Values in one ``IN``: few enough for every build of SQLite, enough that round trips do not count."""

IDS_TOGETHER = 50
"""Version ids asked about at once; each may stand for several hundred layers."""

ROWS_TOGETHER = 10_000
"""Rows inserted by one statement."""

COMMIT_COLUMNS = (
    commits.c.pk,
    commits.c.commit_id,
    commits.c.step,
    commits.c.branch,
    commits.c.parent_id,
    commits.c.created_at,
    commits.c.message,
    commits.c.metrics,
    commits.c.layers_written,
    commits.c.bytes_written,
    commits.c.bytes_logical,
    commits.c.line_pk,
    commits.c.proof,
)

_bases = versions.alias("bases")

_VERSION_COLUMNS = (
    versions.c.layer_pk,
    versions.c.version_id,
    versions.c.step,
    versions.c.digest,
    versions.c.bytes_logical,
    versions.c.bytes_stored,
    versions.c.objects,
    versions.c.fidelity,
    _bases.c.version_id,
    versions.c.error,
    versions.c.damage,
)


class Scope:
    """A store in a catalog. Safe to share between threads."""

    def __init__(self, database: Database, catalog_id: str, store_pk: int, store_id: str, epoch: int) -> None:
        self.store_id = store_id
        self.epoch = epoch
        """The epoch this object was opened with; :meth:`binding` reads the one in force."""
        self._database = database
        self._catalog_id = catalog_id
        self._pk = store_pk
        self._layer_names: dict[int, str] = {}

    def now(self) -> datetime:
        """Return the time by which leases and grace periods are judged, in UTC.

        Raises:
            CatalogUnavailableError: the database does not answer.
        """
        return self._database.read(self._database.now)

    def binding(self) -> Binding:
        """Return which catalog and epoch the store has now, read afresh.

        Raises:
            CatalogUnavailableError: the database does not answer.
        """
        epoch = self._read(lambda connection: connection.scalar(self._epoch()))
        return Binding(self.store_id, self._catalog_id, int(epoch or 0))

    def opened_as(self) -> Binding:
        """Return the catalog and the epoch that this object was opened with; asks nobody."""
        return Binding(self.store_id, self._catalog_id, self.epoch)

    def root(self) -> str:
        """Return where the store's root was when it was made or taken over, without secrets.

        Raises:
            CatalogUnavailableError: the database does not answer.
        """
        mine = select(stores.c.root).where(stores.c.pk == self._pk)
        return str(self._read(lambda connection: connection.scalar(mine)))

    def _epoch(self) -> Select[int]:
        return select(stores.c.epoch).where(stores.c.pk == self._pk)

    def _read(self, work: Callable[[Connection], T]) -> T:
        return self._database.read(work)

    def _write(self, work: Callable[[Connection, datetime], T], *, exclusive: bool = False, once: bool = False) -> T:
        """Run a write with the store's row locked, and the catalog's time.

        Args:
            work: the write.
            exclusive: alone on this store, for what changes names or drops rows. All others share the lock, so that
                what they have looked at cannot be dropped before they are done. (On SQLite every writer is alone.)
            once: see :meth:`Database.write`.

        Raises:
            RootTakenError: the store was taken over since it was opened. Nothing was changed.
        """

        def locked(connection: Connection) -> T:
            # Below the clock, so that time is told once the row is locked: transactions that wait for each other
            # are in the order of their times.
            mine = select(stores.c.epoch).where(stores.c.pk == self._pk).with_for_update(read=not exclusive).subquery()
            epoch, now = connection.execute(select(mine.c.epoch, self._database.clock())).one()
            if epoch != self.epoch:
                msg = (
                    f"store {self.store_id} was taken over: its epoch in the catalog {self._database.url.shown} is "
                    f"{epoch} and this process opened it at {self.epoch}; open the store again"
                )
                raise RootTakenError(msg)
            return work(connection, now)

        return self._database.write(locked, once=once)

    # --- Commits ------------------------------------------------------------------------------------------------

    def _commits(self) -> Select[Any]:
        return select(*COMMIT_COLUMNS).where(commits.c.store_pk == self._pk)

    def _commit_row(self, connection: Connection, commit_id: str) -> AnyRow | None:
        return connection.execute(self._commits().where(commits.c.commit_id == commit_id)).first()

    def _head_row(self, connection: Connection, branch: str) -> AnyRow | None:
        found = select(*COMMIT_COLUMNS).join(branches, branches.c.head_pk == commits.c.pk)
        return connection.execute(found.where(branches.c.store_pk == self._pk, branches.c.name == branch)).first()

    def _chain(self, branch: str) -> CTE:
        """Return the lines whose commits make up a branch, each with the step up to which it counts."""
        start = select(
            lines.c.pk,
            lines.c.parent_pk,
            lines.c.fork_step,
            literal(MAX_STEP, BigInteger).label("bound"),
            literal(0, BigInteger).label("depth"),
        ).join(branches, branches.c.line_pk == lines.c.pk)
        chain = start.where(branches.c.store_pk == self._pk, branches.c.name == branch).cte("chain", recursive=True)
        return chain.union_all(
            select(lines.c.pk, lines.c.parent_pk, lines.c.fork_step, chain.c.fork_step, chain.c.depth + 1).join(
                chain, lines.c.pk == chain.c.parent_pk
            )
        )

    def _runs(self, connection: Connection, branch: str) -> Sequence[tuple[int, int]]:
        """Return a branch's (line, last step that counts), newest line first."""
        chain = self._chain(branch)
        found = connection.execute(select(chain.c.pk, chain.c.bound).order_by(chain.c.depth))
        return [(row.pk, row.bound) for row in found]

    def _newest(
        self, connection: Connection, branch: str, columns: Sequence[ColumnElement[Any]], limit: int | None
    ) -> list[AnyRow]:
        """Return columns of a branch's commits, newest first, and no more than ``limit``."""
        found: list[AnyRow] = []
        # Line by line, each by its index from the end: the cost is that of the commits returned.
        for line_pk, bound in self._runs(connection, branch):
            left = None if limit is None else limit - len(found)
            if left == 0:
                break
            run = select(*columns).where(commits.c.line_pk == line_pk, commits.c.step <= bound)
            found.extend(connection.execute(run.order_by(commits.c.step.desc()).limit(left)))
        return found

    def _at_step(self, connection: Connection, branch: str, step: int) -> AnyRow | None:
        if not 0 <= step <= MAX_STEP:
            return None
        chain = self._chain(branch)
        on_chain = and_(commits.c.line_pk == chain.c.pk, commits.c.step == step, chain.c.bound >= step)
        return connection.execute(select(*COMMIT_COLUMNS).join(chain, on_chain)).first()

    def _no_branch(self, connection: Connection, branch: str) -> BranchNotFoundError:
        known = connection.scalars(
            select(branches.c.name).where(branches.c.store_pk == self._pk).order_by(branches.c.name).limit(20)
        ).all()
        if not known:
            mine = (withdrawn.c.store_pk == self._pk) & (withdrawn.c.reason == "unreadable")
            damaged = len(connection.scalars(select(withdrawn.c.commit_id).where(mine)).all())
            why = "nothing was committed to this store yet"
            if damaged:
                manifests = "manifest" if damaged == 1 else "manifests"
                why = f"{damaged} {manifests} could not be read, and 'tailorstore rebuild --dry-run' says which"
            return BranchNotFoundError(f"branch {branch!r} has no commits: {why}")
        return BranchNotFoundError(f"no branch {branch!r}; there are: {', '.join(known)}")

    def _name_taken(self, connection: Connection, table: Table, name: str) -> bool:
        """Tell whether ``tags`` or ``branches`` has the name."""
        taken = select(table.c.pk).where(table.c.store_pk == self._pk, table.c.name == name)
        return connection.scalar(taken) is not None

    def _is_tag(self, connection: Connection, name: str) -> bool:
        return self._name_taken(connection, tags, name)

    # --- Layer versions -----------------------------------------------------------------------------------------

    def _load_layers(self, connection: Connection) -> dict[int, str]:
        """Read the names of the store's layers. Their rows are never deleted, so they stay true."""
        found = connection.execute(select(layers.c.pk, layers.c.name).where(layers.c.store_pk == self._pk))
        names = {row.pk: row.name for row in found}
        self._layer_names = names
        return names

    def _names_of(self, connection: Connection, layer_pks: set[int]) -> dict[int, str]:
        """Return names by key, of these layers at least."""
        known = self._layer_names
        return known if layer_pks <= known.keys() else self._load_layers(connection)

    def _layer_keys(self, connection: Connection, names: Iterable[str]) -> dict[str, int]:
        """Return the keys of layers, adding rows for new ones."""
        names = list(dict.fromkeys(names))
        known = {name: pk for pk, name in self._layer_names.items()}
        if any(name not in known for name in names):
            known = {name: pk for pk, name in self._load_layers(connection).items()}
        new = [name for name in names if name not in known]
        if new:
            rows = [{"store_pk": self._pk, "name": name, "component": layer_component(name)} for name in new]
            # Two branches may meet the same new layer at once; the second waits and finds it.
            connection.execute(self._database.insert(layers).on_conflict_do_nothing(), rows)
            # Kept out of the shared names, which must stay true if this transaction fails.
            for batch in in_batches(new):
                mine = select(layers.c.name, layers.c.pk).where(layers.c.store_pk == self._pk)
                found = connection.execute(mine.where(layers.c.name.in_(batch)))
                known.update({row.name: row.pk for row in found})
        return known

    def _add_line(
        self, connection: Connection, line_id: str, parent_pk: int | None = None, fork_step: int | None = None
    ) -> int:
        new = insert(lines).values(store_pk=self._pk, line_id=line_id, parent_pk=parent_pk, fork_step=fork_step)
        return added_key(connection.execute(new))

    def _versions(self) -> Select[Any]:
        """Select layer versions as :meth:`_to_versions` wants them; the caller says which."""
        return select(*_VERSION_COLUMNS).outerjoin_from(versions, _bases, _bases.c.pk == versions.c.base_pk)

    def _to_versions(self, connection: Connection, rows: Sequence[AnyRow]) -> list[LayerVersion]:
        names = self._names_of(connection, {row[0] for row in rows})
        return [LayerVersion(names[row[0]], *row[1 : len(_VERSION_COLUMNS)]) for row in rows]

    def _composite(self, connection: Connection, row: AnyRow) -> Composite:
        held = self._versions().join(composites, composites.c.version_pk == versions.c.pk)
        found = connection.execute(held.where(composites.c.commit_pk == row.pk)).all()
        by_layer = self._by_layer(connection, found)
        light = any(version.fidelity == "light" for version in by_layer.values())
        if row.proof not in (None, proof_of_versions(row.commit_id, row.step, by_layer.values())):
            raise self._contradicts(row.step, row.branch)
        return Composite(to_commit(row), by_layer, self._bases_in(connection, row.pk) if light else {})

    def _contradicts(self, step: int, branch: str) -> CatalogDamagedError:
        """Return the error for a commit whose rows are not those that were published."""
        what = f"its rows of step {step}, committed on {branch!r}, are not those that were published"
        return damaged(what, self._database.url)

    def _bases_in(self, connection: Connection, commit_pk: int) -> dict[str, LayerVersion]:
        """Return the bases of a composite's light versions, by layer."""
        light = versions.alias("light")
        needed = select(light.c.base_pk).join(composites, composites.c.version_pk == light.c.pk)
        wanted = versions.c.pk.in_(needed.where(composites.c.commit_pk == commit_pk))
        return self._by_layer(connection, connection.execute(self._versions().where(wanted)).all())

    def _by_layer(self, connection: Connection, rows: Sequence[AnyRow]) -> dict[str, LayerVersion]:
        """Return layer versions, of which there is one of each layer, by layer in sorted order."""
        ordered = sorted(self._to_versions(connection, rows), key=lambda version: version.layer)
        return {version.layer: version for version in ordered}


def to_commit(row: AnyRow) -> Commit:
    """Return the record of a row of commits."""
    return Commit(
        id=row.commit_id,
        step=row.step,
        branch=row.branch,
        parent=row.parent_id,
        created_at=row.created_at,
        message=row.message,
        metrics=row.metrics,
        layers_written=tuple(row.layers_written),
        bytes_written=row.bytes_written,
        bytes_logical=row.bytes_logical,
    )


def commit_row(commit: Commit, store_pk: int, line_pk: int, proof: str | None) -> dict[str, Any]:
    """Return a commit as a row of ``commits``."""
    return {
        "store_pk": store_pk,
        "commit_id": commit.id,
        "line_pk": line_pk,
        "branch": commit.branch,
        "parent_id": commit.parent,
        "step": commit.step,
        "created_at": commit.created_at,
        "message": commit.message,
        "metrics": dict(commit.metrics),
        "layers_written": list(commit.layers_written),
        "bytes_written": commit.bytes_written,
        "bytes_logical": commit.bytes_logical,
        "proof": proof,
    }


def finite_or_none(value: float | None) -> float | None:
    """Return a number that both databases and every tool can hold: SQLite turns NaN into NULL by itself."""
    return value if value is not None and math.isfinite(value) else None


def version_row(version: LayerVersion, layer_pk: int, now: datetime, base_pk: int | None) -> dict[str, Any]:
    """Return a layer version as a row of ``versions``."""
    return {
        "layer_pk": layer_pk,
        "version_id": version.version_id,
        "step": version.step,
        "digest": version.digest,
        "fidelity": version.fidelity,
        "base_pk": base_pk,
        "error": finite_or_none(version.error),
        "bytes_logical": version.bytes_logical,
        "bytes_stored": version.bytes_stored,
        "objects": version.objects,
        "created_at": now,
    }


def in_batches(values: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Cut values into lists that fit into one statement."""
    rest = iter(values)
    while batch := list(islice(rest, size)):
        yield batch


def added_key(result: "CursorResult[*tuple[Any, ...]]") -> int:
    """Return the key that the database gave to an inserted row."""
    key = result.inserted_primary_key
    assert key is not None  # noqa: S101 (both dialects report it)
    return int(key[0])


def owner() -> str:
    """Return who holds a lease, for a person who looks at the table."""
    return f"{socket.gethostname()}:{os.getpid()}"
