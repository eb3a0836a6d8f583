"""A very large model without its elements, and how ranks cut it: FSDP, replicas of it, tensor parallelism within it."""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import nn

from tailorstore.domain.chunks import Box, box_of
from tailorstore.domain.names import layer_rule
from tailorstore.engine.tensors.capture import Capture, capture
from tailorstore.engine.tensors.shards import Part, Sharded

LLAMA_405B_BLOCKS = 126
SLOTS = ("master", "exp_avg", "exp_avg_sq")
"""What an optimizer keeps of each bfloat16 parameter in float32: with the parameter, 14 bytes."""


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, kv: int) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, kv, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm_1, self.norm_2 = (nn.RMSNorm(width) for _ in range(2))


def llama_405b(blocks: int = LLAMA_405B_BLOCKS) -> nn.Module:
    """Make the parameters of Llama-3.1-405B, or of so many of its blocks, on the meta device; it cannot be called."""
    vocabulary, width, hidden, kv = 128256, 16384, 53248, 8 * 128
    with torch.device("meta"):
        parts = {
            # Not drawn from a distribution: on the meta device that takes a compiler, and two seconds to import it.
            "embed": nn.Embedding.from_pretrained(torch.empty(vocabulary, width), freeze=False),  # type: ignore[no-untyped-call]
            "layers": nn.ModuleList(_Block(width, hidden, kv) for _ in range(blocks)),
            "norm": nn.RMSNorm(width),
            "head": nn.Linear(width, vocabulary, bias=False),
        }
        return nn.ModuleDict(parts).to(torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Cut:
    """A mesh of ranks, in C order: replicas × shards × tensor parallelism."""

    name: str
    replicas: int
    shards: int
    tensor: int

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.replicas * self.shards * self.tensor

    def box(self, shape: tuple[int, ...], parallel: int | None, rank: int) -> Box | None:
        """Return what a rank holds of a tensor, or ``None``: cut by tensor parallelism first, then by rows.

        Args:
            shape: of the tensor.
            parallel: the dimension that tensor parallelism cuts, if it does.
            rank: whose box is asked for.
        """
        box = list(box_of(shape))
        if parallel is not None:
            box[parallel] = _parts(*box[parallel], self.tensor)[rank % self.tensor]
        box[0] = _parts(*box[0], self.shards)[rank // self.tensor % self.shards]
        return tuple(box) if all(start < stop for start, stop in box) else None

    def capture(self, model: nn.Module, rank: int, step: int) -> Capture:
        """Capture what a rank holds of a model and of its optimizer's slots."""
        params = dict(model.named_parameters())
        weights = {name: self._held(name, param, param.dtype, rank) for name, param in params.items()}
        slots = {
            name: {"step": torch.tensor(float(step))}
            | {slot: self._held(name, param, torch.float32, rank) for slot in SLOTS}
            for name, param in params.items()
        }
        groups = [{"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": list(params)}]
        return capture(weights, {"state": slots, "param_groups": groups}, layer_rule())

    def _held(self, name: str, param: torch.Tensor, dtype: torch.dtype, rank: int) -> Sharded:
        shape, parallel = tuple(param.shape), _parallel_dimension(name)
        box = self.box(shape, parallel, rank)
        parts = () if box is None else (Part(box, torch.empty([stop - start for start, stop in box], device="meta")),)
        return Sharded(shape, dtype, parts, dtype == param.dtype, (self.name, parallel))


def _parallel_dimension(name: str) -> int | None:
    """Return the dimension of a parameter that tensor parallelism cuts: that of its columns, rows, or none."""
    if "norm" in name:
        return None
    return 1 if re.search(r"\.(o|down)\.", name) else 0


@lru_cache
def _parts(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """Cut a range as ``torch.chunk`` does, and so FSDP and tensor parallelism; the last parts may be empty."""
    sizes = [len(part) for part in torch.empty(stop - start, device="meta").chunk(count)]
    return list(pairwise(accumulate([*sizes, *[0] * (count - len(sizes))], initial=start)))
