"""Task (c): a vision transformer that learns to read scanned digits, turned, moved and blurred by noise."""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from tailorstore.study.plan import Plan
from tailorstore.study.tasks import require, windows

_CLASSES = 10
_HELD_OUT_EVERY = 5
_SIDE = 16
_TURN = math.radians(20)
_SHIFT = 0.15
_NOISE = 0.25


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the model and its batches are."""

    blocks: int
    width: int
    heads: int
    batch: int
    views: int
    """Distortions of every held-out image to measure the loss on."""


SHAPES = {
    "tiny": Shape(blocks=4, width=16, heads=2, batch=8, views=1),
    "small": Shape(blocks=8, width=128, heads=4, batch=48, views=2),
}

_RATES = {"adamw": 1e-3, "lion": 1e-4, "muon": 1e-2, "adafactor": 1e-2}


class Reading:
    """Classification of digits. Distortions keep the held-out loss far from zero, and are drawn anew at each step."""

    def __init__(self, plan: Plan, shape: Shape, device: torch.device) -> None:
        """Make the model of random weights, and order the images by the plan's seed."""
        transformers: Any = import_module("transformers")
        config = transformers.ViTConfig(
            image_size=_SIDE,
            patch_size=4,
            num_channels=1,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            num_labels=_CLASSES,
        )
        self.model: nn.Module = transformers.ViTForImageClassification(config).to(device)
        self.peak_rates = _RATES
        self._shape = shape
        self._device = device
        self._seed = plan.seed
        digits: Any = import_module("sklearn.datasets").load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target, dtype=torch.int64)
        held_out = torch.arange(len(images)) % _HELD_OUT_EVERY == 0
        self._images, self._labels = images[~held_out], labels[~held_out]
        self._order = windows(len(self._images), plan.horizon * shape.batch, plan.seed)
        generator = torch.Generator().manual_seed(0)
        self._held_out = [
            (_distorted(images[held_out], generator).to(device), labels[held_out].to(device))
            for _ in range(shape.views)
        ]

    def loss(self, position: int) -> Tensor:
        """Return the mean loss in nats an image of the batch at a position."""
        batch = self._shape.batch
        chosen = self._order[position * batch : (position + 1) * batch]
        generator = torch.Generator().manual_seed((self._seed + 1) * 2**32 + position)
        images = _distorted(self._images[chosen], generator)
        return self._loss(images.to(self._device), self._labels[chosen].to(self._device))

    def held_out(self) -> Tensor:
        """Return the mean loss in nats an image on held-out images in fixed distortions."""
        return torch.stack([self._loss(images, labels) for images, labels in self._held_out]).mean()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.model(pixel_values=images).logits.float(), labels)


def _distorted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return (count, 1, 16, 16) from (count, 1, 8, 8): each turned, scaled and moved by chance, with noise on it."""
    count = len(images)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale = between(-_TURN, _TURN), between(0.8, 1.2)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    matrices = torch.stack(
        [cosine, -sine, between(-_SHIFT, _SHIFT), sine, cosine, between(-_SHIFT, _SHIFT)], dim=1
    ).view(count, 2, 3)
    grid = affine_grid(matrices, [count, 1, _SIDE, _SIDE], align_corners=False)
    moved = grid_sample(images, grid, align_corners=False)
    return moved + _NOISE * torch.randn(moved.shape, generator=generator)


def make(plan: Plan, device: torch.device) -> Reading:
    """Return the task of a plan."""
    require("sklearn")
    return Reading(plan, SHAPES[plan.size], device)
