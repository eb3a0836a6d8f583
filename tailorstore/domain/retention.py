"""Retention policies: which commits are kept, with reasons. Pure; nothing is dropped here.

A policy sees every branch's line of commits, newest first. Policies are joined by ``|``: a commit is kept if any
of them keeps it, and the reasons add up. What no policy may drop (heads, tags, leases) is added by :func:`decide`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, Protocol

from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.records import Commit

Reasons = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a policy decides upon."""

    now: datetime
    """The catalog's clock."""
    lines: Mapping[str, Sequence[Commit]]
    """Branch name to its commits, newest first; a commit may stand on several branches."""
    unreachable: Sequence[Commit]
    """Commits on no branch: a branch was moved back past them."""
    tags: Mapping[str, str]
    """Tag name to commit id."""
    leased: frozenset[str]
    """Ids of commits that a live lease covers."""
    quarantined: frozenset[str] = frozenset()
    """Ids of commits that hold a layer in quarantine, so that they cannot be restored in full."""

    def commits(self) -> dict[str, Commit]:
        """Return every commit once, by id."""
        found = {commit.id: commit for line in self.lines.values() for commit in line}
        found.update({commit.id: commit for commit in self.unreachable})
        return found

    def whole(self) -> "Inventory":
        """Return the same without the commits that hold a layer in quarantine."""

        def among(commits: Sequence[Commit]) -> list[Commit]:
            return [commit for commit in commits if commit.id not in self.quarantined]

        lines = {branch: among(line) for branch, line in self.lines.items()}
        return replace(self, lines=lines, unreachable=among(self.unreachable))


class RetentionPolicy(Protocol):
    """Anything that can say which commits it keeps and why."""

    def keep(self, inventory: Inventory) -> Iterable[tuple[str, str]]:
        """Yield (commit id, reason) for every commit this policy keeps."""
        ...


class _Joinable:
    __slots__ = ()

    def __or__(self, other: RetentionPolicy) -> "AnyOf":
        mine = self.policies if isinstance(self, AnyOf) else (self,)
        theirs = other.policies if isinstance(other, AnyOf) else (other,)
        return AnyOf((*mine, *theirs))


@dataclass(frozen=True, slots=True)
class AnyOf(_Joinable):
    """Keeps what any of its policies keeps; made by ``|``."""

    policies: tuple[RetentionPolicy, ...]

    def keep(self, inventory: Inventory) -> Iterable[tuple[str, str]]:
        """Yield what each policy keeps."""
        for policy in self.policies:
            yield from policy.keep(inventory)


@dataclass(frozen=True, slots=True)
class KeepLast(_Joinable):
    """Keep the newest ``n`` commits of every branch."""

    n: int

    def __post_init__(self) -> None:
        """Refuse counts that keep nothing."""
        _at_least_one("KeepLast", self.n)

    def keep(self, inventory: Inventory) -> Iterable[tuple[str, str]]:
        """Yield the newest ``n`` of each line."""
        for branch, line in inventory.lines.items():
            for rank, commit in enumerate(line[: self.n], start=1):
                yield commit.id, f"last {rank} of {self.n} on {branch}"


@dataclass(frozen=True, slots=True)
class KeepEvery(_Joinable):
    """Keep the first commit at or after every multiple of ``steps``, on every branch."""

    steps: int

    def __post_init__(self) -> None:
        """Refuse intervals that mean nothing."""
        _at_least_one("KeepEvery", self.steps)

    def keep(self, inventory: Inventory) -> Iterable[tuple[str, str]]:
        """Yield one commit for each interval of ``steps``."""
        for line in inventory.lines.values():
            seen: set[int] = set()
            for commit in reversed(line):
                interval = commit.step // self.steps
                if interval not in seen:
                    seen.add(interval)
                    yield commit.id, f"every {self.steps} steps ({interval * self.steps})"


