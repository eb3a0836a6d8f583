"""Announce, renew, publish, abandon: the way of a commit, and everybody who may stand in it."""

import math
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, timedelta
from multiprocessing.synchronize import Barrier

import pytest

from tailorstore.catalog import Catalog, StoreCatalog
from tailorstore.domain.errors import (
    BadNameError,
    HeadMovedError,
    InvalidInputError,
    LeaseExpiredError,
    RootTakenError,
    StepOrderError,
    TagExistsError,
)
from tailorstore.domain.names import layer_component, new_id
from tailorstore.domain.records import EXTRA_LAYER, Binding, Commit
from tests.catalog.kit import LAPSED, LEASE, announce, at, commit, commit_light, publish, steps, version

HOSTILE_NAMES = (
    "../../etc/passwd",
    "a/b",
    "",
    " ",
    "ünïcödé ☃ 層 🧵",
    "x" * 300,
    "nul\x00nul",
    "lone \ud800 surrogate",
    "\x1a0041",
    "Robert'); DROP TABLE commits;--",
    "%s %(name)s :name ?",
    "A",
    "a",
)


def test_the_first_commit_has_no_parent_and_makes_its_branch(store: StoreCatalog) -> None:
    draft = announce(store, 0)
    assert draft.parent is None
    assert store.head("main") is None
    made = publish(store, draft)
    assert store.head("main") == made
    assert store.log("main") == [made]
    assert made.created_at.tzinfo is UTC
    assert made.layers_written == ("a", "b")
    assert made.bytes_written == 30


def test_a_later_commit_overlays_its_parents_map(store: StoreCatalog) -> None:
    first = commit(store, 1, ["a", "b"])
    second = commit(store, 2, ["b", "c"])
    composite = at(store, 2)
    assert composite.sources == {EXTRA_LAYER: 2, "a": 1, "b": 2, "c": 2}
    assert {name: one.version_id for name, one in composite.versions.items()} == {
        EXTRA_LAYER: second.id,
        "a": first.id,
        "b": second.id,
        "c": second.id,
    }
    assert at(store, 1).sources == {EXTRA_LAYER: 1, "a": 1, "b": 1}


def test_what_was_published_is_what_is_read(store: StoreCatalog) -> None:
    draft = announce(store, 7)
    metrics = {"nan": math.nan, "up": math.inf, "down": -math.inf, "tiny": 5e-324, "third": 1 / 3, "zero": -0.0}
    draft = replace(draft, message="with\x00nul, \ud800 and 'quotes' %s", metrics=metrics)
    written = [version("a", draft.id, 7), version(EXTRA_LAYER, draft.id, 7)]
    made = store.publish(draft, written)
    read = store.log("main")[0]
    assert math.isnan(read.metrics["nan"])
    assert {key: repr(value) for key, value in read.metrics.items()} == {
        key: repr(value) for key, value in metrics.items()
    }
    assert replace(read, metrics={}) == replace(made, metrics={})
    assert read.message == draft.message
    assert list(at(store, 7).versions.values()) == sorted(written, key=lambda one: one.layer)


def test_names_of_layers_are_kept_exactly_and_apart(store: StoreCatalog) -> None:
    made = commit(store, 1, HOSTILE_NAMES)
    assert set(at(store, 1).versions) == {EXTRA_LAYER, *HOSTILE_NAMES}
    assert made.layers_written == tuple(sorted(HOSTILE_NAMES))
    assert store.log("main")[0].layers_written == made.layers_written
    components = {(layer_component(name), made.id) for name in HOSTILE_NAMES}
    assert store.unknown_versions(components) == set()


@pytest.mark.parametrize("step", [5, 4, 0])
def test_a_step_that_is_not_after_the_head_is_refused(store: StoreCatalog, step: int) -> None:
    commit(store, 3)
    commit(store, 5)
    with pytest.raises(StepOrderError, match=f"step {step} is not after step 5, the head of branch 'main'"):
        announce(store, step)
    assert steps(store) == [5, 3]


def test_the_refusal_names_two_ways_on_that_work(store: StoreCatalog) -> None:
    commit(store, 3)
    commit(store, 5)
    with pytest.raises(StepOrderError) as refused:
        announce(store, 4)
    assert 'store.branch("NEW", "main@3")' in str(refused.value)
    assert 'store.branch("main", "main@3", move=True)' in str(refused.value)
    store.branch("NEW", at(store, "main@3").commit.id, move=False)
    commit(store, 4, branch="NEW")
    store.branch("main", at(store, "main@3").commit.id, move=True)
    commit(store, 4)
    assert steps(store) == steps(store, "NEW") == [4, 3]


