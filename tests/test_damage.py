"""Whatever happens to an object is noticed: restore refuses it by name, verify reports it, and the rest is unharmed."""

import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tailorstore as ts
from tailorstore.domain.errors import CorruptDocumentError, DigestMismatchError, MissingObjectError
from tailorstore.domain.names import COMMITS_PREFIX, REFS_PREFIX, ROOT_DOCUMENT
from tailorstore.storage.checksums import BLANK, CHECKSUM, sealed
from tailorstore.storage.layers import parse_document
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.manifests import read_binding, read_manifest, read_ref_record
from tests.kit.models import assert_same, same_bits

LAYERS: Final = ("a", "b/c")
STEPS: Final = {"a": 2, "b/c": 1}


def weights(step: int) -> dict[str, torch.Tensor]:
    return {
        "a.w": torch.arange(300, dtype=torch.float32) * step,
        "a.v": torch.full((3,), step, dtype=torch.bfloat16),
        "b/c.w": torch.arange(7) * step,
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the root of a store whose newest composite has layers of two steps."""
    root = tmp_path_factory.mktemp("damage") / "root"
    with ts.open_store(root, chunk_bytes=1024) as store:
        for step in (1, 2):
            slots = {"a.w": {"exp_avg": weights(step)["a.w"] / 3, "step": torch.tensor(1.0)}}
            store.commit(step, weights(step), slots, mask=["a"], extra={"position": torch.arange(5)})
        store.tag("t", 1)
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """Give a copy that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "root"))


# --- Ways to damage a file


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)


def swap_digits(path: Path) -> None:
    """Damage a document so that it stays JSON: one character of its content is another one."""
    text = path.read_text()
    for old, new in (('"shape":[', '"shape":[1'), ('"shape": [', '"shape": [1'), ('"step": ', '"step": 1')):
        if old in text:
            path.write_text(text.replace(old, new, 1))
            return
    raise AssertionError(text)


DAMAGES: Final[list[Callable[[Path], None]]] = [delete, truncate, empty, extend, flip]
CHUNK_ERRORS: Final[dict[Callable[[Path], None], tuple[type[ts.IntegrityError], str]]] = {
    delete: (MissingObjectError, "missing"),
    truncate: (MissingObjectError, "short"),
    empty: (MissingObjectError, "short"),
    extend: (MissingObjectError, "long"),
    flip: (DigestMismatchError, "flipped"),
}


def objects_of(root: Path, layer: str, step: int, kind: str) -> list[str]:
    """Return the keys of the objects of a layer version: its ``group`` document, ``array`` documents or ``chunks``."""
    with ts.open_store(root, create=False) as store:
        version = next(one.version_id for one in store.layers(step) if one.name == layer)
        prefix = f"layers/{layer.replace('/', '=2F')}/{version}/"
        keys = [info.key for info in store._objects.list(prefix)]
    documents = [key for key in keys if key.endswith("/zarr.json")]
    arrays = {key.rpartition("/")[0] for key in keys if key not in documents}
    match kind:
        case "group":
            return [f"{prefix}zarr.json"]
        case "array":
            return sorted(key for key in documents if key.rpartition("/")[0] in arrays)
        case "between":
            return sorted(key for key in documents if key.rpartition("/")[0] not in {*arrays, prefix[:-1]})
        case _:
            return sorted(set(keys) - set(documents))


class Damaged:
    """A root with one damaged object, while the block lasts."""

    def __init__(self, root: Path, key: str, damage: Callable[[Path], None]) -> None:
        self._path = root / key
        self._damage = damage
        self._content = self._path.read_bytes()

    def __enter__(self) -> None:
        self._damage(self._path)

    def __exit__(self, *_: object) -> None:
        self._path.write_bytes(self._content)


def fresh(root: Path) -> ts.Store:
    """Open the store anew, so that no document is in memory."""
    return ts.open_store(root, create=False)


def read_everything(checkpoint: ts.Checkpoint) -> None:
    assert_same(checkpoint.model_state_dict(), weights(2) | {"b/c.w": weights(1)["b/c.w"]})
    state = checkpoint.optim_state_dict()
    assert isinstance(state, dict)
    assert same_bits(checkpoint.optim["a.w"]["exp_avg"].load(), weights(2)["a.w"] / 3)
    assert checkpoint.extra["position"].tolist() == [0, 1, 2, 3, 4]


