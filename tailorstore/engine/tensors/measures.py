"""How layers move: measured on the tensors' own device, from a sample of their elements, just before a commit.

The sample of a layer's weights is kept from its own last saved version, never a second copy of them. What is summed is
summed as weight of the sample × value, which estimates the sum over all elements without bias.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tailorstore.domain.records import LayerMeasures
from tailorstore.engine.tensors.capture import Capture, OptimizerLike
from tailorstore.engine.tensors.gradients import Gradients, Watch, Watched, mean_squares
from tailorstore.engine.tensors.motion import STEPS, Values, gathered
from tailorstore.engine.tensors.parameters import (
    Parameter,
    batches,
    buffer_layers,
    measurable,
    parameter,
    parameters_of,
    runs,
    weights_by_layer,
)
from tailorstore.engine.tensors.sampling import Coordinates, coordinates, joined, name_key, take, wide

logger = logging.getLogger("tailorstore")

_SHARE = 64
_LEAST = 1 << 14
"""Of all samples, this part is worked on at once, and at least so many: bounds what measuring takes for a while."""

_told: set[str] = set()
"""Optimizers of which this process has said that they have no second moment."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The sample of one parameter's weights."""

    elements: int
    """Of the parameter, as real numbers."""
    values: torch.Tensor
    """In the parameter's own dtype and on its device, of shape (samples,)."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of layers that are about to be written; they become baselines once the commit is published."""

    layers: Mapping[str, Mapping[str, Kept]]
    """Layer → parameter → its sample."""
    stretch: int
    """Which observations of gradients end with this commit."""


