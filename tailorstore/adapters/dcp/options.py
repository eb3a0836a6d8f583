"""An optimizer's parameter groups, and the paths of a state dict that spell them."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tailorstore.adapters.dcp.names import Names, Path, split
from tailorstore.engine.tensors.packing import Packer

_GROUPS = "param_groups"
_PARAMS = "params"

Groups = Sequence[Mapping[str, Any]]
"""Options, and ``params`` as names."""


def options_of(names: Names, groups: Groups) -> dict[Path, Any]:
    """Return path → value of every option of some parameter groups."""
    if names.optim is None:
        return {}
    if not names.flat:
        return {
            (*names.optim, _GROUPS, at, key): value for at, group in enumerate(groups) for key, value in group.items()
        }
    return {
        (*names.optim, f"{_GROUPS}.{name}.{key}"): value
        for group in groups
        for name in group[_PARAMS]
        for key, value in group.items()
        if key != _PARAMS
    }


def groups_of(
    names: Names, values: Mapping[Path, Any], tensors: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], set[Path]]:
    """Return the parameter groups that some values spell.

    Where the optimizer's keys are joined, each parameter has its own options: those with the same are one group.

    Args:
        names: how state dicts are stored.
        values: path → value.
        tensors: names of the model's tensors.

    Returns:
        The groups, and the paths that these say everything of.
    """
    if names.optim is None:
        return [], set()
    found = _joined_groups(names.optim, values, tensors) if names.flat else _nested_groups(names.optim, values)
    return found, options_of(names, found).keys() & values.keys()


def _nested_groups(optim: Path, values: Mapping[Path, Any]) -> list[dict[str, Any]]:
    above = (*optim, _GROUPS)
    groups: dict[int, dict[str, Any]] = defaultdict(dict)
    for path, value in values.items():
        if path[:-2] == above and isinstance(path[-2], int):
            groups[path[-2]][str(path[-1])] = value
    complete = sorted(groups) == list(range(len(groups))) and all(_has_names(group) for group in groups.values())
    return [groups[at] for at in sorted(groups)] if complete else []


def _has_names(group: Mapping[str, Any]) -> bool:
    params = group.get(_PARAMS)
    return isinstance(params, list) and all(isinstance(name, str) for name in params)


def _joined_groups(optim: Path, values: Mapping[Path, Any], tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    options: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, value in values.items():
        last = path[-1]
        if path[:-1] == optim and isinstance(last, str) and last.startswith(f"{_GROUPS}."):
            parts = split(last.removeprefix(f"{_GROUPS}."), tensors)
            if parts is not None:
                options[parts[0]][parts[1]] = value
    groups: dict[str, dict[str, Any]] = {}
    for name, held in options.items():
        group = groups.setdefault(_identity(held), {**held, _PARAMS: []})
        group[_PARAMS].append(name)
    return list(groups.values())


def _identity(options: Mapping[str, Any]) -> str:
    return json.dumps(Packer().pack(dict(options), _GROUPS), sort_keys=True)


def names_in(groups: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the parameters of some groups."""
    return {name for group in groups for name in group[_PARAMS]}
