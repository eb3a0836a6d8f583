"""The state that is measured: a Llama-shaped model under AdamW, and ways to hold it as others do."""

from dataclasses import dataclass

import torch
from torch import nn


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 8 * width // 3, bias=False) for _ in range(2))
        self.down = nn.Linear(8 * width // 3, width, bias=False)
        self.norm_1, self.norm_2 = (nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm_1(x)
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True))
        h = self.norm_2(x)
        out: torch.Tensor = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return out


class Llama(nn.Module):
    """Embedding, blocks of seven matrices and two norms, norm, head."""

    def __init__(self, layers: int, width: int, vocabulary: int = 8192) -> None:
        """Make it with random weights."""
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A model and its optimizer, moments filled."""

    model: Llama
    optim: torch.optim.AdamW

    @property
    def flat(self) -> dict[str, torch.Tensor]:
        """Every tensor of one or more dimensions under one flat name, as safetensors wants them."""
        tensors = dict(self.model.state_dict(keep_vars=False))
        for name, param in self.model.named_parameters():
            tensors |= {f"{name}/{slot}": self.optim.state[param][slot] for slot in ("exp_avg", "exp_avg_sq")}
        return tensors

    @property
    def nbytes(self) -> int:
        """Size of all those tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.flat.values())

    def touch(self) -> None:
        """Change every tensor, as a training step does: one element of every chunk would do, this is cheaper."""
        with torch.no_grad():
            for tensor in self.flat.values():
                tensor.view(-1)[:1].add_(1e-3)
            for slots in self.optim.state.values():
                slots["step"] += 1


def training_state(gigabytes: float, seed: int = 0) -> TrainingState:
    """Make a state of about ``gigabytes`` GB: float32 weights and two float32 moments.

    Sixteen blocks (147 parameters, 441 tensors); the width follows from the size.
    """
    torch.manual_seed(seed)
    layers = 16
    width = 64
    while 12 * (layers * 12 * (width + 64) ** 2 + 2 * 8192 * (width + 64)) <= gigabytes * 1e9:
        width += 64
    model = Llama(layers, width)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for param in model.parameters():
        optim.state[param] = {
            "step": torch.tensor(10.0),
            "exp_avg": torch.randn_like(param).mul_(1e-3),
            "exp_avg_sq": torch.rand_like(param).mul_(1e-6),
        }
    return TrainingState(model, optim)
