"""Scrub: a part at a time, what was not verified for longest first, until everything has been read; then again."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import InvalidInputError
from tailorstore.engine.verify import Verification, pair_of
from tests.kit.damage import files_of, flip, prefix_of

Turn = list[tuple[str, str]]


def weights(step: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(step)
    return {f"{layer}.w": torch.randn(30, 20, generator=chance) for layer in ("a", "b", "c")}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Turn, list[str]]]:
    """Give what each verification was told to read: pairs of layer and version id, and commit ids."""
    told: list[tuple[Turn, list[str]]] = []
    real = Verification.read

    def spied(self: Verification, versions: object, commits: Sequence[str] = ()) -> None:
        listed = list(versions)  # type: ignore[call-overload]
        told.append(([pair_of(version) for version in listed], list(commits)))
        real(self, listed, commits)

    monkeypatch.setattr(Verification, "read", spied)
    return told


def commit_some(store: ts.Store, steps: range) -> None:
    for step in steps:
        store.commit(step, weights(step), mask=None if step % 2 else ["a"])


@pytest.mark.parametrize("part", [Fraction(1, 30), Fraction(1, 3), Fraction(1)])
def test_as_many_parts_as_make_a_whole_read_everything(
    tmp_path: Path, catalog_url: str, part: Fraction, read: list[tuple[Turn, list[str]]]
) -> None:
    with ts.open_store(tmp_path / "root", catalog=catalog_url, chunk_bytes=1024) as store:
        commit_some(store, range(1, 9))
        stats = store.stats()
        largest = max(layer.bytes_stored for commit in store.log() for layer in store.layers(commit))
        days = math.ceil(1 / part)
        reports = [store.scrub(float(part)) for _ in range(days)]
        assert all(report.ok for report in reports)
        assert max(report.bytes_read for report in reports) <= stats.bytes_stored * part + largest
        seen = Counter(pair for turn, _ in read for pair in turn)
        assert len(seen) == stats.versions
        manifests = {commit for _, commits in read for commit in commits}
        assert manifests == {commit.id for commit in store.log()}
        assert sum(report.bytes_read for report in reports) <= stats.bytes_stored + days * largest, "not twice"


def test_what_was_never_verified_comes_first_then_what_was_longest_ago(
    tmp_path: Path, read: list[tuple[Turn, list[str]]]
) -> None:
    with ts.open_store(tmp_path / "root", chunk_bytes=1024) as store:
        commit_some(store, range(1, 5))
        store.verify()
        commit_some(store, range(5, 6))
        store.verify(1)
        read.clear()
        store.scrub(1.0)
        turn = read[0][0]
        steps = [next(step for step in range(1, 6) if store.show(step).id == version) for _, version in turn]
        assert steps[:4] == [5] * 4, "never read"
        assert steps[-4:] == [1] * 4, "read by itself, last of all"
        assert sorted(steps[4:-4]) == steps[4:-4]


def test_a_scrub_finds_damage_and_goes_on_behind_it_the_next_day(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with ts.open_store(root, chunk_bytes=1024) as store:
        commit_some(store, range(1, 4))
        flip(files_of(root, prefix_of(store, "b"), "chunks")[0])
        reports = [store.scrub(0.25) for _ in range(4)]
        assert [report.ok for report in reports].count(False) == 1
        (found,) = [damage for report in reports for damage in report.damages]
        assert (found.layer, found.kind) == ("b", "flipped")


def test_only_parts_of_a_whole_are_fractions(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        store.commit(1, weights(1))
        for wrong in (0, -0.1, 1.01, math.nan, math.inf, "1/30", None, True):
            with pytest.raises(InvalidInputError, match="fraction must be"):
                store.scrub(wrong)  # type: ignore[arg-type]
        assert store.scrub(1).versions == 4


def test_an_empty_store_has_nothing_to_scrub(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "root") as store:
        assert store.scrub(0.5).versions == 0


def test_a_base_is_scrubbed_in_its_own_turn(tmp_path: Path, read: list[tuple[Turn, list[str]]]) -> None:
    """Else a base that many light versions share would be read day after day."""
    with ts.open_store(tmp_path / "root", chunk_bytes=1024, light=ts.LightSettings(exact_below=16)) as store:
        store.commit(1, weights(1))
        for step in range(2, 8):
            store.commit(step, weights(step), mask={"*": "light"})
        for _ in range(10):
            store.scrub(0.1)
        seen = Counter(pair for turn, _ in read[:10] for pair in turn)
        assert len(seen) == store.stats().versions
        assert seen["a", store.show(1).id] <= 2