@dataclass(slots=True)
class Gauge:
    """Measures the layers of one training process. Its baselines take less than 1 % of the model's memory.

    ``measure``, ``sample``, ``watch`` and ``observe`` belong to the thread that trains; ``keep``, ``seed`` and
    ``forget`` may be called from another one. No random number generator is touched.
    """

    sample_seed: int = 0
    """Which sample is looked at: the same wherever samples are compared."""
    _kept: dict[str, Mapping[str, Kept]] = field(default_factory=dict)
    _gradients: Gradients = field(default_factory=Gradients)

    @property
    def nbytes(self) -> int:
        """Bytes that the baselines take."""
        kept = [sample.values for params in list(self._kept.values()) for sample in params.values()]
        return sum(values.numel() * values.element_size() for values in kept)

    @torch.no_grad()
    def measure(self, captured: Capture) -> dict[str, LayerMeasures]:
        """Return how every layer moves, by name, in the model's order; what cannot be told is ``None``.

        Baselines stay as they are. Each device is waited for once, for a transfer of a few numbers per layer.
        """
        parameters = parameters_of(captured)
        layers: dict[str, list[Parameter]] = {name: [] for name in captured.layers}
        for one in parameters:
            layers[one.layer].append(one)
        based = {name for name, members in layers.items() if members and all(map(self._baseline, members))}
        dealt = list(batches(parameters, _batch_size(parameters)))
        tallies = self._gradients.tallies()
        summed = _summed(parameters)
        measured = [*(self._sums(batch) for batch in dealt), *(tally.sums for tally in tallies)]
        fetched = _to_host([*measured, *(totals for _, totals in summed)])
        sums = {name: _Sums() for name in captured.layers}
        for batch, rows in zip(dealt, fetched, strict=False):
            for (layer, _), row in zip(runs(batch), rows.view(-1, _COLUMNS).tolist(), strict=True):
                sums[layer].add(row, batch[0])
        # Weights are looked at as a whole, slots in the sample: what is wrong with them is in the weights a step later.
        for (members, _), totals in zip(summed, fetched[len(measured) :], strict=True):
            for one, finite in zip(members, totals.isfinite().tolist(), strict=True):
                sums[one.layer].bad += not finite
        squares = mean_squares(tallies, [values.tolist() for values in fetched[len(dealt) : len(measured)]])
        found = {name: _figures(sums[name], members, squares, based=name in based) for name, members in layers.items()}
        # Buffers that moved did so by no step of an optimizer: nothing is known of them.
        moved = {name for name in buffer_layers(layers) if sums[name].change or sums[name].bad}
        return found | dict.fromkeys(moved, LayerMeasures(None, None, None, None, None))

    @torch.no_grad()
    def sample(self, captured: Capture, layers: Iterable[str]) -> Samples:
        """Take a sample of the weights of layers that are about to be written; their baselines stay as they are."""
        weights = weights_by_layer(captured)
        return Samples(self._samples({name: weights[name] for name in layers}), self._gradients.close())

    def keep(self, samples: Samples) -> None:
        """Make samples the baselines of their layers, and forget what gradients were before: it is published."""
        self._kept |= samples.layers
        self._gradients.drop(samples.stretch)

    @torch.no_grad()
    def seed(self, layer: str, values: Mapping[str, torch.Tensor]) -> None:
        """Set a layer's baseline from its stored parameters, whole, by name; they may lie on the host."""
        self._kept |= self._samples({layer: {name: value for name, value in values.items() if measurable(value)}})

    def knows(self, layer: str) -> bool:
        """Whether a layer has a baseline."""
        return layer in self._kept

    def forget_all(self) -> None:
        """Drop the baselines of all layers."""
        self._kept.clear()

    def watch(self, optim: OptimizerLike | Sequence[OptimizerLike], every: int = 10) -> Watch:
        """Observe gradients at every n-th step of torch optimizers, just before it: unscaled and clipped.

        Raises:
            InvalidInputError: ``every`` is no whole number of at least 1, or something is not a torch optimizer.
        """
        return self._gradients.watch(optim, every)

    def observe(self, watched: Watched) -> None:
        """Observe the gradients that a model's or optimizers' parameters have now: for loops without ``watch``.

        Raises:
            InvalidInputError: it is neither a module nor torch optimizers.
        """
        self._gradients.observe(watched)

    def _samples(self, layers: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, Kept]]:
        parameters = [parameter(layer, name, value) for layer, held in layers.items() for name, value in held.items()]
        parts: dict[tuple[str, str], list[torch.Tensor]] = {}
        for batch in batches(parameters, _batch_size(parameters)):
            for one, index in zip(batch, self._coordinates(batch).index, strict=True):
                parts.setdefault((one.layer, one.name), []).append(take(one.values, index))
        found: dict[str, dict[str, Kept]] = {layer: {} for layer in layers}
        for one in parameters:
            taken = parts[one.layer, one.name]
            found[one.layer][one.name] = Kept(one.values.numel(), taken[0] if len(taken) == 1 else torch.cat(taken))
        return found

    def _baseline(self, one: Parameter) -> Kept | None:
        params = self._kept.get(one.layer, {})
        kept = params.get(one.name)
        if kept is None or kept.elements != one.values.numel():
            return None
        if kept.values.device != one.values.device:
            kept = Kept(kept.elements, kept.values.to(one.values.device))
            self._kept[one.layer] = {**params, one.name: kept}
        return kept

    def _coordinates(self, batch: Sequence[Parameter]) -> Coordinates:
        sizes = [one.values.numel() for one in batch]
        keys = [name_key(one.name, self.sample_seed) for one in batch]
        return coordinates(sizes, keys, [one.span for one in batch], batch[0].values.device)

    def _sums(self, batch: Sequence[Parameter]) -> torch.Tensor:
        """Return the sums of parameters of one kind, of shape (runs of one layer, columns), on their device."""
        where = self._coordinates(batch)
        device, motions = batch[0].values.device, [one.motion for one in batch]
        samples = [take(one.values, index) for one, index in zip(batch, where.index, strict=True)]
        weight = joined(samples, device)
        change = (weight - joined([self._before(*pair) for pair in zip(batch, samples, strict=True)], device)).square()
        numbers = [(motion.rate, motion.correction, motion.eps, motion.fresh) for motion in motions]
        rate, correction, eps, fresh = torch.tensor(numbers, dtype=wide(device), device=device).T[:, where.owner]
        none = torch.zeros_like(weight)
        firsts = [motion.first for motion in motions if motion.first is not None]
        first = gathered(firsts, where.index, device) if firsts else none
        seconds = [motion.second for motion in motions if motion.second is not None]
        second = gathered(seconds, where.index, device) * correction if seconds else none
        step = STEPS[motions[0].form](Values(weight, first, second, rate, eps, fresh))
        bad = ~(weight.isfinite() & first.isfinite() & second.isfinite())
        rows = (bad.to(weight), change, weight.square(), step.square(), second * change)
        counts = [count for _, count in runs(batch)]
        parts = [torch.split(row * where.weight, counts) for row in rows]
        return torch.stack([torch.stack([part.sum() for part in row]) for row in parts], dim=1)

    def _before(self, one: Parameter, now: torch.Tensor) -> torch.Tensor:
        """Return a parameter's samples as of its baseline; where it has none, as of now: no change."""
        kept = self._baseline(one)
        return now if kept is None else kept.values[one.span.start : one.span.stop]


