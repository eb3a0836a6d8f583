"""`make bench`: every figure of the README in one run, with servers of its own.

make bench                            all of it, about ten minutes
make bench ARGS="local s3"            some of it
make bench ARGS="--json"              for programs
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tailorstore.bench import local, ranks, remote, selection, spread
from tailorstore.bench.report import Row, machine, show
from tests.bench import catalog_scale
from tests.kit.postgres import run_postgres
from tests.kit.s3 import run_s3

PARTS = ("local", "selection", "ranks", "scale", "s3", "catalog")
CATALOG_TARGETS_MS = {"resolve": 10.0, "log": 10.0, "publish": 50.0}


def say(text: str) -> None:
    print(f"· {text}", file=sys.stderr, flush=True)


def s3(gigabytes: float, repeat: int) -> list[Row]:
    with run_s3() as server:
        url = f"s3://{server.bucket}/bench"
        return remote.measure(url, server.storage_options(), gigabytes=gigabytes, repeat=repeat, say=say)


def catalog(url: str, name: str, versions: int) -> Iterator[Row]:
    say(f"{name}: filling a catalog with {versions:,} layer versions")
    catalog_scale.fill(url, versions=versions)
    for measured in catalog_scale.measure(url):
        target = next((ms for verb, ms in CATALOG_TARGETS_MS.items() if measured.verb.startswith(verb)), None)
        yield Row(f"{name}: {measured.verb}, 95th percentile", measured.p95_ms, "ms", target=target)


def catalogs(versions: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        rows = list(catalog(f"sqlite:///{Path(folder) / 'scale.sqlite'}", "SQLite", versions))
    with run_postgres(durable=True) as server, server.create_database() as url:
        rows += catalog(url, "Postgres", versions)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; default all")
    parser.add_argument("--gigabytes", type=float, default=1.6, help="size of the training state (1.6)")
    parser.add_argument("--s3-gigabytes", type=float, default=0.5, help="its size on S3 (0.5)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each, interleaved; medians are shown (5)")
    parser.add_argument("--versions", type=int, default=1_000_000, help="layer versions in the catalogs (1,000,000)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    tables: dict[str, list[Row]] = {}
    for part in options.parts or PARTS:
        say(f"measuring: {part}")
        if part == "local":
            tables[part] = local.measure(
                local.default_folder(), gigabytes=options.gigabytes, repeat=options.repeat, say=say
            )
        elif part == "selection":
            tables[part] = selection.measure(
                local.default_folder(), gigabytes=options.gigabytes, repeat=options.repeat, say=say
            )
        elif part == "ranks":
            tables[part] = ranks.measure(
                local.default_folder(), gigabytes=options.gigabytes, repeat=options.repeat, say=say
            )
        elif part == "scale":
            tables[part] = spread.rows(say=say)
        elif part == "s3":
            tables[part] = s3(options.s3_gigabytes, options.repeat)
        else:
            tables[part] = catalogs(options.versions)
        if not options.json:
            show(tables[part], f"{part}: {machine()}")
    if options.json:
        print(json.dumps({part: [row.as_json() for row in rows] for part, rows in tables.items()}, indent=1))


if __name__ == "__main__":
    main()
