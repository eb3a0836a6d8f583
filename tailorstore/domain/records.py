"""Frozen records that travel between the floors. Pure data; units stand last in the names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from tailorstore.domain.light import LightTable
from tailorstore.domain.lines import LineRun

Fidelity = Literal["full", "light"]

EXTRA_LAYER = "@extra"
"""The pseudo-layer that every commit writes: param groups, RNG states, the caller's own state."""

DEFAULT_GRACE = timedelta(hours=24)
"""How long an object that nothing refers to is left alone: longer than any sane save or restore takes."""

DEFAULT_LEASE = timedelta(minutes=5)
"""How long a writer's or reader's claim lives when it is not renewed; it is renewed three times as often."""


@dataclass(frozen=True, slots=True)
class LayerVersion:
    """The bytes of one layer as of one step, as the catalog knows them."""

    layer: str
    """Name of the layer as derived from the model, unescaped."""
    version_id: str
    """Id of the commit that wrote it: a commit writes at most one version of each layer."""
    step: int
    """Source step."""
    digest: str
    """Content digest, ``xxh3-128:`` and 32 hex digits; equal content has equal digests."""
    bytes_logical: int
    """Size of the tensors, before codecs."""
    bytes_stored: int
    """Size of all its objects in storage."""
    objects: int
    """How many objects it has."""
    fidelity: Fidelity = "full"
    base_id: str | None = None
    """For a light version: the version id of the full version it is a difference to."""
    error: float | None = None
    """For a light version: its measured relative error."""
    damage: str | None = field(default=None, compare=False)
    """What ``verify`` found wrong with it, if it is in quarantine. No part of what it is: manifests do not have it."""


@dataclass(frozen=True, slots=True)
class LayerMeasures:
    """How one layer moves, as found just before a commit. Sizes are L2 norms over its parameters."""

    drift: float | None
    """Change of the weights since the layer's own last saved version."""
    relative_drift: float | None
    """The same over the norm of the weights."""
    momentum: float | None
    """The update that the optimizer is making at each step."""
    gradient: float | None
    """Quadratic mean of the gradient's norm since the commit before."""
    curvature: float | None
    """Sum of second moment times squared change: estimates what reverting the layer to that version would cost."""
    finite: bool = True
    """Whether neither weights nor slots hold NaN or infinities, as far as was looked; figures are ``None`` if not."""


MEASURES = ("drift", "relative_drift", "momentum", "gradient", "curvature")
"""Names of the figures of :class:`LayerMeasures`."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One published commit, as ``log`` shows it."""

    id: str
    step: int
    branch: str
    """The branch that it was committed on."""
    parent: str | None
    """Id of the commit that was the head before; it may have been expired since."""
    created_at: datetime
    """UTC, by the catalog's clock."""
    message: str | None
    metrics: Mapping[str, float]
    """The caller's numbers; NaN and infinities are kept, and never count as best."""
    layers_written: tuple[str, ...]
    """Layers of which this commit stored a new version, sorted, without ``@extra``."""
    bytes_written: int
    """Bytes of layer versions put into storage by this commit: tensors, documents and ``@extra``."""
    bytes_logical: int
    """Bytes that a full save of the same state would hold."""


@dataclass(frozen=True, slots=True)
class CommitDraft:
    """A commit that is about to be published: what ``catalog.publish`` needs beside the versions."""

    id: str
    step: int
    branch: str
    parent: str | None
    message: str | None
    metrics: Mapping[str, float]
    bytes_logical: int
    line: str | None = None
    """Id of the line that its manifest says it is on; ``None``: no manifest says anything."""
    created_at: datetime | None = None
    """When it was made, as its manifest says; ``None``: when it is published."""
    proof: str | None = None
    """Of the composite that it will have (:mod:`tailorstore.domain.proof`); ``None``: none is kept."""


@dataclass(frozen=True, slots=True)
class Composite:
    """A commit's full map from layer to layer version: a view, never bytes."""

    commit: Commit
    versions: Mapping[str, LayerVersion]
    """Every layer of the composite, ``@extra`` included, in sorted order."""
    bases: Mapping[str, LayerVersion] = field(default_factory=dict)
    """Layer → the full version that its light version is a difference to; only light layers."""

    @property
    def sources(self) -> dict[str, int]:
        """Source step of every layer."""
        return {name: version.step for name, version in self.versions.items()}

    @property
    def quarantined(self) -> dict[str, str]:
        """Layer → what is wrong with its version, or with the base that this one needs; only layers in quarantine."""
        of_bases = {name: base for name, base in self.bases.items() if base.damage}
        found = {name: f"its base of step {base.step}: {base.damage}" for name, base in of_bases.items()}
        found |= {name: version.damage for name, version in self.versions.items() if version.damage}
        return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class Binding:
    """Which catalog a root belongs to; stands in ``tailorstore.json`` and in the catalog."""

    store_id: str
    catalog_id: str
    epoch: int
    """Grows by one at each take-over, so that the catalog that lost the root can tell."""