@dataclass(frozen=True, slots=True)
class KeepBest(_Joinable):
    """Keep the ``n`` best commits of every branch by a metric; NaN and infinities never count as best."""

    metric: str
    n: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        """Refuse counts and modes that mean nothing."""
        _at_least_one("KeepBest", self.n)
        if self.mode not in ("min", "max"):
            msg = f"KeepBest mode must be 'min' or 'max', not {self.mode!r}"
            raise InvalidInputError(msg)

    def keep(self, inventory: Inventory) -> Iterable[tuple[str, str]]:
        """Yield the best of each line; of equals, the newer.

        Raises:
            InvalidInputError: no commit has the metric; a mistyped name must not drop everything.
        """
        known = {name for commit in inventory.commits().values() for name in commit.metrics}
        if inventory.commits() and self.metric not in known:
            names = ", ".join(map(repr, sorted(known))) or "none at all"
            msg = f"no commit has a metric {self.metric!r}; the commits have {names}"
            raise InvalidInputError(msg)
        for branch, line in inventory.lines.items():
            finite = [commit for commit in line if math.isfinite(commit.metrics.get(self.metric, math.nan))]
            sign = 1.0 if self.mode == "min" else -1.0
            finite.sort(key=lambda commit: (sign * commit.metrics[self.metric], -commit.step))
            for rank, commit in enumerate(finite[: self.n], start=1):
                yield commit.id, f"best {rank} of {self.n} by {self.metric} on {branch}"


@dataclass(frozen=True, slots=True)
class KeepWithin(_Joinable):
    """Keep every commit younger than ``duration``, also those that no branch reaches any more."""

    duration: timedelta

    def __post_init__(self) -> None:
        """Refuse durations that keep nothing."""
        if not isinstance(self.duration, timedelta) or self.duration <= timedelta(0):
            msg = f"KeepWithin needs a positive timedelta, not {self.duration!r}"
            raise InvalidInputError(msg)

    def keep(self, inventory: Inventory) -> Iterable[tuple[str, str]]:
        """Yield the young."""
        for commit in inventory.commits().values():
            if inventory.now - commit.created_at <= self.duration:
                yield commit.id, f"within {self.duration}"


@dataclass(frozen=True, slots=True)
class KeepTagged(_Joinable):
    """Keep tagged commits and nothing else by policy; tags protect their commits under every policy."""

    def keep(self, inventory: Inventory) -> Iterable[tuple[str, str]]:
        """Yield nothing: :func:`decide` protects tags already."""
        del inventory
        return ()


@dataclass(frozen=True, slots=True)
class Decision:
    """Every commit is either kept, with reasons, or expired."""

    kept: Mapping[str, tuple[str, ...]]
    expired: tuple[Commit, ...]


def decide(inventory: Inventory, policy: RetentionPolicy | None) -> Decision:
    """Split the commits into kept and expired.

    The newest commit of every branch, tagged commits and leased ones are kept whatever the policy says. Commits that
    hold a layer in quarantine are no policy's business: they are not kept by it, and do not count against its numbers.
    Without a policy everything published is kept.
    """
    reasons: Reasons = {}

    def keep(commit_id: str, reason: str) -> None:
        known = reasons.setdefault(commit_id, [])
        if reason not in known:
            known.append(reason)

    for branch, line in inventory.lines.items():
        if line:
            keep(line[0].id, f"newest of {branch}")
    for tag, commit_id in inventory.tags.items():
        keep(commit_id, f"tag {tag}")
    for commit_id in inventory.leased:
        keep(commit_id, "in use (lease)")
    commits = inventory.commits()
    if policy is None:
        for commit_id in commits:
            keep(commit_id, "no policy given")
    else:
        # What cannot be restored takes no place from what can: the last good commit outlives any number of bad ones.
        for commit_id, reason in policy.keep(inventory.whole()):
            keep(commit_id, reason)
    kept = {commit_id: tuple(reasons[commit_id]) for commit_id in commits if commit_id in reasons}
    expired = tuple(commit for commit_id, commit in commits.items() if commit_id not in reasons)
    return Decision(kept, expired)


def _at_least_one(policy: str, n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        msg = f"{policy} needs a whole number of at least 1, not {n!r}"
        raise InvalidInputError(msg)
