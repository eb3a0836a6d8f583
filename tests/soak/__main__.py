"""``python -m tests.soak``: many processes on one store; ``python -m tests.soak interleave``: many schedules."""

import argparse
import contextlib
import logging
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TextIO

from tests.kit.postgres import run_postgres
from tests.kit.s3 import run_s3
from tests.soak.crew import Setting
from tests.soak.interleave import Count, by_chance, every_two_switches, replay, stage
from tests.soak.run import CONTEST, FULL_CREW, SMALL_CREW, Outcome, as_json, soak, table
from tests.soak.scenarios import SCENARIOS

CATALOGS = {"sqlite": ("sqlite",), "postgres": ("postgres",), "both": ("sqlite", "postgres")}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    verbs = main.add_subparsers(dest="verb")
    main.add_argument("--minutes", type=float, default=20.0, help="for each catalog, half of it for take-overs")
    main.add_argument("--catalog", choices=list(CATALOGS), default="both")
    main.add_argument("--storage", choices=["local", "s3"], default="local")
    main.add_argument("--crew", choices=["full", "small"], default="full")
    main.add_argument("--takeovers", choices=["also", "only", "no"], default="also")
    main.add_argument("--seed", type=int, default=0)
    main.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inter = verbs.add_parser("interleave", help="let a few actors meet under a scheduler")
    inter.add_argument("--schedules", type=int, default=2000, help="by chance, over all scenarios in turn")
    inter.add_argument("--systematic", action="store_true", help="also every schedule of two actors with two switches")
    inter.add_argument("--scenario", choices=list(SCENARIOS), action="append")
    inter.add_argument("--seed", type=int, default=0, help="of the first schedule; the next ones count up")
    inter.add_argument("--replay", help="a schedule that a failure printed")
    inter.add_argument("--seconds", type=float, default=1e9, help="end after so long")
    return main


def main(arguments: list[str]) -> int:
    chosen = parser().parse_args(arguments)
    # Take-overs and readers of lost roots are daily bread here.
    logging.getLogger("tailorstore").setLevel(logging.CRITICAL)
    return interleave(chosen) if chosen.verb == "interleave" else run(chosen)


def say(text: str, file: TextIO | None = None) -> None:
    print(text, file=file)


def run(chosen: argparse.Namespace) -> int:
    outcomes: list[Outcome] = []
    seconds = 60 * chosen.minutes
    crew = FULL_CREW if chosen.crew == "full" else SMALL_CREW
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ts-soak-")))
        s3 = stack.enter_context(run_s3()) if chosen.storage == "s3" else None
        kinds = CATALOGS[chosen.catalog]
        postgres = stack.enter_context(run_postgres()) if "postgres" in kinds else None

        def setting(name: str, kind: str, catalogs: int) -> Setting:
            place = folder / name
            place.mkdir()
            urls = []
            for number in range(catalogs):
                if kind == "postgres" and postgres is not None:
                    urls.append(stack.enter_context(postgres.create_database()))
                else:
                    urls.append(f"sqlite:///{place}/catalog-{number}.db")
            if s3 is not None:
                url = f"s3://{s3.bucket}/{uuid.uuid4().hex[:12]}/run"
                return Setting(place, url, tuple(urls), s3.storage_options(), seed=chosen.seed)
            return Setting(place, f"file://{place}/root", tuple(urls), seed=chosen.seed)

        for kind in kinds:
            if chosen.takeovers != "only":
                outcomes.append(soak(kind, setting(kind, kind, 1), crew, seconds))
            if chosen.takeovers != "no":
                name = f"{kind}, take-overs"
                share = seconds if chosen.takeovers == "only" else seconds / 2
                outcomes.append(soak(name, setting(f"{kind}-contest", kind, 2), CONTEST, share))
    say(as_json(outcomes) if chosen.json else table(outcomes))
    for one in outcomes:
        for complaint in one.complaints[:5]:
            say(f"\n{one.name}: {complaint}", file=sys.stderr)
    return 0 if all(one.good for one in outcomes) else 1


def interleave(chosen: argparse.Namespace) -> int:
    names = chosen.scenario or list(SCENARIOS)
    count = Count()
    began = time.monotonic()
    with stage() as scene:
        if chosen.replay is not None:
            told = replay(scene, names[0], chosen.replay)
            say("\n".join(f"{who}: {call}" for who, call in told.calls))
            return 0
        if chosen.systematic:
            for name in names:
                if len(SCENARIOS[name]) == 2:
                    every_two_switches(scene, name, count)
        seeds = range(chosen.seed, chosen.seed + chosen.schedules)
        by_chance(scene, names, seeds, count, chosen.seconds - (time.monotonic() - began))
    for name in names:
        say(f"{name:<40} {count.schedules[name]:>7}")
    say(f"schedules {count.schedules.total():,}, switches {count.switches:,}, calls {count.calls:,}, "
          f"refusals {dict(count.refusals)}, broken {len(count.broken)}, {time.monotonic() - began:.0f} s")  # fmt: skip
    for broken in count.broken[:3]:
        say(f"\n{broken}", file=sys.stderr)
    return 1 if count.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
