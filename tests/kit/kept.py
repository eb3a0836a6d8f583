"""What a store that is kept as a fixture must read back as: told from live state when it is made, by hashlib alone.

The JSON beside an archive holds, for each layer version, the digests of what was in memory when it was committed, and
for each commit which versions its composite has. Nothing of the engine's takes part in that, with one exception that
:func:`check_light` bounds: light versions come back as they decode, not as they were committed.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import tailorstore as ts
from tailorstore.domain.names import layer_rule
from tailorstore.storage.dtypes import register
from tests.kit.light import stored_light
from tests.kit.models import bits

Described = Any
"""JSON."""

LAYER_OF: Final = layer_rule()


def digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def describe(value: Any) -> Described:
    """Return a value as JSON that tells it from every other value: types, shapes, bits, and order where it counts."""
    if isinstance(value, torch.Tensor):
        return f"tensor {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} {digest(bits(value))}"
    if isinstance(value, np.ndarray):
        return f"array {value.dtype.str} {value.shape} {digest(np.ascontiguousarray(value).tobytes())}"
    if isinstance(value, np.generic):
        return {"number": [value.dtype.str, value.tobytes().hex()]}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, bytes):
        return {"bytes": digest(value)}
    if isinstance(value, tuple | list):
        items = [describe(item) for item in value]
        # A generator's state has hundreds of numbers.
        kept = items if len(items) < 20 else [digest(json.dumps(items).encode())]
        return {type(value).__name__: kept}
    if isinstance(value, Mapping):
        if all(type(key) is str for key in value):
            return {"dict": {key: describe(item) for key, item in value.items()}}
        return {"mapping": sorted(([describe(key), describe(item)] for key, item in value.items()), key=json.dumps)}
    if isinstance(value, str):
        return {"text": value}
    assert value is None or isinstance(value, bool | int), type(value)
    return value


# --- Random numbers


def seed_generators() -> None:
    """Give the generators one state: the same in all commits of a store, so that it is packed once."""
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002 - the global generator is the point
    torch.manual_seed(7)


def random_states() -> Described:
    """Describe the states of the generators that every commit keeps."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return describe([random.getstate(), str(name), keys, [float(one) for one in rest], torch.get_rng_state()])


@contextmanager
def same_generators() -> Iterator[None]:
    """Put the random number generators back at the end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


# --- Live state


def live_tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict(keep_vars=True)) if isinstance(model, torch.nn.Module) else dict(model)


def owners(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return for each name the first name of the same memory: tied tensors are stored once."""
    first: dict[tuple[int, torch.dtype, tuple[int, ...]], str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))
        found[name] = first.setdefault(place, name) if tensor.numel() else name
    return found


def live_optim(model: Any, optim: Any) -> tuple[dict[str, dict[str, Any]], list[Any]]:
    """Return parameter → slot → value of all optimizers, and of each its groups with parameters by name."""
    if optim is None:
        return {}, []
    slots: dict[str, dict[str, Any]] = {}
    groups: list[Any] = []
    for one in optim if isinstance(optim, list) else [optim]:
        if isinstance(one, torch.optim.Optimizer):
            names = {id(param): name for name, param in model.named_parameters()}
            slots |= {names[id(param)]: dict(held) for param, held in one.state.items()}
            groups.append([group | {"params": [names[id(p)] for p in group["params"]]} for group in one.param_groups])
        else:
            slots |= one.get("state", one)
            groups.append(one.get("param_groups", []))
    return slots, [one for one in groups if one]


