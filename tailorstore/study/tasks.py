"""What is trained: a model with its data. Each task lives in a module of its own, and is imported when asked for."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tailorstore.domain.errors import MissingDependencyError
from tailorstore.study.plan import Plan


class Task(Protocol):
    """A model and what it learns. The same plan gives the same weights and the same batches."""

    model: nn.Module
    peak_rates: dict[str, float]
    """Highest learning rate by optimizer."""

    def loss(self, position: int) -> Tensor:
        """Return the loss, zero-dimensional, on the training batch at a position."""
        ...

    def held_out(self) -> Tensor:
        """Return the mean loss, zero-dimensional, on data that is not trained on; the same data at every call."""
        ...


def make_task(plan: Plan, device: torch.device) -> Task:
    """Make the model, with its initial weights, and the data of a plan.

    Raises:
        MissingDependencyError: a package that the task needs is not installed.
    """
    require("transformers")
    torch.manual_seed(plan.seed)
    make: Any = import_module(f"tailorstore.study.{plan.task}").make
    task: Task = make(plan, device)
    return task


def require(*packages: str) -> None:
    """Make sure that optional packages are there.

    Raises:
        MissingDependencyError: one is not; the message says how to get it.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        msg = f"the study needs {', '.join(missing)}: run `make install-study`, or pip install 'tailorstore[study]'"
        raise MissingDependencyError(msg)


def windows(length: int, count: int, seed: int) -> Tensor:
    """Return ``count`` numbers below ``length``, shuffled by the seed alone, over and over if need be."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return order.repeat(-(-count // length))[:count]