_COLUMNS = 5


@dataclass(slots=True)
class _Sums:
    """What one layer's parameters add up to; squares, but for the first."""

    bad: float = 0.0
    """Elements that are NaN or infinite, in weights or slots."""
    change: float = 0.0
    weight: float = 0.0
    step: float = 0.0
    curvature: float = 0.0
    uncurved: float = 0.0
    """The part of the change that has no second moment."""

    def add(self, row: Sequence[float], one: Parameter) -> None:
        """Add the sums of parameters of one kind, such as the given one."""
        bad, change, weight, step, curvature = row
        self.bad += bad
        self.change += change
        self.weight += weight
        self.step += step
        if one.motion.curved:
            self.curvature += curvature
        elif change:
            self.uncurved += change
            _tell_uncurved(one)


def _batch_size(parameters: Iterable[Parameter]) -> int:
    return max(_LEAST, sum(len(one.span) for one in parameters) // _SHARE)


def _figures(sums: _Sums, members: Sequence[Parameter], squares: Mapping[int, float], *, based: bool) -> LayerMeasures:
    """Return a layer's measures; ``squares`` are mean squared gradient norms by id of the parameter."""
    observed = [squares[id(one.tensor)] for one in members if id(one.tensor) in squares]
    if sums.bad or not math.isfinite(sum(observed)):
        return LayerMeasures(None, None, None, None, None, finite=False)
    drift = _root(sums.change) if based else None
    moving = bool(members) and all(one.motion.known for one in members)
    return LayerMeasures(
        drift=drift,
        relative_drift=None if drift is None else _ratio(drift, math.sqrt(sums.weight)),
        momentum=_root(sums.step) if moving else None,
        gradient=_root(sum(observed)) if observed else None,
        curvature=sums.curvature if based and not sums.uncurved and math.isfinite(sums.curvature) else None,
    )


def _summed(parameters: Iterable[Parameter]) -> list[tuple[list[Parameter], torch.Tensor]]:
    """Return, by device, parameters and the sum of each one's elements, (parameters,) float64: not finite if one is."""
    devices: dict[torch.device, list[Parameter]] = {}
    for one in parameters:
        if one.tensor.numel() and (one.tensor.is_floating_point() or one.tensor.is_complex()):
            devices.setdefault(one.tensor.device, []).append(one)
    return [(members, torch.stack([_sum(one.tensor).double() for one in members])) for members in devices.values()]


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    values = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    wide_enough = values.dtype in (torch.float32, torch.float64)
    # Sixteen bits would overflow by themselves; eight have no sums.
    return values.sum() if wide_enough else values.float().sum()


def _root(square: float) -> float | None:
    return math.sqrt(square) if math.isfinite(square) else None


def _ratio(part: float, whole: float) -> float | None:
    if part == 0:
        return 0.0
    return part / whole if whole else None


def _tell_uncurved(one: Parameter) -> None:
    """Say, once per process and optimizer, that the curvature of changed parameters is not known."""
    optimizer = one.owner.optimizer
    if optimizer is None or one.motion.form == "still" or optimizer in _told:
        return
    _told.add(optimizer)
    logger.warning(
        "%s keeps no second moment of the gradients: layers that it trains have no curvature, and strategies that ask"
        " for it go by drift",
        optimizer,
    )


def _to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors flattened on the host, in one transfer per device."""
    found: dict[int, torch.Tensor] = {}
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        mine = {at: tensor.reshape(-1) for at, tensor in enumerate(tensors) if tensor.device == device}
        parts = torch.split(torch.cat(list(mine.values())).cpu(), [part.numel() for part in mine.values()])
        found |= dict(zip(mine, parts, strict=True))
    return [found[at] for at in range(len(tensors))]
