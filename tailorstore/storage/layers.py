"""One layer version ↔ one Zarr group: chunks, documents and their digests.

The digest of a layer covers its skeleton and, through the digests of the chunks, every element. The catalog keeps it,
so whoever reads a document can tell that it is the one that was published, and whoever reads a chunk that it is the
one that the document means.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from tailorstore.domain.chunks import Chunk, chunks_of
from tailorstore.domain.errors import (
    CorruptDocumentError,
    DigestMismatchError,
    FormatTooNewError,
    InvalidInputError,
    MissingObjectError,
)
from tailorstore.domain.names import is_id, version_prefix
from tailorstore.domain.records import ArrayRecord, ArraySpec, LayerDocument, LayerVersion
from tailorstore.domain.skeleton import check_skeleton
from tailorstore.storage import codecs
from tailorstore.storage.checksums import BLANK, CHECKSUM, is_whole, sealed
from tailorstore.storage.documents import array_document, chunk_key, group_document, groups_above
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.layouts import check_apart, check_digest, check_record, record_from_json
from tailorstore.storage.light import table_from_json, table_to_json
from tailorstore.storage.parsing import (
    LAYER_BYTES,
    check_writable,
    number_or_none,
    optional_text,
    parse_object,
    text,
    whole_number,
    why_not,
)
from tailorstore.storage.transport import Memory, Objects, flat_parts, get_exactly, joined, size_in_bytes

FORMAT = 1
GROUP_DOCUMENT = "zarr.json"
ATTRIBUTE = "tailorstore"

Hasher = xxhash.xxh3_128


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """What writing a chunk gave."""

    digest: str
    size: int
    """Bytes of its object."""


def canonical_json(value: Any) -> bytes:  # noqa: ANN401
    """Return JSON of which there is only one form, so that equal values have equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def layer_digest(document: LayerDocument) -> str:
    """Return the content digest of a layer: independent of version, step, codec and who wrote it.

    That of a light version covers its base's id too: the same codes on another base are other values.
    """
    described: dict[str, Any] = {
        "content": document.content,
        "arrays": {
            path: [record.spec.dtype, record.spec.shape, record.spec.chunk_shape, record.digests]
            for path, record in document.arrays.items()
        },
    }
    if document.light is not None:
        described |= {"light": table_to_json(document.light), "base": document.base_id, "error": document.error}
    return "xxh3-128:" + Hasher(canonical_json(described)).hexdigest()


def chunk_digest(data: memoryview | Sequence[memoryview]) -> str:
    """Return the digest of a chunk's elements, in one piece or in several that follow each other."""
    hasher = Hasher()
    for part in flat_parts(data):
        hasher.update(part)
    return hasher.hexdigest()


def object_key(prefix: str, path: str, spec: ArraySpec, chunk: Chunk) -> str:
    """Return the key of a chunk's object."""
    return f"{prefix}{path}/{chunk_key(spec, chunk.index)}"


def write_chunk(
    objects: Objects,
    key: str,
    spec: ArraySpec,
    chunk: Chunk,
    data: memoryview | Sequence[memoryview],
    digest: str | None = None,
) -> StoredChunk:
    """Write one chunk and return its digest and size.

    Args:
        objects: the root.
        key: from :func:`object_key`.
        spec: layout of the array.
        chunk: which chunk.
        data: its elements in C order, padding left out; in one piece, or in several that follow each other.
        digest: the elements' digest where it is known already; else it is taken as the bytes pass.

    Raises:
        StorageUnavailableError, StorageFullError, AccessDeniedError: an unsealed object may remain; GC sweeps it.
    """
    padding = (chunk.capacity - chunk.elements) * itemsize(spec.dtype)
    if spec.codec == "none" and not padding:
        hasher = Hasher() if digest is None else None
        size = objects.put(key, data, hasher.update if hasher else None)
        return StoredChunk(digest or hasher.hexdigest(), size)  # type: ignore[union-attr]
    whole = joined(data)
    digest = digest or chunk_digest(whole)
    padded = memoryview(b"".join((whole, bytes(padding)))) if padding else whole
    encoded = codecs.encode(spec.codec, itemsize(spec.dtype), padded)
    return StoredChunk(digest, objects.put(key, encoded))


