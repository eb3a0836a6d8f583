"""Verification: read every object of layer versions and commits, and compare it with its digest.

Memory: of chunks that are stored as they are, a block per thread; of compressed ones at most 256 MiB with what they
decode to; the documents of as many versions as there are threads; a row of the catalog for every version.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import replace
from functools import partial
from typing import Any

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.chunks import Chunk, chunks_of
from tailorstore.domain.errors import (
    CorruptDocumentError,
    DigestMismatchError,
    FormatTooNewError,
    InvalidInputError,
    MissingObjectError,
    RefNotFoundError,
)
from tailorstore.domain.names import manifest_key, version_prefix
from tailorstore.domain.records import (
    ArrayRecord,
    Commit,
    CommitManifest,
    Damage,
    LayerVersion,
    Loss,
    VerifyReport,
)
from tailorstore.engine.gc import Progress
from tailorstore.engine.read import nowhere
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.layers import GROUP_DOCUMENT, chunk_digest, load_document, object_key, read_chunk
from tailorstore.storage.manifests import read_manifest
from tailorstore.storage.threads import Job, MemoryBudget, run_jobs
from tailorstore.storage.transport import Memory, Objects

Pair = tuple[str, str]
"""Layer and version id."""

Remember = Callable[[Collection[LayerVersion], Collection[str]], None]
"""Is told now and then which versions, and the manifests of which commits, have been read."""

_BUDGET_BYTES = 256 << 20
_DOCUMENT_BYTES = 1 << 20
"""No document of an array, or of a group between, comes near."""

_REMEMBERED_TOGETHER = 500
_TOLD_BYTES = 64 << 20


def pair_of(version: LayerVersion) -> Pair:
    """Return what identifies a version in a store."""
    return version.layer, version.version_id


class Verification:
    """Reads versions and manifests, each once, and keeps what it found. Damage is reported, never raised."""

    def __init__(
        self,
        objects: Objects,
        catalog: StoreCatalog,
        progress: Progress | None = None,
        remember: Remember | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            objects: the root.
            catalog: says what its objects should be, and which commits hold a damaged version.
            progress: is told how many versions and bytes are done.
            remember: called from any thread, one at a time.
        """
        self._objects = objects
        self._catalog = catalog
        self._tell = progress or (lambda *_: None)
        self._remember = remember or (lambda *_: None)
        self._lock = threading.Lock()
        self._remembering = threading.Lock()
        self._budget = MemoryBudget(_BUDGET_BYTES)
        self._read: dict[Pair, LayerVersion] = {}
        self._damages: list[Damage] = []
        self._too_new: set[str] = set()
        self._standing: set[str] = set()
        self._commits: dict[str, Commit] = {}
        self._done: list[LayerVersion] = []
        self._manifests: list[str] = []
        self._objects_read = 0
        self._bytes_read = self._bytes_told = self._bytes_all = 0
        self._versions_done = 0

    @property
    def versions(self) -> Mapping[Pair, LayerVersion]:
        """What was read."""
        return self._read

    @property
    def too_new(self) -> Set[str]:
        """Keys of damages that are documents of a newer version of tailorstore. A repair leaves them alone."""
        return self._too_new

    @property
    def standing(self) -> Set[str]:
        """Keys of damages that are manifests of this store and commit, with a checksum that holds."""
        return self._standing

    def read(self, versions: Iterable[LayerVersion], commits: Iterable[str] = ()) -> None:
        """Read every object of layer versions and the manifests of commits, in parallel; what was read before is not.

        Raises:
            UnavailableError, AccessDeniedError: storage or catalog cannot be read at all.
        """
        fresh = {pair_of(version): version for version in versions if pair_of(version) not in self._read}
        self._read |= fresh
        self._bytes_all += sum(version.bytes_stored for version in fresh.values())
        checks = [_VersionCheck(self, version) for version in fresh.values()]
        manifests = [partial(self._check_manifest, commit_id) for commit_id in commits]
        run_jobs([*(check.open for check in checks), *manifests], self._objects.workers)
        self._flush(1)

    def damages(self) -> tuple[Damage, ...]:
        """Return what was found, by step, layer and key, each with the commits that hold it."""
        holding: dict[Pair, tuple[str, ...]] = {}
        told = []
        for damage in sorted(self._damages, key=lambda damage: (damage.step, damage.layer, damage.key)):
            if damage.version_id is not None:
                pair = (damage.layer, damage.version_id)
                if pair not in holding:
                    found = self._catalog.commits_holding(*pair)
                    self._commits.update({commit.id: commit for commit in found})
                    holding[pair] = tuple(commit.id for commit in found)
                damage = replace(damage, commits=holding[pair])
            # What GC expired meanwhile is no damage: it may be half deleted.
            if damage.commits:
                told.append(damage)
        return tuple(told)

    def broken(self) -> frozenset[Pair]:
        """Return the versions of which not all values can be read."""
        found = (one for one in self._damages if not one.readable)
        return frozenset((one.layer, one.version_id) for one in found if one.version_id is not None)

    def damaged(self) -> frozenset[Pair]:
        """Return the versions of which any object is not as it was written."""
        return frozenset((one.layer, one.version_id) for one in self._damages if one.version_id is not None)

    def report(self, damages: tuple[Damage, ...]) -> VerifyReport:
        """Return the report on what was read.

        Args:
            damages: as :meth:`damages` gave them, or what a repair left of them.
        """
        return VerifyReport(
            len(self._read), self._objects_read, self._bytes_read, damages, tuple(losses_of(damages, self._commits))
        )

    def add(self, damage: Damage, error: Exception | None = None) -> None:
        """Keep what was found, and by which error it was."""
        with self._lock:
            self._damages.append(damage)
            if isinstance(error, FormatTooNewError):
                self._too_new.add(damage.key)

    def count(self, size_bytes: int) -> None:
        """Count an object that was read, or was not to be had."""
        with self._lock:
            self._objects_read += 1
            self._bytes_read += size_bytes
            if self._bytes_read - self._bytes_told >= _TOLD_BYTES:
                self._tell_bytes()

    def done(self, version: LayerVersion) -> None:
        """Count a version of which everything was read."""
        with self._lock:
            self._versions_done += 1
            self._done.append(version)
            self._tell("verifying versions", self._versions_done, len(self._read))
            self._tell_bytes()
        self._flush(_REMEMBERED_TOGETHER)

    def _tell_bytes(self) -> None:
        self._bytes_told = self._bytes_read
        self._tell("verifying bytes", self._bytes_read, max(self._bytes_all, self._bytes_read))

    def _flush(self, least: int) -> None:
        """Have remembered what was read since the last time, if that is enough to be worth it."""
        with self._remembering:
            with self._lock:
                if len(self._done) + len(self._manifests) < least:
                    return
                versions, self._done = self._done, []
                commits, self._manifests = self._manifests, []
            self._remember(versions, commits)

    def _check_manifest(self, commit_id: str) -> None:
        try:
            known = manifest_of(self._catalog, commit_id)
        except RefNotFoundError:
            return  # expired since
        key = manifest_key(commit_id)
        kind, what = "document", ""
        reason: Exception | None = None
        try:
            found = read_manifest(self._objects, commit_id)
            differs = _difference(found, known)
            if differs and _is_of(found, known):
                with self._lock:
                    self._standing.add(key)
                what = (
                    f"the manifest says otherwise than the catalog, and its checksum holds: {differs}; 'tailorstore"
                    " rebuild' goes by the manifest"
                )
            elif differs:
                what = f"the manifest is not the one of the catalog's commit: {differs}"
        except MissingObjectError as error:
            if not self._catalog.unknown_commits([commit_id]):
                kind, what = "missing", what_is_said(error, key, self._objects.url)
        except (CorruptDocumentError, FormatTooNewError) as error:
            what, reason = what_is_said(error, key, self._objects.url), error
        self.count(0)
        with self._lock:
            self._manifests.append(commit_id)
            self._commits[commit_id] = known.commit
        if what:
            step = known.commit.step
            self.add(Damage(kind, "", step, key, what, (commit_id,), readable=True), reason)  # type: ignore[arg-type]


