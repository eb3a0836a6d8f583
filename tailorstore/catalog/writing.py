"""Writing a commit: announce it, keep its lease, publish it, or give it up."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType

from sqlalchemy import Connection, delete, func, insert, literal, select, union_all, update
from sqlalchemy.exc import IntegrityError

from tailorstore.catalog.failures import is_duplicate
from tailorstore.catalog.measuring import Measuring
from tailorstore.catalog.scope import (
    IDS_TOGETHER,
    MAX_STEP,
    AnyRow,
    added_key,
    commit_row,
    in_batches,
    owner,
    to_commit,
    version_row,
)
from tailorstore.catalog.standing import Standings
from tailorstore.catalog.tables import branches, commits, composites, layers, leases, lines, pending, versions
from tailorstore.domain.errors import (
    HeadMovedError,
    InvalidInputError,
    LeaseExpiredError,
    StepOrderError,
    TagExistsError,
)
from tailorstore.domain.names import check_name
from tailorstore.domain.records import EXTRA_LAYER, Commit, CommitDraft, LayerMeasures, LayerVersion

_NOTHING_MEASURED: Mapping[str, LayerMeasures] = MappingProxyType({})


class Writing(Measuring, Standings):
    """The writer's verbs."""

    def announce(self, commit_id: str, branch: str, step: int, lease: timedelta) -> Commit | None:
        """Claim a commit id, under which objects may then be written, and return the head it will follow.

        Args:
            commit_id: fresh, from :func:`names.new_id`. Announcing it again renews the claim.
            branch: made by the first commit on it.
            step: after that of the branch's head.
            lease: how long GC leaves the claim alone; see :meth:`renew`.

        Returns:
            The branch's head; None if this is its first commit.

        Raises:
            StepOrderError: the step is not after the head's. Nothing was written.
            BadNameError: no branch can have this name.
            TagExistsError: the branch is new and its name is a tag's.
            InvalidInputError: the step is negative or does not fit into 64 bits.
            RootTakenError: the store was taken over.
            AccessDeniedError: the catalog is read-only here.
            CatalogUnavailableError: perhaps the claim was written; it lapses.
        """
        check_name("branch", branch)
        if not 0 <= step <= MAX_STEP:
            msg = f"step {step} on branch {branch!r} is not between 0 and {MAX_STEP}"
            raise InvalidInputError(msg)

        def work(connection: Connection, now: datetime) -> Commit | None:
            head = self._head_row(connection, branch)
            if head is None and self._is_tag(connection, branch):
                msg = f"{branch!r} is a tag, so no branch can have that name; nothing was written"
                raise TagExistsError(msg)
            if head is not None and step <= head.step:
                raise self._step_order(connection, branch, step, head.step)
            claim = self._database.insert(pending).values(
                store_pk=self._pk,
                commit_id=commit_id,
                branch=branch,
                step=step,
                parent_id=None if head is None else head.commit_id,
                owner=owner(),
                expires_at=now + lease,
            )
            again = {name: claim.excluded[name] for name in ("branch", "step", "parent_id", "expires_at")}
            keys = [pending.c.store_pk, pending.c.commit_id]
            connection.execute(claim.on_conflict_do_update(index_elements=keys, set_=again))
            self._reinstate(connection, commit_id)
            return None if head is None else to_commit(head)

        return self._write(work)

    def renew(self, ids: Sequence[str], lease: timedelta) -> list[str]:
        """Prolong announced commits and readers' leases by their ids; returns those that are still held.

        What has lapsed and was not voided yet is held again: the row decides, not the clock.

        Raises:
            AccessDeniedError: the catalog is read-only here.
            CatalogUnavailableError: some or none were prolonged; ask again.
        """
        if not ids:
            return []

        def work(connection: Connection) -> list[str]:
            until = self._database.now(connection) + lease
            alive: set[str] = set()
            for batch in in_batches(sorted(set(ids))):
                for table, key in ((pending, pending.c.commit_id), (leases, leases.c.lease_id)):
                    mine = update(table).where(table.c.store_pk == self._pk, key.in_(batch))
                    alive.update(connection.scalars(mine.values(expires_at=until).returning(key)))
            return [one for one in ids if one in alive]

        return self._database.write(work)

    def abandon(self, commit_id: str) -> None:
        """Give up an announced commit, so that GC may sweep its objects; unknown ids are no error.

        Raises:
            AccessDeniedError: the catalog is read-only here.
            CatalogUnavailableError: perhaps the claim still stands; it lapses.
        """
        mine = delete(pending).where(pending.c.store_pk == self._pk, pending.c.commit_id == commit_id)

        def work(connection: Connection) -> None:
            connection.execute(mine)
            # After a lost reply it may have been published.
            if self._commit_row(connection, commit_id) is None:
                self._withdraw(connection, self._database.now(connection), [commit_id], "abandoned")

        self._database.write(work)

    def release(self, lease_ids: Sequence[str]) -> None:
        """End readers' leases; unknown ids are no error, and neither is a read-only catalog, which gives none.

        Raises:
            CatalogUnavailableError: perhaps some still stand; they lapse.
        """
        if not lease_ids or self._database.read_only:
            return

        def work(connection: Connection) -> None:
            for batch in in_batches(lease_ids):
                mine = leases.c.store_pk == self._pk
                connection.execute(delete(leases).where(mine, leases.c.lease_id.in_(batch)))

        self._database.write(work)

    def publish(
        self,
        draft: CommitDraft,
        new_versions: Sequence[LayerVersion],
        measures: Mapping[str, LayerMeasures] = _NOTHING_MEASURED,
    ) -> Commit:
        """Make an announced commit visible, in one transaction: the commit point.

        Its composite is the parent's, overlaid by ``new_versions``. Publishing the same id again returns what was
        published, so a lost reply is not a conflict.

        Args:
            draft: as announced.
            new_versions: what this commit wrote, complete in storage; each has the draft's id as its version id. The
                base of a light one is a full version of the same layer: if it is that of the parent's composite, or
                its base, it lives as long as the claim does.
            measures: of any layers, by name; numbers that are not finite are stored as unknown.

        Raises:
            HeadMovedError: the branch's head is not the draft's parent any more.
            LeaseExpiredError: GC voided the claim.
            StepOrderError: the step is not after the parent's.
            InvalidInputError: a version has another id, a light one has no base that is alive, or a full one has one.
            RootTakenError: the store was taken over.
            AccessDeniedError: the catalog is read-only here.
            CatalogUnavailableError: the database does not answer.

        In every case nothing of the commit is visible, except that after CatalogUnavailableError it may be, as a
        whole; publish it again to find out.
        """
        for version in new_versions:
            _check_version(version, draft)

        def work(connection: Connection, now: datetime) -> Commit:
            published = self._commit_row(connection, draft.id) or self._take_claim(connection, draft)
            if published is not None:
                return to_commit(published)
            branch = self._expect_parent(connection, draft)
            line_pk = self._add_line(connection, draft.id) if branch is None else branch.line_pk
            commit = _finished(draft, new_versions, now)
            row = commit_row(commit, self._pk, line_pk, draft.proof)
            commit_pk = added_key(connection.execute(insert(commits).values(row)))
            self._add_versions(connection, new_versions, now)
            parent_pk = None if branch is None else branch.head_pk
            self._add_composite(connection, commit_pk, parent_pk, draft.id)
            self._add_measures(connection, {commit_pk: measures})
            self._move_head(connection, draft, branch, line_pk, commit_pk, now)
            return commit

        # A first commit makes a name, and names are made one at a time, so that no tag gets the same one.
        return self._write(work, exclusive=draft.parent is None)

    def _take_claim(self, connection: Connection, draft: CommitDraft) -> AnyRow | None:
        """Delete the claim; return the commit if it was published just now, by an attempt that lost the reply."""
        mine = delete(pending).where(pending.c.store_pk == self._pk, pending.c.commit_id == draft.id)
        # This row decides the race with a GC that judged the lease as lapsed: whoever deletes it goes on.
        if connection.execute(mine).rowcount == 1:
            return None
        # That attempt may have had the row while this one waited for it.
        published = self._commit_row(connection, draft.id)
        if published is None:
            msg = (
                f"step {draft.step} on branch {draft.branch!r} took longer than its lease and GC voided commit "
                f"{draft.id}; nothing of it is visible, commit again"
            )
            raise LeaseExpiredError(msg)
        return published

    def _expect_parent(self, connection: Connection, draft: CommitDraft) -> AnyRow | None:
        """Return the branch, locked, if its head is the draft's parent; None if the branch is to be made."""
        found = (
            select(
                branches.c.pk,
                branches.c.line_pk,
                branches.c.head_pk,
                commits.c.commit_id,
                commits.c.step,
                lines.c.line_id,
            )
            .join(lines, lines.c.pk == branches.c.line_pk)
            .outerjoin(commits, commits.c.pk == branches.c.head_pk)
            .where(branches.c.store_pk == self._pk, branches.c.name == draft.branch)
            .with_for_update(of=branches)
        )
        branch = connection.execute(found).first()
        if (None if branch is None else branch.commit_id) != draft.parent:
            raise self._head_moved(draft, None if branch is None else branch.step)
        # Moved away and back again, it is on another line than the commit's manifest says.
        if draft.line is not None and draft.line != (draft.id if branch is None else branch.line_id):
            raise self._head_moved(draft, None)
        if branch is None and self._is_tag(connection, draft.branch):
            msg = f"{draft.branch!r} became a tag, so no branch can have that name; nothing was published"
            raise TagExistsError(msg)
        if branch is not None and branch.step is not None and draft.step <= branch.step:
            raise self._step_order(connection, draft.branch, draft.step, branch.step)
        return branch

    def _add_versions(self, connection: Connection, new_versions: Sequence[LayerVersion], now: datetime) -> None:
        if not new_versions:
            return
        layer_pks = self._layer_keys(connection, [version.layer for version in new_versions])
        light = [version for version in new_versions if version.fidelity == "light"]
        base_pks = self._base_keys(connection, light, layer_pks)
        rows = [
            version_row(version, layer_pks[version.layer], now, base_pks.get(version.layer)) for version in new_versions
        ]
        connection.execute(insert(versions), rows)

    def _base_keys(
        self, connection: Connection, light: Sequence[LayerVersion], layer_pks: Mapping[str, int]
    ) -> dict[str, int]:
        """Return the keys of light versions' bases by layer. Expiry waits for this transaction, so they stay alive."""
        found: dict[tuple[int, str], int] = {}
        for ids in in_batches(dict.fromkeys(version.base_id for version in light), IDS_TOGETHER):
            alive = select(versions.c.pk, versions.c.layer_pk, versions.c.version_id).where(
                versions.c.version_id.in_(ids), versions.c.fidelity == "full", versions.c.doomed_at.is_(None)
            )
            found.update({(row.layer_pk, row.version_id): row.pk for row in connection.execute(alive)})
        base_pks: dict[str, int] = {}
        for version in light:
            base_pk = found.get((layer_pks[version.layer], version.base_id or ""))
            if base_pk is None:
                msg = (
                    f"layer {version.layer!r} of commit {version.version_id} is a light version and its base "
                    f"{version.base_id} is not a full version that is alive; write the layer in full"
                )
                raise InvalidInputError(msg)
            base_pks[version.layer] = base_pk
        return base_pks

    def _add_composite(self, connection: Connection, commit_pk: int, parent_pk: int | None, commit_id: str) -> None:
        mine = select(layers.c.pk).where(layers.c.store_pk == self._pk)
        written = versions.c.version_id == commit_id
        new = select(literal(commit_pk), versions.c.layer_pk, versions.c.pk).where(
            written, versions.c.layer_pk.in_(mine)
        )
        kept = select(literal(commit_pk), composites.c.layer_pk, composites.c.version_pk).where(
            composites.c.commit_pk == parent_pk,
            composites.c.layer_pk.not_in(select(versions.c.layer_pk).where(written)),
        )
        full_map = new if parent_pk is None else union_all(new, kept)
        connection.execute(insert(composites).from_select(["commit_pk", "layer_pk", "version_pk"], full_map))

    def _move_head(
        self,
        connection: Connection,
        draft: CommitDraft,
        branch: AnyRow | None,
        line_pk: int,
        commit_pk: int,
        now: datetime,
    ) -> None:
        if branch is None:
            new = {"store_pk": self._pk, "name": draft.branch, "line_pk": line_pk, "head_pk": commit_pk}
            try:
                connection.execute(insert(branches).values(**new, created_at=now))
            except IntegrityError as error:
                if not is_duplicate(error):
                    raise
                raise self._head_moved(draft, None) from None
            return
        moved = connection.execute(
            update(branches)
            .where(branches.c.pk == branch.pk, branches.c.head_pk.is_not_distinct_from(branch.head_pk))
            .values(head_pk=commit_pk)
        )
        if moved.rowcount != 1:
            raise self._head_moved(draft, None)

    def _head_moved(self, draft: CommitDraft, head_step: int | None) -> HeadMovedError:
        where = "moved or was deleted" if head_step is None else f"is now at step {head_step}"
        msg = (
            f"branch {draft.branch!r} {where} while step {draft.step} was being written: another process published "
            f"or moved it. Nothing of commit {draft.id} is visible. Stop the other trainer, or open the store"
            " with a branch of your own (branch=…)"
        )
        return HeadMovedError(msg)

    def _step_order(self, connection: Connection, branch: str, step: int, head_step: int) -> StepOrderError:
        earlier = [
            connection.scalar(
                select(func.max(commits.c.step)).where(
                    commits.c.line_pk == line_pk, commits.c.step <= min(bound, step - 1)
                )
            )
            for line_pk, bound in self._runs(connection, branch)
        ]
        before = max((one for one in earlier if one is not None), default=None)
        if before is None:
            ways = 'no commit there is earlier; to start anew, open the store with another branch, as branch="NEW"'
        else:
            ref = f"{branch}@{before}"
            ways = (
                f'to train on from the commit before it, either fork it, store.branch("NEW", "{ref}"), and open '
                f'the store with branch="NEW", or move this branch back, store.branch("{branch}", "{ref}", '
                "move=True)"
            )
        return StepOrderError(f"step {step} is not after step {head_step}, the head of branch {branch!r}; {ways}")


def _check_version(version: LayerVersion, draft: CommitDraft) -> None:
    if version.version_id != draft.id:
        msg = f"version {version.version_id} of layer {version.layer!r} is not of commit {draft.id}"
        raise InvalidInputError(msg)
    if (version.fidelity == "light") != (version.base_id is not None):
        has = "no base" if version.base_id is None else f"the base {version.base_id}"
        msg = f"layer {version.layer!r} of commit {draft.id} is a {version.fidelity} version with {has}"
        raise InvalidInputError(msg)


def _finished(draft: CommitDraft, new_versions: Sequence[LayerVersion], now: datetime) -> Commit:
    return Commit(
        id=draft.id,
        step=draft.step,
        branch=draft.branch,
        parent=draft.parent,
        created_at=draft.created_at or now,
        message=draft.message,
        metrics=dict(draft.metrics),
        layers_written=tuple(sorted(one.layer for one in new_versions if one.layer != EXTRA_LAYER)),
        bytes_written=sum(one.bytes_stored for one in new_versions),
        bytes_logical=draft.bytes_logical,
    )
