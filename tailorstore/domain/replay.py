"""What a root's manifests and records amount to: which commits were published, and where names point. Pure.

A commit's manifest is written before the commit is published, so there are manifests of commits that never were: they
lost a race, or their process died just before. Nothing in a root says so; it follows from what came after.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from operator import attrgetter

from tailorstore.domain.lines import LineRun, Tip
from tailorstore.domain.records import Commit, CommitManifest, RefRecord


@dataclass(frozen=True, slots=True)
class Replayed:
    """A history."""

    commits: tuple[CommitManifest, ...]
    """Published commits, oldest first."""
    branches: Mapping[str, Tip]
    tags: Mapping[str, str]
    """Tag name → commit id."""
    unplaced: tuple[str, ...]
    """Ids of commits that were not published."""
    contradictory: tuple[str, ...]
    """Ids of commits whose manifests say of a line what older ones deny."""
    dangling: tuple[str, ...] = ()
    """Tags and branches, as ``tag best``, whose last change points to a commit that is not among the published ones, so
    that they are gone, or stand where they stood before."""


def replay(manifests: Iterable[CommitManifest], records: Sequence[RefRecord]) -> Replayed:
    """Find out what was published, and where branches and tags point.

    A commit that another one or a record names was published. One that nothing names was not if it could not have
    followed what it says it did: if another is known to have done so, or its branch was elsewhere by then. Else it
    counts, so that nothing that was published is missed; it may have lost a race, or its process died just before
    publishing. Of two of one step on one line the later counts: whoever died and was started again did it again.

    Args:
        manifests: one for each commit id.
        records: of tags and branches.
    """
    sound, contradictory = _agreeing(manifests)
    by_id = {manifest.commit.id: manifest for manifest in sound}
    named = {manifest.commit.parent for manifest in sound} | {record.commit for record in records}
    by_line: dict[str, list[Commit]] = defaultdict(list)
    for manifest in sound:
        by_line[manifest.lines[0].line].append(manifest.commit)
    refused = _refused(sound, records, named)
    placed: set[str] = set()
    for found in by_line.values():
        standing = [commit for commit in found if commit.id not in refused]
        placed |= {commit.id for commit in _published(standing, by_id, named)}
    history = sorted((by_id[one] for one in placed), key=_age)
    branches, without_end = _tips(history, records)
    return Replayed(
        commits=tuple(history),
        branches=branches,
        tags=_tags(placed, records),
        unplaced=tuple(one for one in by_id if one not in placed),
        contradictory=contradictory,
        dangling=tuple(sorted([*_lost_tags(placed, records), *(f"branch {name}" for name in without_end)])),
    )


def parents_of_lines(manifests: Iterable[CommitManifest]) -> dict[str, LineRun | None]:
    """Return, by line, the line that it forked from and up to which step; ``None`` for one that began anew.

    Lines stand behind those that they forked from.
    """
    parents: dict[str, LineRun | None] = {}
    for manifest in manifests:
        before: LineRun | None = None
        for run in reversed(manifest.lines):
            parents.setdefault(run.line, before)
            before = run
    return parents


def _age(manifest: CommitManifest) -> tuple[datetime, str]:
    return manifest.commit.created_at, manifest.commit.id


def _agreeing(manifests: Iterable[CommitManifest]) -> tuple[list[CommitManifest], tuple[str, ...]]:
    """Return the manifests that agree about lines, oldest first, and the ids of those that do not.

    Each tells its lines back to the first, so lines that all agree on cannot go round in circles.
    """
    told: dict[str, tuple[str, int | None] | None] = {}
    sound: list[CommitManifest] = []
    contradictory: list[str] = []
    for manifest in sorted(manifests, key=_age):
        runs = manifest.lines
        tells: dict[str, tuple[str, int | None] | None] = {
            run.line: (before.line, before.until) for run, before in pairwise(runs)
        }
        tells |= {run.line: None for run in runs[-1:]}
        if runs and all(told.get(line, parent) == parent for line, parent in tells.items()):
            told |= tells
            sound.append(manifest)
        else:
            contradictory.append(manifest.commit.id)
    return sound, tuple(contradictory)


def _refused(sound: Sequence[CommitManifest], records: Sequence[RefRecord], named: AbstractSet[str | None]) -> set[str]:
    """Return the commits that nothing names whose branch was elsewhere, or already there, when they were made."""
    by_branch: dict[str, list[CommitManifest]] = defaultdict(list)
    for manifest in sound:
        by_branch[manifest.commit.branch].append(manifest)
    changes: dict[str, list[RefRecord]] = defaultdict(list)
    for record in sorted(records, key=attrgetter("created_at")):
        if record.kind == "branch":
            changes[record.name].append(record)
    refused: set[str] = set()
    for name, found in by_branch.items():
        doubtful = [manifest for manifest in found if manifest.commit.id not in named]
        elsewhere = _made_elsewhere(found, doubtful, changes[name])
        rest = [manifest for manifest in found if manifest.commit.id not in elsewhere]
        refused |= elsewhere | _not_begun(rest, named, changes[name])
    return refused


def _made_elsewhere(
    found: Sequence[CommitManifest], doubtful: Sequence[CommitManifest], changes: Sequence[RefRecord]
) -> set[str]:
    """Return the commits that were made on a line after their branch had left it."""
    began = {record.id: record.created_at for record in changes}
    for manifest in found:
        began.setdefault(manifest.lines[0].line, manifest.commit.created_at)
    times = [record.created_at for record in changes]
    refused: set[str] = set()
    for manifest in doubtful:
        line = manifest.lines[0].line
        after_it_began = bisect_right(times, began[line])
        if after_it_began < bisect_right(times, manifest.commit.created_at):
            refused.add(manifest.commit.id)
    return refused


def _not_begun(
    found: Sequence[CommitManifest], named: AbstractSet[str | None], changes: Sequence[RefRecord]
) -> set[str]:
    """Return the commits that would have begun a branch and did not, because it was there."""
    removals = [record.created_at for record in changes if record.commit is None]
    pointed = [record.created_at for record in changes if record.commit is not None]

    def era(manifest: CommitManifest) -> int:
        return bisect_right(removals, manifest.commit.created_at)

    begun: dict[int, set[str]] = defaultdict(set)
    for manifest in found:
        if len(manifest.lines) == 1 and manifest.commit.id in named:
            begun[era(manifest)].add(manifest.lines[0].line)
    refused: set[str] = set()
    for manifest in found:
        commit = manifest.commit
        if commit.parent is None and commit.id not in named:
            began_else = begun[era(manifest)] - {manifest.lines[0].line}
            earlier = bisect_left(pointed, commit.created_at)
            was_pointed = earlier > 0 and bisect_right(removals, pointed[earlier - 1]) == era(manifest)
            if began_else or was_pointed:
                refused.add(commit.id)
    return refused


def _published(found: Sequence[Commit], by_id: Mapping[str, object], named: AbstractSet[str | None]) -> list[Commit]:
    """Return those commits of one line that were published."""
    chain: dict[int, Commit] = {}
    for commit in sorted((one for one in found if one.id in named), key=attrgetter("created_at")):
        chain[commit.step] = commit
    steps = sorted(chain)
    ids = {commit.id for commit in chain.values()}

    def fits(commit: Commit) -> bool:
        at = bisect_left(steps, commit.step)
        before = chain[steps[at - 1]] if at else None
        after = chain[steps[at]] if at < len(steps) else None
        # Nothing can stand between a commit and its parent; the parent of a line's first is on another line.
        torn = commit.parent in ids if before is None else commit.parent != before.id
        if torn and (commit.parent is None or commit.parent in by_id):
            return False
        return after is None or (after.step != commit.step and after.parent is not None and after.parent not in by_id)

    doubtful: dict[int, Commit] = {}
    for commit in sorted((one for one in found if one.id not in named), key=attrgetter("created_at")):
        if fits(commit):
            doubtful[commit.step] = commit
    return [*chain.values(), *doubtful.values()]


def _tips(history: Sequence[CommitManifest], records: Sequence[RefRecord]) -> tuple[dict[str, Tip], set[str]]:
    """Return where branches point: each to the end of the line on which something happened last.

    And those of which this line has no end: nothing that was committed there, nor what it began at, can be read.
    """
    placed = {manifest.commit.id for manifest in history}
    last: dict[tuple[str, str], datetime] = {}
    ends: dict[tuple[str, str], Tip] = {}
    removed: dict[str, datetime] = {}
    for record in sorted(records, key=attrgetter("created_at")):
        if record.kind != "branch":
            continue
        if record.commit is None:
            removed[record.name] = record.created_at
            continue
        # A record is written just after what it tells of; commits on the line that it began are later all the same.
        last[record.name, record.id] = record.created_at
        if record.commit in placed:
            ends[record.name, record.id] = Tip(record.commit, record.id)
    for manifest in sorted(history, key=lambda one: one.commit.step):
        commit, line = manifest.commit, manifest.lines[0].line
        key = (commit.branch, line)
        last[key] = max(commit.created_at, last.get(key, commit.created_at))
        ends[key] = Tip(commit.id, line)
    tips: dict[str, Tip] = {}
    without_end: set[str] = set()
    for (name, line), when in sorted(last.items(), key=lambda item: item[1]):
        if name in removed and removed[name] > when:
            continue
        if (name, line) in ends:
            tips[name] = ends[name, line]
            without_end.discard(name)
        else:
            without_end.add(name)
    return tips, without_end


def _tags(placed: AbstractSet[str], records: Sequence[RefRecord]) -> dict[str, str]:
    tags: dict[str, str] = {}
    for record in sorted(records, key=attrgetter("created_at")):
        if record.kind == "tag" and record.commit is None:
            tags.pop(record.name, None)
        elif record.kind == "tag" and record.commit is not None and record.commit in placed:
            tags[record.name] = record.commit
    return tags


def _lost_tags(placed: AbstractSet[str], records: Sequence[RefRecord]) -> list[str]:
    last = {
        record.name: record.commit for record in sorted(records, key=attrgetter("created_at")) if record.kind == "tag"
    }
    return [f"tag {name}" for name, commit in last.items() if commit is not None and commit not in placed]
