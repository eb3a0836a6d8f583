"""URLs of roots: from what people type to one spelling, and to one that may be printed. Standard library only.

fsspec is asked only about protocols that are not known here.
"""

import os
import re
from importlib.util import find_spec

from tailorstore.domain.errors import InvalidInputError, MissingDependencyError

_ALIASES = {"local": "file", "s3a": "s3", "s3n": "s3", "gcs": "gs", "abfss": "abfs", "azure": "az"}
_BUCKETS = frozenset({"s3", "gs", "az", "abfs", "adl"})
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "adl": "adlfs"}
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_MASK = "***"


def split_url(url: str) -> tuple[str, str]:
    """Return protocol and rest of a normalised URL."""
    protocol, _, rest = url.partition("://")
    return protocol, rest


def normalise_url(url: "str | os.PathLike[str]") -> str:
    """Return the one spelling of a root's URL.

    Plain paths become absolute ``file://`` URLs, ``~`` is expanded, aliases of protocols, doubled and trailing slashes
    go. Percent signs stay as they are: paths and keys are not URL-encoded.

    Raises:
        InvalidInputError: not a URL or path, an unknown protocol, no bucket, or credentials in a bucket URL.
        MissingDependencyError: fsspec knows the protocol, but the package that speaks it is not installed.

    Examples:
        >>> normalise_url("/data//run/"), normalise_url("s3a://bucket/prefix/"), normalise_url("memory://")
        ('file:///data/run', 's3://bucket/prefix', 'memory://')
    """
    text: object = os.fspath(url) if isinstance(url, os.PathLike) else url
    if not isinstance(text, str) or not text.strip() or "\0" in text or "\n" in text:
        msg = f"{text!r} is no URL or path of a store: use s3://bucket/prefix, gs://…, memory://… or a directory"
        raise InvalidInputError(msg)
    match = _PROTOCOL.match(text)
    if "::" in text and (match is None or text.index("::") < match.start(1) + len(match.group(1))):
        return _normalise_chain(text)
    if match is None:
        if re.match(r"(s3|gs|gcs|az|abfs|file|memory):", text):
            msg = f"{printable_url(text)!r} is no URL: two slashes follow the protocol, as in s3://bucket/prefix"
            raise InvalidInputError(msg)
        return _file_url(text)
    protocol = match.group(1).lower()
    protocol = _ALIASES.get(protocol, protocol)
    rest = text[match.end() :]
    if protocol == "file":
        if not rest.startswith(("/", "~", ".")):
            msg = (
                f"{text!r} names a host or a relative path; write file:///{rest} (three slashes) for an absolute path, "
                f"or plainly {rest!r} for one below the working directory"
            )
            raise InvalidInputError(msg)
        return _file_url(rest)
    if protocol in _BUCKETS:
        return _bucket_url(protocol, rest)
    if protocol != "memory":
        _check_protocol(protocol)
    return f"{protocol}://{rest.rstrip('/')}"


def printable_url(url: str) -> str:
    """Return a URL without what should not be read by others: user info and the values of its query.

    Works for any URL, also of catalogs, and for text that is not a valid one.

    Examples:
        >>> printable_url("ftp://me:pw@host/run"), printable_url("https://host/a?X-Amz-Signature=abc&b")
        ('ftp://***@host/run', 'https://host/a?X-Amz-Signature=***&b')
    """
    return "::".join(_printable_link(link) for link in str(url).split("::"))


def _printable_link(url: str) -> str:
    match = _PROTOCOL.match(url)
    if match is None or match.group(1).lower() in ("file", "local", "memory", "sqlite"):
        return url
    head, rest = url[: match.end()], url[match.end() :]
    rest, query_mark, query = rest.partition("?")
    if query_mark and "@" in query and ":" in rest.partition("/")[0]:
        # A question mark inside an unquoted password: there is no telling where it ends, so nothing of it is shown.
        rest, query_mark, query = f"{_MASK}@{query.rpartition('@')[2]}", "", ""
    authority = rest.partition("/")[0]
    port = authority.rpartition(":")[2] if ":" in authority else "0"
    if "@" in authority or not port.isdecimal():
        # Unquoted slashes in a password push the `@` behind what looks like the authority.
        scope = rest if not port.isdecimal() and "@" not in authority else authority
        user, at, _ = scope.rpartition("@")
        # Azure writes container@account; that is no secret, and without it the URL says little.
        if at and not (match.group(1).lower() in ("abfs", "abfss") and ":" not in user):
            rest = f"{_MASK}@{rest[len(user) + 1 :]}"
    if not query_mark:
        return head + rest
    pairs = [name + (f"={_MASK}" if equals else "") for name, equals, _ in (p.partition("=") for p in query.split("&"))]
    return f"{head}{rest}?{'&'.join(pairs)}"


def _file_url(path: str) -> str:
    return "file://" + os.path.abspath(os.path.expanduser(path))


def _bucket_url(protocol: str, rest: str) -> str:
    parts = [part for part in rest.split("/") if part]
    shown = printable_url(f"{protocol}://{rest}")
    if not parts or rest.startswith("/"):
        msg = f"{shown!r} names no bucket; write {protocol}://bucket/prefix"
        raise InvalidInputError(msg)
    if "@" in parts[0] and not (protocol == "abfs" and ":" not in parts[0]):
        msg = f"{shown!r} has credentials in it; give them in storage_options or in the environment"
        raise InvalidInputError(msg)
    if "?" in rest or "#" in rest:
        msg = f"{shown!r} has a query or fragment; options go into storage_options"
        raise InvalidInputError(msg)
    if any(part in (".", "..") for part in parts):
        msg = f"{shown!r} has '.' or '..' in its prefix; object keys know no such steps"
        raise InvalidInputError(msg)
    return f"{protocol}://{'/'.join(parts)}"


def _normalise_chain(text: str) -> str:
    for link in text.split("::"):
        _check_protocol(link.partition("://")[0].lower())
    return text.rstrip("/")


def _check_protocol(protocol: str) -> None:
    """Refuse protocols that fsspec does not know or cannot speak here."""
    if protocol in _PACKAGES:
        check_package(protocol)
        return
    from fsspec import available_protocols, get_filesystem_class  # takes 50 ms, and local roots do not need it

    if protocol not in available_protocols():
        msg = f"unknown protocol {protocol!r}; tailorstore speaks file, s3, gs, az, abfs, memory and what fsspec knows"
        raise InvalidInputError(msg)
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        msg = f"{protocol}:// needs another package: {error}"
        raise MissingDependencyError(msg) from error


def check_package(protocol: str) -> None:
    """Refuse a protocol whose fsspec package is not installed.

    Raises:
        MissingDependencyError: names the package.
    """
    package = _PACKAGES.get(protocol)
    if package is not None and find_spec(package) is None:
        msg = f"{protocol}:// needs the package {package}; install it with: pip install {package}"
        raise MissingDependencyError(msg)
