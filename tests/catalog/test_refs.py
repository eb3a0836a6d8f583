"""Every form of ref, and what each says when it means nothing or too much."""

from datetime import timedelta

import pytest

from tailorstore.catalog import StoreCatalog
from tailorstore.domain.errors import AmbiguousRefError, BranchNotFoundError, RefNotFoundError
from tailorstore.domain.names import parse_ref
from tailorstore.domain.records import Commit, CommitDraft
from tests.catalog.kit import LAPSED, LEASE, at, commit, publish


@pytest.fixture
def history(store: StoreCatalog) -> dict[str, Commit]:
    """Give main at 10, 20, 30 and exp, forked at 10, at 15, 25."""
    made = {f"main@{step}": commit(store, step) for step in (10, 20, 30)}
    store.branch("exp", made["main@10"].id, move=False)
    made |= {f"exp@{step}": commit(store, step, branch="exp") for step in (15, 25)}
    store.tag("best", made["main@20"].id)
    return made


def test_refs_find_what_they_mean(store: StoreCatalog, history: dict[str, Commit]) -> None:
    meanings = {
        "latest": "main@30",
        "10": "main@10",
        "20": "main@20",
        "25": "exp@25",
        "main": "main@30",
        "exp": "exp@25",
        "main@20": "main@20",
        "exp@15": "exp@15",
        "exp@10": "main@10",
        "best": "main@20",
        history["exp@15"].id: "exp@15",
        history["exp@15"].id[:14]: "exp@15",
    }
    for text, meant in meanings.items():
        assert at(store, text).commit == history[meant], text
        assert store.resolve_commit(parse_ref(text), "main") == history[meant]


def test_latest_and_steps_are_about_the_branch_that_is_given(store: StoreCatalog, history: dict[str, Commit]) -> None:
    assert at(store, "latest", "exp").commit == history["exp@25"]
    assert at(store, "10", "exp").commit == history["main@10"]
    assert at(store, "20", "exp").commit == history["main@20"]


def test_a_step_on_the_branch_counts_more_than_the_same_elsewhere(
    store: StoreCatalog, history: dict[str, Commit]
) -> None:
    theirs = commit(store, 40, branch="exp")
    ours = commit(store, 40)
    assert at(store, 40).commit == ours
    assert at(store, 40, "exp").commit == theirs
    assert history


def test_a_step_that_several_other_branches_have_is_ambiguous(store: StoreCatalog, history: dict[str, Commit]) -> None:
    for name in ("one", "two"):
        store.branch(name, history["main@10"].id, move=False)
        commit(store, 12, branch=name)
    with pytest.raises(AmbiguousRefError, match=r"step 12 .*: (one@12, two@12|two@12, one@12)"):
        at(store, 12)
    assert at(store, "one@12").commit.branch == "one"


def test_an_ambiguous_step_on_abandoned_lines_is_listed_by_ids(store: StoreCatalog, history: dict[str, Commit]) -> None:
    lost = []
    for _ in range(2):
        store.branch("exp", history["main@10"].id, move=True)
        lost.append(commit(store, 12, branch="exp"))
    store.branch("exp", history["main@10"].id, move=True)
    with pytest.raises(AmbiguousRefError) as refused:
        at(store, 12)
    for one in lost:
        assert f"{one.id} (was exp@12)" in str(refused.value)
        assert at(store, one.id).commit == one


def test_a_step_of_a_single_abandoned_commit_is_found(store: StoreCatalog, history: dict[str, Commit]) -> None:
    store.branch("main", history["main@10"].id, move=True)
    assert at(store, 30).commit == history["main@30"]
    with pytest.raises(RefNotFoundError):
        at(store, "main@30")


def test_a_missing_step_names_its_neighbours(store: StoreCatalog, history: dict[str, Commit]) -> None:
    with pytest.raises(
        RefNotFoundError, match="step 22 on branch 'main'; the nearest there: 20 before it and 30 after it"
    ):
        at(store, "22")
    with pytest.raises(RefNotFoundError, match=r"nearest there: 10 after it$"):
        at(store, "exp@3")
    with pytest.raises(RefNotFoundError, match=r"nearest there: 10 before it and 15 after it$"):
        at(store, "exp@12")
    with pytest.raises(RefNotFoundError, match=r"nearest there: 25 before it$"):
        at(store, "exp@20000000")
    assert history


