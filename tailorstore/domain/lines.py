"""Lines: append-only runs of commits with growing steps, along which the histories of commits and branches run."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LineRun:
    """One of the lines along which the history of a commit or of a branch runs."""

    line: str
    """Id of the line: that of the commit or of the record of a branch that began it."""
    until: int | None = None
    """Last of its steps that counts: where the next line forked off. ``None`` for the newest line: all count."""


@dataclass(frozen=True, slots=True)
class Tip:
    """Where a branch points: what a rebuild needs to make it again."""

    commit: str
    line: str
    """Id of the line that its next commit goes to."""
