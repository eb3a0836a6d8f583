"""What a mask is decided upon: how layers moved, how old they are, what they would cost; and what was learnt of it.

A selector belongs to one branch in one process. What must outlast the process goes into ``@extra`` of every commit.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tailorstore.domain.importance import Importance
from tailorstore.domain.light import ANY_SLOT, LightSettings
from tailorstore.domain.mask import LayerState, MaskContext
from tailorstore.domain.records import EXTRA_LAYER, Commit, Composite, Fidelity, LayerDocument, LayerMeasures
from tailorstore.engine.tensors.capture import Capture, LayerCapture, learning_rate, slots_of
from tailorstore.engine.tensors.memory import name_of, nbytes
from tailorstore.storage.light import CODED_DTYPES

logger = logging.getLogger("tailorstore")

STATE = "selection"
"""Key in the skeleton of ``@extra``."""

_ENTROPY = 0.85
"""What entropy coding leaves of codes, roughly."""
_SCALES_BITS = 0.25


@dataclass(frozen=True, slots=True)
class Outlook:
    """What was found before a commit."""

    context: MaskContext
    measures: Mapping[str, LayerMeasures]
    learning_rate: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What a commit is to write, and what the selector goes on with once it is published."""

    due: Mapping[str, Fidelity]
    measures: Mapping[str, LayerMeasures]
    importance: Importance
    number: int
    """Which commit of the branch it is, from 0."""
    current: Mapping[str, int]
    """Layer → step at which it will have been found to be what is stored, or been written."""
    numbers: Mapping[int, int]
    """Step → number of those commits that ages are counted from."""

    @property
    def state(self) -> dict[str, Any]:
        """What is kept in ``@extra``; JSON data."""
        return {
            "number": self.number,
            "importance": self.importance.state(),
            "current": dict(self.current),
            "numbers": [list(pair) for pair in sorted(self.numbers.items())],
        }


