"""Learned importance: calibrated on training that drifts in many ways, distrusted where nothing can be learned."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorstore.domain.importance import Importance
from tailorstore.domain.mask import LayerState, MaskContext
from tailorstore.domain.records import MEASURES, Fidelity, LayerMeasures

Floats = npt.NDArray[np.float64]
COMMITS = 120
STEPS = 10
LAYERS = 16
SIZE = 96


def learning_rate(commit: int) -> float:
    """Return a schedule with a warm-up and a cosine decay."""
    return 1e-3 * min(1.0, (commit + 1) / 12) * (0.05 + 0.475 * (1 + math.cos(math.pi * commit / COMMITS)))


@dataclass
class Training:
    """Weights that really move, and the versions that were saved of them.

    Layers walk at random, or keep a direction that slowly dies, or both, at scales that differ by orders of magnitude;
    three are frozen half-way.
    """

    seed: int
    curvature: bool = True
    commit: int = 0
    origins: list[int] = field(default_factory=lambda: [0] * LAYERS)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.weights = self.rng.normal(size=(LAYERS, SIZE))
        self.saved = self.weights.copy()
        self.noise = 10 ** self.rng.uniform(-1.5, 0.5, LAYERS)
        self.bend = self.noise * self.rng.choice([0.0, 0.3, 1.0], LAYERS)
        self.direction = self.rng.normal(size=(LAYERS, SIZE))
        self.density = 10 ** self.rng.uniform(-8, -4, LAYERS)

    @property
    def step(self) -> int:
        return self.commit * STEPS

    def train(self) -> None:
        """Make the steps up to the next commit."""
        self.commit += 1
        self.awake = np.ones(LAYERS)
        if self.commit > COMMITS // 2:
            self.awake[:3] = 0.0
        rate = learning_rate(self.commit) * self.awake
        walked = (rate * self.noise * math.sqrt(STEPS))[:, None] * self.rng.normal(size=(LAYERS, SIZE))
        bend = rate * self.bend * STEPS * math.exp(-self.commit / 60)
        self.weights += walked + bend[:, None] * self.direction
        self.update = rate * np.hypot(self.noise, bend / STEPS) * math.sqrt(SIZE) * self.rng.lognormal(0, 0.1, LAYERS)
        self.density *= self.rng.lognormal(0, 0.02, LAYERS)

    @property
    def damages(self) -> Floats:
        return self.damages_since(self.saved)

    def damages_since(self, weights: Floats) -> Floats:
        squared: Floats = np.square(self.weights - weights).sum(1)
        return self.density * squared if self.curvature else squared

    def measures(self, at: int) -> LayerMeasures:
        drift = float(np.linalg.norm(self.weights[at] - self.saved[at]))
        curvature = float(self.density[at]) * drift**2 if self.curvature else None
        return LayerMeasures(drift, drift / SIZE**0.5, float(self.update[at]), 1.0, curvature)

    def context(self) -> MaskContext:
        first = self.commit == 0
        layers = {
            f"h.{at}": LayerState(
                f"h.{at}",
                SIZE * 4,
                None if first else self.origins[at],
                fidelity=None if first else "full",
                measures=None if first else self.measures(at),
            )
            for at in range(LAYERS)
        }
        return MaskContext("main", self.step, layers, number=self.commit)

    def save(self, written: Iterable[str]) -> None:
        for name in written:
            at = int(name.removeprefix("h."))
            self.saved[at] = self.weights[at]
            self.origins[at] = self.step

    def choose(self) -> dict[str, Fidelity]:
        """Write the third that would do the most damage."""
        if not self.commit:
            return dict.fromkeys(self.context().layers, "full")
        return dict.fromkeys((f"h.{at}" for at in np.argsort(-self.damages)[: LAYERS // 3]), "full")


def run(
    training: Training,
    importance: Importance,
    commits: int = COMMITS,
    spoil: Callable[[MaskContext], MaskContext] = lambda context: context,
) -> list[dict[str, float] | None]:
    """Train and commit, and return what was predicted at each commit."""
    predictions = []
    for _ in range(commits):
        context, rate = spoil(training.context()), learning_rate(training.commit)
        predictions.append(importance.predict(context, rate))
        written = training.choose()
        importance.observe(context, written, rate)
        training.save(written)
        training.train()
    return predictions


@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_it_earns_trust_soon_and_is_better_than_what_is_will_be(seed: int, *, curvature: bool) -> None:
    importance = Importance()
    predictions = run(Training(seed, curvature=curvature), importance)

    assert predictions[:8] == [None] * 8
    assert None not in predictions[20:]
    report = importance.report()
    assert report.trusted
    assert report.predictions > (COMMITS - 3) * (LAYERS - 3) * 0.8
    assert report.error_left is not None
    assert report.error_written is not None
    assert report.fallback_error_left is not None
    assert report.fallback_error_written is not None
    assert report.error_left < 0.5 * report.fallback_error_left
    assert report.error_written < 0.8 * report.fallback_error_written
    assert max(map(abs, report.bias.values())) < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_what_is_observed_is_what_was_predicted(seed: int) -> None:
    """Both cases are tried of every layer: the state at a commit goes on with all written and with all left out."""
    training, importance = Training(seed), Importance()
    run(training, importance, 40)
    ratios, fallback_ratios = [], []
    for _ in range(40):
        predicted = importance.predict(training.context(), learning_rate(training.commit))
        assert predicted is not None
        before, weights, left = training.damages, training.weights.copy(), training.saved.copy()
        written = training.choose()
        importance.observe(training.context(), written, learning_rate(training.commit))
        training.save(written)
        training.train()
        observed = training.damages_since(left) - training.damages_since(weights)
        # A layer that was just written, or walks back, loses nothing by being left out: no logarithm tells by how much.
        moving = (training.awake > 0) & (observed > 0)
        assert moving.mean() > 0.6
        expected = np.array([predicted[name] for name in training.context().layers])
        ratios += list(expected[moving] / observed[moving])
        fallback_ratios += list(before[moving] / observed[moving])

    assert 0.85 < np.median(ratios) < 1.15
    errors, fallback_errors = np.abs(np.log(ratios)), np.abs(np.log(fallback_ratios))
    assert np.mean(errors) < np.mean(fallback_errors)


def test_a_frozen_layer_that_was_written_has_no_importance() -> None:
    training, importance = Training(0), Importance()
    run(training, importance, COMMITS // 2 + 2)
    written = training.context().layers
    importance.observe(training.context(), dict.fromkeys(written, "full"), learning_rate(training.commit))
    training.save(written)
    training.train()

    predicted = importance.predict(training.context(), learning_rate(training.commit))

    assert predicted is not None
    assert [predicted[f"h.{at}"] for at in range(3)] == [0.0] * 3
    assert min(predicted[f"h.{at}"] for at in range(3, LAYERS)) > 0.0


def test_what_the_error_of_a_light_version_costs_adds_to_its_importance() -> None:
    training, importance = Training(1), Importance()
    run(training, importance, 30)
    context = training.context()
    rate = learning_rate(training.commit)
    plain = importance.predict(context, rate)
    layer = context.layers["h.5"]
    assert layer.measures is not None
    relative = layer.measures.relative_drift
    assert relative is not None

    light = replace(layer, fidelity="light", error=relative / 2)
    found = importance.predict(replace(context, layers={**context.layers, "h.5": light}), rate)

    assert plain is not None
    assert found is not None
    assert found["h.5"] == pytest.approx(plain["h.5"] + training.damages[5] / 4)
    assert {**found, "h.5": 0.0} == {**plain, "h.5": 0.0}


# --- Trust


def noise(kind: str, commits: int, importance: Importance) -> int:
    """Feed measures that no model can foretell; return at how many commits importance was given out."""
    rng = np.random.default_rng(len(kind))
    names = [f"h.{at}" for at in range(LAYERS)]
    origins = dict.fromkeys(names, 0)
    drift = np.exp(rng.normal(size=LAYERS))
    trusted = 0
    for commit in range(commits):
        if kind == "walk":  # what is will be, whatever is written, is then the best that can be said
            drift *= np.exp(rng.normal(size=LAYERS) * 0.7)
        elif kind == "jumps":
            drift = np.exp(rng.standard_cauchy(size=LAYERS).clip(-8, 8))
        elif kind == "flips":  # a regularity that turns round as soon as it could be relied on
            drift = drift * math.exp(1.5 if (commit // 9) % 2 else -1.5)
        layers = {
            name: LayerState(
                name,
                4,
                origins[name] if commit else None,
                measures=LayerMeasures(float(one), 0.1, float(np.exp(rng.normal() * 3)), 1.0, float(one) ** 2)
                if commit
                else None,
            )
            for name, one in zip(names, drift, strict=True)
        }
        context = MaskContext("main", commit * STEPS, layers, number=commit)
        trusted += importance.predict(context, 1e-3) is not None
        written: dict[str, Fidelity] = {name: "full" for name in names if not commit or rng.random() < 0.3}
        importance.observe(context, written, 1e-3)
        origins |= dict.fromkeys(written, context.step)
    return trusted


@pytest.mark.parametrize("kind", ["walk", "jumps", "flips"])
def test_noise_does_not_earn_trust(kind: str) -> None:
    importance = Importance()
    assert noise(kind, 200, importance) == 0
    assert importance.report().predictions > 1000


def test_trust_is_lost_when_training_can_no_longer_be_foretold_and_can_be_earned_again() -> None:
    training, importance = Training(3), Importance()
    run(training, importance, 40)
    assert importance.trusted
    rng = np.random.default_rng(0)

    def shaken(context: MaskContext) -> MaskContext:
        layers = {}
        for name, layer in context.layers.items():
            assert layer.measures is not None
            assert layer.measures.curvature is not None
            curvature = layer.measures.curvature * math.exp(rng.normal() * 3)
            layers[name] = replace(layer, measures=replace(layer.measures, curvature=curvature))
        return replace(context, layers=layers)

    run(training, importance, 25, shaken)
    assert not importance.trusted
    assert importance.predict(training.context(), 1e-4) is None
    run(training, importance, 50)
    assert importance.trusted


def test_what_was_never_left_out_is_not_trusted() -> None:
    training, importance = Training(4), Importance()
    for _ in range(30):
        context = training.context()
        written: dict[str, Fidelity] = dict.fromkeys(context.layers, "full")
        importance.observe(context, written, learning_rate(training.commit))
        training.save(written)
        training.train()

    report = importance.report()
    assert (report.commits_left, report.error_left, report.trusted) == (0, None, False)
    assert report.commits_written == 28


# --- State


def through_json(importance: Importance) -> Importance:
    return Importance(json.loads(json.dumps(importance.state(), allow_nan=False)))


@pytest.mark.parametrize("restarts", [[1, 2, 3], [25, 26, 70]])
def test_a_stored_state_goes_on_bit_for_bit(restarts: list[int]) -> None:
    whole = Importance()
    expected = run(Training(5), whole)

    training, importance, found = Training(5), Importance(), []
    for commit in range(COMMITS):
        if commit in restarts:
            importance = through_json(importance)
        found += run(training, importance, 1)

    assert found == expected
    assert importance.state() == whole.state()
    assert importance.report() == whole.report()


def test_equal_inputs_give_equal_outputs_and_predicting_changes_nothing() -> None:
    training, importance = Training(6), Importance()
    run(training, importance, 30)
    before = importance.state()
    context = training.context()
    first = importance.predict(context, 1e-3)
    assert first is not None
    assert importance.predict(context, 1e-3) == first
    assert importance.state() == before


def test_the_state_of_400_layers_is_small() -> None:
    importance = Importance()
    for commit in range(3):
        layers = {
            f"model.layers.{at}": LayerState(
                f"model.layers.{at}",
                4,
                0 if commit else None,
                measures=LayerMeasures(0.1 + at + commit, 0.1, 0.01, 1.0, 1e-7 / (at + 1) * (commit + 1))
                if commit
                else None,
            )
            for at in range(400)
        }
        importance.observe(MaskContext("main", 10 * commit, layers), {}, 1e-3)

    size = len(json.dumps(importance.state(), allow_nan=False))
    assert 400 * 20 < size < 400 * 90


def changed(state: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(state))
    inner: Any = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 0),
        (("version",), KeyError),
        (("gram",), [[1.0]]),
        (("gram", 0, 0), math.nan),
        (("gram", 0, 0), 1e400),
        (("gram", 0, 0), "much"),
        (("gram",), None),
        (("seen",), [0.0, 0.0]),
        (("commits",), [1]),
        (("commits",), 3),
        (("predictions",), -1),
        (("newest",), 7),
        (("newest",), KeyError),
        (("newest", "layers", 0), "h.1"),
        (("newest", "layers"), None),
        (("newest", "columns", "damage"), [1.0]),
        (("newest", "columns", "offset", 3), None),
        (("newest", "step"), 1.5),
        (("newest", "interval"), "ten"),
        (("newest", "trend"), math.inf),
    ],
)
def test_a_state_that_means_nothing_starts_anew_and_says_so_once(
    path: tuple[Any, ...],
    value: object,
    caplog: pytest.LogCaptureFixture,
) -> None:
    training, importance = Training(7), Importance()
    run(training, importance, 30)
    with caplog.at_level(logging.WARNING, "tailorstore"):
        anew = Importance(changed(importance.state(), path, value))
        run(Training(7), anew, 30)

    assert len(caplog.records) == 1
    assert "starts anew" in caplog.text
    assert anew.state() == importance.state()


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    ),
    st.sampled_from(["version", "gram", "moment", "error", "seen", "commits", "predictions", "newest"]),
)
def test_whatever_stands_in_the_state_is_no_error(junk: Any, where: str) -> None:
    state = changed(TRAINED, (where,), junk)
    importance = Importance(state)
    run(Training(8), importance, 3)
    json.dumps(importance.state(), allow_nan=False)


def trained() -> dict[str, Any]:
    importance = Importance()
    run(Training(8), importance, 12)
    return importance.state()


TRAINED = trained()


# --- Poison


BAD = [None, math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1.7e308]


def poisoned_by(measures: LayerMeasures, figures: Mapping[str, float | None]) -> LayerMeasures:
    known = {name: getattr(measures, name) for name in MEASURES} | dict(figures)
    return LayerMeasures(**known, finite=measures.finite)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_poisoned_measures_do_no_harm(data: st.DataObject) -> None:
    training, importance = Training(9), Importance()
    run(training, importance, 20)

    def poisoned(context: MaskContext) -> MaskContext:
        layers = dict(context.layers)
        for at in data.draw(st.sets(st.integers(0, LAYERS - 1), max_size=4)):
            figure, changes = st.sampled_from(BAD), {}
            for name in data.draw(st.sets(st.sampled_from(MEASURES))):
                changes[name] = data.draw(figure)
            layers[f"h.{at}"] = replace(
                layers[f"h.{at}"],
                fidelity="light",
                error=data.draw(figure),
                measures=data.draw(st.sampled_from([None, poisoned_by(training.measures(at), changes)])),
            )
        return replace(context, layers=layers)

    for prediction in run(training, importance, 4, poisoned):
        assert all(math.isfinite(one) and one >= 0.0 for one in (prediction or {}).values())
    json.dumps(importance.state(), allow_nan=False)
    after = run(training, importance, 40)[-1]
    assert importance.trusted
    assert after is not None
    assert set(after) == set(training.context().layers)


@pytest.mark.parametrize("rate", [None, 0.0, -1.0, math.nan, math.inf])
def test_a_learning_rate_that_means_nothing_counts_as_unknown(rate: float | None) -> None:
    training, importance = Training(10), Importance()
    run(training, importance, 25)
    predicted = importance.predict(training.context(), rate)
    importance.observe(training.context(), {}, rate)
    assert predicted is not None
    assert all(map(math.isfinite, predicted.values()))
    json.dumps(importance.state(), allow_nan=False)


def test_layers_that_come_and_go_are_learned_and_forgotten() -> None:
    training, importance = Training(11), Importance()
    run(training, importance, 25)

    def without(*gone: str) -> Callable[[MaskContext], MaskContext]:
        def spoil(context: MaskContext) -> MaskContext:
            return replace(context, layers={name: one for name, one in context.layers.items() if name not in gone})

        return spoil

    fewer = run(training, importance, 3, without("h.0", "h.9"))[-1]
    again = run(training, importance, 3)[-1]

    assert fewer is not None
    assert set(fewer) == {f"h.{at}" for at in range(LAYERS)} - {"h.0", "h.9"}
    assert again is not None
    assert set(again) == {f"h.{at}" for at in range(LAYERS)}


def test_a_model_without_layers_or_without_measures_is_no_error() -> None:
    importance = Importance()
    for step in range(3):
        importance.observe(MaskContext("main", step, {}), {}, None)
        unmeasured = {"a": LayerState("a", 4, None)}
        assert importance.predict(MaskContext("main", step, unmeasured), None) is None
    assert through_json(importance).state() == importance.state()


def settled_after(change: Callable[[Mapping[str, LayerState], int], dict[str, LayerState]], *, back: int = 0) -> int:
    """Return how many predictions are settled at a commit whose layers are changed, or whose step goes back."""
    training, importance = Training(12), Importance()
    run(training, importance, 20)
    before = importance.report().predictions
    context = training.context()
    context = replace(context, layers=change(context.layers, context.step - STEPS), step=context.step - back)
    importance.observe(context, {}, None)
    return importance.report().predictions - before


def test_only_what_the_context_bears_out_is_settled() -> None:
    def versions_of_a_failed_commit(layers: Mapping[str, LayerState], last: int) -> dict[str, LayerState]:
        return {
            name: replace(one, source_step=last - STEPS) if one.source_step == last else one
            for name, one in layers.items()
        }

    def first_eight(layers: Mapping[str, LayerState], last: int) -> dict[str, LayerState]:
        return dict(list(layers.items())[:8])

    assert settled_after(lambda layers, last: dict(layers)) == LAYERS
    assert settled_after(first_eight) == 8
    assert settled_after(versions_of_a_failed_commit) == LAYERS - LAYERS // 3
    assert settled_after(lambda layers, last: dict(layers), back=STEPS) == 0
    assert settled_after(lambda layers, last: dict(layers), back=3 * STEPS) == 0


def test_an_unchanged_layer_counts_from_the_step_at_which_it_was_found_so() -> None:
    """Its newest version is old, but its damage has gathered only since: what was said of it as written is settled."""

    def found_unchanged(layers: Mapping[str, LayerState], last: int) -> dict[str, LayerState]:
        return {
            name: replace(one, source_step=last - 3 * STEPS, current_step=last) if one.source_step == last else one
            for name, one in layers.items()
        }

    assert settled_after(found_unchanged) == LAYERS
