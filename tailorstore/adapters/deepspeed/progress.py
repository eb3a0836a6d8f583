"""What a DeepSpeed engine knows besides tensors: counters, learning rate schedule, loss scale."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tailorstore.domain.errors import InvalidInputError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

RESERVED = "@deepspeed"
"""Key of a commit's extra state under which the engine's own is kept, beside the caller's."""

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in a loss scaler of DeepSpeed's; all else of it is configuration."""


def with_progress(extra: object, engine: "DeepSpeedEngine") -> dict[str, Any]:
    """Return a caller's extra state with the engine's under the reserved key.

    Args:
        extra: a dictionary, or ``None``.
        engine: whose counters, scheduler and loss scaler are taken.

    Raises:
        InvalidInputError: the extra state is something else, or has the reserved key.
    """
    if extra is not None and not isinstance(extra, Mapping):
        msg = f"extra must be a dictionary (the engine's own state goes into it), not {type(extra).__name__}"
        raise InvalidInputError(msg)
    if extra is not None and RESERVED in extra:
        msg = f"the key {RESERVED!r} of extra is the engine's own; use another"
        raise InvalidInputError(msg)
    return {**(extra or {}), RESERVED: _progress_of(engine)}


def without_progress(extra: Any) -> tuple[Any, Mapping[str, Any] | None]:  # noqa: ANN401
    """Return a commit's extra state as the caller passed it, and the engine's; ``None`` if no engine committed it."""
    if not isinstance(extra, Mapping) or RESERVED not in extra:
        return extra, None
    return {key: value for key, value in extra.items() if key != RESERVED}, extra[RESERVED]


def _progress_of(engine: "DeepSpeedEngine") -> dict[str, Any]:
    return {
        "optimizer": _kind(engine.optimizer.optimizer),
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        **{name: [_kind(part), _state_of(part)] for name, part in _parts(engine).items()},
    }


def compare_progress(engine: "DeepSpeedEngine", stored: Mapping[str, Any], problems: list[str]) -> None:
    """Add what of a stored progress does not fit an engine to the problems."""
    mine, theirs = _kind(engine.optimizer.optimizer), stored["optimizer"]
    if mine != theirs:
        problems.append(f"optimizer: it is a {mine}, the composite's was a {theirs}")
    mine, theirs = (_kind_of(found, "lr_scheduler") for found in (_progress_of(engine), stored))
    if mine != theirs:
        problems.append(f"lr_scheduler: the engine's is {mine}, the composite's was {theirs}")


def set_progress(engine: "DeepSpeedEngine", stored: Mapping[str, Any]) -> None:
    """Set an engine's counters, scheduler and loss scalers; one of another kind (of another precision) begins anew."""
    for name, value in stored["counters"].items():
        setattr(engine, name, value)
    # With another number of micro-steps to a step, the next step must still have all of its own.
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()
    for name, part in _parts(engine).items():
        if _kind_of(stored, name) == _kind(part):
            _set_state(part, stored[name][1])


def _parts(engine: "DeepSpeedEngine") -> dict[str, Any]:
    """Return what an engine has of things with a state of their own."""
    parts = {
        "lr_scheduler": engine.lr_scheduler,
        "loss_scaler": getattr(engine.optimizer, "loss_scaler", None),
        # torch's, under autocast to fp16.
        "grad_scaler": getattr(engine.optimizer, "torch_autocast_gradscaler", None),
    }
    return {name: part for name, part in parts.items() if part is not None}


def _state_of(part: Any) -> dict[str, Any]:  # noqa: ANN401 - a scheduler or scaler
    if hasattr(part, "state_dict"):
        found: dict[str, Any] = part.state_dict()
        return found
    return {name: getattr(part, name) for name in _SCALE if hasattr(part, name)}


def _set_state(part: Any, state: Mapping[str, Any]) -> None:  # noqa: ANN401
    if hasattr(part, "load_state_dict"):
        part.load_state_dict(state)
        return
    for name, value in state.items():
        setattr(part, name, value)


def _kind_of(progress: Mapping[str, Any], name: str) -> str:
    return str(progress[name][0]) if name in progress else "none"


def _kind(value: object) -> str:
    return type(value).__qualname__
