"""What the skeleton of a layer's state must look like, before anything is read or allocated by its word. Pure.

A skeleton is JSON in which ``{"$array": path}`` and ``{"$ndarray": path}`` stand for tensors (the kinds of values are
listed where they are packed, ``engine/tensors/packing.py``).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tailorstore.domain.records import EXTRA_LAYER

SECTIONS = ("params", "buffers", "states", "optim", "aliases")
"""What the skeleton of every layer but ``@extra`` has."""


def paths_in(value: Any) -> list[str]:  # noqa: ANN401
    """Return the paths of all arrays that a skeleton names, each as often as it is named.

    Raises:
        TypeError: one is named by something else than a string.
    """
    if isinstance(value, Mapping):
        if len(value) == 1 and value.keys() <= {"$array", "$ndarray"}:
            (path,) = value.values()
            if not isinstance(path, str):
                raise TypeError(type(path).__name__)
            return [path]
        return [path for item in value.values() for path in paths_in(item)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [path for item in value for path in paths_in(item)]
    return []


def check_skeleton(layer: str, content: object, tensors: Collection[str]) -> Mapping[str, Any]:
    """Return a layer's skeleton if all of it means something.

    Args:
        layer: whose it is.
        content: JSON data, not deeper than functions that call themselves can follow.
        tensors: paths of the tensors that the layer version has.

    Raises:
        KeyError, TypeError, ValueError: a section is missing or of the wrong kind, or a tensor is named that there is
            not. One that is named twice is refused, too: it would be read as often as it is named, so that a small
            document could ask for any amount of memory.
    """
    if not isinstance(content, dict):
        raise TypeError(layer)
    named = paths_in(content)
    if len(set(named)) != len(named) or not set(named) <= set(tensors):
        raise ValueError(layer)
    if layer != EXTRA_LAYER:
        _check_sections(content)
    return content


def _check_sections(content: Mapping[str, Any]) -> None:
    if content.keys() != set(SECTIONS) or not all(isinstance(content[section], dict) for section in SECTIONS):
        raise ValueError(list(content))
    for section in ("params", "buffers"):
        for value in content[section].values():
            if not isinstance(value, dict) or value.keys() != {"$array"} or not isinstance(value["$array"], str):
                raise TypeError(section)
    if not all(isinstance(slots, dict) for slots in content["optim"].values()):
        raise TypeError("optim")
    if not all(isinstance(target, str) for target in content["aliases"].values()):
        raise TypeError("aliases")
