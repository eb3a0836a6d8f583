"""The demo as a whole: start the trainer, kill it in the middle of a commit, start it again, look at what is there."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import tailorstore as ts
from tailorstore.demo.model import Size
from tailorstore.demo.train import Plan

MARKER = "demo.json"
"""Stands in the root of a store that this demo made, so that a later demo may replace it."""

_OWN_FILES = frozenset({MARKER, "tailorstore.json", "catalog.sqlite", "layers", "commits", "refs"})
_KILL_AFTER = 0.55
"""Which part of the way the trainer is killed at."""
_ATTEMPTS = 5
_LOOK_SECONDS = 0.0005
_PATIENCE_SECONDS = 60.0
_LAYERS_BEGUN = 2
"""So many layers must have objects in the root before the commit counts as under way."""

Report = Callable[[str, dict[str, Any]], None]
"""Is told of every event, the trainer's and the story's own: its name, and what belongs to it."""


class DemoError(RuntimeError):
    """The trainer ended when it should not have; the message ends with what it said."""


@dataclass(frozen=True, slots=True)
class Crash:
    """A commit that was killed."""

    step: int
    """Step of the commit that was under way."""
    head: int | None
    """Step of the newest published commit then."""
    objects: int
    """Objects of the unpublished commit that lie in the root."""
    objects_bytes: int


@dataclass(frozen=True, slots=True)
class Losses:
    """Training and held-out loss, in nats a byte."""

    before_kill: float
    """Mean training loss between the last published commit and the kill."""
    held_out_committed: float
    """Held-out loss of the live model at the commit that was then restored."""
    held_out_restored: float
    """Held-out loss of the restored composite."""
    after_restart: float
    """Mean training loss over as many steps after the restart."""
    held_out_end: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What happened, and where to look at it."""

    store: str
    """The root, as a path."""
    seconds: float
    parameters: int
    text_bytes: int
    mask: str
    """The strategy that chose what commits wrote."""
    crash: Crash
    losses: Losses
    commits: list[ts.Commit]
    """Newest first."""
    branches: list[Any]
    """As ``Store.branches`` returns them."""
    layers: list[Any]
    """Layers of the newest composite, as ``Store.layers`` returns them."""
    bytes_written: int
    bytes_full: int
    """What a full save at each of these commits would have written."""
    leftovers: int
    """Layer versions and documents of the killed commit that gc would delete."""
    leftovers_bytes: int


def demo_plan(folder: Path, *, steps: int | None = None, quick: bool = False, mask: str | None = None) -> Plan:
    """Return what the demo trains: 3.8 million parameters, or a tiny model for those in a hurry.

    Raises:
        MaskError: the mask is no strategy.
    """
    if quick:
        size = Size(blocks=6, width=64, heads=2, context=64)
        plan = Plan(
            str(folder),
            steps=24,
            commit_every=3,
            mask="budget('1.5 MB').max_age(commits=5)",
            batch=4,
            held_out_batches=1,
            lease_seconds=1.5,
            size=size,
        )
    else:
        plan = Plan(str(folder))
    if mask is not None:
        plan = replace(plan, mask=str(ts.parse_strategy(mask)))
    if steps is None:
        return plan
    # Sixteen commits, however long it is.
    return replace(plan, steps=steps, commit_every=max(1, steps // 16))


def prepare(folder: Path) -> None:
    """Make room for a demo's store: a folder that is new, empty, or holds nothing but an earlier demo's store.

    Raises:
        AlreadyExistsError: there is something else.
    """
    if folder.exists():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        own = {name for name in names if name in _OWN_FILES or name.startswith("catalog.sqlite-")}
        if names and (MARKER not in names or names != own):
            msg = f"{folder} exists and is not the store of an earlier demo; name another folder with --to"
            raise ts.AlreadyExistsError(msg)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text(json.dumps({"made_by": f"tailorstore demo {ts.__version__}"}) + "\n")


def run_demo(folder: Path, plan: Plan, report: Report) -> DemoResult:
    """Carry the whole story out; takes a minute or two.

    Args:
        folder: made ready by :func:`prepare`; the store stays there.
        plan: what to train; its store is ``folder``.
        report: is told what happens.

    Raises:
        DemoError: the trainer failed.
        AlreadyExistsError: the folder holds something else.
    """
    started = time.monotonic()
    seen = _Seen(report)
    crash = _train_until_killed(folder, plan, seen)
    with _trainer(plan) as trainer:
        for name, values in trainer.events():
            seen.event(name, values)
        trainer.finish()
    _wait_for_lease(plan, seen)
    with ts.open_store(folder, create=False) as store:
        commits, branches, layers = store.log(), store.branches(), store.layers()
        swept = store.gc(dry_run=True, grace=timedelta(0))
    return DemoResult(
        store=str(folder),
        seconds=time.monotonic() - started,
        parameters=seen.parameters,
        text_bytes=seen.text_bytes,
        mask=plan.mask,
        crash=crash,
        losses=seen.losses(crash, commits),
        commits=commits,
        branches=branches,
        layers=layers,
        bytes_written=sum(commit.bytes_written for commit in commits),
        bytes_full=sum(commit.bytes_logical for commit in commits),
        leftovers=swept.leftovers_swept,
        leftovers_bytes=swept.bytes_freed,
    )


def _train_until_killed(folder: Path, plan: Plan, seen: "_Seen") -> Crash:
    """Run the trainer and kill it while a commit is half written.

    A commit takes milliseconds, and one that was published a moment before is no crash in mid-commit: then the
    trainer is started again, and a later commit is tried.
    """
    for attempt in range(_ATTEMPTS):
        first = int(plan.steps * _KILL_AFTER) + attempt * plan.commit_every
        old = set(_versions(folder))
        step = 0
        with _trainer(plan) as trainer:
            for name, values in trainer.events():
                seen.event(name, values)
                if name == "committing":
                    step = values["step"]
                    if step >= first:
                        trainer.kill_when(lambda old=old: bool(_half_written(folder, old)))  # type: ignore[misc]
            if not trainer.killed:
                trainer.finish()
                break
        if (crash := _look(folder, old, step)) is not None:
            seen.killed_at = time.monotonic()
            seen.event("killed", asdict(crash))
            return crash
        seen.event("missed", {"step": step})
    msg = (
        "every commit was published before the trainer could be killed in the middle of it; try again with more --steps"
    )
    raise DemoError(msg)


def _versions(folder: Path) -> dict[str, set[str]]:
    """Return the ids of all layer versions that have objects in the root, with their layers."""
    found: dict[str, set[str]] = {}
    layers = folder / "layers"
    if layers.is_dir():
        for layer in os.scandir(layers):
            for version in os.scandir(layer.path):
                found.setdefault(version.name, set()).add(layer.name)
    return found


def _half_written(folder: Path, old: set[str]) -> list[str]:
    """Return the ids of versions of which some layers have been begun, and no manifest has been written."""
    begun = [version for version, layers in _versions(folder).items() if len(layers) >= _LAYERS_BEGUN]
    return [
        version for version in begun if version not in old and not (folder / "commits" / f"{version}.json").exists()
    ]


def _look(folder: Path, old: set[str], step: int) -> Crash | None:
    """Return what the kill left behind; ``None`` if it came too late, or before the first object."""
    with ts.open_store(folder, create=False) as store:
        published = store.log() if store.branches() else []
    head = published[0].step if published else None
    ids = _versions(folder).keys() - old - {commit.id for commit in published}
    if not ids or (head is not None and head >= step):
        return None
    objects = [path for version in ids for path in folder.glob(f"layers/*/{version}/**/*") if path.is_file()]
    return Crash(step, head, len(objects), sum(path.stat().st_size for path in objects))


def _wait_for_lease(plan: Plan, seen: "_Seen") -> None:
    """Wait until the killed commit's claim has lapsed: before that, gc leaves its objects alone."""
    left = seen.killed_at + plan.lease_seconds + 0.5 - time.monotonic()
    if left > 0:
        time.sleep(left)


class _Seen:
    """Passes events on, and keeps what the result needs of them."""

    def __init__(self, report: Report) -> None:
        self.parameters = 0
        self.text_bytes = 0
        self.killed_at = 0.0
        self._report = report
        self._losses: list[list[tuple[int, float]]] = []
        self._held_out: dict[int, float] = {}
        self._restored = math.nan

    def event(self, name: str, values: dict[str, Any]) -> None:
        if name == "training":
            self.parameters, self.text_bytes = values["parameters"], values["text_bytes"]
            self._losses.append([])
        elif name == "step":
            self._losses[-1].append((values["step"], values["loss"]))
        elif name == "committing":
            self._held_out[values["step"]] = values["held_out"]
        elif name == "restored":
            self._restored = values["held_out"]
        self._report(name, values)

    def losses(self, crash: Crash, commits: Sequence[ts.Commit]) -> Losses:
        """Compare the last steps before the kill with as many after the restart."""
        head = crash.head or 0
        before = [loss for step, loss in self._losses[-2] if head < step <= crash.step]
        after = [loss for step, loss in self._losses[-1] if head < step <= crash.step]
        return Losses(
            before_kill=_mean(before),
            held_out_committed=self._held_out.get(head, math.nan),
            held_out_restored=self._restored,
            after_restart=_mean(after),
            held_out_end=commits[0].metrics["held_out"],
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class _Trainer:
    """A trainer's process, from the side of the one who started it."""

    def __init__(self, process: "subprocess.Popen[str]", errors: IO[str]) -> None:
        self.killed = False
        self._process = process
        self._errors = errors

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what the trainer tells, until it ends; its last words too if it was killed."""
        if self._process.stdout is None:
            return
        for line in self._process.stdout:
            if not line.endswith("}\n"):
                continue  # killed in the middle of a line
            values = json.loads(line)
            yield values.pop("event"), values

    def kill_when(self, moment: Callable[[], bool]) -> None:
        """Wait for a moment and kill the trainer in it, without giving it a chance to do anything about it."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while self._process.poll() is None and time.monotonic() < until:
            if moment():
                self._process.send_signal(signal.SIGKILL)
                self.killed = True
                return
            time.sleep(_LOOK_SECONDS)

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            DemoError: it failed.
        """
        if self._process.wait() != 0:
            self._errors.seek(0)
            msg = f"the trainer ended with code {self._process.returncode}:\n{self._errors.read()[-3000:]}"
            raise DemoError(msg)


@contextmanager
def _trainer(plan: Plan) -> Iterator[_Trainer]:
    command = [sys.executable, "-m", "tailorstore.demo.train", plan.to_json()]
    # Threads that wait by spinning would take the processor from the commit that is being written behind them.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)  # noqa: S603
        try:
            with process:
                try:
                    yield _Trainer(process, errors)
                finally:
                    process.kill()
        finally:
            process.wait()
