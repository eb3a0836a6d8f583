"""S3, Google Cloud Storage, Azure and, on request, local directories through obstore."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import obstore

from tailorstore.domain.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    InvalidInputError,
    MissingObjectError,
    StorageUnavailableError,
    TailorError,
)
from tailorstore.storage import failures
from tailorstore.storage.arrivals import check_arrivals
from tailorstore.storage.cloud_options import CloudStores, azure_stores, google_stores, local_stores, s3_stores
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.threads import map_in_threads
from tailorstore.storage.timeouts import PutDeadlines
from tailorstore.storage.transport import (
    DeleteFailure,
    DeleteFailures,
    Memory,
    ObjectInfo,
    Observe,
    check_key,
    check_limit,
    check_prefix,
    joined,
    size_in_bytes,
    wrong_size,
)
from tailorstore.storage.urls import printable_url, split_url

if TYPE_CHECKING:
    from obstore.store import ObjectStore
    from typing_extensions import Buffer

T = TypeVar("T")

DELETE_BATCH = 1000
"""Most keys that one S3 request deletes."""

_STREAM_BYTES = 1 << 20
"""Blocks in which objects arrive. Against a real S3 server on the same machine, objects of 32 MiB: streaming into the
target takes 0.4 s of processor time for 1 GB and reaches 1.5 GB/s, taking each object whole 0.9 s and 1.1 GB/s (its
memory is new each time). Blocks of 256 KiB to 4 MiB are equally good; 10 MiB, obstore's own default, costs half as
much again.
"""

_WORKERS = 16
"""Enough to fill a fast link with objects of 32 MiB. They go out from the tensors' own memory and come in by the
mebibyte, so the number costs no memory to speak of."""


def open_cloud(root: str, options: Mapping[str, Any]) -> "CloudObjects":
    """Return the obstore transport for a normalised URL.

    Raises:
        InvalidInputError: obstore does not speak the protocol, or an option cannot be said in its words.
    """
    protocol, rest = split_url(root)
    scrubber = failures.Scrubber(options)
    try:
        if protocol == "s3":
            stores = s3_stores(rest, options, scrubber)
        elif protocol == "gs":
            stores = google_stores(rest, options)
        elif protocol in ("az", "abfs"):
            stores = azure_stores(rest, options)
        elif protocol == "file":
            stores = local_stores()
        else:
            msg = f"obstore does not speak {protocol}://; use transport='fsspec' or None for {printable_url(root)}"
            raise InvalidInputError(msg)
        return CloudObjects(root, stores, scrubber)
    except TailorError:
        raise
    except Exception as error:  # noqa: BLE001 - obstore has one class of errors for each kind of option
        cause = scrubber.cause(error)
        msg = f"the storage options of {printable_url(root)} cannot be used: {scrubber.clean(str(error))[:300]}"
        failure = InvalidInputError(msg)
    raise failure from cause


class CloudObjects:
    """Objects behind an obstore store.

    An object is put in one request straight from the caller's memory, never as a multipart upload: of 32 MiB each that
    is as fast, and a process that dies leaves no parts behind, which listings do not show and the bucket's owner pays.
    """

    def __init__(self, root: str, stores: CloudStores, scrubber: failures.Scrubber) -> None:
        """Take stores whose prefix is the root (for directories: that of the whole machine)."""
        self.url = printable_url(root)
        self.workers = stores.workers or _WORKERS
        self._stores = stores
        self._store = stores.reading()
        self._writing: dict[float, ObjectStore] = {}
        self._deadlines = PutDeadlines(stores.silence_seconds)
        self._endpoint = printable_url(stores.endpoint) if stores.endpoint else None
        self._scrubber = scrubber
        self._bucket_seen = False
        protocol, path = split_url(root)
        # obstore's local stores insist on a directory that exists; keys below `/` need none.
        self._base = path.strip("/") + "/" if protocol == "file" else ""
        self._local = LocalObjects(path) if protocol == "file" else None
        self._bucket_seen = self._local is not None

    def __repr__(self) -> str:
        """Name the root."""
        return f"CloudObjects({self.url!r})"

    # Memoryviews are handed over as they are; the request's body is a view of the tensor's own memory.
    copies_on_put = 0

    def put(self, key: str, data: "Buffer | Sequence[memoryview]", observe: Observe | None = None) -> int:
        """Put in one request; see :meth:`Objects.put`."""
        view = joined(data)
        path = self._path(key)
        if observe is not None:
            observe(view)
        self._call("writing", key, lambda: self._deadlines.run(view.nbytes, partial(self._put, path, view)))
        self._bucket_seen = True
        return view.nbytes

    def get(self, key: str, *, limit: int | None = None) -> memoryview:
        """Fetch whole; see :meth:`Objects.get`."""
        path = self._path(key)
        # The body is on its way from here on, but not in memory.
        result = self._call(failures.READING, key, lambda: obstore.get(self._store, path))
        check_limit(self.url, key, result.meta["size"], limit)
        return self._call(failures.READING, key, lambda: memoryview(result.bytes()))

    def read_into(self, key: str, target: Memory, observe: Observe | None = None, size: int | None = None) -> None:
        """Stream into the target; see :meth:`Objects.read_into`."""
        wanted = size_in_bytes(target)
        expected = wanted if size is None else size
        path = self._path(key)
        part = 0 < wanted < expected
        result = self._call(
            failures.READING,
            key,
            lambda: obstore.get(self._store, path, options={"range": (0, wanted)} if part else None),
        )
        found = result.meta["size"]
        if found != expected:
            raise wrong_size(self.url, key, found, expected)
        blocks = iter(result.stream(min_chunk_size=_STREAM_BYTES))
        block, done = memoryview(b""), 0
        for part_of_it in [target] if isinstance(target, memoryview) else target:
            left = part_of_it
            while left.nbytes:
                if not block.nbytes:
                    arrived = self._call(failures.READING, key, lambda: next(blocks, None))
                    if arrived is None:
                        raise failures.unavailable(f"reading {key}", self.url, f"broke off after {done} bytes")
                    block = memoryview(arrived)
                count = min(left.nbytes, block.nbytes)
                # Copied before it is shown, so that what is observed is what lies in the target.
                left[:count] = block[:count]
                if observe is not None:
                    observe(left[:count])
                left, block, done = left[count:], block[count:], done + count

    def replace(self, key: str, data: "Buffer", *, exclusive: bool = False) -> None:
        """Put over the old object in one request; see :meth:`Objects.replace`."""
        del exclusive  # many servers only pretend to know conditional puts
        self.put(key, data)

    def exists(self, key: str) -> bool:
        """Ask for the object's head; see :meth:`Objects.exists`."""
        return self._size_of(key) is not None

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        """List page by page; see :meth:`Objects.list`."""
        check_prefix(prefix)
        below = (self._base + prefix).rstrip("/") or None
        behind = self._base + after if after else None
        pages = self._call(
            "listing", prefix, lambda: iter(obstore.list(self._store, below, offset=behind, chunk_size=1000))
        )
        while (page := self._call("listing", prefix, lambda: next(pages, None))) is not None:
            for meta in page:
                key = meta["path"].removeprefix(self._base)
                yield ObjectInfo(key, meta["size"], meta["last_modified"].astimezone(UTC))
        self._bucket_seen = True

    def delete(self, keys: Sequence[str]) -> DeleteFailures:
        """Delete in batches; see :meth:`Objects.delete`."""
        paths = {self._path(key): key for key in keys}
        left: list[DeleteFailure] = []
        ordered = list(paths)
        for start in range(0, len(ordered), DELETE_BATCH):
            batch = ordered[start : start + DELETE_BATCH]
            try:
                obstore.delete(self._store, batch)
            except Exception as error:  # noqa: BLE001 - translated, whatever it is
                failure = self._translate(error, "deleting", "")
                cause = self._scrubber.cause(error)
                # A key's own refusal comes inside of an answer that is good as a whole.
                whole = "status code" in str(error) or not isinstance(failure, AccessDeniedError)
            else:
                continue
            if whole and isinstance(failure, (AccessDeniedError, BucketNotFoundError, StorageUnavailableError)):
                raise failure from cause
            # obstore stops at the first key that fails, also where it is merely missing (Google, local directories).
            reasons = map_in_threads(self._delete_one, batch, self.workers)
            left.extend(DeleteFailure(paths[p], r) for p, r in zip(batch, reasons, strict=True) if r is not None)
        if self._local is not None:
            self._local.prune(keys)
        return left

    def confirm(self, sizes: Mapping[str, int]) -> None:
        """List what was put, flush local files; see :meth:`Objects.confirm`."""
        if self._local is not None:
            self._local.confirm(sizes)
        else:
            check_arrivals(self.url, sizes, self.list, self._size_of, self.workers)

    def close(self) -> None:
        """Connections close when the store is collected."""

    def _put(self, path: str, view: memoryview, seconds: float) -> None:
        # Made when first needed: each has connections of its own.
        store = self._writing.setdefault(seconds, self._writing.get(seconds) or self._stores.writing(seconds))
        obstore.put(store, path, view, use_multipart=False)

    def _size_of(self, key: str) -> int | None:
        path = self._path(key)
        try:
            meta = self._call(failures.LOOKING, key, lambda: obstore.head(self._store, path))
        except MissingObjectError:
            self._check_bucket()
            return None
        self._bucket_seen = True
        return meta["size"]

    def _delete_one(self, path: str) -> str | None:
        try:
            obstore.delete(self._store, path)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - whatever it is, the key is still there
            return str(self._translate(error, "deleting", path.removeprefix(self._base)))
        return None

    def _check_bucket(self) -> None:
        """Tell a missing object from a missing bucket: the answer to a HEAD request has no room to say which."""
        if not self._bucket_seen:
            pages = obstore.list(self._store, "tailorstore.json", chunk_size=1)
            self._call("looking at", "", lambda: next(iter(pages), None))
            self._bucket_seen = True

    def _path(self, key: str) -> str:
        return self._base + check_key(key)

    def _translate(self, error: Exception, doing: str, key: str) -> TailorError:
        return failures.from_transport(error, doing, self.url, key, self._scrubber, self._endpoint)

    def _call(self, doing: str, key: str, function: Callable[[], T]) -> T:
        try:
            return function()
        except Exception as error:  # noqa: BLE001 - translated, whatever it is
            failure, cause = self._translate(error, doing, key), self._scrubber.cause(error)
        # Outside of the handler, so that the library's error is not kept as context.
        raise failure from cause
