"""From a ref, as a person types it, to a commit and its composite."""

import difflib
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection, func, select

from tailorstore.catalog.scope import MAX_STEP, AnyRow, Scope, owner, to_commit
from tailorstore.catalog.tables import branches, commits, leases, tags
from tailorstore.domain.errors import AmbiguousRefError, RefNotFoundError
from tailorstore.domain.names import Ref, new_id
from tailorstore.domain.records import Commit, Composite

_CANDIDATES = 10
"""How many meanings of an ambiguous ref a message lists."""


class Resolving(Scope):
    """The reader's way in."""

    def resolve(self, ref: Ref, branch: str, lease: timedelta | None = None) -> tuple[Composite, str | None]:
        """Return the composite that a ref means, and the id of a lease on it if one was asked for.

        Args:
            ref: ``latest`` is the head of ``branch``. A step is the commit at exactly that step on ``branch``, or
                else the only one that any other line has. ``branch@step`` is exact. A name is a tag, a branch, or a
                commit's id or at least four characters of its beginning.
            branch: which branch steps and ``latest`` are about.
            lease: how long GC must leave the commit alone; taken in the same transaction. Without write access
                there is none, and the reader leans on the grace period.

        Raises:
            RefNotFoundError: no commit is meant; the message has the nearest steps or names.
            BranchNotFoundError: the branch does not exist or has no commits; the message has those that do.
            AmbiguousRefError: several commits are meant; the message has a ref for each.
            RootTakenError: a lease was asked for and the store was taken over.
            CatalogUnavailableError: the database does not answer; perhaps a lease was written, which lapses.
        """
        if lease is None or self._database.read_only:
            return self._read(lambda connection: self._composite(connection, self._find(connection, ref, branch))), None
        duration, lease_id = lease, new_id()

        def work(connection: Connection, now: datetime) -> tuple[Composite, str | None]:
            row = self._find(connection, ref, branch)
            claim = {"commit_pk": row.pk, "owner": owner(), "expires_at": now + duration}
            mine = self._database.insert(leases).values(lease_id=lease_id, store_pk=self._pk, **claim)
            # It may stand there already, if the reply to an earlier attempt was lost.
            connection.execute(mine.on_conflict_do_update(index_elements=[leases.c.lease_id], set_=claim))
            return self._composite(connection, row), lease_id

        return self._write(work)

    def resolve_commit(self, ref: Ref, branch: str) -> Commit:
        """Return the commit that a ref means; the same as :meth:`resolve` without the composite."""
        return self._read(lambda connection: to_commit(self._find(connection, ref, branch)))

    def _find(self, connection: Connection, ref: Ref, branch: str) -> AnyRow:
        if ref.kind == "latest":
            head = self._head_row(connection, branch)
            if head is None:
                raise self._no_branch(connection, branch)
            return head
        if ref.step is None:
            return self._find_name(connection, ref)
        if ref.kind == "branch@step":
            branch = ref.name or branch
            if not self._name_taken(connection, branches, branch):
                raise self._no_branch(connection, branch)
            found = self._at_step(connection, branch, ref.step)
        else:
            found = self._at_step(connection, branch, ref.step) or self._elsewhere(connection, branch, ref.step)
        if found is None:
            raise self._no_step(connection, branch, ref.step)
        return found

    def _elsewhere(self, connection: Connection, branch: str, step: int) -> AnyRow | None:
        """Return the only commit at a step that is not on the branch."""
        if not 0 <= step <= MAX_STEP:
            return None
        found = connection.execute(self._commits().where(commits.c.step == step).limit(_CANDIDATES)).all()
        if len(found) > 1:
            msg = f"step {step} is not on branch {branch!r} and on several others: {self._list(connection, found)}"
            raise AmbiguousRefError(msg)
        return found[0] if found else None

    def _find_name(self, connection: Connection, ref: Ref) -> AnyRow:
        name = ref.text
        tagged = self._commits().join(tags, tags.c.commit_pk == commits.c.pk)
        found = connection.execute(tagged.where(tags.c.store_pk == self._pk, tags.c.name == name)).first()
        found = found or self._head_row(connection, name)
        # Digits alone are a step, never the beginning of an id: a mistyped step must not find a random commit.
        if found is None and ref.may_be_id and not name.isdecimal():
            found = self._find_id(connection, name)
        if found is None:
            raise self._no_name(connection, name)
        return found

    def _find_id(self, connection: Connection, prefix: str) -> AnyRow | None:
        # The range uses the index; the exact comparison does not depend on how the database sorts text.
        between = commits.c.commit_id.between(prefix, prefix + "g")
        same = func.substr(commits.c.commit_id, 1, len(prefix)) == prefix
        found = connection.execute(self._commits().where(between, same).limit(_CANDIDATES)).all()
        if len(found) > 1:
            listed = ", ".join(f"{row.commit_id} ({row.branch}@{row.step})" for row in found)
            msg = f"{prefix!r} begins several commit ids: {listed}"
            raise AmbiguousRefError(msg)
        return found[0] if found else None

    def _list(self, connection: Connection, found: Sequence[AnyRow]) -> str:
        """Return a ref that means each commit: its branch and step where that leads to it, else its id."""
        listed: list[str] = []
        for row in found:
            there = self._at_step(connection, row.branch, row.step)
            exact = there is not None and there.pk == row.pk
            listed.append(f"{row.branch}@{row.step}" if exact else f"{row.commit_id} (was {row.branch}@{row.step})")
        return ", ".join(listed)

    def _no_step(self, connection: Connection, branch: str, step: int) -> RefNotFoundError:
        runs = self._runs(connection, branch)
        if not runs:
            return RefNotFoundError(f"no commit at step {step}; {self._no_branch(connection, branch)}")
        before: list[int] = []
        after: list[int] = []
        for line_pk, bound in runs:
            mine = commits.c.line_pk == line_pk
            earlier = select(func.max(commits.c.step)).where(mine, commits.c.step <= min(bound, step - 1, MAX_STEP))
            later = select(func.min(commits.c.step)).where(
                mine, commits.c.step > min(step, MAX_STEP), commits.c.step <= bound
            )
            before.extend(one for one in [connection.scalar(earlier)] if one is not None)
            after.extend(one for one in [connection.scalar(later)] if one is not None)
        near = [f"{max(before)} before it"] if before else []
        near += [f"{min(after)} after it"] if after else []
        msg = f"no commit at step {step} on branch {branch!r}; the nearest there: {' and '.join(near)}"
        return RefNotFoundError(msg)

    def _no_name(self, connection: Connection, name: str) -> RefNotFoundError:
        known: list[str] = []
        for table in (branches, tags):
            known.extend(connection.scalars(select(table.c.name).where(table.c.store_pk == self._pk)))
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        if near:
            return RefNotFoundError(f"no tag, branch or commit {name!r}; nearest: {', '.join(near)}")
        listed = ", ".join(sorted(known)[:20]) or "none yet"
        return RefNotFoundError(f"no tag, branch or commit {name!r}; tags and branches: {listed}")