@dataclass(slots=True)
class Selector:
    """Looks at the layers before each commit, and learns from what was written. Not thread-safe."""

    settings: LightSettings
    steps: Callable[[], list[int]]
    """Asks the catalog for the steps of the branch's newest commits, newest first."""
    _importance: Importance = field(default_factory=Importance)
    _number: int = 0
    _numbers: dict[int, int] = field(default_factory=dict)
    """Step → number of the branch's commits, as far as they are known."""
    _head_id: str | None = None
    """The commit that all this follows."""
    _unchanged: dict[str, int] = field(default_factory=dict)
    """Layer → step at which it was last found to be what is stored."""
    _committed_at: float | None = None
    _told: bool = False

    def follow(self, head: Composite | None, documents: Mapping[str, LayerDocument]) -> bool:
        """Take up the branch where its head is, unless that is where this selector left it.

        Args:
            head: the branch's newest composite; ``None`` before its first commit.
            documents: of its layers.

        Returns:
            Whether somebody else has written since: what layers were compared with is not what is stored any more.
        """
        head_id = None if head is None else head.commit.id
        if head_id == self._head_id:
            return False
        state = documents[EXTRA_LAYER].content.get(STATE) if EXTRA_LAYER in documents else None
        kept: Mapping[str, Any] = state if isinstance(state, dict) else {}
        number = kept.get("number")
        steps = sorted(self.steps(), reverse=True) if head is not None else []
        self._number = number + 1 if type(number) is int else len(steps)
        # Commits may have been dropped since: what was kept of their numbers counts more.
        self._numbers = {step: self._number - 1 - at for at, step in enumerate(steps)} | _numbers(kept.get("numbers"))
        self._importance = Importance(kept.get("importance"))
        self._head_id = head_id
        self._unchanged = _steps(kept.get("current"))
        self._committed_at = None
        return True

    def look(
        self,
        captured: Capture,
        branch: str,
        step: int,
        head: Composite | None,
        measures: Mapping[str, LayerMeasures],
    ) -> Outlook:
        """Gather what is known of every layer; the selector follows the head already.

        Args:
            captured: the live state; of its tensors only shapes and dtypes are looked at.
            branch: to be committed on.
            step: to be committed.
            head: the branch's newest composite; ``None`` before its first commit.
            measures: of every layer.
        """
        self._tell_unknown_slots(captured)
        layers = {name: self._state(layer, step, head, measures[name]) for name, layer in captured.layers.items()}
        since = None if self._committed_at is None else time.monotonic() - self._committed_at
        context = MaskContext(branch, step, layers, captured.tied, self._number, since)
        rate = learning_rate(captured)
        predicted = self._importance.predict(context, rate)
        if predicted is not None:
            layers |= {name: replace(layers[name], importance=value) for name, value in predicted.items()}
        return Outlook(context, measures, rate)

    def _tell_unknown_slots(self, captured: Capture) -> None:
        """Say once which slots the settings name and the optimizers do not have: a typing error would cost quality."""
        if self._told or not isinstance(self.settings.slot_bits, Mapping):
            return
        slots = {slot for layer in captured.layers.values() for _, slot in slots_of(layer).values()}
        unknown = set(self.settings.slot_bits) - {ANY_SLOT} - slots
        if slots and unknown:
            self._told = True
            names = ", ".join(map(repr, sorted(unknown)))
            logger.warning("light settings name slots %s; the optimizers have %s", names, ", ".join(sorted(slots)))

    def decide(self, outlook: Outlook, due: Mapping[str, Fidelity]) -> Decision:
        """Take what is needed of the layers that are about to be written; changes nothing yet."""
        importance = copy.copy(self._importance)
        importance.observe(outlook.context, due, outlook.learning_rate)
        step, layers = outlook.context.step, outlook.context.layers
        # What has moved will be written, and its version tells the step.
        still = [name for name in due if not outlook.measures[name].drift]
        known = {name: at for name, at in self._unchanged.items() if name in layers}
        since = {at for state in layers.values() for at in (state.current_step, state.base_step) if at is not None}
        numbers = {at: self._number_of(at) for at in since} | {step: self._number}
        current = known | dict.fromkeys(still, step)
        return Decision(due, outlook.measures, importance, self._number, current, numbers)

    def published(self, decision: Decision, commit: Commit, unchanged: Iterable[str]) -> None:
        """Go on from a commit that was published.

        Args:
            decision: that led to it.
            commit: as published.
            unchanged: layers that were due, and found to be what is stored.
        """
        self._importance = decision.importance
        self._number = decision.number + 1
        self._numbers[commit.step] = decision.number
        self._head_id = commit.id
        for name in commit.layers_written:
            self._unchanged.pop(name, None)
        self._unchanged |= dict.fromkeys(unchanged, commit.step)
        self._committed_at = time.monotonic()

    def _state(self, layer: LayerCapture, step: int, head: Composite | None, measures: LayerMeasures) -> LayerState:
        # What is in quarantine is as good as never stored.
        version = head.versions.get(layer.name) if head and layer.name not in head.quarantined else None
        if head is None or version is None:
            return LayerState(
                layer.name, layer.nbytes, None, bytes_full=layer.nbytes, bytes_light=self._light_bytes(layer)
            )
        base = version if version.fidelity == "full" else head.bases[layer.name]
        base_age = self._commits_since(base.step)
        current = max(version.step, self._unchanged.get(layer.name, version.step))
        return LayerState(
            name=layer.name,
            bytes_logical=layer.nbytes,
            source_step=version.step,
            fidelity=version.fidelity,
            current_step=current,
            commits_since=self._commits_since(current),
            base_step=base.step,
            base_commits_since=base_age,
            error=version.error,
            due_full=self.settings.is_due(error=version.error, base_commits=base_age + 1, base_steps=step - base.step),
            bytes_full=base.bytes_stored,
            bytes_light=version.bytes_stored if version.fidelity == "light" else self._light_bytes(layer),
            measures=measures,
        )

    def _commits_since(self, step: int) -> int:
        return self._number - 1 - self._number_of(step)

    def _number_of(self, step: int) -> int:
        """Return the number of the commit of a step; what is older than all that is known counts as the oldest."""
        if step in self._numbers:
            return self._numbers[step]
        return max((number for at, number in self._numbers.items() if at < step), default=0)

    def _light_bytes(self, layer: LayerCapture) -> int:
        """Return what a light version of a layer takes, roughly."""
        slots = slots_of(layer)
        bits = 0.0
        for path, tensor in layer.arrays.items():
            if name_of(tensor.dtype) not in CODED_DTYPES or tensor.numel() < self.settings.exact_below:
                bits += 8 * nbytes(tensor)
                continue
            _, slot = slots.get(path, ("", ""))
            each = self.settings.bits_of_slot(slot) if slot else self.settings.weight_bits
            bits += (each * _ENTROPY + _SCALES_BITS) * tensor.numel()
        return int(bits / 8)


def _numbers(pairs: object) -> dict[int, int]:
    """Return the numbers of commits that a document holds; none where it holds something else."""
    found = [pair for pair in pairs if isinstance(pair, list) and len(pair) == 2] if isinstance(pairs, list) else []
    return {step: number for step, number in found if type(step) is int and type(number) is int}


def _steps(named: object) -> dict[str, int]:
    """Return the steps by layer that a document holds; none where it holds something else."""
    held = named.items() if isinstance(named, dict) else ()
    return {name: step for name, step in held if type(step) is int}
