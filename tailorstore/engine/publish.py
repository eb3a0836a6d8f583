"""The two ends of a commit: announced on a branch's head, and published as its next one.

The publication is one SQL transaction that compares the branch's head; everything before it can be thrown away.
"""

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.errors import HeadMovedError, RootTakenError, TailorError
from tailorstore.domain.lines import LineRun
from tailorstore.domain.names import ROOT_DOCUMENT
from tailorstore.domain.proof import proof_of_versions
from tailorstore.domain.records import (
    EXTRA_LAYER,
    Binding,
    Commit,
    CommitDraft,
    CommitManifest,
    Composite,
    LayerDocument,
    LayerMeasures,
    LayerVersion,
)
from tailorstore.engine.leases import LeaseKeeper
from tailorstore.engine.read import load_documents
from tailorstore.storage.layers import SealedLayer
from tailorstore.storage.manifests import read_binding, write_manifest
from tailorstore.storage.transport import Objects

ANNOUNCE_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Head:
    """A branch's newest composite with its documents, as this process last saw it."""

    composite: Composite
    documents: Mapping[str, LayerDocument]
    """Of all layers but those in quarantine: what is damaged is equal to nothing, and the base of nothing."""
    base_documents: Mapping[str, LayerDocument]
    """Of the bases of light versions."""

    @property
    def mark(self) -> str:
        """What is the same only for the same composite with the same layers in quarantine."""
        return " ".join((self.composite.commit.id, *self.composite.quarantined))

    @property
    def whole(self) -> Composite:
        """The composite without the layers in quarantine."""
        composite, quarantined = self.composite, self.composite.quarantined
        return replace(
            composite,
            versions={name: version for name, version in composite.versions.items() if name not in quarantined},
            bases={name: base for name, base in composite.bases.items() if name not in quarantined},
        )

    def base_of(self, layer: str) -> tuple[LayerVersion, LayerDocument]:
        """Return the newest full version of a layer, and its document."""
        version = self.composite.versions[layer]
        if version.fidelity == "full":
            return version, self.documents[layer]
        return self.composite.bases[layer], self.base_documents[layer]

    def bytes_beside(self, layers: Collection[str]) -> int:
        """Return the size of the tensors of all layers but these and ``@extra``."""
        versions = self.composite.versions.items()
        return sum(version.bytes_logical for name, version in versions if name not in {*layers, EXTRA_LAYER})

    def layer_documents(self) -> dict[str, LayerDocument]:
        """Return the documents of all layers but ``@extra``."""
        return {name: document for name, document in self.documents.items() if name != EXTRA_LAYER}


def following(head: Head | None, commit: Commit, sealed: Mapping[str, SealedLayer]) -> Head:
    """Return the head that a commit makes of the one before and the layers that it wrote."""
    fresh = {name: layer.version for name, layer in sealed.items()}
    versions: dict[str, LayerVersion] = dict(head.composite.versions) if head else {}
    versions |= fresh
    light = [name for name, version in sorted(versions.items()) if version.fidelity == "light"] if head else []
    # Of a light version in quarantine that stays the base stays, too, whether or not it can be read.
    kept = {name: head.composite.bases[name] for name in light if head and name not in fresh}
    based = {name: head.base_of(name) for name in light if head and name not in head.composite.quarantined}
    bases = kept | {name: base for name, (base, _) in based.items()}
    documents = dict(head.documents) if head else {}
    documents |= {name: layer.document for name, layer in sealed.items()}
    composite = Composite(commit, dict(sorted(versions.items())), dict(sorted(bases.items())))
    return Head(composite, documents, {name: document for name, (_, document) in based.items()})


