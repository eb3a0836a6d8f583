"""Measures are taken from a sample: here they are compared with what the whole tensors say."""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from itertools import accumulate

import pytest
import torch
from lion_pytorch import Lion
from torch import nn
from transformers.optimization import Adafactor as TransformersAdafactor

from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.names import layer_rule
from tailorstore.domain.records import LayerMeasures
from tailorstore.engine.tensors import measures as measures_module
from tailorstore.engine.tensors.capture import Capture, Model, Optim, capture
from tailorstore.engine.tensors.measures import Gauge
from tailorstore.engine.tensors.sampling import STRATUM, WHOLE_BELOW, coordinates, name_key, samples_of, take
from tests.kit.models import gpt, snapshot, train

CPU = torch.device("cpu")
LAYER = "layers.0"
MISSING = LayerMeasures(None, None, None, None, None)


def captured(model: Model, optim: Optim = None) -> Capture:
    return capture(model, optim, layer_rule())


def measured(gauge: Gauge, model: Model, optim: Optim = None) -> dict[str, LayerMeasures]:
    return gauge.measure(captured(model, optim))


def save(gauge: Gauge, model: Model, optim: Optim = None, layers: list[str] | None = None) -> None:
    found = captured(model, optim)
    gauge.keep(gauge.sample(found, found.layers if layers is None else layers))


def a(value: float | None) -> float:
    assert value is not None
    return value


class Wide(nn.Module):
    """One layer, with matrices that are sampled and vectors that are looked at whole."""

    def __init__(self, width: int = 160, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        up, down = nn.Linear(width, 3 * width, dtype=dtype), nn.Linear(3 * width, width, dtype=dtype)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": up, "down": down})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = layer["down"](nn.functional.gelu(layer["up"](x)))
        return x


def wide(seed: int = 0, width: int = 160) -> Wide:
    torch.manual_seed(seed)
    return Wide(width)


def fit(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, seed: int = 1) -> None:
    width = next(model.parameters()).shape[1]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, width, generator=generator)
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def distance(model: nn.Module, before: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((p.double() - before[n].double()).abs().square().sum()) for n, p in named(model)))


def named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, param.detach()) for name, param in model.named_parameters())


def norm(model: nn.Module) -> float:
    return math.sqrt(sum(float(param.double().abs().square().sum()) for _, param in named(model)))


