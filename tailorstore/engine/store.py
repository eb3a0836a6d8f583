"""The front door: a store is one catalog plus one root, and every verb starts here."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal, SupportsFloat, overload

from tailorstore.catalog.catalog import Catalog
from tailorstore.domain.errors import ClosedError, InvalidInputError, RootTakenError
from tailorstore.domain.mask import Mask
from tailorstore.domain.names import (
    DEFAULT_BRANCH,
    LATEST,
    LayerRule,
    check_name,
    layer_rule,
    new_id,
    parse_ref,
)
from tailorstore.domain.records import (
    DEFAULT_GRACE,
    DEFAULT_LEASE,
    Binding,
    Commit,
    CommitDiff,
    GcReport,
    LayerInfo,
    RebuildReport,
    Reference,
    RefRecord,
    StoreStats,
    VerifyReport,
)
from tailorstore.domain.retention import RetentionPolicy
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.commit import Committer, Request, check_binding
from tailorstore.engine.diff import diff_composites
from tailorstore.engine.gc import Progress, collect
from tailorstore.engine.leases import LeaseKeeper
from tailorstore.engine.opening import Opened, default_catalog, load_history, open_copy, open_root
from tailorstore.engine.pending import PendingCommit
from tailorstore.engine.plan import Layout, check_metrics, check_step
from tailorstore.engine.rebuild import read_history
from tailorstore.engine.tensors.capture import Model, Optim
from tailorstore.engine.verify import verify
from tailorstore.storage.codecs import CODECS
from tailorstore.storage.manifests import manifest_ids, read_binding, ref_record_ids, write_binding, write_ref_record
from tailorstore.storage.objects import normalise_url, open_objects, printable_url

logger = logging.getLogger("tailorstore")

DEFAULT_CHUNK_BYTES = 32 << 20
_SMALLEST_CHUNK_BYTES = 1024


def open_store(
    url: str | os.PathLike[str],
    *,
    catalog: str | None = None,
    branch: str = DEFAULT_BRANCH,
    storage_options: Mapping[str, Any] | None = None,
    create: bool = True,
    transport: Literal["obstore", "fsspec"] | None = None,
    layers: int | LayerRule = 1,
    codec: Literal["none", "lz4", "zstd"] = "none",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    lease: timedelta = DEFAULT_LEASE,
) -> "Store":
    """Open the store at a URL, making it if there is none.

    Args:
        url: the root: a path, ``file://``, ``s3://bucket/prefix``, ``gs://``, ``memory://`` or any fsspec URL.
        catalog: ``sqlite:///path.db`` or ``postgresql+psycopg://…``. Default: a SQLite file inside a local root; for a
            remote root one in the user's data directory.
        branch: where commits go and what ``latest`` means; its first commit makes it.
        storage_options: in the words of the fsspec filesystem; or nothing and the standard ``AWS_*`` variables.
        create: make the store if there is none.
        transport: ``None`` for the fastest that speaks the URL, ``"obstore"`` or ``"fsspec"``.
        layers: how tensors are sorted into layers: a depth (a layer is a name up to its first integer part, 2: up to
            the second, for experts), or a function from tensor name to layer name.
        codec: ``"none"``, ``"lz4"`` or ``"zstd"``: lossless; worth it where storage is slower than about 1 GB/s.
        chunk_bytes: largest chunk, at least 1024.
        lease: how long a commit or reader that died keeps GC away from what it held.

    Raises:
        StoreNotFoundError: there is no store and ``create`` is false.
        NotAStoreError, FormatTooNewError, SchemaOutdatedError, SchemaTooNewError: something else is there, or
            another version's; the message says what to do.
        InvalidInputError: an argument cannot be used.
        BucketNotFoundError, AccessDeniedError, UnavailableError: root or catalog cannot be reached.
    """
    check_name("branch", branch)
    if codec not in CODECS:
        msg = f"unknown codec {codec!r}; use one of {', '.join(CODECS)}"
        raise InvalidInputError(msg)
    if not isinstance(chunk_bytes, int) or chunk_bytes < _SMALLEST_CHUNK_BYTES:
        msg = f"chunk_bytes must be at least {_SMALLEST_CHUNK_BYTES}, not {chunk_bytes!r}"
        raise InvalidInputError(msg)
    rule = layers if callable(layers) else layer_rule(layers)
    objects = open_objects(normalise_url(url), storage_options, transport)
    catalog_url = catalog or default_catalog(printable_url(normalise_url(url)))
    try:
        opened = open_root(objects, catalog_url, create=create)
    except BaseException:
        objects.close()
        raise
    return Store(objects, opened, catalog_url, branch=branch, rule=rule, layout=Layout(chunk_bytes, codec), lease=lease)


class Store:
    """Checkpoints of a training run: one root, one catalog. Made by :func:`open_store`; a context manager.

    One process may use it from several threads; commits are carried out one at a time.
    """

    def __init__(
        self,
        objects: Any,  # noqa: ANN401
        opened: Opened,
        catalog_url: str,
        *,
        branch: str,
        rule: LayerRule,
        layout: Layout,
        lease: timedelta,
    ) -> None:
        """Use :func:`open_store`."""
        self.url: str = objects.url
        """The root, without secrets."""
        self.branch_name = branch
        """Branch that commits go to."""
        self._objects = objects
        self._catalog_url = catalog_url
        self._rule = rule
        self._layout = layout
        self._lease = lease
        self._committing = threading.Lock()
        self._pending: PendingCommit | None = None
        self._closed = False
        self._use(opened)

    def _use(self, opened: Opened) -> None:
        self._opened = opened
        self._catalog = opened.store
        self._keeper = LeaseKeeper(self._catalog.renew, self._catalog.release, self._lease)
        self._committer = Committer(
            objects=self._objects,
            catalog=self._catalog,
            binding=opened.binding,
            keeper=self._keeper,
            layout=self._layout,
            rule=self._rule,
            branch=self.branch_name,
        )
        self._seen = self._fingerprint() if not opened.owned else None

    # Writing

    @property
    def writable(self) -> bool:
        """Whether this catalog owns the root, so that commits, tags and GC are possible."""
        return self._opened.owned and not self._opened.catalog.read_only

    @property
    def catalog_url(self) -> str:
        """The catalog that was asked for, without its password."""
        return self._opened.catalog.url if self._opened.owned else printable_url(self._catalog_url)

    @overload
    def commit(
        self,
        step: int,
        model: Model,
        optim: Optim = None,
        mask: Mask = None,
        *,
        extra: Any = None,  # noqa: ANN401
        metrics: Mapping[str, SupportsFloat] | None = None,
        message: str | None = None,
        block: Literal[True] = True,
    ) -> Commit: ...
    @overload
    def commit(
        self,
        step: int,
        model: Model,
        optim: Optim = None,
        mask: Mask = None,
        *,
        extra: Any = None,  # noqa: ANN401
        metrics: Mapping[str, SupportsFloat] | None = None,
        message: str | None = None,
        block: Literal[False],
    ) -> PendingCommit: ...
    def commit(
        self,
        step: int,
        model: Model,
        optim: Optim = None,
        mask: Mask = None,
        *,
        extra: Any = None,
        metrics: Mapping[str, SupportsFloat] | None = None,
        message: str | None = None,
        block: bool = True,
    ) -> Commit | PendingCommit:
        """Publish the layers that the mask names as of a step; everything else stays as the branch has it.

        Layers that the branch has never stored are written whatever the mask says; layers whose content is what the
        branch has cost no bytes.

        Args:
            step: after the step of the branch's newest commit.
            model: module (compiled, DDP, …) or flat dictionary name → tensor.
            optim: optimizer, several, or a state dict keyed by parameter name; ``None`` for weights only.
            mask: ``None`` (all layers), layer names or globs, a mapping of them to ``True``, ``"full"`` or ``False``,
                or an object with ``select(context)``.
            extra: numbers, strings, lists, dictionaries, tensors, and objects with ``state_dict()`` (schedulers, data
                loaders); handed back by ``restore``.
            metrics: name → number; NaN and infinities are kept and never count as best.
            message: for people.
            block: ``False`` returns as soon as the state is copied to host memory and goes on behind. One commit is
                under way at a time; the next waits for it, and raises its error if nobody has seen that.

        Raises:
            InvalidInputError: step, mask, model, metrics or extra state; nothing was written.
            HeadMovedError, LeaseExpiredError, RootTakenError: somebody else was faster; nothing of it is visible.
            StorageFullError, StorageUnavailableError, CatalogUnavailableError, AccessDeniedError: nothing of it is
                visible; what was written is deleted or swept by GC.
        """
        if message is not None and not isinstance(message, str):
            msg = f"message must be a string, not {type(message).__name__}"
            raise InvalidInputError(msg)
        request = Request(check_step(step), model, optim, mask, extra, check_metrics(metrics), message)
        with self._committing:
            self._check_writable("commit")
            self._settle()
            prepared = self._committer.prepare(request, staged=not block)
            if block:
                return self._committer.carry_out(prepared)
            committer = self._committer
            self._pending = PendingCommit(
                request.step, self.branch_name, lambda: committer.carry_out(prepared)
            )
            return self._pending

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.settle()

    # History

    def log(self, branch: str | None = None, limit: int | None = None) -> list[Commit]:
        """Return a branch's commits, newest first; those before a fork included.

        Raises:
            BranchNotFoundError: no such branch, or one without commits.
        """
        self._refresh()
        return self._catalog.log(branch or self.branch_name, limit)

    def checkout(self, ref: str | int = LATEST) -> Checkpoint:
        """Return the composite checkpoint of a ref: one catalog query, no tensor bytes.

        Args:
            ref: a step (``1200``), ``latest``, a branch, ``branch@step``, a tag, a commit id or its beginning.

        Raises:
            RefNotFoundError: names no commit; the message has the nearest.
            AmbiguousRefError: could mean several; the message has them.
        """
        self._refresh()
        parsed = parse_ref(ref)
        lease = self._lease if self.writable else None
        composite, lease_id = self._catalog.resolve(parsed, self.branch_name, lease)
        head = self._committer.head
        if lease_id is None:
            return Checkpoint(composite, self._objects, known=head.documents if head else None)
        keeper = self._keeper
        keeper.hold(lease_id)
        return Checkpoint(
            composite,
            self._objects,
            known=head.documents if head else None,
            release=lambda: keeper.release(lease_id),
            drop=lambda: keeper.drop(lease_id),
        )

    def show(self, ref: str | int = LATEST) -> Commit:
        """Return the commit of a ref; raises as :meth:`checkout` does."""
        self._refresh()
        return self._catalog.resolve_commit(parse_ref(ref), self.branch_name)

    def diff(self, a: str | int, b: str | int) -> CommitDiff:
        """Compare two composites layer by layer, by their digests; raises as :meth:`checkout` does."""
        self._refresh()
        first, second = (self._catalog.composite(self.show(ref).id) for ref in (a, b))
        return diff_composites(first, second)

    def layers(self, ref: str | int = LATEST) -> list[LayerInfo]:
        """Return the layers of a composite with their source steps, sizes and numbers of versions."""
        return self._catalog.layers(self.show(ref).id)

    def stats(self) -> StoreStats:
        """Return counts and sizes, from the catalog alone."""
        self._refresh()
        return self._catalog.stats()

    def tags(self) -> list[Reference]:
        """Return all tags, by name."""
        self._refresh()
        return self._catalog.tags()

    def branches(self) -> list[Reference]:
        """Return all branches, by name."""
        self._refresh()
        return self._catalog.branches()

    def tag(self, name: str, ref: str | int = LATEST) -> Commit:
        """Name a commit for good; GC keeps it as long as the tag is there.

        Raises:
            BadNameError, TagExistsError, RefNotFoundError: nothing was changed.
        """
        self._check_writable("tag")
        commit = self.show(ref)
        self._point("tag", check_name("tag", name), commit.id, lambda: self._catalog.tag(name, commit.id))
        return commit

    def delete_tag(self, name: str) -> None:
        """Remove a tag; its commit is kept or dropped as the policies say from now on.

        Raises:
            RefNotFoundError: no such tag.
        """
        self._check_writable("delete a tag")
        self._point("tag", name, None, lambda: self._catalog.untag(name))

    def branch(self, name: str, ref: str | int = LATEST, *, move: bool = False) -> Commit:
        """Start a branch at a commit, or move one there; both lines share the layers up to it.

        Moving a branch back leaves the commits after it on no branch: they stay until GC runs with a policy.

        Raises:
            BadNameError, BranchExistsError, RefNotFoundError: nothing was changed.
        """
        self._check_writable("branch")
        commit = self.show(ref)
        self._point(
            "branch", check_name("branch", name), commit.id, lambda: self._catalog.branch(name, commit.id, move=move)
        )
        return commit

    def delete_branch(self, name: str) -> None:
        """Remove a branch; commits that no other branch or tag reaches go when GC runs with a policy.

        Raises:
            BranchNotFoundError: no such branch.
        """
        self._check_writable("delete a branch")
        self._point("branch", name, None, lambda: self._catalog.delete_branch(name))

    def _point(self, kind: Literal["tag", "branch"], name: str, commit_id: str | None, change: Callable[[], object]) -> None:
        """Change a ref in the catalog, then record it in the root.

        The catalog goes first: it may refuse. Should the process die in between, only a rebuild could tell.
        """
        self._wait_for_pending()
        check_binding(self._objects, self._opened.binding)
        change()
        write_ref_record(self._objects, RefRecord(new_id(), kind, name, commit_id, self._catalog.now()))

    # Upkeep

    def gc(
        self,
        policy: RetentionPolicy | None = None,
        *,
        dry_run: bool = False,
        grace: timedelta | None = None,
        progress: Progress | None = None,
    ) -> GcReport:
        """Drop commits that no policy keeps and sweep objects that nothing refers to.

        The newest commit of every branch, tagged commits and those in use are always kept. Safe beside trainers.

        Args:
            policy: which commits to keep, joined by ``|``; ``None`` keeps every commit and only sweeps leftovers.
            dry_run: report what would be done, change nothing.
            grace: how long an object that nothing refers to is left alone; default 24 hours.
            progress: is told what is being done, how much is done and how much there is.

        Raises:
            RootTakenError: another catalog owns the root; nothing was deleted.
            UnavailableError, AccessDeniedError: run it again; nothing that has standing is ever deleted.
        """
        self._check_writable("collect garbage")
        return collect(
            self._objects,
            self._catalog,
            self._opened.binding,
            policy,
            dry_run=dry_run,
            grace=DEFAULT_GRACE if grace is None else grace,
            progress=progress,
        )

    def verify(self, ref: str | int | None = None, *, progress: Progress | None = None) -> VerifyReport:
        """Read every object of a composite, or of the whole store, and compare it with its digest.

        Raises:
            RefNotFoundError: no such ref.
            UnavailableError, AccessDeniedError: storage or catalog cannot be read.
        """
        self._refresh()
        if ref is None:
            return verify(self._objects, self._catalog, self._catalog.live_versions(), progress)
        with self.checkout(ref) as checkpoint:
            versions = self._catalog.composite(checkpoint.commit.id).versions.values()
            return verify(self._objects, self._catalog, versions, progress)

    def rebuild_catalog(self) -> RebuildReport:
        """Take the root over: fill this store's catalog from the manifests in the root, which it owns from then on.

        The catalog that owned it finds out at its next publication or GC, before it can do harm.

        Raises:
            UnavailableError, AccessDeniedError: root or catalog cannot be read or written; the owner stays.
        """
        self._check_open()
        self._settle()
        found = read_binding(self._objects) or self._opened.binding
        catalog = Catalog.open(self._catalog_url, create=True)
        binding = Binding(found.store_id, catalog.catalog_id, found.epoch + 1)
        # Claim first, read after: whoever owned the root writes a manifest before it looks who owns the root, so what
        # it still publishes is among the manifests, and all else it finds refused.
        write_binding(self._objects, binding, replace=True)
        history = read_history(self._objects)
        store = load_history(catalog, binding, self._objects, history)
        self._keeper.close()
        self._opened.close()
        self._use(Opened(catalog, store, binding, owned=True))
        return RebuildReport(
            commits=len(history.commits),
            versions=len({(v.layer, v.version_id) for m in history.commits for v in m.versions.values()}),
            branches=tuple(sorted(history.branches)),
            tags=tuple(sorted(history.tags)),
            unplaced=history.unplaced,
            unreadable=history.unreadable,
            epoch=binding.epoch,
        )

    def close(self) -> None:
        """Wait for a commit under way, give leases back and close connections. Closing twice is fine.

        Raises:
            TailorError: the commit under way failed and nobody has seen that yet; the store is closed all the same.
        """
        if self._closed:
            return
        with self._committing:
            self._closed = True
            try:
                self._settle()
            finally:
                self._committer.arena.release()
                self._keeper.close()
                self._opened.close()
                self._objects.close()

    def __enter__(self) -> "Store":
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Name root and branch."""
        return f"<Store {self.url} on {self.branch_name!r}{'' if self.writable else ', read-only'}>"

    # What other catalogs do to a root

    def _check_open(self) -> None:
        if self._closed:
            msg = f"the store {self.url} was closed; open it again"
            raise ClosedError(msg)

    def _check_writable(self, verb: str) -> None:
        self._check_open()
        if not self._opened.owned:
            owner = self._opened.binding
            msg = (
                f"cannot {verb}: the root {self.url} belongs to catalog {owner.catalog_id} (epoch {owner.epoch}), not to"
                f" {self.catalog_url}. Open it with that catalog, or take it over with rebuild_catalog()"
                " ('tailorstore rebuild')"
            )
            raise RootTakenError(msg)

    def _refresh(self) -> None:
        """Notice what a root's owner has published since it was opened for reading."""
        self._check_open()
        if self._opened.owned or self._fingerprint() == self._seen:
            return
        copy = open_copy(self._objects, read_binding(self._objects) or self._opened.binding)
        self._keeper.close()
        self._opened.close()
        self._use(copy)

    def _fingerprint(self) -> frozenset[str]:
        return frozenset(manifest_ids(self._objects)) | frozenset(ref_record_ids(self._objects))

    def _wait_for_pending(self) -> None:
        """Wait for a commit under way, so that a ref can mean it; its error is for ``commit`` and ``close``."""
        if self._pending is not None:
            self._pending.wait()
