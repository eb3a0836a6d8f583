"""How a coded layer is laid out, and whether the branch has it already."""

from tailorstore.domain.records import ArraySpec
from tailorstore.engine.light.encode import EncodedLayer
from tailorstore.engine.plan import Layout, LightPlan, PlannedLayer, is_comparable
from tailorstore.engine.tensors.memory import name_of
from tailorstore.storage.documents import choose_chunks
from tailorstore.storage.dtypes import itemsize
from tailorstore.storage.light import CODES, EXACT, SCALES

_CHUNK_BYTES = 8 << 20
"""Of codes, so that a part of a tensor can be read without reading the whole layer's codes."""

_CODECS = {CODES: "entropy", SCALES: "zstd", EXACT: "entropy"}


def plan_light(encoded: EncodedLayer, plan: LightPlan, layout: Layout) -> PlannedLayer:
    """Lay a coded layer's arrays out, and tell whether the branch's version could be equal.

    Args:
        encoded: the layer as it is to be written.
        plan: by which it was coded.
        layout: settings of the store.
    """
    specs: dict[str, ArraySpec] = {}
    for path, tensor in encoded.capture.arrays.items():
        dtype, shape = name_of(tensor.dtype), tuple(tensor.shape)
        chunks = choose_chunks(shape, itemsize(dtype), min(_CHUNK_BYTES, layout.chunk_bytes))
        specs[path] = ArraySpec(dtype, shape, chunks, _CODECS[path])
    previous = plan.previous
    same = (
        previous is not None
        and previous.light == encoded.table
        and previous.error == encoded.error
        and is_comparable(previous, encoded.capture, specs)
    )
    return PlannedLayer(encoded.capture, specs, previous if same else None, plan, encoded)
