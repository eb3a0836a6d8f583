"""The contract between the store and the place where its bytes lie. Standard library and domain only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol, cast

from tailorstore.domain.errors import CorruptDocumentError, InvalidInputError, MissingObjectError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Memory = memoryview | Sequence[memoryview]
"""One buffer, or several that are taken one after the other."""

Observe = Callable[[memoryview], None]
"""Is shown an object's bytes block by block, in order, each once, while they are in the processor's cache."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object, as a listing shows it."""

    key: str
    """Relative to the root."""
    size: int
    """In bytes."""
    modified: datetime | None
    """UTC, by the storage's clock; ``None`` where it does not tell."""


@dataclass(frozen=True, slots=True)
class DeleteFailure:
    """An object that could not be deleted."""

    key: str
    reason: str
    """For people; holds no secret."""


DeleteFailures = list[DeleteFailure]


class Objects(Protocol):
    """A root: a flat map from keys to immutable bytes.

    Keys are plain ASCII components joined by ``/`` (see :func:`check_key`). All methods may be called from any thread.
    Errors of the transport's library arrive as errors of the domain; besides those that a method lists, each may raise:

    - ``StorageUnavailableError``: not reached, or no sensible answer, after retries of about a minute.
    - ``AccessDeniedError``: the credentials or permissions do not suffice.
    - ``BucketNotFoundError``: the bucket of the root does not exist.
    """

    @property
    def url(self) -> str:
        """The root, printable: it never holds a secret."""
        ...

    @property
    def workers(self) -> int:
        """How many calls at once suit this transport."""
        ...

    @property
    def copies_on_put(self) -> int:
        """How many copies of an object's bytes a put makes: memory that a commit must reckon with."""
        ...

    def put(self, key: str, data: "Buffer | Sequence[memoryview]", observe: Observe | None = None) -> int:
        """Store a new object and return its size; when it returns, storage has accepted every byte.

        Several buffers are stored one behind the other.

        The caller gives a fresh key: whether an object that is there already is refused depends on the transport.

        Raises:
            AlreadyExistsError: the key is taken (local files only); what is there is untouched.
            StorageFullError: no space or quota is left. No object, or, if the process dies, a partial one, remains.
        """
        ...

    def get(self, key: str, *, limit: int | None = None) -> memoryview:
        """Return an object's bytes.

        Args:
            key: the object.
            limit: how many bytes it may have; a larger one is refused before it is read into memory.

        Raises:
            MissingObjectError: there is no such object.
            CorruptDocumentError: it has more bytes than ``limit``.
        """
        ...

    def read_into(self, key: str, target: Memory, observe: Observe | None = None, size: int | None = None) -> None:
        """Fill ``target`` with as many of the object's first bytes.

        Args:
            key: the object.
            target: flat writable bytes; several buffers are filled one after the other, and a buffer may be among them
                more than once.
            observe: is shown the bytes as they arrive.
            size: what the whole object must measure; by default as much as ``target``.

        Raises:
            MissingObjectError: there is no such object, or it is shorter or longer than ``size``. The content of
                ``target`` is undefined.
        """
        ...

    def replace(self, key: str, data: "Buffer", *, exclusive: bool = False) -> None:
        """Put a small object over the one that is there; where the storage can, readers see the old or the new one.

        It is durable when this returns. A process that dies leaves the old object, the new one, or, on file systems,
        one beside it that is named like it and ends in ``.new``.

        Args:
            key: of the object.
            data: its content.
            exclusive: refuse to replace; only where the storage can do that without a race (local files).

        Raises:
            AlreadyExistsError: ``exclusive``, and there is one.
            StorageFullError: no space or quota is left; the old object stays where the storage is atomic.
        """
        ...

    def exists(self, key: str) -> bool:
        """Tell whether there is an object of that key. Directories are no objects."""
        ...

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        """Yield every object below ``prefix``, in no particular order, page by page.

        Args:
            prefix: empty, or whole components ending in ``/``.
            after: only keys that sort behind it. Object stores spared the others; elsewhere they are left out here.
        """
        ...

    def delete(self, keys: Sequence[str]) -> DeleteFailures:
        """Delete objects, in batches where the storage can; missing ones are no failure. No loss of power undoes it.

        Returns:
            The keys that are still there, with reasons. Only what concerns the whole root is raised.
        """
        ...

    def confirm(self, sizes: Mapping[str, int]) -> None:
        """Make objects that were put survive a loss of power, and make sure that each has arrived whole.

        Storage is asked, whatever it answered to the puts. Object stores make durable by themselves what they take.

        Args:
            sizes: how many bytes each object must have, by key.

        Raises:
            StorageUnavailableError: an object is missing, short or long; nothing that needs it may be published.
        """
        ...

    def close(self) -> None:
        """Give back connections and threads. The object must not be used afterwards."""
        ...