def manifest_of(catalog: StoreCatalog, commit_id: str) -> CommitManifest:
    """Return the manifest of a commit as the catalog knows it.

    Raises:
        RefNotFoundError: there is no such commit.
    """
    composite = catalog.composite(commit_id)
    measures, lines = catalog.measures_of(commit_id), catalog.lines_to(commit_id)
    return CommitManifest(catalog.opened_as(), composite.commit, composite.versions, composite.bases, measures, lines)


def _is_of(found: CommitManifest, known: CommitManifest) -> bool:
    """Tell whether a manifest is of the same commit of the same store, whatever else it says."""
    return found.commit.id == known.commit.id and found.binding.store_id == known.binding.store_id


def _difference(found: CommitManifest, known: CommitManifest) -> str:
    """Return in which parts a manifest differs from what the catalog knows; nothing if it does not."""

    def parts(manifest: CommitManifest) -> dict[str, Any]:
        commit = manifest.commit
        fields = {name: getattr(commit, name) for name in Commit.__dataclass_fields__}
        return {
            **fields,
            # As text: no number is equal to NaN, and zero has two signs.
            "metrics": {name: repr(value) for name, value in commit.metrics.items()},
            # Whoever owned the root then; the rest of a binding changes at a take-over.
            "store": manifest.binding.store_id,
            "lines": manifest.lines,
            "layers": dict(manifest.versions),
            "bases": dict(manifest.bases),
            "measures": dict(manifest.measures),
        }

    there, here = parts(found), parts(known)
    return ", ".join(name for name in here if there[name] != here[name])


