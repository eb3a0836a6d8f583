"""The simulation of very many ranks, at a small size: what it counts is what the plans of all ranks say."""

import pytest
from torch import nn
from torch.distributed.tensor import Shard

from tailorstore.bench.cuts import LLAMA_405B_BLOCKS, Cut, llama_405b
from tailorstore.bench.spread import PerRank, Simulated, plan_of, rows, simulate, tell
from tailorstore.domain.chunks import box_of

SMALL = Cut("replicas of FSDP × TP", 2, 4, 2)
BLOCKS = 1


def parameters(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def test_the_model_has_as_many_parameters_as_it_is_named_for() -> None:
    assert parameters(llama_405b(LLAMA_405B_BLOCKS)) == 405_853_388_800


@pytest.mark.parametrize(("extent", "shards"), [(16384, 1024), (1024, 1024), (128256, 1024), (10, 4), (3, 5)])
def test_ranks_are_given_the_rows_that_torch_gives_them(extent: int, shards: int) -> None:
    cut = Cut("FSDP", 2, shards, 1)
    for rank in range(cut.ranks):
        size, offset = Shard.local_shard_size_and_offset(extent, shards, rank % shards)
        assert cut.box((extent, 7), None, rank) == (((offset, offset + size), (0, 7)) if size else None)


def test_tensor_parallelism_comes_first_and_replicas_hold_the_same() -> None:
    assert SMALL.box((8, 10), 1, 0) == ((0, 2), (0, 5))
    assert SMALL.box((8, 10), 1, 1) == ((0, 2), (5, 10))
    assert SMALL.box((8, 10), 0, 3) == ((5, 6), (0, 10))
    assert SMALL.box((8, 10), None, 2) == SMALL.box((8, 10), None, 3) == ((2, 4), (0, 10))
    assert SMALL.box((8,), 0, 8 + 7) == SMALL.box((8,), 0, 7) == ((7, 8),)
    assert Cut("one rank", 1, 1, 1).box((8, 10), 0, 0) == box_of((8, 10))


@pytest.fixture(scope="module")
def simulated() -> Simulated:
    return simulate(SMALL, BLOCKS)


def test_what_is_counted_is_what_the_ranks_plans_say(simulated: Simulated) -> None:
    hosts = [rank // 8 for rank in range(SMALL.ranks)]
    whole = tell(SMALL, BLOCKS).unite()
    writing, sent, received, pieces = ([0] * SMALL.ranks for _ in range(4))
    for rank in range(SMALL.ranks):
        for array, piece in plan_of(whole, hosts, rank).pieces():
            elements = 1
            for start, stop in piece.box:
                elements *= stop - start
            nbytes = elements * (2 if array.spec.dtype == "bfloat16" else 4)
            writing[rank] += nbytes if piece.writer == rank else 0
            if piece.writer != piece.sender:
                sent[rank] += nbytes if piece.sender == rank else 0
                received[rank] += nbytes if piece.writer == rank else 0
                pieces[rank] += piece.writer == rank
    for found, figures in (
        (simulated.written_bytes, writing),
        (simulated.sent_bytes, sent),
        (simulated.received_bytes, received),
        (simulated.received_pieces, pieces),
    ):
        assert found == PerRank(sum(figures) / SMALL.ranks, max(figures))


def test_everything_is_written_and_every_layer_sealed_once(simulated: Simulated) -> None:
    found = simulated
    assert found.parameters == parameters(llama_405b(BLOCKS))
    assert found.nbytes == 14 * found.parameters
    assert (found.layers, found.arrays) == (BLOCKS + 3, 4 * (9 * BLOCKS + 3))
    assert found.puts.mean * SMALL.ranks == found.chunks + found.documents
    # Of each layer its group, the groups of its slots, and its arrays.
    assert found.documents == found.arrays + found.layers * 5
    # The commit, a version and a composite entry of each layer and of @extra, and a row of measures for each layer.
    assert found.catalog_rows == 1 + 2 * (found.layers + 1) + found.layers
    assert found.host_bytes.mean == found.written_bytes.mean * 8
    assert found.written_bytes.most <= found.layer_bytes.most
    assert min(found.document_bytes, found.description_bytes, found.planning_s) > 0


def test_the_table_names_the_layout_and_says_how_it_gets_on() -> None:
    told: list[str] = []
    found = rows(say=told.append, cuts=[Cut("one rank", 1, 1, 1)], blocks=1)
    assert len(told) == 1
    assert all(row.what.startswith("one rank: ") for row in found)
    by_name = {row.what: row for row in found}
    assert by_name["one rank: sent by a rank, the busiest"].ours == 0
    assert by_name["one rank: written by a rank, the busiest"].ratio == 1
