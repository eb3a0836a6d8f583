"""A commit that all ranks make together. DESIGN.md, "Many ranks", has the order of its collectives.

Every rank describes what it has, all agree on what they have together; the coordinator, which alone talks to the
catalog, decides and announces; every rank writes its share; the coordinator publishes.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tailorstore.domain.chunks import box_of
from tailorstore.domain.errors import (
    CorruptDocumentError,
    DigestMismatchError,
    MissingObjectError,
    RankLostError,
    RanksDisagreeError,
)
from tailorstore.domain.light import LightSettings
from tailorstore.domain.mask import Mask, Strategy
from tailorstore.domain.names import LayerRule, new_id
from tailorstore.domain.records import Commit, CommitDraft, Fidelity, LayerMeasures
from tailorstore.engine.commit import Request, discard, tell_uncomparable
from tailorstore.engine.contents import CompositeContents
from tailorstore.engine.light.bases import BaseCache, default_limit_bytes
from tailorstore.engine.observed import HISTORY
from tailorstore.engine.plan import Layout, due_layers
from tailorstore.engine.publish import ANNOUNCE_ATTEMPTS, Head, Publisher, check_binding, following, too_fast
from tailorstore.engine.ranks.extra import gather_extra, own_extra, settled_extra
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.local import local_capture
from tailorstore.engine.ranks.outline import Whole, outline_of, unite
from tailorstore.engine.ranks.pieces import own_pieces
from tailorstore.engine.ranks.plan import plan_writing
from tailorstore.engine.ranks.records_json import (
    commit_from_json,
    commit_to_json,
    head_from_json,
    head_to_json,
    measures_from_json,
    measures_to_json,
)
from tailorstore.engine.ranks.replicas import check_replicas, digests_of, sampled_replicas
from tailorstore.engine.ranks.words import listed
from tailorstore.engine.ranks.writing import CollectiveWriter, Task
from tailorstore.engine.selection import STATE, Decision, Selector
from tailorstore.engine.tensors.capture import Capture, LayerCapture, capture, slots_of, weights_of
from tailorstore.engine.tensors.measures import Gauge, Samples
from tailorstore.engine.tensors.shards import Part, Sharded
from tailorstore.engine.tensors.staging import HostArena
from tailorstore.engine.tensors.tallies import figures, tally_from_json
from tailorstore.storage.layers import canonical_json
from tailorstore.storage.transport import Objects

_NOTHING = LayerMeasures(None, None, None, None, None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the coordinator decided, and every rank goes by."""

    commit_id: str
    due: Mapping[str, Fidelity]
    measures: Mapping[str, LayerMeasures]


@dataclass(frozen=True, slots=True)
class CollectivePrepared:
    """An announced commit: all that this rank's part of writing and publishing it needs."""

    draft: CommitDraft
    task: Task
    samples: Samples
    verdict: Verdict
    decision: Decision | None
    """On the coordinator."""


