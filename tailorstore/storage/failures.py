"""What transports' errors mean, in the words of the domain; and no secret in any of them."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import quote, quote_plus

from tailorstore.domain.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    BucketNotFoundError,
    InvalidInputError,
    MissingObjectError,
    StorageFullError,
    StorageUnavailableError,
    TailorError,
)

READING, LOOKING = "reading", "looking for"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_OBJECT = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
"""A key that is a directory, or lies below an object: object stores allow both, and read neither. Or it is or lies
behind a symbolic link, none of which is followed below a root."""
_UNUSABLE = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL})

_FULL_CODES = frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "ServerIsFull", "StorageFull"})
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist|bucket not found", re.I)
_OTHER_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_BAD_OPTION = re.compile(r"unexpected keyword argument|Invalid endpoint: ")
"""Asked again with the same options, no library says anything else."""
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r'<Code>(\w+)</Code>|\bcode: "(\w+)"')
_OS_ERROR = re.compile(r"os error (\d+)|code: (\d+),\s+kind:")
_SECRET_NAME = re.compile(r"key|secret|token|passw|credential|sas|connection_string|signature|authorization", re.I)
_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_CLIENT_SECRET", "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN",
)  # fmt: skip
_SHORTEST_SECRET = 6
"""Shorter values are words like ``anon``, and blotting them out would make messages unreadable."""


class TransportError(Exception):
    """What a transport's library said, without its secrets: the cause of the domain's error.

    The library's own exceptions are not chained, because they may hold request headers and signed URLs.
    """


class Scrubber:
    """Blots out the secrets of one root."""

    def __init__(self, *sources: object) -> None:
        """Collect what stands under telling names in the options, and in the environment."""
        found = {value for source in sources for value in _secrets(source, hidden=False)}
        found.update(os.environ[name] for name in _SECRET_VARIABLES if name in os.environ)
        self._secrets: list[str] = []
        self.add(*found)

    def __repr__(self) -> str:
        """Tell nothing."""
        return "Scrubber()"

    def add(self, *values: str | None) -> None:
        """Blot these out too."""
        spellings = set(self._secrets)
        for value in filter(None, values):
            spellings |= {value, quote(value, safe=""), quote(value), quote_plus(value)}
        # The longest first, so that no part of a secret is left standing beside a shorter one that it contains.
        self._secrets = sorted((s for s in spellings if len(s) >= _SHORTEST_SECRET), key=len, reverse=True)

    def clean(self, text: str) -> str:
        """Return ``text`` with every secret replaced by ``***``."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def cause(self, error: BaseException) -> TransportError:
        """Return what an error and its causes said, without secrets."""
        said: list[str] = []
        current: BaseException | None = error
        while current is not None and len(said) < 4:
            # obstore adds a dump of the whole request, which says nothing more than the first paragraph.
            text = str(current).partition("\n\nDebug source:")[0]
            said.append(f"{type(current).__module__}.{type(current).__name__}: {text}")
            current = current.__cause__
        return TransportError(self.clean("; caused by ".join(said)))


