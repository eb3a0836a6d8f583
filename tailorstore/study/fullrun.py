"""The one training run that all contenders follow, stored in full at every commit."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import tailorstore as ts
from tailorstore.domain.errors import AlreadyExistsError
from tailorstore.domain.names import manifest_key
from tailorstore.domain.records import EXTRA_LAYER
from tailorstore.study.training import Trainer

Say = Callable[[str], None]

_PLAN = "plan.json"


@dataclass(frozen=True, slots=True)
class Point:
    """One commit of the run. While it is looked at, the trainer holds the full state of its step."""

    number: int
    step: int
    bytes_full: int
    """What storing the full state put into storage, all documents included."""
    bytes_unchanged: int
    """What layers take in storage that the commit found unchanged and did not write again."""
    bytes_logical: int
    """Size of its tensors."""
    reload: Callable[[], None]
    """Puts the full state back into the trainer."""


class FullRun:
    """A run and its store. Trained once; what was trained before is not trained again."""

    def __init__(self, trainer: Trainer, folder: Path, *, keep: bool = True) -> None:
        """Open the run's store, making it if there is none.

        Args:
            trainer: a fresh one, with the initial weights of its plan.
            folder: of all runs; this one's is made in it.
            keep: keep the state of every commit, so that further contenders can follow later; otherwise only the
                newest is kept, for models that are too large, and every pass trains anew.

        Raises:
            AlreadyExistsError: the folder holds a run of another plan.
        """
        self.trainer = trainer
        self.plan = trainer.plan
        self._keep = keep
        self.folder = folder / self.plan.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_plan()
        if not keep:
            shutil.rmtree(self.folder / "full", ignore_errors=True)
        self._store = ts.open_store(self.folder / "full")

    @property
    def layers(self) -> int:
        """Number of layers of the model."""
        return sum(info.name != EXTRA_LAYER for info in self._store.layers())

    def close(self) -> None:
        """Close the store; the run stays."""
        self._store.close()

    def _check_plan(self) -> None:
        path = self.folder / _PLAN
        # How closely a run is looked at does not change it.
        mine = self.plan.to_json() | {"evaluations": None}
        if path.exists() and json.loads(path.read_text()) != mine:
            msg = (
                f"{self.folder} holds a run with other settings ({path.read_text().strip()}): give another folder with"
                " --work, or remove it"
            )
            raise AlreadyExistsError(msg)
        path.write_text(json.dumps(mine) + "\n")

    def train(self, say: Say) -> None:
        """Train to the end and commit every state in full, from wherever the store stands."""
        done = self._commits()
        if len(done) >= self.plan.commits:
            return
        if done:
            self._load(done[-1])
        say(f"{self.plan.name}: training {self.trainer.parameters / 1e6:.1f} M parameters for {self.plan.steps} steps")
        for number in range(len(done), self.plan.commits):
            self._advance(number)

    def points(self, say: Say) -> Iterator[Point]:
        """Yield every commit in turn, with its full state in the trainer."""
        if self._keep:
            self.train(say)
            for number, commit in enumerate(self._commits()[: self.plan.commits]):
                yield self._point(number, commit)
        else:
            for number in range(self.plan.commits):
                yield self._point(number, self._advance(number))
                self._store.gc(ts.KeepLast(1), grace=timedelta(0))

    def _commits(self) -> list[ts.Commit]:
        if all(branch.commit is None for branch in self._store.branches()):
            return []
        return self._store.log()[::-1]

    def _advance(self, number: int) -> ts.Commit:
        step = self.plan.step_of(number)
        loss = self.trainer.advance(step - self.plan.every, self.plan.every)
        return self._store.commit(step, *self.trainer.state(), metrics={"loss": loss})

    def _load(self, commit: ts.Commit) -> None:
        with self._store.checkout(commit) as checkpoint:
            self.trainer.load(checkpoint)

    def _point(self, number: int, commit: ts.Commit) -> Point:
        def reload() -> None:
            self._load(commit)

        reload()
        written = commit.bytes_written + manifest_bytes(self.folder / "full", commit)
        unchanged = sum(layer.bytes_stored for layer in self._store.layers(commit) if layer.staleness)
        return Point(number, commit.step, written, unchanged, commit.bytes_logical, reload)


def manifest_bytes(root: Path, commit: ts.Commit) -> int:
    """Return the size of a commit's manifest, which ``bytes_written`` does not count."""
    return (root / manifest_key(commit.id)).stat().st_size
