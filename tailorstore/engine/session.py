"""Who owns what: a root, the catalog that answers for it, and the claims that this process has on both."""

from dataclasses import dataclass, replace
from datetime import timedelta

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.errors import (
    CatalogOutdatedError,
    ClosedError,
    NotAStoreError,
    RootTakenError,
    StoreNotFoundError,
)
from tailorstore.domain.names import ROOT_DOCUMENT
from tailorstore.domain.records import Binding
from tailorstore.domain.reports import RebuildReport
from tailorstore.engine.leases import LeaseKeeper
from tailorstore.engine.opening import Opened, fingerprint, load_history, make_catalog, open_copy, open_root
from tailorstore.engine.rebuild import compare_with_layers, read_history
from tailorstore.engine.salvage import Salvage, find_salvage, write_salvage
from tailorstore.storage.manifests import read_binding, write_binding
from tailorstore.storage.objects import printable_url
from tailorstore.storage.transport import Objects


@dataclass(frozen=True, slots=True)
class _InUse:
    opened: Opened
    keeper: LeaseKeeper


class Session:
    """An open root with its catalog. Knows whether it may write, and notices what others do to the root."""

    def __init__(self, objects: Objects, opened: Opened | None, catalog_url: str, lease: timedelta) -> None:
        """Take what ``opening.open_root`` found.

        Args:
            objects: the root.
            opened: with the catalog that answers for it; ``None``: to be opened when history is first asked for, as on
                ranks whose commits the coordinator publishes.
            catalog_url: the catalog that was asked for; the one that a take-over fills.
            lease: how long claims live that are not renewed.
        """
        self.objects = objects
        self.closed = False
        self._catalog_url = catalog_url
        self._lease = lease
        self._now: _InUse | None = None
        if opened is not None:
            self._use(opened)

    def _use(self, opened: Opened) -> "_InUse":
        keeper = LeaseKeeper(opened.store.renew, opened.store.release, self._lease)
        self._now = _InUse(opened, keeper)
        return self._now

    @property
    def _in_use(self) -> "_InUse":
        if self._now is not None:
            return self._now
        self.check_open()
        try:
            return self._use(open_root(self.objects, self._catalog_url, create=False))
        except StoreNotFoundError as error:
            msg = (
                f"this rank sees no store at {self.objects.url}: rank 0 makes it when it opens it. If it has, this is"
                " not the same place for all ranks: use a bucket or a shared file system"
            )
            raise StoreNotFoundError(msg) from error

    @property
    def is_read_only(self) -> bool:
        """Whether it is known that this process may not write; opens nothing."""
        return self._now is not None and not self.writable

    @property
    def _opened(self) -> Opened:
        return self._in_use.opened

    @property
    def catalog(self) -> StoreCatalog:
        """The catalog that answers for the root."""
        return self._opened.store

    @property
    def binding(self) -> Binding:
        """What the root says of its owner."""
        return self._opened.binding

    @property
    def keeper(self) -> LeaseKeeper:
        """Keeps this process's claims alive."""
        return self._in_use.keeper

    @property
    def writable(self) -> bool:
        """Whether the catalog owns the root and this process may write to it."""
        return self._opened.owned and not self._opened.catalog.read_only

    @property
    def owned(self) -> bool:
        """Whether the catalog owns the root."""
        return self._opened.owned

    @property
    def catalog_url(self) -> str:
        """The catalog that was asked for, without its password."""
        if self._now is None or not self._now.opened.owned:
            return printable_url(self._catalog_url)
        return self._now.opened.catalog.url

    def check_open(self) -> None:
        """Make sure that it has not been closed.

        Raises:
            ClosedError: it has.
        """
        if self.closed:
            msg = f"the store {self.objects.url} was closed; open it again"
            raise ClosedError(msg)

    def check_writable(self, verb: str) -> None:
        """Make sure that the catalog owns the root.

        Raises:
            ClosedError: the store was closed.
            RootTakenError: another catalog owns the root; the message says which. Or nothing says whose it is.
            CatalogOutdatedError: the catalog is older than the root.
        """
        self.check_open()
        if self._opened.outdated is not None:
            msg = (
                f"cannot {verb}: the catalog {self.catalog_url} is older than its root {self.objects.url}:"
                f" {self._opened.outdated}. Bring it up to date with rebuild_catalog() ('tailorstore rebuild')"
            )
            raise CatalogOutdatedError(msg)
        if self._opened.fate is not None:
            msg = (
                f"cannot {verb}: the {ROOT_DOCUMENT} of {self.objects.url} {self._opened.fate}, which says whose it is;"
                " rebuild_catalog() ('tailorstore rebuild') makes a new one"
            )
            raise RootTakenError(msg)
        if not self._opened.owned:
            msg = (
                f"cannot {verb}: the root {self.objects.url} belongs to catalog {self.binding.catalog_id} (epoch"
                f" {self.binding.epoch}), not to {self.catalog_url} here. Open it as its owner does, or take it"
                " over with rebuild_catalog() ('tailorstore rebuild')"
            )
            raise RootTakenError(msg)

    def refresh(self) -> bool:
        """Notice what a root's owner has published since the root was opened for reading.

        Returns:
            Whether the catalog is another object than before.
        """
        self.check_open()
        if self._opened.owned or fingerprint(self.objects) == self._opened.seen:
            return False
        copy = open_copy(self.objects, self._found_binding())
        # The catalog that was asked for is as far behind as before, unless the root has another owner by now. So it is
        # with a document that was gone: whoever wrote it anew owns the root.
        if copy.binding == self.binding:
            copy = replace(copy, outdated=self._opened.outdated, fate=self._opened.fate)
        self._leave()
        self._use(copy)
        return True

    def _found_binding(self) -> Binding:
        try:
            return read_binding(self.objects) or self.binding
        except NotAStoreError:
            # It was opened by its manifests all the same; a take-over writes the document anew.
            return self.binding

    def take_over(self, *, dry_run: bool = False) -> RebuildReport:
        """Fill the catalog that was asked for from the manifests in the root, and make it the root's owner.

        Where it is the owner already, and is not older than the root, what the root has lost of what it knows is
        written there first.

        Args:
            dry_run: only say what would be found; nothing is changed.

        Raises:
            RootTakenError: another take-over into the same catalog was faster.
            UnavailableError, AccessDeniedError: root or catalog cannot be read or written. Do it again: until it
                succeeds the root can be read from its manifests.
        """
        found = self._found_binding()
        owned = self.writable and found == self.binding
        if dry_run:
            kept = find_salvage(self.objects, self.catalog) if owned else Salvage()
            history = read_history(self.objects, found.store_id, kept.manifests, kept.records, kept.heard)
            return compare_with_layers(self.objects, history).report(found.epoch, kept.keys, dry_run=True)
        kept = write_salvage(self.objects, self.catalog) if owned else Salvage()
        catalog = make_catalog(self._catalog_url)
        try:
            binding = catalog.claim(found.store_id, self.objects.url, found.epoch)
            # Claim first, read after: whoever owned the root writes a manifest before it looks who owns the root, so
            # what it still publishes is among the manifests, and all else it finds refused.
            write_binding(self.objects, binding, replace=True)
            # Nothing is expired any more, and what was since it was written must not come back.
            kept = kept.without(self.catalog.unknown_commits(one.commit.id for one in kept.manifests))
            history = read_history(self.objects, found.store_id, kept.manifests, kept.records, kept.heard)
            history = compare_with_layers(self.objects, history)
            store = load_history(catalog, binding, self.objects, history)
        except BaseException:
            catalog.close()
            raise
        self._leave()
        self._use(Opened(catalog, store, binding, owned=True))
        return history.report(binding.epoch, kept.keys, dry_run=False)

    def close(self) -> None:
        """Give leases back and close connections."""
        self.closed = True
        self._leave()
        self.objects.close()

    def _leave(self) -> None:
        if self._now is not None:
            self._now.keeper.close()
            self._now.opened.close()
