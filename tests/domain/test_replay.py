"""What a root's documents amount to: found out from what is left, whatever was published, lost a race or expired."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorstore.domain.lines import LineRun, Tip
from tailorstore.domain.records import Binding, Commit, CommitManifest, RefRecord
from tailorstore.domain.replay import Replayed, parents_of_lines, replay

BINDING = Binding("store", "catalog", 1)
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Simulated:
    """A store of dictionaries, which writes the documents that a real one would."""

    now: datetime = START
    count: int = 0
    manifests: dict[str, CommitManifest] = field(default_factory=dict)
    published: dict[str, CommitManifest] = field(default_factory=dict)
    records: list[RefRecord] = field(default_factory=list)
    lines: dict[str, tuple[LineRun, ...]] = field(default_factory=dict)
    """Of each branch."""
    heads: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def tick(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now

    def new_id(self) -> str:
        self.count += 1
        return f"{self.count:020x}"

    def write(self, branch: str, ahead: int = 1) -> str:
        """Announce a commit on the branch's head, and write its manifest."""
        head = self.published[self.heads[branch]].commit if branch in self.heads else None
        commit_id = self.new_id()
        step = ahead if head is None else head.step + ahead
        commit = Commit(commit_id, step, branch, head.id if head else None, self.tick(), None, {}, (), 0, 0)
        lines = self.lines.get(branch, (LineRun(commit_id),))
        self.manifests[commit_id] = CommitManifest(BINDING, commit, {}, {}, {}, lines)
        return commit_id

    def publish(self, commit_id: str) -> bool:
        manifest = self.manifests[commit_id]
        branch = manifest.commit.branch
        if self.heads.get(branch) != manifest.commit.parent:
            return False
        if self.lines.get(branch, manifest.lines)[0] != manifest.lines[0]:
            return False
        self.lines[branch] = manifest.lines
        self.heads[branch] = commit_id
        self.published[commit_id] = manifest
        return True

    def commit(self, branch: str, ahead: int = 1) -> str:
        commit_id = self.write(branch, ahead)
        assert self.publish(commit_id)
        return commit_id

    def point(self, branch: str, commit_id: str) -> None:
        if self.heads.get(branch) == commit_id:
            return
        target = self.published[commit_id]
        record_id = self.new_id()
        newest, *older = target.lines
        self.lines[branch] = (LineRun(record_id), replace(newest, until=target.commit.step), *older)
        self.heads[branch] = commit_id
        self.records.append(RefRecord(record_id, "branch", branch, commit_id, self.tick()))

    def remove(self, branch: str) -> None:
        del self.heads[branch], self.lines[branch]
        self.records.append(RefRecord(self.new_id(), "branch", branch, None, self.tick()))

    def tag(self, name: str, commit_id: str | None) -> None:
        if commit_id is None:
            self.tags.pop(name)
        else:
            self.tags[name] = commit_id
        self.records.append(RefRecord(self.new_id(), "tag", name, commit_id, self.tick()))

    def expire(self, commit_id: str) -> None:
        if commit_id not in self.heads.values() and commit_id not in self.tags.values():
            del self.published[commit_id], self.manifests[commit_id]

    def replayed(self, chance: random.Random | None = None) -> Replayed:
        manifests, records = list(self.manifests.values()), list(self.records)
        if chance is not None:
            chance.shuffle(manifests)
            chance.shuffle(records)
        return replay(manifests, records)

    def log(self, branch: str) -> list[str]:
        return log_of(self.published.values(), self.lines[branch])


def log_of(published: Iterable[CommitManifest], lines: tuple[LineRun, ...]) -> list[str]:
    """Return the ids of a branch's commits, newest first."""
    found: list[str] = []
    for run in lines:
        mine = [one.commit for one in published if one.lines[0].line == run.line]
        counted = [one for one in mine if run.until is None or one.step <= run.until]
        found += [one.id for one in sorted(counted, key=lambda one: -one.step)]
    return found


def lines_at(replayed: Replayed, tip: Tip) -> tuple[LineRun, ...]:
    """Return along which lines a branch runs, as a catalog would that was made of the replay."""
    parents = parents_of_lines(replayed.commits)
    head = next(one for one in replayed.commits if one.commit.id == tip.commit)
    if tip.line not in parents:
        newest, *older = head.lines
        return (LineRun(tip.line), replace(newest, until=head.commit.step), *older)
    found = [LineRun(tip.line)]
    while (parent := parents[found[-1].line]) is not None:
        found.append(parent)
    return tuple(found)


