"""Makes the stores that are kept in ``tests/data``, as this version writes them: ``python -m tests.kit.fixtures``.

What they are for, and when to run this, stands in ``tests/data/README.md``.
"""

import json
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

import tailorstore as ts
from tailorstore.catalog.schema import HEAD
from tailorstore.storage import layers, manifests
from tests.kit import archives
from tests.kit.damages import STORED, Victim, earlier_catalog
from tests.kit.kept import assert_as_kept, same_generators
from tests.kit.stores import GOOD, Made

DATA: Final = Path(__file__).parent.parent / "data"
STORES: Final = DATA / "stores"
DAMAGED: Final = DATA / "damaged"

WORKSHOP: Final = Path(tempfile.gettempdir()) / "tailorstore-fixtures"
"""Where they are made. Catalogs remember it, so it is the same on all machines."""


def formats() -> dict[str, Any]:
    """Return the numbers of the formats that this version writes."""
    return {"documents": manifests.FORMAT, "layers": layers.FORMAT, "schema": HEAD}


def keep(name: str, made: Made) -> None:
    """Put a store into the archive of its name, with what must be read beside it, once that has been read."""
    kept = made.about.get("kept")
    if kept is None:
        with ts.open_store(made.root, create=False) as store:
            kept = made.recorder.kept(store)
            assert_as_kept(store, kept)
            assert store.verify().ok
        archives.settle(made.root / "catalog.sqlite")
    archives.pack(made.root, STORES / f"{ts.__version__}-{name}.tar.xz")
    about = {"written_by": ts.__version__, "formats": formats(), **kept}
    write_json(STORES / f"{ts.__version__}-{name}.json", about)


def keep_damaged(root: Path) -> None:
    """Put the stores into archives that this version's code damages, each made of a copy of ``history``.

    Args:
        root: where that was made.
    """
    kept = json.loads((STORES / f"{ts.__version__}-history.json").read_text())
    for name, damage in STORED.items():
        with workshop("damaged") as copy:
            shutil.copytree(root, copy)
            shutil.copy2(earlier_catalog(root), earlier_catalog(copy))
            damage(Victim(copy, kept, copy))
            let_lapse(copy / "catalog.sqlite")
            archives.settle(copy / "catalog.sqlite")
            archives.pack(copy, DAMAGED / f"{ts.__version__}-{name}.tar.xz")


def let_lapse(catalog: Path) -> None:
    """Let announced commits be of long ago, and of no machine in particular."""
    connection = sqlite3.connect(catalog)
    with connection:
        connection.execute("UPDATE pending SET owner = 'trainer:1', expires_at = '2020-01-01 00:00:00.000000'")
    connection.close()


def write_json(path: Path, value: Any) -> None:
    """Write a dictionary of dictionaries, each of those' entries on a line of its own."""

    def line(key: str, item: Any) -> str:
        return f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=False, sort_keys=True)}"

    def block(item: Any) -> str:
        if not isinstance(item, dict) or not item:
            return json.dumps(item, ensure_ascii=False)
        return "{\n  " + ",\n  ".join(line(key, item[key]) for key in sorted(item)) + "\n }"

    path.write_text("{\n " + ",\n ".join(f"{json.dumps(key)}: {block(value[key])}" for key in value) + "\n}\n")


@contextmanager
def workshop(name: str) -> Iterator[Path]:
    """Give an empty place to make a store in."""
    root = WORKSHOP / name
    shutil.rmtree(root, ignore_errors=True)
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
        earlier_catalog(root).unlink(missing_ok=True)


def main(names: list[str]) -> int:
    """Make the stores of some names, or all."""
    torch.set_num_threads(1)
    for name, make in GOOD.items():
        if not names or name in names:
            with workshop(name) as root, same_generators():
                keep(name, make(root))
                if name == "history":
                    keep_damaged(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
