"""The values of pieces: where this rank has them, how they travel, and how chunks are put together of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tailorstore.domain.chunks import Box, Chunk, within
from tailorstore.domain.spread import Piece
from tailorstore.engine.ranks.boxes import Bytes
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.plan import DueArray, Round, WritePlan
from tailorstore.engine.tensors.capture import Capture, LayerCapture
from tailorstore.engine.tensors.memory import (
    DTYPES,
    Tensor,
    as_bytes,
    empty_host,
    host_bytes,
    is_plain,
    nbytes,
    resolved,
    wait_for_devices,
)
from tailorstore.engine.tensors.parameters import held_of
from tailorstore.engine.tensors.staging import HostArena

PieceKey = tuple[str, str, Box]
"""Layer, array path, box."""
Pieces = Mapping[PieceKey, Tensor]
"""Of the pieces that this rank has: tensors of their boxes' shapes, live or staged."""


def key_of(array: DueArray, piece: Piece) -> PieceKey:
    """Return what a piece is found under."""
    return array.layer, array.path, piece.box


def own_pieces(plan: WritePlan, captured: Capture, rank: int, arena: HostArena | None) -> dict[PieceKey, Tensor]:
    """Return the pieces that this rank writes or sends.

    Args:
        plan: this rank's part.
        captured: its live state.
        rank: its number.
        arena: copies them to the host, so that the model may change; ``None``: live views.
    """
    live = {
        key_of(array, piece): view_of(captured.layers[array.layer], array.path, piece.box)
        for array, piece in plan.pieces()
        if piece.sender == rank
    }
    if arena is None:
        wait_for_devices(live.values())
        return live
    keys = {str(number): key for number, key in enumerate(live)}
    copies = arena.copy({number: live[key] for number, key in keys.items()})
    return {key: copies[number] for number, key in keys.items()}


def view_of(layer: LayerCapture, path: str, box: Box) -> Tensor:
    """Return the live elements of a box that this rank holds; nothing is copied."""
    for part in held_of(layer, path).parts:
        if all(low <= start and stop <= high for (start, stop), (low, high) in zip(box, part.box, strict=True)):
            return part.tensor.detach()[within(box, part.box)] if box else part.tensor.detach()
    raise KeyError((layer.name, path, box))


def exchange(ranks: Ranks, one: Round, pieces: Pieces) -> dict[PieceKey, Tensor]:
    """Send the pieces of a round to the ranks that write them, and return those that this rank writes, its own too.

    Args:
        ranks: all of them call this.
        one: the round.
        pieces: this rank's.

    Raises:
        RankLostError: another rank died.
    """
    outgoing: dict[int, list[Tensor]] = {}
    incoming: dict[int, list[tuple[PieceKey, DueArray, int]]] = {}
    found: dict[PieceKey, Tensor] = {}
    for array in one.arrays:
        size = DTYPES[array.spec.dtype].itemsize
        for piece in array.pieces:
            key = key_of(array, piece)
            count = size * math.prod(stop - start for start, stop in piece.box)
            if piece.sender == piece.writer:
                found[key] = pieces[key]
            elif piece.sender == ranks.rank:
                outgoing.setdefault(piece.writer, []).append(pieces[key])
            else:
                incoming.setdefault(piece.sender, []).append((key, array, count))
    if not one.travels:
        return found
    buffers = ranks.outbox({peer: sum(map(nbytes, held)) for peer, held in outgoing.items()})
    for peer, tensors in outgoing.items():
        _pack(buffers[peer], tensors)
    arrived = ranks.exchange(buffers, {peer: sum(count for *_, count in held) for peer, held in incoming.items()})
    for peer, held in incoming.items():
        at = 0
        for key, array, count in held:
            found[key] = _tensor(arrived[peer][at : at + count], array.spec.dtype, key[2])
            at += count
    return found


def _pack(buffer: Bytes, tensors: Sequence[Tensor]) -> None:
    """Put tensors' bytes one behind the other."""
    at = 0
    for tensor in tensors:
        size = nbytes(tensor)
        buffer[at : at + size] = np.frombuffer(host_bytes(tensor), np.uint8)
        at += size


def _tensor(data: Bytes, dtype: str, box: Box) -> Tensor:
    shape = tuple(stop - start for start, stop in box)
    if not data.size:
        return torch.empty(shape, dtype=DTYPES[dtype])
    # Pieces lie one behind the other: an element may begin anywhere.
    aligned = data if data.ctypes.data % DTYPES[dtype].itemsize == 0 else data.copy()
    return torch.from_numpy(aligned).view(DTYPES[dtype]).reshape(shape)


@dataclass(frozen=True, slots=True)
class ChunkPieces:
    """A chunk that this rank writes."""

    array: DueArray
    chunk: Chunk
    pieces: tuple[tuple[Box, Tensor], ...]

    @property
    def is_ready(self) -> bool:
        """Whether its bytes are in memory as they are, in one piece or several that follow each other."""
        return all(is_plain(tensor) for _, tensor in self.pieces) and self._follow_each_other()

    def data(self) -> list[memoryview]:
        """Return its bytes, padding left out; a copy unless it is ready."""
        if self.is_ready:
            return [as_bytes(tensor) for _, tensor in self.pieces]
        return [as_bytes(assembled(self.chunk.box, self.array.spec.dtype, self.pieces))]

    def _follow_each_other(self) -> bool:
        """Whether pieces are cut only where that leaves them one behind the other in memory."""
        if len(self.pieces) == 1:
            return True
        box, cut = self.chunk.box, self.chunk.cut
        alike = all(piece[:cut] == box[:cut] and piece[cut + 1 :] == box[cut + 1 :] for piece, _ in self.pieces)
        starts = [piece[cut][0] for piece, _ in self.pieces]
        return alike and starts == sorted(starts)


def assembled(box: Box, dtype: str, pieces: Iterable[tuple[Box, Tensor]]) -> Tensor:
    """Put the tensor of a box together in host memory."""
    target = empty_host(tuple(stop - start for start, stop in box), dtype)
    for part, tensor in pieces:
        target[within(part, box)].copy_(resolved(tensor))
    return target


def chunks_to_write(one: Round, rank: int, values: Pieces) -> list[ChunkPieces]:
    """Return the chunks of a round that this rank writes, each with all its pieces."""
    found: dict[tuple[int, int], list[tuple[Box, Tensor]]] = {}
    chunks: dict[tuple[int, int], tuple[DueArray, Chunk]] = {}
    for number, array in enumerate(one.arrays):
        for piece in array.pieces:
            if piece.writer == rank:
                place = number, piece.chunk.number
                chunks[place] = array, piece.chunk
                found.setdefault(place, []).append((piece.box, values[key_of(array, piece)]))
    return [ChunkPieces(*chunks[place], tuple(held)) for place, held in found.items()]
