"""A store as a few dictionaries: what a real one must be indistinguishable from."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch

State = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """What a composite must hold of a layer."""

    source: int
    tensors: State
    base: State | None = None
    """Of a light version: what it is a difference to."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelCommit:
    """What a commit must be."""

    id: str
    step: int
    branch: str
    parent: str | None
    metrics: Mapping[str, float]
    layers: Mapping[str, Layer]

    @property
    def sources(self) -> dict[str, int]:
        return {name: layer.source for name, layer in self.layers.items()}

    @property
    def fidelity(self) -> dict[str, str]:
        return {name: "full" if layer.base is None else "light" for name, layer in self.layers.items()}

    @property
    def tensors(self) -> State:
        return {name: tensor for layer in self.layers.values() for name, tensor in layer.tensors.items()}


@dataclasses.dataclass(slots=True)
class Model:
    """Commits, and names that point to them."""

    commits: dict[str, ModelCommit] = dataclasses.field(default_factory=dict)
    logs: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Branch → ids, newest first. What GC drops is taken out."""
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    held: list[str] = dataclasses.field(default_factory=list)
    """Ids of the commits that readers have checked out, once for each."""

    def head(self, branch: str) -> ModelCommit | None:
        log = self.logs.get(branch)
        return self.commits[log[0]] if log else None

    def next_step(self, branch: str) -> int:
        head = self.head(branch)
        return 0 if head is None else head.step + 1

    def publish(self, commit: ModelCommit) -> None:
        self.commits[commit.id] = commit
        self.logs.setdefault(commit.branch, []).insert(0, commit.id)

    def point(self, branch: str, commit_id: str) -> None:
        """Let a branch continue from a commit: its log is that of a branch on which the commit is, up to it.

        On several branches a commit has the same past, as long as nothing of it was dropped; what was dropped is gone
        from all. One that no branch reaches any more has the past that it had when it was published.
        """
        self.logs[branch] = list(self.past_of(commit_id))

    def past_of(self, commit_id: str) -> Iterator[str]:
        """Yield a commit and those before it that still exist, by their parents."""
        current: str | None = commit_id
        while current is not None:
            if current in self.commits:
                yield current
            current = self.parents[current]

    parents: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Of all commits that ever were."""

    # --- Retention

    def protected(self) -> set[str]:
        """Return what no policy may drop."""
        return {log[0] for log in self.logs.values() if log} | set(self.tags.values()) | set(self.held)

    def last(self, n: int) -> set[str]:
        return {one for log in self.logs.values() for one in log[:n]}

    def every(self, steps: int) -> set[str]:
        found: set[str] = set()
        for log in self.logs.values():
            first: dict[int, str] = {}
            for one in reversed(log):
                first.setdefault(self.commits[one].step // steps, one)
            found |= set(first.values())
        return found

    def best(self, metric: str, n: int, mode: str) -> set[str]:
        sign = 1 if mode == "min" else -1
        found: set[str] = set()
        for log in self.logs.values():
            finite = [one for one in log if math.isfinite(self.commits[one].metrics.get(metric, math.nan))]
            # Of equals the newer counts.
            finite.sort(key=lambda one: (sign * self.commits[one].metrics[metric], -self.commits[one].step))
            found |= set(finite[:n])
        return found

    def drop_all_but(self, kept: set[str]) -> set[str]:
        """Drop commits; return those that were."""
        dropped = set(self.commits) - kept - self.protected()
        for one in dropped:
            del self.commits[one]
        for branch, log in self.logs.items():
            self.logs[branch] = [one for one in log if one not in dropped]
        return dropped
