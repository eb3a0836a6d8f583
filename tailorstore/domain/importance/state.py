"""The state of a learned importance as JSON data, and back."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tailorstore.domain.importance.memory import COLUMN_NAMES, GAPPED, Columns, Floats, Memory
from tailorstore.domain.importance.regression import UNFITTED, WEIGHTS, Fit, fitted

_VERSION = 1
FIT_SHAPES = {"gram": (WEIGHTS, WEIGHTS), "moment": (WEIGHTS,), "error": (2,), "reference": (2,), "seen": (2,)}


def state_of(fit: Fit, memory: Memory | None) -> dict[str, Any]:
    """Return JSON data with finite numbers only: some 4 kB, and 70 bytes a layer."""
    state: dict[str, Any] = {
        "version": _VERSION,
        "commits": list(fit.commits),
        "predictions": fit.predictions,
        "newest": None,
    }
    state |= {name: getattr(fit, name).tolist() for name in FIT_SHAPES}
    if memory is not None:
        state["newest"] = {
            "layers": list(memory.names),
            "columns": {name: _listed(getattr(memory.columns, name)) for name in COLUMN_NAMES},
            "step": memory.step,
            "interval": memory.interval,
            "rate": memory.rate,
            "trend": memory.trend,
            "curvature": memory.curvature,
        }
    return state


def parse_state(state: Mapping[str, Any]) -> tuple[Fit, Memory | None]:
    """Return what :meth:`Importance.state` wrote; anything else raises one of Python's own errors."""
    if state["version"] != _VERSION:
        msg = f"it has version {state['version']!r}, and {_VERSION} is known"
        raise ValueError(msg)
    arrays = {name: _array(state[name], shape) for name, shape in FIT_SHAPES.items()}
    left, written = (_count(one) for one in state["commits"])
    fit = replace(UNFITTED, **arrays, commits=(left, written), predictions=_count(state["predictions"]))
    if not all(seen > 0.0 or not commits for seen, commits in zip(fit.seen, fit.commits, strict=True)):
        msg = "its counts contradict one another"
        raise ValueError(msg)
    with np.errstate(all="ignore"):
        fit = fitted(fit, fit.gram, fit.moment)
    _array(fit.weights.tolist(), (WEIGHTS,))
    newest = state["newest"]
    if newest is None:
        return fit, None
    names = tuple(str(name) for name in newest["layers"])
    if len(set(names)) != len(names):
        msg = "a layer stands in it twice"
        raise ValueError(msg)
    columns = {name: _array(newest["columns"][name], (len(names),), gaps=name in GAPPED) for name in COLUMN_NAMES}
    return fit, Memory(
        names=names,
        step=_count(newest["step"]),
        interval=None if newest["interval"] is None else max(_count(newest["interval"]), 1),
        rate=None if newest["rate"] is None else float(_array(newest["rate"], ())),
        trend=float(_array(newest["trend"], ())),
        curvature=None if newest["curvature"] is None else bool(newest["curvature"]),
        columns=Columns(**columns),
    )


def _array(value: object, shape: tuple[int, ...], *, gaps: bool = False) -> Floats:
    array = np.array(value, np.float64)
    if array.shape != shape or not (gaps or np.isfinite(array).all()) or np.isinf(array).any():
        msg = f"{shape} finite numbers are expected"
        raise ValueError(msg)
    return array


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        msg = f"{value!r} is no count"
        raise ValueError(msg)
    return value


def _listed(values: Floats) -> list[float | None]:
    return [one if math.isfinite(one) else None for one in values.tolist()]