def all_cases(*kinds: str) -> list[tuple[str, int, str]]:
    return [(layer, step, kind) for layer, step in (("a", 2), ("b/c", 1), ("@extra", 2)) for kind in kinds]


@pytest.mark.parametrize(("layer", "step", "kind"), all_cases("group", "chunk"))
def test_restore_refuses_damage_and_names_it(root: Path, layer: str, step: int, kind: str) -> None:
    with fresh(root) as store:
        commits = {commit.step: commit.id for commit in store.log()}
        read_everything(store.checkout())
    keys = objects_of(root, layer, 2, kind)
    assert keys
    for key in keys:
        for damage in DAMAGES:
            chunk_error, chunk_kind = CHUNK_ERRORS[damage]
            document_error = MissingObjectError if damage is delete else CorruptDocumentError
            expected = chunk_error if kind == "chunk" else document_error
            with Damaged(root, key, damage), fresh(root) as store, store.checkout() as checkpoint:
                with pytest.raises(expected) as caught:
                    read_everything(checkpoint)
                message = str(caught.value)
                assert key in message, damage
                assert repr(layer) in message, damage
                assert f"step {step}" in message, damage
                (found,) = store.verify().damages
                assert (found.layer, found.step, found.key) == (layer, step, key)
                assert found.kind == (chunk_kind if kind == "chunk" or damage is delete else "document"), damage
                holding = [commits[2]] if layer != "b/c" else [commits[1], commits[2]]
                assert sorted(found.commits) == sorted(holding)
                assert store.verify(1).ok == (commits[1] not in found.commits)
    with fresh(root) as store:
        assert store.verify().ok


@pytest.mark.parametrize(("layer", "step", "kind"), all_cases("array", "between", "group"))
def test_verify_reports_documents_that_only_other_readers_need(root: Path, layer: str, step: int, kind: str) -> None:
    keys = objects_of(root, layer, 2, kind)
    assert keys or (kind == "between" and layer != "a")
    for key in keys:
        for damage in [*DAMAGES, swap_digits] if kind == "array" else DAMAGES:
            with Damaged(root, key, damage), fresh(root) as store:
                if kind != "group":
                    read_everything(store.checkout())
                (found,) = store.verify().damages
                assert (found.layer, found.step, found.key) == (layer, step, key), damage
                assert found.kind == ("missing" if damage is delete else "document"), damage


def test_every_flipped_bit_of_a_group_document_is_found(root: Path) -> None:
    (key,) = objects_of(root, "b/c", 2, "group")
    size = (root / key).stat().st_size
    for position in range(0, size, max(1, size // 150)):

        def flip_there(path: Path, at: int = position) -> None:
            raw = bytearray(path.read_bytes())
            raw[at] ^= 1 << at % 8
            path.write_bytes(raw)

        with Damaged(root, key, flip_there), fresh(root) as store:
            (found,) = store.verify().damages
            assert (found.key, found.kind) == (key, "document")


def test_manifests_and_records_are_verified_too(root: Path) -> None:
    """They are what a lost catalog is rebuilt from."""
    with fresh(root) as store:
        commits = {commit.step: commit.id for commit in store.log()}
    for step, commit in commits.items():
        for damage in [*DAMAGES, swap_digits]:
            key = f"{COMMITS_PREFIX}{commit}.json"
            with Damaged(root, key, damage), fresh(root) as store:
                read_everything(store.checkout(2))
                (found,) = store.verify().damages
                assert (found.key, found.step, found.commits) == (key, step, (commit,)), damage


def test_other_layers_of_a_damaged_composite_still_restore(root: Path) -> None:
    for layer, other in (LAYERS, LAYERS[::-1]):
        for key in objects_of(root, layer, 2, "chunk"):
            with Damaged(root, key, delete), fresh(root) as store, store.checkout() as checkpoint:
                for name, tensor in weights(STEPS[other]).items():
                    if name.startswith(other):
                        assert same_bits(checkpoint.model[name].load(), tensor)


def test_a_damaged_root_document_is_told_from_a_missing_store(root: Path) -> None:
    for damage in (truncate, empty, flip, delete):
        with Damaged(root, ROOT_DOCUMENT, damage), fresh(root) as store:
            read_everything(store.checkout())
            refused = partial(store.commit, 3, weights(3)), store.gc, partial(store.verify, repair=True)
            for call in refused:
                with pytest.raises(ts.ConflictError, match=r"\.json .* (is gone|cannot be understood).*rebuild"):
                    call()
            store.log()
    with fresh(root) as store:
        assert store.verify().ok
    for part in (COMMITS_PREFIX, "layers"):
        shutil.rmtree(root / part)
    with Damaged(root, ROOT_DOCUMENT, flip), pytest.raises(ts.IntegrityError, match=r"tailorstore\.json"):
        fresh(root)


def test_damaged_records_of_names_are_passed_over_by_a_rebuild(root: Path) -> None:
    (record,) = (root / REFS_PREFIX).iterdir()
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    for damage in (empty, flip, delete):
        with Damaged(root, f"{REFS_PREFIX}{record.name}", damage), ts.open_store(root) as store:
            report = store.rebuild_catalog()
            unreadable = () if damage is delete else (f"{REFS_PREFIX}{record.name}",)
            assert (report.commits, report.tags, report.unreadable) == (2, (), unreadable)
            read_everything(store.checkout())
        for left in root.glob("catalog.sqlite*"):
            left.unlink()


# --- Documents that mean harm


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, -1, 10**18, 10**400])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        ["", ".", "../x", "/", "float32", "none", "full", "2020-01-01T00:00:00", "99999-13-41", "0" * 20]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


