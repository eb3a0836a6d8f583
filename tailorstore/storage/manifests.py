"""The documents that make a root complete without its catalog: who owns it, every commit, every tag and branch."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeVar

from tailorstore.domain.errors import (
    BadNameError,
    CorruptDocumentError,
    FormatTooNewError,
    InvalidInputError,
    MissingObjectError,
    NotAStoreError,
    TailorError,
)
from tailorstore.domain.lines import LineRun
from tailorstore.domain.names import (
    COMMITS_PREFIX,
    REFS_PREFIX,
    ROOT_DOCUMENT,
    check_name,
    is_id,
    manifest_key,
    ref_record_key,
)
from tailorstore.domain.records import (
    MEASURES,
    Binding,
    Commit,
    CommitManifest,
    LayerMeasures,
    LayerVersion,
    RefRecord,
)
from tailorstore.storage.checksums import BLANK, CHECKSUM, is_whole, sealed
from tailorstore.storage.parsing import (
    BINDING_BYTES,
    MANIFEST_BYTES,
    RECORD_BYTES,
    UnfitError,
    check_writable,
    number_or_none,
    optional_text,
    parse_object,
    text,
    whole_number,
    why_not,
)
from tailorstore.storage.transport import Objects

FORMAT = 1
_ABOUT = "A tailorstore root. Objects are immutable; delete them only with 'tailorstore gc'."

_DIGEST = re.compile(r"xxh3-128:[0-9a-f]{32}")
_OWNER = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST_BYTES = 1 << 50
"""Of one layer version, and of all that one commit stands for: catalogs add them up."""
_MOST_OBJECTS = 2**31 - 1
_MOST_EPOCHS = 2**53

Record = TypeVar("Record")


def read_binding(objects: Objects) -> Binding | None:
    """Return which catalog owns the root, or ``None`` where there is no store.

    Raises:
        NotAStoreError: ``tailorstore.json`` is something else.
        FormatTooNewError: a newer version of tailorstore made it.
    """
    try:
        raw = objects.get(ROOT_DOCUMENT, limit=BINDING_BYTES)
        described = _parse(raw)
        if described["format"] > FORMAT:
            msg = (
                f"the store at {objects.url} has format {described['format']}, and this version of tailorstore reads up"
                f" to {FORMAT}; install a newer tailorstore"
            )
            raise FormatTooNewError(msg)
        _check_whole(raw)
        return _binding_from_json(described)
    except MissingObjectError:
        return None
    except (CorruptDocumentError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        msg = (
            f"the {ROOT_DOCUMENT} of {objects.url} is not a tailorstore document, or is damaged: 'tailorstore rebuild'"
            " writes that of a store with commits anew; else choose another root"
        )
        raise NotAStoreError(msg) from error


def write_binding(objects: Objects, binding: Binding, *, replace: bool) -> None:
    """Write who owns the root: the one document that a take-over replaces.

    Raises:
        AlreadyExistsError: not ``replace``, and storage that can tell found one there.
    """
    data = _dump({"about": _ABOUT, "format": FORMAT, **_binding_to_json(binding)})
    objects.replace(ROOT_DOCUMENT, data, exclusive=not replace)


def write_manifest(objects: Objects, manifest: CommitManifest) -> str:
    """Write a commit's manifest, durably, and return its key. It is written before the commit is published.

    At once as a whole, where the storage can: one that cannot be read then is damaged, and never the leftover of a
    process that died. One that is there is replaced.

    Numbers among the measures that are not finite are written as unknown.

    Raises:
        InvalidInputError: its bases are not those of its light versions, it has no lines, or it is larger than any:
            nobody could read it. Nothing was written.
    """
    commit = manifest.commit
    wrong = _wrong_base(manifest.versions, manifest.bases)
    if wrong is not None:
        msg = (
            f"the manifest of commit {commit.id}, step {commit.step} on {commit.branch!r}, does not describe the base "
            f"of layer {wrong!r}: a light version needs the full one that it is a difference to, and no other has one"
        )
        raise InvalidInputError(msg)
    if not manifest.lines:
        msg = f"the manifest of commit {commit.id}, step {commit.step} on {commit.branch!r}, does not say on which line"
        raise InvalidInputError(msg)
    key = manifest_key(commit.id)
    described = {
        "format": FORMAT,
        "binding": _binding_to_json(manifest.binding),
        "commit": {
            "id": commit.id,
            "step": commit.step,
            "branch": commit.branch,
            "parent": commit.parent,
            "created_at": commit.created_at.isoformat(),
            "message": commit.message,
            "metrics": {name: repr(value) for name, value in commit.metrics.items()},
            "layers_written": list(commit.layers_written),
            "bytes_written": commit.bytes_written,
            "bytes_logical": commit.bytes_logical,
        },
        "lines": [{"line": run.line, "until": run.until} for run in manifest.lines],
        "layers": {name: _version_to_json(version) for name, version in manifest.versions.items()},
        "bases": {name: _version_to_json(version) for name, version in manifest.bases.items()},
        "measures": {name: _measures_to_json(measured) for name, measured in manifest.measures.items()},
    }
    data = check_writable(_dump(described), MANIFEST_BYTES, f"the manifest of commit {commit.id}, step {commit.step},")
    objects.replace(key, data)
    objects.confirm({key: len(data)})
    return key


def write_ref_record(objects: Objects, record: RefRecord) -> str:
    """Write where a tag or branch points from now on, durably, and return its key.

    At once as a whole, where the storage can: a record that cannot be read then is damaged, and never the leftover of a
    process that died, which could be deleted without another thought. One that is there is replaced.
    """
    key = ref_record_key(record.id)
    described = {
        "format": FORMAT,
        "kind": record.kind,
        "name": record.name,
        "commit": record.commit,
        "created_at": record.created_at.isoformat(),
    }
    data = _dump(described)
    objects.replace(key, data)
    objects.confirm({key: len(data)})
    return key


def read_manifest(objects: Objects, commit_id: str) -> CommitManifest:
    """Read a commit's manifest.

    Raises:
        MissingObjectError: it is gone.
        CorruptDocumentError: it is damaged.
        FormatTooNewError: it is whole, and a newer version of tailorstore wrote it.
    """
    return _read(objects, manifest_key(commit_id), MANIFEST_BYTES, _manifest_from_json)


def read_ref_record(objects: Objects, record_id: str) -> RefRecord:
    """Read a tag's or branch's record; raises as :func:`read_manifest` does."""
    build = partial(_ref_record_from_json, record_id)
    return _read(objects, ref_record_key(record_id), RECORD_BYTES, build)


def manifest_ids(objects: Objects, *, after: str = "") -> Iterator[str]:
    """Yield the ids of all commits that have a manifest, or of those whose manifests' keys sort behind ``after``."""
    yield from _ids(objects, COMMITS_PREFIX, after)


