"""A trainer whose steps depend on nothing but the state they start from, so that two states can be compared."""

import io
from typing import TYPE_CHECKING, Any

import torch

import tailorstore as ts
from tailorstore.study.mixed import MixedState
from tailorstore.study.optimizers import make_optimizers, set_rates
from tailorstore.study.plan import Plan
from tailorstore.study.tasks import make_task

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LARGEST_GRADIENT = 1.0


def default_device() -> torch.device:
    """Return the accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Trainer:
    """A model and its optimizers, which can be put into any state and trained on from any step."""

    def __init__(self, plan: Plan, device: torch.device | None = None) -> None:
        """Make the model of a plan with its initial weights."""
        self.plan = plan
        self.device = device or default_device()
        self._task = make_task(plan, self.device)
        self.model = self._task.model
        for name, parameter in self.model.named_parameters():
            if plan.is_frozen(name):
                parameter.requires_grad_(False)
        self.optimizers = make_optimizers(plan.optimizer, self.model, self._task.peak_rates)
        self._mixed = MixedState(self.model, self.optimizers) if plan.precision == "mixed" else None

    def state(self) -> tuple[Any, Any]:
        """Return what is committed: a model, or its tensors by name, and its optimizers, or their state by name."""
        return self._mixed.collect() if self._mixed else (self.model, self.optimizers)

    def load(self, checkpoint: ts.Checkpoint) -> None:
        """Take over a composite's state."""
        if self._mixed:
            self._mixed.put(checkpoint)
        else:
            checkpoint.restore(self.model, self.optimizers)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def advance(self, step: int, steps: int) -> float:
        """Train from after ``step``; data, learning rate and dropout are those of the steps' numbers.

        Returns:
            The mean training loss.
        """
        self.model.train()
        losses = []
        for number in range(step, step + steps):
            torch.manual_seed((self.plan.seed + 1) * 2**32 + number)
            set_rates(self.optimizers, number, self.plan.horizon)
            with self._autocast():
                loss = self._task.loss(number)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), _LARGEST_GRADIENT)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    def held_out(self) -> float:
        """Return the loss on data that is not trained on."""
        self.model.eval()
        with torch.no_grad(), self._autocast():
            return self._task.held_out().item()

    def nudge(self) -> None:
        """Move every weight to one of its two neighbours among the numbers of its dtype, by chance."""
        generator = torch.Generator().manual_seed(self.plan.seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                up = torch.rand(parameter.shape, generator=generator).to(self.device) < 0.5
                ends = torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)
                parameter.copy_(torch.nextafter(parameter, ends))

    def torch_save_bytes(self) -> int:
        """Return the size of the file that ``torch.save`` would make of model and optimizers."""
        if self._mixed:
            state: Any = self._mixed.collect()
        else:
            state = self.model.state_dict(), [optimizer.state_dict() for optimizer in self.optimizers]
        sink = _Sink()
        torch.save(state, sink)
        return sink.size

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


class _Sink(io.BytesIO):
    """Counts what is written, and keeps nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def write(self, data: "Buffer", /) -> int:
        count = memoryview(data).nbytes
        self.size += count
        return count
