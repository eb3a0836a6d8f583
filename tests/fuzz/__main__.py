"""Fuzz every parser and whole stores: ``python -m tests.fuzz --minutes 10``, or ``--inputs 1000 --json``."""

import argparse
import faulthandler
import json
import logging
import secrets
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import click

from tests.fuzz.running import Tally, limit_memory, peak_bytes, run
from tests.fuzz.samples import make_sample
from tests.fuzz.targets import all_targets, remove

ROUND = 200
"""Inputs between two looks at the clock, of a target with a share of one."""


def main() -> int:
    """Run, print what was counted, and return 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="go on with fresh inputs for so long")
    length.add_argument("--inputs", type=int, default=ROUND, help="for each parser; the same ones at every run")
    parser.add_argument("--only", help="targets whose name has this in it")
    parser.add_argument("--seed", type=int, default=None, help="begin here (printed by an earlier run)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    faulthandler.enable()
    logging.disable(logging.WARNING)  # layers that cannot be read are warned of, thousands of times
    warnings.simplefilter("error")
    scratch = Path(tempfile.mkdtemp(prefix="tailorstore-fuzz-"))
    try:
        sample = make_sample(scratch / "sample")
        targets = {name: one for name, one in all_targets(sample, scratch).items() if (args.only or "") in name}
        tallies = {name: Tally(name) for name in targets}
        limit_memory()
        before = peak_bytes()
        start = secrets.randbits(32) if args.seed is None else args.seed
        ends = time.monotonic() + 60 * args.minutes if args.minutes is not None else None
        number = 0
        while number == 0 or (ends is not None and time.monotonic() < ends):
            for name, target in targets.items():
                inputs = max(1, round((ROUND if ends is not None else args.inputs) * target.share))
                fixed = ends is None and args.seed is None
                run(name, target, tallies[name], inputs=inputs, start=None if fixed else start + number)
            number += 1
    finally:
        remove(scratch)
    found = [finding for tally in tallies.values() for finding in tally.findings]
    grown = peak_bytes() - before
    if args.json:
        counted = {name: asdict(tally) for name, tally in tallies.items()}
        click.echo(json.dumps({"seed": start, "rounds": number, "memory_grown_bytes": grown, "targets": counted}))
    else:
        _print(tallies, f"seed {start}, {number} rounds, peak memory grew by {grown / 2**20:.0f} MiB", found)
    return 1 if found else 0


def _print(tallies: dict[str, Tally], about: str, found: list[str]) -> None:
    for finding in dict.fromkeys(found):
        click.echo(f"{finding}\n{'-' * 100}")
    click.echo(f"{'target':32} {'inputs':>9} {'refused':>9} {'slowest ms':>10} {'seconds':>8} {'findings':>8}")
    total = Tally("all", sum(one.inputs for one in tallies.values()), sum(one.refused for one in tallies.values()))
    total.slowest_seconds = max(one.slowest_seconds for one in tallies.values())
    total.seconds = sum(one.seconds for one in tallies.values())
    total.findings = found
    for one in (*tallies.values(), total):
        slowest = f"{1000 * one.slowest_seconds:.0f}"
        click.echo(
            f"{one.target:32} {one.inputs:9} {one.refused:9} {slowest:>10} {one.seconds:8.0f} {len(one.findings):8}"
        )
    click.echo(about)


if __name__ == "__main__":
    sys.exit(main())
