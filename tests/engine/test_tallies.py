"""Models cut by hand, each part with a gauge of its own: together they must tell what one gauge tells of the whole."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from tailorstore.domain.chunks import Box, within
from tailorstore.domain.names import layer_rule
from tailorstore.domain.records import MEASURES, LayerMeasures
from tailorstore.engine.ranks.local import local_capture
from tailorstore.engine.tensors.capture import Capture, LayerCapture, Model, Optim, capture
from tailorstore.engine.tensors.measures import Gauge
from tailorstore.engine.tensors.shards import Part, Sharded
from tailorstore.engine.tensors.tallies import LayerTally, Sums, figures, tally_from_json
from tests.kit.models import gpt, snapshot, train

MISSING = LayerMeasures(None, None, None, None, None)

Cut = Callable[[tuple[int, ...]], Sequence[Box]]
"""Shape of a tensor → the boxes of it that one rank holds."""


def captured(model: Model, optim: Optim = None) -> Capture:
    return capture(model, optim, layer_rule())


def rows(rank: int, size: int) -> Cut:
    """As FSDP cuts: rows, evenly, the last ranks have fewer or none."""

    def cut(shape: tuple[int, ...]) -> Sequence[Box]:
        each = -(-shape[0] // size)
        start, stop = min(rank * each, shape[0]), min((rank + 1) * each, shape[0])
        return [((start, stop), *((0, extent) for extent in shape[1:]))] if stop > start else []

    return cut


def columns(rank: int, size: int) -> Cut:
    """As tensor parallelism cuts some: the last dimension."""

    def cut(shape: tuple[int, ...]) -> Sequence[Box]:
        [box] = rows(rank, size)(shape[::-1])
        return [box[::-1]]

    return cut


def held_layer(layer: LayerCapture, cut: Cut) -> LayerCapture:
    held: dict[str, Sharded] = {path: cut_tensor(tensor, cut) for path, tensor in layer.arrays.items()}
    return replace(layer, arrays={path: tensor.to("meta") for path, tensor in layer.arrays.items()}, held=held)


def cut_tensor(tensor: torch.Tensor, cut: Cut) -> Sharded:
    shape, everything = tuple(tensor.shape), tuple((0, extent) for extent in tensor.shape)
    parts = tuple(Part(box, tensor.detach()[within(box, everything)].clone()) for box in cut(shape))
    return Sharded(shape, tensor.dtype, parts, isinstance(tensor, nn.Parameter), live=tensor)


def held_by(whole: Capture, cut: Cut) -> Capture:
    """Return what a rank that cuts in this way has captured."""
    return replace(whole, layers={name: held_layer(layer, cut) for name, layer in whole.layers.items()})


def spoken(_layer: str, _path: str) -> bool:
    return True


def only(*layers: str) -> Callable[[str, str], bool]:
    return lambda layer, _path: layer in layers


class Cluster:
    """Gauges of several ranks, each with its cut of one model."""

    def __init__(self, cuts: Sequence[Cut], seed: int = 0) -> None:
        self.cuts = cuts
        self.gauges = [Gauge(sample_seed=seed) for _ in cuts]

    def locals(self, model: Model, optim: Optim = None) -> list[Capture]:
        return [local_capture(held_by(captured(model, optim), cut), spoken) for cut in self.cuts]

    def save(self, model: Model) -> None:
        for gauge, local in zip(self.gauges, self.locals(model), strict=True):
            gauge.keep(gauge.sample(local, local.layers))

    def measured(self, model: Model, optim: Optim = None) -> dict[str, LayerMeasures]:
        locals_ = self.locals(model, optim)
        return together([gauge.tally(local) for gauge, local in zip(self.gauges, locals_, strict=True)])


def together(tallies: Sequence[dict[str, LayerTally]]) -> dict[str, LayerMeasures]:
    """Put tallies together as ranks do, which send them to each other as JSON."""
    sent = json.loads(json.dumps([{name: one.as_json() for name, one in tally.items()} for tally in tallies]))
    return figures([{name: tally_from_json(one) for name, one in tally.items()} for tally in sent])


def by_rows(size: int, seed: int = 0) -> Cluster:
    return Cluster([rows(rank, size) for rank in range(size)], seed)


def save(gauge: Gauge, model: Model) -> None:
    found = captured(model)
    gauge.keep(gauge.sample(found, found.layers))


def assert_alike(found: dict[str, LayerMeasures], expected: dict[str, LayerMeasures], rel: float = 1e-9) -> None:
    assert list(found) == list(expected)
    for layer, figures_ in expected.items():
        assert found[layer].finite == figures_.finite
        for name in MEASURES:
            value, truth = getattr(found[layer], name), getattr(figures_, name)
            assert value == (truth if truth is None else pytest.approx(truth, rel=rel)), (layer, name)


def a(value: float | None) -> float:
    assert value is not None
    return value


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_that_are_looked_at_whole_add_up_to_the_whole(name: str) -> None:
    model = gpt(tied=True)
    optimizer = OPTIMIZERS[name](model)
    gauge, clusters = Gauge(), [*map(by_rows, (1, 2, 3, 5)), Cluster([columns(rank, 2) for rank in range(2)])]
    train(model, [optimizer], 2)
    save(gauge, model)
    for cluster in clusters:
        cluster.save(model)
    train(model, [optimizer], 2)
    expected = gauge.measure(captured(model, optimizer))
    assert all(a(expected[f"transformer.h.{number}"].drift) > 0 for number in range(3))
    for cluster in clusters:
        assert_alike(cluster.measured(model, optimizer), expected)


def test_parts_of_large_tensors_tell_of_the_whole_without_bias() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(301, 256))
    model, clusters = {"w.weight": weight}, [by_rows(3, seed) for seed in range(80)]
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0)
    for seed in range(4):
        if seed == 2:
            for cluster in clusters:
                cluster.save(model)
            before = snapshot(model)["w.weight"].double()
        weight.grad = torch.randn(301, 256, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    change = (weight.detach().double() - before).square()
    first, second = (optimizer.state[weight][slot].double() for slot in ("exp_avg", "exp_avg_sq"))
    second = second / (1 - 0.999**4)
    step = 1e-2 / (1 - 0.9**4) * first / (second.sqrt() + 1e-8)
    found = [cluster.measured(model, optimizer)["w"] for cluster in clusters]
    for truth, estimates in (
        (float(change.sum()), [a(one.drift) ** 2 for one in found]),
        (float(step.square().sum()), [a(one.momentum) ** 2 for one in found]),
        (float((second * change).sum()), [a(one.curvature) for one in found]),
    ):
        values = torch.tensor(estimates).double()
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(len(values))
        assert float(values.std()) / truth < 0.15


def test_each_part_is_sampled_at_places_of_its_own() -> None:
    # Half of the columns changed. At the same places in all sixteen parts, 128 samples would decide and not 2048.
    changed = torch.rand(2048, generator=torch.Generator().manual_seed(0)) < 0.5
    before, after = {"w.weight": torch.zeros(256, 2048)}, {"w.weight": changed.float().expand(256, 2048).contiguous()}
    squares = []
    for seed in range(30):
        cluster = by_rows(16, seed)
        cluster.save(before)
        squares.append(a(cluster.measured(after)["w"].drift) ** 2)
    values = torch.tensor(squares).double() / float(changed.sum() * 256)
    assert float(values.mean()) == pytest.approx(1, abs=0.02)
    assert float(values.std()) < 0.04


def test_a_rank_may_hold_several_boxes_of_a_tensor() -> None:
    def first(shape: tuple[int, ...]) -> Sequence[Box]:
        rest = tuple((0, extent) for extent in shape[1:])
        return [((0, 3), *rest), ((7, shape[0]), *rest)]

    def second(shape: tuple[int, ...]) -> Sequence[Box]:
        return [((3, 7), *((0, extent) for extent in shape[1:]))]

    model = gpt()
    optimizer = OPTIMIZERS["adamw"](model)
    gauge, cluster = Gauge(), Cluster([first, second])
    save(gauge, model)
    cluster.save(model)
    train(model, [optimizer], 3)
    assert_alike(cluster.measured(model, optimizer), gauge.measure(captured(model, optimizer)))


def test_a_baseline_seeded_from_boxes_of_what_is_stored_equals_one_that_was_kept() -> None:
    model = gpt()
    stored, cut = snapshot(model), rows(1, 3)
    kept, seeded = Gauge(), Gauge()
    local = local_capture(held_by(captured(model), cut), spoken)
    kept.keep(kept.sample(local, local.layers))
    for name, layer in local.layers.items():
        assert not seeded.knows(name)
        seeded.seed(name, {param: cut_tensor(stored[param], cut) for param in layer.content["params"]})
    train(model, [OPTIMIZERS["sgd"](model)], 2)
    local = local_capture(held_by(captured(model), cut), spoken)
    assert seeded.tally(local) == kept.tally(local)
    assert all(one.based and one.sums.change for one in kept.tally(local).values())


def test_a_layer_has_drift_only_if_all_ranks_know_what_it_was() -> None:
    model = gpt()
    cluster = by_rows(2)
    cluster.save(model)
    cluster.gauges[1] = Gauge()
    optimizer = OPTIMIZERS["adamw"](model)
    train(model, [optimizer], 1)
    for figures_ in cluster.measured(model, optimizer).values():
        assert (figures_.drift, figures_.relative_drift, figures_.curvature) == (None, None, None)
        assert a(figures_.momentum) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "exp_avg_sq"])
def test_one_part_that_is_not_finite_makes_its_layer_so(value: float, where: str) -> None:
    model = gpt()
    optimizer = OPTIMIZERS["adamw"](model)
    cluster = by_rows(3)
    cluster.save(model)
    train(model, [optimizer], 1)
    weight = model.lm_head.weight
    with torch.no_grad():
        (weight if where == "weight" else optimizer.state[weight][where])[20, 3] = value
    found = cluster.measured(model, optimizer)
    assert found.pop("lm_head") == replace(MISSING, finite=False)
    assert all(figures_.finite and figures_.drift for figures_ in found.values())


def test_a_tally_survives_json_to_the_bit() -> None:
    odd = Sums(math.nan, math.inf, -0.0, 5e-324, 0.1, 1e308)
    tally = LayerTally(3, True, False, True, frozenset({2, 1}), frozenset(), odd, -math.inf)
    again = tally_from_json(json.loads(json.dumps(tally.as_json())))
    assert again.as_json() == tally.as_json()
    assert replace(again, sums=odd) == tally
    assert [value.hex() for value in again.sums] == [value.hex() for value in odd]
    assert tally_from_json(LayerTally().as_json()) == LayerTally()


# --- Who speaks ----------------------------------------------------------------------------------------------------


def everything(shape: tuple[int, ...]) -> Sequence[Box]:
    return [tuple((0, extent) for extent in shape)]


def alternating(rank: int, size: int) -> Callable[[str, str], bool]:
    return lambda _layer, path: sum(path.encode()) % size == rank


def test_of_replicas_one_rank_speaks_and_its_gradients_count_once() -> None:
    model = gpt()
    optimizer = OPTIMIZERS["adamw"](model)
    gauge, gauges = Gauge(), [Gauge() for _ in range(3)]
    save(gauge, model)
    for rank, one in enumerate(gauges):
        local = local_capture(captured(model), alternating(rank, 3))
        one.keep(one.sample(local, local.layers))
    watches = [one.watch(optimizer, every=1) for one in (gauge, *gauges)]
    train(model, [optimizer], 3)
    for watch in watches:
        watch.remove()
    now = captured(model, optimizer)
    tallies = [one.tally(local_capture(now, alternating(rank, 3))) for rank, one in enumerate(gauges)]
    assert sum(one.parts for tally in tallies for one in tally.values()) == len(list(model.parameters()))
    found, expected = together(tallies), gauge.measure(now)
    assert_alike({name: found[name] for name in expected}, expected)
    assert all(a(figures_.gradient) > 0 for figures_ in found.values())


def test_layers_that_lie_on_one_rank_each_come_in_rank_order() -> None:
    model = gpt()
    optimizer = OPTIMIZERS["adamw"](model)
    gauge = Gauge()
    save(gauge, model)
    train(model, [optimizer], 2)
    whole = captured(model, optimizer)
    names = list(whole.layers)
    tallies = []
    for speaks, stage in ((names[2:], names[2:]), (names[:2], names[:3])):
        here = replace(whole, layers={name: whole.layers[name] for name in stage})
        tallies.append(gauge.tally(local_capture(here, only(*speaks))))
    found, expected = together(tallies), gauge.measure(whole)
    assert list(found) == [*names[2:], *names[:2]]
    assert_alike({name: found[name] for name in names}, expected)


def test_a_parameter_was_never_updated_if_the_optimizer_moves_others_on_another_rank() -> None:
    moved, unused = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    model = {"moved.weight": moved, "unused.weight": unused}
    optimizer = torch.optim.AdamW(model.values(), lr=0.5)
    moved.grad = torch.ones(4)
    optimizer.step()
    whole = captured(model, optimizer)
    tallies = [Gauge().tally(local_capture(whole, only(name))) for name in ("unused", "moved")]
    assert together(tallies[:1])["unused"].momentum is None
    found = together(tallies)
    assert found["unused"].momentum == 0.0
    assert found["moved"].momentum == pytest.approx(1.0)


def test_frozen_parts_make_no_step() -> None:
    model = gpt()
    model.lm_head.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    cluster = by_rows(2)
    cluster.save(model)
    train(model, [optimizer], 1)
    found = cluster.measured(model, optimizer)["lm_head"]
    assert (found.drift, found.momentum, found.curvature) == (0.0, 0.0, 0.0)
    assert cluster.measured(model)["lm_head"].momentum == 0.0


def test_what_is_not_here_is_left_out() -> None:
    whole = captured({"a.weight": torch.ones(1, 4), "b.weight": torch.ones(4, 4)})
    second = held_by(whole, rows(1, 2))
    local = local_capture(second, spoken)
    assert list(local.layers) == ["b"]
    assert [one.parts for one in Gauge().tally(second).values()] == [0, 1]


def test_buffers_do_not_stand_for_parameters_that_another_rank_speaks_for() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": norm, "b": nn.BatchNorm1d(4, affine=False)})
    gauge = Gauge()
    save(gauge, model)
    for module in model.values():
        module(torch.randn(8, 4))
    whole = captured(model)
    silent = local_capture(whole, only("b"))
    loud = local_capture(whole, only("a"))
    assert (list(silent.layers), list(loud.layers)) == (["b"], ["a"])
    seeded = Gauge()
    save(seeded, {name: value - 1 for name, value in snapshot(model).items()})
    stray = Gauge().tally(captured({"a.statistics": torch.full((4,), math.nan)}))
    found = together([seeded.tally(silent), gauge.tally(loud), stray])
    assert found["a"].drift == 0.0
    # Its buffers moved, by no step of an optimizer, as the parameters of the other rank show.
    assert found["b"] == MISSING


# --- Slots that are held otherwise than their parameters -------------------------------------------------------------


def test_of_a_slot_that_is_here_in_full_only_the_parameters_part_counts() -> None:
    weight = nn.Parameter(torch.ones(6, 4))
    model = {"w.weight": weight}
    slots = {"exp_avg": torch.arange(24.0).reshape(6, 4), "exp_avg_sq": torch.ones(6, 4)}
    state = {"state": {"w.weight": slots}, "param_groups": [{"lr": 1.0, "params": ["w.weight"]}]}
    whole = captured(model, state)
    expected = Gauge().measure(whole)

    def only_weights_cut(rank: int) -> Capture:
        layer = whole.layers["w"]
        cut = {path: cut_tensor(tensor, rows(rank, 2)) for path, tensor in layer.arrays.items() if path == "w.weight"}
        return replace(whole, layers={"w": replace(layer, held=cut)})

    found = together([Gauge().tally(only_weights_cut(rank)) for rank in range(2)])
    assert_alike(found, expected)
    assert a(found["w"].momentum) > 1


def test_row_means_go_with_the_rows_that_are_here_or_say_nothing() -> None:
    model = {"w.weight": nn.Parameter(torch.ones(6, 4))}
    slots = {"RMS": 1.0, "exp_avg_sq_row": torch.full((6,), 3.0), "exp_avg_sq_col": torch.full((4,), 3.0)}
    state = {"state": {"w.weight": slots}, "param_groups": [{"lr": 1.0, "params": ["w.weight"]}]}

    def local(rank: int, *, rows_cut: bool) -> Capture:
        whole = captured(model, state)
        layer = whole.layers["w"]
        chosen = [path for path in layer.arrays if path == "w.weight" or (rows_cut and "row" in path)]
        cut = {path: cut_tensor(layer.arrays[path], rows(rank, 2)) for path in chosen}
        return replace(whole, layers={"w": replace(layer, held=cut)})

    for rows_cut, curvature in ((True, 3.0 * 24), (False, None)):
        gauges = [Gauge() for _ in range(2)]
        for rank, gauge in enumerate(gauges):
            gauge.seed("w", {"w.weight": cut_tensor(torch.zeros(6, 4), rows(rank, 2))})
        found = together([gauge.tally(local(rank, rows_cut=rows_cut)) for rank, gauge in enumerate(gauges)])
        assert found["w"].drift == pytest.approx(math.sqrt(24))
        assert found["w"].curvature == (curvature if curvature is None else pytest.approx(curvature))
