"""What an optimizer's slots tell about its parameters: the step it is making, and the gradient's second moment.

Slots are recognised by their names, which optimizers of one family share, whoever wrote them. Unknown ones are taken
for a momentum: the first slot of the parameter's shape, times the learning rate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

import torch

from tailorstore.engine.tensors.memory import scalar_from_hex
from tailorstore.engine.tensors.sampling import joined, reals, take

Form = Literal["still", "idle", "unknown", "plain", "even", "scaled", "root", "adam", "peak"]
"""How an element's step follows from its slots.

| form | step of an element | optimizers |
|---|---|---|
| ``still`` | 0 | parameters that are frozen, or were never updated |
| ``idle`` | 0, or cannot be told | parameters that an optimizer trains and has no slots for |
| ``unknown`` | cannot be told | slots or learning rate are missing |
| ``plain`` | rate × abs(first) | SGD and RMSprop with momentum; any unknown optimizer |
| ``even`` | rate where second or first is not 0 | those whose step has a known size: Lion, Muon, RMSprop, Adagrad |
| ``scaled`` | rate × max(abs(weight), eps) | Adafactor, whose step is as large as the weights |
| ``root`` | rate × √first | Adadelta |
| ``adam`` | rate × √(first² + fresh² × second) / (√second + eps) | Adam and its kin |
| ``peak`` | rate × abs(first) / second | Adamax |
"""


@dataclass(frozen=True, slots=True)
class Factored:
    """A second moment kept as row and column means: element (i, j) is row i × column j / mean of the rows.

    Of rows that a process holds a part of, the mean is that of the part.
    """

    row: torch.Tensor
    """Of shape (…, rows)."""
    column: torch.Tensor
    """Of shape (…, columns)."""

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """Return the second moment at positions in C order of the parameter, of shape (samples,)."""
        index = index.to(self.row.device)
        rows, columns = self.row.shape[-1], self.column.shape[-1]
        lead, place = index // columns, index % columns
        matrix = lead // rows
        # Where no gradient has come yet, all is 0, and so is the second moment.
        mean = self.row.float().mean(dim=-1).reshape(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return take(self.row, lead).float() * take(self.column, matrix * columns + place).float() / mean[matrix]


Second = torch.Tensor | Factored


@dataclass(frozen=True, slots=True)
class Motion:
    """How one parameter moves: a form, with the slots and numbers that it needs."""

    form: Form
    first: torch.Tensor | None = None
    """Slot of the parameter's shape, as real numbers."""
    second: Second | None = None
    curved: bool = False
    """Whether ``second``, times ``correction``, is a mean of squared gradients."""
    rate: float = 0.0
    correction: float = 1.0
    eps: float = 0.0
    fresh: float = 0.0
    """Share of the newest gradient, which is in no slot, against that of ``first``."""

    @property
    def kind(self) -> tuple[Form, bool, type | None, bool]:
        """Parameters of one kind can be worked on together."""
        return self.form, self.first is not None, type(self.second) if self.second is not None else None, self.curved

    @property
    def known(self) -> bool:
        """Whether the step can be told."""
        return self.form not in ("idle", "unknown")


STILL = Motion("still")
IDLE = Motion("idle")
UNKNOWN = Motion("unknown")


def motion_of(
    slots: Mapping[str, Any],
    options: Mapping[str, Any],
    optimizer: str | None,
    shape: tuple[int, ...],
    whole: tuple[int, ...],
) -> Motion:
    """Return how a parameter, or the part of it that a process holds, moves.

    Args:
        slots: slot name → tensor or number, as packed: ``step`` may be a ``$scalar``. Of a part, those of that part.
        options: the parameter's group, unpacked; empty where it is not known.
        optimizer: name of the optimizer's class, if known.
        shape: the part's.
        whole: the parameter's.
    """
    tensors = {name: slot for name, slot in slots.items() if isinstance(slot, torch.Tensor)}
    alike = {
        name: reals(slot)
        for name, slot in tensors.items()
        if slot.shape == shape and (slot.is_floating_point() or slot.is_complex())
    }
    rate = _rate(slots, options)
    found = _recognised(_Slots(slots, tensors, alike, options, optimizer or "", shape, whole, rate or 0.0))
    # Without a learning rate the step is unknown, but not the second moment.
    return found if rate is not None else replace(found, form="unknown")


