"""Tags and branches."""

import pytest

from tailorstore.catalog import StoreCatalog
from tailorstore.domain.errors import (
    BadNameError,
    BranchExistsError,
    BranchNotFoundError,
    RefNotFoundError,
    TagExistsError,
)
from tailorstore.domain.names import new_id
from tests.catalog.kit import at, commit, steps


def test_tags_are_listed_by_name_and_removed(store: StoreCatalog) -> None:
    first, second = commit(store, 1), commit(store, 2)
    made = store.tag("b", first.id)
    store.tag("a/1.0+x", second.id)
    assert [(one.name, one.commit, one.step) for one in store.tags()] == [
        ("a/1.0+x", second.id, 2),
        ("b", first.id, 1),
    ]
    assert store.tags()[1] == made
    store.untag("b")
    assert [one.name for one in store.tags()] == ["a/1.0+x"]
    with pytest.raises(RefNotFoundError, match="no tag 'b'"):
        store.untag("b")


def test_a_tag_is_never_taken_over(store: StoreCatalog) -> None:
    first, second = commit(store, 1), commit(store, 2)
    store.tag("best", first.id)
    for again in (first, second):
        with pytest.raises(TagExistsError, match="'best'"):
            store.tag("best", again.id)
    assert at(store, "best").commit == first


def test_tags_and_branches_share_their_names(store: StoreCatalog) -> None:
    made = commit(store, 1)
    store.tag("best", made.id)
    with pytest.raises(BranchExistsError, match="'main' is a branch"):
        store.tag("main", made.id)
    for move in (False, True):
        with pytest.raises(TagExistsError, match="'best' is a tag"):
            store.branch("best", made.id, move=move)


@pytest.mark.parametrize("name", ["latest", "007", "a@b", "-x", "é", "x" * 201])
def test_names_that_refs_cannot_have_are_refused(store: StoreCatalog, name: str) -> None:
    made = commit(store, 1)
    with pytest.raises(BadNameError):
        store.tag(name, made.id)
    with pytest.raises(BadNameError):
        store.branch(name, made.id, move=False)


def test_names_need_a_commit(store: StoreCatalog) -> None:
    missing = new_id()
    with pytest.raises(RefNotFoundError, match=missing):
        store.tag("best", missing)
    with pytest.raises(RefNotFoundError, match=missing):
        store.branch("exp", missing, move=False)


def test_a_fork_shares_the_past_and_not_the_future(store: StoreCatalog) -> None:
    first, second = commit(store, 1), commit(store, 2)
    assert store.branch("exp", first.id, move=False) is not None
    (made,) = (one for one in store.branches() if one.name == "exp")
    assert (made.commit, made.step) == (first.id, 1)
    commit(store, 2, ["b"], "exp")
    commit(store, 3)
    assert steps(store) == [3, 2, 1]
    assert steps(store, "exp") == [2, 1]
    assert at(store, "exp@2").versions["a"].version_id == first.id
    assert at(store, "main@2").commit == second
    assert [(one.name, one.step) for one in store.branches()] == [("exp", 2), ("main", 3)]


def test_a_fork_of_a_fork_follows_all_its_lines(store: StoreCatalog) -> None:
    commit(store, 1)
    second = commit(store, 2)
    commit(store, 3)
    store.branch("b", second.id, move=False)
    commit(store, 3, branch="b")
    fourth = commit(store, 4, branch="b")
    commit(store, 5, branch="b")
    store.branch("c", fourth.id, move=False)
    store.branch("d", fourth.id, move=False)
    commit(store, 9, branch="c")
    assert steps(store, "c") == [9, 4, 3, 2, 1]
    assert steps(store, "d") == [4, 3, 2, 1]
    assert [one.branch for one in store.log("c")] == ["c", "b", "b", "main", "main"]
    assert [one.step for one in store.log("c", 3)] == [9, 4, 3]


def test_moving_back_leaves_commits_out_of_the_log(store: StoreCatalog) -> None:
    first, second, third = commit(store, 1), commit(store, 2), commit(store, 3)
    with pytest.raises(BranchExistsError, match="pass move=True to move it to main@1"):
        store.branch("main", first.id, move=False)
    store.branch("main", first.id, move=True)
    assert steps(store) == [1]
    again = commit(store, 2)
    assert store.log("main") == [again, first]
    assert {one.id for one in store.inventory().unreachable} == {second.id, third.id}
    store.branch("main", third.id, move=True)
    assert store.log("main") == [third, second, first]


def test_moving_to_where_it_is_changes_nothing(store: StoreCatalog) -> None:
    made = commit(store, 1)
    assert store.branch("main", made.id, move=True) is None
    commit(store, 2)
    assert steps(store) == [2, 1]


def test_a_deleted_branch_is_gone_and_its_name_free(store: StoreCatalog) -> None:
    made = commit(store, 1)
    store.branch("exp", made.id, move=False)
    commit(store, 5, branch="exp")
    store.delete_branch("exp")
    with pytest.raises(BranchNotFoundError, match="there are: main"):
        store.delete_branch("exp")
    with pytest.raises(BranchNotFoundError):
        store.log("exp")
    store.tag("exp", made.id)


def test_a_deleted_branch_can_be_begun_again(store: StoreCatalog) -> None:
    commit(store, 5)
    store.delete_branch("main")
    made = commit(store, 1)
    assert made.parent is None
    assert steps(store) == [1]
