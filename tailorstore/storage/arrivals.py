"""Whether objects that were put have arrived whole: asked of the storage, in as few requests as it takes."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from tailorstore.domain.errors import StorageUnavailableError
from tailorstore.domain.names import LAYERS_PREFIX
from tailorstore.storage.threads import map_in_threads
from tailorstore.storage.transport import ObjectInfo

_WORTH_A_LISTING = 4
"""A listing costs as much as a dozen questions for one object; it shows a thousand, wanted or not."""

_MOST_NAMED = 3


def check_arrivals(
    root: str,
    sizes: Mapping[str, int],
    listing: Callable[[str], Iterator[ObjectInfo]],
    size_of: Callable[[str], int | None],
    workers: int,
) -> None:
    """Make sure that storage holds objects with exactly these sizes.

    The folder of a layer version is listed once. What a listing does not show as it must be is asked for by its key:
    listings of some storages lag behind.

    Args:
        root: for messages.
        sizes: how many bytes each object must have, by key.
        listing: yields what is below a prefix.
        size_of: returns an object's size in bytes, ``None`` where there is none.
        workers: how many requests at once.

    Raises:
        StorageUnavailableError: an object is missing, short or long.
    """
    folders = by_folder(sizes)
    listed = [name for name, members in folders.items() if name and len(members) >= _WORTH_A_LISTING]
    shown: dict[str, int] = {}
    for found in map_in_threads(lambda name: {info.key: info.size for info in listing(name)}, listed, workers):
        shown |= found
    doubtful = [key for key, size in sizes.items() if shown.get(key) != size]
    asked = dict(zip(doubtful, map_in_threads(size_of, doubtful, workers), strict=True))
    wrong = sorted(key for key, found in asked.items() if found != sizes[key])
    if wrong:
        raise not_arrived(root, {key: (asked[key], sizes[key]) for key in wrong})


def not_arrived(root: str, wrong: Mapping[str, tuple[int | None, int]]) -> StorageUnavailableError:
    """Return the error for objects that are not as they were put: key → (size found or ``None``, size expected)."""
    named = [
        f"{key} ({'missing' if found is None else f'{found} of {expected} bytes'})"
        for key, (found, expected) in list(wrong.items())[:_MOST_NAMED]
    ]
    more = f" and {len(wrong) - len(named)} more" if len(wrong) > len(named) else ""
    return StorageUnavailableError(
        f"{root} acknowledged objects that it does not hold as they were written: {', '.join(named)}{more}; nothing "
        "was published. Try again, and see what 'tailorstore verify' finds: storage that loses writes is not to be "
        "trusted"
    )


def by_folder(sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return the sizes of objects by the prefix of their layer version, empty for objects that belong to none."""
    folders: dict[str, dict[str, int]] = defaultdict(dict)
    for key, size in sizes.items():
        folders[_folder(key)][key] = size
    return folders


def _folder(key: str) -> str:
    """Return the prefix of the layer version that a key belongs to; empty for what belongs to none."""
    parts = key.split("/", 3)
    return "/".join(parts[:3]) + "/" if len(parts) == 4 and f"{parts[0]}/" == LAYERS_PREFIX else ""