def check_key(key: str) -> str:
    """Return ``key`` if it can only mean one object below the root.

    Raises:
        InvalidInputError: it is empty, absolute, or has an empty, ``.`` or ``..`` component or a NUL.
    """
    # One pass over a padded copy; puts and gets of small objects come through here thousands of times.
    padded = f"/{key}/"
    if "//" in padded or "/./" in padded or "/../" in padded or "\0" in key:
        msg = f"{key!r} is no object key: it must be relative, without empty, '.' or '..' components"
        raise InvalidInputError(msg)
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if it is empty or whole components ending in ``/``.

    Raises:
        InvalidInputError: it is anything else.
    """
    if prefix:
        if not prefix.endswith("/"):
            msg = f"{prefix!r} is no listing prefix: it must end in '/'"
            raise InvalidInputError(msg)
        check_key(prefix[:-1])
    return prefix


def flat_bytes(data: "Buffer") -> memoryview:
    """Return ``data`` as flat bytes without copying.

    Raises:
        InvalidInputError: the buffer is not contiguous in C order.
    """
    view = memoryview(data)
    if view.nbytes == 0:
        # `cast` refuses shapes that hold a zero.
        return memoryview(b"")
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    if not view.c_contiguous:
        msg = "only buffers that are contiguous in C order can be stored"
        raise InvalidInputError(msg)
    return view.cast("B")


def flat_parts(data: "Buffer | Sequence[memoryview]") -> Sequence[memoryview]:
    """Return one buffer or several as flat bytes without copying; raises as :func:`flat_bytes` does."""
    if isinstance(data, list | tuple):
        return [flat_bytes(part) for part in data]
    return [flat_bytes(cast("Buffer", data))]


def joined(data: "Buffer | Sequence[memoryview]") -> memoryview:
    """Return one buffer, or several copied into one; raises as :func:`flat_bytes` does."""
    parts = flat_parts(data)
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def get_exactly(objects: Objects, key: str, size: int) -> memoryview:
    """Return an object's bytes if it has ``size`` of them.

    Raises:
        MissingObjectError: there is no such object, or it is shorter or longer; a longer one is not read.
    """
    try:
        found = objects.get(key, limit=size)
    except CorruptDocumentError as error:
        raise MissingObjectError(str(error)) from error
    if found.nbytes != size:
        raise wrong_size(objects.url, key, found.nbytes, size)
    return found


def size_in_bytes(target: Memory) -> int:
    """Return how many bytes one buffer or several take."""
    return target.nbytes if isinstance(target, memoryview) else sum(part.nbytes for part in target)


def wrong_size(root: str, key: str, found: int, expected: int) -> MissingObjectError:
    """Return the error for an object that is shorter or longer than the documents say."""
    how = "is short" if found < expected else "is long"
    msg = f"object {key} in {root} {how}: it has {found} bytes, not {expected}; run 'tailorstore verify'"
    return MissingObjectError(msg)


def check_limit(root: str, key: str, found: int, limit: int | None) -> None:
    """Refuse an object that is larger than it may be.

    Raises:
        CorruptDocumentError: ``found`` is more than ``limit``, in bytes.
    """
    if limit is not None and found > limit:
        msg = f"object {key} in {root} has {found} bytes and may have {limit} at most; run 'tailorstore verify'"
        raise CorruptDocumentError(msg)