def test_the_refusal_before_the_first_step_offers_a_new_branch(store: StoreCatalog) -> None:
    commit(store, 3)
    with pytest.raises(StepOrderError, match='branch="NEW"'):
        announce(store, 3)


@pytest.mark.parametrize("step", [-1, 2**63])
def test_steps_that_no_database_can_hold_are_refused(store: StoreCatalog, step: int) -> None:
    with pytest.raises(InvalidInputError, match=str(step)):
        announce(store, step)


def test_the_greatest_step_fits(store: StoreCatalog) -> None:
    commit(store, 2**63 - 1)
    assert at(store, 2**63 - 1).commit.step == 2**63 - 1


@pytest.mark.parametrize("name", ["latest", "12", "a@1", "", "a b"])
def test_a_branch_needs_a_name_that_refs_can_have(store: StoreCatalog, name: str) -> None:
    with pytest.raises(BadNameError):
        announce(store, 1, name)


def test_a_new_branch_cannot_take_the_name_of_a_tag(store: StoreCatalog) -> None:
    made = commit(store, 1)
    draft = announce(store, 1, "late")
    store.tag("best", made.id)
    store.tag("late", made.id)
    with pytest.raises(TagExistsError, match="'best' is a tag"):
        announce(store, 2, "best")
    with pytest.raises(TagExistsError, match="'late' became a tag"):
        publish(store, draft)


def test_publishing_twice_returns_the_same_commit(store: StoreCatalog) -> None:
    draft = announce(store, 1)
    made = publish(store, draft)
    later = commit(store, 2)
    assert publish(store, draft) == made
    assert store.log("main") == [later, made]


def test_announcing_twice_renews(store: StoreCatalog) -> None:
    commit_id = new_id()
    assert store.announce(commit_id, "main", 1, LAPSED) is None
    assert store.announce(commit_id, "main", 1, LEASE) is None
    assert store.void_lapsed() == 0


def test_versions_of_another_commit_are_refused(store: StoreCatalog) -> None:
    draft = announce(store, 1)
    with pytest.raises(InvalidInputError, match="layer 'a'"):
        publish(store, draft, [version("a", new_id(), 1)])
    assert store.head("main") is None


def test_without_an_announcement_nothing_is_published(store: StoreCatalog) -> None:
    draft = announce(store, 1)
    store.abandon(draft.id)
    store.abandon(draft.id)
    with pytest.raises(LeaseExpiredError, match=draft.id):
        publish(store, draft)
    assert store.head("main") is None
    assert list(store.live_versions()) == []


def test_gc_that_voids_a_lapsed_claim_first_wins(store: StoreCatalog) -> None:
    draft = announce(store, 1, lease=LAPSED)
    assert store.void_lapsed() == 1
    with pytest.raises(LeaseExpiredError, match="step 1 on branch 'main'"):
        publish(store, draft)


def test_a_lapsed_claim_that_nobody_voided_still_publishes(store: StoreCatalog) -> None:
    publish(store, announce(store, 1, lease=LAPSED))
    assert steps(store) == [1]


def test_renewing_tells_who_is_still_there(store: StoreCatalog) -> None:
    kept, lapsed, given_up = (announce(store, 1), announce(store, 1, lease=LAPSED), announce(store, 1))
    store.abandon(given_up.id)
    assert store.renew([lapsed.id, given_up.id, kept.id], LEASE) == [lapsed.id, kept.id]
    assert store.renew([], LEASE) == []
    assert store.void_lapsed() == 0


def test_the_second_of_two_commits_on_one_head_is_refused(store: StoreCatalog) -> None:
    commit(store, 1)
    slow, quick = announce(store, 2), announce(store, 3)
    made = publish(store, quick)
    said = "branch 'main' is now at step 3 while step 2.* a branch of your own"
    with pytest.raises(HeadMovedError, match=said):
        publish(store, slow)
    assert store.head("main") == made
    assert {one.version_id for one in store.live_versions()} == {made.id, made.parent}
    # The claim outlives the refusal, so that the objects are still accounted for until it is given up.
    assert store.unknown_commits([slow.id]) == set()


def test_the_second_of_two_first_commits_is_refused(store: StoreCatalog) -> None:
    slow, quick = announce(store, 1), announce(store, 1)
    publish(store, quick)
    with pytest.raises(HeadMovedError):
        publish(store, slow)
    assert steps(store) == [1]


def test_moving_the_branch_refuses_what_is_being_written_on_it(store: StoreCatalog) -> None:
    first = commit(store, 1)
    commit(store, 2)
    draft = announce(store, 3)
    store.branch("main", first.id, move=True)
    with pytest.raises(HeadMovedError):
        publish(store, draft)
    assert steps(store) == [1]


