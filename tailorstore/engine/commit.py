"""One commit, from live tensors to its publication. DESIGN.md, "Order of writing", has the table of its hops.

Announce → write and seal → manifest → publish. Everything before the publication can be thrown away; the publication
is one SQL transaction that compares the branch's head.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tailorstore.domain.errors import (
    CorruptDocumentError,
    DigestMismatchError,
    IntegrityError,
    MissingObjectError,
    TailorError,
)
from tailorstore.domain.light import LightSettings
from tailorstore.domain.mask import Mask
from tailorstore.domain.names import LayerRule, new_id
from tailorstore.domain.records import EXTRA_LAYER, Commit, CommitDraft
from tailorstore.engine.contents import CompositeContents
from tailorstore.engine.light.bases import BaseCache
from tailorstore.engine.light.encode import EncodedLayer
from tailorstore.engine.light.lighten import lightening_jobs
from tailorstore.engine.light.planning import plan_light
from tailorstore.engine.observed import HISTORY
from tailorstore.engine.plan import Layout, LightPlan, PlannedLayer, due_layers, plan_layer
from tailorstore.engine.publish import ANNOUNCE_ATTEMPTS, Head, Publisher, check_binding, too_fast
from tailorstore.engine.selection import STATE, Decision, Selector
from tailorstore.engine.tensors.capture import Capture, LayerCapture, Model, Optim, capture
from tailorstore.engine.tensors.device_codes import codes_on_device
from tailorstore.engine.tensors.measures import Gauge, Samples
from tailorstore.engine.tensors.memory import wait_for_devices
from tailorstore.engine.tensors.packing import Packer
from tailorstore.engine.tensors.rng import rng_states
from tailorstore.engine.tensors.staging import HostArena
from tailorstore.engine.write import Destination, Written, write_layers
from tailorstore.storage.threads import Job, run_jobs
from tailorstore.storage.transport import Objects

logger = logging.getLogger("tailorstore")


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
    partial: bool = False
    """Whether layers that are not passed stay as the branch has them; else they count as gone."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An announced commit: all that writing and publishing it needs. Holds its tensors until it is written."""

    draft: CommitDraft
    layers: tuple[LayerCapture, ...]
    head: Head | None
    decision: Decision
    samples: Samples
    encoded: Mapping[str, EncodedLayer]
    """Layers that were coded on their device; not among ``layers``."""


