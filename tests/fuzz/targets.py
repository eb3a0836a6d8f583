"""What is fuzzed: every parser, the decoders, and whole stores. A target gives inputs, and says what must hold."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from hypothesis import strategies as st

from tailorstore.domain.errors import IntegrityError, VersionError
from tailorstore.domain.names import COMMITS_PREFIX, REFS_PREFIX, ROOT_DOCUMENT
from tailorstore.engine.tensors.packing import Packer, unpack
from tailorstore.storage import codecs
from tailorstore.storage.layers import parse_document
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.manifests import read_binding, read_manifest, read_ref_record
from tests.fuzz import stores
from tests.fuzz.mutations import damaged, mutated, resealed
from tests.fuzz.samples import Sample

OF_LAYER: Final = ("attributes", "tailorstore")
PARSERS_REFUSE: Final = (IntegrityError, VersionError)


@dataclass(frozen=True)
class Target:
    """One thing that is fuzzed."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    """Does with an input what the store would; raises what it raises."""
    refusals: tuple[type[Exception], ...] = PARSERS_REFUSE
    """The only errors that may come."""
    share: float = 1.0
    """How many inputs it is given for each one of a parser's: whole stores are slow."""


def all_targets(sample: Sample, scratch: Path) -> Mapping[str, Target]:
    """Return every target; ``scratch`` is a folder that they may fill."""
    return dict([
        *_layer_documents(sample),
        *_root_documents(sample, scratch / "documents"),
        *_frames(sample),
        ("skeleton", _skeleton()),
        *stores_of(sample, scratch),
    ])  # fmt: skip


def _layer_documents(sample: Sample) -> Iterator[tuple[str, Target]]:
    for name, light in (("layer document", False), ("light document", True)):
        described = [json.loads((sample.root / key).read_bytes()) for key in sample.group_documents(light=light)]
        for one in described:
            del one["consolidated_metadata"]
        texts = st.sampled_from(described).flatmap(lambda one: mutated(one).map(lambda new: resealed(new, OF_LAYER)))
        inside = st.sampled_from(described).flatmap(_with_mutated_attributes)
        yield (
            name,
            Target(st.one_of(inside, inside, texts), lambda raw: _touch(parse_document(memoryview(raw), "layers/a/x"))),
        )
    raw = (sample.root / sample.group_documents(light=True)[0]).read_bytes()
    yield (
        "layer document, damaged bytes",
        Target(damaged(raw), lambda raw: _touch(parse_document(memoryview(raw), "layers/a/x"))),
    )


def _with_mutated_attributes(document: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Change what is ours in a group document, and mostly what is deepest in it."""
    ours = document["attributes"]["tailorstore"]
    parts = [name for name in ("content", "arrays", "documents", "light") if ours[name]]

    def put(name: str, value: Any) -> bytes:
        return resealed({**document, "attributes": {"tailorstore": {**ours, name: value}}}, OF_LAYER)

    return st.sampled_from(parts).flatmap(lambda name: mutated(ours[name]).map(lambda value: put(name, value)))


def _touch(document: Any) -> None:
    """Look at what every reader of a parsed document would."""
    assert isinstance(document.tensors, dict)
    for record in document.arrays.values():
        assert len(record.digests) == len(record.sizes)


def _root_documents(sample: Sample, scratch: Path) -> Iterator[tuple[str, Target]]:
    objects = LocalObjects(str(scratch))
    readers: dict[str, tuple[str, Callable[[str], object]]] = {
        "manifest": (COMMITS_PREFIX, lambda name: read_manifest(objects, name)),
        "record of a ref": (REFS_PREFIX, lambda name: read_ref_record(objects, name)),
        "tailorstore.json": ("", lambda _: read_binding(objects)),
    }
    for name, (folder, read) in readers.items():
        paths = sorted((sample.root / folder).iterdir()) if folder else [sample.root / ROOT_DOCUMENT]
        place = scratch / folder / paths[-1].name
        place.parent.mkdir(parents=True, exist_ok=True)
        documents = [json.loads(path.read_text()) for path in paths]

        def check(raw: bytes, place: Path = place, read: Callable[[str], object] = read) -> None:
            place.write_bytes(raw)
            read(place.stem)

        texts = st.sampled_from(documents).flatmap(lambda one: mutated(one).map(resealed))
        yield name, Target(st.one_of(texts, texts, texts, damaged(paths[-1].read_bytes())), check)


def _frames(sample: Sample) -> Iterator[tuple[str, Target]]:
    """Compressed chunks: their own bytes damaged, and headers that claim other sizes."""
    for codec in ("lz4", "zstd", "entropy"):
        raw, _, itemsize, size = sample.chunk(codec)

        def check(frame: bytes, codec: str = codec, itemsize: int = itemsize, size: int = size) -> None:
            target = memoryview(bytearray(size))
            codecs.decode(codec, itemsize, frame, target)

        def resized(frame: bytes) -> bytes:
            """Let the header speak of the frame's own length, so that what is behind that check is reached."""
            return frame[:12] + len(frame).to_bytes(4, "little") + frame[16:] if len(frame) >= 16 else frame

        yield f"chunk in {codec}", Target(damaged(raw) | damaged(raw).map(resized), check)


def _skeleton() -> Target:
    packer = Packer()
    packed = packer.pack(
        {
            "a": [1, 2.5, None, "x", True], "t": (1, float("nan")), 3: b"bytes", ("k", 1): {"z": -1},
            "tensor": torch.arange(4), "scalar": torch.tensor(1.5), "array": np.arange(3), "number": np.float32(1),
        },
        "extra",
    )  # fmt: skip

    def load(path: str) -> torch.Tensor:
        return packer.arrays[path] if path in packer.arrays else torch.zeros(1)

    def check(value: Any) -> None:
        unpack(value, load)

    return Target(mutated(packed), check)


def stores_of(sample: Sample, scratch: Path) -> Iterator[tuple[str, Target]]:
    """Give the targets that are whole stores."""
    place = scratch / "store"

    def laid_out(attack: stores.Attack, *, catalog: bool) -> Path:
        root = sample.copy(place, catalog=catalog)
        attack.carry_out(root)
        return root

    def with_catalog(attack: stores.Attack) -> None:
        stores.visit(laid_out(attack, catalog=True), sample.states, rebuild=False)

    def without_catalog(attack: stores.Attack) -> None:
        stores.visit(laid_out(attack, catalog=False), sample.states, rebuild=True)

    def of_a_stranger(attack: stores.Attack) -> None:
        stores.visit(laid_out(attack, catalog=False), None, rebuild=True)

    yield "store with its catalog", Target(stores.damages(sample), with_catalog, stores.REFUSALS, 0.05)
    yield "store without catalog", Target(stores.damages(sample), without_catalog, stores.REFUSALS, 0.05)
    yield "store of a stranger", Target(stores.forgeries(sample), of_a_stranger, stores.REFUSALS, 0.1)


def remove(scratch: Path) -> None:
    """Delete what targets left, pipes and folders without permissions included."""
    shutil.rmtree(scratch, ignore_errors=True)
    assert not os.path.lexists(scratch)