def test_deleting_the_branch_refuses_what_is_being_written_on_it(store: StoreCatalog) -> None:
    commit(store, 1)
    draft = announce(store, 2)
    store.delete_branch("main")
    with pytest.raises(HeadMovedError, match="moved or was deleted"):
        publish(store, draft)


def test_a_light_version_needs_a_base_that_is_alive(store: StoreCatalog) -> None:
    base = commit(store, 1, ["a"])
    light = commit_light(store, 2, "a", base.id)
    assert at(store, 2).versions["a"].base_id == base.id
    assert at(store, 2).versions["a"].fidelity == "light"
    with pytest.raises(InvalidInputError, match="layer 'a'"):
        commit_light(store, 3, "a", light.id)
    with pytest.raises(InvalidInputError, match="not a full version that is alive"):
        commit_light(store, 3, "a", new_id())
    assert steps(store) == [2, 1]


def test_one_layers_version_is_no_base_of_another(store: StoreCatalog) -> None:
    base = commit(store, 1, ["a"])
    commit(store, 2, ["b"])
    with pytest.raises(InvalidInputError, match="layer 'b'"):
        commit_light(store, 3, "b", base.id)
    assert steps(store) == [2, 1]


def test_fidelity_and_base_go_together(store: StoreCatalog) -> None:
    base = commit(store, 1, ["a"])
    draft = announce(store, 2)
    with pytest.raises(InvalidInputError, match=r"layer 'a'.* is a light version with no base"):
        publish(store, draft, [replace(version("a", draft.id, 2), fidelity="light")])
    with pytest.raises(InvalidInputError, match=rf"layer 'a'.* is a full version with the base {base.id}"):
        publish(store, draft, [replace(version("a", draft.id, 2), base_id=base.id)])
    assert steps(store) == [1]


def test_an_error_that_is_no_number_is_stored_as_unknown(store: StoreCatalog) -> None:
    base = commit(store, 1, ["a", "b"])
    draft = announce(store, 2)
    light = [
        replace(version("a", draft.id, 2, base.id), error=math.nan),
        replace(version("b", draft.id, 2, base.id), error=math.inf),
    ]
    publish(store, draft, light)
    assert [at(store, 2).versions[name].error for name in ("a", "b")] == [None, None]


def test_a_base_that_gc_doomed_meanwhile_is_refused(store: StoreCatalog) -> None:
    first, _ = commit(store, 1), commit(store, 2)
    draft = announce(store, 3)
    # Not what the pending commit's parent holds, so nothing protects it.
    store.expire([first.id])
    with pytest.raises(InvalidInputError, match=f"{first.id} is not a full version that is alive"):
        publish(store, draft, [version("a", draft.id, 3, first.id)])
    assert steps(store) == [2]


def test_gc_and_a_light_commit_at_once_never_part_a_version_from_its_base(store: StoreCatalog) -> None:
    for step in range(0, 40, 4):
        base, newer = commit(store, step), commit(store, step + 1)
        draft = announce(store, step + 2)
        start = threading.Barrier(2)

        def collect(start: threading.Barrier = start, base: Commit = base) -> int:
            start.wait(10)
            return store.expire([base.id]).versions_doomed

        with ThreadPoolExecutor(1) as pool:
            collected = pool.submit(collect)
            start.wait(10)
            try:
                publish(store, draft, [version("a", draft.id, step + 2, base.id)])
                published = True
            except InvalidInputError:
                published = False
                store.abandon(draft.id)
            collected.result()
        alive = {(one.layer, one.version_id) for one in store.live_versions()}
        assert (("a", base.id) in alive) is published
        held = at(store, "latest")
        assert held.commit.id == (draft.id if published else newer.id)
        assert set(held.bases) == ({"a"} if published else set())


def test_a_store_that_was_taken_over_refuses_its_old_writers(catalog: Catalog, store: StoreCatalog) -> None:
    draft = announce(store, 1)
    again = catalog.take_over(Binding("store-1", catalog.catalog_id, 2), "s3://b/moved", [], {}, {})
    with pytest.raises(RootTakenError, match="epoch"):
        publish(store, draft)
    with pytest.raises(RootTakenError):
        announce(store, 1)
    with pytest.raises(RootTakenError):
        store.expire([])
    assert store.binding().epoch == again.epoch == 2
    commit(again, 1)


def test_stores_in_one_catalog_do_not_see_each_other(catalog: Catalog, store: StoreCatalog) -> None:
    other = catalog.register("store-2", "file:///other", 1)
    mine = commit(store, 1, ["a"])
    theirs = commit(other, 5, ["a", "z"])
    assert steps(store) == [1]
    assert steps(other) == [5]
    assert [one.version_id for one in store.live_versions()] == [mine.id] * 2
    assert store.unknown_commits([mine.id, theirs.id]) == {theirs.id}
    assert store.unknown_versions([("a", theirs.id)]) == {("a", theirs.id)}
    assert store.stats().layers == 2
    store.tag("best", mine.id)
    assert other.tags() == []


