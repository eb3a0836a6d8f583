"""What a commit will write: decided before a byte leaves the device. No I/O."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsFloat

from tailorstore.domain.errors import InvalidInputError, ModelMismatchError
from tailorstore.domain.light import LightSettings
from tailorstore.domain.mask import Mask, MaskContext, resolve_mask
from tailorstore.domain.records import EXTRA_LAYER, ArraySpec, Composite, Fidelity, LayerDocument, LayerVersion
from tailorstore.engine.light.encode import EncodedLayer
from tailorstore.engine.tensors.capture import Capture, LayerCapture
from tailorstore.engine.tensors.memory import dtype_name
from tailorstore.storage.documents import choose_chunks
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.layers import canonical_json

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """How tensors become arrays; settings of a store."""

    chunk_bytes: int
    codec: str

    def spec(self, shape: tuple[int, ...], dtype: str) -> ArraySpec:
        """Return the layout of one tensor."""
        return ArraySpec(dtype, shape, choose_chunks(shape, itemsize(dtype), self.chunk_bytes), self.codec)


@dataclass(frozen=True, slots=True)
class LightPlan:
    """How a layer is to be written light."""

    base: LayerVersion
    document: LayerDocument
    """Of the base."""
    previous: LayerDocument | None
    """Of the branch's version of the layer, if that is a light one on the same base."""
    settings: LightSettings


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One layer that a commit is to write, or to find unchanged."""

    capture: LayerCapture
    specs: dict[str, ArraySpec]
    known: LayerDocument | None
    """The version of the layer that the branch has, where it could be equal to what is to be written."""
    light: LightPlan | None = None
    """``None``: to be written in full."""
    encoded: EncodedLayer | None = None
    """What ``capture`` and ``specs`` are of, once the layer is coded."""


def check_step(step: object) -> int:
    """Return a step as a plain integer.

    Raises:
        InvalidInputError: not a whole number, or negative.
    """
    try:
        if isinstance(step, bool):
            raise TypeError
        number = operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        msg = f"step must be a whole number, not {step!r}"
        raise InvalidInputError(msg) from None
    if not 0 <= number < 2**63:
        msg = f"step must be between 0 and 2**63 - 1, not {number}"
        raise InvalidInputError(msg)
    return number


def check_metrics(metrics: Mapping[str, SupportsFloat] | None) -> dict[str, float]:
    """Return metrics as plain floats; NaN and infinities are welcome.

    Raises:
        InvalidInputError: a name that is no string, or a value that is no number.
    """
    found: dict[str, float] = {}
    if metrics is not None and not isinstance(metrics, Mapping):
        msg = f"metrics map names to numbers; a {type(metrics).__name__} does not"
        raise InvalidInputError(msg)
    for name, value in (metrics or {}).items():
        try:
            if not isinstance(name, str) or isinstance(value, str):
                raise TypeError
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            msg = f"metric {name!r} is {value!r}; metrics map names to numbers"
            raise InvalidInputError(msg) from None
    return found


def due_layers(
    capture: Capture,
    mask: Mask,
    context: MaskContext,
    *,
    head: Composite | None,
    documents: Mapping[str, LayerDocument],
    partial: bool = False,
) -> dict[str, Fidelity]:
    """Return the layers to write, and how: what the mask names, and what the branch does not have as it is.

    Args:
        capture: the live state.
        mask: the caller's.
        context: what the mask is decided upon.
        head: the branch's newest composite; ``None`` before its first commit.
        documents: of every layer of ``head`` but those in quarantine, which are written in full whatever the mask says.
        partial: layers that are not captured stay as the branch has them, and new ones may come.

    Raises:
        MaskError: the mask names an unknown layer, or asks for what cannot be.
        ModelMismatchError: the model's tensors or shapes are not those of the branch.
    """
    chosen = resolve_mask(mask, context)
    if head is None:
        return dict.fromkeys(capture.layers, "full")
    stored = {name: documents.get(name) for name in head.versions if name != EXTRA_LAYER}
    if partial:
        stored = {name: document for name, document in stored.items() if name in capture.layers}
        known = {name: layer for name, layer in capture.layers.items() if name in stored}
        check_same_model(known, stored, branch=context.branch, head=head)
    else:
        check_same_model(capture.layers, stored, branch=context.branch, head=head)
    new_kinds = [name for name, layer in capture.layers.items() if _has_new_kind(layer, stored.get(name))]
    due: dict[str, Fidelity] = {**chosen, **dict.fromkeys(new_kinds, "full")}
    return {name: due[name] for name in capture.layers if name in due}


def check_same_model(
    layers: Mapping[str, LayerCapture], stored: Mapping[str, LayerDocument | None], *, branch: str, head: Composite
) -> None:
    """Compare a model's layers, tensors and shapes with those of a branch.

    Args:
        layers: of the model.
        stored: document of every layer of the branch; ``None`` where its version is in quarantine.
        branch: for messages.
        head: for messages.

    Raises:
        ModelMismatchError: names what differs.
    """
    problems = [f"layer {name!r} is new" for name in layers if name not in stored]
    problems += [f"layer {name!r} is gone" for name in stored if name not in layers]
    for name, document in stored.items():
        if name not in layers or document is None:
            continue
        now = _weight_shapes(layers[name].content, {path: tuple(t.shape) for path, t in layers[name].arrays.items()})
        then = _weight_shapes(document.content, {path: shape for path, (_, shape) in document.tensors.items()})
        problems += [f"tensor {tensor!r} is new in layer {name!r}" for tensor in now if tensor not in then]
        problems += [f"tensor {tensor!r} is gone from layer {name!r}" for tensor in then if tensor not in now]
        problems += [
            f"tensor {tensor!r} has shape {now[tensor]}, was {then[tensor]}"
            for tensor in now
            if tensor in then and now[tensor] != then[tensor]
        ]
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + (
            f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        )
        msg = (
            f"the model is not the one of branch {branch!r} (head: step {head.commit.step}): {shown}. Commit it on a"
            " new branch: open_store(..., branch='NEW') starts one"
        )
        raise ModelMismatchError(msg)


def _weight_shapes(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shapes[value["$array"]] for kind in ("params", "buffers") for name, value in content[kind].items()}


def _has_new_kind(layer: LayerCapture, stored: LayerDocument | None) -> bool:
    """Whether a layer has slots or dtypes that its stored version has not: leaving it would mix two kinds of state.

    Without a version that can be read it has nothing but new ones.
    """
    if stored is None:
        return True
    live = {path: (dtype_name(tensor.dtype, path), tuple(tensor.shape)) for path, tensor in layer.arrays.items()}
    kept = stored.tensors
    if any(kept.get(path) != described for path, described in live.items()):
        return True
    optim, stored_optim = layer.content["optim"], stored.content["optim"]
    return any(slots.keys() - stored_optim.get(name, {}).keys() for name, slots in optim.items())


def plan_layer(layer: LayerCapture, layout: Layout, stored: LayerDocument | None) -> PlannedLayer:
    """Lay a layer's tensors out, and tell whether its stored version could be equal.

    Args:
        layer: with the arrays that are to be written.
        layout: settings of the store.
        stored: the branch's version of the layer.
    """
    specs = {
        path: layout.spec(tuple(tensor.shape), dtype_name(tensor.dtype, path)) for path, tensor in layer.arrays.items()
    }
    same = stored is not None and stored.fidelity == "full" and is_comparable(stored, layer, specs)
    return PlannedLayer(layer, specs, stored if same else None)


def is_comparable(stored: LayerDocument, layer: LayerCapture, specs: Mapping[str, ArraySpec]) -> bool:
    """Whether a version has the same skeleton and layouts as what is to be written, so that digests decide."""
    return (
        _same_content(stored.content, layer.content)
        and stored.arrays.keys() == specs.keys()
        and all(_same_elements(stored.arrays[path].spec, spec) for path, spec in specs.items())
    )


def _same_content(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two skeletons are the same to the bit: to Python, ``1 == 1.0`` and ``0.0 == -0.0``."""
    return a == b and canonical_json(a) == canonical_json(b)


def _same_elements(a: ArraySpec, b: ArraySpec) -> bool:
    """Whether chunk digests of two layouts can be compared: the codec does not matter."""
    return (a.dtype, a.shape, a.chunk_shape) == (b.dtype, b.shape, b.chunk_shape)
