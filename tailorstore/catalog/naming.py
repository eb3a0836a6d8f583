"""Tags and branches: made, moved, listed and removed."""

from datetime import datetime

from sqlalchemy import ColumnElement, Connection, Table, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from tailorstore.catalog.failures import is_duplicate
from tailorstore.catalog.scope import AnyRow, Scope
from tailorstore.catalog.tables import branches, commits, tags
from tailorstore.domain.errors import BranchExistsError, RefNotFoundError, TagExistsError
from tailorstore.domain.names import check_name, new_id
from tailorstore.domain.records import Reference


class Naming(Scope):
    """The verbs for names. Each is one transaction; where it raises, names are as they were.

    All raise AccessDeniedError where the catalog is read-only, RootTakenError where the store was taken over, and
    CatalogUnavailableError where the database does not answer.
    """

    def tag(self, name: str, commit_id: str) -> Reference:
        """Give a commit a fixed name, which also protects it from GC.

        Raises:
            TagExistsError: the tag exists; remove it first.
            BranchExistsError: a branch has the name.
            BadNameError: no tag can have this name.
            RefNotFoundError: there is no such commit.
        """
        check_name("tag", name)

        def work(connection: Connection, now: datetime) -> Reference:
            commit = self._needed(connection, commit_id)
            if self._name_taken(connection, branches, name):
                msg = f"{name!r} is a branch, so no tag can have that name"
                raise BranchExistsError(msg)
            try:
                connection.execute(
                    insert(tags).values(store_pk=self._pk, name=name, commit_pk=commit.pk, created_at=now)
                )
            except IntegrityError as error:
                if not is_duplicate(error):
                    raise
                msg = f"tag {name!r} exists; tags are fixed names, so remove it first or choose another"
                raise TagExistsError(msg) from None
            return Reference(name, commit.commit_id, commit.step, now)

        return self._write(work, exclusive=True, once=True)

    def untag(self, name: str) -> datetime:
        """Remove a tag, its commit is GC's to judge from then on; returns when, by the catalog's clock.

        Raises:
            RefNotFoundError: there is no such tag.
        """
        return self._remove(tags, "tag", name)

    def branch(self, name: str, commit_id: str, *, move: bool, line: str | None = None) -> datetime | None:
        """Make a branch that continues from a commit, or move one there.

        Returns when, by the catalog's clock; None where the branch pointed there already, and nothing was changed.

        The commits that a moved branch leaves behind stay until GC, out of its log. A commit that is being written
        on it cannot be published any more.

        Args:
            name: of the branch.
            commit_id: where it points from now on.
            move: allow that it exists.
            line: id of the line that begins; that of the record which says so in the root. A fresh one by default.

        Raises:
            BranchExistsError: the branch exists and ``move`` is false.
            TagExistsError: a tag has the name.
            BadNameError: no branch can have this name.
            RefNotFoundError: there is no such commit.
        """
        check_name("branch", name)

        def work(connection: Connection, now: datetime) -> datetime | None:
            commit = self._needed(connection, commit_id)
            if self._is_tag(connection, name):
                msg = f"{name!r} is a tag, so no branch can have that name"
                raise TagExistsError(msg)
            mine = select(branches).where(branches.c.store_pk == self._pk, branches.c.name == name)
            old = connection.execute(mine).first()
            if old is not None and not move:
                msg = f"branch {name!r} exists; pass move=True to move it to {commit.branch}@{commit.step}"
                raise BranchExistsError(msg)
            if old is not None and old.head_pk == commit.pk:
                return None
            # A line of its own, so that what is committed from here on and what was committed after the fork point
            # never meet in one log.
            line_pk = self._add_line(connection, line or new_id(), commit.line_pk, commit.step)
            if old is None:
                row = {"store_pk": self._pk, "name": name, "created_at": now}
                connection.execute(insert(branches).values(**row, line_pk=line_pk, head_pk=commit.pk))
                return now
            moved = update(branches).where(branches.c.pk == old.pk)
            connection.execute(moved.values(line_pk=line_pk, head_pk=commit.pk))
            return now

        return self._write(work, exclusive=True, once=True)

    def delete_branch(self, name: str) -> datetime:
        """Remove a branch; commits that no other branch or tag reaches are GC's to judge from then on.

        Returns when, by the catalog's clock.

        Raises:
            BranchNotFoundError: there is no such branch.
        """
        return self._remove(branches, "branch", name)

    def tags(self) -> list[Reference]:
        """Return all tags, by name."""
        return self._list_names(tags, tags.c.commit_pk)

    def branches(self) -> list[Reference]:
        """Return all branches, by name, with their heads."""
        return self._list_names(branches, branches.c.head_pk)

    def _list_names(self, table: Table, target: ColumnElement[int]) -> list[Reference]:
        listed = (
            select(table.c.name, commits.c.commit_id, commits.c.step, table.c.created_at)
            .outerjoin_from(table, commits, commits.c.pk == target)
            .where(table.c.store_pk == self._pk)
        )
        rows = self._read(lambda connection: connection.execute(listed).all())
        # Sorted here, because databases sort text by the rules of some country.
        return sorted((Reference(*row) for row in rows), key=lambda reference: reference.name)

    def _remove(self, table: Table, kind: str, name: str) -> datetime:
        def work(connection: Connection, now: datetime) -> datetime:
            mine = delete(table).where(table.c.store_pk == self._pk, table.c.name == name)
            if connection.execute(mine).rowcount == 0:
                if table is branches:
                    raise self._no_branch(connection, name)
                msg = f"no {kind} {name!r}"
                raise RefNotFoundError(msg)
            return now

        return self._write(work, exclusive=True, once=True)

    def _needed(self, connection: Connection, commit_id: str) -> AnyRow:
        row = self._commit_row(connection, commit_id)
        if row is None:
            msg = f"no commit {commit_id}; perhaps it was expired just now"
            raise RefNotFoundError(msg)
        return row