@dataclass(slots=True)
class Committer:
    """Carries commits of one branch through; keeps what the next commit can reuse. One commit at a time."""

    publisher: Publisher
    layout: Layout
    rule: LayerRule
    light: LightSettings
    gauge: Gauge
    selector: Selector = field(init=False)
    bases: BaseCache = field(default_factory=BaseCache)
    arena: HostArena = field(default_factory=HostArena)

    def __post_init__(self) -> None:
        """Begin to look at the branch's layers."""
        self.selector = Selector(self.light, self._steps)

    @property
    def _objects(self) -> Objects:
        return self.publisher.objects

    def close(self) -> None:
        """Give host memory back."""
        self.arena.release()
        self.bases.clear()

    def _steps(self) -> list[int]:
        return self.publisher.catalog.steps(self.publisher.branch, HISTORY)

    def prepare(self, make: Callable[[], Request], *, staged: bool) -> Prepared:
        """Decide what to write and announce it; copy it to the host if ``staged``.

        Whatever it raises, call :meth:`abandon` then.

        Raises:
            InvalidInputError: mask, step, model or extra state cannot be committed; nothing was written.
            UnavailableError: catalog or storage could not be reached; nothing was written.
        """
        request = make()
        live = capture(request.model, request.optim, self.rule)
        captured = gathered_here(live)
        extra = capture_extra(captured, request.extra)
        commit_id = new_id()
        head, decision, samples = self._announce(commit_id, request, captured, live)
        extra.content[STATE] = decision.state
        layers = [*(captured.layers[name] for name in decision.due), extra]
        encoded: dict[str, EncodedLayer] = {}
        if staged:
            encoded = self._encode_on_devices(head, decision, layers)
            layers = _stage(self.arena, [layer for layer in layers if layer.name not in encoded])
        else:
            _wait_for(layers)
        logical = sum(layer.nbytes for layer in captured.layers.values()) + extra.nbytes
        logical += head.bytes_beside(captured.layers) if head else 0
        draft = CommitDraft(
            id=commit_id,
            step=request.step,
            branch=self.publisher.branch,
            parent=head.composite.commit.id if head else None,
            message=request.message,
            metrics=request.metrics,
            bytes_logical=logical,
        )
        return Prepared(draft, tuple(layers), head, decision, samples, encoded)

    def abandon(self) -> None:
        """Give up what is announced, if anything is."""
        self.publisher.abandon()

    def carry_out(self, prepared: Prepared) -> Commit:
        """Write, seal and publish an announced commit; raises as ``Publisher.publish`` does."""
        written = Written()
        try:
            # Looked at twice: here so that a lost root costs nothing, and again when all is written, which counts.
            check_binding(self._objects, self.publisher.binding)
            draft = prepared.draft
            destination = Destination(self._objects, draft.id, draft.step, self.layout, self.bases, written)
            write_layers(destination, self._plan(prepared))
        except BaseException:
            self.publisher.abandon()
            discard(self._objects, written)
            raise
        commit = self.publisher.publish(prepared.draft, prepared.head, written.sealed, prepared.decision.measures)
        self.gauge.keep(prepared.samples)
        self.selector.published(prepared.decision, commit, written.unchanged)
        return commit

    def _announce(
        self, commit_id: str, request: Request, captured: Capture, live: Capture
    ) -> tuple[Head | None, Decision, Samples]:
        """Check the request against the head and announce it on that head; ``live`` is what is measured.

        Whatever it raises, the commit may have been announced.
        """
        publisher = self.publisher
        for _ in range(ANNOUNCE_ATTEMPTS):
            head = publisher.look()
            composite, documents = (head.composite, head.documents) if head else (None, {})
            if self.selector.follow(composite, documents):
                self.gauge.forget_all()
            if head is not None:
                self._seed(head, captured)
            measures = self.gauge.measure(live)
            outlook = self.selector.look(captured, publisher.branch, request.step, composite, measures)
            due = due_layers(
                captured, request.mask, outlook.context, head=composite, documents=documents, partial=request.partial
            )
            if publisher.announce(commit_id, request.step, head):
                return head, self.selector.decide(outlook, due), self.gauge.sample(live, due)
        raise too_fast(publisher.branch, request.step)

    def _seed(self, head: Head, captured: Capture) -> None:
        """Take what is stored as what the layers moved from, where nothing is known of that."""
        whole = head.whole
        contents = CompositeContents(whole, self._objects, head.documents)
        for layer in captured.layers:
            if layer in whole.versions and not self.gauge.knows(layer):
                try:
                    self.gauge.seed(layer, contents.weights(layer))
                except (MissingObjectError, DigestMismatchError, CorruptDocumentError) as error:
                    # It has no drift then, and so counts as most urgent.
                    tell_uncomparable(layer, error)

    def _plan(self, prepared: Prepared) -> list[PlannedLayer]:
        head = prepared.head
        # What every commit writes is not compared: it is a few kilobytes, and always of the commit's own step.
        stored = head.layer_documents() if head else {}
        planned = [plan_layer(layer, self.layout, stored.get(layer.name)) for layer in prepared.layers]
        due = prepared.decision.due
        if head is None:
            return planned
        planned = [
            replace(one, light=light_plan(head, one.capture.name, self.light))
            if due.get(one.capture.name) == "light"
            else one
            for one in planned
        ]
        coded = [
            plan_light(encoded, light_plan(head, name, self.light), self.layout)
            for name, encoded in prepared.encoded.items()
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
            for job in lightening_jobs(self._objects, layer, light_plan(head, layer.name, self.light), self.bases, keep)
        ]
        run_jobs(jobs, self._objects.workers)
        return encoded


def light_plan(head: Head, layer: str, settings: LightSettings) -> LightPlan:
    """Return how a layer that the branch has is to be written light."""
    base, document = head.base_of(layer)
    stored = head.documents[layer]
    previous = stored if stored.fidelity == "light" and stored.base_id == base.version_id else None
    return LightPlan(base, document, previous, settings)


def gathered_here(captured: Capture) -> Capture:
    """Return a capture with plain tensors only, where this process holds all of each; makes those that must be made.

    Raises:
        InvalidInputError: other processes hold parts of a tensor.
    """
    layers = {name: _whole_layer(layer) if layer.held else layer for name, layer in captured.layers.items()}
    return replace(captured, layers=layers)


def _whole_layer(layer: LayerCapture) -> LayerCapture:
    whole = {path: held.whole(f"array {path!r} of layer {layer.name!r}") for path, held in layer.held.items()}
    return replace(layer, arrays={**layer.arrays, **whole}, held={})


def discard(objects: Objects, written: Written) -> None:
    """Delete what an unpublished commit wrote; what cannot be deleted is swept by GC."""
    with contextlib.suppress(TailorError):
        failures = objects.delete(list(dict.fromkeys(written.keys)))
        if failures:
            logger.info("%d objects of an unpublished commit stay until gc sweeps them", len(failures))


def tell_uncomparable(layer: str, error: IntegrityError) -> None:
    """Warn of a layer whose stored version cannot be read."""
    logger.warning("layer %r cannot be compared with its stored version, which is damaged: %s", layer, error)


def capture_extra(captured: Capture, extra: Any) -> LayerCapture:  # noqa: ANN401
    """Return what every commit writes beside its layers.

    Raises:
        ExtraStateError: the caller's extra state holds what cannot be stored.
    """
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
