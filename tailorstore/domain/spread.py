"""Spreading one commit's work over many ranks: who writes which chunk, and who sends whom which piece of it.

Pure planning on shapes: every rank computes the same plan from the same descriptions, and nothing has to be agreed on
afterwards. What depends only on how arrays are cut is found once for all that are cut alike, so that hundreds of
thousands of chunks take less than a second.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tailorstore.domain.chunks import Box, Chunk, chunks_of
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.holdings import WAYS, Holding, Ints, holders_of, holdings_of, meetings_of

__all__ = [
    "Holding",
    "Piece",
    "SpreadArray",
    "Traffic",
    "assign",
    "holdings_of",
    "owners",
    "pieces_of",
    "traffic_of",
]

Writers = Sequence[int] | npt.NDArray[np.int32]
"""Of one array, the rank that writes each chunk, by chunk number."""

# What chunks cost beside their bytes, as bytes: a put takes half a millisecond where a gigabyte takes a second, a piece
# of a chunk some microseconds. Without it, all the small chunks of a large model, each of a thousand pieces, would go
# to the few ranks that the large ones left a little room.
_REQUEST_BYTES = 512 << 10
_PIECE_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class SpreadArray:
    """All that planning needs to know of one array."""

    name: str
    """For messages."""
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    itemsize: int
    """Bytes of one element."""
    holdings: tuple[Holding, ...]
    """Disjoint, together the whole tensor; from :func:`holdings_of`, which gives arrays that are cut alike the same
    tuple, so that comparing them takes no time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a chunk, on its way from a rank that holds it to the one that writes the chunk; these may be the same."""

    chunk: Chunk
    box: Box
    """In the tensor's coordinates; lies within one box of the sender's."""
    sender: int
    writer: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """What moves between ranks so that chunks can be written; one figure for each rank."""

    sent_bytes: Ints
    received_bytes: Ints
    received_pieces: Ints


# --- Who writes which chunk


def assign(arrays: Sequence[SpreadArray], hosts: Sequence[int]) -> list[npt.NDArray[np.int32]]:
    """Give every chunk to one of the ranks that hold a part of it, so that all write about as many bytes.

    Large chunks come first, those of equal size array by array. Each goes to the rank for which its work so far, plus
    the bytes of the chunk that others would have to send it, is least; among equals to ranks of one host after the
    other. The work of a chunk is its bytes and half a mebibyte for its object, or 16 KiB for each piece that it is put
    together of, if that is more.

    Let ``w`` be the work of the largest chunk. If every rank holds a part of every chunk, the work of no two ranks
    differs by more than ``2 w``: a chunk is given to a rank that had at most the chunk's bytes more than the least,
    and adds its work. If they hold equally much of it (replicas), the bound is ``w``. If chunks meet some ranks only,
    it holds among those that meet the same chunks, and over all the work is about as even as the shards are. As the
    bound holds at every moment, what a run of arrays with equally large chunks adds differs by twice as much at most:
    each layer of a model is spread evenly, not just all of them together.

    Args:
        arrays: of one commit.
        hosts: number of each rank's host, by rank.

    Returns:
        Of each array the writer of each chunk, by chunk number. The same on every rank that asks.

    Raises:
        InvalidInputError: an array's holdings are not the whole of it.
    """
    turns = _in_turns(hosts)
    known: dict[tuple[object, ...], list[_Job]] = {}
    jobs: list[_Job] = []
    counts = []
    for array in arrays:
        way = (array.shape, array.chunk_shape, array.itemsize, array.holdings)
        found = known.get(way)
        if found is None:
            known[way] = found = _jobs(array, turns)
        jobs += found
        counts.append(len(found))
    writers = _share_out(jobs, np.repeat(np.arange(len(arrays)), counts), turns)
    return np.split(writers, np.cumsum(counts))[:-1]


def owners(sizes: Sequence[int], candidates: Sequence[Sequence[int]], hosts: Sequence[int]) -> list[int]:
    """Give each of some layers, or anything else that has a size, as a whole to one rank, even by bytes.

    Large ones come first, each goes to the candidate that has fewest bytes so far; among equals to ranks of one host
    after the other. Where all ranks are candidates, no two differ by more than the largest.

    Args:
        sizes: in bytes.
        candidates: of each, the ranks that may have it.
        hosts: number of each rank's host, by rank.

    Returns:
        The rank of each. The same on every rank that asks.

    Raises:
        InvalidInputError: one that has no candidates.
    """
    turns = _in_turns(hosts)
    jobs = []
    for at, (size, ranks) in enumerate(zip(sizes, candidates, strict=True)):
        if not len(ranks):
            msg = f"number {at}, of {size} bytes, has no rank that could take it"
            raise InvalidInputError(msg)
        # What has no bytes is work too: without a weight, one rank would get all of it.
        jobs.append(_Job(max(1, size), np.unique(turns.place[list(ranks)]), np.int64(0)))
    writers: list[int] = _share_out(jobs, np.zeros(len(jobs), np.int64), turns).tolist()
    return writers


class _Turns(NamedTuple):
    """The order in which ranks are preferred where all else is equal: one of each host, then the next of each."""

    ranks: npt.NDArray[np.int32]
    """By place in that order."""
    place: Ints
    """By rank."""


class _Job(NamedTuple):
    work: int
    """In bytes."""
    places: Ints
    """Of the ranks that may do it, ascending."""
    missing: Ints | np.int64
    """Of each of them, bytes that others would have to send it."""


def _in_turns(hosts: Sequence[int]) -> _Turns:
    seen: dict[int, int] = {}
    turn = []
    for rank, host in enumerate(hosts):
        seen[host] = seen.get(host, -1) + 1
        turn.append((seen[host], host, rank))
    ranks = np.array([rank for _, _, rank in sorted(turn)], np.int32)
    return _Turns(ranks, np.argsort(ranks))


def _jobs(array: SpreadArray, turns: _Turns) -> list[_Job]:
    """Return the writing of each chunk of an array."""
    meetings = meetings_of(array.shape, array.chunk_shape, array.holdings)
    if meetings.elements.sum() != math.prod(array.shape):
        msg = f"{array.name}: its holdings are not the whole of shape {array.shape}, or overlap"
        raise InvalidInputError(msg)
    places = [turns.place[list(holding.ranks)] for holding in array.holdings]
    known: dict[tuple[bytes, bytes], _Job] = {}
    jobs = []
    for start, stop in itertools.pairwise(meetings.first.tolist()):
        holdings, elements = meetings.holdings[start:stop], meetings.elements[start:stop]
        alike = (holdings.tobytes(), elements.tobytes())
        if alike not in known:
            known[alike] = _job([places[at] for at in holdings], elements * array.itemsize)
        jobs.append(known[alike])
    return jobs


def _job(places: Sequence[Ints], sizes: Ints) -> _Job:
    """Return the writing of one chunk, given who holds each of its pieces and how many bytes these have."""
    who, at = np.unique(np.concatenate(places), return_inverse=True)
    held = np.zeros(len(who), np.int64)
    np.add.at(held, at, np.repeat(sizes, [len(some) for some in places]))
    size = int(sizes.sum())
    return _Job(max(size + _REQUEST_BYTES, len(places) * _PIECE_BYTES), who, size - held)


def _share_out(jobs: Sequence[_Job], groups: Ints, turns: _Turns) -> npt.NDArray[np.int32]:
    """Return the rank that does each job.

    Args:
        jobs: the large ones are given away first.
        groups: number of each job's group: equal jobs are given away group by group, and within a group those first
            that few ranks can do, so that the others can make up for them.
        turns: which ranks come first.
    """
    works = np.fromiter((job.work for job in jobs), np.int64, len(jobs))
    choices = np.fromiter((len(job.places) for job in jobs), np.int64, len(jobs))
    load = np.zeros(len(turns.ranks), np.int64)
    chosen = np.zeros(len(jobs), np.int64)
    for at in np.lexsort((choices, groups, -works)).tolist():
        work, places, missing = jobs[at]
        place = places[(load.take(places) + missing).argmin()]
        load[place] += work
        chosen[at] = place
    return turns.ranks[chosen]


# --- Who sends whom which piece


def pieces_of(array: SpreadArray, writers: Writers, rank: int, hosts: Sequence[int]) -> list[Piece]:
    """Return the pieces that a rank writes, its own among them, and those that it sends, by (chunk number, box).

    A piece comes from its writer if that holds it, else from a rank of the writer's host, else from any that does:
    among several, from one that depends on the chunk and its writer only, so that sending is spread too.

    Args:
        array: what is written.
        writers: of each chunk, by number; a writer need not hold anything of its chunk.
        rank: whose pieces are asked for.
        hosts: number of each rank's host, by rank.
    """
    meetings = meetings_of(array.shape, array.chunk_shape, array.holdings)
    writing, sending = _ends(array, writers, hosts)
    chunks = _chunks(array.shape, array.chunk_shape)
    return [
        Piece(
            chunk=chunks[meetings.chunks[at]],
            box=tuple(zip(meetings.starts[at].tolist(), meetings.stops[at].tolist(), strict=True)),
            sender=int(sending[at]),
            writer=int(writing[at]),
        )
        for at in np.flatnonzero((writing == rank) | (sending == rank))
    ]


def traffic_of(arrays: Sequence[SpreadArray], writers: Sequence[Writers], hosts: Sequence[int]) -> Traffic:
    """Return what :func:`pieces_of` makes move between ranks, for all arrays and ranks at once; own pieces stay."""
    traffic = Traffic(*(np.zeros(len(hosts), np.int64) for _ in range(3)))
    for array, by_chunk in zip(arrays, writers, strict=True):
        writing, sending = _ends(array, by_chunk, hosts)
        moves = writing != sending
        nbytes = meetings_of(array.shape, array.chunk_shape, array.holdings).elements[moves] * array.itemsize
        np.add.at(traffic.sent_bytes, sending[moves], nbytes)
        np.add.at(traffic.received_bytes, writing[moves], nbytes)
        np.add.at(traffic.received_pieces, writing[moves], 1)
    return traffic


def _ends(array: SpreadArray, writers: Writers, hosts: Sequence[int]) -> tuple[Ints, Ints]:
    """Return the writer and the sender of every piece, in order of the meetings."""
    meetings = meetings_of(array.shape, array.chunk_shape, array.holdings)
    holders = holders_of(array.holdings, tuple(hosts))
    writing = np.asarray(writers, np.int64)[meetings.chunks]
    if holders.alone:
        return writing, holders.ranks[meetings.holdings]
    found = np.searchsorted(holders.by_rank, key := meetings.holdings * len(hosts) + writing)
    itself = holders.by_rank.take(found, mode="clip") == key
    # Of replicas the one that has the writer's place among those of a piece of its own: on a mesh of ranks its
    # neighbour, so that sending is as even as writing.
    place = np.array(writers, np.int64)
    place[meetings.chunks[itself]] = (found - holders.first[meetings.holdings])[itself]
    near = meetings.holdings * len(hosts) + holders.host[writing]
    start, stop = (np.searchsorted(holders.by_host, near, side) for side in ("left", "right"))
    far = start == stop
    start = np.where(far, holders.first[meetings.holdings], start)
    stop = np.where(far, holders.first[meetings.holdings + 1], stop)
    sending = holders.ranks[start + place[meetings.chunks] % (stop - start)]
    return writing, np.where(itself, writing, sending)


@lru_cache(WAYS)
def _chunks(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> tuple[Chunk, ...]:
    return tuple(chunks_of(shape, chunk_shape))
