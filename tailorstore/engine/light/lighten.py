"""From a layer and its base to the light version: read what of the base is needed, then code."""

from collections.abc import Callable, Iterable, Mapping

from tailorstore.domain.light import BASED, LightTensor
from tailorstore.engine.light.bases import BaseCache
from tailorstore.engine.light.encode import EncodedLayer, LayerEncoder
from tailorstore.engine.plan import LightPlan
from tailorstore.engine.read import StoredArray, array_jobs
from tailorstore.engine.tensors.capture import LayerCapture, slots_of, weights_of
from tailorstore.engine.tensors.memory import Tensor, empty_host, name_of
from tailorstore.storage.light import CODED_DTYPES
from tailorstore.storage.threads import Job, in_turn
from tailorstore.storage.transport import Objects


def lightening_jobs(
    objects: Objects,
    layer: LayerCapture,
    plan: LightPlan,
    bases: BaseCache,
    done: Callable[[EncodedLayer], Iterable[Job]],
) -> list[Job]:
    """Return the jobs that code a layer.

    Args:
        objects: the root.
        layer: live or staged.
        plan: base and settings.
        bases: gives what of the base is in memory, and is given what later versions on the same base will need.
        done: is given the result, and returns the jobs that write it.
    """
    previous = plan.previous.light.tensors if plan.previous is not None and plan.previous.light is not None else {}
    held = dict(bases.get(layer.name, plan.base.version_id))
    wanted = {
        path: empty_host(tuple(tensor.shape), name_of(tensor.dtype))
        for path, tensor in _that_may_need_base(layer, plan, previous).items()
        if path not in held
    }
    base = {**held, **wanted}

    def finish(encoded: EncodedLayer) -> Iterable[Job]:
        used = {path: base[path] for path, tensor in encoded.table.tensors.items() if tensor.coding in BASED}
        bases.put(layer.name, plan.base.version_id, used)
        return done(encoded)

    encoder = LayerEncoder(layer, base, plan.settings, previous, finish)
    reads = [(StoredArray(plan.base, plan.document.arrays[path]), target) for path, target in wanted.items()]
    return in_turn(array_jobs(objects, reads), encoder.jobs)


def _that_may_need_base(layer: LayerCapture, plan: LightPlan, previous: Mapping[str, LightTensor]) -> dict[str, Tensor]:
    """Return the tensors whose coding may be a difference or ratio to the base's, by array path."""
    weights, slots = weights_of(layer), slots_of(layer)

    def may(path: str, tensor: Tensor) -> bool:
        coded = name_of(tensor.dtype) in CODED_DTYPES and tensor.numel() >= plan.settings.exact_below
        stored = plan.document.arrays.get(path)
        if not coded or stored is None or stored.spec.shape != tuple(tensor.shape):
            return False
        kept = previous.get(path)
        return path in weights or (path in slots and (kept is None or not kept.bits or kept.coding in BASED))

    return {path: tensor for path, tensor in layer.arrays.items() if may(path, tensor)}
