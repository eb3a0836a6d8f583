"""What the catalog knows of the time when a commit was made."""

from tailorstore.catalog.catalog import StoreCatalog
from tailorstore.domain.records import Commit, LayerMeasures

HISTORY = 10_000
"""Commits of a branch that ages are counted in; what is older counts as this old."""


def observations(catalog: StoreCatalog, commit: Commit) -> tuple[list[int], dict[str, LayerMeasures]]:
    """Return the steps of a commit and of those that led to it, and what was measured when it was made."""
    return catalog.steps_to(commit.id, HISTORY), catalog.measures_of(commit.id)
