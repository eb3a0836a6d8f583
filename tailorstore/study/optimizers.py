"""The optimizers that are studied, and their learning rate over time."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from tailorstore.domain.names import layer_rule
from tailorstore.study.tasks import require

_DECAY = 0.1
_FINAL_RATE = 0.1
_REST = "adamw"


def make_optimizers(name: str, model: nn.Module, peak_rates: dict[str, float]) -> list[torch.optim.Optimizer]:
    """Return the optimizers that together train a model; one, except for Muon, which takes only hidden matrices.

    Every parameter group remembers its highest learning rate as ``peak``.
    """
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    rate = peak_rates[name]
    match name:
        case "adamw":
            made: list[torch.optim.Optimizer] = [_adamw(parameters.values(), rate)]
        case "lion":
            require("lion_pytorch")
            from lion_pytorch import Lion

            made = [Lion(_groups(parameters.values()), lr=rate, betas=(0.9, 0.99))]
        case "adafactor":
            made = [torch.optim.Adafactor(_groups(parameters.values()), lr=rate)]
        case _:
            in_blocks = layer_rule(1)
            hidden = {
                key: value for key, value in parameters.items() if value.ndim == 2 and in_blocks(key)[-1].isdigit()
            }
            rest = [value for key, value in parameters.items() if key not in hidden]
            made = [
                torch.optim.Muon(list(hidden.values()), lr=rate, weight_decay=_DECAY),
                _adamw(rest, peak_rates[_REST]),
            ]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def _adamw(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(parameters), lr=rate, betas=(0.9, 0.95), fused=True)


def _groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, object]]:
    """Put matrices, which decay, apart from norms and biases, which do not."""
    parameters = list(parameters)
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups: list[dict[str, object]] = [{"params": matrices, "weight_decay": _DECAY}]
    return [*groups, {"params": others, "weight_decay": 0.0}] if others else groups


def set_rates(optimizers: Iterable[torch.optim.Optimizer], step: int, horizon: int) -> None:
    """Set the learning rates of a step: a linear rise, then half a cosine down to a tenth."""
    warmup = max(1, horizon // 20)
    if step < warmup:
        share = (step + 1) / warmup
    else:
        done = min(1.0, (step - warmup) / max(1, horizon - warmup))
        share = _FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