def assert_same_history(simulated: Simulated, replayed: Replayed) -> None:
    assert {one.commit.id for one in replayed.commits} == simulated.published.keys()
    assert {name: tip.commit for name, tip in replayed.branches.items()} == simulated.heads
    assert dict(replayed.tags) == simulated.tags
    for name, tip in replayed.branches.items():
        assert log_of(replayed.commits, lines_at(replayed, tip)) == simulated.log(name), name
    assert (replayed.contradictory, replayed.dangling) == ((), ())


def live(chance: random.Random, *, swept: bool) -> tuple[Simulated, set[str]]:
    """Commit, fork, move, remove, race and expire at random; return also the manifests of those that lost a race.

    ``swept``: those are gone when commits expire.
    """
    store = Simulated()
    lost: set[str] = set()
    for _ in range(40):
        branch = chance.choice(["main", "side", "try"])
        any_commit = chance.choice(sorted(store.published)) if store.published else None
        match chance.randrange(10):
            case 0 if any_commit:
                store.point(branch, any_commit)
            case 1 if branch in store.heads and len(store.heads) > 1:
                store.remove(branch)
            case 2 if any_commit:
                name = chance.choice("vw")
                store.tag(name, None if name in store.tags else any_commit)
            case 3:
                for one in chance.sample(sorted(store.published), len(store.published) // 3):
                    store.expire(one)
                if swept:
                    for one in lost:
                        del store.manifests[one]
                    lost.clear()
            case 4:
                # Two on one head; somebody goes on from the one that was published.
                mine, rival = store.write(branch), store.write(branch, 2)
                winner, loser = chance.choice([(mine, rival), (rival, mine)])
                assert store.publish(winner)
                assert not store.publish(loser)
                lost.add(loser)
                store.commit(branch)
            case 5 if branch in store.heads and any_commit:
                # A commit is under way while its branch is moved or removed.
                slow = store.write(branch)
                if chance.random() < 0.5 or len(store.heads) == 1:
                    store.point(branch, any_commit)
                else:
                    store.remove(branch)
                if not store.publish(slow):
                    lost.add(slow)
                    late = replace(store.manifests[slow].commit, created_at=store.tick())
                    store.manifests[slow] = replace(store.manifests[slow], commit=late)
            case _:
                store.commit(branch, chance.randrange(1, 4))
    return store, lost


@pytest.mark.parametrize("first_seed", range(0, 400, 100))
def test_any_history_comes_back_exactly(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        chance = random.Random(seed)
        store, _ = live(chance, swept=True)
        assert_same_history(store, store.replayed(chance))


def test_nothing_that_was_published_is_missed_for_what_was_not() -> None:
    """Of what lost a race, something may come back where nothing is left of what it lost against."""
    back = 0
    for seed in range(400):
        chance = random.Random(seed)
        store, lost = live(chance, swept=False)
        found = {one.commit.id for one in store.replayed(chance).commits}
        assert store.published.keys() <= found
        assert found - store.published.keys() <= lost
        back += len(found - store.published.keys())
        store.manifests = dict(store.published)
        assert_same_history(store, store.replayed(chance))
    assert back


def test_the_last_of_those_that_died_before_publishing_goes_on() -> None:
    store = Simulated()
    first = store.commit("main")
    died, died_later = store.write("main"), store.write("main")
    found = store.replayed()
    assert [one.commit.id for one in found.commits] == [first, died_later]
    assert found.branches["main"].commit == died_later
    assert found.unplaced == (died,)


def test_of_two_that_raced_both_stay_as_long_as_nothing_tells_who_won() -> None:
    store = Simulated()
    first = store.commit("main")
    rival = store.write("main")
    published = store.commit("main", 2)
    found = store.replayed()
    assert [one.commit.id for one in found.commits] == [first, rival, published]
    assert found.branches["main"].commit == published
    store.commit("main")
    assert store.replayed().unplaced == (rival,)


@pytest.mark.parametrize("ahead", [1, 2, 5, 20])
def test_what_did_not_follow_the_one_before_it_was_not_published(ahead: int) -> None:
    store = Simulated()
    store.commit("main")
    rival = store.write("main", ahead)
    made = [store.commit("main", 3) for _ in range(3)]
    found = store.replayed()
    assert (found.unplaced, found.branches["main"].commit) == ((rival,), made[-1])


def test_of_two_that_began_a_branch_at_once_the_one_that_was_built_on_counts() -> None:
    store = Simulated()
    mine, rival = store.write("main"), store.write("main")
    assert store.publish(mine)
    found = store.replayed()
    assert (found.branches["main"].commit, found.unplaced) == (rival, ())
    second = store.commit("main")
    found = store.replayed()
    assert (found.branches["main"], found.unplaced) == (Tip(second, mine), (rival,))
    # When only its successor is left, nothing tells; the branch is where it was all the same.
    store.expire(mine)
    found = store.replayed()
    assert (found.branches["main"], found.unplaced) == (Tip(second, mine), ())


def test_a_branch_that_was_removed_may_begin_anew() -> None:
    store = Simulated()
    old = store.commit("main")
    store.point("side", old)
    store.remove("main")
    new = store.commit("main")
    found = store.replayed()
    assert {name: tip.commit for name, tip in found.branches.items()} == {"main": new, "side": old}
    assert found.unplaced == ()


def test_a_move_whose_record_was_never_written_shows_in_what_was_committed_after_it() -> None:
    store = Simulated()
    first = store.commit("main")
    second = store.commit("main")
    store.point("main", first)
    store.records.clear()
    third = store.commit("main")
    found = store.replayed()
    assert found.branches["main"].commit == third
    assert log_of(found.commits, lines_at(found, found.branches["main"])) == [third, first]
    assert {one.commit.id for one in found.commits} == {first, second, third}


def test_a_branch_falls_back_to_what_is_left_of_it() -> None:
    store = Simulated()
    first = store.commit("main")
    second = store.commit("main")
    third = store.commit("main")
    del store.manifests[third], store.manifests[second]
    assert store.replayed().branches["main"] == Tip(first, first)


def test_a_tag_of_a_commit_that_is_gone_is_gone() -> None:
    store = Simulated()
    first = store.commit("main")
    store.tag("v", first)
    store.commit("main")
    del store.manifests[first]
    store.tag("w", None if "w" in store.tags else first)
    store.tag("w", None)
    assert store.replayed().tags == {}
    assert store.replayed().dangling == ("tag v",), "a tag that was removed is not missed"


def test_a_branch_whose_last_line_is_gone_is_named_and_stands_where_it_stood_before() -> None:
    store = Simulated()
    first = store.commit("main")
    second = store.commit("main")
    store.point("side", first)
    store.point("try", second)
    store.point("side", second)
    del store.manifests[second]
    told = store.replayed()
    assert told.dangling == ("branch side", "branch try")
    assert told.branches.keys() == {"main", "side"}
    assert told.branches["side"].commit == first
    store.remove("side")
    assert store.replayed().dangling == ("branch try",)


def test_manifests_that_contradict_older_ones_about_a_line_are_told_apart() -> None:
    store = Simulated()
    first = store.commit("main")
    store.point("side", first)
    second = store.commit("side")
    good = store.replayed()
    liar = store.write("side")
    # A circle: the first line would descend from the one that forked off it.
    lines = (LineRun(first), replace(store.manifests[second].lines[0], until=9))
    store.manifests[liar] = replace(store.manifests[liar], lines=lines)
    found = store.replayed()
    assert found.contradictory == (liar,)
    assert found.commits == good.commits
    assert found.branches == good.branches


ids = st.integers(0, 7).map(lambda number: f"{number:020x}")
runs = st.lists(st.builds(LineRun, ids, st.integers(0, 5)), min_size=1, max_size=3, unique_by=lambda run: run.line)
times = st.integers(0, 9).map(lambda seconds: START + timedelta(seconds=seconds))
any_commits = st.builds(
    lambda commit_id, step, branch, parent, when, lines: CommitManifest(
        BINDING,
        Commit(commit_id, step, branch, parent, when, None, {}, (), 0, 0),
        {},
        {},
        {},
        (LineRun(lines[0].line), *lines[1:]),
    ),
    ids,
    st.integers(0, 5),
    st.sampled_from(["main", "side"]),
    st.none() | ids,
    times,
    runs,
)
any_records = st.builds(
    RefRecord, ids, st.sampled_from(["tag", "branch"]), st.sampled_from(["main", "side"]), st.none() | ids, times
)


@settings(max_examples=300)
@given(
    manifests=st.lists(any_commits, max_size=8, unique_by=lambda one: one.commit.id),
    records=st.lists(any_records, max_size=4),
)
def test_whatever_the_documents_say_the_result_can_be_kept(
    manifests: list[CommitManifest], records: list[RefRecord]
) -> None:
    found = replay(manifests, records)
    accounted = [*(one.commit.id for one in found.commits), *found.unplaced, *found.contradictory]
    assert sorted(accounted) == sorted(one.commit.id for one in manifests)
    steps = [(one.lines[0].line, one.commit.step) for one in found.commits]
    assert len(set(steps)) == len(steps)
    published = {one.commit.id for one in found.commits}
    assert {tip.commit for tip in found.branches.values()} | set(found.tags.values()) <= published
    for tip in found.branches.values():
        lines_at(found, tip)
    known: set[str] = set()
    for line, parent in parents_of_lines(found.commits).items():
        assert parent is None or parent.line in known
        known.add(line)
