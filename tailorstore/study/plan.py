"""What a study is about: which run to train, how often to commit, where to look closely."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from tailorstore.domain.errors import InvalidInputError

TASKS = ("pretrain", "finetune", "vision")
OPTIMIZERS = ("adamw", "lion", "muon", "adafactor")
SIZES = ("tiny", "small", "300m")
PRECISIONS = ("float32", "mixed")

EVERY = {"pretrain": 10, "finetune": 4, "vision": 10}
"""Steps between commits, by task."""
RESUME = {"pretrain": 20, "finetune": 10, "vision": 20}
"""Steps to train on from a composite, by task."""

_PERIODS = 2 * 5
"""Masks take turns every 2 (parity) and every 5 commits (the filter)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One training run, and where composites are looked at."""

    task: str
    optimizer: str
    size: str = "small"
    seed: int = 0
    """Of the initial weights and of the order of the data."""
    commits: int = 50
    every: int = 10
    """Steps between commits; the first commit is at this step."""
    evaluations: int = 4
    """At how many commits composites are restored and trained on."""
    resume: int = 20
    """For how many steps."""
    precision: str = "float32"
    """What a state holds of a parameter: ``float32``, itself and its slots; ``mixed``, as large models are trained,
    bfloat16 weights, of which float32 masters stand among the slots."""
    freeze: str = ""
    """Globs of parameter names that are not trained, separated by commas."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

        Raises:
            InvalidInputError: names the setting.
        """
        for what, value, known in (
            ("task", self.task, TASKS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("size", self.size, SIZES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                msg = f"unknown {what} {value!r}; use one of {', '.join(known)}"
                raise InvalidInputError(msg)
        if self.size == "300m" and self.task != "pretrain":
            msg = f"there is no size '300m' of the task {self.task!r}; use 'small' or 'tiny'"
            raise InvalidInputError(msg)
        for what in ("commits", "every", "evaluations", "resume"):
            if getattr(self, what) < 1:
                msg = f"{what} must be at least 1, not {getattr(self, what)}"
                raise InvalidInputError(msg)
        if self.commits < self.evaluations:
            msg = f"{self.commits} commits are fewer than {self.evaluations} evaluations"
            raise InvalidInputError(msg)

    @property
    def name(self) -> str:
        """Name of the run, and of the folder that it is kept in."""
        return f"{self.group}-{self.seed}"

    @property
    def group(self) -> str:
        """What runs that differ only in the seed share; they are tabled and drawn together."""
        mixed = "-mixed" if self.precision == "mixed" else ""
        return f"{self.task}-{self.size}-{self.optimizer}{mixed}{'-frozen' if self.freeze else ''}"

    def is_frozen(self, name: str) -> bool:
        """Tell whether a parameter is not trained."""
        return any(fnmatchcase(name, glob.strip()) for glob in self.freeze.split(","))

    @property
    def steps(self) -> int:
        """Steps up to the last commit."""
        return self.commits * self.every

    @property
    def horizon(self) -> int:
        """Steps that the learning rate's schedule spans: up to where the last composite has been trained on."""
        return self.steps + self.resume

    def step_of(self, number: int) -> int:
        """Return the step of a commit, counted from 0."""
        return (number + 1) * self.every

    def evaluated(self) -> tuple[int, ...]:
        """Return the numbers of the commits to look at, from the last one backwards in even strides.

        The stride has no factor in common with the turns that masks take, so that composites are met at every age.

        Examples:
            >>> Plan("pretrain", "adamw").evaluated()
            (22, 31, 40, 49)
        """
        stride = max(1, self.commits // (self.evaluations + 1))
        while math.gcd(stride, _PERIODS) > 1:
            stride -= 1
        return tuple(self.commits - 1 - stride * back for back in reversed(range(self.evaluations)))

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """Return the plan that :meth:`to_json` gave."""
        return cls(**values)
