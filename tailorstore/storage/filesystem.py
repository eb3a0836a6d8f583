"""Every other place that fsspec reaches, and S3 through s3fs where that is asked for.

fsspec's directories, caches and globs are kept out of the way: objects are known by their whole keys, listings are
flat, and what a listing says is never remembered.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from tailorstore.domain.errors import (
    AccessDeniedError,
    InvalidInputError,
    MissingDependencyError,
    MissingObjectError,
    StorageUnavailableError,
    TailorError,
)
from tailorstore.storage import failures
from tailorstore.storage.arrivals import check_arrivals
from tailorstore.storage.local import LocalObjects, parents_of
from tailorstore.storage.threads import map_in_threads
from tailorstore.storage.timeouts import CONNECT_SECONDS, SILENCE_SECONDS, PutDeadlines
from tailorstore.storage.transport import (
    DeleteFailure,
    DeleteFailures,
    Memory,
    ObjectInfo,
    Observe,
    check_key,
    check_limit,
    check_prefix,
    flat_parts,
    size_in_bytes,
    wrong_size,
)
from tailorstore.storage.urls import check_package, printable_url, split_url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from typing_extensions import Buffer

T = TypeVar("T")

DELETE_BATCH = 1000
"""Most keys that one S3 request deletes."""

_WORKERS = 8
_BUCKETS = frozenset({"s3", "gs", "az", "abfs", "adl"})
"""Protocols without directories, whose servers acknowledge what they have taken."""

_MODIFIED = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
"""Under one of these the filesystems say when a file was written; there is no common word."""


def open_filesystem(root: str, options: Mapping[str, Any]) -> "FilesystemObjects":
    """Return the fsspec transport for a normalised URL.

    Raises:
        InvalidInputError: the options do not suit the filesystem.
        MissingDependencyError: the package that speaks the protocol is not installed.
    """
    from fsspec.core import url_to_fs

    protocol, _ = split_url(root)
    check_package(protocol)
    scrubber = failures.Scrubber(options)
    shown = printable_url(root)
    deadlines: PutDeadlines | None = None
    endpoint = None
    wanted: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True, **options}
    if protocol == "s3":
        wanted = _for_s3fs(wanted)
        endpoint = _endpoint_of(wanted)
        config = wanted["config_kwargs"]
        deadlines = PutDeadlines(float(config["connect_timeout"]) + float(config["read_timeout"]))
    elif protocol == "memory":
        # Its contents belong to the class; an instance of its own would be the same.
        wanted.pop("skip_instance_cache")
    try:
        filesystem, path = url_to_fs(root, **wanted)
    except ImportError as error:
        msg = f"{shown} needs another package: {scrubber.clean(str(error))}"
        failure: TailorError = MissingDependencyError(msg)
        cause = scrubber.cause(error)
    except Exception as error:  # noqa: BLE001 - filesystems raise whatever they like about their options
        msg = f"the storage options of {shown} cannot be used: {scrubber.clean(str(error))[:300]}"
        failure, cause = InvalidInputError(msg), scrubber.cause(error)
    else:
        if protocol == "s3":
            # Whoever calls it repeats what failed; one more loop inside would multiply the time.
            filesystem.retries = 1
        return FilesystemObjects(root, filesystem, path, scrubber, deadlines, endpoint)
    raise failure from cause


class FilesystemObjects:
    """Objects as files of an fsspec filesystem."""

    copies_on_put = 1

    def __init__(
        self,
        root: str,
        filesystem: "AbstractFileSystem",
        path: str,
        scrubber: failures.Scrubber,
        deadlines: PutDeadlines | None = None,
        endpoint: str | None = None,
    ) -> None:
        """Take a filesystem and the root's path in it. Nothing is read or created yet.

        Args:
            root: normalised URL.
            filesystem: that speaks its protocol.
            path: of the root, in the filesystem's words.
            scrubber: knows the options' secrets.
            deadlines: for puts; ``None`` for a filesystem that has no use for them.
            endpoint: the server, where it is not the provider's own; for messages.
        """
        self.url = printable_url(root)
        self.workers = _WORKERS
        self._fs = filesystem
        self._base = path.rstrip("/") + "/"
        self._scrubber = scrubber
        # Before an upload s3fs waits for the server's "100 Continue", where its timeouts do not reach.
        self._deadlines = deadlines
        self._endpoint = printable_url(endpoint) if endpoint else None
        self._protocol, rest = split_url(root)
        self._local = LocalObjects(rest) if self._protocol == "file" else None
        self._bucket_seen = self._protocol not in _BUCKETS

    def __repr__(self) -> str:
        """Name the root."""
        return f"FilesystemObjects({self.url!r})"

    def put(self, key: str, data: "Buffer | Sequence[memoryview]", observe: Observe | None = None) -> int:
        """Write the file in one go; see :meth:`Objects.put`."""
        parts = flat_parts(data)
        path = self._path(key)
        if observe is not None:
            for part in parts:
                observe(part)
        # A copy: most filesystems take nothing but bytes.
        content = b"".join(parts)
        self._call("writing", key, lambda: self._pipe(path, content))
        self._bucket_seen = True
        return len(content)

    def get(self, key: str, *, limit: int | None = None) -> memoryview:
        """Read the file whole; see :meth:`Objects.get`."""
        path = self._path(key)
        if limit is not None:
            # One request more: the filesystems read whole, whatever the size.
            found = self._call(failures.READING, key, lambda: self._fs.info(path))
            check_limit(self.url, key, int(found["size"] or 0), limit)
        return memoryview(self._call(failures.READING, key, lambda: self._fs.cat_file(path)))

    def read_into(self, key: str, target: Memory, observe: Observe | None = None, size: int | None = None) -> None:
        """Read the file and copy its beginning; see :meth:`Objects.read_into`."""
        expected = size_in_bytes(target) if size is None else size
        content = self.get(key)
        if content.nbytes != expected:
            raise wrong_size(self.url, key, content.nbytes, expected)
        done = 0
        for part in [target] if isinstance(target, memoryview) else target:
            part[:] = content[done : done + part.nbytes]
            done += part.nbytes
            if observe is not None:
                observe(part)

    def replace(self, key: str, data: "Buffer", *, exclusive: bool = False) -> None:
        """Write over the old file, atomically on object stores and local disks; see :meth:`Objects.replace`."""
        if self._local is not None:
            self._local.replace(key, data, exclusive=exclusive)
        else:
            self.put(key, data)

    def exists(self, key: str) -> bool:
        """Ask for the file; see :meth:`Objects.exists`."""
        return self._size_of(key) is not None

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        """List everything below; see :meth:`Objects.list`. The listing is complete before the first is yielded."""
        path = self._base + check_prefix(prefix)
        try:
            found = self._call("listing", prefix, lambda: self._fs.find(path.rstrip("/"), withdirs=False, detail=True))
        except MissingObjectError:
            return
        self._bucket_seen = True
        for info in found.values():
            # Some filesystems leave the leading slash out of what they list.
            name = info["name"] if info["name"].startswith(self._base[:1]) else f"/{info['name']}"
            if info["type"] == "file" and name.startswith(path) and not name.endswith("/"):
                key = name[len(self._base) :]
                if key > after:
                    yield ObjectInfo(key, int(info["size"] or 0), _modified(info))

    def delete(self, keys: Sequence[str]) -> DeleteFailures:
        """Delete files, on S3 in batches, and directories that become empty; see :meth:`Objects.delete`."""
        paths = {self._path(key): key for key in keys}
        if self._protocol == "s3":
            return self._delete_batches(paths)
        left: list[DeleteFailure] = []
        found = map_in_threads(self._delete_one, list(paths), self.workers)
        for key, failure in zip(paths.values(), found, strict=True):
            if isinstance(failure, StorageUnavailableError):
                raise failure
            if failure is not None:
                left.append(DeleteFailure(key, str(failure)))
        if self._protocol not in _BUCKETS:
            for directory in sorted(parents_of(keys), key=len, reverse=True):
                # Not empty, or no such directory: either is fine.
                with contextlib.suppress(Exception):
                    self._fs.rmdir(self._base + directory)
        return left

    def confirm(self, sizes: Mapping[str, int]) -> None:
        """List what was put, flush local files; see :meth:`Objects.confirm`.

        Whether other filesystems than local ones have made it durable cannot be asked.
        """
        if self._local is not None:
            self._local.confirm(sizes)
        else:
            check_arrivals(self.url, sizes, self.list, self._size_of, self.workers)

    def close(self) -> None:
        """Close the sessions of asynchronous filesystems, which would complain at the end of the program."""
        session = getattr(self._fs, "_s3", None) or getattr(self._fs, "_session", None)
        close_session = getattr(self._fs, "close_session", None)
        if session is not None and close_session is not None:
            with contextlib.suppress(Exception):
                close_session(self._fs.loop, session)

    def _pipe(self, path: str, content: bytes) -> None:
        try:
            if self._deadlines is None:
                self._fs.pipe_file(path, content)
            else:
                self._deadlines.run(len(content), lambda limit: self._fs.pipe_file(path, content, timeout=limit))
        except FileNotFoundError:
            if self._protocol in _BUCKETS:
                # Making directories there could make the bucket.
                raise
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, content)
        if self._protocol not in _BUCKETS and (size := self._fs.size(path)) != len(content):
            msg = f"only {size} of {len(content)} bytes were taken"
            raise OSError(msg)

    def _delete_batches(self, paths: Mapping[str, str]) -> DeleteFailures:
        left: list[DeleteFailure] = []
        ordered = list(paths)
        for start in range(0, len(ordered), DELETE_BATCH):
            batch = ordered[start : start + DELETE_BATCH]
            split = [self._fs.split_path(path) for path in batch]
            request = {"Objects": [{"Key": name} for _, name, _ in split], "Quiet": True}
            bucket = split[0][0]
            # Not `fs.bulk_delete`, which does not tell what it could not delete.
            answer = self._call(
                "deleting",
                "",
                lambda bucket=bucket, request=request: self._fs.call_s3(  # type: ignore[misc]
                    "delete_objects", Bucket=bucket, Delete=request
                ),
            )
            by_name = {name: paths[path] for path, (_, name, _) in zip(batch, split, strict=True)}
            left.extend(
                DeleteFailure(by_name[error["Key"]], self._scrubber.clean(f"{error['Code']}: {error.get('Message')}"))
                for error in answer.get("Errors", ())
                if error["Code"] != "NoSuchKey"
            )
        return left

    def _size_of(self, key: str) -> int | None:
        path = self._path(key)
        try:
            # Not `fs.exists`: that is true of directories, and of prefixes whose last object is gone.
            info = self._call(failures.LOOKING, key, lambda: self._fs.info(path))
        except MissingObjectError:
            self._check_bucket()
            return None
        self._bucket_seen = True
        return int(info["size"] or 0) if info["type"] == "file" else None

    def _delete_one(self, path: str) -> TailorError | None:
        try:
            self._call("deleting", path[len(self._base) :], lambda: self._fs.rm_file(path))
        except MissingObjectError:
            return None
        except TailorError as error:
            return error
        return None

    def _check_bucket(self) -> None:
        """Tell a missing object from a missing bucket: the answer to a HEAD request has no room to say which."""
        if not self._bucket_seen:
            below = f"{self._base}commits"
            with contextlib.suppress(MissingObjectError, AccessDeniedError):
                self._call("looking at", "", lambda: self._fs.find(below, maxdepth=1))
            self._bucket_seen = True

    def _path(self, key: str) -> str:
        return self._base + check_key(key)

    def _call(self, doing: str, key: str, function: Callable[[], T]) -> T:
        try:
            return function()
        except TailorError:
            raise
        except Exception as error:  # noqa: BLE001 - filesystems raise whatever they like
            failure = failures.from_transport(error, doing, self.url, key, self._scrubber, self._endpoint)
            cause = self._scrubber.cause(error)
        # Outside of the handler, so that the library's error is not kept as context.
        raise failure from cause


def _modified(info: Mapping[str, Any]) -> datetime | None:
    for word in _MODIFIED:
        value = info.get(word)
        if isinstance(value, datetime):
            return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
        if isinstance(value, (int, float)):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(value).astimezone(UTC)
    return None


def _for_s3fs(options: Mapping[str, Any]) -> dict[str, Any]:
    """Add what botocore would not take from the environment, and patience like that of the other transport."""
    wanted = dict(options)
    client = dict(wanted.get("client_kwargs") or {})
    config = dict(wanted.get("config_kwargs") or {})
    region = os.environ.get("AWS_REGION")
    if region:
        client.setdefault("region_name", region)
    if _endpoint_of(wanted) is not None:
        config["s3"] = {"addressing_style": "path", **config.get("s3", {})}
    config.setdefault("connect_timeout", CONNECT_SECONDS)
    config.setdefault("read_timeout", SILENCE_SECONDS)
    config.setdefault("retries", {"total_max_attempts": 1, "mode": "standard"})
    return {**wanted, "client_kwargs": client, "config_kwargs": config}


def _endpoint_of(options: Mapping[str, Any]) -> str | None:
    """Return the S3 server that is asked, where it is not Amazon's."""
    client = options.get("client_kwargs") or {}
    found = options.get("endpoint_url") or client.get("endpoint_url")
    return found or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
