"""A manifest gives back the whole commit, and one that contradicts itself is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tailorstore.domain.errors import CorruptDocumentError, InvalidInputError
from tailorstore.domain.lines import LineRun
from tailorstore.domain.names import manifest_key, new_id
from tailorstore.domain.records import (
    EXTRA_LAYER,
    MEASURES,
    Binding,
    Commit,
    CommitManifest,
    LayerMeasures,
    LayerVersion,
)
from tailorstore.storage.checksums import BLANK, CHECKSUM, sealed
from tailorstore.storage.layers import parse_document
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.manifests import read_manifest, write_manifest
from tailorstore.storage.objects import Objects

BASE, OLDER, MINE = (f"{character}" * 20 for character in "abc")
UNKNOWN = LayerMeasures(None, None, None, None, None, finite=False)


def version(
    layer: str, version_id: str, step: int, base: str | None = None, error: float | None = None
) -> LayerVersion:
    fidelity: Any = "full" if base is None else "light"
    return LayerVersion(layer, version_id, step, f"xxh3-128:{step:032x}", 40, 20, 3, fidelity, base, error)


def manifest(measures: dict[str, LayerMeasures] | None = None) -> CommitManifest:
    """Return a commit of one light version of its own and one that its parent had, a full one and ``@extra``."""
    commit = Commit(MINE, 7, "main", OLDER, datetime.now(UTC), None, {"loss": 0.5}, ("a",), 40, 160)
    versions = {
        EXTRA_LAYER: version(EXTRA_LAYER, MINE, 7),
        "a": version("a", MINE, 7, BASE, 1 / 3),
        "b": version("b", OLDER, 5, BASE, None),
        "c": version("c", OLDER, 5),
    }
    bases = {"a": version("a", BASE, 1), "b": version("b", BASE, 1)}
    lines = (LineRun(MINE), LineRun(OLDER, 6), LineRun(BASE, 2))
    return CommitManifest(Binding("store", "catalog", 1), commit, versions, bases, measures or {}, lines)


@pytest.fixture
def local(tmp_path: Path) -> LocalObjects:
    return LocalObjects(str(tmp_path))


def test_bases_and_measures_come_back(objects: Objects) -> None:
    given = manifest({"a": LayerMeasures(1 / 3, 5e-324, 1.7976931348623157e308, None, 0.0), "late": UNKNOWN})
    key = write_manifest(objects, given)
    assert key == manifest_key(MINE)
    assert read_manifest(objects, MINE) == given


def test_without_light_versions_there_are_no_bases(local: LocalObjects) -> None:
    plain = replace(manifest(), versions={"c": version("c", OLDER, 5)}, bases={})
    write_manifest(local, plain)
    assert read_manifest(local, MINE) == plain


figures = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(measures=st.dictionaries(st.text(max_size=5), st.builds(LayerMeasures, *[figures] * 5, st.booleans())))
def test_every_figure_comes_back_to_the_bit(local: LocalObjects, measures: dict[str, LayerMeasures]) -> None:
    commit_id = new_id()
    given = manifest(measures)
    write_manifest(local, replace(given, commit=replace(given.commit, id=commit_id)))
    found = read_manifest(local, commit_id).measures
    assert repr(dict(sorted(found.items()))) == repr(dict(sorted(measures.items())))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_written_as_unknown(local: LocalObjects, number: float) -> None:
    given = manifest({"a": LayerMeasures(number, number, 2.0, number, number, finite=False)})
    light = replace(given.versions["a"], error=number)
    write_manifest(local, replace(given, versions={**given.versions, "a": light}))
    found = read_manifest(local, MINE)
    assert found.measures == {"a": LayerMeasures(None, None, 2.0, None, None, finite=False)}
    assert found.versions["a"].error is None


Change = Callable[[dict[str, Any]], object]
CHANGES: dict[str, Change] = {
    "no lines at all": lambda it: it.pop("lines"),
    "lines that are none": lambda it: it.update(lines=[]),
    "a line of its own that ends": lambda it: it["lines"][0].update(until=7),
    "an older line that does not end": lambda it: it["lines"][1].update(until=None),
    "a line that is no id": lambda it: it["lines"][1].update(line="main"),
    "a line that comes twice": lambda it: it["lines"][2].update(line=MINE),
    "a line that ends after one that forked off it": lambda it: it["lines"][2].update(until=7),
    "a line that ends at a truth": lambda it: it["lines"][1].update(until=True),
    "no bases at all": lambda it: it.pop("bases"),
    "a light version without a base": lambda it: it["bases"].pop("a"),
    "a base that is light": lambda it: it["bases"]["a"].update(fidelity="light", base=OLDER),
    "a light base without a base": lambda it: it["bases"]["a"].update(fidelity="light"),
    "a full base with a base": lambda it: it["bases"]["a"].update(base=OLDER),
    "another version than the one named": lambda it: it["bases"]["a"].update(version=OLDER),
    "a base of a full version": lambda it: it["bases"].update(c=it["bases"]["a"]),
    "a base of no layer": lambda it: it["bases"].update(z=it["bases"]["a"]),
    "a light version that names no base": lambda it: it["layers"]["a"].update(base=None),
    "a full version that names a base": lambda it: it["layers"]["c"].update(base=BASE),
    "an error that is text": lambda it: it["layers"]["a"].update(error="0.1"),
    "an error that is a truth": lambda it: it["layers"]["a"].update(error=True),
    "bases that are a list": lambda it: it.update(bases=[]),
    "no measures at all": lambda it: it.pop("measures"),
    "measures that are a list": lambda it: it.update(measures=[]),
    "measures without a figure": lambda it: it["measures"]["a"].pop("curvature"),
    "a figure that is text": lambda it: it["measures"]["a"].update(drift="1.0"),
    "a figure that is a truth": lambda it: it["measures"]["a"].update(drift=True),
    "measures without a word on finiteness": lambda it: it["measures"]["a"].pop("finite"),
    "finiteness that is a number": lambda it: it["measures"]["a"].update(finite=1),
    "metrics beyond any number": lambda it: it["commit"]["metrics"].update(loss=10**400),
}


def rewrite(root: Path, change: Change) -> None:
    """Change a manifest and make its checksum right, as somebody would who means it."""
    path = root / manifest_key(MINE)
    described = json.loads(path.read_text())
    del described[CHECKSUM]
    change(described)
    path.write_bytes(sealed(json.dumps({CHECKSUM: BLANK, **described}).encode()))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_manifest_that_contradicts_itself_is_refused(local: LocalObjects, tmp_path: Path, change: Change) -> None:
    given = manifest({"a": UNKNOWN})
    write_manifest(local, given)
    rewrite(tmp_path, lambda _: None)
    assert read_manifest(local, MINE) == given
    rewrite(tmp_path, change)
    with pytest.raises(CorruptDocumentError, match=MINE):
        read_manifest(local, MINE)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "it is not JSON"),
        (b"[1]", "it is not a JSON object"),
        (b"{}", "it lacks 'format'"),
        (b'{"format": 1}', "its checksum differs"),
        (b'{"format": 1, "format": 1}', "it names a key twice"),
        (b'{"format": NaN}', "it holds NaN, which is not JSON"),
        (b'{"format": "\xff"}', "it holds bytes that are no text"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "it nests deeper than any"),
        (b'{"a":' * 100_000, "it nests deeper than any"),
        (b'{"format": -1}', "it holds a value that no such document has"),
    ],
)
def test_what_is_wrong_with_a_document_is_said_in_words(
    local: LocalObjects, tmp_path: Path, raw: bytes, why: str
) -> None:
    path = tmp_path / manifest_key(MINE)
    path.parent.mkdir()
    path.write_bytes(raw)
    with pytest.raises(CorruptDocumentError, match=f"cannot be understood: {why}$"):
        read_manifest(local, MINE)
    with pytest.raises(
        CorruptDocumentError, match=f"is not a layer version's document: ({why}|it lacks 'attributes');"
    ):
        parse_document(memoryview(raw), "key")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize("figure", [*MEASURES, "error"])
def test_numbers_that_are_not_finite_are_refused_in_a_manifest(
    local: LocalObjects, tmp_path: Path, figure: str, number: str
) -> None:
    write_manifest(local, manifest({"a": UNKNOWN}))
    path = tmp_path / manifest_key(MINE)
    described = json.loads(path.read_text())
    place = described["layers"] if figure == "error" else described["measures"]
    place["a"][figure] = "HERE"
    described[CHECKSUM] = BLANK
    path.write_bytes(sealed(json.dumps(described).replace('"HERE"', number).encode()))
    with pytest.raises(CorruptDocumentError):
        read_manifest(local, MINE)


@pytest.mark.parametrize(
    "bases",
    [
        {},
        {"a": version("a", BASE, 1)},
        {"a": version("a", OLDER, 1), "b": version("b", BASE, 1)},
        {"a": version("b", BASE, 1), "b": version("b", BASE, 1)},
        {"a": version("a", BASE, 1, OLDER), "b": version("b", BASE, 1)},
        {"a": version("a", BASE, 1), "b": version("b", BASE, 1), "c": version("c", BASE, 1)},
    ],
)
def test_what_nobody_could_read_is_not_written(
    local: LocalObjects, tmp_path: Path, bases: dict[str, LayerVersion]
) -> None:
    with pytest.raises(InvalidInputError, match=f"commit {MINE}, step 7 on 'main'.* layer '[abc]'"):
        write_manifest(local, replace(manifest(), bases=bases))
    assert list(tmp_path.rglob("*.json")) == []
