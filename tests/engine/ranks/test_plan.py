"""What each rank is dealt of a commit, and what it has to hold for that."""

import math

import pytest
import torch

from tailorstore.domain.names import layer_rule
from tailorstore.engine.plan import Layout
from tailorstore.engine.ranks.outline import Whole, outline_of, unite
from tailorstore.engine.ranks.plan import WritePlan, plan_writing
from tailorstore.engine.tensors.capture import Capture, capture
from tailorstore.engine.tensors.shards import Part, Sharded

LAYERS, ROWS, COLUMNS = 12, 64, 48
LAYOUT = Layout(chunk_bytes=16384, codec="none")


def captured(rank: int, ranks: int) -> Capture:
    """Return what a rank has of a model whose matrices are cut by rows."""
    step = -(-ROWS // ranks)
    start, stop = min(rank * step, ROWS), min((rank + 1) * step, ROWS)
    parts = (Part(((start, stop), (0, COLUMNS)), torch.zeros(stop - start, COLUMNS)),) if stop > start else ()
    model = {f"layers.{at}.w": Sharded((ROWS, COLUMNS), torch.float32, parts, layout="rows") for at in range(LAYERS)}
    return capture(model, None, layer_rule())


def together(ranks: int) -> Whole:
    outlines = [outline_of(captured(rank, ranks)) for rank in range(ranks)]
    assert len({one.digest for one in outlines}) == 1
    structures = {one.digest: one.structure for one in outlines}
    return unite([one.digest for one in outlines], [one.boxes for one in outlines], structures, captured(0, ranks))


def received(plan: WritePlan, rank: int) -> list[int]:
    """Return how many bytes come from other ranks in each round."""
    return [
        sum(
            4 * math.prod(stop - start for start, stop in piece.box)
            for array in one.arrays
            for piece in array.pieces
            if piece.writer == rank != piece.sender
        )
        for one in (*plan.full, *plan.light)
    ]


@pytest.mark.parametrize("fidelity", ["full", "light"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_no_rank_gathers_more_than_one_layer_at_a_time(ranks: int, fidelity: str) -> None:
    whole, hosts = together(ranks), [0] * ranks
    due = dict.fromkeys(whole.captured.layers, fidelity)
    plans = [plan_writing(whole, due, LAYOUT, hosts, rank) for rank in range(ranks)]  # type: ignore[arg-type]
    largest = max(layer.nbytes for layer in whole.captured.layers.values())
    assert len({(len(plan.full), len(plan.light)) for plan in plans}) == 1
    assert sum(sum(received(plan, rank)) for rank, plan in enumerate(plans)) > 0
    for rank, plan in enumerate(plans):
        assert max(received(plan, rank)) <= largest
        assert max(len({array.layer for array in one.arrays}) for one in (*plan.full, *plan.light)) <= max(ranks, 1)


def test_what_one_rank_sends_another_waits_for() -> None:
    ranks, whole = 3, together(3)
    due = {name: "light" if at % 3 == 0 else "full" for at, name in enumerate(whole.captured.layers)}
    plans = [plan_writing(whole, due, LAYOUT, [0, 0, 1], rank) for rank in range(ranks)]  # type: ignore[arg-type]
    for at in range(len(plans[0].full) + len(plans[0].light)):
        rounds = [(*plan.full, *plan.light)[at] for plan in plans]
        said = [
            {
                (array.layer, array.path, piece.box, piece.sender, piece.writer)
                for array in one.arrays
                for piece in array.pieces
            }
            for one in rounds
        ]
        for sender in range(ranks):
            for writer in range(ranks):
                sent = {piece for piece in said[sender] if piece[3:] == (sender, writer)}
                assert sent == {piece for piece in said[writer] if piece[3:] == (sender, writer)}
