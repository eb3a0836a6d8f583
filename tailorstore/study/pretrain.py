"""Task (a): a small Llama that learns the text of Python's standard library, byte by byte."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tailorstore.demo.text import load_text
from tailorstore.study.plan import Plan
from tailorstore.study.tasks import windows

_BYTES = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the model and its batches are."""

    blocks: int
    width: int
    inner: int
    heads: int
    context: int
    batch: int
    held_out: int
    """Windows to measure the loss on."""


SHAPES = {
    "tiny": Shape(blocks=6, width=16, inner=48, heads=2, context=32, batch=4, held_out=16),
    "small": Shape(blocks=8, width=160, inner=432, heads=4, context=64, batch=16, held_out=128),
    "300m": Shape(blocks=24, width=1024, inner=2816, heads=16, context=512, batch=48, held_out=192),
}

_RATES = {"adamw": 2e-3, "lion": 3e-4, "muon": 2e-2, "adafactor": 2e-2}
_RATES_300M = {"adamw": 4e-4, "lion": 6e-5, "muon": 1e-2, "adafactor": 5e-3}


class Pretraining:
    """Next-byte prediction; held out are whole files that are never trained on."""

    def __init__(self, plan: Plan, shape: Shape, device: torch.device) -> None:
        """Make the model of random weights, and order the text by the plan's seed."""
        transformers: Any = import_module("transformers")
        config = transformers.LlamaConfig(
            vocab_size=_BYTES,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.context,
            tie_word_embeddings=False,
            use_cache=False,
        )
        self.model: nn.Module = transformers.LlamaForCausalLM(config).to(device)
        self.peak_rates = _RATES_300M if plan.size == "300m" else _RATES
        self._shape = shape
        self._device = device
        self._text, held_out = load_text()
        self._starts = self._ordered(self._text, plan.horizon * shape.batch, plan.seed)
        self._held_out = self._cut(held_out, self._ordered(held_out, shape.held_out, 0))

    def _ordered(self, text: Tensor, count: int, seed: int) -> Tensor:
        context = self._shape.context
        return windows((len(text) - 1) // context, count, seed) * context

    def _cut(self, text: Tensor, starts: Tensor) -> Tensor:
        """Return (windows, context + 1) bytes as int64 on the device."""
        return text[starts.unsqueeze(1) + torch.arange(self._shape.context + 1)].long().to(self._device)

    def loss(self, position: int) -> Tensor:
        """Return the mean loss in nats a byte of the batch at a position."""
        batch = self._shape.batch
        return self._loss(self._cut(self._text, self._starts[position * batch : (position + 1) * batch]))

    def held_out(self) -> Tensor:
        """Return the mean loss in nats a byte on held-out windows."""
        return torch.stack([self._loss(part) for part in torch.split(self._held_out, self._shape.batch)]).mean()

    def _loss(self, text: Tensor) -> Tensor:
        logits = self.model(input_ids=text[:, :-1]).logits
        return cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())


def make(plan: Plan, device: torch.device) -> Pretraining:
    """Return the task of a plan."""
    return Pretraining(plan, SHAPES[plan.size], device)