def _rate(slots: Mapping[str, Any], options: Mapping[str, Any]) -> float | None:
    if options.get("relative_step"):
        step = max(number(slots.get("step")) or 1.0, 1.0)
        return min(1e-6 * step if options.get("warmup_init") else 1e-2, 1 / math.sqrt(step))
    return number(options.get("lr"))


@dataclass(frozen=True, slots=True)
class _Slots:
    all: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    alike: Mapping[str, torch.Tensor]
    options: Mapping[str, Any]
    optimizer: str
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    rate: float

    def step(self) -> float | None:
        return number(self.all.get("step"))

    def beta(self, at: int) -> float:
        betas = self.options.get("betas")
        given = betas[at] if isinstance(betas, tuple | list) and len(betas) > at else None
        return number(given) or 0.0

    def unbias(self, beta: float) -> float:
        """Return what a moving average since the first step is multiplied with."""
        step = self.step()
        return 1.0 if not step or step < 1 or not 0 <= beta < 1 else 1 / (1 - beta**step)

    def eps(self, default: float = 1e-8) -> float:
        given = number(self.options.get("eps"))
        return default if given is None else given


def _recognised(slots: _Slots) -> Motion:
    alike = slots.alike
    if "RMS" in slots.all or "row_var" in slots.tensors or "variance" in slots.tensors:
        return _adafactor(slots)
    if "exp_avg" in alike and "exp_inf" in alike:
        rate = slots.rate * slots.unbias(slots.beta(0))
        return Motion("peak", alike["exp_avg"], alike["exp_inf"], rate=rate)
    if "exp_avg" in alike and "exp_avg_sq" in alike:
        return _adam(slots)
    if "exp_avg" in alike:
        return Motion("even", alike["exp_avg"], rate=slots.rate)
    if "momentum_buffer" in alike:
        return _momentum(slots)
    if "acc_delta" in alike:
        return Motion("root", alike["acc_delta"], alike.get("square_avg"), "square_avg" in alike, slots.rate)
    if "square_avg" in alike:
        correction = slots.unbias(number(slots.options.get("alpha")) or 0.0)
        # The gradient is divided by the root of an average that is not corrected.
        return Motion("even", None, alike["square_avg"], True, slots.rate * math.sqrt(correction), correction)
    if "sum" in alike:
        steps = max(slots.step() or 1.0, 1.0)
        decay = number(slots.options.get("lr_decay")) or 0.0
        rate = slots.rate / (1 + (steps - 1) * decay) / math.sqrt(steps)
        return Motion("even", None, alike["sum"], True, rate, 1 / steps)
    if alike:
        return Motion("plain", next(iter(alike.values())), rate=slots.rate)
    return UNKNOWN


def _adam(slots: _Slots) -> Motion:
    first, second = slots.alike["exp_avg"], slots.alike.get("max_exp_avg_sq", slots.alike["exp_avg_sq"])
    motion = Motion("adam", first, second, True, 0.0, slots.unbias(slots.beta(1)), slots.eps())
    step, product = slots.step(), number(slots.all.get("mu_product"))
    if step is None or product is None:
        return replace(motion, rate=slots.rate * slots.unbias(slots.beta(0)))
    # NAdam mixes the newest gradient in anew, of which its slots know the usual size only.
    decay = number(slots.options.get("momentum_decay")) or 0.0
    share = slots.beta(0) * (1 - 0.5 * 0.96 ** ((step + 1) * decay))
    rate = slots.rate * share / max(1 - product * share, 1e-8)
    return replace(motion, rate=rate, fresh=(1 - share) / share if share else 0.0)


def _momentum(slots: _Slots) -> Motion:
    buffer, whole = slots.alike["momentum_buffer"], slots.whole
    if "Muon" in slots.optimizer and len(whole) > 1:
        # The step is a matrix whose singular values are all about one, times a factor that depends on its shape.
        rows, columns = whole[0], math.prod(whole[1:])
        match slots.options.get("adjust_lr_fn"):
            case None | "original":
                factor = math.sqrt(max(1.0, rows / columns))
            case "match_rms_adamw":
                factor = 0.2 * math.sqrt(max(rows, columns))
            case _:
                factor = 1.0
        return Motion("even", buffer, rate=slots.rate * factor / math.sqrt(max(rows, columns)))
    second = slots.alike.get("square_avg")
    correction = slots.unbias(number(slots.options.get("alpha")) or 0.0)
    return Motion("plain", buffer, second, second is not None, slots.rate, correction)


