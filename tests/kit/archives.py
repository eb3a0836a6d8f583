"""Folders as archives that are the same bytes wherever they are packed: sorted, with fixed times, nobody's name."""

import lzma
import sqlite3
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

MOMENT: Final = 1_577_836_800
"""Seconds of the beginning of 2020: what lies in an archive is older than any grace period."""


def pack(folder: Path, archive: Path) -> None:
    """Write a folder's files into a ``.tar.xz``; empty folders are left out, as object storage has none."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with (
        lzma.open(archive, "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in files_in(folder):
            tar.add(path, arcname=str(path.relative_to(folder)), filter=_plain)


def unpack(archive: Path, folder: Path) -> Path:
    """Make a folder of an archive, and return it."""
    with tarfile.open(archive, "r:xz") as tar:
        # Python before 3.11.4, as Debian 12 has it, knows no filters; these archives are our own.
        safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(folder, **safely)  # noqa: S202
    return folder


def files_in(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, sorted."""
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def settle(catalog: Path) -> None:
    """Bring all of a closed SQLite database into one file, without what was deleted from it: names of machines, say."""
    connection = sqlite3.connect(catalog, isolation_level=None)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    for beside in catalog.parent.glob(f"{catalog.name}-*"):
        beside.unlink()


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime, info.mode = MOMENT, 0o644
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info
