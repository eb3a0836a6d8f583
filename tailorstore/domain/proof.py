"""A proof of what a commit's composite holds, so that a catalog whose rows have rotted or gone does not pass for whole.

A database keeps no checksum of a row: a bit that flips in a SQLite file can make a plain value another plain value.
Sums of digests do not depend on the order of the layers, so a whole catalog is checked in one pass over its rows. They
protect from accidents, not from somebody who wants them to be equal.
"""

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

from tailorstore.domain.records import LayerVersion

_SIZE: Final = 16
"""Bytes of a proof."""


def mark_of(layer: str, version_id: str, digest: str, fidelity: str, base_id: str | None) -> int:
    """Return what one layer version adds to the proofs of the composites that hold it."""
    told = "\0".join((layer, version_id, digest, fidelity, base_id or ""))
    # Names may hold what is no text: half a surrogate pair.
    return int.from_bytes(blake2b(told.encode("utf-8", "surrogatepass"), digest_size=_SIZE).digest(), "big")


def proof_of(commit_id: str, step: int, marks: Iterable[int]) -> str:
    """Return the proof of a commit: of its id, its step and which version of every layer it holds.

    Args:
        commit_id: of the commit.
        step: of the commit.
        marks: of its layer versions, in any order.

    Returns:
        32 hexadecimal digits.
    """
    told = f"{commit_id}\0{step}\0{sum(marks) % (1 << 8 * _SIZE)}"
    return blake2b(told.encode(), digest_size=_SIZE).hexdigest()


def proof_of_versions(commit_id: str, step: int, versions: Iterable[LayerVersion]) -> str:
    """Return the proof of a commit that holds these versions; see :func:`proof_of`."""
    marks = (mark_of(one.layer, one.version_id, one.digest, one.fidelity, one.base_id) for one in versions)
    return proof_of(commit_id, step, marks)
