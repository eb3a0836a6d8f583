"""The front door: a store is one catalog plus one root, and every verb starts here."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, SupportsFloat, overload

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.mask import Mask
from tailorstore.domain.names import LATEST, parse_ref
from tailorstore.domain.records import (
    DEFAULT_GRACE,
    Commit,
    CommitDiff,
    GcReport,
    LayerInfo,
    Reference,
    StoreStats,
    VerifyReport,
)
from tailorstore.domain.reports import RebuildReport
from tailorstore.domain.retention import RetentionPolicy
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.claims import check_out
from tailorstore.engine.commit import Request
from tailorstore.engine.commits import Commits
from tailorstore.engine.currency import unread_documents
from tailorstore.engine.diff import diff_composites
from tailorstore.engine.gc import Progress, collect
from tailorstore.engine.leases import LeaseKeeper
from tailorstore.engine.pending import PendingCommit
from tailorstore.engine.plan import check_metrics, check_step
from tailorstore.engine.ranks.checkout import check_out_together
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.references import branch, delete_branch, delete_tag, tag
from tailorstore.engine.session import Session
from tailorstore.engine.tensors.capture import Model, Optim, OptimizerLike
from tailorstore.engine.tensors.gradients import Watch, Watched
from tailorstore.engine.updates import Updates, collect_updates
from tailorstore.engine.verifying import scrub, verify_commit, verify_store


class Store:
    """Checkpoints of a training run: one root, one catalog. Made by :func:`open_store`; a context manager.

    One process may use it from several threads; commits are carried out one at a time.
    """

    def __init__(self, session: Session, commits: Commits) -> None:
        """Use :func:`open_store`."""
        self.url = session.objects.url
        """The root, without secrets."""
        self.branch_name = commits.branch
        """Branch that commits go to."""
        self._session = session
        self._objects = session.objects
        self._commits = commits

    @property
    def _catalog(self) -> StoreCatalog:
        return self._session.catalog

    @property
    def _keeper(self) -> LeaseKeeper:
        return self._session.keeper

    def ranks(self) -> Ranks | None:
        """Return the ranks that commit and restore together, once none of them commits; ``None``: this one alone.

        The first call is collective, as ``commit`` is.

        Raises:
            RanksDisagreeError: the root is not the same place for all.
            RankLostError: another rank did not call.
        """
        return self._commits.ranks()

    # Writing

    @property
    def writable(self) -> bool:
        """Whether this catalog owns the root, so that commits, tags and GC are possible."""
        return self._session.writable

    @property
    def owned(self) -> bool:
        """Whether this catalog owns the root; else the store is read from its manifests."""
        return self._session.owned

    @property
    def catalog_url(self) -> str:
        """The catalog that was asked for, without its password."""
        return self._session.catalog_url

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
        partial: bool = False,
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
        partial: bool = False,
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
        partial: bool = False,
        block: bool = True,
    ) -> Commit | PendingCommit:
        """Publish the layers that the mask names as of a step; everything else stays as the branch has it.

        Layers that the branch has never stored are written whatever the mask says; layers whose content is what the
        branch has cost no bytes.

        Args:
            step: after the step of the branch's newest commit.
            model: module (compiled, DDP, …) or flat dictionary name → tensor.
            optim: optimizer, several, or a state dict keyed by parameter name; ``None`` for weights only.
            mask: ``None`` (all layers), layer names or globs, a mapping of them to ``True``, ``"full"``, ``"light"`` or
                ``False``, or a strategy.
            extra: numbers, strings, lists, dictionaries, tensors, and objects with ``state_dict()`` (schedulers, data
                loaders); handed back by ``restore``.
            metrics: name → number; NaN and infinities are kept and never count as best.
            message: for people.
            partial: layers that are not passed stay as the branch has them, and new ones may come; else the model must
                have the branch's layers.
            block: ``False`` returns as soon as the state is copied to host memory and goes on behind. One commit is
                under way at a time; the next waits for it, and raises its error if nobody has seen that.

        Raises:
            InvalidInputError: step, mask, model, metrics or extra state; nothing was written.
            HeadMovedError, LeaseExpiredError, RootTakenError: somebody else was faster; nothing of it is visible.
            StorageFullError, StorageUnavailableError, CatalogUnavailableError, AccessDeniedError: nothing of it is
                visible; what was written is deleted or swept by GC.
        """

        def request() -> Request:
            # Made where an error is one of all ranks.
            if message is not None and not isinstance(message, str):
                msg = f"message must be a string, not {type(message).__name__}"
                raise InvalidInputError(msg)
            return Request(check_step(step), model, optim, mask, extra, check_metrics(metrics), message, partial)

        return self._commits.commit(request, block=block)

    # History

    def log(self, branch: str | None = None, limit: int | None = None) -> list[Commit]:
        """Return a branch's commits, newest first; those before a fork included.

        Raises:
            BranchNotFoundError: no such branch, or one without commits.
            InvalidInputError: a limit below 0.
        """
        self._refresh()
        return self._catalog.log(branch or self.branch_name, _check_limit(limit))

    def checkout(
        self, ref: str | int | Commit = LATEST, *, fallback: bool = False, progress: Progress | None = None
    ) -> Checkpoint:
        """Return the composite checkpoint of a ref: one catalog query, no tensor bytes.

        Args:
            ref: a step (``1200``), ``latest``, a branch, ``branch@step``, a tag, a commit id or its beginning.
            fallback: read all of it first, and where a layer is damaged take the newest commit that led to it and is
                whole: ``Checkpoint.fallback_from`` tells. Of many ranks the coordinator reads, alone. What is damaged
                goes into quarantine, where this process may write: the next commit writes it anew. The branch stays
                where it is: to train on from what was found, ``branch("main", "main@70", move=True)``; until then
                commits at steps up to its newest are refused.
            progress: of that reading.

        Raises:
            IntegrityError: ``fallback``, and no commit that led to it is whole; lists those that were tried.
            RefNotFoundError: names no commit; the message has the nearest.
            AmbiguousRefError: could mean several; the message has them.
        """
        parsed = parse_ref(ref)
        ranks = self._commits.ranks()
        if ranks is not None:
            return check_out_together(
                ranks, self._session, parsed, self.branch_name, self._commits, fallback=fallback, progress=progress
            )
        self._refresh()
        known = self._commits.known_documents
        return check_out(self._session, parsed, self.branch_name, known, fallback=fallback, progress=progress)

    def show(self, ref: str | int | Commit = LATEST) -> Commit:
        """Return the commit of a ref; raises as :meth:`checkout` does."""
        self._refresh()
        return self._catalog.resolve_commit(parse_ref(ref), self.branch_name)

    def diff(self, a: str | int | Commit, b: str | int | Commit) -> CommitDiff:
        """Compare two composites layer by layer, by their digests; raises as :meth:`checkout` does."""
        self._refresh()
        first, second = (self._catalog.composite(self.show(ref).id) for ref in (a, b))
        return diff_composites(first, second)

    def layers(self, ref: str | int | Commit = LATEST) -> list[LayerInfo]:
        """Return the layers of a composite with their source steps, sizes and numbers of versions."""
        return self._catalog.layers(self.show(ref).id)

    def updates(self, branch: str | None = None, limit: int | None = None) -> Updates:
        """Return how layers moved, as measured at a branch's newest commits, as arrays; raises as :meth:`log` does."""
        self._refresh()
        return collect_updates(self._catalog.measures(branch or self.branch_name, _check_limit(limit)))

    def watch(self, optim: OptimizerLike | Sequence[OptimizerLike], every: int = 10) -> Watch:
        """Measure gradients just before every n-th step of these torch optimizers, until the handle's ``remove()``.

        Raises:
            InvalidInputError: no torch optimizers, or ``every`` is no whole number of at least 1.
        """
        return self._commits.gauge.watch(optim, every)

    def observe(self, watched: Watched) -> None:
        """Measure the gradients that a module's or optimizers' parameters have now: for loops without :meth:`watch`."""
        self._commits.gauge.observe(watched)

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

    def tag(self, name: str, ref: str | int | Commit = LATEST) -> Commit:
        """Name a commit for good; GC keeps it as long as the tag is there.

        Raises:
            BadNameError, TagExistsError, RefNotFoundError: nothing was changed.
        """
        return self._point_at(ref, "tag", lambda commit: tag(self._session, name, commit))

    def delete_tag(self, name: str) -> None:
        """Remove a tag; its commit is kept or dropped as the policies say from now on.

        Raises:
            RefNotFoundError: no such tag.
        """
        self._session.check_writable("delete a tag")
        delete_tag(self._session, name)

    def branch(self, name: str, ref: str | int | Commit = LATEST, *, move: bool = False) -> Commit:
        """Start a branch at a commit, or move one there; both lines share the layers up to it.

        Moving a branch back leaves the commits after it on no branch: they stay until GC runs with a policy.

        Raises:
            BadNameError, BranchExistsError, RefNotFoundError: nothing was changed.
        """
        return self._point_at(ref, "branch", lambda commit: branch(self._session, name, commit, move=move))

    def delete_branch(self, name: str) -> None:
        """Remove a branch; commits that no other branch or tag reaches go when GC runs with a policy.

        Raises:
            BranchNotFoundError: no such branch.
            InvalidInputError: it is the only one.
        """
        self._session.check_writable("delete a branch")
        delete_branch(self._session, name)

    def _point_at(self, ref: str | int | Commit, verb: str, point: Callable[[Commit], None]) -> Commit:
        self._session.check_writable(verb)
        self._commits.finish()
        commit = self.show(ref)
        point(commit)
        return commit

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
            RootTakenError, CorruptDocumentError: another owner, or nobody can tell what may go; nothing was deleted.
            UnavailableError, AccessDeniedError: run it again; nothing that has standing is ever deleted.
        """
        self._session.check_writable("collect garbage")
        if policy is not None and not callable(getattr(policy, "keep", None)):
            msg = f"policy must be KeepLast(n), KeepEvery(steps), … joined by |, not {policy!r}"
            raise InvalidInputError(msg)
        return collect(
            self._objects,
            self._catalog,
            self._session.binding,
            policy,
            dry_run=dry_run,
            grace=DEFAULT_GRACE if grace is None else grace,
            progress=progress,
        )

    def verify(
        self, ref: str | int | Commit | None = None, *, repair: bool = False, progress: Progress | None = None
    ) -> VerifyReport:
        """Read every object of a composite, or of the whole store, and compare it with its digest.

        Where the catalog can be written it remembers what was read when, for :meth:`scrub`.

        Args:
            ref: as for :meth:`checkout`; ``None``: the whole store, with what nothing in its root explains.
            repair: make documents again that follow from what is known, and put damaged layer versions into quarantine:
                composites that hold them say so, the next commit of the layer writes it anew, and GC's policies do not
                count such commits. What is whole again leaves quarantine. Nothing is re-pointed. Of the whole store,
                changes of tags and branches that are not on record are recorded.
            progress: is told how many versions and bytes are read.

        Raises:
            RefNotFoundError: no such ref.
            RootTakenError: ``repair``, and another catalog owns the root; nothing was changed.
            UnavailableError, AccessDeniedError: storage or catalog cannot be read, or not be written to repair.
        """
        self._refresh()
        if repair:
            self._session.check_writable("repair")
        if ref is None:
            return verify_store(self._session, mend=repair, progress=progress)
        return verify_commit(self._session, parse_ref(ref), self.branch_name, mend=repair, progress=progress)

    def scrub(self, fraction: float, *, progress: Progress | None = None) -> VerifyReport:
        """Verify about this fraction of the stored bytes, what was not verified for longest first.

        The catalog remembers, so 1/30 a day reads all within 30 days, as long as less than that is written each day.

        Args:
            fraction: above 0, at most 1; of the manifests as many.
            progress: as for :meth:`verify`.

        Raises:
            InvalidInputError: the fraction is none.
            RootTakenError, AccessDeniedError: this process cannot write to the catalog, so that nothing would be
                remembered; nothing was read.
            UnavailableError: storage or catalog cannot be read.
        """
        self._refresh()
        return scrub(self._session, fraction, progress=progress)

    def quarantined(self) -> dict[str, tuple[str, ...]]:
        """Return the ids of commits that hold layers in quarantine, with the names of these layers."""
        self._refresh()
        return self._catalog.commits_in_quarantine()

    def unread(self) -> tuple[str, ...]:
        """Return the keys of documents in the root that could not be understood when the catalog was made from it."""
        return unread_documents(self._objects, self._catalog)

    def rebuild_catalog(self, *, dry_run: bool = False) -> RebuildReport:
        """Take the root over: fill this store's catalog from the manifests in the root, which it owns from then on.

        The catalog that owned it finds out at its next publication or GC, before it can do harm. What can be told from
        the root comes back exactly; the report lists the rest. Where this store's catalog owns the root already, what
        only it knows is written there first, so nothing of that is lost.

        Args:
            dry_run: only report what would be found; change nothing.

        Raises:
            RootTakenError: another take-over into the same catalog was faster.
            UnavailableError, AccessDeniedError: root or catalog cannot be read or written; do it again. Until it
                succeeds the store can be read.
        """
        self._session.check_open()
        if dry_run:
            self._commits.wait()
            return self._session.take_over(dry_run=True)
        return self._commits.between(self._session.take_over)

    def close(self) -> None:
        """Wait for a commit under way, give leases back and close connections. Closing twice is fine.

        Raises:
            TailorError: the commit under way failed and nobody has seen that yet; the store is closed all the same.
        """
        if self._session.closed:
            return
        self._commits.close()

    def __enter__(self) -> "Store":
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Name root and branch."""
        return f"<Store {self.url} on {self.branch_name!r}{', read-only' if self._session.is_read_only else ''}>"

    def _refresh(self) -> None:
        # What this store has begun to commit is part of what it shows; an error is for `commit`, `result` and `close`.
        self._commits.wait()
        if self._session.refresh():
            self._commits.start_anew()


def _check_limit(limit: int | None) -> int | None:
    if limit is not None and (not isinstance(limit, int) or limit < 0):
        msg = f"limit must be None or a whole number of at least 0, not {limit!r}"
        raise InvalidInputError(msg)
    return limit