@dataclass(frozen=True, slots=True)
class RefRecord:
    """A change of a tag or branch, kept in the root so that a lost catalog can be rebuilt."""

    id: str
    kind: Literal["tag", "branch"]
    name: str
    commit: str | None
    """Id of the commit the name points to from now on; ``None``: the name is gone."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class CommitManifest:
    """All of one commit, as it stands in the root: what a catalog is rebuilt from."""

    binding: Binding
    commit: Commit
    versions: Mapping[str, LayerVersion]
    bases: Mapping[str, LayerVersion] = field(default_factory=dict)
    """As :attr:`Composite.bases`."""
    measures: Mapping[str, LayerMeasures] = field(default_factory=dict)
    """Layer → what was measured when the commit was made, before it wrote."""
    lines: tuple[LineRun, ...] = ()
    """The line that the commit is on, and those that it descends from, back to the first. Never empty in a root."""


Standing = Literal["announced", "published", "voided", "abandoned", "expired", "unplaced", "unreadable"]
"""What a catalog knows of a commit id.

``voided``: its lease lapsed; ``abandoned``: its writer gave it up; ``unplaced``: a rebuild found a manifest of it that
was never published, or layers and no manifest; ``unreadable``: it found one that says nothing, or a record of a tag or
branch of that id which does.
"""


@dataclass(frozen=True, slots=True)
class Reference:
    """A tag or a branch, as ``tags()`` and ``branches()`` show them."""

    name: str
    commit: str | None
    """Id of the commit; ``None`` for a branch that has no commit yet."""
    step: int | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of the newest composite of a branch, as ``store.layers()`` shows it."""

    name: str
    source_step: int
    staleness: int
    """Steps between the composite's step and the source step."""
    fidelity: Fidelity
    version_id: str
    bytes_logical: int
    bytes_stored: int
    versions: int
    """How many versions of the layer the store holds."""
    base_step: int | None = None
    """For a light version: the step of its base."""
    error: float | None = None
    """For a light version: the relative error of its weights."""
    quarantined: str | None = None
    """What ``verify`` found wrong with it or its base, if that is in quarantine."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts and sizes of a store, from the catalog alone."""

    commits: int
    branches: int
    tags: int
    layers: int
    versions: int
    versions_doomed: int
    """Versions that lost their standing and wait for the grace period to end."""
    bytes_logical: int
    """What full saves at every published commit would hold."""
    bytes_stored: int
    """What the live versions take."""
    bytes_doomed: int
    """What the next sweeps will free."""
    leases: int


@dataclass(frozen=True, slots=True)
class Expired:
    """What dropping commits from the catalog did, or, as a preview, would do."""

    commits: tuple[Commit, ...]
    """Dropped commits; those that a branch, tag or lease protects are not among them."""
    versions_doomed: int
    """Versions that no remaining commit needs."""
    bytes_doomed: int
    """What these take in storage."""


@dataclass(frozen=True, slots=True)
class DiffEntry:
    """How one layer differs between two composites."""

    layer: str
    change: Literal["same", "changed", "added", "removed"]
    """``same``: equal content, whatever the source steps."""
    step_a: int | None
    step_b: int | None
    bytes_logical: int
    """Size of the layer in the later composite that has it."""


