"""The plan of many ranks: every element written once, by a rank that is near it, and all of them equally busy."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorstore.domain import holdings
from tailorstore.domain.chunks import Box, chunks_of, meet, within
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.spread import Holding, Piece, SpreadArray, assign, holdings_of, owners, pieces_of, traffic_of
from tests.domain.meshes import Mesh, ddp, fsdp, meshes, shapes

REQUEST, PIECE = 512 << 10, 16 << 10
"""What an object costs beside its bytes, as `assign` promises; what a piece costs where there are many of them."""

MEBIBYTE = 1 << 20
PATIENT = settings(deadline=None)
"""Examples are small, but the first of a kind fills caches, and machines are busy."""


@st.composite
def arrays_of(draw: st.DrawFn, mesh: Mesh) -> list[SpreadArray]:
    cut = draw(st.lists(shapes(), min_size=1, max_size=5))
    return [mesh.array(shape, chunk_shape, draw(st.sampled_from([1, 4, MEBIBYTE]))) for shape, chunk_shape in cut]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[SpreadArray], list[int]]:
    """Draw the arrays of a world, and the hosts of its ranks."""
    mesh = draw(meshes())
    hosts = draw(st.lists(st.sampled_from([0, 1, 2, 7]), min_size=mesh.ranks, max_size=mesh.ranks))
    return draw(arrays_of(mesh)), hosts


def loads(arrays: Sequence[SpreadArray], writers: Sequence[Sequence[int]], ranks: int, request: int = 0) -> list[int]:
    """Return the bytes that each rank writes, and so much more for each object."""
    total = [0] * ranks
    for array, by_chunk in zip(arrays, writers, strict=True):
        for chunk in chunks_of(array.shape, array.chunk_shape):
            total[by_chunk[chunk.number]] += chunk.elements * array.itemsize + request
    return total


def largest(arrays: Sequence[SpreadArray]) -> int:
    return max(
        (chunk.elements * one.itemsize for one in arrays for chunk in chunks_of(one.shape, one.chunk_shape)), default=0
    )


def plan(arrays: Sequence[SpreadArray], hosts: Sequence[int]) -> list[list[int]]:
    return [writers.tolist() for writers in assign(arrays, hosts)]


# --- Writers


@PATIENT
@given(worlds())
def test_every_chunk_has_one_writer_that_holds_some_of_it(world: tuple[list[SpreadArray], list[int]]) -> None:
    arrays, hosts = world
    for array, writers in zip(arrays, plan(arrays, hosts), strict=True):
        chunks = list(chunks_of(array.shape, array.chunk_shape))
        assert len(writers) == len(chunks)
        for chunk in chunks:
            holders = {rank for one in array.holdings if meet(one.box, chunk.box) is not None for rank in one.ranks}
            assert writers[chunk.number] in holders


@PATIENT
@given(worlds())
def test_every_rank_makes_the_same_plan_from_its_own_copy_of_the_descriptions(
    world: tuple[list[SpreadArray], list[int]],
) -> None:
    arrays, hosts = world
    for cached in (holdings.meetings_of, holdings.holders_of):
        cached.cache_clear()
    theirs = [
        SpreadArray(
            "it", one.shape, one.chunk_shape, one.itemsize, tuple(Holding(h.box, h.ranks) for h in one.holdings)
        )
        for one in arrays
    ]
    assert plan(theirs, tuple(hosts)) == plan(arrays, hosts)
    for ours, mine, writers in zip(arrays, theirs, assign(arrays, hosts), strict=True):
        for rank in range(len(hosts)):
            assert pieces_of(mine, writers.tolist(), rank, tuple(hosts)) == pieces_of(ours, writers, rank, hosts)


@PATIENT
@given(st.integers(1, 9), st.data())
def test_replicas_differ_by_no_more_than_the_largest_chunk(ranks: int, data: st.DataObject) -> None:
    arrays = data.draw(arrays_of(ddp(ranks)))
    work = loads(arrays, plan(arrays, [0] * ranks), ranks, REQUEST)
    assert max(work) - min(work) <= largest(arrays) + REQUEST


@PATIENT
@given(st.integers(1, 6), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=12))
def test_ranks_that_meet_every_chunk_differ_by_no_more_than_two_of_the_largest(
    ranks: int, sizes: list[tuple[int, int]]
) -> None:
    # A chunk that is a whole tensor of at least as many rows as there are ranks, unevenly cut unless they divide it.
    sizes = [(rows * ranks - rows // 2 if rows < ranks else rows * ranks, itemsize << 16) for rows, itemsize in sizes]
    arrays = [fsdp(ranks).array((rows,), (rows,), itemsize) for rows, itemsize in sizes]
    arrays = [one for one in arrays if len(one.holdings) == ranks]
    work = loads(arrays, plan(arrays, [0] * ranks), ranks, REQUEST)
    assert max(work) - min(work) <= 2 * (largest(arrays) + REQUEST)


BLOCK = [(512, 512), (129, 512), (129, 512), (512, 512), (1411, 512), (1411, 512), (512, 1411), (512,), (512,)]
"""A transformer's block: uneven in every way of cutting it but one."""


