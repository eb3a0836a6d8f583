"""Who holds which box: nothing twice, nothing missing, nobody left out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorstore.domain.chunks import Box, box_of, meet
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.holdings import Holding, holdings_of
from tests.domain.meshes import Mesh, fsdp, meshes, shapes

PATIENT = settings(deadline=None)
"""Examples are small, but the first of a kind fills caches, and machines are busy."""


@PATIENT
@given(meshes(), shapes())
def test_holdings_are_the_boxes_of_a_mesh_with_all_their_replicas(
    mesh: Mesh, cut: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    shape, _ = cut
    boxes = mesh.boxes(shape)
    found = holdings_of("it", shape, boxes)
    if math.prod(shape) == 0:
        assert found == (Holding(box_of(shape), tuple(range(mesh.ranks))),)
        return
    assert {(rank, one.box) for one in found for rank in one.ranks} == {(r, box) for r in boxes for box in boxes[r]}
    assert len({one.box for one in found}) == len(found)
    assert list(found) == sorted(found, key=lambda one: one.box)


def boxes_within(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    ends = [st.tuples(st.integers(0, extent), st.integers(0, extent)).map(sorted) for extent in shape]
    return st.tuples(*ends).map(lambda box: tuple((start, stop) for start, stop in box))


@PATIENT
@given(st.data(), st.lists(st.integers(1, 6), max_size=2).map(tuple), st.integers(1, 4))
def test_any_boxes_that_cover_a_tensor_give_disjoint_ones_with_everybody_who_holds_them(
    data: st.DataObject, shape: tuple[int, ...], ranks: int
) -> None:
    drawn = data.draw(st.lists(st.lists(boxes_within(shape), max_size=4), min_size=ranks, max_size=ranks))
    held = [np.zeros(shape, bool) for _ in range(ranks)]
    for mine, boxes in zip(held, drawn, strict=True):
        for box in boxes:
            mine[tuple(slice(*ends) for ends in box)] = True
    if not np.logical_or.reduce(held).all():
        with pytest.raises(InvalidInputError, match="no rank holds the elements"):
            holdings_of("it", shape, dict(enumerate(drawn)))
        return
    found = holdings_of("it", shape, dict(enumerate(drawn)))
    seen = np.zeros(shape, np.int64)
    for one in found:
        at = tuple(slice(*ends) for ends in one.box)
        seen[at] += 1
        for rank in range(ranks):
            # Nobody is named who lacks an element, and nobody is left out who has all of them in one box.
            assert rank not in one.ranks or held[rank][at].all()
            assert rank in one.ranks or all(meet(box, one.box) != one.box for box in drawn[rank])
            assert rank not in one.ranks or any(meet(box, one.box) == one.box for box in drawn[rank])
    assert (seen == 1).all()


def test_shards_beside_a_whole_are_held_by_both() -> None:
    boxes: dict[int, list[Box]] = {0: [((0, 8),)], 1: [((0, 5),)], 2: [((5, 8),)], 3: []}
    assert holdings_of("it", (8,), boxes) == (Holding(((0, 5),), (0, 1)), Holding(((5, 8),), (0, 2)))


def test_a_gap_is_named_with_its_tensor() -> None:
    with pytest.raises(InvalidInputError, match=r"layer 'a'.*\(\(4, 6\), \(0, 3\)\).*process group"):
        holdings_of("layer 'a', array 'w'", (8, 3), {0: [((0, 4), (0, 3))], 1: [((6, 8), (0, 3))]})
    with pytest.raises(InvalidInputError, match="no rank holds"):
        holdings_of("it", (2,), {0: [], 1: []})


@pytest.mark.parametrize("box", [((0, 9),), ((-1, 8),), ((0, 8), (0, 1)), ()])
def test_a_box_of_another_tensor_is_refused_with_its_rank(box: Box) -> None:
    with pytest.raises(InvalidInputError, match=r"it: rank 1 .*shape \(8,\)"):
        holdings_of("it", (8,), {0: [((0, 8),)], 1: [box]})


def test_equal_layouts_give_the_same_object() -> None:
    boxes = fsdp(5).boxes((13, 2))
    backwards = dict(reversed(boxes.items()))
    assert holdings_of("one", (13, 2), boxes) is holdings_of("another", (13, 2), backwards)
