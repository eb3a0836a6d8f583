"""A trainer that may be killed at any moment. This is the part to copy from.

It opens the store; if that holds a commit, it restores the newest composite - model, optimizer, random number
generators, scheduler, position in the data - and trains on from there. At intervals it commits part of the layers,
without waiting for the bytes to be written. Runs as a process of its own: ``python -m tailorstore.demo.train``.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import tailorstore as ts
from tailorstore.demo.model import Size, Transformer
from tailorstore.demo.text import Batches, load_text

Tell = Callable[..., None]
"""Is told of an event: its name, and what belongs to it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train, how long, and where to commit it."""

    store: str
    steps: int = 240
    commit_every: int = 15
    mask: str = "budget('12 MB').max_age(commits=5)"
    """Which layers a commit writes. A full one takes 46 MB."""
    batch: int = 8
    held_out_batches: int = 4
    peak_rate: float = 2e-3
    warmup_steps: int = 20
    lease_seconds: float = 6.0
    size: Size = field(default_factory=Size)

    def to_json(self) -> str:
        """Return the plan as an argument for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan that :meth:`to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "size": Size(**values["size"])})


def train(plan: Plan, tell: Tell) -> None:
    """Train to the plan's last step, from wherever the store stands."""
    torch.manual_seed(0)
    text, held_out_text = load_text()
    batches = Batches(text, plan.size.context, plan.batch)
    held_out = Batches(held_out_text, plan.size.context, plan.batch)
    model = Transformer(plan.size)
    optim = torch.optim.AdamW(model.parameters(), lr=plan.peak_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda done: min(1.0, (done + 1) / plan.warmup_steps))
    # It keeps no state of its own: how layers moved and how old they are, the store knows, also after a restart.
    mask = ts.parse_strategy(plan.mask)
    step = position = 0

    # A commit that was killed keeps its claim until the lease ends. Five minutes are the default; here the demo
    # wants to show, seconds later, what gc makes of it.
    with ts.open_store(plan.store, lease=timedelta(seconds=plan.lease_seconds)) as store:
        if (checkpoint := newest(store)) is not None:
            with checkpoint:
                extra = checkpoint.restore(model, optim, rng=True)
            scheduler.load_state_dict(extra["scheduler"])
            step, position = checkpoint.step, extra["position"]
            oldest = min(checkpoint.sources.values())
            tell("restored", step=step, oldest=oldest, held_out=evaluate(model, held_out, plan.held_out_batches))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        tell("training", step=step, steps=plan.steps, parameters=parameters, text_bytes=len(text))

        losses: list[float] = []
        while step < plan.steps:
            loss = train_step(model, optim, batches.at(position))
            scheduler.step()
            step, position = step + 1, position + 1
            losses.append(loss)
            tell("step", step=step, loss=loss)
            if step % plan.commit_every == 0 or step == plan.steps:
                held_out_loss = evaluate(model, held_out, plan.held_out_batches)
                tell("committing", step=step, held_out=held_out_loss)
                # Returns once the layers are copied; the next commit, or leaving the block, waits for this one.
                store.commit(
                    step,
                    model,
                    optim,
                    mask=mask,
                    extra={"position": position, "scheduler": scheduler},
                    metrics={"loss": sum(losses) / len(losses), "held_out": held_out_loss},
                    block=False,
                )
                losses.clear()
    tell("done", step=step)


def newest(store: ts.Store) -> ts.Checkpoint | None:
    """Return the newest composite; ``None`` for a store without commits."""
    try:
        return store.checkout("latest")
    except ts.NotFoundError:
        return None


def train_step(model: Transformer, optim: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Take one step; return the loss before it."""
    inputs, targets = batch
    loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    optim.zero_grad()
    return loss.item()


def evaluate(model: Transformer, held_out: Batches, count: int) -> float:
    """Return the loss on the first batches of a text that is not trained on."""
    with torch.no_grad(), evaluating(model):
        losses = [
            cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            for inputs, targets in map(held_out.at, range(count))
        ]
    return torch.stack(losses).mean().item()


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Leave dropout out for a while."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def _print_event(name: str, **values: Any) -> None:  # noqa: ANN401
    """Tell the parent process, which reads one JSON document a line."""
    sys.stdout.write(json.dumps({"event": name, **values}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    train(Plan.from_json(sys.argv[1]), _print_event)
