"""The state of training in mixed precision: bfloat16 weights, and float32 masters among the optimizer's slots."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tailorstore as ts

_MASTER = "master"


class MixedState:
    """Shows a float32 model as what mixed precision keeps of it, 14 bytes a parameter under AdamW, and takes it back.

    Parameters that are not trained have no master, so they are rounded to bfloat16 once.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Round what is not trained."""
        self._model = model
        self._optimizers = optimizers
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._groups = [
            (optimizer, group, [names[parameter] for parameter in group["params"]])
            for optimizer in optimizers
            for group in optimizer.param_groups
        ]
        self._trained = {
            name: (parameter, optimizer)
            for optimizer, group, found in self._groups
            for name, parameter in zip(found, group["params"], strict=True)
        }
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in self._trained:
                    parameter.copy_(parameter.bfloat16())

    def collect(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights by name, and the optimizers' state by name."""
        state = {
            name: {_MASTER: parameter.detach(), **optimizer.state[parameter]}
            for name, (parameter, optimizer) in self._trained.items()
        }
        groups = [{**group, "params": names} for _, group, names in self._groups]
        return self._weights(), {"state": state, "param_groups": groups}

    def _weights(self) -> dict[str, Tensor]:
        return {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in self._model.state_dict().items()
        }

    def put(self, checkpoint: ts.Checkpoint) -> None:
        """Take over a composite's masters and slots; weights without a master as they are."""
        weights = self._weights()
        optim: dict[str, Any] = {"state": {}, "param_groups": []}
        checkpoint.restore(weights, optim)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if name not in self._trained:
                    parameter.copy_(weights[name])
            for name, (parameter, optimizer) in self._trained.items():
                slots = dict(optim["state"][name])
                parameter.copy_(slots.pop(_MASTER))
                # Of no dimension is the count of steps, which optimizers keep on the host.
                optimizer.state[parameter] = {
                    slot: value.to(parameter.device) if value.ndim else value for slot, value in slots.items()
                }