def read_chunk(
    objects: Objects, key: str, record: ArrayRecord, chunk: Chunk, target: Memory, where: Callable[[], str]
) -> None:
    """Fill ``target`` with one chunk's elements, checked against its digest.

    Args:
        objects: the root.
        key: from :func:`object_key`.
        record: layout, digests and sizes of the array.
        chunk: which chunk.
        target: writable flat bytes, as many as the chunk has elements, padding left out; in one buffer, or in several
            that are filled one after the other.
        where: says whose chunk it is, for messages.

    Raises:
        MissingObjectError: the object is gone, short or long.
        DigestMismatchError: it is not what was written; ``target`` holds it all the same.
    """
    size = record.sizes[chunk.number]
    hasher = Hasher()
    try:
        if record.spec.codec == "none":
            objects.read_into(key, target, hasher.update, size=size)
        else:
            encoded = get_exactly(objects, key, size)
            whole = target if isinstance(target, memoryview) else memoryview(bytearray(size_in_bytes(target)))
            _decode(record.spec, chunk, encoded, whole)
            hasher.update(whole)
            if not isinstance(target, memoryview):
                _deal_out(whole, target)
    except MissingObjectError as error:
        msg = f"{where()}: {error}"
        raise MissingObjectError(msg) from error
    except (DigestMismatchError, CorruptDocumentError) as error:
        msg = f"{where()}: object {key} in {objects.url}: {error}"
        raise DigestMismatchError(msg) from error
    if hasher.hexdigest() != record.digests[chunk.number]:
        msg = (
            f"{where()}: object {key} in {objects.url} is not what was written (its digest differs);"
            " run 'tailorstore verify' to see what else is damaged; checkout(…, fallback=True), or"
            " 'tailorstore checkout --fallback', gives the newest step before it that is whole"
        )
        raise DigestMismatchError(msg)


def _deal_out(data: memoryview, target: Sequence[memoryview]) -> None:
    done = 0
    for part in target:
        part[:] = data[done : done + part.nbytes]
        done += part.nbytes


def _decode(spec: ArraySpec, chunk: Chunk, encoded: memoryview, target: memoryview) -> None:
    if chunk.elements == chunk.capacity:
        codecs.decode(spec.codec, itemsize(spec.dtype), encoded, target)
        return
    padded = memoryview(bytearray(chunk.capacity * itemsize(spec.dtype)))
    codecs.decode(spec.codec, itemsize(spec.dtype), encoded, padded)
    target[:] = padded[: len(target)]


@dataclass(frozen=True, slots=True)
class SealedLayer:
    """A layer version whose objects are all in storage."""

    version: LayerVersion
    document: LayerDocument
    sizes: Mapping[str, int]
    """Of every object of the version, in bytes, by key: first the chunks, then the documents."""


def seal(objects: Objects, document: LayerDocument, putting: Callable[[Iterable[str]], None]) -> SealedLayer:
    """Write a layer version's documents, once all its chunks are written, the group's own last.

    Args:
        objects: the root.
        document: of the version.
        putting: is told the keys of the documents before any is put.

    Raises:
        StorageUnavailableError, StorageFullError, AccessDeniedError: the version stays unsealed; GC sweeps it.
        InvalidInputError: nobody could read what would be written: an array is larger than any, or the state beside
            arrays is. The version stays unsealed.
    """
    _check_sealable(document)
    prefix = version_prefix(document.layer, document.version_id)
    specs = {path: record.spec for path, record in document.arrays.items()}
    documents = {f"{group}/{GROUP_DOCUMENT}": group_document({}, {}) for group in groups_above(specs)}
    documents |= {f"{path}/{GROUP_DOCUMENT}": array_document(spec) for path, spec in specs.items()}
    document = replace(document, documents={key: chunk_digest(memoryview(data)) for key, data in documents.items()})
    digest = layer_digest(document)
    group = sealed(group_document({ATTRIBUTE: document_to_json(document, digest)}, specs))
    documents[GROUP_DOCUMENT] = check_writable(group, LAYER_BYTES, f"the document of layer {document.layer!r}")
    sizes = {
        object_key(prefix, path, record.spec, chunk): record.sizes[chunk.number]
        for path, record in document.arrays.items()
        for chunk in chunks_of(record.spec.shape, record.spec.chunk_shape)
    }
    putting(prefix + key for key in documents)
    sizes |= {prefix + key: objects.put(prefix + key, data) for key, data in documents.items()}
    version = LayerVersion(
        layer=document.layer,
        version_id=document.version_id,
        step=document.step,
        digest=digest,
        bytes_logical=sum(size_of(dtype, shape) for dtype, shape in document.tensors.values()),
        bytes_stored=sum(sizes.values()),
        objects=len(sizes),
        fidelity=document.fidelity,
        base_id=document.base_id,
        error=document.error,
    )
    return SealedLayer(version, document, sizes)


