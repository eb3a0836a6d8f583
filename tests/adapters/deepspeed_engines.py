"""DeepSpeed engines that train on the CPU, for tests: a small model with everything that ZeRO treats in its own way."""

import dataclasses
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

VOCABULARY = 13
WIDTH = 7
ROWS = 2
"""Sequences that a rank trains on at once."""


class Counting(torch.nn.Module):
    """Knows how often it was called, as modules with statistics of their own do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Block(torch.nn.Module):
    """Has parameters of one, two and three dimensions, with odd numbers of elements (none is without dimensions:
    DeepSpeed cannot broadcast those)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 11)
        self.down = torch.nn.Linear(11, WIDTH)
        self.mix = torch.nn.Parameter(torch.randn(3, 5, WIDTH) / 10)
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.counting = Counting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.get_buffer("seen").add_(1)
        found: torch.Tensor = self.counting(
            x + self.gain * self.down(torch.relu(self.up(x))) * (1 + self.mix.sum((0, 1)))
        )
        return found


class Net(torch.nn.Module):
    """A language model with a tied head, a frozen layer and buffers."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(blocks))
        self.frozen = torch.nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(requires_grad=False)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x + self.frozen(x))
        return logits

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups as people make them: matrices decay, all else does not; one frozen is among them."""
        decaying = [param for param in self.parameters() if param.dim() > 1]
        others = [param for param in self.parameters() if param.dim() <= 1]
        return [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 2e-2}]


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What kind of engine."""

    stage: int
    precision: str = "fp32"
    zero: tuple[tuple[str, Any], ...] = ()
    """Further settings of ZeRO."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Further settings."""

    @property
    def name(self) -> str:
        return "-".join([str(self.stage), self.precision, *(key for key, _ in self.zero + self.settings)])


FP32_SUMS = (("data_types", {"grad_accum_dtype": "fp32"}),)
KINDS = {
    kind.name: kind
    for kind in (
        Kind(1),
        Kind(1, "bf16"),
        Kind(1, "bf16", settings=FP32_SUMS),
        Kind(2, zero=(("round_robin_gradients", True),)),
        Kind(2, "bf16", (("offload_optimizer", {"device": "cpu"}),), (("zero_force_ds_cpu_optimizer", False),)),
        Kind(3),
        # Several flat tensors to a group, and parameters that are gathered for each use.
        Kind(3, "bf16", (("sub_group_size", 150), ("stage3_param_persistence_threshold", 40))),
    )
}


def prepare() -> None:
    """Make DeepSpeed ready to be used on this rank."""
    # DeepSpeed and what it calls of torch warn of each other; what is tested here does not.
    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Its own all-reduce through shared memory would be compiled for a minute; gloo's does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_engine(
    kind: Kind, seed: int, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, blocks: int = 2, **options: Any
) -> Any:
    """Return a new engine.

    Args:
        kind: stage, precision and more.
        seed: of its weights.
        optimizer: class of the optimizer that it wraps.
        blocks: of the model.
        options: of the optimizer.
    """
    import deepspeed

    torch.manual_seed(seed)
    model = Net(blocks)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": kind.stage, **dict(kind.zero)},
        **{precision: {"enabled": kind.precision == precision} for precision in ("bf16", "fp16")},
        **dict(kind.settings),
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer(model.groups(), **{"lr": 1e-2, **options}),
        lr_scheduler=halving,
        config=config,
    )
    return engine


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def tokens(step: int, half: int, rank: int) -> torch.Tensor:
    """Return what a rank trains on in one of the two halves of a step."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + half)
    return torch.randint(VOCABULARY, (ROWS, 5), generator=generator)


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch).float()
    return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch.roll(1, 1).reshape(-1))


def train(engine: Any, steps: range) -> list[float]:
    """Train for some steps; return the losses that this rank saw."""
    losses = []
    for step in steps:
        for half in range(2):
            loss = loss_of(engine, tokens(step, half, dist.get_rank()))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses
