"""What a rebuild of the catalog found. Frozen records."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IncompleteCommit:
    """A commit whose manifest is there and some of whose layers are not."""

    id: str
    step: int
    branch: str
    layers: tuple[str, ...]
    """Layers that cannot be read: the document of their version, or of its base, is gone; sorted."""


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """What a take-over found in the root, or, dry, would find."""

    commits: int
    versions: int
    branches: tuple[str, ...]
    tags: tuple[str, ...]
    unplaced: tuple[str, ...] = ()
    """Ids of commits that lost a race or were never published, and whose manifest was left behind."""
    unclaimed: tuple[str, ...] = ()
    """Ids of commits that wrote layers and have no manifest: it was lost, or they never got so far."""
    unreadable: tuple[str, ...] = ()
    """Keys of documents that could not be understood. GC deletes nothing while they are there."""
    dangling: tuple[str, ...] = ()
    """Tags and branches, as ``tag best``, that point to a commit whose manifest is gone or could not be understood:
    they are not among those above, or stand where they stood before."""
    incomplete: tuple[IncompleteCommit, ...] = ()
    """Commits that came back without all of their layers; oldest first."""
    written: tuple[str, ...] = ()
    """Keys of documents that were (dry: would be) written again first: the root had lost them, and its catalog not."""
    epoch: int = 1
    dry_run: bool = False