@dataclass(frozen=True, slots=True)
class CommitDiff:
    """What changed from one commit to another, layer by layer. No tensor bytes are read."""

    a: Commit
    b: Commit
    entries: tuple[DiffEntry, ...]

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the layers whose content differs."""
        return tuple(entry.layer for entry in self.entries if entry.change != "same")


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a GC run did, or, dry, would do."""

    dry_run: bool
    kept: Mapping[str, tuple[str, ...]]
    """Commit id to the reasons it is kept, for every kept commit."""
    expired: tuple[Commit, ...]
    """Commits dropped from the catalog."""
    versions_doomed: int
    """Versions that nothing refers to any more; swept once the grace period is over."""
    bytes_doomed: int
    versions_swept: int
    """Doomed versions whose objects were deleted."""
    leftovers_swept: int
    """Unpublished versions and documents of crashed commits that were deleted."""
    objects_deleted: int
    bytes_freed: int
    deletes_failed: int
    """Left for the next run; never fatal."""
    grace: timedelta

    @property
    def bytes_to_free(self) -> int:
        """Bytes that this run freed (dry: would free), and those that it leaves to be freed after the grace period."""
        freed_already = not self.dry_run and not self.grace
        return self.bytes_freed + (0 if freed_already else self.bytes_doomed)


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that ``verify`` found wrong."""

    kind: Literal["missing", "short", "long", "flipped", "document"]
    layer: str
    """Empty where it is a manifest, or the record of a change of a tag or branch."""
    step: int
    """0 where it is such a record."""
    key: str
    detail: str
    commits: tuple[str, ...] = ()
    """Ids of the commits whose composites hold it, or a light version that needs it."""
    version_id: str | None = None
    """Of the layer version; ``None`` where it is a manifest or a record."""
    readable: bool = False
    """Whether all values can be read all the same: other Zarr readers miss it, or a rebuild would."""
    mended: bool = False
    """Whether it was made again, exactly."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What one composite loses by what ``verify`` found."""

    commit: str
    step: int
    branch: str
    layers: tuple[str, ...]
    """Layers whose values cannot all be read; sorted."""
    manifest: bool = False
    """Whether its manifest is gone or not what was written: a rebuild of the catalog would not find the commit."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """An object of the root that nothing explains."""

    key: str
    bytes: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` read and what it found."""

    versions: int
    objects: int
    bytes_read: int
    damages: tuple[Damage, ...]
    losses: tuple[Loss, ...] = ()
    """By commit, what of it is lost and was not mended; by step."""
    unknown: tuple[Unknown, ...] = ()
    """Of a whole store: objects that nothing explains. They do no harm, and GC sweeps those that are its own."""
    awaiting_gc: int = 0
    """Of a whole store: objects of expired and unpublished commits that wait for GC."""
    quarantined: tuple[str, ...] = ()
    """Prefixes of the damaged layer versions that are in quarantine: since this repair, or since an earlier one."""
    lifted: tuple[str, ...] = ()
    """Prefixes of those that were in quarantine and are whole again."""
    unrecorded: tuple[str, ...] = ()
    """Of a whole store: tags and branches, as ``tag best``, whose last change is not on record, so that a rebuild would
    not find it. No damage: a process that dies just before it records a change leaves one."""
    recorded: tuple[str, ...] = ()
    """Those that a repair recorded."""

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written, or was made so again."""
        return all(damage.mended for damage in self.damages)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """How one tensor is laid out as a Zarr array."""

    dtype: str
    """Name of the torch dtype without its module: ``float32``, ``bfloat16``, ``float8_e4m3fn``, …"""
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    """Regular chunk grid; edge chunks are padded with zeros to full size, as Zarr asks."""
    codec: str = "none"


@dataclass(frozen=True, slots=True)
class ArrayRecord:
    """One stored array: its layout and the digests of its chunks."""

    path: str
    """Key below the layer version's prefix, escaped."""
    spec: ArraySpec
    digests: tuple[str, ...]
    """XXH3-128 of each chunk's elements (padding left out), in C order of the chunk grid; 32 hex digits each."""
    sizes: tuple[int, ...]
    """Size in bytes of each chunk's object."""


@dataclass(frozen=True, slots=True)
class LayerDocument:
    """Everything about one layer version that is not an array element: lives in its group's ``zarr.json``."""

    layer: str
    version_id: str
    step: int
    content: Mapping[str, Any]
    """JSON skeleton of the layer's state; ``{"$array": path}`` stands where an array goes."""
    arrays: Mapping[str, ArrayRecord] = field(default_factory=dict)
    """By path."""
    fidelity: Fidelity = "full"
    base_id: str | None = None
    documents: Mapping[str, str] = field(default_factory=dict)
    """Key below the prefix → digest, of every other metadata document of the version: what Zarr readers read."""
    light: LightTable | None = None
    """For a light version: where its tensors stand in its arrays."""
    error: float | None = None
    """For a light version: relative L2 error of its weights."""

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Array path → dtype and shape of every tensor of the layer, however it is stored."""
        if self.light is not None:
            return {path: (tensor.dtype, tensor.shape) for path, tensor in self.light.tensors.items()}
        return {path: (record.spec.dtype, record.spec.shape) for path, record in self.arrays.items()}
