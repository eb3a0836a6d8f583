"""What one process and many do alike: errors that all ranks raise, names that some of them have."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import xxhash

from tailorstore.engine.ranks.group import Ranks
from tailorstore.storage.layers import canonical_json


def together(ranks: Ranks | None, what: str) -> AbstractContextManager[None]:
    """Return ``ranks.together``; of a process alone, errors are its own."""
    return ranks.together(what) if ranks is not None else nullcontext()


def names_elsewhere(ranks: Ranks | None, names: Iterable[str]) -> frozenset[str]:
    """Return the names that other ranks have and this one has not: stages of a pipeline hold different layers."""
    if ranks is None or ranks.size == 1:
        return frozenset()
    mine = sorted(names)
    digests = ranks.gather(xxhash.xxh3_128_hexdigest(canonical_json(mine)))
    if len(set(digests)) == 1:
        return frozenset()
    return frozenset(name for found in ranks.gather(mine) for name in found) - frozenset(mine)
