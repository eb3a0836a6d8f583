"""The door to the bytes: from a root's URL to the transport that speaks it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tailorstore.domain.errors import InvalidInputError
from tailorstore.storage.retrying import Patience, Retrying
from tailorstore.storage.timeouts import configured_attempts
from tailorstore.storage.transport import DeleteFailure, ObjectInfo, Objects, Observe
from tailorstore.storage.urls import normalise_url, printable_url, split_url

if TYPE_CHECKING:
    import os

__all__ = ["DeleteFailure", "ObjectInfo", "Objects", "Observe", "normalise_url", "open_objects", "printable_url"]

_CLOUDS = frozenset({"s3", "gs", "az", "abfs"})
TRANSPORTS = (None, "obstore", "fsspec")


def open_objects(
    url: "str | os.PathLike[str]", storage_options: Mapping[str, Any] | None = None, transport: str | None = None
) -> Objects:
    """Return the transport for a root; all but local files are asked again where they do not answer.

    Nothing is read or created yet.

    Args:
        url: anything that :func:`normalise_url` takes.
        storage_options: in the words of the protocol's fsspec filesystem; every transport understands them.
        transport: ``None`` for the fastest that speaks the URL (plain system calls for local directories, obstore for
            S3, Google Cloud Storage and Azure, fsspec for everything else), ``"obstore"`` or ``"fsspec"``.

    Raises:
        InvalidInputError: the URL, an option or the transport's name cannot be used.
        MissingDependencyError: the package that speaks the protocol is not installed.
    """
    if transport not in TRANSPORTS:
        msg = f"unknown transport {transport!r}; use 'obstore', 'fsspec', or None for the fastest"
        raise InvalidInputError(msg)
    root = normalise_url(url)
    options = dict(storage_options or {})
    protocol, rest = split_url(root)
    if protocol == "file" and transport is None:
        from tailorstore.storage.local import LocalObjects

        return LocalObjects(rest)
    objects = _open_remote(root, protocol, options, transport)
    # A flush of a local file that failed goes well when it is repeated, without the bytes that were lost.
    return objects if protocol == "file" else Retrying(objects, _patience(options))


def _open_remote(root: str, protocol: str, options: Mapping[str, Any], transport: str | None) -> Objects:
    # Each library is imported only by those who use it: a local store opens without either.
    if transport == "obstore" or (transport is None and protocol in _CLOUDS):
        from tailorstore.storage.cloud import open_cloud

        return open_cloud(root, options)
    from tailorstore.storage.filesystem import open_filesystem

    return open_filesystem(root, options)


def _patience(options: Mapping[str, Any]) -> Patience:
    config = options.get("config_kwargs")
    return Patience(attempts=configured_attempts(config)) if isinstance(config, Mapping) else Patience()