def peak_memory(work: Callable[[], object]) -> int:
    """Return how many bytes of host memory PyTorch held at most while something ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    recorded = profile.profiler.kineto_results
    assert recorded is not None
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded.events() if event.name() == "[memory]")
    return int(max(accumulate((nbytes for _, nbytes in changes), initial=0)))


def places(size: int, name: str = "w") -> torch.Tensor:
    """Return where the samples of one tensor lie."""
    return coordinates([size], [name_key(name, 0)], [range(samples_of(size))], CPU).index[0]


# --- The sample ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, WHOLE_BELOW - 1, WHOLE_BELOW, WHOLE_BELOW + 1, 5000, 20 * STRATUM])
def test_samples_lie_one_in_each_stratum_and_stand_for_all_elements(size: int) -> None:
    found = coordinates([size], [name_key("w", 0)], [range(samples_of(size))], CPU)
    [index] = found.index
    assert len(index) == samples_of(size)
    assert int(found.weight.sum()) == size
    stride = 1 if size < WHOLE_BELOW else STRATUM
    assert (index // stride).tolist() == list(range(len(index)))
    assert int(index.max()) < size


def test_samples_follow_from_names_not_from_what_else_is_measured() -> None:
    sizes, keys = [70_000, 100, 9_000], [name_key(name, 0) for name in "abc"]
    together = coordinates(sizes, keys, [range(samples_of(size)) for size in sizes], CPU).index
    for size, name, index in zip(sizes, "abc", together, strict=True):
        assert torch.equal(places(size, name), index)
    assert not torch.equal(places(70_000, "b"), together[0])
    spans = [range(100, 274), range(10), range(7, 9)]
    for whole, part, span in zip(together, coordinates(sizes, keys, spans, CPU).index, spans, strict=True):
        assert torch.equal(whole[span.start : span.stop], part)


def test_samples_are_those_of_splitmix64_on_every_machine() -> None:
    key = name_key("transformer.h.0.mlp.weight", 0)
    found = places(20 * STRATUM + 100, "transformer.h.0.mlp.weight").tolist()
    for number, index in enumerate(found):
        word = (key + number * 0x9E3779B97F4A7C15) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            word = (word ^ (word >> shift)) * factor % 2**64
        word ^= word >> 31
        assert index == number * STRATUM + (word >> 1) % (STRATUM if number < 20 else 100)


def test_places_within_a_stratum_are_all_as_likely() -> None:
    found = torch.cat([places(1 << 20, f"w{number}") % STRATUM for number in range(64)])
    counts = torch.bincount(found, minlength=STRATUM).double()
    expected = len(found) / STRATUM
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert abs(chi_squared - 255) < 5 * 22.6


def test_tensors_of_any_strides_are_sampled_in_the_order_of_their_elements() -> None:
    base = torch.arange(60 * 200, dtype=torch.float32).view(60, 200)
    index = places(12_000)
    views = [base, base.t(), base.view(6, 10, 200).permute(2, 0, 1), torch.ones(1).expand(60, 200), base.flip(0)]
    for view in views:
        assert torch.equal(take(view, index), view.contiguous().view(-1)[index])


def test_sampling_a_transposed_tensor_copies_only_the_sample() -> None:
    tensor = torch.randn(1000, 2000).t()
    index = places(tensor.numel())
    assert 0 < peak_memory(lambda: take(tensor, index)) <= 4 * index.nbytes


# --- Drift ---------------------------------------------------------------------------------------------------------


def test_the_estimate_of_the_change_is_unbiased_and_errs_by_a_few_percent() -> None:
    model = wide()
    elements = sum(param.numel() for param in model.parameters())
    assert elements > 1e5
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    gauges = [Gauge(sample_seed=seed) for seed in range(100)]
    for gauge in gauges:
        save(gauge, model)
    fit(model, [optimizer], 20)
    truth = distance(model, before)
    drifts = torch.tensor([a(measured(gauge, model, optimizer)[LAYER].drift) for gauge in gauges]).double()
    squares = drifts.square()
    error = float(squares.std()) / math.sqrt(len(gauges))
    assert abs(float(squares.mean()) - truth**2) < 4 * error
    assert float(drifts.std()) / truth < 0.05


def test_the_estimate_is_unbiased_where_the_last_stratum_is_short_and_holds_all_of_the_change() -> None:
    size = 20 * STRATUM + 3
    before = torch.zeros(size)
    after = before.clone()
    after[-3:] = torch.tensor([3.0, 4.0, 12.0])
    squares = []
    for seed in range(300):
        gauge = Gauge(sample_seed=seed)
        save(gauge, {"w.weight": before})
        squares.append(a(measured(gauge, {"w.weight": after})["w"].drift) ** 2)
    values = torch.tensor(squares).double()
    assert set(values.round().int().tolist()) == {27, 48, 432}
    assert abs(float(values.mean()) - 169) < 4 * float(values.std()) / math.sqrt(300)


def test_drift_is_exact_where_tensors_are_looked_at_whole() -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gauge = Gauge()
    save(gauge, model)
    before = snapshot(model)
    train(model, [optimizer], 3)
    found = measured(gauge, model, optimizer)
    for layer, figures in found.items():
        members = {name: param for name, param in named(model) if layer_rule()(name) == layer}
        change = math.sqrt(sum(float((param - before[name]).square().sum()) for name, param in members.items()))
        weight = math.sqrt(sum(float(param.square().sum()) for param in members.values()))
        assert figures.drift == pytest.approx(change, rel=1e-5)
        assert figures.relative_drift == pytest.approx(change / weight, rel=1e-5)


def test_without_a_baseline_there_is_no_drift() -> None:
    model = gpt()
    gauge = Gauge()
    found = measured(gauge, model)
    assert list(found) == list(captured(model).layers)
    assert all(figures == MISSING for figures in found.values())
    assert not gauge.knows("transformer.h.0")


def test_an_unmoved_layer_has_drift_zero() -> None:
    model = gpt()
    gauge = Gauge()
    save(gauge, model)
    for figures in measured(gauge, model).values():
        assert (figures.drift, figures.relative_drift) == (0.0, 0.0)


def test_drift_counts_from_each_layers_own_last_save() -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gauge = Gauge()
    save(gauge, model)
    train(model, [optimizer], 3)
    save(gauge, model, layers=["transformer.h.1"])
    found = measured(gauge, model, optimizer)
    assert found["transformer.h.1"].drift == 0.0
    assert a(found["transformer.h.0"].drift) > 0


def test_samples_of_a_commit_that_failed_do_not_move_the_baseline() -> None:
    model = gpt()
    gauge = Gauge()
    save(gauge, model)
    with torch.no_grad():
        model.lm_head.weight += 1
    found = captured(model)
    gauge.sample(found, found.layers)
    assert measured(gauge, model)["lm_head"].drift == pytest.approx(math.sqrt(model.lm_head.weight.numel()))


def test_a_baseline_seeded_from_stored_values_equals_one_that_was_kept() -> None:
    model = wide()
    stored = snapshot(model)
    kept, seeded = Gauge(), Gauge()
    save(kept, model)
    seeded.seed(LAYER, {**stored, "layers.0.steps": torch.tensor([3])})
    assert seeded.knows(LAYER)
    fit(model, [torch.optim.SGD(model.parameters(), lr=0.1)], 3)
    assert measured(seeded, model)[LAYER] == measured(kept, model)[LAYER]
    seeded.forget_all()
    seeded.forget_all()
    assert not seeded.knows(LAYER)
    assert measured(seeded, model)[LAYER].drift is None


def test_baselines_take_less_than_one_percent_of_the_models_memory() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(*[Wide(512, dtype) for _ in range(2)])
        gauge = Gauge()
        save(gauge, model)
        memory = sum(param.numel() * param.element_size() for param in model.parameters())
        assert 0.003 * memory < gauge.nbytes < 0.01 * memory


def test_a_layer_that_gains_or_reshapes_parameters_has_no_drift_until_it_is_saved() -> None:
    gauge = Gauge()
    save(gauge, {"a.w": torch.ones(10), "b.w": torch.ones(10)})
    found = measured(
        gauge, {"a.w": torch.ones(11), "b.w": torch.ones(10), "b.bias": torch.ones(1), "c.w": torch.ones(2)}
    )
    assert [found[layer].drift for layer in "abc"] == [None, None, None]
    save(gauge, {"a.w": torch.ones(11), "b.w": torch.ones(10)})
    found = measured(gauge, {"a.w": torch.full((11,), 2.0), "b.w": torch.ones(10)})
    assert found["a"].drift == pytest.approx(math.sqrt(11))
    assert found["b"].drift == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.complex64])
def test_every_kind_of_number_is_measured(dtype: torch.dtype) -> None:
    weights = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    weight = torch.complex(weights[0], weights[1]) if dtype.is_complex else weights[0]
    gauge = Gauge()
    save(gauge, {"w.weight": weight.to(dtype)})
    found = measured(gauge, {"w.weight": (2 * weight).to(dtype)})["w"]
    change = (2 * weight).to(dtype).to(torch.complex128) - weight.to(dtype).to(torch.complex128)
    assert found.drift == pytest.approx(float(change.abs().square().sum().sqrt()), rel=0.5)
    assert found.relative_drift == pytest.approx(0.5, rel=0.02)


def test_conjugated_tensors_are_measured_without_a_copy_of_them() -> None:
    weight = torch.complex(torch.ones(60, 70), torch.ones(60, 70))
    gauge = Gauge()
    save(gauge, {"w.weight": weight.conj()})
    assert measured(gauge, {"w.weight": (3 * weight).conj()})["w"].drift == pytest.approx(2 * math.sqrt(2 * 4200))


def test_empty_and_whole_number_tensors_break_nothing() -> None:
    gauge = Gauge()
    model = {"a.empty": torch.empty(0), "b.steps": torch.arange(5), "c.w": torch.ones(3), "c.on": torch.ones(2) > 0}
    save(gauge, model)
    found = measured(gauge, model)
    assert found["a"] == found["b"] == MISSING
    assert found["c"].drift == 0.0


def test_buffers_of_a_module_are_not_weights() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    gauge = Gauge()
    save(gauge, model)
    model(torch.randn(8, 4))
    assert measured(gauge, model)["0"].drift == 0.0


def test_measuring_leaves_random_numbers_and_gradients_alone() -> None:
    model = gpt()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    gauge = Gauge()
    save(gauge, model)
    measured(gauge, model)
    assert torch.equal(torch.rand(4), expected)
    assert all(param.grad is None for param in model.parameters())


# --- The step that the optimizer is making -------------------------------------------------------------------------

Make = Callable[[nn.Module], torch.optim.Optimizer]

STEPS: dict[str, tuple[Make, float]] = {
    # Beside the error of the sample, slots leave open what the newest gradient adds that is in no first moment.
    "adam": (lambda m: torch.optim.Adam(m.parameters(), lr=1e-3), 0.05),
    "adamw": (lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.0), 0.05),
    "amsgrad": (lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.0, amsgrad=True), 0.05),
    "adam, learning rate a tensor": (
        lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(1e-3), foreach=False),
        0.05,
    ),
    "adamax": (lambda m: torch.optim.Adamax(m.parameters(), lr=1e-3), 0.05),
    "nadam": (lambda m: torch.optim.NAdam(m.parameters(), lr=1e-3), 0.25),
    "sgd with momentum": (lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9), 0.05),
    "lion": (lambda m: Lion(m.parameters(), lr=1e-4), 0.01),
    "rmsprop with momentum": (lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-4, momentum=0.9), 0.05),
    "rmsprop": (lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-4), 0.25),
    "adagrad": (lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-3), 0.25),
    "adadelta": (lambda m: torch.optim.Adadelta(m.parameters(), lr=1.0), 0.25),
    "adafactor": (lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2), 0.25),
    "muon": (lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=1e-3, weight_decay=0.0), 0.25),
    "muon, another factor": (
        lambda m: torch.optim.Muon(
            [p for p in m.parameters() if p.dim() == 2], lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        0.25,
    ),
    "transformers adafactor": (
        lambda m: TransformersAdafactor(m.parameters(), lr=1e-3, relative_step=False, scale_parameter=False),
        0.25,
    ),
    "transformers adafactor, relative": (lambda m: TransformersAdafactor(m.parameters()), 0.25),
    "transformers adafactor with momentum": (
        lambda m: TransformersAdafactor(m.parameters(), lr=1e-3, relative_step=False, beta1=0.9),
        0.05,
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_momentum_is_the_size_of_the_step_that_was_made(name: str) -> None:
    make, tolerance = STEPS[name]
    model = wide()
    optimizer = make(model)
    fit(model, [optimizer], 30)
    before = snapshot(model)
    fit(model, [optimizer], 1)
    found = measured(Gauge(), model, optimizer)[LAYER]
    assert found.momentum == pytest.approx(distance(model, before), rel=tolerance)


def test_an_unknown_optimizer_is_taken_to_go_along_its_first_slot() -> None:
    model = {"w.weight": nn.Parameter(torch.ones(50))}
    optimizer = torch.optim.SGD(model.values(), lr=0.5)
    optimizer.state[model["w.weight"]] = {"count": 3, "row": torch.ones(5), "velocity": torch.full((50,), 2.0)}
    assert measured(Gauge(), model, optimizer)["w"].momentum == pytest.approx(0.5 * 2 * math.sqrt(50))


def test_an_optimizer_without_slots_has_no_momentum() -> None:
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    train(model, [optimizer], 2)
    assert all(figures.momentum is None for figures in measured(Gauge(), model, optimizer).values())


def test_options_of_each_group_count() -> None:
    model = {"a.weight": nn.Parameter(torch.ones(9)), "b.weight": nn.Parameter(torch.ones(9))}
    optimizer = Lion([{"params": [model["a.weight"]], "lr": 0.5}, {"params": [model["b.weight"]], "lr": 0.25}])
    for weight in model.values():
        weight.grad = torch.ones(9)
    optimizer.step()
    found = measured(Gauge(), model, optimizer)
    assert found["a"].momentum == pytest.approx(1.5)
    assert found["b"].momentum == pytest.approx(0.75)


def test_frozen_parameters_and_those_never_updated_make_no_step() -> None:
    model = gpt()
    for name, param in model.named_parameters():
        param.requires_grad_("lm_head" not in name and ".h.0." not in name)
    optimizer = torch.optim.AdamW([param for name, param in model.named_parameters() if "lm_head" not in name], lr=1e-2)
    gauge = Gauge()
    save(gauge, model)
    train(model, [optimizer], 2)
    found = measured(gauge, model, optimizer)
    for layer in ("lm_head", "transformer.h.0"):
        assert (found[layer].momentum, found[layer].drift, found[layer].curvature) == (0.0, 0.0, 0.0)
    assert a(found["transformer.h.1"].momentum) > 0


def test_a_state_dict_keyed_by_name_says_the_same_as_its_optimizer() -> None:
    model = gpt(tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gauge = Gauge()
    save(gauge, model)
    train(model, [optimizer], 3)
    names = {id(param): name for name, param in model.named_parameters()}
    groups = [{**group, "params": [names[id(param)] for param in group["params"]]} for group in optimizer.param_groups]
    state = {names[id(param)]: slots for param, slots in optimizer.state.items()}
    found = measured(gauge, model, {"state": state, "param_groups": groups})
    assert found == measured(gauge, model, optimizer)
    without_groups = measured(gauge, model, state)
    assert all(figures.momentum is None for figures in without_groups.values())
    # Bias is corrected only where betas are known.
    assert all(a(without_groups[layer].curvature) < a(found[layer].curvature) for layer in found)


# --- Curvature -----------------------------------------------------------------------------------------------------


def second_moment(name: str, optimizer: torch.optim.Optimizer, param: nn.Parameter) -> torch.Tensor:
    """What the optimizer divides by, squared, written out from its definition."""
    slots = optimizer.state[param]
    match name:
        case "adam":
            found = slots["exp_avg_sq"] / (1 - 0.999 ** slots["step"])
        case "amsgrad":
            found = slots["max_exp_avg_sq"] / (1 - 0.999 ** slots["step"])
        case "rmsprop" | "rmsprop with momentum":
            found = slots["square_avg"] / (1 - 0.99 ** slots["step"])
        case "adagrad":
            found = slots["sum"] / slots["step"]
        case "adadelta":
            found = slots["square_avg"]
        case "adafactor" if param.dim() == 2:
            found = slots["row_var"] @ slots["col_var"] / slots["row_var"].mean()
        case "adafactor":
            found = slots["variance"]
        case "transformers adafactor" if param.dim() == 2:
            row, column = slots["exp_avg_sq_row"], slots["exp_avg_sq_col"]
            found = row[:, None] * column[None, :] / row.mean()
        case "transformers adafactor":
            found = slots["exp_avg_sq"]
        case _:
            raise AssertionError(name)
    return torch.as_tensor(found).double()


@pytest.mark.parametrize(
    "name",
    [
        *("adam", "amsgrad", "rmsprop", "rmsprop with momentum", "adagrad", "adadelta"),
        *("adafactor", "transformers adafactor"),
    ],
)
def test_curvature_is_second_moment_times_squared_change(name: str) -> None:
    model = wide(width=40)
    optimizer = STEPS[name][0](model)
    fit(model, [optimizer], 5)
    gauges = [Gauge(sample_seed=seed) for seed in range(20)]
    for gauge in gauges:
        save(gauge, model)
    before = snapshot(model)
    fit(model, [optimizer], 5, seed=2)
    truth = sum(
        float((second_moment(name, optimizer, param) * (param.detach() - before[n]).double().square()).sum())
        for n, param in model.named_parameters()
    )
    found = [a(measured(gauge, model, optimizer)[LAYER].curvature) for gauge in gauges]
    assert sum(found) / len(found) == pytest.approx(truth, rel=0.1)


def test_a_second_moment_in_factors_is_read_at_the_right_places_in_stacks_of_matrices() -> None:
    weight = nn.Parameter(torch.ones(3, 40, 50))
    for optimizer in (
        torch.optim.Adafactor([weight], lr=1e-2),
        TransformersAdafactor([weight], lr=1e-2, relative_step=False),
    ):
        gauges = [Gauge(sample_seed=seed) for seed in range(30)]
        for gauge in gauges:
            save(gauge, {"w.weight": weight})
        weight.grad = torch.linspace(1, 3, 6000).reshape(3, 40, 50) ** 2
        before = weight.detach().clone()
        optimizer.step()
        slots = optimizer.state[weight]
        row = slots["row_var"].squeeze(-1) if "row_var" in slots else slots["exp_avg_sq_row"]
        column = slots["col_var"].squeeze(-2) if "col_var" in slots else slots["exp_avg_sq_col"]
        second = row[:, :, None] * column[:, None, :] / row.mean(-1)[:, None, None]
        truth = float((second * (weight.detach() - before).square()).sum())
        found = [a(measured(gauge, {"w.weight": weight}, optimizer)["w"].curvature) for gauge in gauges]
        assert sum(found) / len(found) == pytest.approx(truth, rel=0.03)


def test_a_missing_second_moment_is_told_once_and_leaves_curvature_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures_module, "_told", set())
    model = gpt()
    matrices = [param for name, param in model.named_parameters() if ".mlp." in name and param.dim() == 2]
    chosen = set(map(id, matrices))
    others = [param for param in model.parameters() if id(param) not in chosen]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]
    gauge = Gauge()
    save(gauge, model)
    with caplog.at_level(logging.INFO, "tailorstore"):
        for figures in measured(gauge, model, optimizers).values():
            assert figures.curvature == 0.0  # nothing moved yet
        assert not caplog.records
        train(model, optimizers, 2)
        for _ in range(2):
            found = measured(gauge, model, optimizers)
    assert found["transformer.h.0"].curvature is None
    assert a(found["transformer.wte"].curvature) > 0
    [record] = caplog.records
    assert "Muon" in record.getMessage()
    assert "drift" in record.getMessage()


# --- Gradients -----------------------------------------------------------------------------------------------------


def layer_gradients(model: nn.Module) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, param in model.named_parameters():
        assert param.grad is not None
        layer = layer_rule()(name)
        found[layer] = found.get(layer, 0.0) + float(param.grad.double().square().sum())
    return found


def test_gradients_are_averaged_between_commits_over_every_nth_step() -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gauge = Gauge()
    seen = []
    with gauge.watch(optimizer, every=2):
        for number in range(6):
            train(model, [optimizer], 1, seed=number)
            if number % 2 == 0:
                seen.append(layer_gradients(model))
    train(model, [optimizer], 1, seed=9)  # no longer watched
    found = measured(gauge, model, optimizer)
    for layer, figures in found.items():
        mean = sum(one[layer] for one in seen) / 3
        assert figures.gradient == pytest.approx(math.sqrt(mean), rel=1e-5)
    assert measured(gauge, model, optimizer) == found
    save(gauge, model, optimizer)
    assert all(figures.gradient is None for figures in measured(gauge, model, optimizer).values())


def test_gradients_seen_while_a_commit_is_under_way_count_for_the_next_one() -> None:
    weight = nn.Parameter(torch.ones(4))
    model = {"w.weight": weight}
    optimizer = torch.optim.SGD([weight], lr=0.0)
    gauge = Gauge()

    def see(value: float) -> None:
        weight.grad = torch.full((4,), value)
        gauge.observe(optimizer)

    def mean() -> float | None:
        return measured(gauge, model, optimizer)["w"].gradient

    see(1.0)
    found = captured(model, optimizer)
    samples = gauge.sample(found, [])
    see(3.0)
    # Not published yet, and perhaps never: both count.
    assert mean() == pytest.approx(math.sqrt((4 * 1 + 4 * 9) / 2))
    gauge.keep(samples)
    assert mean() == pytest.approx(6.0)
    gauge.keep(gauge.sample(found, []))
    assert mean() is None


def test_gradients_of_several_optimizers_add_up_within_a_layer() -> None:
    model = gpt()
    matrices = [param for param in model.parameters() if param.dim() == 2]
    others = [param for param in model.parameters() if param.dim() != 2]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]
    gauge = Gauge()
    with gauge.watch(optimizers, every=1):
        train(model, optimizers, 1)
    expected = layer_gradients(model)
    for layer, figures in measured(gauge, model, optimizers).items():
        assert figures.gradient == pytest.approx(math.sqrt(expected[layer]), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_gradients_that_are_missing_sparse_or_of_few_bits_are_observed() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    unused = nn.Parameter(torch.ones(3))
    model = {"table.weight": table.weight, "half.weight": half, "unused.weight": unused}
    table(torch.tensor([1, 1, 2])).sum().backward()
    half.grad = torch.full((3,), 300.0, dtype=torch.bfloat16)
    gauge = Gauge()
    gauge.observe([torch.optim.SGD(model.values(), lr=0.1)])
    found = measured(gauge, model)
    assert found["table"].gradient == pytest.approx(math.sqrt(4 * 4 + 4))
    assert found["half"].gradient == pytest.approx(300 * math.sqrt(3))
    assert found["unused"].gradient == 0.0


def test_gradients_are_taken_without_the_scale_of_mixed_precision() -> None:
    for fused in (True, False):
        model = gpt()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        gauge = Gauge()
        tokens = torch.arange(9)[None]
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        model.zero_grad()
        scaler.scale(loss).backward()
        scaled = layer_gradients(model)
        with gauge.watch(optimizer, every=1):
            scaler.step(optimizer)
        for layer, figures in measured(gauge, model, optimizer).items():
            assert figures.gradient == pytest.approx(math.sqrt(scaled[layer]) / 1024, rel=1e-4)


def test_a_model_can_be_observed_by_calls_and_parameters_may_come_and_go() -> None:
    gauge = Gauge()
    model = gpt(layers=2)
    train(model, [torch.optim.SGD(model.parameters(), lr=0.0)], 1)
    gauge.observe(model)
    assert all(a(figures.gradient) > 0 for figures in measured(gauge, model).values())
    other = gpt(layers=3)
    assert all(figures.gradient is None for figures in measured(gauge, other).values())
    del model
    train(other, [torch.optim.SGD(other.parameters(), lr=0.0)], 1)
    gauge.observe(other)
    assert len(measured(gauge, other)) == 6


def test_watching_refuses_what_makes_no_steps() -> None:
    gauge = Gauge()
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for every in (0, -1, 1.5, True):
        with pytest.raises(InvalidInputError, match="every="):
            gauge.watch(optimizer, every=every)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="observe"):
        gauge.watch(optimizer.state_dict())
    with pytest.raises(InvalidInputError, match="observe"):
        gauge.observe(optimizer.state_dict())  # type: ignore[arg-type]


# --- Damage, and what measuring costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weights", "exp_avg", "exp_avg_sq", "gradients"])
def test_a_layer_that_is_no_longer_finite_says_so(value: float, where: str) -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gauge = Gauge()
    save(gauge, model)
    train(model, [optimizer], 2)
    weight = model.lm_head.weight
    assert weight.grad is not None
    held = {"weights": weight, "gradients": weight.grad}.get(where)
    with torch.no_grad():
        (optimizer.state[weight][where] if held is None else held)[3, 4] = value
    gauge.observe(model)
    found = measured(gauge, model, optimizer)
    assert found.pop("lm_head") == LayerMeasures(None, None, None, None, None, finite=False)
    assert all(figures.finite and figures.drift is not None for figures in found.values())


def test_a_layer_that_recovers_from_a_damaged_version_is_finite_and_has_no_drift() -> None:
    gauge = Gauge()
    save(gauge, {"w.weight": torch.tensor([1.0, math.nan])})
    found = measured(gauge, {"w.weight": torch.ones(2)})["w"]
    assert (found.finite, found.drift, found.relative_drift) == (True, None, None)


def test_measuring_takes_about_one_percent_of_the_state_for_a_while() -> None:
    model = {f"{layer}.weight": torch.ones(3000, 1000) for layer in "abcdefgh"}
    state = {name: {"exp_avg": weight / 10, "exp_avg_sq": weight / 100} for name, weight in model.items()}
    gauge = Gauge()
    save(gauge, model)
    found = captured(model, state)
    assert peak_memory(lambda: gauge.measure(found)) < 0.012 * sum(layer.nbytes for layer in found.layers.values())


def test_parameters_larger_than_what_is_worked_on_at_once_are_measured_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = wide()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    gauges = [Gauge(), Gauge()]
    found = []
    for gauge in gauges:
        save(gauge, model)
    fit(model, [optimizer], 3)
    for gauge, least in zip(gauges, (1 << 14, 7), strict=True):
        monkeypatch.setattr(measures_module, "_LEAST", least)
        found.append(measured(gauge, model, optimizer)[LAYER])
    save(gauges[1], model)
    for name in ("drift", "relative_drift", "momentum", "curvature"):
        assert getattr(found[1], name) == pytest.approx(getattr(found[0], name), rel=1e-12)
    monkeypatch.undo()
    assert measured(gauges[1], model)[LAYER].drift == 0.0


def test_copies_of_a_gauge_share_nothing() -> None:
    gauge = Gauge()
    save(gauge, {"w.weight": torch.ones(3)})
    other = copy.deepcopy(gauge)
    other.forget_all()
    assert gauge.knows("w")


@pytest.mark.gpu
def test_a_gpu_measures_the_same_as_the_host() -> None:
    torch.manual_seed(0)
    model = wide()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fit(model, [optimizer], 3)
    twin = copy.deepcopy(model).cuda()
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    host, device = Gauge(), Gauge()
    save(host, model)
    device.seed(LAYER, snapshot(model))
    fit(model, [optimizer], 2, seed=2)
    with torch.no_grad():
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.copy_(mine)
            assert mine.grad is not None
            other.grad = mine.grad.cuda()
            twin_optimizer.state[other] = {
                slot: value.cuda() if value.dim() else value for slot, value in optimizer.state[mine].items()
            }
    for gauge, one in ((host, model), (device, twin)):
        gauge.observe(one)
    expected, found = measured(host, model, optimizer)[LAYER], measured(device, twin, twin_optimizer)[LAYER]
    for name in ("drift", "relative_drift", "momentum", "gradient", "curvature"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)
    state = captured(twin, twin_optimizer)
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        device.measure(state)
    copies = [event.name for event in profile.events() if "Memcpy DtoH" in event.name]
    assert len(copies) == 1