def _secrets(value: object, *, hidden: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _secrets(inner, hidden=hidden or _SECRET_NAME.search(str(name)) is not None)
    elif isinstance(value, str):
        if hidden:
            yield value
    elif isinstance(value, (list, tuple, set, frozenset)):
        for inner in value:
            yield from _secrets(inner, hidden=hidden)


def no_bucket(root: str) -> BucketNotFoundError:
    """Return the error for a root whose bucket is not there."""
    return BucketNotFoundError(f"the bucket of {root} does not exist; create it first: tailorstore creates no buckets")


def missing(root: str, key: str) -> MissingObjectError:
    """Return the error for an object that is not there."""
    return MissingObjectError(f"object {key} is missing in {root}; run 'tailorstore verify' to see what it belongs to")


def no_object(root: str, key: str, what: str) -> MissingObjectError:
    """Return the error for a key at which there is something, but no object."""
    return MissingObjectError(f"object {key} in {root} {what}; run 'tailorstore verify' to see what it belongs to")


def full(doing: str, root: str, reason: str) -> StorageFullError:
    """Return the error for a root that takes no more bytes."""
    return StorageFullError(
        f"no space left while {doing} in {root} ({reason}); free space or raise the quota, then try again: what was "
        "not published is swept by 'tailorstore gc'"
    )


def denied(doing: str, root: str, reason: str) -> AccessDeniedError:
    """Return the error for credentials or permissions that do not suffice."""
    return AccessDeniedError(
        f"access denied while {doing} in {root} ({reason}); check the credentials and what they may do there"
    )


def unavailable(doing: str, root: str, reason: str, endpoint: str | None = None) -> StorageUnavailableError:
    """Return the error for storage that cannot be reached or does not do its work."""
    where = f"{root} at {endpoint}" if endpoint else root
    return StorageUnavailableError(
        f"storage failed while {doing} in {where} ({reason}); try again when it is reachable"
    )


def skewed(doing: str, root: str) -> AccessDeniedError:
    """Return the error for a clock that makes every signature invalid."""
    return AccessDeniedError(
        f"access denied while {doing} in {root}: the clock of this machine and that of the storage differ by more than "
        "a signature may be old, some 15 minutes; set the one that is wrong"
    )


def from_os_error(error: OSError, doing: str, root: str, key: str) -> TailorError:
    """Translate an error of the operating system about a local path."""
    reason = error.strerror or type(error).__name__
    what = f"{doing} {key}" if key else doing
    if error.errno in _FULL:
        return full(what, root, reason)
    if error.errno in _DENIED:
        return denied(what, root, reason)
    if error.errno == errno.ENOENT or (doing in (READING, LOOKING) and error.errno in _NO_OBJECT):
        return missing(root, key)
    if error.errno == errno.EEXIST:
        return AlreadyExistsError(f"object {key} exists already in {root}; objects are written once, under fresh keys")
    if error.errno in _UNUSABLE:
        return InvalidInputError(
            f"cannot go on {what} in {root} ({reason}); the root must be a directory that takes plain files"
        )
    return unavailable(what, root, reason)


def raise_os_error(error: OSError, doing: str, root: str, key: str) -> NoReturn:
    """Raise the translation of ``error``, chained to it."""
    raise from_os_error(error, doing, root, key) from error


def from_transport(
    error: Exception, doing: str, root: str, key: str, scrubber: Scrubber, endpoint: str | None = None
) -> TailorError:
    """Translate an error of a transport's library; the result is not chained yet.

    Most libraries wrap a server's answer into classes of their own, so the answer's status and code decide.
    """
    text = _all_text(error)
    status, code = _answer(error, text)
    number = _system_error(error, text)
    reason = scrubber.clean(code or _short(text))
    what = f"{doing} {key}" if key else doing
    if _NO_BUCKET.search(text):
        return no_bucket(root)
    if status == 507 or code in _FULL_CODES or number in _FULL:
        return full(what, root, reason)
    if code in _PASSING_CODES or status in _PASSING_STATUS:
        # Before all that goes by numbers of the system: s3fs has one of those for every answer.
        return unavailable(what, root, reason, endpoint)
    if code in _SKEWED_CODES:
        return skewed(what, root)
    if code in _OTHER_REGION:
        return InvalidInputError(
            f"the bucket of {root} lies in another region ({reason}); set AWS_REGION or "
            "storage_options={'client_kwargs': {'region_name': …}}"
        )
    if (
        status in (401, 403)
        or code in _DENIED_CODES
        or number in _DENIED
        or isinstance(error, PermissionError)
        or type(error).__name__ in _DENIED_CLASSES
    ):
        return denied(what, root, reason)
    if status == 404 or isinstance(error, FileNotFoundError) or (doing in (READING, LOOKING) and number in _NO_OBJECT):
        return missing(root, key)
    if isinstance(error, TypeError) or _BAD_OPTION.search(text):
        return InvalidInputError(f"the options for {root} cannot be used ({reason}); check storage_options, or the URL")
    if number in _UNUSABLE:
        return InvalidInputError(f"cannot go on {what} in {root} ({reason}); the root must be a directory of files")
    return unavailable(what, root, reason, endpoint)


_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset({
    "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody", "RequestTimeout",
    "OperationAborted", "SlowDown", "TooManyRequests", "InternalError", "ServiceUnavailable",
})  # fmt: skip
"""What the same request may not meet again; among them bits that flipped on the way."""
_SKEWED_CODES = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
_DENIED_CODES = frozenset({
    "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
})  # fmt: skip
_DENIED_CLASSES = frozenset({
    "PermissionDeniedError", "UnauthenticatedError", "NoCredentialsError", "PartialCredentialsError",
    "CredentialRetrievalError", "TokenRetrievalError", "ClientAuthenticationError",
})  # fmt: skip


def _all_text(error: BaseException) -> str:
    texts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(texts) < 4:
        texts.append(str(current))
        current = current.__cause__
    return "\n".join(texts)


def _answer(error: BaseException, text: str) -> tuple[int | None, str | None]:
    """Return the HTTP status and the server's error code, where there are any."""
    current: BaseException | None = error
    while current is not None:
        response: Any = getattr(current, "response", None)  # botocore's ClientError
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, response.get("Error", {}).get("Code")
        current = current.__cause__
    status_match, code_match = _STATUS.search(text), _CODE.search(text)
    return int(status_match[1]) if status_match else None, code_match[1] or code_match[2] if code_match else None


def _system_error(error: BaseException, text: str) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = _OS_ERROR.search(text)
    return int(match[1] or match[2]) if match else None


def _short(text: str) -> str:
    """Return the part of a library's message that tells something, on one line."""
    system = re.search(r'message: "([^"\\]+)"', text)
    if system:
        return system[1]
    first = text.strip().partition("\n")[0].rpartition(" - ")[2]
    return first[:200] or "no reason given"
