"""Whole stores that mean harm: any object damaged; or documents forged so that all digests fit, and then visited."""

import copy
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from hypothesis import strategies as st

import tailorstore as ts
from tailorstore.domain.errors import CorruptDocumentError, ModelMismatchError, RestoreMismatchError
from tailorstore.domain.names import COMMITS_PREFIX
from tailorstore.storage.layers import canonical_json, layer_digest, parse_document
from tests.fuzz.mutations import damaged, mutated, resealed
from tests.fuzz.samples import Net, Sample
from tests.kit.models import same_bits

REFUSALS: Final = (
    ts.IntegrityError, ts.VersionError, ts.NotFoundError, ts.ConflictError, RestoreMismatchError, ModelMismatchError,
)  # fmt: skip
"""What a visitor may be told. Not that storage or catalog cannot be reached: they can."""


@dataclass(frozen=True)
class Attack:
    """A change of one file."""

    key: str
    what: str
    """``bytes``, ``link``, ``pipe``, ``folder``, ``gone``, or ``forged``."""
    content: bytes = b""

    def carry_out(self, root: Path) -> None:
        path = root / self.key
        if self.what == "forged":
            forge(root, self.key, self.content)
            return
        path.unlink()
        match self.what:
            case "bytes":
                path.write_bytes(self.content)
            case "link":
                path.symlink_to("/etc/passwd")
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()


def damages(sample: Sample) -> st.SearchStrategy[Attack]:
    """Change any object: its bytes, or what kind of file it is."""

    def of(key: str) -> st.SearchStrategy[Attack]:
        raw = (sample.root / key).read_bytes()
        kinds = st.sampled_from(["link", "pipe", "folder", "gone"]).map(lambda kind: Attack(key, kind))
        changed = damaged(raw).map(lambda content: Attack(key, "bytes", content))
        return st.one_of(changed, changed, changed, kinds)

    return st.sampled_from(sample.all_keys()).flatmap(of)


def forgeries(sample: Sample) -> st.SearchStrategy[Attack]:
    """Change documents as somebody does who may write all of the store: checksums and digests fit."""

    def of(key: str) -> st.SearchStrategy[Attack]:
        document = json.loads((sample.root / key).read_bytes())
        if not key.startswith("layers/"):
            return mutated(document).map(lambda new: Attack(key, "bytes", resealed(new)))
        del document["consolidated_metadata"]
        ours = document["attributes"]["tailorstore"]
        parts = [name for name in ("content", "content", "arrays", "light") if ours[name]]

        def put(name: str, value: Any) -> Attack:
            changed = {**document, "attributes": {"tailorstore": {**ours, name: value}}}
            return Attack(key, "forged", resealed(changed, ("attributes", "tailorstore")))

        return st.sampled_from(parts).flatmap(lambda name: mutated(ours[name]).map(lambda value: put(name, value)))

    documents = [key for key in sample.all_keys() if key.count("/") < 3 and key.endswith(".json")]
    groups = sample.group_documents(light=False) + sample.group_documents(light=True)
    return st.one_of(*(st.sampled_from(keys).flatmap(of) for keys in (documents, groups, groups)))


def forge(root: Path, key: str, content: bytes) -> None:
    """Put a layer's document in place of another, and its digest into all manifests."""
    old = json.loads((root / key).read_bytes())["attributes"]["tailorstore"]
    (root / key).write_bytes(content)
    try:
        digest = layer_digest(parse_document(memoryview(content), key))
    except ts.TailorError:
        digest = _digest_of_text(content)
    for path in (root / COMMITS_PREFIX).iterdir():
        manifest = json.loads(path.read_bytes())
        for section in ("layers", "bases"):
            version = manifest[section].get(old["layer"])
            if version is not None and version["version"] == old["version"]:
                version["digest"] = digest
        path.write_bytes(resealed(manifest))


def _digest_of_text(content: bytes) -> str:
    try:
        canonical_json(json.loads(content))
    except (ValueError, RecursionError):
        return "xxh3-128:" + "0" * 32
    return "xxh3-128:" + "1" * 32


def visit(root: Path, states: Mapping[int, Mapping[str, Any]] | None, *, rebuild: bool) -> None:
    """Do with a store all that a reader does.

    Errors of a part do not keep the others from being tried; only those that :data:`REFUSALS` names are passed over.

    Args:
        root: of the store.
        states: step → what its weights must be, if they are given out at all; ``None`` if they may be forged.
        rebuild: make the catalog anew.
    """
    with ts.open_store(root, create=False) as store:
        if rebuild:
            store.rebuild_catalog()
        commits = store.log()
        store.tags()
        store.branches()
        store.stats()
        with suppress(CorruptDocumentError):
            store.gc(ts.KeepLast(1), grace=timedelta(0), dry_run=True)
        report = store.verify()
        for commit in commits:
            _read(store, commit, states, report.ok)


def _read(store: ts.Store, commit: ts.Commit, states: Mapping[int, Mapping[str, Any]] | None, ok: bool) -> None:
    tried = 0
    with store.checkout(commit) as checkpoint:
        for read in (_weights, _slots, _extra, _restore, _zarr):
            try:
                found = read(checkpoint)
            except REFUSALS:
                tried += 1
                continue
            if states is not None and found is not None:
                for name, expected in states[commit.step].items():
                    assert same_bits(found[name], expected), (commit.step, name)
        # Whoever verified the store is promised that it can be read.
        assert not (ok and states is not None and tried), (commit.step, tried)


def _weights(checkpoint: ts.Checkpoint) -> dict[str, Any]:
    return checkpoint.model_state_dict()


def _slots(checkpoint: ts.Checkpoint) -> None:
    checkpoint.optim_state_dict()


def _extra(checkpoint: ts.Checkpoint) -> None:
    assert checkpoint.extra is not None or checkpoint.extras is not None


def _restore(checkpoint: ts.Checkpoint) -> dict[str, Any]:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    state = copy.deepcopy((torch.get_rng_state(), optimizer.state_dict()))
    checkpoint.restore(net, optimizer, rng=True)
    torch.set_rng_state(state[0])
    return net.state_dict()


def _zarr(checkpoint: ts.Checkpoint) -> None:
    group = checkpoint.zarr()
    for _, array in group.arrays():
        array[...]