def parts_of(tensors: Mapping[str, torch.Tensor], slots: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return layer → its tensors and its optimizer slots, described."""
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        part = parts.setdefault(LAYER_OF(name), {"model": {}, "slots": {}})
        part["model"][name] = describe(tensor)
        if slots.get(name):
            part["slots"][name] = describe(slots[name])
    return parts


class Recorder:
    """Commits to a store, and keeps what each composite must read back as."""

    def __init__(self, root: Path) -> None:
        """Start with no commits.

        Args:
            root: folder of the store.
        """
        self.root = root
        self.commits: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, dict[str, Any]]] = {}
        """Layer → version id → what it holds."""

    def commit(self, store: ts.Store, step: int, model: Any, optim: Any = None, **options: Any) -> ts.Commit:
        """Commit, and note what was committed."""
        tensors = live_tensors(model)
        aliases = {name: first for name, first in owners(tensors).items() if name != first}
        slots, groups = live_optim(model, optim)
        described = {"groups": describe(groups), "rng": random_states()}
        parts = parts_of({name: tensor for name, tensor in tensors.items() if name not in aliases}, slots)
        commit = store.commit(step, model, optim, **options)
        return self.note(store, commit, parts, aliases, described, options.get("extra", {}))

    def note(
        self,
        store: ts.Store,
        commit: ts.Commit,
        parts: Mapping[str, Mapping[str, Any]],
        aliases: Mapping[str, str],
        described: Mapping[str, Described],
        *extras: Any,
    ) -> ts.Commit:
        """Note a commit: of the layers that it wrote what was live, of the others what they were."""
        for layer in commit.layers_written:
            self.versions.setdefault(layer, {})[commit.id] = {"step": commit.step, "fidelity": "full", **parts[layer]}
        with store.checkout(commit) as checkpoint:
            for layer in commit.layers_written:
                if checkpoint.fidelity[layer] == "light":
                    self.versions[layer][commit.id] |= {"fidelity": "light", **self._light(store, commit, layer)}
        inherited = self.commits[commit.parent]["composite"] if commit.parent else {}
        self.commits[commit.id] = {
            "step": commit.step,
            "branch": commit.branch,
            "parent": commit.parent,
            "message": commit.message,
            "metrics": describe(dict(commit.metrics)),
            "composite": {**inherited, **dict.fromkeys(commit.layers_written, commit.id)},
            "aliases": dict(aliases),
            "extras": [describe(extra) for extra in extras],
            **described,
        }
        return commit

    def _light(self, store: ts.Store, commit: ts.Commit, layer: str) -> dict[str, Any]:
        """Return what a light version decodes to, once it is what its definition says."""
        with store.checkout(commit) as checkpoint:
            model = {name: tensor.load() for name, tensor in checkpoint.model.items() if tensor.layer == layer}
            state: Any = checkpoint.optim_state_dict()
        slots = {name: held for name, held in state["state"].items() if name in model}
        register()  # where entry points are not installed
        decoded = stored_light(store, self.root, layer, commit.id)
        for name, tensor in model.items():
            check_light(decoded.table, decoded.tensor(name), name, tensor)
            for slot, value in slots.get(name, {}).items():
                path = f"@optim/{slot}/{name}"
                if path in decoded.table:
                    check_light(decoded.table, decoded.tensor(path), path, value)
        return {"model": describe_each(model), "slots": describe_each(slots)}

    def kept(self, store: ts.Store) -> dict[str, Any]:
        """Return what must be read, after the last change: commits that are gone by now are left out."""
        logs = {branch.name: [commit.id for commit in store.log(branch.name)] for branch in store.branches()}
        tags = {tag.name: tag.commit for tag in store.tags()}
        there = {commit for log in logs.values() for commit in log} | set(tags.values())
        commits = {one: held for one, held in self.commits.items() if one in there}
        needed = {pair for held in commits.values() for pair in held["composite"].items()}
        versions = {
            layer: {one: part for one, part in parts.items() if (layer, one) in needed}
            for layer, parts in self.versions.items()
        }
        return {"logs": logs, "tags": tags, "commits": commits, "versions": versions}


def describe_each(values: Mapping[str, Any]) -> dict[str, Described]:
    return {name: describe(value) for name, value in values.items()}


def check_light(table: Mapping[str, Any], told: Any, path: str, found: torch.Tensor) -> None:
    """Fail unless a tensor is what the definition of light versions says: to the bit, but for powers of two."""
    if table[path][2] in ("ratio", "log"):
        np.testing.assert_allclose(told, found.numpy(), rtol=2e-7)
    else:
        assert told.tobytes() == bits(found), path


# --- Reading


def must_be(kept: Mapping[str, Any], commit_id: str) -> dict[str, Described]:
    """Return what a composite must read back as."""
    commit = kept["commits"][commit_id]
    parts = {layer: kept["versions"][layer][version] for layer, version in commit["composite"].items()}
    model = {name: value for part in parts.values() for name, value in part["model"].items()}
    return {
        "id": commit_id,
        **{name: commit[name] for name in ("step", "branch", "parent", "message", "metrics", "extras", "rng")},
        "sources": {layer: part["step"] for layer, part in parts.items()},
        "fidelity": {layer: part["fidelity"] for layer, part in parts.items()},
        "model": model | {name: model[first] for name, first in commit["aliases"].items()},
        "slots": {name: value for part in parts.values() for name, value in part["slots"].items()},
        "groups": commit["groups"],
    }


def read_back(store: ts.Store, ref: str | int) -> dict[str, Described]:
    """Read a composite whole, and describe it as :func:`must_be` does."""
    with store.checkout(ref) as checkpoint, same_generators():
        commit = checkpoint.commit
        state = checkpoint.optim_state_dict()
        optimizers: list[Any] = state if isinstance(state, list) else [state]
        checkpoint.restore_rng()
        return {
            "id": commit.id,
            "step": commit.step,
            "branch": commit.branch,
            "parent": commit.parent,
            "message": commit.message,
            "metrics": describe(dict(commit.metrics)),
            "extras": [describe(extra) for extra in checkpoint.extras],
            "rng": random_states(),
            "sources": {name: step for name, step in checkpoint.sources.items() if name != "@extra"},
            "fidelity": {name: found for name, found in checkpoint.fidelity.items() if name != "@extra"},
            "model": describe_each(checkpoint.model_state_dict()),
            "slots": {name: describe(held) for one in optimizers for name, held in one["state"].items() if held},
            "groups": describe([one["param_groups"] for one in optimizers if one["param_groups"]]),
        }


def refs_of(kept: Mapping[str, Any]) -> dict[str, str]:
    """Return every way to name every commit of a store: text → commit id."""
    found: dict[str, str] = dict(kept["tags"]) | {commit_id: commit_id for commit_id in kept["commits"]}
    for branch, log in kept["logs"].items():
        found[branch] = log[0]
        found |= {f"{branch}@{kept['commits'][commit_id]['step']}": commit_id for commit_id in log}
    return found


def assert_as_kept(store: ts.Store, kept: Mapping[str, Any]) -> None:
    """Fail unless every branch, tag and commit reads back exactly."""
    assert {branch.name: [one.id for one in store.log(branch.name)] for branch in store.branches()} == kept["logs"]
    assert {tag.name: tag.commit for tag in store.tags()} == kept["tags"]
    for commit_id in kept["commits"]:
        assert read_back(store, commit_id) == must_be(kept, commit_id), commit_id
    for ref, commit_id in refs_of(kept).items():
        assert store.show(ref).id == commit_id, ref
