"""The catalog has a word on every commit id that it ever knew, until nothing of it is left."""

from datetime import timedelta

import pytest

from tailorstore.catalog import Catalog, StoreCatalog
from tailorstore.domain.errors import HeadMovedError, LeaseExpiredError
from tailorstore.domain.lines import Tip
from tailorstore.domain.names import new_id
from tailorstore.domain.records import Binding
from tests.catalog.kit import LAPSED, LEASE, announce, commit, publish
from tests.catalog.test_takeover import manifests_of

NOW = timedelta(0)


def test_every_way_to_lose_standing_leaves_a_word(store: StoreCatalog) -> None:
    first = commit(store, 1)
    second = commit(store, 2)
    lapsed, given_up, slow, waiting = (announce(store, 3, lease=each) for each in (LAPSED, LEASE, LEASE, LEASE))
    store.void_lapsed()
    store.abandon(given_up.id)
    third = commit(store, 3)
    with pytest.raises(HeadMovedError):
        publish(store, slow)
    store.abandon(slow.id)
    store.expire([first.id])
    stranger = new_id()
    everyone = [stranger, *(one.id for one in (first, second, third, lapsed, given_up, slow, waiting))]
    assert store.standings(everyone) == {
        first.id: "expired",
        second.id: "published",
        third.id: "published",
        lapsed.id: "voided",
        given_up.id: "abandoned",
        slow.id: "abandoned",
        waiting.id: "announced",
    }
    assert store.unknown_commits(everyone) == {stranger, first.id, lapsed.id, given_up.id, slow.id}
    with pytest.raises(LeaseExpiredError):
        publish(store, lapsed)
    store.abandon(lapsed.id)
    # The first reason stays.
    assert store.standings([lapsed.id]) == {lapsed.id: "voided"}


def test_what_is_announced_again_stands_again(store: StoreCatalog) -> None:
    draft = announce(store, 1)
    store.abandon(draft.id)
    store.announce(draft.id, "main", 1, LEASE)
    assert store.standings([draft.id]) == {draft.id: "announced"}
    publish(store, draft)
    # A writer that does not know whether it was published gives it up.
    store.abandon(draft.id)
    assert store.standings([draft.id]) == {draft.id: "published"}


def test_a_preview_shows_lapsed_claims_as_voided(store: StoreCatalog) -> None:
    lapsed, held = announce(store, 1, lease=LAPSED), announce(store, 1)
    ids = [lapsed.id, held.id]
    assert store.standings(ids) == dict.fromkeys(ids, "announced")
    assert store.standings(ids, as_if_voided=True) == {lapsed.id: "voided", held.id: "announced"}


def test_words_are_forgotten_once_nothing_is_left_and_the_grace_period_is_over(store: StoreCatalog) -> None:
    drafts = [announce(store, 1) for _ in range(3)]
    for draft in drafts:
        store.abandon(draft.id)
    present = {drafts[0].id}
    assert store.forget_withdrawn(present, timedelta(hours=1)) == 0
    assert store.forget_withdrawn(present, NOW) == 2
    assert store.standings([draft.id for draft in drafts]) == {drafts[0].id: "abandoned"}
    assert store.forget_withdrawn(set(), NOW) == 1


def test_many_ids_are_asked_in_batches(store: StoreCatalog) -> None:
    made = [commit(store, step).id for step in range(3)]
    lost = [announce(store, 9, lease=LAPSED).id for _ in range(40)]
    assert store.void_lapsed() == 40
    strangers = [new_id() for _ in range(1200)]
    known = store.standings([*strangers, *made, *lost])
    assert known == {**dict.fromkeys(made, "published"), **dict.fromkeys(lost, "voided")}


def test_a_take_over_forgets_old_words_and_has_its_own(catalog: Catalog, store: StoreCatalog) -> None:
    first = commit(store, 1)
    waiting, given_up = announce(store, 2), announce(store, 2)
    store.abandon(given_up.id)
    unplaced, unreadable = new_id(), new_id()
    again = catalog.take_over(
        Binding("store-1", catalog.catalog_id, 2),
        "r",
        manifests_of(store),
        {"main": Tip(first.id, first.id)},
        {},
        withdrawn={unplaced: "unplaced", unreadable: "unreadable"},
    )
    asked = [first.id, waiting.id, given_up.id, unplaced, unreadable]
    assert again.standings(asked) == {first.id: "published", unplaced: "unplaced", unreadable: "unreadable"}
    assert (again.unplaced_within(timedelta(hours=1)), again.unplaced_within(NOW)) == ({unplaced}, set())


def test_other_stores_have_words_of_their_own(catalog: Catalog, store: StoreCatalog) -> None:
    other = catalog.register("store-2", "file:///other", 1)
    mine = commit(store, 1)
    given_up = announce(other, 1)
    other.abandon(given_up.id)
    assert store.standings([mine.id, given_up.id]) == {mine.id: "published"}
    assert store.forget_withdrawn(set(), NOW) == 0
    assert other.standings([mine.id, given_up.id]) == {given_up.id: "abandoned"}
    assert (store.newest(), other.newest()) == (mine.created_at, None)


def test_the_newest_head_is_that_of_any_branch(store: StoreCatalog) -> None:
    first = commit(store, 1)
    store.branch("side", first.id, move=False)
    newest = commit(store, 5, branch="side")
    assert store.newest() == newest.created_at
    store.delete_branch("side")
    assert store.newest() == first.created_at
