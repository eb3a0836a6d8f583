"""What the processes of a soak write down about themselves, so that it outlives any of them being killed.

Counts lie in memory that all processes share, a row for each place in the crew. The ledger is a file for each place, a
line of JSON for each thing meant and each thing done.
"""

import json
import mmap
import os
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

COUNTED: Final = (
    "commits", "composites read", "bytes compared", "held under a lease", "refs gone", "gc runs", "objects deleted",
    "versions swept", "leftovers swept", "commits expired", "verifies", "scrubs", "objects verified", "branches made",
    "branches moved", "branches removed", "tags made", "tags removed", "take-overs", "refused: head moved",
    "refused: step order", "refused: root taken", "refused: lease expired after a stall", "reads of a lost root",
    "reads later than the grace period", "kills", "unexpected errors", "wrong composites",
)  # fmt: skip
"""What is counted, in the order of the table."""


class Board:
    """Counts of all processes, in shared memory, and the flag that ends the soak."""

    def __init__(self, places: int) -> None:
        self._memory = mmap.mmap(-1, 8 * (1 + places * len(COUNTED)))

    def add(self, place: int, what: str, count: int = 1) -> None:
        """Count something; only one process at a time does so for a place."""
        at = 8 * (1 + place * len(COUNTED) + COUNTED.index(what))
        (before,) = struct.unpack_from("q", self._memory, at)
        struct.pack_into("q", self._memory, at, before + count)

    def totals(self) -> Counter[str]:
        """Return the counts of all places."""
        numbers = [number for (number,) in struct.iter_unpack("q", self._memory[:])][1:]
        found: Counter[str] = Counter()
        for at, number in enumerate(numbers):
            found[COUNTED[at % len(COUNTED)]] += number
        return found

    def have_happened(self, things: Collection[str]) -> bool:
        """Whether each of these was counted at least once."""
        totals = self.totals()
        return all(totals[what] for what in things)

    def stop(self) -> None:
        """Tell everybody to come to an end."""
        struct.pack_into("q", self._memory, 0, 1)

    @property
    def stopped(self) -> bool:
        """Whether everybody was told to come to an end."""
        return bool(struct.unpack_from("q", self._memory, 0)[0])


class Ledger:
    """One place's file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **entry: Any) -> None:
        """Add a line, whole or not at all but for the last of a process that is killed."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, json.dumps(entry).encode() + b"\n")
        finally:
            os.close(descriptor)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield what was written."""
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                yield json.loads(line)


@dataclass(slots=True)
class Line:
    """What a branch must hold, told from the ledger of the only process that writes to it."""

    acknowledged: list[int] = field(default_factory=list)
    """Steps of commits whose publication was acknowledged and that the branch was not moved back past; growing."""
    deepest: dict[int, int] = field(default_factory=dict)
    """Of each: the most commits that ever were after it on the branch, those in doubt included."""
    in_doubt: int | None = None
    """Step of a commit that was begun and of which nothing more was heard."""
    last_step: int = 0
    """The greatest that was ever tried."""
    tags: dict[str, int] = field(default_factory=dict)
    forks: dict[str, int] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)
    """Tags and forks whose making or removal was begun and not heard of again."""
    made: int = 0
    """Names given so far."""

    @classmethod
    def of(cls, ledger: Ledger) -> "Line":
        """Replay a ledger."""
        line = cls()
        for entry in ledger.read():
            line.replay(entry)
        return line

    def replay(self, entry: dict[str, Any]) -> None:
        """Take one entry into account."""
        match entry:
            case {"begin": step}:
                self.in_doubt, self.last_step = step, max(step, self.last_step)
                # It may be there, whatever its process is told, if it is told anything.
                for one in self.acknowledged:
                    self.deepest[one] += 1
            case {"done": step}:
                self.in_doubt = None
                self.acknowledged.append(step)
                self.deepest[step] = 0
            case {"moved": step}:
                self.acknowledged = [one for one in self.acknowledged if one <= step]
            case {"naming": name}:
                self.unsure.add(name)
                self.made += 1
            case {"tagged": name, "at": step}:
                self.unsure.discard(name)
                self.tags[name] = step
            case {"forked": name, "at": step}:
                self.unsure.discard(name)
                self.forks[name] = step
            case {"removing": name}:
                self.unsure.add(name)
                self.tags.pop(name, None)
                self.forks.pop(name, None)

    def must_keep(self, last: int) -> list[int]:
        """Return the steps that a policy which keeps the last so many can never have dropped."""
        return [step for step in self.acknowledged if self.deepest[step] < last]