@pytest.mark.parametrize("ref", [str(2**63), "main@" + "9" * 40])
def test_steps_beyond_64_bits_are_not_found(store: StoreCatalog, history: dict[str, Commit], ref: str) -> None:
    with pytest.raises(RefNotFoundError, match="nearest there: 30 before it"):
        at(store, ref)
    assert history


def test_a_step_is_never_taken_for_the_beginning_of_an_id(store: StoreCatalog) -> None:
    commit(store, 1)
    commit_id = "1234" + "a" * 16
    head = store.announce(commit_id, "main", 2, LEASE)
    assert head is not None
    publish(store, CommitDraft(commit_id, 2, "main", head.id, None, {}, 1))
    assert at(store, "1234a").commit.id == commit_id
    with pytest.raises(RefNotFoundError, match="step 1234"):
        at(store, "1234")


def test_the_beginning_of_two_ids_is_ambiguous(store: StoreCatalog) -> None:
    ids = ["abcd" + "1" * 16, "abcd" + "2" * 16]
    for step, commit_id in enumerate(ids):
        head = store.announce(commit_id, "main", step, LEASE)
        publish(store, CommitDraft(commit_id, step, "main", head.id if head else None, None, {}, 1))
    with pytest.raises(AmbiguousRefError) as refused:
        at(store, "abcd")
    assert f"{ids[0]} (main@0), {ids[1]} (main@1)" in str(refused.value)
    assert at(store, "abcd2").commit.step == 1
    with pytest.raises(RefNotFoundError):
        at(store, "abc")


def test_an_unknown_name_gets_the_nearest(store: StoreCatalog, history: dict[str, Commit]) -> None:
    with pytest.raises(RefNotFoundError, match="no tag, branch or commit 'bst'; nearest: best"):
        at(store, "bst")
    with pytest.raises(RefNotFoundError, match="tags and branches: best, exp, main"):
        at(store, "zzz")
    assert history


def test_an_unknown_branch_gets_the_known_ones(store: StoreCatalog, history: dict[str, Commit]) -> None:
    with pytest.raises(BranchNotFoundError, match="no branch 'nope'; there are: exp, main"):
        at(store, "nope@10")
    with pytest.raises(BranchNotFoundError, match="no branch 'nope'"):
        at(store, "latest", "nope")
    with pytest.raises(RefNotFoundError, match="no commit at step 11; no branch 'nope'"):
        at(store, "11", "nope")
    assert at(store, "10", "nope").commit == history["main@10"]


@pytest.mark.parametrize("ref", ["latest", "main@1"])
def test_an_empty_store_says_so(store: StoreCatalog, ref: str) -> None:
    with pytest.raises(BranchNotFoundError, match="nothing was committed to this store yet"):
        at(store, ref)


def test_an_empty_store_has_no_steps_and_names(store: StoreCatalog) -> None:
    with pytest.raises(RefNotFoundError):
        at(store, "1")
    with pytest.raises(RefNotFoundError, match="none yet"):
        at(store, "best")


def test_a_lease_is_taken_renewed_and_released(store: StoreCatalog, history: dict[str, Commit]) -> None:
    composite, lease_id = store.resolve(parse_ref("main@10"), "main", LEASE)
    assert lease_id is not None
    assert store.inventory().leased == {history["main@10"].id}
    assert store.renew([lease_id], LEASE) == [lease_id]
    assert store.expire([composite.commit.id]).commits == ()
    store.release([lease_id])
    store.release([lease_id])
    assert store.renew([lease_id], LEASE) == []
    assert [one.id for one in store.expire([composite.commit.id]).commits] == [composite.commit.id]


def test_a_lapsed_lease_protects_nothing(store: StoreCatalog, history: dict[str, Commit]) -> None:
    composite, lease_id = store.resolve(parse_ref(10), "main", LAPSED)
    assert lease_id is not None
    assert store.stats().leases == 0
    assert len(store.expire([composite.commit.id]).commits) == 1
    assert store.renew([lease_id], timedelta(minutes=1)) == []
    assert history