def ref_record_ids(objects: Objects) -> Iterator[str]:
    """Yield the ids of all records of tags and branches."""
    yield from _ids(objects, REFS_PREFIX)


def _ids(objects: Objects, prefix: str, after: str = "") -> Iterator[str]:
    for info in objects.list(prefix, after=after):
        name = info.key.removeprefix(prefix).removesuffix(".json")
        if is_id(name):
            yield name


def _read(objects: Objects, key: str, limit: int, build: Callable[[dict[str, Any]], Record]) -> Record:
    raw = objects.get(key, limit=limit)
    try:
        described = _parse(raw)
        # First, as a flipped bit can make a format of any number: what is whole was written by whoever says so.
        _check_whole(raw)
        if described["format"] > FORMAT:
            msg = f"document {key} in {objects.url} has format {described['format']}; install a newer tailorstore"
            raise FormatTooNewError(msg)
        return build(described)
    except TailorError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        msg = f"document {key} in {objects.url} cannot be understood: {why_not(error)}"
        raise CorruptDocumentError(msg) from error


def _parse(raw: memoryview) -> dict[str, Any]:
    described = parse_object(raw)
    whole_number(described["format"])
    return described


def _check_whole(raw: memoryview) -> None:
    if not is_whole(bytes(raw)):
        msg = "its checksum differs"
        raise UnfitError(msg)


def _dump(described: dict[str, Any]) -> bytes:
    # The checksum goes first, where no text of a user's can stand before it.
    return sealed(json.dumps({CHECKSUM: BLANK, **described}, indent=1, allow_nan=False).encode("ascii"))


def _binding_to_json(binding: Binding) -> dict[str, Any]:
    return {"store_id": binding.store_id, "catalog_id": binding.catalog_id, "epoch": binding.epoch}


def _binding_from_json(described: dict[str, Any]) -> Binding:
    store_id, catalog_id = text(described["store_id"]), text(described["catalog_id"])
    if not _OWNER.fullmatch(store_id) or not _OWNER.fullmatch(catalog_id):
        raise ValueError(store_id)
    return Binding(store_id, catalog_id, _at_most(_MOST_EPOCHS, described["epoch"]))


def _version_to_json(version: LayerVersion) -> dict[str, Any]:
    return {
        "version": version.version_id,
        "step": version.step,
        "digest": version.digest,
        "bytes_logical": version.bytes_logical,
        "bytes_stored": version.bytes_stored,
        "objects": version.objects,
        "fidelity": version.fidelity,
        "base": version.base_id,
        "error": _finite_or_none(version.error),
    }