DEEP: Final = b"[..."
"""Stands for as many brackets as no parser follows; Hypothesis would print them all."""


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places_in(inner, (*path, name))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from places_in(inner, (*path, at))


@st.composite
def mutated(draw: st.DrawFn, document: dict[str, Any]) -> bytes:
    """Return a document with some values replaced or removed, or its text damaged."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        places = list(places_in(changed))
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        inside: Any = changed
        for part in way:
            inside = inside[part]
        if draw(st.booleans()):
            inside[last] = draw(json_values)
        else:
            del inside[last]
    raw = bytearray(json.dumps(changed).encode())
    match draw(st.sampled_from(["whole", "whole", "whole", "cut", "flip", "deep", "noise"])):
        case "cut":
            del raw[draw(st.integers(0, len(raw))) :]
        case "flip":
            raw[draw(st.integers(0, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
        case "deep":
            return DEEP
        case "noise":
            return draw(st.binary(max_size=40))
    return bytes(raw)


def text_of(raw: bytes) -> bytes:
    return b"[" * 100_000 if raw == DEEP else raw


def refused_or_understood(read: Callable[[], object]) -> None:
    """Fail if anything but an error of ours is raised, or if it takes long."""
    started = time.process_time()
    try:
        read()
    except ts.TailorError as error:
        assert str(error)  # noqa: PT017 - most documents are refused, some mean something all the same
    assert time.process_time() - started < 5


FUZZ = settings(
    max_examples=int(os.environ.get("TAILORSTORE_FUZZ", "100")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


def test_group_documents_that_mean_harm(original: Path) -> None:
    (key,) = objects_of(original, "a", 2, "group")
    document = json.loads((original / key).read_text())
    del document["consolidated_metadata"]

    @FUZZ
    @given(mutated(document))
    def check(raw: bytes) -> None:
        refused_or_understood(lambda: parse_document(memoryview(text_of(raw)), key))

    check()


@pytest.mark.parametrize("kind", ["manifest", "record", "binding"])
def test_documents_of_the_root_that_mean_harm(original: Path, tmp_path: Path, kind: str) -> None:
    objects = LocalObjects(str(tmp_path))
    folder, read = {
        "manifest": (COMMITS_PREFIX, lambda name: read_manifest(objects, name)),
        "record": (REFS_PREFIX, lambda name: read_ref_record(objects, name)),
        "binding": ("", lambda _: read_binding(objects)),
    }[kind]
    path = original / ROOT_DOCUMENT if kind == "binding" else next((original / folder).iterdir())
    place = tmp_path / folder / path.name
    place.parent.mkdir(exist_ok=True)

    @FUZZ
    @given(mutated(json.loads(path.read_text())))
    def check(raw: bytes) -> None:
        place.write_bytes(text_of(raw))
        refused_or_understood(lambda: read(path.stem))

    check()


# --- Light versions and their bases

BITS_KEPT: Final = ("codes", "scales", "exact", "base", "group", "base group")


def noisy(step: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    state = {"a.w": torch.randn(80, 50, generator=chance), "a.n": torch.arange(9), "b.w": torch.arange(40.0)}
    return state | {"a.w": state["a.w"] + 0.01 * step * torch.randn(80, 50, generator=chance)}


@pytest.fixture(scope="module")
def original_light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the root of a store of which the newest layer ``a`` is light, and its base's commit is gone."""
    root = tmp_path_factory.mktemp("light") / "root"
    with ts.open_store(root, chunk_bytes=1024, light=ts.LightSettings(exact_below=64)) as store:
        store.commit(1, noisy(1))
        store.commit(2, noisy(2), mask={"a": "light"})
        store.gc(ts.KeepLast(1), grace=timedelta(0))
    return root