def test_many_threads_publish_and_exactly_one_wins_each_head(store: StoreCatalog) -> None:
    def work(number: int) -> int:
        won = 0
        for _ in range(5):
            head = store.head("main")
            draft = announce(store, (head.step if head else 0) + 1 + number)
            try:
                publish(store, draft)
            except HeadMovedError:
                store.abandon(draft.id)
            else:
                won += 1
        return won

    def patient(number: int) -> int:
        while True:
            try:
                return work(number)
            except StepOrderError:
                continue

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(patient, range(6)))
    log = store.log("main")
    assert len(log) >= 5
    assert [one.parent for one in log] == [*(one.id for one in log[1:]), None]
    for one in log:
        assert set(store.composite(one.id).versions) == {EXTRA_LAYER, "a", "b"}


def _race(url: str, barrier: Barrier, results: "multiprocessing.Queue[str]") -> None:
    catalog = Catalog.open(url)
    store = catalog.register("store-1", "file:///data/run", 1)
    draft = announce(store, 1)
    barrier.wait(30)
    try:
        results.put(publish(store, draft).id)
    except HeadMovedError:
        results.put("conflict")
    catalog.close()


@pytest.mark.parametrize("begun", [False, True])
def test_of_two_processes_one_wins(catalog_url: str, begun: bool) -> None:
    if begun:
        catalog = Catalog.open(catalog_url)
        commit(catalog.register("store-1", "file:///data/run", 1), 0)
        catalog.close()
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    results: multiprocessing.Queue[str] = spawn.Queue()
    racers = [spawn.Process(target=_race, args=(catalog_url, barrier, results)) for _ in range(2)]
    for racer in racers:
        racer.start()
    outcomes = sorted(results.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert outcomes.count("conflict") == 1
    catalog = Catalog.open(catalog_url)
    store = catalog.store("store-1")
    assert store is not None
    head: Commit | None = store.head("main")
    assert head is not None
    assert head.id in outcomes
    catalog.close()


def test_gc_and_a_publish_at_once_leave_one_of_the_two_outcomes(store: StoreCatalog) -> None:
    for step in range(1, 15):
        draft = announce(store, step, lease=LAPSED)
        start = threading.Barrier(2)

        def collect(start: threading.Barrier = start) -> int:
            start.wait(10)
            return store.void_lapsed()

        with ThreadPoolExecutor(1) as pool:
            voided = pool.submit(collect)
            start.wait(10)
            try:
                publish(store, draft)
                published = True
            except LeaseExpiredError:
                published = False
            assert voided.result() == (0 if published else 1)
        head = store.head("main")
        assert (head is not None and head.id == draft.id) is published


def test_new_layers_of_a_failed_publish_are_made_again(store: StoreCatalog) -> None:
    commit(store, 1, ["a"])
    slow, quick = announce(store, 2), announce(store, 2)
    publish(store, quick, ["b"])
    with pytest.raises(HeadMovedError):
        publish(store, slow, ["c"])
    commit(store, 3, ["c", "d"])
    assert set(at(store, "latest").versions) == {EXTRA_LAYER, "a", "b", "c", "d"}


def test_leases_lapse_by_the_catalogs_clock(catalog: Catalog, store: StoreCatalog) -> None:
    assert abs(catalog.now() - store.now()) < timedelta(seconds=5)
    assert catalog.now().tzinfo is UTC


def test_a_branch_that_was_moved_away_and_back_is_not_the_one_that_the_manifest_names(store: StoreCatalog) -> None:
    first = commit(store, 1)
    second = commit(store, 2)
    (run,) = store.lines_of("main")
    assert run.line == first.id
    draft = replace(announce(store, 3), line=run.line)
    store.branch("main", first.id, move=True)
    store.branch("main", second.id, move=True)
    with pytest.raises(HeadMovedError, match="moved"):
        publish(store, draft)
    again = replace(announce(store, 3), line=store.lines_of("main")[0].line)
    publish(store, again)
    assert [one.until for one in store.lines_of("main")] == [None, 2]
    assert store.lines_to(again.id) == store.lines_of("main")


def test_a_commit_keeps_the_time_that_its_manifest_has(store: StoreCatalog) -> None:
    draft = announce(store, 1)
    made_at = store.now() - timedelta(minutes=1)
    publish(store, replace(draft, created_at=made_at))
    assert [one.created_at for one in store.log("main")] == [made_at]
