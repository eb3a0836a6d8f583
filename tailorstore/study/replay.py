"""Lead contenders along a run: commit every full state under each one's mask, and look at some composites closely."""

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import tailorstore as ts
from tailorstore.domain.records import EXTRA_LAYER
from tailorstore.study.contenders import FULL, NUDGED, Contender
from tailorstore.study.fullrun import FullRun, Point, Say, manifest_bytes
from tailorstore.study.results import Look, Losses, Record
from tailorstore.study.training import Trainer

CompositeKey = tuple[tuple[str, int], ...]


@dataclass(slots=True)
class _Ride:
    """One contender with a store of its own."""

    contender: Contender
    strategy: ts.Strategy
    root: Path
    store: ts.Store
    bytes_written: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def commit(self, step: int, trainer: Trainer) -> None:
        start = time.perf_counter()
        commit = self.store.commit(step, *trainer.state(), mask=self.strategy)
        self.seconds += time.perf_counter() - start
        self.bytes_written.append(commit.bytes_written + manifest_bytes(self.root, commit))
        # Only the newest composite is looked at, and twenty contenders' histories would fill the disk.
        self.store.gc(ts.KeepLast(1), grace=timedelta(0))


def replay(
    run: FullRun, contenders: Sequence[Contender], scratch: Path, *, filter_bytes: int | None, say: Say
) -> list[Record]:
    """Lead contenders along a run, side by side.

    Args:
        run: is trained first, as far as it has not been.
        contenders: ``all()`` and ``(nudged)`` are understood among them.
        scratch: where the contenders' stores are made; they are removed at the end.
        filter_bytes: what the filter writes per commit, if known.
        say: is told what is going on.

    Returns:
        A record for each.
    """
    plan, trainer = run.plan, run.trainer
    rides: dict[str, _Ride] = {}
    looks: dict[str, list[Look]] = {contender.text: [] for contender in contenders}
    full: list[Point] = []
    bytes_torch = 0
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            for at, contender in enumerate(contenders):
                if contender.text in (FULL, NUDGED):
                    continue
                strategy = contender.mask(filter_bytes)
                root = scratch / str(at)
                store = stack.enter_context(ts.open_store(root, **contender.options()))
                rides[contender.text] = _Ride(contender, strategy, root, store)
            for point in run.points(say):
                full.append(point)
                bytes_torch = bytes_torch or trainer.torch_save_bytes()
                for ride in rides.values():
                    ride.commit(point.step, trainer)
                if point.number in plan.evaluated():
                    say(f"{plan.name}: looking at step {point.step}")
                    _look(point, trainer, contenders, rides, looks)
                    point.reload()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    bytes_full = tuple(point.bytes_full for point in full)
    records = []
    for contender in contenders:
        led = rides.get(contender.text)
        records.append(
            Record(
                plan=plan,
                contender=contender.text,
                strategy=str(led.strategy) if led else contender.text,
                parameters=trainer.parameters,
                layers=run.layers,
                bytes_written=tuple(led.bytes_written) if led else bytes_full,
                bytes_full=bytes_full,
                bytes_logical=tuple(point.bytes_logical for point in full),
                bytes_torch=bytes_torch,
                looks=tuple(looks[contender.text]),
                seconds=led.seconds if led else 0.0,
            )
        )
    return records


def _look(
    point: Point,
    trainer: Trainer,
    contenders: Sequence[Contender],
    rides: dict[str, _Ride],
    looks: dict[str, list[Look]],
) -> None:
    """Look at every contender's newest composite."""
    plan = trainer.plan
    full = _losses(trainer, point.step)
    known: dict[CompositeKey, Losses] = {}
    for contender in contenders:
        if contender.text in (FULL, NUDGED):
            composite = full
            if contender.text == NUDGED:
                point.reload()
                trainer.nudge()
                composite = _losses(trainer, point.step)
            looks[contender.text].append(Look(point.number, point.step, 0, 0.0, None, full, composite))
            continue
        # Opened anew, as whoever resumes would; and so the writer's own knowledge is not disturbed.
        with ts.open_store(rides[contender.text].root) as reader, reader.checkout() as checkpoint:
            key = _key(checkpoint)
            if key is None or key not in known:
                trainer.load(checkpoint)
                losses = _losses(trainer, point.step)
                if key is not None:
                    known[key] = losses
            else:
                losses = known[key]
            infos = reader.layers()
        ages = [(point.step - info.source_step) / plan.every for info in infos if info.name != EXTRA_LAYER]
        errors = [info.error for info in infos if info.error is not None]
        looks[contender.text].append(
            Look(
                point.number,
                point.step,
                max(ages),
                sum(ages) / len(ages),
                max(errors, default=None),
                full,
                losses,
            )
        )


def _key(checkpoint: ts.Checkpoint) -> CompositeKey | None:
    """Return what makes a composite of full versions of this run the one it is; ``None`` with light ones in it."""
    if "light" in checkpoint.fidelity.values():
        return None
    return tuple(sorted(checkpoint.sources.items()))


def _losses(trainer: Trainer, step: int) -> Losses:
    """Return the held-out loss of the state that the trainer holds, and after training on from it."""
    restored = trainer.held_out()
    trainer.advance(step, trainer.plan.resume)
    return Losses(restored, trainer.held_out())
