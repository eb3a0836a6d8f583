"""One commit, from live tensors to its publication. DESIGN.md, "Order of writing", has the table of its hops.

Announce → write and seal → manifest → publish. Everything before the publication can be thrown away; the publication
is one SQL transaction that compares the branch's head.
"""

import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.errors import HeadMovedError, RootTakenError, TailorError
from tailorstore.domain.mask import Mask
from tailorstore.domain.names import new_id
from tailorstore.domain.records import (
    EXTRA_LAYER,
    Binding,
    Commit,
    CommitDraft,
    CommitManifest,
    Composite,
    LayerDocument,
    LayerVersion,
)
from tailorstore.engine.leases import LeaseKeeper
from tailorstore.engine.plan import Layout, PlannedLayer, due_layers, plan_layer
from tailorstore.engine.read import load_documents
from tailorstore.engine.tensors.capture import Capture, LayerCapture, Model, Optim, capture
from tailorstore.engine.tensors.memory import wait_for_devices
from tailorstore.engine.tensors.packing import Packer
from tailorstore.engine.tensors.rng import rng_states
from tailorstore.engine.tensors.staging import HostArena
from tailorstore.engine.write import Written, write_layers
from tailorstore.storage.manifests import read_binding, write_manifest
from tailorstore.storage.transport import Objects

logger = logging.getLogger("tailorstore")

_ANNOUNCE_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asked to commit."""

    step: int
    model: Model
    optim: Optim
    mask: Mask
    extra: Any
    metrics: Mapping[str, float]
    message: str | None


@dataclass(frozen=True, slots=True)
class Head:
    """A branch's newest composite with its documents, as this process last saw it."""

    composite: Composite
    documents: Mapping[str, LayerDocument]


@dataclass(frozen=True, slots=True)
class Prepared:
    """An announced commit: all that writing and publishing it needs. Holds its tensors until it is written."""

    draft: CommitDraft
    layers: tuple[LayerCapture, ...]
    head: Head | None