def block_chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Cut along the first dimension, into chunks of at most 64 rows: several shards, or a part of one."""
    return (min(64, shape[0]), *shape[1:])


def shares(arrays: Sequence[SpreadArray], ranks: int) -> list[float]:
    """Return the bytes that each rank holds, those of replicas divided among them: the most even writing there is."""
    total = [0.0] * ranks
    for array in arrays:
        for one in array.holdings:
            nbytes = math.prod(stop - start for start, stop in one.box) * array.itemsize
            for rank in one.ranks:
                total[rank] += nbytes / len(one.ranks)
    return total


def by_host(figures: Sequence[float], hosts: Sequence[int]) -> list[float]:
    return [float(total) for total in np.bincount(hosts, figures)]


@pytest.mark.parametrize(
    "mesh",
    [
        ddp(16),
        fsdp(2),
        fsdp(4),
        fsdp(7),
        fsdp(16),
        fsdp(61),
        Mesh((4, 4), (None, 0)),
        Mesh((3, 8), (None, 0)),
        Mesh((4, 4), (0, 1)),
        Mesh((8, 4), (0, 1)),
        Mesh((2, 8), (0, None)),
        Mesh((2, 4, 2), (None, 0, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [1, 12])
def test_a_model_is_written_evenly_by_ranks_and_hosts_whatever_the_layout(mesh: Mesh, blocks: int) -> None:
    shapes = [(1201, 512), *BLOCK * blocks, (512,), (1201, 512)]
    arrays = [mesh.array(shape, block_chunks(shape), itemsize << 6) for shape in shapes for itemsize in (2, 4, 4, 4)]
    hosts = [rank // 4 for rank in range(mesh.ranks)]
    writers = plan(arrays, hosts)
    written = loads(arrays, writers, mesh.ranks)
    held = shares(arrays, mesh.ranks)
    # A chunk is not divided: two of them is what the plan may miss.
    slack = 2 * largest(arrays)
    assert max(written) <= max(held) + slack
    assert min(written) >= min(held) - slack
    assert max(by_host(written, hosts)) <= max(by_host(held, hosts)) + slack


def test_few_chunks_go_to_one_rank_of_each_host_first() -> None:
    hosts = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    array = ddp(10).array((6,), (1,))
    assert plan([array], hosts) == [[0, 4, 8, 1, 5, 9]]
    assert owners([5] * 5, [range(10)] * 5, hosts) == [0, 4, 8, 1, 5]


def test_large_chunks_are_given_away_before_small_ones() -> None:
    sizes = [1, 1, 2]  # in this order one rank would get 1, the other 3
    arrays = [ddp(2).array((1,), (1,), size * MEBIBYTE) for size in sizes]
    assert plan(arrays, [0, 0]) == [[1], [1], [0]]
    assert owners(sizes, [range(2)] * 3, [0, 0]) == [1, 1, 0]


@pytest.mark.parametrize(("ranks", "work"), [(4, REQUEST + 1024), (64, 64 * PIECE)])
def test_many_small_chunks_do_not_all_go_to_the_rank_that_large_ones_left_room(ranks: int, work: int) -> None:
    large = ddp(ranks).array((ranks - 1, 32 * MEBIBYTE), (1, 32 * MEBIBYTE), 1)
    small = [fsdp(ranks).array((64,), (64,), 16) for _ in range(40 * ranks)]
    _, *spread_out = plan([large, *small], [0] * ranks)
    counts = [spread_out.count([rank]) for rank in range(ranks)]
    # The room is for one large chunk; by bytes alone that would be for all the small ones.
    assert 40 < max(counts) <= 40 + 32 * MEBIBYTE // work + 1
    assert sum(counts) == 40 * ranks
    assert min(counts) > 0


def test_the_rank_that_holds_most_of_a_chunk_writes_it() -> None:
    parts: dict[int, list[Box]] = {0: [((0, 3),)], 1: [((3, 9),)], 2: [((9, 12),)]}
    array = SpreadArray("it", (12,), (12,), MEBIBYTE, holdings_of("it", (12,), parts))
    assert plan([array], [0, 0, 0]) == [[1]]
    # Two shards of one rank count together.
    parts = {0: [((0, 4),), ((8, 12),)], 1: [((4, 8),)]}
    array = SpreadArray("it", (12,), (12,), MEBIBYTE, holdings_of("it", (12,), parts))
    assert plan([array], [0, 0]) == [[0]]


def test_a_rank_with_an_empty_shard_writes_and_sends_nothing_of_it_and_more_of_the_rest() -> None:
    mesh = fsdp(4)
    short, long = mesh.array((3, 8), (1, 8), MEBIBYTE), mesh.array((64, 1), (1, 1), MEBIBYTE)
    first, second = assign([short, long], [0] * 4)
    assert set(first.tolist()) == {0, 1, 2}
    assert pieces_of(short, first, 3, [0] * 4) == []
    assert second.tolist().count(3) == 16  # of 64 chunks that meet one rank each, those that are its own
    both = mesh.array((2,), (2,), MEBIBYTE)
    writers = plan([mesh.array((1, 9), (1, 9), MEBIBYTE), both], [0] * 4)
    assert writers == [[0], [1]]


def test_holdings_that_leave_a_gap_are_refused_by_the_array_s_name() -> None:
    array = SpreadArray("layer 'a', array 'a.w'", (4,), (2,), 4, (Holding(((0, 3),), (0,)),))
    with pytest.raises(InvalidInputError, match=r"layer 'a', array 'a\.w'"):
        assign([array], [0])


# --- Pieces


@PATIENT
@given(worlds())
def test_the_pieces_of_a_chunk_are_disjoint_and_together_the_whole(world: tuple[list[SpreadArray], list[int]]) -> None:
    arrays, hosts = world
    for array, writers in zip(arrays, assign(arrays, hosts), strict=True):
        check_pieces(array, writers.tolist(), hosts)


@PATIENT
@given(worlds(), st.integers(0, 7))
def test_a_writer_that_holds_nothing_is_sent_everything(world: tuple[list[SpreadArray], list[int]], owner: int) -> None:
    arrays, hosts = world
    for array in arrays:
        chunks = len(list(chunks_of(array.shape, array.chunk_shape)))
        check_pieces(array, [owner % len(hosts)] * chunks, hosts)


def check_pieces(array: SpreadArray, writers: list[int], hosts: list[int]) -> None:
    listed = [pieces_of(array, writers, rank, hosts) for rank in range(len(hosts))]
    covered = np.zeros(array.shape, np.int64)
    for rank, pieces in enumerate(listed):
        assert pieces == sorted(pieces, key=lambda piece: (piece.chunk.number, piece.box))
        for piece in pieces:
            assert rank in {piece.sender, piece.writer}
            assert piece.writer == writers[piece.chunk.number]
            assert piece in listed[piece.sender]
            assert piece in listed[piece.writer]
            check_sender(array, piece, hosts)
            if rank == piece.writer:
                whole = np.zeros([stop - start for start, stop in piece.chunk.box], np.int64)
                whole[within(piece.box, piece.chunk.box)] = 1
                covered[piece.chunk.slices] += whole
    assert (covered == 1).all()
    assert {chunk for pieces in listed for chunk in (piece.chunk for piece in pieces)} == set(
        chunks_of(array.shape, array.chunk_shape)
    )
    check_traffic(array, writers, hosts, listed)


def check_sender(array: SpreadArray, piece: Piece, hosts: list[int]) -> None:
    """Check that a piece comes from within one box of a rank that is as near as can be."""
    (ranks,) = [one.ranks for one in array.holdings if meet(one.box, piece.box) is not None]
    (box,) = [one.box for one in array.holdings if meet(one.box, piece.box) is not None]
    assert meet(box, piece.box) == piece.box
    assert piece.sender in ranks
    if piece.writer in ranks:
        assert piece.sender == piece.writer
    elif hosts[piece.writer] in {hosts[rank] for rank in ranks}:
        assert hosts[piece.sender] == hosts[piece.writer]


def check_traffic(array: SpreadArray, writers: list[int], hosts: list[int], listed: list[list[Piece]]) -> None:
    traffic = traffic_of([array], [writers], hosts)
    for rank, pieces in enumerate(listed):
        moving = [piece for piece in pieces if piece.sender != piece.writer]
        coming = [piece for piece in moving if piece.writer == rank]
        assert traffic.received_pieces[rank] == len(coming)
        assert traffic.received_bytes[rank] == sum(nbytes(array, piece) for piece in coming)
        assert traffic.sent_bytes[rank] == sum(nbytes(array, piece) for piece in moving if piece.sender == rank)


def nbytes(array: SpreadArray, piece: Piece) -> int:
    return math.prod(stop - start for start, stop in piece.box) * array.itemsize


@pytest.mark.parametrize("mesh", [Mesh((4, 16), (None, 0)), Mesh((16, 4), (0, None)), Mesh((7, 8), (None, 0))], ids=str)
@pytest.mark.parametrize("host", [1, 3, 8])
def test_replicas_share_the_sending(mesh: Mesh, host: int) -> None:
    arrays = [mesh.array((1000, 64), (250, 64)) for _ in range(80)]
    hosts = [rank // host for rank in range(mesh.ranks)]
    sent = traffic_of(arrays, assign(arrays, hosts), hosts).sent_bytes
    by_replica = [sum(sent[rank] for rank in mesh.replicas_like(rank)) for rank in range(mesh.ranks)]
    assert min(by_replica) > 0
    assert max(by_replica) <= 1.5 * min(by_replica)


def test_a_scalar_is_one_piece() -> None:
    array = ddp(3).array((), ())
    ((writer,),) = plan([array], [0, 0, 1])
    (piece,) = pieces_of(array, [writer], writer, [0, 0, 1])
    assert (piece.box, piece.sender, piece.writer, piece.chunk.elements) == ((), writer, writer, 1)
    assert pieces_of(array, [writer], writer + 1, [0, 0, 1]) == []


# --- Owners


@PATIENT
@given(
    st.integers(1, 6).flatmap(
        lambda ranks: st.tuples(
            st.just(ranks),
            st.lists(
                st.tuples(st.integers(0, 1000), st.lists(st.integers(0, ranks - 1), min_size=1, unique=True)),
                max_size=20,
            ),
        )
    )
)
def test_an_owner_is_one_of_the_candidates(drawn: tuple[int, list[tuple[int, list[int]]]]) -> None:
    ranks, layers = drawn
    sizes, candidates = [size for size, _ in layers], [ranks for _, ranks in layers]
    found = owners(sizes, candidates, [0] * ranks)
    assert len(found) == len(layers)
    assert all(owner in ranks for owner, ranks in zip(found, candidates, strict=True))
    assert owners(sizes, [list(reversed(ranks)) for ranks in candidates], [0] * ranks) == found


@PATIENT
@given(st.integers(1, 6), st.lists(st.integers(0, 1000), max_size=40))
def test_owners_that_may_take_anything_differ_by_no_more_than_the_largest(ranks: int, sizes: list[int]) -> None:
    total = [0] * ranks
    for size, owner in zip(sizes, owners(sizes, [range(ranks)] * len(sizes), [0] * ranks), strict=True):
        total[owner] += max(1, size)
    assert max(total) - min(total) <= max([1, *sizes])


def test_layers_without_bytes_have_different_owners() -> None:
    assert sorted(owners([0, 0, 0], [range(3)] * 3, [0, 1, 2])) == [0, 1, 2]


def test_a_layer_that_nobody_holds_has_no_owner() -> None:
    with pytest.raises(InvalidInputError, match="number 1"):
        owners([4, 5], [[0], []], [0])
