"""What GC asks of the catalog: who is there, drop these, what may be swept, who knows this object.

The order matters and is the caller's: rows lose their standing here before any object is deleted.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, delete, exists, or_, select, update

from tailorstore.catalog.scope import IDS_TOGETHER, AnyRow, in_batches, to_commit
from tailorstore.catalog.standing import Standings
from tailorstore.catalog.tables import (
    branches,
    commits,
    composites,
    layers,
    leases,
    lines,
    measures,
    pending,
    tags,
    versions,
)
from tailorstore.catalog.verifying import quarantined_layers
from tailorstore.domain.records import Commit, Expired, LayerVersion
from tailorstore.domain.retention import Inventory

_EXPIRED_TOGETHER = 500
"""With 400 layers they have 200,000 rows: about a second, for which nobody else can publish."""


class _PreviewOnlyError(Exception):
    """Rolls a previewed expiry back, carrying what it would have done."""

    def __init__(self, expired: Expired) -> None:
        super().__init__()
        self.expired = expired


class Collection(Standings):
    """The collector's verbs.

    Each but :meth:`expire` is one transaction. All raise CatalogUnavailableError where the database does not answer;
    those that write also AccessDeniedError where the catalog is read-only, and RootTakenError where the store was taken
    over.
    """

    def inventory(self) -> Inventory:
        """Return everything that a retention policy decides upon, as of one moment."""
        return self._read(self._inventory)

    def expire(self, commit_ids: Iterable[str]) -> Expired:
        """Drop commits and their measures from the catalog, and doom the versions that no remaining commit needs.

        Never dropped, whatever is asked: the head of a branch, a tagged commit, one that a live lease covers, and
        the parent of a commit that is being written. A version stays alive while a composite holds it or a light
        version that is alive has it as its base. Unknown ids are no error.

        Many commits are dropped in several transactions, in the order given, so that trainers can publish in between;
        where one fails, those before it stay in effect, and the next run drops the rest.
        """
        done: list[Expired] = []
        # With nothing to drop it still finds out whether this catalog may.
        for batch in list(in_batches(dict.fromkeys(commit_ids), _EXPIRED_TOGETHER)) or [[]]:

            def work(connection: Connection, now: datetime, batch: list[str] = batch) -> Expired:
                return self._expire(connection, now, batch)

            done.append(self._write(work, exclusive=True, once=True))
        gone = sorted((commit for one in done for commit in one.commits), key=lambda commit: (commit.step, commit.id))
        return Expired(tuple(gone), sum(one.versions_doomed for one in done), sum(one.bytes_doomed for one in done))

    def preview(self, commit_ids: Iterable[str]) -> Expired:
        """Return what :meth:`expire` would do, by doing it and rolling it back."""
        wanted = list(dict.fromkeys(commit_ids))

        def work(connection: Connection, now: datetime) -> Expired:
            raise _PreviewOnlyError(self._expire(connection, now, wanted))

        try:
            return self._write(work, exclusive=True)
        except _PreviewOnlyError as done:
            return done.expired

    def void_lapsed(self) -> int:
        """Delete claims of writers and readers that lapsed by the catalog's clock; returns how many.

        A writer whose claim is gone cannot publish any more, so its objects may then be swept.
        """

        def work(connection: Connection, now: datetime) -> int:
            mine = delete(pending).where(pending.c.store_pk == self._pk, pending.c.expires_at <= now)
            voided = connection.scalars(mine.returning(pending.c.commit_id)).all()
            self._withdraw(connection, now, voided, "voided")
            lapsed = delete(leases).where(leases.c.store_pk == self._pk, leases.c.expires_at <= now)
            return len(voided) + connection.execute(lapsed).rowcount

        return self._write(work, exclusive=True, once=True)

    def doomed(self, grace: timedelta) -> list[LayerVersion]:
        """Return the versions that lost their standing longer than ``grace`` ago, oldest first."""

        def work(connection: Connection) -> list[LayerVersion]:
            until = self._database.now(connection) - grace
            mine = select(layers.c.pk).where(layers.c.store_pk == self._pk)
            past = self._versions().where(versions.c.doomed_at <= until, versions.c.layer_pk.in_(mine))
            ordered = past.order_by(versions.c.doomed_at, versions.c.pk)
            return self._to_versions(connection, connection.execute(ordered).all())

        return self._read(work)

    def bury(self, gone: Sequence[LayerVersion]) -> None:
        """Delete the rows of doomed versions whose objects are gone; rows that are not doomed stay."""

        def work(connection: Connection, _now: datetime) -> None:
            keys = self._layer_keys(connection, [version.layer for version in gone])
            named = {(keys[version.layer], version.version_id) for version in gone}
            dead: list[int] = []
            # By version id, of which the index is made; a list of pairs makes Postgres read the whole table.
            for ids in in_batches(dict.fromkeys(version.version_id for version in gone), IDS_TOGETHER):
                found = select(versions.c.pk, versions.c.layer_pk, versions.c.version_id).where(
                    versions.c.version_id.in_(ids), versions.c.doomed_at.is_not(None)
                )
                rows = connection.execute(found)
                dead.extend(row.pk for row in rows if (row.layer_pk, row.version_id) in named)
            for pks in in_batches(dead):
                # A light version whose own deletion failed outlives its base by a run; it needs it no more.
                connection.execute(update(versions).where(versions.c.base_pk.in_(pks)).values(base_pk=None))
                connection.execute(delete(versions).where(versions.c.pk.in_(pks)))

        if gone:
            self._write(work)

    def unknown_versions(self, pairs: Iterable[tuple[str, str]], *, as_if_voided: bool = False) -> set[tuple[str, str]]:
        """Return the (layer component, version id) pairs that no version and no announced commit accounts for.

        Args:
            pairs: to ask about.
            as_if_voided: answer as after :meth:`void_lapsed`. For previews: what is deleted must be voided first.
        """
        wanted: dict[str, set[str]] = {}
        for component, version_id in pairs:
            wanted.setdefault(version_id, set()).add(component)

        def known(connection: Connection, ids: list[str]) -> set[tuple[str, str]]:
            rows = connection.execute(
                select(layers.c.component, versions.c.version_id)
                .join(layers, layers.c.pk == versions.c.layer_pk)
                .where(versions.c.version_id.in_(ids), layers.c.store_pk == self._pk)
            )
            found = {(row.component, row.version_id) for row in rows}
            for one in self._announced(connection, ids, live_only=as_if_voided):
                found.update((component, one) for component in wanted[one])
            return found

        asked = {(component, one) for one, components in wanted.items() for component in components}
        for batch in in_batches(wanted, IDS_TOGETHER):
            asked -= self._read(lambda connection, ids=batch: known(connection, ids))  # type: ignore[misc]
        return asked

    def _announced(self, connection: Connection, ids: list[str], *, live_only: bool) -> Sequence[str]:
        mine = select(pending.c.commit_id).where(pending.c.store_pk == self._pk)
        if live_only:
            mine = mine.where(pending.c.expires_at > self._database.now(connection))
        return connection.scalars(mine.where(pending.c.commit_id.in_(ids))).all()

    def _inventory(self, connection: Connection) -> Inventory:
        now = self._database.now(connection)
        by_pk: dict[int, Commit] = {}
        by_line: dict[int, list[int]] = {}
        everything = self._commits().order_by(commits.c.line_pk, commits.c.step.desc())
        for row in connection.execute(everything):
            by_pk[row.pk] = to_commit(row)
            by_line.setdefault(row.line_pk, []).append(row.pk)
        forks = select(lines.c.pk, lines.c.parent_pk, lines.c.fork_step).where(lines.c.store_pk == self._pk)
        parents = {row.pk: (row.parent_pk, row.fork_step) for row in connection.execute(forks)}
        found: dict[str, list[Commit]] = {}
        reached: set[int] = set()
        heads = select(branches.c.name, branches.c.line_pk).where(branches.c.store_pk == self._pk)
        for name, start in connection.execute(heads):
            log: list[Commit] = []
            line_pk, bound = start, None
            while line_pk is not None:
                run = [pk for pk in by_line.get(line_pk, ()) if bound is None or by_pk[pk].step <= bound]
                log.extend(by_pk[pk] for pk in run)
                reached.update(run)
                line_pk, bound = parents[line_pk]
            found[name] = log
        return Inventory(
            now=now,
            lines=dict(sorted(found.items())),
            unreachable=tuple(commit for pk, commit in by_pk.items() if pk not in reached),
            tags=self._tagged(connection, by_pk),
            leased=self._leased(connection, by_pk, now),
            quarantined=frozenset(commit_id for commit_id, _ in quarantined_layers(connection, self._pk)),
        )

    def _tagged(self, connection: Connection, by_pk: dict[int, Commit]) -> dict[str, str]:
        mine = select(tags.c.name, tags.c.commit_pk).where(tags.c.store_pk == self._pk)
        return {name: by_pk[pk].id for name, pk in sorted(connection.execute(mine))}

    def _leased(self, connection: Connection, by_pk: dict[int, Commit], now: datetime) -> frozenset[str]:
        held = select(leases.c.commit_pk).where(leases.c.store_pk == self._pk, leases.c.expires_at > now)
        built_on = select(pending.c.parent_id).where(
            pending.c.store_pk == self._pk, pending.c.expires_at > now, pending.c.parent_id.is_not(None)
        )
        return frozenset({by_pk[pk].id for pk in connection.scalars(held)} | set(connection.scalars(built_on)))

    def _expire(self, connection: Connection, now: datetime, commit_ids: Sequence[str]) -> Expired:
        # Lapsed leases protect nothing, and their rows would stand in the way.
        connection.execute(delete(leases).where(leases.c.store_pk == self._pk, leases.c.expires_at <= now))
        rows: list[AnyRow] = []
        for batch in in_batches(commit_ids):
            asked = self._commits().where(commits.c.commit_id.in_(batch), ~self._is_protected(now))
            rows.extend(connection.execute(asked))
        loose: set[int] = set()
        for pks in in_batches(row.pk for row in rows):
            held = select(composites.c.version_pk).distinct().where(composites.c.commit_pk.in_(pks))
            loose.update(connection.scalars(held))
            for table in (composites, measures):
                connection.execute(delete(table).where(table.c.commit_pk.in_(pks)))
            connection.execute(delete(commits).where(commits.c.pk.in_(pks)))
        self._withdraw(connection, now, [row.commit_id for row in rows], "expired")
        doomed, freed = self._doom(connection, now, loose)
        expired = sorted((to_commit(row) for row in rows), key=lambda commit: (commit.step, commit.id))
        return Expired(tuple(expired), doomed, freed)

    def _is_protected(self, now: datetime) -> ColumnElement[bool]:
        return or_(
            exists().where(branches.c.head_pk == commits.c.pk),
            exists().where(tags.c.commit_pk == commits.c.pk),
            exists().where(leases.c.commit_pk == commits.c.pk),
            exists().where(
                pending.c.store_pk == commits.c.store_pk,
                pending.c.parent_id == commits.c.commit_id,
                pending.c.expires_at > now,
            ),
        )

    def _doom(self, connection: Connection, now: datetime, loose: set[int]) -> tuple[int, int]:
        """Doom those of the versions that nothing needs any more; returns how many and their bytes."""
        light = versions.alias("light")
        unheld = ~exists().where(composites.c.version_pk == versions.c.pk)
        no_base = ~exists().where(light.c.base_pk == versions.c.pk, light.c.doomed_at.is_(None))
        count = freed = 0
        # Light versions first: when they go, a base that only they kept alive goes with them.
        for fidelity in ("light", "full"):
            bases: set[int] = set()
            for pks in in_batches(loose):
                dead = connection.execute(
                    update(versions)
                    .where(versions.c.pk.in_(pks), versions.c.fidelity == fidelity)
                    .where(versions.c.doomed_at.is_(None), unheld, no_base)
                    .values(doomed_at=now)
                    .returning(versions.c.base_pk, versions.c.bytes_stored)
                ).all()
                count += len(dead)
                freed += sum(row.bytes_stored for row in dead)
                bases.update(row.base_pk for row in dead if row.base_pk is not None)
            loose = loose | bases
        return count, freed
