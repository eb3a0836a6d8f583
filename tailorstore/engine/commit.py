"""One commit, from live tensors to its publication. DESIGN.md, "Order of writing", has the table of its hops.

Announce → write and seal → manifest → publish. Everything before the publication can be thrown away; the publication
is one SQL transaction that compares the branch's head.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.errors import (
    CorruptDocumentError,
    DigestMismatchError,
    HeadMovedError,
    MissingObjectError,
    RootTakenError,
    TailorError,
)
from tailorstore.domain.light import LightSettings
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
from tailorstore.engine.contents import CompositeContents
from tailorstore.engine.leases import LeaseKeeper
from tailorstore.engine.light.bases import BaseCache
from tailorstore.engine.light.encode import EncodedLayer
from tailorstore.engine.light.lighten import lightening_jobs
from tailorstore.engine.light.planning import plan_light
from tailorstore.engine.observed import HISTORY
from tailorstore.engine.plan import Layout, LightPlan, PlannedLayer, due_layers, plan_layer
from tailorstore.engine.read import load_documents
from tailorstore.engine.selection import STATE, Decision, Selector
from tailorstore.engine.tensors.capture import Capture, LayerCapture, Model, Optim, capture
from tailorstore.engine.tensors.device_codes import codes_on_device
from tailorstore.engine.tensors.memory import Tensor, wait_for_devices
from tailorstore.engine.tensors.packing import Packer
from tailorstore.engine.tensors.rng import rng_states
from tailorstore.engine.tensors.staging import HostArena
from tailorstore.engine.write import Destination, Written, write_layers
from tailorstore.storage.manifests import read_binding, write_manifest
from tailorstore.storage.threads import Job, run_jobs
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
    base_documents: Mapping[str, LayerDocument]
    """Of the bases of light versions."""

    def base_of(self, layer: str) -> tuple[LayerVersion, LayerDocument]:
        """Return the newest full version of a layer, and its document."""
        version = self.composite.versions[layer]
        if version.fidelity == "full":
            return version, self.documents[layer]
        return self.composite.bases[layer], self.base_documents[layer]


@dataclass(frozen=True, slots=True)
class Prepared:
    """An announced commit: all that writing and publishing it needs. Holds its tensors until it is written."""

    draft: CommitDraft
    layers: tuple[LayerCapture, ...]
    head: Head | None
    decision: Decision
    encoded: Mapping[str, EncodedLayer]
    """Layers that were coded on their device; not among ``layers``."""


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
    light: LightSettings
    selector: Selector = field(init=False)
    bases: BaseCache = field(default_factory=BaseCache)
    arena: HostArena = field(default_factory=HostArena)
    head: Head | None = None

    def __post_init__(self) -> None:
        """Begin to look at the branch's layers."""
        self.selector = Selector(self.light, self._steps, self._read_weights)

    def close(self) -> None:
        """Give host memory back."""
        self.arena.release()
        self.bases.clear()

    def _steps(self) -> list[int]:
        return self.catalog.steps(self.branch, HISTORY)

    def _read_weights(
        self, composite: Composite, layers: Iterable[str]
    ) -> Iterator[tuple[str, Mapping[str, Tensor] | None]]:
        contents = CompositeContents(composite, self.objects, self.head.documents if self.head else None)
        for layer in layers:
            try:
                yield layer, contents.weights(layer)
            except (MissingObjectError, DigestMismatchError, CorruptDocumentError) as error:
                logger.warning(
                    "layer %r cannot be compared with its stored version, which is damaged: %s", layer, error
                )
                yield layer, None

    def prepare(self, request: Request, *, staged: bool) -> Prepared:
        """Decide what to write and announce it; copy it to the host if ``staged``.

        Raises:
            InvalidInputError: mask, step, model or extra state cannot be committed; nothing was written.
            UnavailableError: catalog or storage could not be reached; nothing was written.
        """
        captured = capture(request.model, request.optim, self.rule)
        extra = _capture_extra(captured, request.extra)
        commit_id = new_id()
        head, decision = self._announce(commit_id, request, captured)
        extra.content[STATE] = decision.state
        layers = [*(captured.layers[name] for name in decision.due), extra]
        encoded: dict[str, EncodedLayer] = {}
        if not staged:
            _wait_for(layers)
        else:
            try:
                encoded = self._encode_on_devices(head, decision, layers)
                layers = _stage(self.arena, [layer for layer in layers if layer.name not in encoded])
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
        return Prepared(draft, tuple(layers), head, decision, encoded)

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
            draft = prepared.draft
            destination = Destination(self.objects, draft.id, draft.step, self.layout, self.bases, written)
            write_layers(destination, self._plan(prepared))
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
            commit = self.catalog.publish(prepared.draft, versions, prepared.decision.measures)
        except BaseException:
            self._abandon(prepared.draft.id)
            self.head = None
            raise
        self.keeper.forget(prepared.draft.id)
        documents = dict(prepared.head.documents) if prepared.head else {}
        documents |= {name: sealed.document for name, sealed in written.sealed.items()}
        composite = Composite(commit, manifest.versions, manifest.bases)
        base_documents = {name: prepared.head.base_of(name)[1] for name in manifest.bases} if prepared.head else {}
        self.head = Head(composite, documents, base_documents)
        self.selector.published(prepared.decision, commit, written.unchanged)
        return commit

    def current_head(self, commit: Commit | None) -> Head | None:
        """Return a head commit's composite and documents, reading what is not in memory."""
        if commit is None:
            return None
        if self.head is not None and self.head.composite.commit.id == commit.id:
            return self.head
        composite = self.catalog.composite(commit.id)
        known = self.head.documents if self.head else None
        known_bases = self.head.base_documents if self.head else None
        self.head = Head(
            composite,
            load_documents(self.objects, composite.versions.values(), known),
            load_documents(self.objects, composite.bases.values(), known_bases),
        )
        return self.head

    def _announce(self, commit_id: str, request: Request, captured: Capture) -> tuple[Head | None, Decision]:
        """Check the request against the head and announce it on that head."""
        for _ in range(_ANNOUNCE_ATTEMPTS):
            seen = self.catalog.head(self.branch)
            head = self.current_head(seen)
            composite, documents = (head.composite, head.documents) if head else (None, {})
            outlook = self.selector.look(captured, self.branch, request.step, composite, documents)
            due = due_layers(captured, request.mask, outlook.context, head=composite, documents=documents)
            announced = self.catalog.announce(commit_id, self.branch, request.step, self.keeper.lease)
            if (announced.id if announced else None) == (seen.id if seen else None):
                self.keeper.hold(commit_id)
                try:
                    return head, self.selector.decide(outlook, captured, due)
                except BaseException:
                    self._abandon(commit_id)
                    raise
            # Another process published between the two looks: decide again, on its head.
            self.catalog.abandon(commit_id)
        msg = (
            f"branch {self.branch!r} moves faster than step {request.step} can be announced; commit on your own branch"
        )
        raise HeadMovedError(msg)

    def _plan(self, prepared: Prepared) -> list[PlannedLayer]:
        head = prepared.head
        # What every commit writes is not compared: it is a few kilobytes, and always of the commit's own step.
        stored = {name: document for name, document in head.documents.items() if name != EXTRA_LAYER} if head else {}
        planned = [plan_layer(layer, self.layout, stored.get(layer.name)) for layer in prepared.layers]
        due = prepared.decision.due
        if head is None:
            return planned
        planned = [
            replace(one, light=self._light_plan(head, one.capture.name))
            if due.get(one.capture.name) == "light"
            else one
            for one in planned
        ]
        coded = [
            plan_light(encoded, self._light_plan(head, name), self.layout) for name, encoded in prepared.encoded.items()
        ]
        return [*planned, *coded]

    def _encode_on_devices(
        self, head: Head | None, decision: Decision, layers: Iterable[LayerCapture]
    ) -> dict[str, EncodedLayer]:
        """Code those layers that are due light where their tensors are: a tenth as much has to leave the device."""
        encoded: dict[str, EncodedLayer] = {}
        due = [layer for layer in layers if decision.due.get(layer.name) == "light" and _is_coded_on_device(layer)]
        if head is None or not due:
            return encoded

        def keep(found: EncodedLayer) -> Iterable[Job]:
            encoded[found.capture.name] = found
            return ()

        _wait_for(due)
        jobs = [
            job
            for layer in due
            for job in lightening_jobs(self.objects, layer, self._light_plan(head, layer.name), self.bases, keep)
        ]
        run_jobs(jobs, self.objects.workers)
        return encoded

    def _light_plan(self, head: Head, layer: str) -> LightPlan:
        base, document = head.base_of(layer)
        stored = head.documents[layer]
        previous = stored if stored.fidelity == "light" and stored.base_id == base.version_id else None
        return LightPlan(base, document, previous, self.selector.settings)

    def _manifest(self, prepared: Prepared, written: Written) -> CommitManifest:
        draft = prepared.draft
        fresh = {name: sealed.version for name, sealed in written.sealed.items()}
        versions: dict[str, LayerVersion] = dict(prepared.head.composite.versions) if prepared.head else {}
        versions |= fresh
        bases = {
            name: prepared.head.base_of(name)[0]
            for name, version in sorted(versions.items())
            if version.fidelity == "light" and prepared.head
        }
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
        measures = prepared.decision.measures
        return CommitManifest(self.binding, commit, dict(sorted(versions.items())), bases, measures)

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


def _wait_for(layers: Iterable[LayerCapture]) -> None:
    wait_for_devices(tensor for layer in layers for tensor in layer.arrays.values())


def _is_coded_on_device(layer: LayerCapture) -> bool:
    return any(codes_on_device(tensor) for tensor in layer.arrays.values())


def _stage(arena: HostArena, layers: Iterable[LayerCapture]) -> list[LayerCapture]:
    layers = list(layers)
    copies = arena.copy(
        {f"{at}/{path}": tensor for at, layer in enumerate(layers) for path, tensor in layer.arrays.items()}
    )
    return [
        replace(layer, arrays={path: copies[f"{at}/{path}"] for path in layer.arrays})
        for at, layer in enumerate(layers)
    ]
