"""A small decoder-only transformer over bytes."""

from dataclasses import dataclass

from torch import Tensor, arange, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Size:
    """How large the model is."""

    blocks: int = 12
    width: int = 160
    heads: int = 5
    context: int = 128
    vocabulary: int = 256


class Block(nn.Module):
    """Attention, then two linear layers, each with its norm before and its shortcut around."""

    def __init__(self, size: Size) -> None:
        """Make a block of random weights."""
        super().__init__()
        self.heads = size.heads
        self.norm_1 = nn.LayerNorm(size.width)
        self.attention = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.norm_2 = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)
        self.dropout = nn.Dropout(0.05)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, time, width) from the same shape."""
        batch, time, width = x.shape
        parts = self.attention(self.norm_1(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, time, width))
        result: Tensor = x + self.dropout(self.down(functional.gelu(self.up(self.norm_2(x)))))
        return result


class Transformer(nn.Module):
    """Predicts the next byte. Its layers: ``tokens``, ``positions``, ``blocks.0`` …, ``norm``, ``head``."""

    def __init__(self, size: Size) -> None:
        """Make a model of random weights."""
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # Shortcuts add up over the blocks, so what goes into them starts smaller the more there are.
                depth = (2 * size.blocks) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 / depth)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits (batch, time, vocabulary) from bytes (batch, time)."""
        x = self.tokens(text) + self.positions(arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
