"""Rebuilding a store's rows from its manifests."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, delete, insert, select, update

from tailorstore.catalog.measuring import Measuring
from tailorstore.catalog.scope import ROWS_TOGETHER, commit_row, in_batches, version_row
from tailorstore.catalog.tables import (
    branches,
    commits,
    composites,
    layers,
    leases,
    lines,
    measures,
    pending,
    stores,
    tags,
    versions,
)
from tailorstore.domain.errors import CorruptDocumentError, RefNotFoundError
from tailorstore.domain.records import Commit, CommitManifest, LayerVersion


@dataclass(slots=True)
class PlannedLine:
    """A line to be made."""

    parent: int | None = None
    """Index of the line it forks from, always an earlier one."""
    fork_step: int | None = None
    commits: list[Commit] = field(default_factory=list)
    """With growing steps."""

    def reaches(self, step: int) -> int | None:
        """Return the line's last step before ``step``."""
        return max((commit.step for commit in self.commits if commit.step < step), default=None)


def plan_lines(history: Sequence[Commit]) -> list[PlannedLine]:
    """Lay commits out in lines as they were published, as far as they tell.

    A commit extends its branch's line if its parent is that line's newest commit, and otherwise forks from its
    parent. Where the parent is gone (ancestors may be expired freely) the branch is what is left to go by: it extends
    its branch's line if its step allows, or else forks from the last commit there that is earlier.

    Args:
        history: oldest first.
    """
    planned: list[PlannedLine] = []
    current: dict[str, int] = {}
    place: dict[str, int] = {}

    def start(commit: Commit) -> int:
        parent = None if commit.parent is None else place.get(commit.parent)
        fork_step: int | None = None
        if parent is not None:
            fork_step = next(one.step for one in planned[parent].commits if one.id == commit.parent)
        elif commit.branch in current and commit.parent is not None:
            parent = current[commit.branch]
            fork_step = planned[parent].reaches(commit.step)
        planned.append(PlannedLine(None if fork_step is None else parent, fork_step))
        return len(planned) - 1

    for commit in history:
        index = current.get(commit.branch)
        newest = planned[index].commits[-1] if index is not None else None
        follows = newest is not None and commit.step > newest.step and commit.parent is not None
        if index is None or newest is None or not follows or (commit.parent in place and commit.parent != newest.id):
            index = start(commit)
        planned[index].commits.append(commit)
        current[commit.branch] = index
        place[commit.id] = index
    return planned


