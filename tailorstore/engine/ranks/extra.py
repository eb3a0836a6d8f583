"""``@extra`` of many ranks: what the coordinator passed, and what other ranks passed that is not the same.

Random number generators and positions in the data differ from rank to rank. Each rank is given its own again by a
restore into as many ranks.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from tailorstore.domain.skeleton import paths_in
from tailorstore.engine.commit import capture_extra
from tailorstore.engine.contents import OF_RANKS
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.tensors.capture import Capture, LayerCapture
from tailorstore.engine.tensors.memory import (
    DTYPES,
    Tensor,
    as_bytes,
    empty_host,
    host_bytes,
    name_of,
    resolved,
    wait_for_devices,
)
from tailorstore.engine.tensors.packing import Arrays, Packer
from tailorstore.engine.tensors.rng import rng_states
from tailorstore.storage.layers import canonical_json


@dataclass(frozen=True, slots=True)
class OwnExtra:
    """What one rank has for ``@extra``."""

    fingerprint: str
    """Of what its caller passed."""
    parts: dict[str, Any]
    """Skeletons of ``extra`` and ``rng``."""
    arrays: Arrays
    """Of these, under paths that no other rank uses."""
    whole: LayerCapture | None
    """On the coordinator: all that a commit of its own would hold."""


def own_extra(ranks: Ranks, captured: Capture, whole: Capture, extra: Any) -> OwnExtra:  # noqa: ANN401
    """Pack what this rank's caller passed.

    Args:
        ranks: that commit together.
        captured: this rank's own state.
        whole: that of all ranks.
        extra: what was passed.

    Raises:
        ExtraStateError: it cannot be stored.
    """
    fingerprint = _fingerprint(extra)
    if ranks.is_coordinator:
        return OwnExtra(fingerprint, {}, {}, capture_extra(replace(whole, shared_arrays=captured.shared_arrays), extra))
    packer = Packer(f"@ranks/{ranks.rank}/")
    parts = {
        "extra": packer.pack({} if extra is None else extra, "extra"),
        "rng": packer.pack(rng_states(), "rng"),
    }
    return OwnExtra(fingerprint, parts, packer.arrays, None)


def gather_extra(ranks: Ranks, mine: OwnExtra, fingerprints: Sequence[str]) -> LayerCapture | None:
    """Return ``@extra`` on the coordinator, ``None`` elsewhere; collective.

    Args:
        ranks: all of them call this.
        mine: from :func:`own_extra`.
        fingerprints: of every rank.
    """
    if ranks.size == 1:
        return mine.whole
    # What is the same as the coordinator's is stored once.
    parts = mine.parts if fingerprints[ranks.rank] != fingerprints[0] else {"rng": mine.parts.get("rng")}
    described: dict[str, Any] = {}
    if mine.whole is None:
        arrays = {path: _to_json(mine.arrays[path]) for path in paths_in(parts)}
        described = {"parts": parts, "arrays": arrays}
    others = ranks.gather(described)
    if mine.whole is None:
        return None
    mine.whole.content[OF_RANKS] = [one.get("parts", {}) for one in others]
    for one in others:
        mine.whole.arrays.update({path: _from_json(array) for path, array in one.get("arrays", {}).items()})
    return mine.whole


def settled_extra(extra: LayerCapture, *, staged: bool) -> LayerCapture:
    """Return ``@extra`` as other threads may read it: if ``staged``, copied, so that what was passed may change."""
    if not staged:
        wait_for_devices(extra.arrays.values())
        return extra
    # Resolving carries a lazy conjugation out in new memory, but else gives the tensor itself.
    return replace(extra, arrays={path: resolved(one).to("cpu", copy=True) for path, one in extra.arrays.items()})


def _fingerprint(extra: Any) -> str:  # noqa: ANN401
    packer = Packer()
    hasher = xxhash.xxh3_128(canonical_json(packer.pack({} if extra is None else extra, "extra")))
    for path, tensor in packer.arrays.items():
        hasher.update(f"{path}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        hasher.update(host_bytes(tensor))
    return hasher.hexdigest()


def _to_json(tensor: Tensor) -> list[Any]:
    return [name_of(tensor.dtype), list(tensor.shape), base64.b64encode(host_bytes(tensor)).decode("ascii")]


def _from_json(described: list[Any]) -> Tensor:
    dtype, shape, data = described
    tensor = empty_host(tuple(shape), dtype)
    assert dtype in DTYPES  # noqa: S101 (packed by another rank of this program)
    as_bytes(tensor)[:] = base64.b64decode(data)
    return tensor
