"""Rebuilding a store's rows from its manifests."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, delete, insert, select, update

from tailorstore.catalog.measuring import Measuring
from tailorstore.catalog.scope import ROWS_TOGETHER, commit_row, in_batches, version_row
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
    stores,
    tags,
    versions,
    withdrawn,
)
from tailorstore.catalog.verifying import put_into_quarantine
from tailorstore.domain.errors import CorruptDocumentError, RefNotFoundError
from tailorstore.domain.lines import Tip
from tailorstore.domain.names import new_id
from tailorstore.domain.proof import proof_of_versions
from tailorstore.domain.records import CommitManifest, LayerVersion, Standing
from tailorstore.domain.replay import parents_of_lines


class TakingOver(Measuring, Standings):
    """The rebuilder's verb, called by ``Catalog.take_over``."""

    def _replace(
        self,
        connection: Connection,
        now: datetime,
        root: str,
        manifests: Sequence[CommitManifest],
        heads: Mapping[str, Tip],
        fixed: Mapping[str, str],
        quarantine: Mapping[tuple[str, str], str],
        gone: Mapping[str, Standing],
    ) -> None:
        """Replace all that the catalog knew of the store, and put the store's epoch in force."""
        mine = update(stores).where(stores.c.pk == self._pk)
        # First of all, and it locks the row: whoever still writes at the old epoch finds out.
        connection.execute(mine.values(epoch=self.epoch, root=root))
        self._clear(connection)
        for reason in sorted(set(gone.values())):
            self._withdraw(connection, now, [one for one, why in gone.items() if why == reason], reason)
        line_pks = self._add_lines(connection, manifests)
        commit_pks = self._add_commits(connection, manifests, line_pks)
        version_pks = self._add_versions_of(connection, manifests, now)
        self._quarantine_known(connection, now, version_pks, quarantine)
        self._add_maps(connection, manifests, commit_pks, version_pks)
        self._add_measures(connection, {commit_pks[one.commit.id]: one.measures for one in manifests})
        pointed = {**{name: tip.commit for name, tip in heads.items()}, **fixed}
        for name, commit_id in pointed.items():
            if commit_id not in commit_pks:
                msg = f"branch or tag {name!r} points to commit {commit_id}, of which there is no manifest"
                raise RefNotFoundError(msg)
        self._add_branches(connection, now, manifests, heads, line_pks, commit_pks)
        for name, commit_id in fixed.items():
            row = {"store_pk": self._pk, "name": name, "commit_pk": commit_pks[commit_id], "created_at": now}
            connection.execute(insert(tags).values(**row))

    def _clear(self, connection: Connection) -> None:
        for table in (leases, pending, withdrawn, tags, branches):
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

    def _add_lines(self, connection: Connection, manifests: Sequence[CommitManifest]) -> dict[str, int]:
        """Insert every line that a manifest tells of and return the keys by id."""
        line_pks: dict[str, int] = {}
        for line, parent in parents_of_lines(manifests).items():
            fork = (None, None) if parent is None else (line_pks[parent.line], parent.until)
            line_pks[line] = self._add_line(connection, line, *fork)
        return line_pks

    def _add_commits(
        self, connection: Connection, manifests: Sequence[CommitManifest], line_pks: Mapping[str, int]
    ) -> dict[str, int]:
        """Insert the commits, each on its line, and return the keys by id."""
        rows = (commit_row(one.commit, self._pk, line_pks[one.lines[0].line], _proof_of(one)) for one in manifests)
        _insert_all(connection, commits, rows)
        found = select(commits.c.commit_id, commits.c.pk).where(commits.c.store_pk == self._pk)
        return {row.commit_id: row.pk for row in connection.execute(found)}

    def _add_branches(
        self,
        connection: Connection,
        now: datetime,
        manifests: Sequence[CommitManifest],
        heads: Mapping[str, Tip],
        line_pks: dict[str, int],
        commit_pks: Mapping[str, int],
    ) -> None:
        by_id = {one.commit.id: one for one in manifests}
        ends: dict[str, int] = {}
        for one in manifests:
            line = one.lines[0].line
            ends[line] = max(one.commit.step, ends.get(line, -1))
        taken: set[str] = set()
        for name, tip in heads.items():
            head, line = by_id[tip.commit], tip.line
            # Steps grow along a line, and a line is one branch's. In a root that lost documents a branch may point to
            # where it cannot go on.
            if line in taken or (line in line_pks and ends.get(line, head.commit.step) > head.commit.step):
                line = new_id()
            if line not in line_pks:
                parent_pk = line_pks[head.lines[0].line]
                line_pks[line] = self._add_line(connection, line, parent_pk, head.commit.step)
            taken.add(line)
            row = {"store_pk": self._pk, "name": name, "line_pk": line_pks[line], "created_at": now}
            connection.execute(insert(branches).values(**row, head_pk=commit_pks[tip.commit]))

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

    def _quarantine_known(
        self,
        connection: Connection,
        now: datetime,
        version_pks: Mapping[tuple[int, str], int],
        quarantine: Mapping[tuple[str, str], str],
    ) -> None:
        known = select(layers.c.component, layers.c.pk).where(layers.c.store_pk == self._pk)
        keys = {row.component: row.pk for row in connection.execute(known)} if quarantine else {}
        found = {(keys.get(component, 0), one): damage for (component, one), damage in quarantine.items()}
        put_into_quarantine(
            connection, now, {version_pks[pair]: damage for pair, damage in found.items() if pair in version_pks}
        )

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


def _insert_all(connection: Connection, table: Table, rows: Iterable[dict[str, Any]]) -> None:
    for batch in in_batches(rows, ROWS_TOGETHER):
        connection.execute(insert(table), batch)


def _proof_of(manifest: CommitManifest) -> str:
    return proof_of_versions(manifest.commit.id, manifest.commit.step, manifest.versions.values())