def _check_sealable(document: LayerDocument) -> None:
    for record in document.arrays.values():
        try:
            check_record(record)
        except (TypeError, ValueError) as error:
            spec = record.spec
            msg = (
                f"array {record.path!r} of layer {document.layer!r}, {spec.dtype} of shape {spec.shape} in chunks of"
                f" shape {spec.chunk_shape}, cannot be stored: no store has one of so many dimensions or bytes"
            )
            raise InvalidInputError(msg) from error


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor's elements in bytes."""
    return itemsize(dtype) * math.prod(shape)


def load_document(objects: Objects, version: LayerVersion) -> LayerDocument:
    """Read a layer version's document and check that it is the one that was published.

    Raises:
        MissingObjectError: it is gone.
        CorruptDocumentError: it is not valid, or not the one whose digest the catalog has.
        FormatTooNewError: a newer version of tailorstore wrote it.
    """
    key = version_prefix(version.layer, version.version_id) + GROUP_DOCUMENT
    where = f"layer {version.layer!r} of step {version.step}"
    try:
        document = parse_document(objects.get(key, limit=LAYER_BYTES), key)
    except (MissingObjectError, CorruptDocumentError) as error:
        msg = f"{where}: {error}"
        raise type(error)(msg) from error
    found = layer_digest(document)
    names = (document.layer, document.version_id, document.step, document.fidelity, document.base_id)
    known = (version.layer, version.version_id, version.step, version.fidelity, version.base_id)
    if found != version.digest or names != known:
        msg = (
            f"{where}: document {key} in {objects.url} is not the one that was published; run 'tailorstore verify' to"
            " see what else is damaged"
        )
        raise CorruptDocumentError(msg)
    return document


def parse_document(raw: memoryview, key: str) -> LayerDocument:
    """Parse a layer version's group document.

    Raises:
        CorruptDocumentError: it is not valid.
        FormatTooNewError: it is whole, and a newer version of tailorstore wrote it.
    """
    try:
        described = parse_object(raw)["attributes"][ATTRIBUTE]
        # First, as a flipped bit can make a format of any number: what is whole was written by whoever says so.
        if not is_whole(bytes(raw)):
            msg = f"document {key} is not what was written (its checksum differs); run 'tailorstore verify'"
            raise CorruptDocumentError(msg)
        if whole_number(described["format"]) > FORMAT:
            msg = (
                f"document {key} has format {described['format']}, and this version of tailorstore reads up to"
                f" {FORMAT}; install a newer tailorstore"
            )
            raise FormatTooNewError(msg)
        return document_from_json(described)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        msg = f"document {key} is not a layer version's document: {why_not(error)}; run 'tailorstore verify'"
        raise CorruptDocumentError(msg) from error


def document_from_json(described: Mapping[str, Any]) -> LayerDocument:
    """Return the document that :func:`document_to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not valid.
    """
    arrays = {path: record_from_json(path, entry) for path, entry in described["arrays"].items()}
    check_apart(arrays)
    documents = {key: check_digest(found) for key, found in described["documents"].items()}
    if documents.keys() != {f"{path}/{GROUP_DOCUMENT}" for path in [*arrays, *groups_above(arrays)]}:
        raise ValueError(list(documents))
    light = None if described["light"] is None else table_from_json(described["light"], arrays)
    fidelity, base_id = described["fidelity"], optional_text(described["base"])
    if fidelity != ("full" if light is None else "light") or (base_id is None) != (light is None):
        raise ValueError(fidelity)
    if not all(map(is_id, filter(None, (text(described["version"]), base_id)))):
        raise ValueError(base_id)
    layer = text(described["layer"])
    return LayerDocument(
        layer=layer,
        version_id=described["version"],
        step=whole_number(described["step"]),
        content=check_skeleton(layer, described["content"], arrays if light is None else light.tensors),
        arrays=arrays,
        fidelity=fidelity,
        base_id=base_id,
        documents=documents,
        light=light,
        error=number_or_none(described["error"]),
    )


def document_to_json(document: LayerDocument, digest: str) -> dict[str, Any]:
    """Return a document as JSON data; ``digest`` is that of the layer."""
    return {
        # First, where no text of a user's can stand before it.
        CHECKSUM: BLANK,
        "format": FORMAT,
        "layer": document.layer,
        "version": document.version_id,
        "step": document.step,
        "fidelity": document.fidelity,
        "base": document.base_id,
        "digest": digest,
        "content": document.content,
        "arrays": {path: _record_to_json(record) for path, record in document.arrays.items()},
        "documents": document.documents,
        "light": None if document.light is None else table_to_json(document.light),
        "error": document.error,
    }


def _record_to_json(record: ArrayRecord) -> dict[str, Any]:
    spec = record.spec
    return {
        "dtype": spec.dtype,
        "shape": spec.shape,
        "chunk_shape": spec.chunk_shape,
        "codec": spec.codec,
        "digests": record.digests,
        "sizes": record.sizes,
    }