class TakingOver(Measuring):
    """The rebuilder's verb, called by ``Catalog.take_over``."""

    def _replace(
        self,
        connection: Connection,
        now: datetime,
        root: str,
        manifests: Sequence[CommitManifest],
        heads: Mapping[str, str],
        fixed: Mapping[str, str],
    ) -> None:
        """Replace all that the catalog knew of the store, and put the store's epoch in force."""
        mine = update(stores).where(stores.c.pk == self._pk)
        # First of all, and it locks the row: whoever still writes at the old epoch finds out.
        connection.execute(mine.values(epoch=self.epoch, root=root))
        self._clear(connection)
        commit_pks, line_of = self._add_history(connection, [manifest.commit for manifest in manifests])
        version_pks = self._add_versions_of(connection, manifests, now)
        self._add_maps(connection, manifests, commit_pks, version_pks)
        self._add_measures(connection, {commit_pks[one.commit.id]: one.measures for one in manifests})
        by_id = {manifest.commit.id: manifest.commit for manifest in manifests}
        for kind, names in (("branch", heads), ("tag", fixed)):
            for name, commit_id in names.items():
                if commit_id not in by_id:
                    msg = f"{kind} {name!r} points to commit {commit_id}, of which there is no manifest"
                    raise RefNotFoundError(msg)
        newest = {line: max(steps) for line, steps in _steps_by_line(by_id, line_of).items()}
        taken: set[int] = set()
        for name, commit_id in heads.items():
            commit, line_pk = by_id[commit_id], line_of[commit_id]
            # Continue the line it was committed on, unless another branch does or more was committed after it.
            if commit.branch != name or line_pk in taken or newest[line_pk] != commit.step:
                line_pk = self._add_line(connection, line_pk, commit.step)
            taken.add(line_pk)
            row = {"store_pk": self._pk, "name": name, "line_pk": line_pk, "created_at": now}
            connection.execute(insert(branches).values(**row, head_pk=commit_pks[commit_id]))
        for name, commit_id in fixed.items():
            row = {"store_pk": self._pk, "name": name, "commit_pk": commit_pks[commit_id], "created_at": now}
            connection.execute(insert(tags).values(**row))

    def _clear(self, connection: Connection) -> None:
        for table in (leases, pending, tags, branches):
            connection.execute(delete(table).where(table.c.store_pk == self._pk))
        mine = select(commits.c.pk).where(commits.c.store_pk == self._pk)
        for table in (composites, measures):
            connection.execute(delete(table).where(table.c.commit_pk.in_(mine)))
        connection.execute(delete(commits).where(commits.c.store_pk == self._pk))
        # The layers' own rows stay: other processes may have their keys in memory.
        known = select(layers.c.pk).where(layers.c.store_pk == self._pk)
        connection.execute(update(versions).where(versions.c.layer_pk.in_(known)).values(base_pk=None))
        connection.execute(delete(versions).where(versions.c.layer_pk.in_(known)))
        connection.execute(update(lines).where(lines.c.store_pk == self._pk).values(parent_pk=None, fork_step=None))
        connection.execute(delete(lines).where(lines.c.store_pk == self._pk))

    def _add_history(self, connection: Connection, history: Sequence[Commit]) -> tuple[dict[str, int], dict[str, int]]:
        line_pks: list[int] = []
        line_of: dict[str, int] = {}
        for planned in plan_lines(history):
            parent_pk = None if planned.parent is None else line_pks[planned.parent]
            line_pk = self._add_line(connection, parent_pk, planned.fork_step)
            line_pks.append(line_pk)
            line_of.update({commit.id: line_pk for commit in planned.commits})
        _insert_all(connection, commits, (commit_row(one, self._pk, line_of[one.id]) for one in history))
        found = select(commits.c.commit_id, commits.c.pk).where(commits.c.store_pk == self._pk)
        return {row.commit_id: row.pk for row in connection.execute(found)}, line_of

    def _add_versions_of(
        self, connection: Connection, manifests: Sequence[CommitManifest], now: datetime
    ) -> dict[tuple[int, str], int]:
        """Insert each version and each base once and return the keys by layer and version id."""
        distinct: dict[tuple[str, str], LayerVersion] = {}
        for manifest in manifests:
            # A base's own commit may be gone; whoever needs the base describes it.
            for version in (*manifest.versions.values(), *manifest.bases.values()):
                distinct.setdefault((version.layer, version.version_id), version)
        keys = self._layer_keys(connection, [layer for layer, _ in distinct])
        full = (one for one in distinct.values() if one.fidelity == "full")
        _insert_all(connection, versions, (version_row(one, keys[one.layer], now, None) for one in full))
        pks = self._version_keys(connection)

        def light_row(version: LayerVersion) -> dict[str, Any]:
            base = pks.get((keys[version.layer], version.base_id or ""))
            if base is None:
                msg = (
                    f"layer {version.layer!r} of commit {version.version_id} is a light version, and no manifest "
                    f"describes its base {version.base_id}"
                )
                raise CorruptDocumentError(msg)
            return version_row(version, keys[version.layer], now, base)

        light = [one for one in distinct.values() if one.fidelity == "light"]
        if light:
            _insert_all(connection, versions, map(light_row, light))
            pks = self._version_keys(connection)
        return pks

    def _version_keys(self, connection: Connection) -> dict[tuple[int, str], int]:
        found = (
            select(versions.c.layer_pk, versions.c.version_id, versions.c.pk)
            .join(layers, layers.c.pk == versions.c.layer_pk)
            .where(layers.c.store_pk == self._pk)
        )
        return {(row.layer_pk, row.version_id): row.pk for row in connection.execute(found)}

    def _add_maps(
        self,
        connection: Connection,
        manifests: Sequence[CommitManifest],
        commit_pks: Mapping[str, int],
        version_pks: Mapping[tuple[int, str], int],
    ) -> None:
        keys = self._layer_keys(connection, {name for manifest in manifests for name in manifest.versions})
        rows = (
            {
                "commit_pk": commit_pks[manifest.commit.id],
                "layer_pk": keys[layer],
                "version_pk": version_pks[keys[layer], version.version_id],
            }
            for manifest in manifests
            for layer, version in manifest.versions.items()
        )
        _insert_all(connection, composites, rows)


def _steps_by_line(by_id: Mapping[str, Commit], line_of: Mapping[str, int]) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for commit_id, line_pk in line_of.items():
        steps.setdefault(line_pk, []).append(by_id[commit_id].step)
    return steps


def _insert_all(connection: Connection, table: Table, rows: Iterable[dict[str, Any]]) -> None:
    for batch in in_batches(rows, ROWS_TOGETHER):
        connection.execute(insert(table), batch)
