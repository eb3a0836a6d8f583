"""Small models of the shapes that people train, and ways to compare state to the bit."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    """A pre-norm transformer block with the parameter names of GPT-2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn(self.ln_1(x)).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = x + self.mlp(x)
        return out


class Trunk(nn.Module):
    """All of a decoder but its head."""

    def __init__(self, layers: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.h = nn.ModuleList(Block(width) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)


class Gpt(nn.Module):
    """Decoder only: ``transformer.wte``, ``transformer.h.N``, ``transformer.ln_f``, ``lm_head`` (tied or not)."""

    def __init__(self, layers: int = 3, width: int = 16, vocabulary: int = 32, *, tied: bool = False) -> None:
        super().__init__()
        self.transformer = Trunk(layers, width, vocabulary)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.transformer.wte(tokens)
        for block in self.transformer.h:
            x = block(x)
        logits: torch.Tensor = self.lm_head(self.transformer.ln_f(x))
        return logits


def gpt(seed: int = 0, **kwargs: Any) -> Gpt:
    """Return a model with values of its own."""
    torch.manual_seed(seed)
    return Gpt(**kwargs)


def train(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: int, seed: int = 0) -> float:
    """Train on fixed random tokens and return the last loss; the same from the same state."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for _ in range(steps):
        tokens = torch.randint(0, 32, (2, 9), generator=generator)
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return loss.item()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW over all of a model's parameters."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's elements as bytes: equal bytes, equal bits."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if plain.numel() == 0:
        return b""
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two tensors agree in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def snapshot(model: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a copy of a model's tensors."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: tensor.detach().clone() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Fail unless two states hold the same names and the same bits."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not same_bits(found[name], expected[name])]
    assert not different, f"bits differ in {different}"


def optim_snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state by position, tensors copied."""
    copy: dict[str, Any] = {}
    for at, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for slot, value in optimizer.state.get(param, {}).items():
            copy[f"{at}.{slot}"] = deepcopy(value)
    return copy


def assert_same_optim(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Fail unless two optimizer states agree to the bit, and in types."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert same_bits(found[name], value), name
        elif isinstance(value, list):
            assert_same_optim(dict(enumerate(found[name])), dict(enumerate(value)))  # type: ignore[arg-type]
        else:
            assert (type(found[name]), found[name]) == (type(value), value), name


def nudge(model: nn.Module, names: Callable[[str], bool] = lambda _: True) -> None:
    """Change the parameters whose names are chosen."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if names(name):
                param.add_(0.125)
