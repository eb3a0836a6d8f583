"""What was measured of the layers at each commit: kept with it, and given back."""

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, insert, select

from tailorstore.catalog.scope import COMMIT_COLUMNS, ROWS_TOGETHER, Scope, finite_or_none, in_batches, to_commit
from tailorstore.catalog.tables import measures
from tailorstore.domain.errors import RefNotFoundError
from tailorstore.domain.records import MEASURES, Commit, LayerMeasures

_COLUMNS = (*(measures.c[name] for name in MEASURES), measures.c.finite)
"""In the order of the fields of :class:`LayerMeasures`."""


class Measuring(Scope):
    """The verbs for measures. All raise CatalogUnavailableError where the database does not answer."""

    def measures(self, branch: str, limit: int | None = None) -> list[tuple[Commit, dict[str, LayerMeasures]]]:
        """Return a branch's commits, oldest first, each with what was measured of its layers.

        Args:
            branch: those before a fork are among its commits.
            limit: only so many of the newest.

        Returns:
            By layer in sorted order; empty for commits at which nothing was measured.

        Raises:
            BranchNotFoundError: the branch does not exist or has no commits; the message has those that do.
        """

        def work(connection: Connection) -> list[tuple[Commit, dict[str, LayerMeasures]]]:
            rows = self._newest(connection, branch, COMMIT_COLUMNS, limit)
            if not rows and limit != 0:
                raise self._no_branch(connection, branch)
            measured = self._measured_at(connection, [row.pk for row in rows])
            return [(to_commit(row), measured[row.pk]) for row in reversed(rows)]

        return self._read(work)

    def measures_of(self, commit_id: str) -> dict[str, LayerMeasures]:
        """Return what was measured at a commit, by layer in sorted order.

        Raises:
            RefNotFoundError: there is no such commit.
        """

        def work(connection: Connection) -> dict[str, LayerMeasures]:
            row = self._commit_row(connection, commit_id)
            if row is None:
                msg = f"no commit {commit_id}"
                raise RefNotFoundError(msg)
            return self._measured_at(connection, [row.pk])[row.pk]

        return self._read(work)

    def _measured_at(self, connection: Connection, commit_pks: Sequence[int]) -> dict[int, dict[str, LayerMeasures]]:
        found: dict[int, dict[str, LayerMeasures]] = {pk: {} for pk in commit_pks}
        columns = select(measures.c.commit_pk, measures.c.layer_pk, *_COLUMNS)
        for batch in in_batches(commit_pks):
            rows = connection.execute(columns.where(measures.c.commit_pk.in_(batch))).all()
            names = self._names_of(connection, {row.layer_pk for row in rows})
            for commit_pk, layer_pk, *measured in rows:
                found[commit_pk][names[layer_pk]] = LayerMeasures(*measured)
        return {pk: dict(sorted(measured.items())) for pk, measured in found.items()}

    def _add_measures(self, connection: Connection, measured: Mapping[int, Mapping[str, LayerMeasures]]) -> None:
        """Insert what was measured, by the key of the commit and the layer."""
        keys = self._layer_keys(connection, (layer for found in measured.values() for layer in found))
        rows = (
            {
                "commit_pk": commit_pk,
                "layer_pk": keys[layer],
                **{name: finite_or_none(getattr(one, name)) for name in MEASURES},
                "finite": one.finite,
            }
            for commit_pk, found in measured.items()
            for layer, one in found.items()
        )
        for batch in in_batches(rows, ROWS_TOGETHER):
            connection.execute(insert(measures), batch)
