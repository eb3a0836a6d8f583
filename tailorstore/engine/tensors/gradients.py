"""Norms of gradients, averaged between commits without ever waiting for a device or for another process.

Of a ``DTensor`` the norm is that of the part which is here.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tailorstore.domain.errors import InvalidInputError
from tailorstore.engine.tensors.capture import OptimizerLike, optimizers_of
from tailorstore.engine.tensors.sampling import reals, wide
from tailorstore.engine.tensors.shards import is_distributed, local_of

Watched = torch.nn.Module | torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


class Watch:
    """A running observation of optimizers; ends with ``remove()`` or with the ``with`` block."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks out of the optimizers. Can be repeated; what was observed stays."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@dataclass(slots=True)
class Observed:
    """Sums of squared gradient norms of some parameters on one device."""

    params: tuple[weakref.ref[torch.Tensor], ...]
    sums: torch.Tensor
    """Per parameter, of shape (parameters,), on their device."""
    count: int = 0
    """How often they were observed."""


@dataclass(slots=True)
class Gradients:
    """What was observed, in stretches: one for each commit that is under way, and one for what comes after.

    Whoever observes and whoever closes stretches is one thread; :meth:`drop` may be called from another.
    """

    _stretches: dict[int, dict[tuple[int, ...], Observed]] = field(default_factory=lambda: {0: {}})
    _current: int = 0

    def watch(self, optim: OptimizerLike | Sequence[OptimizerLike], every: int) -> Watch:
        """Observe at every n-th step of optimizers, just before it, when gradients are unscaled and clipped.

        Raises:
            InvalidInputError: ``every`` is no whole number of at least 1, or something is not a torch optimizer.
        """
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            msg = f"watch(every={every!r}): it must be a whole number of at least 1 optimizer step"
            raise InvalidInputError(msg)
        found = optimizers_of(optim)
        for optimizer in found:
            if not isinstance(optimizer, torch.optim.Optimizer):
                msg = "watch() needs the optimizer itself: a state dict makes no steps; or call observe(model) at steps"
                raise InvalidInputError(msg)
        return Watch(
            [
                optimizer.register_step_pre_hook(self._hook(every))
                for optimizer in found
                if isinstance(optimizer, torch.optim.Optimizer)
            ]
        )

    def _hook(self, every: int) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
        steps = 0

        def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ANN401
            nonlocal steps
            del args, kwargs
            if steps % every == 0:
                self.observe(optimizer)
            steps += 1

        return hook

    @torch.no_grad()
    def observe(self, watched: Watched) -> None:
        """Add the gradients that the parameters of a model or of optimizers have at this moment.

        Of a ``DTensor`` the part that is here; of one that is held otherwise than its parameter, nothing.

        Raises:
            InvalidInputError: it is neither a module nor torch optimizers.
        """
        stretch = self._stretches[self._current]
        for params, scale in _parameters(watched):
            for device, members in _by_device(filter(_has_norm, params)).items():
                # The parameters are alive here, so that their ids are theirs.
                key = tuple(map(id, members))
                if key not in stretch:
                    sums = torch.zeros(len(members), dtype=wide(device), device=device)
                    stretch[key] = Observed(tuple(weakref.ref(param) for param in members), sums)
                observed = stretch[key]
                squares = _squared_norms(members, device)
                observed.sums += squares if scale is None else squares / scale.to(squares) ** 2
                observed.count += 1

    def close(self) -> int:
        """End a stretch, begin the next, and return the number of the one that ended."""
        closed = self._current
        self._stretches[closed + 1] = {}
        self._current = closed + 1
        return closed

    def drop(self, upto: int) -> None:
        """Forget the stretches up to a number: the commit that ended them is published."""
        for number in [number for number in list(self._stretches) if number <= upto]:
            self._stretches.pop(number, None)

    def observed(self) -> list[Observed]:
        """Return what was observed since the last commit; sums are on their devices."""
        return [one for stretch in list(self._stretches.values()) for one in list(stretch.values())]


def mean_squares(observed: Iterable[Observed], sums: Iterable[Sequence[float]]) -> Mapping[int, float]:
    """Return the mean squared norm by id of the parameter, from what was observed and its sums on the host."""
    totals: dict[int, tuple[float, int]] = {}
    for one, values in zip(observed, sums, strict=True):
        for ref, value in zip(one.params, values, strict=True):
            if (param := ref()) is not None:
                total, count = totals.get(id(param), (0.0, 0))
                totals[id(param)] = total + value, count + one.count
    return {key: total / count for key, (total, count) in totals.items()}


def _parameters(watched: Watched) -> list[tuple[list[torch.Tensor], torch.Tensor | None]]:
    """Return lists of parameters, each with the factor that their gradients are still scaled by, if any."""
    if isinstance(watched, torch.nn.Module):
        return [(list(watched.parameters()), None)]
    found = []
    for optimizer in optimizers_of(watched):
        if not isinstance(optimizer, torch.optim.Optimizer):
            msg = f"observe() needs a torch.nn.Module or torch optimizers, not {type(watched).__name__}"
            raise InvalidInputError(msg)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        # Fused optimizers unscale by themselves; a GradScaler leaves them the scale for the time of the step.
        found.append((params, getattr(optimizer, "grad_scale", None)))
    return found


def _by_device(params: Iterable[torch.Tensor]) -> dict[torch.device, list[torch.Tensor]]:
    found: dict[torch.device, list[torch.Tensor]] = {}
    for param in params:
        found.setdefault(param.device, []).append(param)
    return found


def _has_norm(param: torch.Tensor) -> bool:
    """Whether this process can tell its share of a gradient's norm: not with sums pending, or held otherwise."""
    grad = param.grad
    return not is_distributed(grad) or (is_distributed(param) and grad.placements == param.placements)


def _squared_norms(params: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the squared norm of each parameter's gradient, 0 where there is none, of shape (parameters,)."""
    squares = torch.zeros(len(params), dtype=wide(device), device=device)
    present = [at for at, param in enumerate(params) if param.grad is not None]
    if not present:
        return squares
    grads = [_elements(param.grad) for param in params if param.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).to(squares).square()  # noqa: SLF001
    if len(present) == len(params):
        return norms
    squares[torch.tensor(present, device=device)] = norms
    return squares


def _elements(grad: torch.Tensor) -> torch.Tensor:
    """Return the elements of a gradient that are here as real numbers; of a sparse one, those that it has."""
    here = local_of(grad)
    return reals(here.coalesce().values() if here.is_sparse else here)