@dataclass(slots=True)
class Publisher:
    """Announces and publishes the commits of one branch. One commit at a time."""

    objects: Objects
    catalog: StoreCatalog
    binding: Binding
    keeper: LeaseKeeper
    branch: str
    head: Head | None = None
    """The newest that is known; looked at anew for each commit."""
    claim: str | None = None
    """Commit that is announced, or may be: an interrupt can come between the catalog's doing it and its word."""

    def look(self) -> Head | None:
        """Return the branch's head, reading what is not in memory; ``None`` before its first commit."""
        commit = self.catalog.head(self.branch)
        if commit is None:
            return None
        # What was verified since may be in quarantine, and what was, whole again.
        if self.head is not None and self.head.composite.commit.id == commit.id and not self._is_outdated(self.head):
            return self.head
        composite = self.catalog.composite(commit.id)
        known = self.head.documents if self.head else None
        known_bases = self.head.base_documents if self.head else None
        whole = Head(composite, {}, {}).whole
        self.head = Head(
            composite,
            load_documents(self.objects, whole.versions.values(), known),
            load_documents(self.objects, whole.bases.values(), known_bases),
        )
        return self.head

    def _is_outdated(self, head: Head) -> bool:
        """Tell whether other versions than this head knows of are in quarantine by now."""
        composite, quarantine = head.composite, self.catalog.in_quarantine()
        versions = [*composite.versions.values(), *composite.bases.values()]
        return any(version.damage != quarantine.get((version.layer, version.version_id)) for version in versions)

    def announce(self, commit_id: str, step: int, head: Head | None) -> bool:
        """Announce a commit that is to follow a head; returns whether that still is the branch's.

        Raises:
            StepOrderError, BadNameError, TagExistsError, RootTakenError, UnavailableError: nothing was announced.
        """
        self.claim = commit_id
        try:
            announced = self.catalog.announce(commit_id, self.branch, step, self.keeper.lease)
        except TailorError:
            self.claim = None
            raise
        if (announced.id if announced else None) == (head.composite.commit.id if head else None):
            self.keeper.hold(commit_id)
            return True
        # Another process published between the two looks.
        self.catalog.abandon(commit_id)
        self.claim = None
        return False

    def abandon(self) -> None:
        """Give up what is announced, if anything is."""
        if self.claim is None:
            return
        self.keeper.forget(self.claim)
        with contextlib.suppress(TailorError):
            self.catalog.abandon(self.claim)
        self.claim = None

    def publish(
        self,
        draft: CommitDraft,
        head: Head | None,
        sealed: Mapping[str, SealedLayer],
        measures: Mapping[str, LayerMeasures],
    ) -> Commit:
        """Write the manifest of an announced commit, and publish it.

        Args:
            draft: the commit.
            head: that it was announced on.
            sealed: what it wrote, ``@extra`` included; all durable.
            measures: by layer.

        Raises:
            HeadMovedError, LeaseExpiredError, RootTakenError: somebody else was faster; nothing is visible, and what
                was written is swept by GC.
            UnavailableError, AccessDeniedError: as before; after a failure of the catalog at the very end the commit
                may have been published: ``log`` tells.
        """
        # From here on nothing is deleted, whatever fails: once a manifest may exist, whoever takes the root over may
        # have found it and published the commit. What nobody published is swept by GC, the manifest first.
        try:
            follower = following(head, self._expected(draft, sealed), sealed)
            composite = follower.composite
            # A branch that does not exist yet begins a line, which is named by its first commit.
            lines = self.catalog.lines_of(draft.branch) or (LineRun(draft.id),)
            manifest = CommitManifest(
                self.binding, composite.commit, composite.versions, composite.bases, measures, lines
            )
            write_manifest(self.objects, manifest)
            check_binding(self.objects, self.binding)
            described = replace(
                draft,
                line=lines[0].line,
                created_at=composite.commit.created_at,
                proof=proof_of_versions(draft.id, draft.step, composite.versions.values()),
            )
            commit = self.catalog.publish(described, [layer.version for layer in sealed.values()], measures)
        except BaseException:
            self.abandon()
            self.head = None
            raise
        self.keeper.forget(draft.id)
        self.claim = None
        self.head = replace(follower, composite=replace(composite, commit=commit))
        return commit

    def _expected(self, draft: CommitDraft, sealed: Mapping[str, SealedLayer]) -> Commit:
        return Commit(
            id=draft.id,
            step=draft.step,
            branch=draft.branch,
            parent=draft.parent,
            created_at=self.catalog.now(),
            message=draft.message,
            metrics=draft.metrics,
            layers_written=tuple(sorted(name for name in sealed if name != EXTRA_LAYER)),
            bytes_written=sum(layer.version.bytes_stored for layer in sealed.values()),
            bytes_logical=draft.bytes_logical,
        )


def too_fast(branch: str, step: int) -> HeadMovedError:
    """Return the error for a branch that somebody else commits on all the time."""
    msg = (
        f"branch {branch!r} moves faster than step {step} can be announced: stop the other trainer, or open the store"
        " with a branch of your own (branch=…)"
    )
    return HeadMovedError(msg)


def check_binding(objects: Objects, binding: Binding) -> None:
    """Make sure that this catalog still owns the root.

    Raises:
        RootTakenError: another catalog took it over, or its document is gone.
    """
    found = read_binding(objects)
    if found != binding:
        if found is None:
            msg = (
                f"the {ROOT_DOCUMENT} of {objects.url} is gone, which says whose it is: nothing was published or"
                " deleted. rebuild_catalog() ('tailorstore rebuild') makes a new one"
            )
            raise RootTakenError(msg)
        msg = (
            f"the root {objects.url} belongs to catalog {found.catalog_id} (epoch {found.epoch}) now, not to this one"
            f" ({binding.catalog_id}, epoch {binding.epoch}): nothing was published or deleted. Open it with that"
            " catalog, or take it back with rebuild_catalog()"
        )
        raise RootTakenError(msg)
