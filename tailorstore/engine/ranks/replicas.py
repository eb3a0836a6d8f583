"""Whether ranks that hold the same part of a parameter hold the same values.

Of replicas any one is written. Tensors that are no replicas and are not declared as shards, as experts in plain tensors
of one name, would be mixed without a word: a few elements of every parameter tell.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import xxhash

from tailorstore.domain.errors import RanksDisagreeError
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.outline import Whole
from tailorstore.engine.ranks.pieces import view_of
from tailorstore.engine.tensors.capture import Capture, LayerCapture, slots_of
from tailorstore.engine.tensors.memory import Tensor, as_bytes, resolved
from tailorstore.engine.tensors.sampling import take

_ELEMENTS = 16
_SHOWN = 5


Replicas = Mapping[str, Sequence[tuple[str, Tensor]]]
"""Ranks that share parts of parameters, as text → for each such part the parameter's name and some elements."""


def sampled_replicas(rank: int, whole: Whole, captured: Capture) -> Replicas:
    """Return a few elements of every parameter that other ranks hold too."""
    samples: dict[str, list[tuple[str, Tensor]]] = {}
    for members, name, tensor in _replicas(rank, whole, captured):
        samples.setdefault(",".join(map(str, members)), []).append((name, tensor))
    return samples


def digests_of(replicas: Replicas) -> dict[str, str]:
    """Return one digest for all parts that the same ranks share."""
    return {members: _digest([tensor for _, tensor in held]) for members, held in replicas.items()}


def check_replicas(ranks: Ranks, mine: Replicas, said: Sequence[Mapping[str, str]]) -> None:
    """Compare what ranks share.

    Args:
        ranks: all of them call this.
        mine: this rank's samples.
        said: every rank's digests.

    Raises:
        RanksDisagreeError: some differ; names the parameters and the ranks. Nothing was written.
    """
    suspects = {members for found in said for members in found if _differ(members, said)}
    if not suspects:
        return
    in_detail = ranks.gather(
        {members: {name: _digest([tensor]) for name, tensor in mine.get(members, [])} for members in suspects}
    )
    culprits = []
    for members in sorted(suspects):
        first, *others = (int(rank) for rank in members.split(","))
        for name, digest in in_detail[first][members].items():
            other = [rank for rank in others if in_detail[rank][members].get(name) != digest]
            if other:
                culprits.append(f"{name!r} on ranks {first} and {other[0]}")
    shown = "; ".join(culprits[:_SHOWN]) + (f"; and {len(culprits) - _SHOWN} more" if len(culprits) > _SHOWN else "")
    msg = (
        f"ranks hold different values of what should be copies of one parameter: {shown}. Nothing was written. Give"
        " parameters that are not shared names of their own, or make them DTensors; copies that drifted apart are a"
        " fault of the training"
    )
    raise RanksDisagreeError(msg)


def _replicas(rank: int, whole: Whole, captured: Capture) -> Iterator[tuple[tuple[int, ...], str, Tensor]]:
    """Yield the ranks that share a part of a parameter with this one, its name, and some elements of it."""
    for name, layer in captured.layers.items():
        for path, owner in _compared(layer):
            for holding in whole.holdings[name][path]:
                shared = rank in holding.ranks and len(holding.ranks) > 1
                if shared and all(start < stop for start, stop in holding.box):
                    yield holding.ranks, owner, _sample(view_of(layer, path, holding.box))


def _compared(layer: LayerCapture) -> Iterator[tuple[str, str]]:
    """Yield the array path and name of every parameter, and of slots that are plain where the parameter is spread.

    Such a slot may be of this rank's own shard, and of equal shape on others.
    """
    params = {name: value["$array"] for name, value in layer.content["params"].items()}
    yield from ((path, name) for name, path in params.items())
    for path, (name, slot) in slots_of(layer).items():
        if params.get(name) in layer.held and path not in layer.held:
            yield path, f"{name} ({slot})"


def _sample(tensor: Tensor) -> Tensor:
    if tensor.numel() <= _ELEMENTS:
        return resolved(tensor).reshape(-1)
    index = torch.linspace(0, tensor.numel() - 1, _ELEMENTS, dtype=torch.float64).long()
    return resolved(take(tensor, index))


def _digest(samples: list[Tensor]) -> str:
    hasher = xxhash.xxh3_128()
    for device in dict.fromkeys(sample.device for sample in samples):
        raw = [sample.contiguous().view(torch.uint8) for sample in samples if sample.device == device]
        hasher.update(as_bytes(torch.cat(raw).cpu()))
    return hasher.hexdigest()


def _differ(members: str, said: Sequence[Mapping[str, str]]) -> bool:
    return len({said[int(rank)].get(members) for rank in members.split(",")}) > 1
