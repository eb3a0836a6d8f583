"""What was found: one line of JSON per run and contender, appended when it is known and never changed."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tailorstore.study.contenders import FULL
from tailorstore.study.plan import Plan

FILE = "results.jsonl"


@dataclass(frozen=True, slots=True)
class Losses:
    """Held-out loss of a state, and after training on from it."""

    restored: float
    resumed: float


@dataclass(frozen=True, slots=True)
class Look:
    """A composite looked at closely, beside the full checkpoint of the same step."""

    number: int
    step: int
    oldest: float
    """Age of the stalest layer in commits."""
    mean_age: float
    """Mean over layers, in commits."""
    error: float | None
    """Largest recorded relative error of a light version; ``None`` where there is none."""
    full: Losses
    composite: Losses

    def lost(self, when: str) -> float:
        """Return by how many percent the composite's loss is above the full checkpoint's; ``when`` as in Losses."""
        full: float = getattr(self.full, when)
        composite: float = getattr(self.composite, when)
        return 100 * (composite - full) / full


@dataclass(frozen=True, slots=True)
class Record:
    """One contender led along one run."""

    plan: Plan
    contender: str
    """As it was asked for."""
    strategy: str
    """As it was used, with the bytes of the filter in it."""
    parameters: int
    layers: int
    bytes_written: tuple[int, ...]
    """Put into storage by each commit: layer versions, their documents, extra state, manifest. Not the catalog."""
    bytes_full: tuple[int, ...]
    """The same for full commits without codec."""
    bytes_logical: tuple[int, ...]
    """Size of all tensors at each commit."""
    bytes_torch: int
    """Size of one file that ``torch.save`` makes of the full state of model and optimizers."""
    looks: tuple[Look, ...]
    seconds: float
    """Spent in commits."""

    @property
    def key(self) -> str:
        """What makes a record unique."""
        return json.dumps([self.plan.to_json(), self.contender])

    @property
    def share(self) -> float:
        """Cumulative bytes over those of full commits."""
        return sum(self.bytes_written) / sum(self.bytes_full)

    @property
    def bytes_per_commit(self) -> int:
        """Mean over all commits but the first, which is always a full one."""
        return sum(self.bytes_written[1:]) // max(1, len(self.bytes_written) - 1)

    @property
    def torch_share(self) -> float:
        """Cumulative bytes over those of a ``torch.save`` file at each commit."""
        return sum(self.bytes_written) / (self.bytes_torch * len(self.bytes_written))

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Record":
        """Return the record that :meth:`to_json` gave."""
        looks = tuple(
            Look(**{**look, "full": Losses(**look["full"]), "composite": Losses(**look["composite"])})
            for look in values["looks"]
        )
        sizes = {name: tuple(values[name]) for name in ("bytes_written", "bytes_full", "bytes_logical")}
        return cls(**{**values, **sizes, "plan": Plan.from_json(values["plan"]), "looks": looks})


class Results:
    """All records of a folder, and a way to add to them."""

    def __init__(self, folder: Path) -> None:
        """Read what is there."""
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        # A line that was cut off by a crash is made again; what comes next must not be joined to it.
        self._cut_off = bool(text) and not text.endswith("\n")
        self._records = {record.key: record for line in text.splitlines() if (record := _parsed(line)) is not None}

    def __iter__(self) -> Iterator[Record]:
        """Iterate over the records in the order in which they were found."""
        return iter(self._records.values())

    def get(self, plan: Plan, contender: str) -> Record | None:
        """Return what is known of a contender in a run."""
        return self._records.get(json.dumps([plan.to_json(), contender]))

    def add(self, record: Record) -> None:
        """Append a record to the file."""
        line = "\n" * self._cut_off + json.dumps(record.to_json()) + "\n"
        # In one write, so that studies of several tasks can share a file.
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
        self._cut_off = False
        self._records[record.key] = record


def _parsed(line: str) -> Record | None:
    try:
        return Record.from_json(json.loads(line))
    except json.JSONDecodeError:
        return None


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over looks with its standard error; in percent."""

    value: float
    error: float
    """Standard error over all looks of all seeds; 0 for a single one."""
    farthest: float
    """The value that is farthest from 0."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One contender over all seeds of a task and an optimizer."""

    contender: str
    share: float
    oldest: float
    mean_age: float
    restored: Mean
    resumed: Mean
    seeds: int


def summarise(records: Iterable[Record]) -> list[Summary]:
    """Return one summary per contender, in the order in which they first appear; full saves come first."""
    by_contender: dict[str, list[Record]] = {}
    for record in records:
        by_contender.setdefault(record.contender, []).append(record)
    ordered = sorted(by_contender.items(), key=lambda item: item[0] != FULL)
    return [_summary(contender, found) for contender, found in ordered]


def _summary(contender: str, records: list[Record]) -> Summary:
    looks = [look for record in records for look in record.looks]
    return Summary(
        contender,
        share=fmean(record.share for record in records),
        oldest=max(look.oldest for look in looks),
        mean_age=fmean(look.mean_age for look in looks),
        restored=_mean([look.lost("restored") for look in looks]),
        resumed=_mean([look.lost("resumed") for look in looks]),
        seeds=len({record.plan.seed for record in records}),
    )


def _mean(values: list[float]) -> Mean:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Mean(fmean(values), error, max(values, key=abs))
