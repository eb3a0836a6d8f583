"""How layers move: measured on the tensors' own device, from a sample of their elements, just before a commit.

The sample of a layer's weights is kept from its own last saved version, never a second copy of them. What is summed is
summed as weight of the sample × value, which estimates the sum over all elements without bias. Where several processes
hold a tensor together, each samples the parts that it holds, and their sums add up.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tailorstore.domain.records import LayerMeasures
from tailorstore.engine.tensors.capture import Capture, OptimizerLike
from tailorstore.engine.tensors.gradients import Gradients, Watch, Watched, mean_squares
from tailorstore.engine.tensors.motion import IDLE, STEPS, Values, gathered
from tailorstore.engine.tensors.parameters import (
    Parameter,
    active_owners,
    batches,
    measurable,
    parameters_of,
    parts_of,
    runs,
    weights_by_layer,
)
from tailorstore.engine.tensors.sampling import Coordinates, coordinates, joined, name_key, take, wide
from tailorstore.engine.tensors.shards import Sharded, sharded
from tailorstore.engine.tensors.tallies import LayerTally, Sums, added, figures

logger = logging.getLogger("tailorstore")

_SHARE = 64
_LEAST = 1 << 14
"""Of all samples, this part is worked on at once, and at least so many: bounds what measuring takes for a while."""

_told: set[str] = set()
"""Optimizers of which this process has said that they have no second moment."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The sample of the weights of one parameter, or of one part of it."""

    elements: int
    """Of all that is sampled, as real numbers."""
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

    def measure(self, captured: Capture) -> dict[str, LayerMeasures]:
        """Return how every layer moves, by name, in the model's order; what cannot be told is ``None``.

        Baselines stay as they are. Each device is waited for once, for a transfer of a few numbers per layer.
        """
        return figures([self.tally(captured)])

    @torch.no_grad()
    def tally(self, captured: Capture) -> dict[str, LayerTally]:
        """Return what every layer of a capture adds up to here, for :func:`figures` to put together with other ranks'.

        Of tensors that several ranks hold, the parts that are here are looked at. Of replicas one rank speaks: the
        capture has none for which others do.
        """
        parameters = parameters_of(captured)
        layers: dict[str, list[Parameter]] = {name: [] for name in captured.layers}
        for one in parameters:
            layers[one.layer].append(one)
        based = {name for name, members in layers.items() if members and all(map(self._baseline, members))}
        dealt = list(batches(parameters, _batch_size(parameters)))
        observed = self._gradients.observed()
        summed = _summed(parameters)
        measured = [*(self._sums(batch) for batch in dealt), *(one.sums for one in observed)]
        fetched = _to_host([*measured, *(totals for _, totals in summed)])
        sums: dict[str, list[Sums]] = {name: [] for name in captured.layers}
        for batch, rows in zip(dealt, fetched, strict=False):
            for (layer, _), row in zip(runs(batch), rows.view(-1, _COLUMNS).tolist(), strict=True):
                sums[layer].append(_sums_of(row, batch[0]))
        # Weights are looked at as a whole, slots in the sample: what is wrong with them is in the weights a step later.
        for (members, _), totals in zip(summed, fetched[len(measured) :], strict=True):
            for one, finite in zip(members, totals.isfinite().tolist(), strict=True):
                sums[one.layer].append(Sums(bad=float(not finite)))
        squares = mean_squares(observed, [values.tolist() for values in fetched[len(dealt) : len(measured)]])
        return {name: _tally(sums[name], members, squares, based=name in based) for name, members in layers.items()}

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
    def seed(self, layer: str, values: Mapping[str, torch.Tensor | Sharded]) -> None:
        """Set a layer's baseline from its stored parameters, by name; they may lie on the host.

        Args:
            layer: its name.
            values: whole tensors, or the boxes of them that are measured here.
        """
        held = {name: value if isinstance(value, Sharded) else sharded(value) for name, value in values.items()}
        self._kept |= self._samples({layer: {name: whole for name, whole in held.items() if measurable(whole)}})

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

        A gradient that is held otherwise than its parameter is left out, as one with pending sums under sequence
        parallelism is: its norm would have to wait for other processes.

        Raises:
            InvalidInputError: it is neither a module nor torch optimizers.
        """
        self._gradients.observe(watched)

    def _samples(self, layers: Mapping[str, Mapping[str, Sharded]]) -> dict[str, dict[str, Kept]]:
        parameters = [
            one
            for layer, held in layers.items()
            for name, whole in held.items()
            for one in parts_of(layer, name, whole)
        ]
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


def _sums_of(row: Sequence[float], one: Parameter) -> Sums:
    """Return the sums of parameters of one kind, such as the given one."""
    bad, change, weight, step, curvature = row
    if one.motion.curved:
        return Sums(bad, change, weight, step, curvature)
    if change:
        _tell_uncurved(one)
    return Sums(bad, change, weight, step, uncurved=change)


def _batch_size(parameters: Iterable[Parameter]) -> int:
    return max(_LEAST, sum(len(one.span) for one in parameters) // _SHARE)


def _tally(
    sums: Iterable[Sums], members: Sequence[Parameter], squares: Mapping[int, float], *, based: bool
) -> LayerTally:
    """Return a layer's tally; ``squares`` are mean squared gradient norms by id of the parameter."""
    observed = [squares[id(one.whole.live)] for one in members if id(one.whole.live) in squares]
    return LayerTally(
        parts=len(members),
        trained=any(one.whole.trained for one in members),
        based=based,
        known=all(one.motion.known or one.motion is IDLE for one in members),
        idle=frozenset(one.owner.number for one in members if one.motion is IDLE and one.owner.number is not None),
        active=active_owners(members),
        sums=added(sums),
        gradient=sum(observed) if observed else None,
    )


def _summed(parameters: Iterable[Parameter]) -> list[tuple[list[Parameter], torch.Tensor]]:
    """Return, by device, parameters and the sum of each one's elements, (parameters,) float64: not finite if one is."""
    devices: dict[torch.device, list[Parameter]] = {}
    for one in parameters:
        devices.setdefault(one.values.device, []).append(one)
    return [(members, torch.stack([_sum(one.values).double() for one in members])) for members in devices.values()]


def _sum(values: torch.Tensor) -> torch.Tensor:
    wide_enough = values.dtype in (torch.float32, torch.float64)
    # Sixteen bits would overflow by themselves; eight have no sums.
    return values.sum() if wide_enough else values.float().sum()


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