@dataclass(slots=True)
class CollectiveCommitter:
    """One rank's side of the commits of one branch; all ranks call each method together. One commit at a time."""

    ranks: Ranks
    objects: Objects
    open_publisher: Callable[[], Publisher]
    """Asked at the first commit, on the coordinator."""
    branch: str
    layout: Layout
    rule: LayerRule
    light: LightSettings
    gauge: Gauge
    bases: BaseCache = field(init=False)
    arena: HostArena = field(default_factory=HostArena)
    head: Head | None = None
    """The newest that this rank knows."""
    publisher: Publisher | None = None
    """On the coordinator, from the first commit on."""
    _overtaken: bool = False
    """On the coordinator: somebody else has written, and the ranks have not yet forgotten what they compared with."""
    _selector: Selector = field(init=False)

    def __post_init__(self) -> None:
        """Begin to look at the branch's layers."""
        self._selector = Selector(self.light, self._steps)
        neighbours = self.ranks.hosts.count(self.ranks.hosts[self.ranks.rank])
        self.bases = BaseCache(default_limit_bytes() // neighbours)

    def close(self) -> None:
        """Give host memory back."""
        self.arena.release()
        self.bases.clear()

    def _steps(self) -> list[int]:
        return self.publisher.catalog.steps(self.branch, HISTORY) if self.publisher is not None else []

    def prepare(self, make: Callable[[], Request], *, staged: bool) -> CollectivePrepared:
        """Agree on what to write and announce it; copy this rank's share to the host if ``staged``.

        Whatever it raises, call :meth:`abandon` then.

        Raises:
            RanksDisagreeError: step, mask, branch, settings or model are not the same everywhere; nothing was written.
            InvalidInputError: mask, step, model or extra state cannot be committed; nothing was written.
            RankLostError: another rank died or did not call; nothing was written.
            UnavailableError: catalog or storage could not be reached; nothing was written.
        """
        with self.ranks.together("preparing a commit"):
            # What fails on a rank in here is raised on all of them: where they next wait for each other.
            if self.ranks.is_coordinator and self.publisher is None:
                self.publisher = self.open_publisher()
            return self._prepare(make(), staged=staged)

    def _prepare(self, request: Request, *, staged: bool) -> CollectivePrepared:
        ranks = self.ranks
        captured = capture(request.model, request.optim, self.rule)
        if isinstance(request.mask, Iterator):
            request = replace(request, mask=tuple(request.mask))  # it is looked at twice
        whole = self._agree(request, captured)
        replicas = sampled_replicas(ranks.rank, whole, captured)
        mine = own_extra(ranks, captured, whole.captured, request.extra)
        fresh = self._look()
        said = ranks.gather([digests_of(replicas), mine.fingerprint, fresh, _mark_of(self.head)])
        check_replicas(ranks, replicas, [found for found, *_ in said])
        extra = gather_extra(ranks, mine, [fingerprint for _, fingerprint, _, _ in said])
        self._follow(said[0][2], [head for *_, head in said])
        local = local_capture(captured, _spokesman(whole, ranks.rank))
        verdict, decision = self._announce(request, whole, local)
        samples = self._sampled(local, verdict.due)
        if extra is not None and decision is not None:
            extra.content[STATE] = decision.state
            extra = settled_extra(extra, staged=staged)
        plan = plan_writing(whole, verdict.due, self.layout, ranks.hosts, ranks.rank)
        pieces = own_pieces(plan, captured, ranks.rank, self.arena if staged else None)
        moved = frozenset(name for name, found in verdict.measures.items() if found.drift)
        task = Task(verdict.commit_id, request.step, whole, plan, pieces, extra, self.head, moved)
        logical = sum(layer.nbytes for layer in whole.captured.layers.values()) + (extra.nbytes if extra else 0)
        logical += self.head.bytes_beside(whole.captured.layers) if self.head else 0
        draft = CommitDraft(
            id=verdict.commit_id,
            step=request.step,
            branch=self.branch,
            parent=_id_of(self.head),
            message=request.message,
            metrics=request.metrics,
            bytes_logical=logical,
        )
        return CollectivePrepared(draft, task, samples, verdict, decision)

    def abandon(self) -> None:
        """Give up what this rank announced, if it did."""
        if self.publisher is not None:
            self.publisher.abandon()

    def carry_out(self, prepared: CollectivePrepared) -> Commit:
        """Write, seal and publish an announced commit.

        Raises:
            RankLostError: another rank died: nothing was published, unless it was the coordinator at the very end:
                ``log`` tells. What was written is swept by GC.
            TailorError: of any rank, on all of them, as ``Publisher.publish`` has them.
        """
        ranks, draft = self.ranks, prepared.draft
        writer = CollectiveWriter(ranks, self.objects, self.layout, self.light, self.bases, prepared.task)
        published: dict[str, Any] | None = None
        try:
            with ranks.together("writing a commit"):
                if self.publisher is not None:
                    # Looked at twice: here so that a lost root costs nothing, and again when all is written.
                    check_binding(self.objects, self.publisher.binding)
                sealed = writer.write()
                if self.publisher is not None:
                    published = commit_to_json(
                        self.publisher.publish(draft, self.head, sealed, prepared.verdict.measures)
                    )
                commit = commit_from_json(ranks.share(published))
        except BaseException as error:
            self.abandon()
            # Where ranks are lost nobody knows how far the others are.
            if not writer.handed_over and not isinstance(error, RankLostError):
                discard(self.objects, writer.written)
            raise
        self.head = self.publisher.head if self.publisher is not None else following(self.head, commit, sealed)
        self.gauge.keep(prepared.samples)
        if prepared.decision is not None:
            self._selector.published(prepared.decision, commit, writer.written.unchanged)
        return commit

    def _agree(self, request: Request, captured: Capture) -> Whole:
        """Make sure that all ranks were given the same, and return what they have together."""
        ranks = self.ranks
        outline = outline_of(captured)
        given = {
            "step": request.step,
            "branch": self.branch,
            "mask": _mask_text(request.mask),
            "partial": request.partial,
            "settings": repr((self.layout, self.light)),
        }
        every = ranks.gather([given, outline.digest, outline.boxes])
        check_agreement([said for said, _, _ in every], "what to commit")
        digests = [digest for _, digest, _ in every]
        # Structures travel only where they differ.
        structures = {outline.digest: outline.structure}
        if len(set(digests)) > 1:
            for digest in dict.fromkeys(digests):
                source = digests.index(digest)
                structures[digest] = ranks.share_bytes(outline.structure if source == ranks.rank else None, source)
        boxes = [[[tuple(map(tuple, box)) for box in kind] for kind in kinds] for _, _, kinds in every]
        return unite(digests, boxes, structures, captured)

    def _announce(self, request: Request, whole: Whole, local: Capture) -> tuple[Verdict, Decision | None]:
        """Decide on the branch's head and announce the commit on it."""
        ranks, publisher, commit_id = self.ranks, self.publisher, new_id()
        for attempt in range(ANNOUNCE_ATTEMPTS):
            if attempt:
                fresh = self._look()
                said = ranks.gather([fresh, _mark_of(self.head)])
                self._follow(said[0][0], [head for _, head in said])
            self._seed(local)
            tallies = ranks.gather({name: found.as_json() for name, found in self.gauge.tally(local).items()})
            decision: Decision | None = None
            described: dict[str, Any] | None = None
            if publisher is not None:
                found = figures([{name: tally_from_json(one) for name, one in told.items()} for told in tallies])
                measures = {name: found.get(name, _NOTHING) for name in whole.captured.layers}
                decision = self._decide(request, whole, measures, commit_id, publisher)
                if decision is not None:
                    described = {"id": commit_id, "due": dict(decision.due), "measures": measures_to_json(measures)}
            verdict = ranks.share(described)
            if verdict is not None:
                return Verdict(verdict["id"], verdict["due"], measures_from_json(verdict["measures"])), decision
        raise too_fast(self.branch, request.step)

    def _look(self) -> bool:
        """Bring the coordinator to the branch's head; return whether somebody else has written since."""
        if self.publisher is None:
            return False
        self.head = self.publisher.look()
        composite, documents = (self.head.composite, self.head.documents) if self.head else (None, {})
        self._overtaken |= self._selector.follow(composite, documents)
        return self._overtaken

    def _follow(self, fresh: bool, heads: Sequence[str | None]) -> None:
        """Bring the other ranks to the coordinator's head.

        Args:
            fresh: whether somebody else has written since.
            heads: mark of the head that each rank knows.
        """
        if len(set(heads)) > 1:
            described = canonical_json(head_to_json(self.head)) if self.ranks.is_coordinator and self.head else b""
            raw = self.ranks.share_bytes(described)
            if not self.ranks.is_coordinator:
                self.head = head_from_json(json.loads(raw)) if raw else None
        if fresh:
            self.gauge.forget_all()
            self._overtaken = False

    def _seed(self, local: Capture) -> None:
        """Take what is stored as what this rank's part of the layers moved from, where nothing is known of that."""
        if self.head is None:
            return
        whole = self.head.whole
        contents = CompositeContents(whole, self.objects, self.head.documents)
        for name, layer in local.layers.items():
            if name in whole.versions and not self.gauge.knows(name):
                try:
                    self.gauge.seed(name, _stored_parts(contents, layer))
                except (MissingObjectError, DigestMismatchError, CorruptDocumentError) as error:
                    tell_uncomparable(name, error)

    def _sampled(self, local: Capture, due: Mapping[str, Fidelity]) -> Samples:
        """Sample what this rank speaks for of the layers that are due, and forget what it knew of the others."""
        samples = self.gauge.sample(local, [name for name in due if name in local.layers])
        return replace(samples, layers={**{name: {} for name in due}, **samples.layers})

    def _decide(
        self,
        request: Request,
        whole: Whole,
        measures: Mapping[str, LayerMeasures],
        commit_id: str,
        publisher: Publisher,
    ) -> Decision | None:
        """Resolve the mask and announce the commit; ``None`` if the branch has moved meanwhile."""
        head = self.head
        composite, documents = (head.composite, head.documents) if head else (None, {})
        outlook = self._selector.look(whole.captured, self.branch, request.step, composite, measures)
        due = due_layers(
            whole.captured, request.mask, outlook.context, head=composite, documents=documents, partial=request.partial
        )
        if not publisher.announce(commit_id, request.step, head):
            return None
        return self._selector.decide(outlook, due)


def check_agreement(said: list[Mapping[str, Any]], what: str) -> None:
    """Make sure that all ranks of a collective call were given the same.

    Raises:
        RanksDisagreeError: names what differs and the ranks; raised on all of them alike.
    """
    problems = []
    for key in said[0]:
        values: dict[str, list[int]] = {}
        for rank, found in enumerate(said):
            values.setdefault(str(found[key]), []).append(rank)
        if len(values) > 1:
            shown = "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in values.items())
            problems.append(f"{key}: {shown}")
    if problems:
        msg = f"the ranks disagree on {what}: {'. '.join(problems)}. Nothing was written; pass the same on every rank"
        raise RanksDisagreeError(msg)


def _ranks(ranks: list[int]) -> str:
    return f"rank {listed(ranks)}" if len(ranks) == 1 else f"ranks {listed(ranks)}"


def _mask_text(mask: Mask) -> str:
    """Return what two ranks that were given the same mask have in common."""
    if isinstance(mask, Strategy):
        text = repr(mask)
        # The default form of an object has its address in it.
        return text if " at 0x" not in text else type(mask).__qualname__
    if isinstance(mask, Mapping):
        return repr(sorted(mask.items(), key=str))
    if isinstance(mask, str | type) or not isinstance(mask, Iterable):
        return repr(mask)
    return repr(sorted(mask, key=str))


def _spokesman(whole: Whole, rank: int) -> Callable[[str, str], bool]:
    """Return what tells whether this rank speaks for its part of an array: of replicas, one does.

    A parameter and its slots are spoken for by the same rank; which of the replicas goes by the parameter's place.
    """
    owner: dict[tuple[str, str], str] = {}
    for name, layer in whole.captured.layers.items():
        owner |= {(name, path): param for path, param in weights_of(layer).items()}
        owner |= {(name, path): param for path, (param, _) in slots_of(layer).items()}
    places = {param: place for place, param in enumerate(dict.fromkeys(owner.values()))}

    def speaks(layer: str, path: str) -> bool:
        place = places.get(owner.get((layer, path), ""), 0)
        for holding in whole.holdings.get(layer, {}).get(path, ()):
            if rank in holding.ranks:
                return holding.ranks[place % len(holding.ranks)] == rank
        return False

    return speaks


def _stored_parts(contents: CompositeContents, local: LayerCapture) -> dict[str, Sharded]:
    """Read what is stored of those parameters of a layer that this rank speaks for: its parts of them, by name."""
    found = {}
    stored = contents.documents()[local.name].tensors
    for name, value in (local.content["params"] or local.content["buffers"]).items():
        path = value["$array"]
        whole = local.arrays[path]
        held = local.held.get(path)
        shape = tuple(whole.shape)
        if path not in stored or stored[path][1] != shape:
            continue  # another model: the coordinator refuses it
        boxes = [part.box for part in held.parts] if held is not None else [box_of(shape)]
        parts = tuple(Part(box, contents.part(local.name, path, box)) for box in boxes)
        found[name] = Sharded(shape, whole.dtype, parts)
    return found


def _mark_of(head: Head | None) -> str | None:
    return head.mark if head is not None else None


def _id_of(head: Head | None) -> str | None:
    return head.composite.commit.id if head is not None else None
