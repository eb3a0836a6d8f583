"""What of the state one rank measures."""

from collections.abc import Callable
from dataclasses import replace

from tailorstore.engine.tensors.capture import Capture, LayerCapture
from tailorstore.engine.tensors.parameters import held_of


def local_capture(captured: Capture, speaks: Callable[[str, str], bool]) -> Capture:
    """Return a rank's own part of the state, for its gauge.

    Its layers list those parameters (where a layer has none, buffers) of which some elements are here and for which
    this rank speaks, with their slots; layers without any are left out. Arrays are those of the capture itself: a gauge
    looks at the parts that are here.

    Args:
        captured: all that this rank has.
        speaks: layer and array path → whether this rank speaks for the parts that it holds; of replicas one does.
    """
    layers = {name: _spoken_for(layer, speaks) for name, layer in captured.layers.items()}
    return replace(captured, layers={name: layer for name, layer in layers.items() if _measured(layer)})


def _spoken_for(layer: LayerCapture, speaks: Callable[[str, str], bool]) -> LayerCapture:
    content = layer.content
    kind = "params" if content["params"] else "buffers"
    mine = {
        name: value
        for name, value in content[kind].items()
        if held_of(layer, value["$array"]).parts and speaks(layer.name, value["$array"])
    }
    slots = {name: held for name, held in content["optim"].items() if name in mine}
    return replace(layer, content={**content, "params": {}, "buffers": {}, kind: mine, "optim": slots})


def _measured(layer: LayerCapture) -> bool:
    return bool(layer.content["params"] or layer.content["buffers"])