def _measures_to_json(measured: LayerMeasures) -> dict[str, Any]:
    return {**{name: _finite_or_none(getattr(measured, name)) for name in MEASURES}, "finite": measured.finite}


def _version_from_json(layer: str, described: dict[str, Any]) -> LayerVersion:
    if described["fidelity"] not in ("full", "light") or not is_id(described["version"]):
        raise ValueError(layer)
    if not _DIGEST.fullmatch(described["digest"]):
        raise ValueError(described["digest"])
    return LayerVersion(
        layer=layer,
        version_id=described["version"],
        step=whole_number(described["step"]),
        digest=described["digest"],
        bytes_logical=_at_most(_MOST_BYTES, described["bytes_logical"]),
        bytes_stored=_at_most(_MOST_BYTES, described["bytes_stored"]),
        objects=_at_most(_MOST_OBJECTS, described["objects"]),
        fidelity=described["fidelity"],
        base_id=optional_text(described["base"]),
        error=number_or_none(described["error"]),
    )


def _measures_from_json(described: dict[str, Any]) -> LayerMeasures:
    if type(described["finite"]) is not bool:
        raise TypeError(described["finite"])
    return LayerMeasures(**{name: number_or_none(described[name]) for name in MEASURES}, finite=described["finite"])


def _wrong_base(versions: Mapping[str, LayerVersion], bases: Mapping[str, LayerVersion]) -> str | None:
    """Return a layer of which version and base do not belong together; ``None`` if all do."""
    for layer in sorted(versions.keys() | bases.keys()):
        version, base = versions.get(layer), bases.get(layer)
        needed = version.base_id if version else None
        if needed != (base.version_id if base else None):
            return layer
        if version is not None and (version.fidelity == "light") != (needed is not None):
            return layer
        if base is not None and (base.layer, base.fidelity, base.base_id) != (layer, "full", None):
            return layer
    return None


def _manifest_from_json(described: dict[str, Any]) -> CommitManifest:
    entry = described["commit"]
    if not all(map(is_id, filter(None, (text(entry["id"]), optional_text(entry["parent"]))))):
        raise ValueError(entry["id"])
    commit = Commit(
        id=entry["id"],
        step=whole_number(entry["step"]),
        branch=_name("branch", entry["branch"]),
        parent=entry["parent"],
        created_at=_time(entry["created_at"]),
        message=optional_text(entry["message"]),
        metrics={name: float(text(value)) for name, value in entry["metrics"].items()},
        layers_written=tuple(text(name) for name in entry["layers_written"]),
        bytes_written=_at_most(_MOST_BYTES, entry["bytes_written"]),
        bytes_logical=_at_most(_MOST_BYTES, entry["bytes_logical"]),
    )
    versions = {name: _version_from_json(name, version) for name, version in described["layers"].items()}
    bases = {name: _version_from_json(name, version) for name, version in described["bases"].items()}
    wrong = _wrong_base(versions, bases)
    if wrong is not None:
        raise ValueError(wrong)
    measures = {name: _measures_from_json(measured) for name, measured in described["measures"].items()}
    lines = _lines_from_json(described["lines"])
    return CommitManifest(_binding_from_json(described["binding"]), commit, versions, bases, measures, lines)


def _lines_from_json(described: list[dict[str, Any]]) -> tuple[LineRun, ...]:
    newest, *older = (LineRun(text(run["line"]), run["until"]) for run in described)
    bounds = [whole_number(run.until) for run in older]
    if newest.until is not None or not all(map(is_id, {newest.line, *(run.line for run in older)})):
        raise ValueError(newest.line)
    # Each forked off before the one that forked off it.
    if len({newest.line, *(run.line for run in older)}) != len(described) or bounds != sorted(bounds, reverse=True):
        raise ValueError(bounds)
    return (newest, *older)


def _ref_record_from_json(record_id: str, described: dict[str, Any]) -> RefRecord:
    if described["kind"] not in ("tag", "branch"):
        raise ValueError(described["kind"])
    target = optional_text(described["commit"])
    if target is not None and not is_id(target):
        raise ValueError(target)
    return RefRecord(
        id=record_id,
        kind=described["kind"],
        name=_name(described["kind"], described["name"]),
        commit=target,
        created_at=_time(described["created_at"]),
    )


def _time(value: str) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError(value)
    return moment.astimezone(UTC)


def _name(kind: Literal["branch", "tag"], value: object) -> str:
    try:
        return check_name(kind, text(value))
    except BadNameError as error:
        raise ValueError(value) from error


def _at_most(most: int, value: object) -> int:
    number = whole_number(value)
    if number > most:
        raise ValueError(number)
    return number


def _finite_or_none(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