def light_objects(root: Path, kind: str) -> list[str]:
    """Return the keys of some objects of the light version of layer ``a``, or of its base."""
    with ts.open_store(root, create=False) as store:
        document = store.checkout().documents()["a"]
        assert document.fidelity == "light"
        version = document.base_id if "base" in kind else document.version_id
        below = {"group": "", "base group": "", "base": "a.w/"}.get(kind, f"@light/{kind}/")
        prefix = f"layers/a/{version}/{below}"
        keys = [info.key for info in store._objects.list(prefix)]
    if "group" in kind:
        return [f"{prefix}zarr.json"]
    return sorted((key for key in keys if not key.endswith("zarr.json")), key=lambda key: (len(key), key))


@pytest.mark.parametrize("kind", BITS_KEPT)
def test_damage_to_a_light_version_or_its_base_is_refused_and_named(
    original_light: Path, tmp_path: Path, kind: str
) -> None:
    root = Path(shutil.copytree(original_light, tmp_path / "root"))
    with fresh(root) as store:
        (commit,) = [one.id for one in store.log()]
        expected = store.checkout().model_state_dict()
    keys = light_objects(root, kind)
    # Codes and elements of the base are in several chunks.
    assert len(keys) > (kind in ("codes", "base"))
    step = 1 if "base" in kind else 2
    for key in dict.fromkeys((keys[0], keys[-1])):
        for damage in DAMAGES:
            chunk_error, chunk_kind = CHUNK_ERRORS[damage]
            document_error = MissingObjectError if damage is delete else CorruptDocumentError
            with Damaged(root, key, damage), fresh(root) as store, store.checkout() as checkpoint:
                target = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
                for read in (checkpoint.model_state_dict, partial(checkpoint.restore, target)):
                    with pytest.raises(document_error if "group" in kind else chunk_error) as caught:
                        read()
                    message = str(caught.value)
                    assert key in message, damage
                    assert repr("a") in message, damage
                    assert f"step {step}" in message, damage
                (found,) = store.verify().damages
                assert (found.layer, found.step, found.key) == ("a", step, key)
                assert found.kind == (chunk_kind if "group" not in kind or damage is delete else "document"), damage
                assert found.commits == (commit,)
                if "group" not in kind:
                    assert same_bits(checkpoint.model["b.w"].load(), expected["b.w"])
    with fresh(root) as store:
        assert store.verify().ok
        assert_same(store.checkout().model_state_dict(), expected)


def test_rows_of_a_light_version_need_only_their_own_chunks(original_light: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(original_light, tmp_path / "root"))
    with fresh(root) as store:
        whole = store.checkout().model["a.w"].load()
    for key in (light_objects(root, "base")[0], light_objects(root, "codes")[0]):
        with Damaged(root, key, delete), fresh(root) as store, store.checkout() as checkpoint:
            lazy = checkpoint.model["a.w"]
            with pytest.raises(MissingObjectError):
                lazy[0]
            assert same_bits(lazy[-1], whole[-1])


def test_group_documents_of_light_versions_that_mean_harm(original_light: Path) -> None:
    (key,) = light_objects(original_light, "group")
    document = json.loads((original_light / key).read_text())
    del document["consolidated_metadata"]
    attributes = document["attributes"]["tailorstore"]

    @FUZZ
    @given(st.one_of(mutated(document), mutated(attributes["light"]).map(lambda raw: within(document, raw))))
    def check(raw: bytes) -> None:
        refused_or_understood(lambda: parse_document(memoryview(text_of(raw)), key))

    check()


def within(document: dict[str, Any], table: bytes) -> bytes:
    """Return a light version's document with another table, and the checksum that it then has."""
    try:
        described = json.loads(table)
    except (ValueError, RecursionError):
        return table
    changed = copy.deepcopy(document)
    changed["attributes"]["tailorstore"]["light"] = described
    changed["attributes"]["tailorstore"][CHECKSUM] = BLANK
    return sealed(json.dumps(changed).encode())