def what_is_said(error: Exception, key: str, url: str) -> str:
    """Return what an error says of an object, without what a report says beside it: whose it is, where, what to do."""
    said, _, _ = str(error).partition("; run 'tailorstore verify'")
    return said.rpartition(key)[2].replace(f" in {url}", "").strip() or said


class _VersionCheck:
    """Checks one layer version; its jobs may run on any threads."""

    def __init__(self, verification: Verification, version: LayerVersion) -> None:
        self._to = verification
        self._objects = verification._objects  # noqa: SLF001 - the same module
        self._budget = verification._budget  # noqa: SLF001
        self._version = version
        self._prefix = version_prefix(version.layer, version.version_id)
        self._left = 0
        self._lock = threading.Lock()

    def open(self) -> list[Job]:
        """Read the document; return the jobs that read the chunks."""
        key = self._prefix + GROUP_DOCUMENT
        self._to.count(0)
        try:
            document = load_document(self._objects, self._version)
        except MissingObjectError as error:
            self._report("missing", key, what_is_said(error, key, self._objects.url))
            return self._finish()
        except (CorruptDocumentError, FormatTooNewError) as error:
            self._report("document", key, what_is_said(error, key, self._objects.url), error=error)
            return self._finish()
        jobs: list[Job] = [
            partial(self._check_document, self._prefix + path, digest) for path, digest in document.documents.items()
        ]
        jobs += [
            partial(self._check_chunk, record, chunk)
            for record in document.arrays.values()
            for chunk in chunks_of(record.spec.shape, record.spec.chunk_shape)
        ]
        self._left = len(jobs)
        return jobs or self._finish()

    def _check_document(self, key: str, digest: str) -> None:
        # The values can be read without these documents; other Zarr readers need them.
        size = 0
        try:
            raw = self._objects.get(key, limit=_DOCUMENT_BYTES)
            size = len(raw)
            if chunk_digest(raw) != digest:
                self._report("document", key, "the metadata document is not what was written", readable=True)
        except CorruptDocumentError as error:
            self._report("document", key, what_is_said(error, key, self._objects.url), readable=True)
        except MissingObjectError as error:
            self._report("missing", key, what_is_said(error, key, self._objects.url), readable=True)
        self._count(size)

    def _check_chunk(self, record: ArrayRecord, chunk: Chunk) -> None:
        key = object_key(self._prefix, record.path, record.spec, chunk)
        stored, size = record.sizes[chunk.number], chunk.elements * itemsize(record.spec.dtype)
        # What is stored as it is is only hashed, block by block in the processor's cache.
        as_it_is = record.spec.codec == "none"
        with self._budget.hold(0 if as_it_is else stored + size):
            target: Memory = nowhere(size) if as_it_is else memoryview(bytearray(size))
            try:
                read_chunk(self._objects, key, record, chunk, target, lambda: self._version.layer)
            except (MissingObjectError, DigestMismatchError) as error:
                found = self._size_of(key)
                what = what_is_said(error, key, self._objects.url)
                if found is None:
                    self._report("missing", key, what)
                elif found != stored:
                    self._report("short" if found < stored else "long", key, what)
                else:
                    self._report("flipped", key, what)
        self._count(stored)

    def _size_of(self, key: str) -> int | None:
        folder = key.rpartition("/")[0] + "/"
        try:
            return next((info.size for info in self._objects.list(folder) if info.key == key), None)
        except InvalidInputError:
            return None  # what should be a folder is a link or a file

    def _count(self, size_bytes: int) -> None:
        self._to.count(size_bytes)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _report(
        self, kind: str, key: str, detail: str, *, readable: bool = False, error: Exception | None = None
    ) -> None:
        version = self._version
        damage = Damage(
            kind,  # type: ignore[arg-type]
            version.layer,
            version.step,
            key,
            detail,
            version_id=version.version_id,
            readable=readable,
        )
        self._to.add(damage, error)

    def _finish(self) -> list[Job]:
        self._to.done(self._version)
        return []


def losses_of(damages: Iterable[Damage], commits: Mapping[str, Commit]) -> list[Loss]:
    """Return what each composite loses by damages that were not mended, by step.

    Args:
        damages: each with the commits that hold it.
        commits: by id, all of these.
    """
    layers: dict[str, set[str]] = defaultdict(set)
    manifests: set[str] = set()
    for damage in damages:
        if damage.version_id is None and not damage.mended:
            manifests.update(damage.commits)
        elif not damage.readable and not damage.mended:
            for commit_id in damage.commits:
                layers[commit_id].add(damage.layer)
    lost = sorted((commits[one] for one in {*layers, *manifests}), key=lambda commit: (commit.step, commit.id))
    return [
        Loss(commit.id, commit.step, commit.branch, tuple(sorted(layers[commit.id])), commit.id in manifests)
        for commit in lost
    ]
