"""Looking back: heads, logs, composites, layers and sizes. Nothing here changes anything."""

from collections.abc import Iterable, Iterator, Mapping

from sqlalchemy import ColumnElement, Connection, Table, func, select

from tailorstore.catalog.scope import COMMIT_COLUMNS, IDS_TOGETHER, AnyRow, Scope, in_batches, to_commit
from tailorstore.catalog.tables import branches, commits, composites, layers, leases, lines, tags, versions
from tailorstore.domain.errors import RefNotFoundError
from tailorstore.domain.lines import LineRun, Tip
from tailorstore.domain.records import (
    Commit,
    CommitManifest,
    Composite,
    LayerInfo,
    LayerVersion,
    StoreStats,
)
from tailorstore.domain.replay import Replayed

_PAGE = 2000
"""Versions read in one transaction when all are streamed."""


class History(Scope):
    """The looker's verbs. All raise CatalogUnavailableError where the database does not answer."""

    def head(self, branch: str) -> Commit | None:
        """Return the newest commit of a branch; None if it has none."""
        row = self._read(lambda connection: self._head_row(connection, branch))
        return None if row is None else to_commit(row)

    def log(self, branch: str, limit: int | None = None) -> list[Commit]:
        """Return a branch's commits, newest first, and no more than ``limit``.

        Raises:
            BranchNotFoundError: the branch does not exist or has no commits; the message has those that do.
        """

        def work(connection: Connection) -> list[AnyRow]:
            found = self._newest(connection, branch, COMMIT_COLUMNS, limit)
            if not found and limit != 0:
                raise self._no_branch(connection, branch)
            return found

        return [to_commit(row) for row in self._read(work)]

    def steps(self, branch: str, limit: int) -> list[int]:
        """Return the steps of a branch's newest ``limit`` commits, newest first; none if it has no commits."""
        found = self._read(lambda connection: self._newest(connection, branch, (commits.c.step,), limit))
        return [row.step for row in found]

    def steps_to(self, commit_id: str, limit: int) -> list[int]:
        """Return the steps of a commit and of up to ``limit`` commits in all that led to it, newest first.

        Wherever its branch may be by now.

        Raises:
            RefNotFoundError: there is no such commit.
        """

        def work(connection: Connection) -> list[int]:
            row = self._commit_row(connection, commit_id)
            if row is None:
                msg = f"no commit {commit_id}"
                raise RefNotFoundError(msg)
            found: list[int] = []
            line_pk, bound = row.line_pk, row.step
            while line_pk is not None and len(found) < limit:
                run = select(commits.c.step).where(commits.c.line_pk == line_pk, commits.c.step <= bound)
                found.extend(connection.scalars(run.order_by(commits.c.step.desc()).limit(limit - len(found))))
                fork = select(lines.c.parent_pk, lines.c.fork_step).where(lines.c.pk == line_pk)
                line_pk, bound = connection.execute(fork).one()
            return found

        return self._read(work)

    def lines_of(self, branch: str) -> tuple[LineRun, ...]:
        """Return the lines along which a branch runs, newest first; none if there is no such branch."""

        def work(connection: Connection) -> tuple[LineRun, ...]:
            chain = self._chain(branch)
            named = select(lines.c.line_id, chain.c.bound, chain.c.depth).join(chain, lines.c.pk == chain.c.pk)
            found = connection.execute(named.order_by(chain.c.depth))
            return tuple(LineRun(row.line_id, row.bound if row.depth else None) for row in found)

        return self._read(work)

    def lines_to(self, commit_id: str) -> tuple[LineRun, ...]:
        """Return the lines along which the history of a commit runs, newest first, as its manifest has them.

        Raises:
            RefNotFoundError: there is no such commit.
        """

        def work(connection: Connection) -> tuple[LineRun, ...]:
            row = self._commit_row(connection, commit_id)
            if row is None:
                msg = f"no commit {commit_id}"
                raise RefNotFoundError(msg)
            found: list[LineRun] = []
            line_pk, until = row.line_pk, None
            while line_pk is not None:
                fork = select(lines.c.line_id, lines.c.parent_pk, lines.c.fork_step).where(lines.c.pk == line_pk)
                line_id, line_pk, fork_step = connection.execute(fork).one()
                found.append(LineRun(line_id, until))
                until = fork_step
            return tuple(found)

        return self._read(work)

    def whole_history(self) -> Replayed:
        """Return every commit with its lines, oldest first, and where names point, as of one moment.

        The form is that of a replay of the root, so that the two can be compared; manifests are without layers.
        """
        of_branches = (
            select(branches.c.name, commits.c.commit_id, lines.c.line_id)
            .join(commits, commits.c.pk == branches.c.head_pk)
            .join(lines, lines.c.pk == branches.c.line_pk)
            .where(branches.c.store_pk == self._pk)
        )
        of_tags = (
            select(tags.c.name, commits.c.commit_id)
            .join(commits, commits.c.pk == tags.c.commit_pk)
            .where(tags.c.store_pk == self._pk)
        )
        all_lines = select(lines.c.pk, lines.c.line_id, lines.c.parent_pk, lines.c.fork_step)
        binding = self.opened_as()

        def work(connection: Connection) -> Replayed:
            known = {row.pk: row for row in connection.execute(all_lines.where(lines.c.store_pk == self._pk))}
            runs = {pk: _runs_to(pk, known) for pk in known}
            made = connection.execute(self._commits().order_by(commits.c.created_at, commits.c.commit_id))
            return Replayed(
                tuple(CommitManifest(binding, to_commit(row), {}, {}, {}, runs[row.line_pk]) for row in made),
                {row.name: Tip(row.commit_id, row.line_id) for row in connection.execute(of_branches)},
                {row.name: row.commit_id for row in connection.execute(of_tags)},
                unplaced=(),
                contradictory=(),
            )

        return self._read(work)

    def composite(self, commit_id: str) -> Composite:
        """Return a commit's full map.

        Raises:
            RefNotFoundError: there is no such commit.
        """

        def work(connection: Connection) -> Composite:
            row = self._commit_row(connection, commit_id)
            if row is None:
                msg = f"no commit {commit_id}"
                raise RefNotFoundError(msg)
            return self._composite(connection, row)

        return self._read(work)

    def layers(self, commit_id: str) -> list[LayerInfo]:
        """Return the layers of a commit's composite, by name, with how many versions of each the store holds.

        Raises:
            RefNotFoundError: there is no such commit.
        """
        composite = self.composite(commit_id)
        quarantined = composite.quarantined
        mine = select(layers.c.pk).where(layers.c.store_pk == self._pk)
        counted = (
            select(versions.c.layer_pk, func.count())
            .where(versions.c.layer_pk.in_(mine), versions.c.doomed_at.is_(None))
            .group_by(versions.c.layer_pk)
        )

        def work(connection: Connection) -> dict[str, int]:
            names = self._load_layers(connection)
            return {names[pk]: count for pk, count in connection.execute(counted)}

        held = self._read(work)
        return [
            LayerInfo(
                name=version.layer,
                source_step=version.step,
                staleness=composite.commit.step - version.step,
                fidelity=version.fidelity,
                version_id=version.version_id,
                bytes_logical=version.bytes_logical,
                bytes_stored=version.bytes_stored,
                versions=held.get(version.layer, 0),
                base_step=composite.bases[version.layer].step if version.layer in composite.bases else None,
                error=version.error,
                quarantined=quarantined.get(version.layer),
            )
            for version in composite.versions.values()
        ]

    def stats(self) -> StoreStats:
        """Return counts and sizes."""

        def work(connection: Connection) -> StoreStats:
            def count(table: Table, *where: ColumnElement[bool]) -> int:
                mine = select(func.count()).select_from(table).where(table.c.store_pk == self._pk, *where)
                return connection.scalar(mine) or 0

            now = self._database.now(connection)
            logical = select(func.sum(commits.c.bytes_logical)).where(commits.c.store_pk == self._pk)
            by_standing = (
                select(versions.c.doomed_at.is_(None), func.count(), func.sum(versions.c.bytes_stored))
                .join(layers, layers.c.pk == versions.c.layer_pk)
                .where(layers.c.store_pk == self._pk)
                .group_by(versions.c.doomed_at.is_(None))
            )
            sums = {bool(alive): (rows, int(stored)) for alive, rows, stored in connection.execute(by_standing)}
            alive_count, alive_bytes = sums.get(True, (0, 0))
            doomed_count, doomed_bytes = sums.get(False, (0, 0))
            return StoreStats(
                commits=count(commits),
                branches=count(branches),
                tags=count(tags),
                layers=count(layers),
                versions=alive_count,
                versions_doomed=doomed_count,
                bytes_logical=int(connection.scalar(logical) or 0),
                bytes_stored=alive_bytes,
                bytes_doomed=doomed_bytes,
                leases=count(leases, leases.c.expires_at > now),
            )

        return self._read(work)

    def commits_holding(self, layer: str, version_id: str) -> list[Commit]:
        """Return the commits whose composites hold a layer version, or a light one of which it is the base, by step."""
        named = (
            select(versions.c.pk)
            .join(layers, layers.c.pk == versions.c.layer_pk)
            .where(versions.c.version_id == version_id, layers.c.store_pk == self._pk, layers.c.name == layer)
        )
        light = select(versions.c.pk).where(versions.c.base_pk == named.scalar_subquery())
        holding = select(composites.c.commit_pk).where(composites.c.version_pk.in_(named.union_all(light)))
        held = self._commits().where(commits.c.pk.in_(holding)).order_by(commits.c.step, commits.c.pk)
        return [to_commit(row) for row in self._read(lambda connection: connection.execute(held).all())]

    def bases_of(self, light: Iterable[LayerVersion]) -> list[LayerVersion]:
        """Return the bases of light versions, each once; those that are known no more are left out."""
        needed = {(version.layer, version.base_id) for version in light if version.base_id is not None}
        mine = select(layers.c.pk).where(layers.c.store_pk == self._pk)

        def work(connection: Connection) -> list[LayerVersion]:
            found: list[LayerVersion] = []
            for ids in in_batches(sorted({base_id for _, base_id in needed}), IDS_TOGETHER):
                named = self._versions().where(versions.c.version_id.in_(ids), versions.c.layer_pk.in_(mine))
                found += self._to_versions(connection, connection.execute(named).all())
            return [version for version in found if (version.layer, version.version_id) in needed]

        return self._read(work) if needed else []

    def live_versions(self) -> Iterator[LayerVersion]:
        """Yield all layer versions that have not lost their standing, oldest first.

        Read in pages, each as of its own moment: what is published meanwhile comes too, and what is expired
        meanwhile may have come already.
        """
        after = 0
        while True:
            page, after = self._read(lambda connection, start=after: self._page(connection, start))  # type: ignore[misc]
            yield from page
            if len(page) < _PAGE:
                return

    def _page(self, connection: Connection, after: int) -> tuple[list[LayerVersion], int]:
        alive = (
            self._versions()
            .add_columns(versions.c.pk.label("key"))
            .join(layers, layers.c.pk == versions.c.layer_pk)
            .where(layers.c.store_pk == self._pk, versions.c.pk > after, versions.c.doomed_at.is_(None))
        )
        rows = connection.execute(alive.order_by(versions.c.pk).limit(_PAGE)).all()
        return self._to_versions(connection, rows), rows[-1].key if rows else after


def _runs_to(line_pk: int, known: Mapping[int, AnyRow]) -> tuple[LineRun, ...]:
    """Return a line and those that it goes back to, newest first."""
    found: list[LineRun] = []
    at: int | None = line_pk
    until: int | None = None
    while at is not None:
        line = known[at]
        found.append(LineRun(line.line_id, until))
        at, until = line.parent_pk, line.fork_step
    return tuple(found)
