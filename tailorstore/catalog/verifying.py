"""What verification asks of the catalog and leaves in it: whose turn it is, what was read, what is in quarantine."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select, text, update

from tailorstore.catalog.failures import damaged
from tailorstore.catalog.scope import IDS_TOGETHER, ROWS_TOGETHER, AnyRow, Scope, in_batches, to_commit
from tailorstore.catalog.tables import commits, composites, layers, lines, versions
from tailorstore.domain.errors import RefNotFoundError
from tailorstore.domain.proof import mark_of, proof_of
from tailorstore.domain.records import Commit, LayerVersion

_COMMITS_TOGETHER = 100
"""Whose composites are read at once: with 400 layers 40,000 rows."""

_PAGE = 2000
"""Rows read at once where it is not known how many are needed."""


class Verifying(Scope):
    """The verifier's verbs.

    All raise CatalogUnavailableError where the database does not answer; those that write also AccessDeniedError where
    the catalog is read-only, and RootTakenError where the store was taken over.
    """

    def check_sound(self) -> None:
        """Make sure that every commit holds what it held when it was published, and that the database is in order.

        For what deletes, writes over or believes what the catalog says. Reads a row for every layer of every commit.

        Raises:
            CatalogDamagedError: it is not so.
        """

        def work(connection: Connection) -> None:
            if self._database.is_sqlite:
                said = connection.scalar(text("PRAGMA integrity_check(1)"))
                if said != "ok":
                    raise damaged(str(said), self._database.url)
            self._check_proofs(connection)

        self._read(work)

    def _check_proofs(self, connection: Connection) -> None:
        marks = self._marks(connection)
        proved = connection.execute(self._commits().where(commits.c.proof.is_not(None))).all()
        for batch in in_batches(proved, _COMMITS_TOGETHER):
            held = select(composites.c.commit_pk, composites.c.version_pk)
            sums = dict.fromkeys((row.pk for row in batch), 0)
            for commit_pk, version_pk in connection.execute(held.where(composites.c.commit_pk.in_(sums))):
                sums[commit_pk] += marks.get(version_pk, 0)
            for row in batch:
                if row.proof != proof_of(row.commit_id, row.step, [sums[row.pk]]):
                    raise self._contradicts(row.step, row.branch)

    def _marks(self, connection: Connection) -> dict[int, int]:
        """Return what each version of the store adds to a proof, by its key."""
        base = versions.alias("base")
        names = self._load_layers(connection)
        columns = (versions.c.pk, versions.c.layer_pk, versions.c.version_id, versions.c.digest, versions.c.fidelity)
        found = select(*columns, base.c.version_id.label("base_id"))
        page = found.outerjoin_from(versions, base, base.c.pk == versions.c.base_pk).order_by(versions.c.pk)
        marks: dict[int, int] = {}
        last = -1
        while rows := connection.execute(page.where(versions.c.pk > last).limit(ROWS_TOGETHER)).all():
            last = rows[-1].pk
            for row in rows:
                if row.layer_pk in names:
                    told = (names[row.layer_pk], row.version_id, row.digest, row.fidelity, row.base_id)
                    marks[row.pk] = mark_of(*told)
        return marks

    def least_recently_verified(self, fraction: float) -> tuple[list[LayerVersion], list[str]]:
        """Return the versions and the ids of the commits whose turn it is to be verified.

        Those never verified come first, then those verified longest ago; the oldest first where that is equal.

        Args:
            fraction: of the bytes of all live versions, and of the number of commits; rounded up to a whole one.
        """

        def work(connection: Connection) -> tuple[list[LayerVersion], list[str]]:
            return self._stale(connection, fraction), self._stale_commits(connection, fraction)

        return self._read(work)

    def _stale(self, connection: Connection, fraction: float) -> list[LayerVersion]:
        mine = select(layers.c.pk).where(layers.c.store_pk == self._pk)
        alive = (versions.c.layer_pk.in_(mine), versions.c.doomed_at.is_(None))
        total = connection.scalar(select(func.sum(versions.c.bytes_stored)).where(*alive)) or 0
        left = fraction * int(total)
        rows: list[AnyRow] = []
        while left > 0:
            page = self._versions().where(*alive).order_by(*_by_turn(versions.c.verified_at, versions.c.pk))
            found = connection.execute(page.limit(_PAGE).offset(len(rows))).all()
            for row in found:
                if left > 0:
                    rows.append(row)
                    left -= row.bytes_stored
            if len(found) < _PAGE:
                break
        return self._to_versions(connection, rows)

    def _stale_commits(self, connection: Connection, fraction: float) -> list[str]:
        mine = commits.c.store_pk == self._pk
        total = connection.scalar(select(func.count()).select_from(commits).where(mine)) or 0
        turn = select(commits.c.commit_id).where(mine).order_by(*_by_turn(commits.c.verified_at, commits.c.pk))
        return list(connection.scalars(turn.limit(-int(-fraction * total // 1))))

    def verified(self, read: Collection[LayerVersion], commit_ids: Collection[str]) -> None:
        """Remember that versions and the manifests of commits were read just now, whatever was found."""

        def work(connection: Connection, now: datetime) -> None:
            pks = self._pks(connection, [(version.layer, version.version_id) for version in read])
            for batch in in_batches(sorted(pks.values())):
                connection.execute(update(versions).where(versions.c.pk.in_(batch)).values(verified_at=now))
            for ids in in_batches(sorted(commit_ids)):
                mine = update(commits).where(commits.c.store_pk == self._pk, commits.c.commit_id.in_(ids))
                connection.execute(mine.values(verified_at=now))

        if read or commit_ids:
            self._write(work)

    def quarantine(self, damages: Mapping[tuple[str, str], str]) -> None:
        """Put versions into quarantine.

        Args:
            damages: layer and version id → what was found. Of those that are there already what was found is replaced.
        """

        def work(connection: Connection, now: datetime) -> None:
            pks = self._pks(connection, damages)
            put_into_quarantine(connection, now, {pk: damages[pair] for pair, pk in pks.items()})

        if damages:
            self._write(work)

    def lift(self, whole: Iterable[tuple[str, str]]) -> None:
        """Let versions, by layer and version id, out of quarantine."""
        pairs = list(whole)

        def work(connection: Connection, _now: datetime) -> None:
            for batch in in_batches(sorted(self._pks(connection, pairs).values())):
                mine = update(versions).where(versions.c.pk.in_(batch))
                connection.execute(mine.values(quarantined_at=None, damage=None))

        if pairs:
            self._write(work)

    def in_quarantine(self) -> dict[tuple[str, str], str]:
        """Return layer and version id of what is in quarantine and has its standing, with what was found."""
        found = (
            select(versions.c.layer_pk, versions.c.version_id, versions.c.damage)
            .join(layers, layers.c.pk == versions.c.layer_pk)
            .where(layers.c.store_pk == self._pk)
            .where(versions.c.quarantined_at.is_not(None), versions.c.doomed_at.is_(None))
        )

        def work(connection: Connection) -> dict[tuple[str, str], str]:
            rows = connection.execute(found).all()
            names = self._names_of(connection, {row.layer_pk for row in rows})
            return {(names[row.layer_pk], row.version_id): row.damage for row in rows}

        return self._read(work)

    def commits_in_quarantine(self) -> dict[str, tuple[str, ...]]:
        """Return commit id → layers in quarantine, by their version or by the base that this one needs."""

        def work(connection: Connection) -> dict[str, set[str]]:
            pairs = quarantined_layers(connection, self._pk)
            names = self._names_of(connection, {layer_pk for _, layer_pk in pairs})
            found: dict[str, set[str]] = {}
            for commit_id, layer_pk in pairs:
                found.setdefault(commit_id, set()).add(names[layer_pk])
            return found

        return {commit_id: tuple(sorted(held)) for commit_id, held in self._read(work).items()}

    def commits_to(self, commit_id: str) -> list[Commit]:
        """Return the commits that led to a commit, itself included, newest first, wherever its branch may be by now.

        Raises:
            RefNotFoundError: there is no such commit.
        """

        def work(connection: Connection) -> list[AnyRow]:
            row = self._commit_row(connection, commit_id)
            if row is None:
                msg = f"no commit {commit_id}"
                raise RefNotFoundError(msg)
            found: list[AnyRow] = []
            line_pk, bound = row.line_pk, row.step
            while line_pk is not None:
                run = self._commits().where(commits.c.line_pk == line_pk, commits.c.step <= bound)
                found.extend(connection.execute(run.order_by(commits.c.step.desc())))
                fork = select(lines.c.parent_pk, lines.c.fork_step).where(lines.c.pk == line_pk)
                line_pk, bound = connection.execute(fork).one()
            return found

        return [to_commit(row) for row in self._read(work)]

    def _pks(self, connection: Connection, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """Return the keys of versions by layer and version id; those that are known no more are left out."""
        wanted = set(pairs)
        mine = select(layers.c.pk).where(layers.c.store_pk == self._pk)
        found: dict[tuple[str, str], int] = {}
        for ids in in_batches(sorted({version_id for _, version_id in wanted}), IDS_TOGETHER):
            named = select(versions.c.pk, versions.c.layer_pk, versions.c.version_id)
            rows = connection.execute(named.where(versions.c.version_id.in_(ids), versions.c.layer_pk.in_(mine))).all()
            names = self._names_of(connection, {row.layer_pk for row in rows})
            found.update({(names[row.layer_pk], row.version_id): row.pk for row in rows})
        return {pair: pk for pair, pk in found.items() if pair in wanted}


def _by_turn(verified_at: ColumnElement[Any], pk: ColumnElement[Any]) -> list[ColumnElement[Any]]:
    return [verified_at.is_not(None), verified_at, pk]


def put_into_quarantine(connection: Connection, now: datetime, damages: Mapping[int, str]) -> None:
    """Mark versions by their keys; those that are in quarantine already stay so since when they were."""
    for pk, damage in sorted(damages.items()):
        mine = update(versions).where(versions.c.pk == pk)
        since = func.coalesce(versions.c.quarantined_at, now)
        connection.execute(mine.values(quarantined_at=since, damage=damage))


def quarantined_layers(connection: Connection, store_pk: int) -> Sequence[tuple[str, int]]:
    """Return commit id and key of each layer that composites hold in quarantine, by itself or by its base."""
    light = versions.alias("light")
    quarantined = (
        select(versions.c.pk)
        .join(layers, layers.c.pk == versions.c.layer_pk)
        .where(layers.c.store_pk == store_pk, versions.c.quarantined_at.is_not(None))
    )
    concerned = quarantined.union_all(select(light.c.pk).where(light.c.base_pk.in_(quarantined)))
    held = select(commits.c.commit_id, composites.c.layer_pk).join(composites, composites.c.commit_pk == commits.c.pk)
    return [(row[0], row[1]) for row in connection.execute(held.where(composites.c.version_pk.in_(concerned))).all()]
