"""Stores that something happened to: what is said of it, what still restores exactly, what comes back, what GC leaves.

What happens, ``tests/kit/damages.py`` says; what must follow, ``tests/data/damaged/*.json`` (see ``README.md`` there).
"""

import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import pytest

import tailorstore as ts
from tailorstore.domain import errors
from tests.kit import archives
from tests.kit.damages import DAMAGES, STORED, Victim
from tests.kit.fixtures import DAMAGED, STORES
from tests.kit.kept import must_be, read_back, refs_of

VERSIONS: Final = sorted(path.name.removesuffix("-history.tar.xz") for path in STORES.glob("*-history.tar.xz"))
EXPECTED: Final[dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in DAMAGED.glob("*.json")}
NOW: Final = timedelta(0)

CASES: Final = [(version, name) for version in VERSIONS for name in DAMAGES] + [
    (path.name.partition("-")[0], path.name.removesuffix(".tar.xz").partition("-")[2])
    for path in sorted(DAMAGED.glob("*.tar.xz"))
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder with the good stores, unpacked."""
    folder = tmp_path_factory.mktemp("good")
    for version in VERSIONS:
        for name in ("history", "light"):
            archives.unpack(STORES / f"{version}-{name}.tar.xz", folder / f"{version}-{name}")
    return folder


@dataclass
class Case:
    """A damaged store, with what must follow."""

    kept: Mapping[str, Any]
    expected: Mapping[str, Any]
    root: Path

    @cached_property
    def refs(self) -> dict[str, str]:
        """Return the names that the expectations use: tags, and branches with steps."""
        return {ref: commit for ref, commit in refs_of(self.kept).items() if "@" in ref or ref in self.kept["tags"]}

    @cached_property
    def commits(self) -> dict[str, str]:
        """Return all commits by one name each."""
        return {ref: self.refs[ref] for ref in ("main@1", "main@2", "main@4", "main@5", "side@3", "trial@6", "adrift")}

    def ids(self, refs: Iterator[str] | list[str]) -> set[str]:
        return {self.refs[ref] for ref in refs}

    def pattern(self, text: str) -> str:
        """Return a pattern of keys in which ``{main@1}`` stands for an id."""
        return re.sub(r"\{(.*?)\}", lambda found: self.refs[found[1]], text)

    def assert_reads(
        self, store: ts.Store, gone: list[str], lost: Mapping[str, str], *, everything: bool = True
    ) -> None:
        """Fail unless every commit reads back exactly, but for those that are gone or raise what they must.

        Or only the newest of each line: they hold versions of all steps.
        """
        for ref, commit_id in self.commits.items():
            if not everything and ref in ("main@1", "main@2", "main@4"):
                continue
            if ref in gone:
                with pytest.raises(ts.NotFoundError):
                    store.checkout(commit_id)
            elif ref in lost:
                with pytest.raises(ts.IntegrityError) as caught:
                    read_back(store, commit_id)
                assert type(caught.value).__name__ == lost[ref], ref
            else:
                assert read_back(store, commit_id) == must_be(self.kept, commit_id), ref

    @property
    def damages(self) -> list[tuple[str, str, int, frozenset[str]]]:
        return sorted(
            ((kind, layer, step, frozenset(self.ids(refs))) for kind, layer, step, refs in self.expected["verify"]),
            key=repr,
        )

    @property
    def losses(self) -> dict[str, set[str]]:
        """Return what each commit must be said to lose: layers, and ``""`` for its manifest."""
        found: dict[str, set[str]] = defaultdict(set)
        lost = self.ids(list(self.expected["lost"]))
        for _, layer, _, refs in self.expected["verify"]:
            for commit_id in self.ids(refs):
                if not layer or commit_id in lost:
                    found[commit_id].add(layer)
        return found


@pytest.fixture
def case(request: pytest.FixtureRequest, good: Path, tmp_path: Path) -> Case:
    """Give a damaged store, in a folder of its own."""
    version, name = request.param
    kept = json.loads((STORES / f"{version}-history.json").read_text())
    root = tmp_path / "root"
    if name in DAMAGES:
        shutil.copytree(good / f"{version}-history", root)
        DAMAGES[name](Victim(root, kept, good / f"{version}-light"))
    else:
        archives.unpack(DAMAGED / f"{version}-{name}.tar.xz", root)
    return Case(kept, EXPECTED[name], root)


def cases(wanted: Callable[[Any], bool]) -> pytest.MarkDecorator:
    """Run a test with every damage whose expectations are such."""
    chosen = [(version, name) for version, name in CASES if wanted(EXPECTED.get(name, {}))]
    return pytest.mark.parametrize("case", chosen, indirect=True, ids=["-".join(case) for case in chosen])


def can_be_opened(expected: Mapping[str, Any]) -> bool:
    return not str(expected["opens"]).endswith("Error")


@contextmanager
def opened(case: Case, caplog: pytest.LogCaptureFixture) -> Iterator[ts.Store]:
    """Open a damaged store as what it must open as."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tailorstore"), ts.open_store(case.root, create=False) as store:
        said = "\n".join(record.getMessage() for record in caplog.records)
        assert case.expected["opens"] == ("writable" if store.writable else "read-only"), said
        assert re.search(case.expected["says"], said), said
        assert bool(said) == (not store.writable and case.expected["says"] != ""), said
        yield store


