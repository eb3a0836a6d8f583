"""Verification: read every object of a composite, or of the whole store, and compare it with its digest."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.chunks import Chunk, chunks_of
from tailorstore.domain.errors import (
    CorruptDocumentError,
    DigestMismatchError,
    FormatTooNewError,
    MissingObjectError,
    RefNotFoundError,
)
from tailorstore.domain.names import manifest_key, version_prefix
from tailorstore.domain.records import ArrayRecord, Damage, LayerVersion, VerifyReport
from tailorstore.engine.gc import Progress
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.layers import GROUP_DOCUMENT, chunk_digest, load_document, object_key, read_chunk
from tailorstore.storage.manifests import read_manifest
from tailorstore.storage.threads import Job, MemoryBudget, run_jobs
from tailorstore.storage.transport import Objects

_BUDGET_BYTES = 256 << 20


@dataclass(slots=True)
class _Findings:
    damages: list[Damage] = field(default_factory=list)
    objects: int = 0
    bytes_read: int = 0
    versions_done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def verify(
    objects: Objects,
    catalog: StoreCatalog,
    versions: Iterable[LayerVersion],
    commits: Iterable[str],
    progress: Progress | None = None,
) -> VerifyReport:
    """Read every object of some layer versions and commits in parallel; damage is reported, never raised.

    Args:
        objects: the root.
        catalog: says what they should be, and which commits hold a damaged version.
        versions: layer versions to read, each once; the bases of light ones are read, too, named here or not.
        commits: ids of commits whose manifests to read: a lost catalog is rebuilt from them.
        progress: is told how many versions are done.

    Raises:
        UnavailableError, AccessDeniedError: storage or catalog cannot be read at all.
    """
    versions = _with_bases(catalog, versions)
    findings = _Findings()
    tell = progress or (lambda *_: None)
    checks = [_VersionCheck(objects, version, findings, tell, len(versions)) for version in versions]
    manifests = [partial(_check_manifest, objects, catalog, commit_id, findings) for commit_id in commits]
    run_jobs([*(check.open for check in checks), *manifests], objects.workers)
    found = sorted(findings.damages, key=lambda damage: (damage.step, damage.layer, damage.key))
    told = [replace(damage, commits=damage.commits or _holding(catalog, damage)) for damage in found]
    # What GC expired meanwhile is no damage: it may be half deleted.
    damages = [damage for damage in told if damage.commits]
    return VerifyReport(len(versions), findings.objects, findings.bytes_read, tuple(damages))


def _with_bases(catalog: StoreCatalog, versions: Iterable[LayerVersion]) -> list[LayerVersion]:
    named = {(version.layer, version.version_id): version for version in versions}
    light = [version for version in named.values() if version.base_id is not None]
    lacking = [version for version in light if (version.layer, version.base_id) not in named]
    return [*named.values(), *catalog.bases_of(lacking)]


def _holding(catalog: StoreCatalog, damage: Damage) -> tuple[str, ...]:
    version_id = damage.key.split("/")[2]
    return tuple(commit.id for commit in catalog.commits_holding(damage.layer, version_id))


def _check_manifest(objects: Objects, catalog: StoreCatalog, commit_id: str, findings: _Findings) -> None:
    try:
        composite = catalog.composite(commit_id)
        measures = catalog.measures_of(commit_id)
    except RefNotFoundError:
        return  # expired since
    key, step = manifest_key(commit_id), composite.commit.step
    damage: Damage | None = None
    try:
        manifest = read_manifest(objects, commit_id)
        pairs = [
            (manifest.versions, composite.versions),
            (manifest.bases, composite.bases),
            (manifest.measures, measures),
        ]
        if manifest.commit.id != commit_id or any(dict(found) != dict(known) for found, known in pairs):
            damage = Damage(
                "document", "", step, key, "the manifest is not the one of the catalog's commit", (commit_id,)
            )
    except MissingObjectError as error:
        if not catalog.unknown_commits([commit_id]):
            damage = Damage("missing", "", step, key, str(error), (commit_id,))
    except (CorruptDocumentError, FormatTooNewError) as error:
        damage = Damage("document", "", step, key, str(error), (commit_id,))
    with findings.lock:
        findings.objects += 1
        if damage is not None:
            findings.damages.append(damage)


class _VersionCheck:
    """Checks one layer version; its jobs may run on any threads."""

    _budget = MemoryBudget(_BUDGET_BYTES)

    def __init__(
        self, objects: Objects, version: LayerVersion, findings: _Findings, tell: Progress, total: int
    ) -> None:
        self._objects = objects
        self._version = version
        self._findings = findings
        self._tell = tell
        self._total = total
        self._left = 0

    def open(self) -> list[Job]:
        """Read the document; return the jobs that read the chunks."""
        prefix = version_prefix(self._version.layer, self._version.version_id)
        key = prefix + GROUP_DOCUMENT
        try:
            document = load_document(self._objects, self._version)
        except MissingObjectError as error:
            self._report("missing", key, str(error))
            return self._done()
        except (CorruptDocumentError, FormatTooNewError) as error:
            self._report("document", key, str(error))
            return self._done()
        jobs: list[Job] = [self._document_job(prefix + path, digest) for path, digest in document.documents.items()]
        for record in document.arrays.values():
            jobs += [
                self._chunk_job(prefix, record, chunk)
                for chunk in chunks_of(record.spec.shape, record.spec.chunk_shape)
            ]
        self._left = len(jobs)
        return jobs or self._done()

    def _document_job(self, key: str, digest: str) -> Job:
        def job() -> None:
            # The values can be read without these documents; other Zarr readers need them.
            try:
                raw = self._objects.get(key)
            except MissingObjectError as error:
                self._report("missing", key, str(error))
                self._count(0)
                return
            if chunk_digest(raw) != digest:
                self._report("document", key, "the metadata document is not what was written")
            self._count(len(raw))

        return job

    def _chunk_job(self, prefix: str, record: ArrayRecord, chunk: Chunk) -> Job:
        def job() -> None:
            key = object_key(prefix, record.path, record.spec, chunk)
            size = chunk.elements * itemsize(record.spec.dtype)
            with self._budget.hold(size):
                try:
                    read_chunk(
                        self._objects, key, record, chunk, memoryview(bytearray(size)), lambda: self._version.layer
                    )
                except MissingObjectError as error:
                    self._report("short" if self._objects.exists(key) else "missing", key, str(error))
                except DigestMismatchError as error:
                    self._report("flipped", key, str(error))
            self._count(record.sizes[chunk.number])

        return job

    def _count(self, size_bytes: int) -> None:
        with self._findings.lock:
            self._findings.objects += 1
            self._findings.bytes_read += size_bytes
            self._left -= 1
            last = self._left == 0
        if last:
            self._done()

    def _report(self, kind: str, key: str, detail: str) -> None:
        damage = Damage(kind, self._version.layer, self._version.step, key, detail)  # type: ignore[arg-type]
        with self._findings.lock:
            self._findings.damages.append(damage)

    def _done(self) -> list[Job]:
        with self._findings.lock:
            self._findings.versions_done += 1
            self._tell("verifying versions", self._findings.versions_done, self._total)
        return []
