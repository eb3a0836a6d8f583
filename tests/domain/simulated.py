"""A branch without bytes: what commits would write, step by step, and what strategies are told before each."""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tailorstore.domain.mask import LayerState, MaskContext, Strategy, resolve_mask
from tailorstore.domain.records import Fidelity, LayerMeasures

LIGHT_PART = 10
"""A light version takes a tenth of the bytes."""


AS_DRIFT = math.nan


def measures(
    drift: float | None, *, gradient: float | None = AS_DRIFT, curvature: float | None = AS_DRIFT
) -> LayerMeasures:
    """Return measures of which all that are not given are the drift."""
    gradient, curvature = (
        drift if figure is not None and math.isnan(figure) else figure for figure in (gradient, curvature)
    )
    return LayerMeasures(drift, drift, drift, gradient, curvature)


@dataclass
class Branch:
    """Applies masks as a commit does: layers never stored, and light ones without a base, are written in full."""

    sizes: Mapping[str, int]
    seed: int = 0
    spacing: int = 10
    number: int = 0
    written: dict[str, tuple[int, Fidelity]] = field(default_factory=dict)
    """Layer → number of the commit and fidelity of its newest version."""
    bases: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Fidelity]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return 1000 + self.number * self.spacing

    def context(self) -> MaskContext:
        rng = random.Random(f"{self.seed} {self.number}")
        layers = {name: self._state(name, size, rng) for name, size in self.sizes.items()}
        return MaskContext("main", self.step, layers, {}, self.number, 60.0 if self.number else None)

    def _state(self, name: str, size: int, rng: random.Random) -> LayerState:
        if name not in self.written:
            return LayerState(name, size, None, bytes_full=size, bytes_light=size // LIGHT_PART)
        at, fidelity = self.written[name]
        base = self.bases[name]
        step = self.step - (self.number - at) * self.spacing
        return LayerState(
            name,
            size,
            step,
            fidelity,
            current_step=step,
            commits_since=self.number - at - 1,
            base_step=self.step - (self.number - base) * self.spacing,
            base_commits_since=self.number - base - 1,
            due_full=False,
            bytes_full=size,
            bytes_light=size // LIGHT_PART,
            measures=measures(rng.lognormvariate(0, 2)),
        )

    def commit(self, strategy: Strategy) -> dict[str, Fidelity]:
        """Commit once; return what was written beyond layers never stored."""
        context = self.context()
        chosen = resolve_mask(strategy, context)
        new = {name for name, state in context.layers.items() if state.source_step is None}
        for name in new | chosen.keys():
            fidelity: Fidelity = "full" if name in new else chosen[name]
            self.written[name] = (self.number, fidelity)
            if fidelity == "full":
                self.bases[name] = self.number
        self.number += 1
        beyond = {name: fidelity for name, fidelity in chosen.items() if name not in new}
        self.history.append(beyond)
        return beyond

    def bytes(self, written: Mapping[str, Fidelity]) -> int:
        return sum(self.sizes[name] // (1 if how == "full" else LIGHT_PART) for name, how in written.items())

    def oldest(self, *, full: bool = False) -> int:
        """Return the greatest age in commits that a layer has in the newest composite."""
        numbers: Iterable[int] = self.bases.values() if full else (number for number, _ in self.written.values())
        return self.number - 1 - min(numbers)


def model(blocks: int = 12, block: int = 100, outer: int = 240) -> dict[str, int]:
    """Return layers and sizes: embedding, a stack, norm, head."""
    return {"embed": outer, **{f"h.{at}": block for at in range(blocks)}, "norm": 1, "head": outer}
