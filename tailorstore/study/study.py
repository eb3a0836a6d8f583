"""The whole study of one task and optimizer: train, replay, write down, draw. Interrupted, it goes on where it was."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tailorstore.domain.errors import NotFoundError
from tailorstore.study.contenders import FILTERS, FULL, NUDGED, SHOWN_LIGHT, Contender, parse_contender
from tailorstore.study.factors import Row, factors_table, measure_factors
from tailorstore.study.fullrun import FullRun, Say
from tailorstore.study.picture import draw
from tailorstore.study.plan import Plan
from tailorstore.study.replay import replay
from tailorstore.study.results import Record, Results, Summary, summarise
from tailorstore.study.table import write_table
from tailorstore.study.training import Trainer


@dataclass(frozen=True, slots=True)
class Folders:
    """Where things go."""

    out: Path
    """Results, tables, pictures."""
    work: Path
    """Runs, stored in full; kept, so that contenders can be added later."""
    scratch: Path
    """The contenders' stores, while they are led along; in memory if possible."""


@contextmanager
def make_folders(out: Path, work: Path | None) -> Iterator[Folders]:
    """Choose and make the folders; what is only for a while is removed at the end."""
    base = Path("/dev/shm")  # noqa: S108 - in memory, where there is that
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="tailorstore-study-", dir=base if os.access(base, os.W_OK) else out
    ) as scratch:
        yield Folders(out, work or out / "runs", Path(scratch))


def draw_results(plan: Plan, folders: Folders) -> tuple[list[Summary], list[Path]]:
    """Write the table and the pictures of all that is known of a plan's task, size and optimizer.

    Returns:
        What the table says, and the files.

    Raises:
        NotFoundError: nothing is known.
        MissingDependencyError: matplotlib is not installed.
    """
    results = Results(folders.out)
    # Of the same length and pace: others cannot be compared.
    records = [record for record in results if replace(record.plan, seed=plan.seed) == plan]
    if not records:
        msg = f"{results.path} has no results of {plan.group} with these settings"
        raise NotFoundError(msg)
    path = folders.out / f"{plan.group}.md"
    write_table(path, records)
    return summarise(records), [results.path, path, *draw(folders.out, plan.group, records)]


def run_study(
    plan: Plan, seeds: Sequence[int], contenders: Sequence[str], folders: Folders, *, keep: bool, say: Say
) -> list[Record]:
    """Lead contenders along one run per seed; what is known already is not done again.

    Args:
        plan: its seed is replaced.
        seeds: of the runs.
        contenders: as ``parse_contender`` reads them.
        folders: where things go.
        keep: store every state of a run; ``False`` for models too large for that: these are trained anew for every
            pass.
        say: is told what is going on.

    Returns:
        The records of this plan, these seeds and these contenders.

    Raises:
        InvalidInputError, MaskError: a contender cannot be understood; nothing was done.
        MissingDependencyError: a package that the task needs is not installed.
        AlreadyExistsError: the work folder holds a run of the same name with other settings.
    """
    asked = list(dict.fromkeys([Contender(FULL), Contender(NUDGED), *map(parse_contender, contenders)]))
    results = Results(folders.out)
    for seed in seeds:
        _run_seed(replace(plan, seed=seed), asked, results, folders, keep=keep, say=say)
    found = [results.get(replace(plan, seed=seed), contender.text) for seed in seeds for contender in asked]
    return [record for record in found if record is not None]


def run_factors(plan: Plan, folders: Folders, *, keep: bool, say: Say) -> tuple[list[Row], Path]:
    """Find out where each factor of the bytes comes from, along the run of the plan's seed, and write a table of it.

    Returns:
        Its rows, and the file.

    Raises:
        MissingDependencyError, AlreadyExistsError: as :func:`run_study`.
    """
    run = FullRun(Trainer(plan), folders.work, keep=keep)
    try:
        rows = measure_factors(run, FILTERS[plan.task], SHOWN_LIGHT, folders.scratch / "factors", say=say)
    finally:
        run.close()
    path = folders.out / f"{plan.group}-factors.md"
    path.write_text(factors_table(rows, plan.group))
    return rows, path


def _run_seed(
    plan: Plan, contenders: Sequence[Contender], results: Results, folders: Folders, *, keep: bool, say: Say
) -> None:
    left = [contender for contender in contenders if results.get(plan, contender.text) is None]
    if not left:
        say(f"{plan.name}: known already")
        return
    # First those that need no other's figures: the filter is one of them.
    for group in (
        [contender for contender in left if not contender.asks_for_filter],
        [contender for contender in left if contender.asks_for_filter],
    ):
        if not group:
            continue
        filters = [record for record in results if record.plan == plan and record.contender.startswith("filter(")]
        filter_bytes = filters[0].bytes_per_commit if filters else None
        run = FullRun(Trainer(plan), folders.work, keep=keep)
        try:
            for record in replay(run, group, folders.scratch / "replay", filter_bytes=filter_bytes, say=say):
                results.add(record)
        finally:
            run.close()
