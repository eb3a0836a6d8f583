"""Kill processes at the calls that they make to a store: ``python -m tests.crash [SCENARIO …]``.

Every scenario on SQLite and a local root, on PostgreSQL, and on S3: at every call, and in pairs; and at every write of
SQLite to its files. Prints a table; exits with 1 if anything was lost, damaged or left over. With ``--json PLAN`` it
does what a test asks for, and prints JSON.
"""

import argparse
import dataclasses
import gc
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from tests.crash.campaign import Campaign, Report, SchemaPress
from tests.crash.places import Servers
from tests.crash.scenarios import SCENARIOS
from tests.kit.postgres import run_postgres
from tests.kit.s3 import run_s3

_KINDS: Final = ("files", "writes", "postgres", "s3")
_PAIRS: Final = 25
_ROW: Final = "{:<20} {:<9} {:<8} {:>6} {:>7} {:>6} {:>9} {:>8}"


def campaigns(
    plans: Mapping[str, tuple[str | int, int]], servers: Servers, *, at_writes: bool = False
) -> Iterator[Report]:
    """Run scenarios, each with its plan and number of pairs."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ts-crash-", dir=memory) as name:
        folder = Path(name)
        press = SchemaPress(folder)
        for number, (scenario, (plan, pairs)) in enumerate(plans.items()):
            place = folder / str(number)
            place.mkdir()
            yield Campaign(scenario, servers, press, at_writes=at_writes).run(place, plan, pairs)


def everything(names: Iterable[str], kinds: Iterable[str], every: int) -> int:
    """Run scenarios whole, on all kinds of servers; print a table; return the number of failures."""
    plans: dict[str, tuple[str | int, int]] = dict.fromkeys(
        names, ("calls" if every == 1 else every, -(-_PAIRS // every))
    )
    print(_ROW.format("killed while", "catalog", "storage", "calls", "points", "pairs", "failures", "seconds"))  # noqa: T201
    failures: list[str] = []
    points = pairs = 0
    with ExitStack() as stack:
        for kind in kinds:
            servers = stack.enter_context(_serving(kind))
            began = time.monotonic()
            for report in campaigns(plans, servers, at_writes=kind == "writes"):
                seconds = f"{time.monotonic() - began:.0f}"
                began = time.monotonic()
                row = (
                    report.scenario,
                    report.catalog,
                    "writes" if kind == "writes" else report.storage,
                    report.calls,
                    report.points,
                    report.pairs,
                )
                print(_ROW.format(*row, len(report.failures), seconds), flush=True)  # noqa: T201
                failures += [f"{report.scenario}, {report.catalog}, {report.storage}, {one}" for one in report.failures]
                points += report.points
                pairs += report.pairs
    print(f"{points:,} kills and {pairs:,} pairs of kills: {len(failures)} failures")  # noqa: T201
    for failure in failures:
        print(failure)  # noqa: T201
    return len(failures)


@contextmanager
def _serving(kind: str) -> Iterator[Servers]:
    """Give what stores are made of: a PostgreSQL or an S3 server beside files, or nothing."""
    if kind == "postgres":
        with run_postgres() as postgres:
            yield Servers(postgres=postgres.url())
    elif kind == "s3":
        with run_s3() as s3:
            yield Servers(bucket=s3.bucket, storage_options=s3.storage_options())
    else:
        yield Servers()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help="default: all")
    parser.add_argument("--on", nargs="*", choices=_KINDS, default=_KINDS, help="default: all")
    parser.add_argument("--every", type=int, default=1, help="a share of the calls: every so many-th")
    parser.add_argument("--json", metavar="PLAN", help="scenarios with plan and pairs, servers, at_writes")
    arguments = parser.parse_args()
    # One thread, or the operators' own would be missing in the child.
    torch.set_num_threads(1)
    # Warnings of what the scenarios mean to do.
    logging.getLogger("tailorstore").setLevel(logging.CRITICAL)
    # What the collector of garbage does not touch, fork need not copy.
    gc.freeze()
    if arguments.json is None:
        return 1 if everything(arguments.scenario or SCENARIOS, arguments.on, arguments.every) else 0
    asked: dict[str, Any] = json.loads(arguments.json)
    plans = {name: (plan, pairs) for name, (plan, pairs) in asked["scenarios"].items()}
    found = campaigns(plans, Servers(**asked["servers"]), at_writes=asked["at_writes"])
    reports = [dataclasses.asdict(report) for report in found]
    print(json.dumps(reports))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