def keys_of(root: Path) -> set[str]:
    found = {str(path.relative_to(root)) for path in archives.files_in(root)}
    return {key for key in found if not key.startswith("catalog.sqlite")}


def test_every_damage_has_its_expectations_and_every_expectation_its_damage() -> None:
    assert {name for _, name in CASES} == set(EXPECTED)
    assert set(DAMAGES) | set(STORED) == set(EXPECTED)
    assert {(version, name) for version, name in CASES if name in STORED} >= {(ts.__version__, name) for name in STORED}
    assert ts.__version__ in VERSIONS


@cases(lambda expected: not can_be_opened(expected))
def test_what_cannot_be_opened_is_refused_and_left_alone(case: Case) -> None:
    before = {path: path.read_bytes() for path in archives.files_in(case.root)}
    with pytest.raises(getattr(errors, case.expected["opens"]), match=case.expected["says"]):
        ts.open_store(case.root, create=False)
    assert {path: path.read_bytes() for path in archives.files_in(case.root)} == before


@cases(can_be_opened)
def test_damage_is_named_and_the_rest_restores_exactly_whatever_gc_does(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(case, caplog) as store:
        report = store.verify()
        found = [(one.kind, one.layer, one.step, frozenset(one.commits)) for one in report.damages]
        assert sorted(found, key=repr) == case.damages
        assert {one.commit: {*one.layers, *([""] if one.manifest else [])} for one in report.losses} == case.losses
        assert len(report.unknown) == case.expected["unknown"]
        assert list(report.unrecorded) == case.expected.get("unrecorded", [])
        assert report.ok == (not case.expected["verify"])
        assert_gc_takes_leftovers_and_nothing_else(case, store)
        case.assert_reads(store, case.expected["gone"], case.expected["lost"])


def assert_gc_takes_leftovers_and_nothing_else(case: Case, store: ts.Store) -> None:
    before, expected = keys_of(case.root), case.expected["gc"]
    if isinstance(expected, str):
        with pytest.raises(getattr(errors, expected), match="rebuild"):
            store.gc(grace=NOW)
        assert keys_of(case.root) == before
        return
    dry = store.gc(grace=NOW, dry_run=True)
    report = store.gc(grace=NOW)
    assert (dry.leftovers_swept, dry.versions_swept) == (report.leftovers_swept, report.versions_swept)
    assert report.deletes_failed == 0
    patterns = {case.pattern(text): 0 for text in expected}
    for key in before - keys_of(case.root):
        taking = [pattern for pattern in patterns if fnmatchcase(key, pattern)]
        assert taking, f"{key} should not have been deleted"
        for pattern in taking:
            patterns[pattern] += 1
    assert all(patterns.values()), patterns


@cases(lambda expected: expected["opens"] == "writable" and bool(expected["verify"]))
def test_repair_mends_what_it_can_and_marks_the_rest(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    with opened(case, caplog) as store:
        report = store.verify(repair=True)
        assert sum(one.mended for one in report.damages) == case.expected["repair"]["mended"]
        marked = {(one.layer, one.step, one.version_id) for one in report.damages if not one.mended}
        assert sorted(f"{layer} {step}" for layer, step, _ in marked) == case.expected["repair"]["quarantined"]
        assert len(report.quarantined) == len(marked)
        assert list(report.recorded) == case.expected.get("unrecorded", [])
        again = store.verify()
        assert again.unrecorded == ()
        assert len(again.damages) == len(report.damages) - case.expected["repair"]["mended"]
        with store.checkout("main") as checkpoint:
            assert set(checkpoint.quarantined) == {
                layer for commit, layers in case.losses.items() if commit == case.refs["main@5"] for layer in layers
            } - {""}
        store.gc(grace=NOW)
        case.assert_reads(store, case.expected["gone"], case.expected["lost"], everything=False)


@cases(lambda expected: "error" not in expected["rebuild"])
def test_rebuild_brings_back_what_the_root_has(case: Case) -> None:
    expected = case.expected["rebuild"]
    more = expected.get("more", 0)
    # A catalog that knows more than the root would put it there first.
    for left in case.root.glob("catalog.sqlite*"):
        left.unlink()
    with ts.open_store(case.root, create=False) as store:
        report = store.rebuild_catalog()
        assert report.written == ()
        gone = expected["gone"]
        assert report.commits == len(case.commits) - len(gone) + more
        wanted = [case.pattern(text) for text in expected["unreadable"]]
        assert len(report.unreadable) == len(wanted)
        assert all(any(fnmatchcase(key, pattern) for key in report.unreadable) for pattern in wanted)
        assert {one.id: list(one.layers) for one in report.incomplete} == {
            case.refs[ref]: layers for ref, layers in expected["incomplete"].items()
        }
        assert len(report.unplaced) == expected["unplaced"]
        if report.unreadable:
            with pytest.raises(errors.CorruptDocumentError, match="Nothing was deleted"):
                store.gc(grace=NOW)
            assert {one.key for one in store.verify().damages} >= set(report.unreadable)
            for key in report.unreadable:
                (case.root / key).unlink()
        store.gc(grace=NOW)
        for branch, log in case.kept["logs"].items():
            found = [one.id for one in store.log(branch)]
            rolled_forward = more if branch == "main" else 0
            assert found[rolled_forward:] == [one for one in log if one not in case.ids(gone)]
        tags = {name: one for name, one in case.kept["tags"].items() if name not in expected["lost_refs"]}
        assert {tag.name: tag.commit for tag in store.tags()} == tags
        case.assert_reads(store, gone, case.expected["lost"], everything=bool(gone or expected["incomplete"]))
    with ts.open_store(case.root, create=False) as store:
        assert store.writable


@cases(
    lambda expected: (
        expected["opens"] == "writable"
        and any(expected["rebuild"][what] for what in ("gone", "lost_refs", "unreadable"))
    )
)
def test_a_rebuild_by_the_catalog_that_owns_the_root_loses_nothing_that_it_knows(case: Case) -> None:
    with ts.open_store(case.root, create=False) as store:
        before = store._catalog.whole_history()
        report = store.rebuild_catalog()
        assert report.unreadable == ()
        assert report.commits == len(before.commits)
        after = store._catalog.whole_history()
        assert [one.commit for one in after.commits] == [one.commit for one in before.commits]
        assert (after.branches, after.tags) == (before.branches, before.tags)
        case.assert_reads(store, case.expected["gone"], case.expected["lost"], everything=False)