def _adafactor(slots: _Slots) -> Motion:
    """Read torch's Adafactor (``row_var``, ``col_var``, ``variance``) or that of transformers (``RMS`` and others)."""
    step = max(slots.step() or 1.0, 1.0)
    second = _adafactor_second(slots)
    if "RMS" not in slots.all:
        small = slots.options.get("eps")
        floor = number(small[1]) if isinstance(small, tuple | list) and len(small) > 1 else None
        rate = min(slots.rate, 1 / math.sqrt(step))
        return Motion("scaled", None, second, second is not None, rate, eps=1e-3 if floor is None else floor)
    if "exp_avg" in slots.alike:
        # There the first moment averages the steps themselves, learning rate included.
        return Motion("plain", slots.alike["exp_avg"], second, second is not None, 1.0)
    rate = slots.rate
    if slots.options.get("scale_parameter"):
        rate *= max(1e-3, number(slots.all["RMS"]) or 0.0)
    return Motion("even", None, second, second is not None, rate)


def _adafactor_second(slots: _Slots) -> Second | None:
    tensors = slots.tensors
    if "row_var" in tensors and "col_var" in tensors:
        second = Factored(tensors["row_var"].detach().squeeze(-1), tensors["col_var"].detach().squeeze(-2))
    elif "exp_avg_sq_row" in tensors and "exp_avg_sq_col" in tensors:
        second = Factored(tensors["exp_avg_sq_row"].detach(), tensors["exp_avg_sq_col"].detach())
    else:
        return slots.alike.get("variance", slots.alike.get("exp_avg_sq"))
    # Means that are cut otherwise than the part say nothing of it.
    fits = (*second.row.shape, second.column.shape[-1]) == slots.shape
    return second if fits and second.column.shape[:-1] == second.row.shape[:-1] else None


def number(value: Any) -> float | None:  # noqa: ANN401
    """Return a packed or unpacked number, or ``None`` where there is none."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, torch.Tensor):
        return float(value.item()) if value.numel() == 1 and not value.is_complex() else None
    if isinstance(value, dict) and isinstance(held := value.get("$scalar"), list):
        return _scalar(held[0], held[1])
    return None


@lru_cache(maxsize=256)
def _scalar(dtype: str, text: str) -> float | None:
    return number(scalar_from_hex(dtype, text))


def gathered(slots: Sequence[Second], index: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return slots at each parameter's own positions, one after the other."""
    parts = [
        slot.at(where) if isinstance(slot, Factored) else take(slot, where)
        for slot, where in zip(slots, index, strict=True)
    ]
    return joined(parts, device)


@dataclass(frozen=True, slots=True)
class Values:
    """What steps are computed from, at the samples of parameters of one kind; each of shape (samples,)."""

    weight: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    """Times the correction."""
    rate: torch.Tensor
    eps: torch.Tensor
    fresh: torch.Tensor


def _adam_step(at: Values) -> torch.Tensor:
    second = at.second.clamp(min=0)
    return at.rate * (at.first.square() + at.fresh.square() * second).sqrt() / (second.sqrt() + at.eps)


STEPS: Mapping[Form, Callable[[Values], torch.Tensor]] = {
    "still": lambda at: torch.zeros_like(at.weight),
    "idle": lambda at: torch.zeros_like(at.weight),
    "unknown": lambda at: torch.zeros_like(at.weight),
    "plain": lambda at: at.rate * at.first.abs(),
    "even": lambda at: at.rate * ((at.first != 0) | (at.second != 0)),
    "scaled": lambda at: at.rate * torch.maximum(at.weight.abs(), at.eps),
    "root": lambda at: at.rate * at.first.clamp(min=0).sqrt(),
    "adam": _adam_step,
    "peak": lambda at: at.rate * at.first.abs() / at.second.clamp(min=1e-30),
}
"""Form → size of the step."""
