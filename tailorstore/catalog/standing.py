"""What the catalog knows of commit ids: announced, published or withdrawn, and why.

Every id that was ever announced has one of these standings until nothing of it is left in the root. So a manifest about
which the catalog has no word was written by nobody that it knows: by another catalog, or by a newer state of itself.
"""

from collections.abc import Iterable, Set
from datetime import datetime, timedelta

from sqlalchemy import Connection, Text, case, delete, func, literal, select, union_all

from tailorstore.catalog.scope import Scope, in_batches
from tailorstore.catalog.tables import branches, commits, pending, withdrawn
from tailorstore.domain.records import Standing


class Standings(Scope):
    """The verbs about standings. All raise CatalogUnavailableError where the database does not answer."""

    def standings(self, commit_ids: Iterable[str], *, as_if_voided: bool = False) -> dict[str, Standing]:
        """Return what is known of commit ids; those of which nothing is known are left out.

        Args:
            commit_ids: to ask about.
            as_if_voided: answer as after ``void_lapsed``.
        """

        def known(connection: Connection, ids: list[str]) -> dict[str, Standing]:
            held = pending.c.expires_at > self._database.now(connection)
            announced = case((held, "announced"), else_="voided") if as_if_voided else literal("announced", Text)
            # One statement, which sees one moment: between two, a commit could go from one table to another.
            found = union_all(
                *(
                    select(word, table.c.commit_id).where(table.c.store_pk == self._pk, table.c.commit_id.in_(ids))
                    for word, table in (
                        (withdrawn.c.reason, withdrawn),
                        (announced, pending),
                        (literal("published", Text), commits),
                    )
                )
            )
            return {commit_id: word for word, commit_id in connection.execute(found)}

        standings: dict[str, Standing] = {}
        for batch in in_batches(sorted(set(commit_ids))):
            standings |= self._read(lambda connection, ids=batch: known(connection, ids))  # type: ignore[misc]
        return standings

    def unknown_commits(self, commit_ids: Iterable[str], *, as_if_voided: bool = False) -> set[str]:
        """Return the ids that are neither published nor announced; see :meth:`standings`."""
        asked = set(commit_ids)
        known = self.standings(asked, as_if_voided=as_if_voided)
        return {one for one in asked if known.get(one) not in ("announced", "published")}

    def newest(self) -> datetime | None:
        """Return when the newest head of a branch was made, by the catalog's clock; None if there is none."""
        heads = select(func.max(commits.c.created_at)).join(branches, branches.c.head_pk == commits.c.pk)
        found: datetime | None = self._read(
            lambda connection: connection.scalar(heads.where(branches.c.store_pk == self._pk))
        )
        return found

    def unplaced_within(self, grace: timedelta) -> set[str]:
        """Return the ids that a take-over withdrew as unplaced since ``grace`` ago, by the catalog's clock."""

        def work(connection: Connection) -> set[str]:
            since = self._database.now(connection) - grace
            mine = (withdrawn.c.store_pk == self._pk) & (withdrawn.c.reason == "unplaced")
            return set(connection.scalars(select(withdrawn.c.commit_id).where(mine, withdrawn.c.withdrawn_at > since)))

        return self._read(work)

    def unreadable(self) -> set[str]:
        """Return the ids of the manifests and records that a take-over found and could not understand."""
        mine = (withdrawn.c.store_pk == self._pk) & (withdrawn.c.reason == "unreadable")
        return self._read(lambda connection: set(connection.scalars(select(withdrawn.c.commit_id).where(mine))))

    def forget_withdrawn(self, present: Set[str], grace: timedelta) -> int:
        """Forget ids that were withdrawn longer than ``grace`` ago and of which nothing is left; returns how many.

        Args:
            present: ids that the root's listing shows, as manifests, as versions, or as records of tags and branches.
            grace: time for what a process that was withdrawn from may still be writing.

        Raises:
            AccessDeniedError, RootTakenError, CatalogUnavailableError: none was forgotten.
        """

        def work(connection: Connection, now: datetime) -> int:
            mine = withdrawn.c.store_pk == self._pk
            old = connection.scalars(select(withdrawn.c.commit_id).where(mine, withdrawn.c.withdrawn_at <= now - grace))
            gone = [one for one in old.all() if one not in present]
            for batch in in_batches(gone):
                connection.execute(delete(withdrawn).where(mine, withdrawn.c.commit_id.in_(batch)))
            return len(gone)

        return self._write(work)

    def _withdraw(self, connection: Connection, now: datetime, commit_ids: Iterable[str], reason: Standing) -> None:
        """Note that ids lost their standing; of those that had lost it before, the first reason stays."""
        rows = ({"store_pk": self._pk, "commit_id": one, "reason": reason, "withdrawn_at": now} for one in commit_ids)
        for batch in in_batches(rows):
            connection.execute(self._database.insert(withdrawn).on_conflict_do_nothing(), batch)

    def _reinstate(self, connection: Connection, commit_id: str) -> None:
        """Forget that an id was withdrawn: it is announced again."""
        mine = withdrawn.c.store_pk == self._pk
        connection.execute(delete(withdrawn).where(mine, withdrawn.c.commit_id == commit_id))
