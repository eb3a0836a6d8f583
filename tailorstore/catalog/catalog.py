"""The catalog: one database, and the stores in it. The front of this floor."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Self

from sqlalchemy import Connection, select, update

from tailorstore.catalog.collection import Collection
from tailorstore.catalog.database import Database
from tailorstore.catalog.history import History
from tailorstore.catalog.naming import Naming
from tailorstore.catalog.refs import Resolving
from tailorstore.catalog.schema import check_revision, migrate, read_revision
from tailorstore.catalog.tables import catalog, commits, leases, pending, receipts, stores, withdrawn
from tailorstore.catalog.takeover import TakingOver
from tailorstore.catalog.urls import parse_url
from tailorstore.catalog.verifying import Verifying
from tailorstore.catalog.writing import Writing
from tailorstore.domain.errors import CatalogUnavailableError, RootTakenError
from tailorstore.domain.lines import Tip
from tailorstore.domain.records import Binding, CommitManifest, Standing

_NOTHING: Mapping[tuple[str, str], str] = MappingProxyType({})
_NOTHING_WITHDRAWN: Mapping[str, Standing] = MappingProxyType({})


class StoreCatalog(Writing, Resolving, Naming, History, Collection, Verifying, TakingOver):
    """One store in a catalog: every verb is one transaction. Safe to share between threads.

    The verbs stand, by who uses them, in the modules of the classes above.
    """


class Catalog:
    """One database, which may hold many stores. Safe to share between threads and to carry over a fork."""

    def __init__(self, database: Database, catalog_id: str) -> None:
        self._database = database
        self.catalog_id = catalog_id
        """Stands in the roots that are bound to this catalog."""
        self.url = database.url.shown
        """Where it is, without secrets."""

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Self:
        """Open a catalog.

        Args:
            url: ``sqlite:///path.db`` (``?mode=ro`` for reading only) or ``postgresql://…``.
            create: make the file, its folder and the schema where there is none.

        Raises:
            InvalidInputError: the URL is not one of a catalog.
            StoreNotFoundError: there is no catalog and ``create`` is false.
            SchemaOutdatedError: its schema is older than this version; the message has the command to upgrade it.
            SchemaTooNewError: its schema is newer than this version knows.
            AccessDeniedError: wrong password, or no right to read, or to create where that is needed.
            CatalogUnavailableError: the database does not answer, or is not a catalog's.
            MissingDependencyError: the driver is not installed.

        In every case nothing is changed, except that a folder or an empty file may have been made.
        """
        parsed = parse_url(url)
        database = Database(parsed, create=create)
        try:
            if create and not database.read_only and database.read(read_revision) is None:
                migrate(parsed, create_only=True)
            return cls(database, database.read(lambda connection: _look(database, connection)))
        except BaseException:
            database.close()
            raise

    @property
    def read_only(self) -> bool:
        """Whether this process can only read: by its rights, or because it asked to."""
        return self._database.read_only

    def store(self, store_id: str) -> StoreCatalog | None:
        """Return a store of this catalog; None if the catalog does not know it.

        Raises:
            CatalogUnavailableError: the database does not answer.
        """
        mine = select(stores.c.pk, stores.c.epoch).where(stores.c.store_id == store_id)
        row = self._database.read(lambda connection: connection.execute(mine).first())
        return None if row is None else self._scope(row.pk, store_id, row.epoch)

    def register(self, store_id: str, root: str, epoch: int) -> StoreCatalog:
        """Enter a new store; one that is there with the same epoch is as good.

        Args:
            store_id: from the root's ``tailorstore.json``.
            root: its URL without secrets, for people; replaced where the store is known.
            epoch: from the same document.

        Raises:
            RootTakenError: the catalog knows the store at another epoch. Nothing was changed.
            AccessDeniedError: the catalog is read-only here.
            CatalogUnavailableError: the database does not answer; perhaps the store was entered. Do it again.
        """

        def work(connection: Connection) -> int:
            pk, known = self._enter(connection, store_id, root, epoch)
            if known != epoch:
                msg = (
                    f"the catalog {self.url} knows store {store_id} at epoch {known}, and its root says {epoch}: "
                    "one of them was restored or taken over; rebuild the catalog from the root to go on"
                )
                raise RootTakenError(msg)
            connection.execute(update(stores).where(stores.c.pk == pk).values(root=root))
            return pk

        return self._scope(self._database.write(work), store_id, epoch)

    def claim(self, store_id: str, root: str, found: int) -> Binding:
        """Begin a take-over: take an epoch that no other take-over into this catalog gets, or ever got.

        Bindings are never used twice, so one that a slow take-over writes into the root late is nobody else's. From
        here on whoever has the store open in this catalog is refused; the root still has its owner.

        Args:
            store_id: from the root.
            root: its URL without secrets.
            found: epoch that the root has now.

        Raises:
            AccessDeniedError: the catalog is read-only here.
            CatalogUnavailableError: the database does not answer; perhaps an epoch was taken. Do it again.
        """

        def work(connection: Connection) -> Binding:
            # A root that was restored from a backup may name an earlier epoch than the catalog has reached.
            pk, known = self._enter(connection, store_id, root, found)
            epoch = max(abs(known), found) + 1
            # Negative until it is taken over: a process that dies in between must not leave a catalog that seems to own
            # the root and knows nothing of it.
            connection.execute(update(stores).where(stores.c.pk == pk).values(epoch=-epoch))
            return Binding(store_id, self.catalog_id, epoch)

        return self._database.write(work, once=True)

    def take_over(
        self,
        binding: Binding,
        root: str,
        manifests: Sequence[CommitManifest],
        branches: Mapping[str, Tip],
        tags: Mapping[str, str],
        quarantine: Mapping[tuple[str, str], str] = _NOTHING,
        withdrawn: Mapping[str, Standing] = _NOTHING_WITHDRAWN,
    ) -> StoreCatalog:
        """Replace whatever this catalog knew of a store by what its manifests say, at a new epoch.

        Whoever has the store open at an older epoch gets :class:`RootTakenError` at its next write. Versions that
        no manifest has are forgotten, so GC finds their objects as leftovers.

        Args:
            binding: the store and its epoch from now on: for a take-over the one that was claimed, for a copy to read
                from the same as the root's.
            root: its URL without secrets.
            manifests: of all published commits that are left, oldest first.
            branches: name to its head, and the line that its next commit goes to.
            tags: name to commit id.
            quarantine: layer component and version id of damaged versions, to what was found.
            withdrawn: ids of commits that left something in the root, but are not published, to the reason.

        Raises:
            RootTakenError: the catalog has the store at a later epoch: another take-over came after this one.
            RefNotFoundError: a branch or tag points to a commit without a manifest.
            CorruptDocumentError: a light version's base is in no manifest.
            AccessDeniedError: the catalog is read-only here.
            CatalogUnavailableError: the database does not answer.

        In every case nothing is changed.
        """

        def work(connection: Connection) -> StoreCatalog:
            mine = select(stores.c.epoch).where(stores.c.store_id == binding.store_id).with_for_update()
            known = connection.scalar(mine)
            if known is not None and abs(known) > binding.epoch:
                msg = (
                    f"the catalog {self.url} has store {binding.store_id} at epoch {known} already: another take-over"
                    f" was faster than this one to epoch {binding.epoch}. Look at the store before doing it again"
                )
                raise RootTakenError(msg)
            pk, _ = self._enter(connection, binding.store_id, root, binding.epoch)
            scope = self._scope(pk, binding.store_id, binding.epoch)
            now = self._database.now(connection)
            scope._replace(connection, now, root, manifests, branches, tags, quarantine, withdrawn)
            return scope

        return self._database.write(work, once=True)

    def now(self) -> datetime:
        """Return the time by which leases and grace periods are judged, in UTC: the database server's, if any.

        Raises:
            CatalogUnavailableError: the database does not answer.
        """
        return self._database.read(self._database.now)

    def close(self) -> None:
        """Close the connections. Nothing is lost; using the catalog again opens new ones."""
        self._database.close()

    def _scope(self, pk: int, store_id: str, epoch: int) -> StoreCatalog:
        return StoreCatalog(self._database, self.catalog_id, pk, store_id, epoch)

    def _enter(self, connection: Connection, store_id: str, root: str, epoch: int) -> tuple[int, int]:
        """Return the key and epoch of a store, locked, entering it if it is not there."""
        row = {"store_id": store_id, "root": root, "epoch": epoch}
        now = self._database.now(connection)
        # If another process enters it at this moment, this waits and then finds it.
        connection.execute(self._database.insert(stores).values(**row, created_at=now).on_conflict_do_nothing())
        mine = select(stores.c.pk, stores.c.epoch).where(stores.c.store_id == store_id).with_for_update()
        found = connection.execute(mine).one()
        return found.pk, found.epoch


def upgrade(url: str) -> tuple[str | None, str]:
    """Bring a catalog's schema to what this version needs, making it where there is none.

    In one transaction, and in one process at a time. Processes of an older version cannot open it afterwards.

    Returns:
        The revisions before and after; before is None if there was no schema.

    Raises:
        InvalidInputError: the URL is not one of a catalog.
        SchemaTooNewError: the schema is newer than this version knows.
        AccessDeniedError: this user may not change the schema.
        CatalogUnavailableError: the database does not answer.

    In every case the schema is as it was.
    """
    before, after = migrate(parse_url(url))
    return before, str(after)


def _look(database: Database, connection: Connection) -> str:
    check_revision(read_revision(connection), database.url)
    written = (commits, leases, pending, receipts, stores, withdrawn)
    database.find_out_whether_read_only(connection, tuple(table.name for table in written))
    catalog_id: str | None = connection.scalar(select(catalog.c.catalog_id))
    if catalog_id is None:
        msg = f"the catalog {database.url.shown} has no identity; run `tailorstore upgrade --catalog URL`"
        raise CatalogUnavailableError(msg)
    return catalog_id


__all__ = ["Catalog", "StoreCatalog", "upgrade"]