@dataclass(slots=True)
class Committer:
    """Carries commits of one branch through; keeps what the next commit can reuse. One commit at a time."""

    objects: Objects
    catalog: StoreCatalog
    binding: Binding
    keeper: LeaseKeeper
    layout: Layout
    rule: Any
    branch: str
    arena: HostArena = field(default_factory=HostArena)
    head: Head | None = None

    def prepare(self, request: Request, *, staged: bool) -> Prepared:
        """Decide what to write and announce it; copy it to the host if ``staged``.

        Raises:
            InvalidInputError: mask, step, model or extra state cannot be committed; nothing was written.
            UnavailableError: catalog or storage could not be reached; nothing was written.
        """
        captured = capture(request.model, request.optim, self.rule)
        extra = _capture_extra(captured, request.extra)
        commit_id = new_id()
        head, due = self._announce(commit_id, request, captured)
        layers = [*(captured.layers[name] for name in due), extra]
        if not staged:
            wait_for_devices(tensor for layer in layers for tensor in layer.arrays.values())
        else:
            try:
                layers = _stage(self.arena, layers)
            except BaseException:
                self._abandon(commit_id)
                raise
        logical = sum(layer.nbytes for layer in captured.layers.values()) + extra.nbytes
        draft = CommitDraft(
            id=commit_id,
            step=request.step,
            branch=self.branch,
            parent=head.composite.commit.id if head else None,
            message=request.message,
            metrics=request.metrics,
            bytes_logical=logical,
        )
        return Prepared(draft, tuple(layers), head)

    def carry_out(self, prepared: Prepared) -> Commit:
        """Write, seal and publish an announced commit.

        Raises:
            HeadMovedError, LeaseExpiredError, RootTakenError: somebody else was faster; nothing is visible here and
                what was written is swept by GC.
            UnavailableError, AccessDeniedError: as before; after a failure of the catalog at the very end the commit
                may have been published: ``log`` tells.
        """
        written = Written()
        try:
            # Looked at twice: here so that a lost root costs nothing, and again when all is written, which counts.
            check_binding(self.objects, self.binding)
            write_layers(self.objects, prepared.draft.id, prepared.draft.step, self._plan(prepared), written)
            manifest = self._manifest(prepared, written)
        except BaseException:
            self._discard(prepared.draft.id, written)
            raise
        # From here on nothing is deleted, whatever fails: once a manifest may exist, whoever takes the root over may
        # have found it and published the commit. What nobody published is swept by GC, the manifest first.
        try:
            write_manifest(self.objects, manifest)
            check_binding(self.objects, self.binding)
            versions = [sealed.version for sealed in written.sealed.values()]
            commit = self.catalog.publish(prepared.draft, versions)
        except BaseException:
            self._abandon(prepared.draft.id)
            self.head = None
            raise
        self.keeper.forget(prepared.draft.id)
        documents = dict(prepared.head.documents) if prepared.head else {}
        documents |= {name: sealed.document for name, sealed in written.sealed.items()}
        composite = Composite(commit, manifest.versions)
        self.head = Head(composite, documents)
        return commit

    def current_head(self, commit: Commit | None) -> Head | None:
        """Return a head commit's composite and documents, reading what is not in memory."""
        if commit is None:
            return None
        if self.head is not None and self.head.composite.commit.id == commit.id:
            return self.head
        composite = self.catalog.composite(commit.id)
        known = self.head.documents if self.head else None
        self.head = Head(composite, load_documents(self.objects, composite.versions.values(), known))
        return self.head

    def _announce(self, commit_id: str, request: Request, captured: Capture) -> tuple[Head | None, list[str]]:
        """Check the request against the head and announce it on that head."""
        for _ in range(_ANNOUNCE_ATTEMPTS):
            seen = self.catalog.head(self.branch)
            head = self.current_head(seen)
            due = due_layers(
                captured,
                request.mask,
                branch=self.branch,
                step=request.step,
                head=head.composite if head else None,
                documents=head.documents if head else {},
            )
            announced = self.catalog.announce(commit_id, self.branch, request.step, self.keeper.lease)
            if (announced.id if announced else None) == (seen.id if seen else None):
                self.keeper.hold(commit_id)
                return head, due
            # Another process published between the two looks: decide again, on its head.
            self.catalog.abandon(commit_id)
        msg = (
            f"branch {self.branch!r} moves faster than step {request.step} can be announced; commit on your own branch"
        )
        raise HeadMovedError(msg)

    def _plan(self, prepared: Prepared) -> list[PlannedLayer]:
        known = prepared.head.documents if prepared.head else {}
        # What every commit writes is not compared: it is a few kilobytes, and always of the commit's own step.
        return [
            plan_layer(layer, self.layout, known.get(layer.name) if layer.name != EXTRA_LAYER else None)
            for layer in prepared.layers
        ]

    def _manifest(self, prepared: Prepared, written: Written) -> CommitManifest:
        draft = prepared.draft
        fresh = {name: sealed.version for name, sealed in written.sealed.items()}
        versions: dict[str, LayerVersion] = dict(prepared.head.composite.versions) if prepared.head else {}
        versions |= fresh
        commit = Commit(
            id=draft.id,
            step=draft.step,
            branch=draft.branch,
            parent=draft.parent,
            created_at=self.catalog.now(),
            message=draft.message,
            metrics=draft.metrics,
            layers_written=tuple(sorted(name for name in fresh if name != EXTRA_LAYER)),
            bytes_written=sum(version.bytes_stored for version in fresh.values()),
            bytes_logical=draft.bytes_logical,
        )
        return CommitManifest(self.binding, commit, dict(sorted(versions.items())))

    def _abandon(self, commit_id: str) -> None:
        self.keeper.forget(commit_id)
        with contextlib.suppress(TailorError):
            self.catalog.abandon(commit_id)

    def _discard(self, commit_id: str, written: Written) -> None:
        """Delete what an unpublished commit wrote; what cannot be deleted is swept by GC."""
        self._abandon(commit_id)
        with contextlib.suppress(TailorError):
            failures = self.objects.delete(list(dict.fromkeys(written.keys)))
            if failures:
                logger.info("%d objects of an unpublished commit stay until gc sweeps them", len(failures))


def check_binding(objects: Objects, binding: Binding) -> None:
    """Make sure that this catalog still owns the root.

    Raises:
        RootTakenError: another catalog took it over, or its document is gone.
    """
    found = read_binding(objects)
    if found != binding:
        owner = f"catalog {found.catalog_id} (epoch {found.epoch})" if found else "no catalog"
        msg = (
            f"the root {objects.url} belongs to {owner} now, not to this one ({binding.catalog_id}, epoch"
            f" {binding.epoch}): nothing was published or deleted. Open it with that catalog, or take it back with"
            " rebuild_catalog()"
        )
        raise RootTakenError(msg)


def _capture_extra(captured: Capture, extra: Any) -> LayerCapture:  # noqa: ANN401
    packer = Packer()
    content = {
        "extra": packer.pack({} if extra is None else extra, "extra"),
        "param_groups": captured.param_groups,
        "shared": captured.shared,
        "optimizers": captured.classes,
        "rng": packer.pack(rng_states(), "rng"),
    }
    return LayerCapture(EXTRA_LAYER, content, {**captured.shared_arrays, **packer.arrays})


def _stage(arena: HostArena, layers: Iterable[LayerCapture]) -> list[LayerCapture]:
    layers = list(layers)
    copies = arena.copy(
        {f"{at}/{path}": tensor for at, layer in enumerate(layers) for path, tensor in layer.arrays.items()}
    )
    return [
        replace(layer, arrays={path: copies[f"{at}/{path}"] for path in layer.arrays})
        for at, layer in enumerate(layers)
    ]
