"""Ways to damage what lies in a local root, and where to find it."""

import json
import os
import re
from pathlib import Path

import tailorstore as ts
from tailorstore.domain.names import version_prefix
from tailorstore.storage.checksums import BLANK, CHECKSUM, sealed


def prefix_of(store: ts.Store, layer: str, ref: str | int = "latest", *, base: bool = False) -> str:
    """Return the prefix of a composite's version of a layer, or of that one's base."""
    composite = store._catalog.composite(store.show(ref).id)
    version = (composite.bases if base else composite.versions)[layer]
    return version_prefix(layer, version.version_id)


def files_of(root: Path, prefix: str, pattern: str) -> list[Path]:
    """Return the files of a version: its ``chunks``, its ``group`` document, its other ``documents``."""
    files = sorted(path for path in (root / prefix).rglob("*") if path.is_file())
    documents = [path for path in files if path.name == "zarr.json"]
    group = root / prefix / "zarr.json"
    found = {
        "chunks": [path for path in files if path not in documents],
        "group": [group],
        "documents": [path for path in documents if path != group],
    }[pattern]
    assert found, (prefix, pattern)
    return found


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def shorten(path: Path) -> None:
    """Take the last byte away."""
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    """Add a byte."""
    with path.open("ab") as file:
        file.write(b"\0")


def remove(path: Path) -> None:
    """Delete it."""
    path.unlink()


def make_newer(path: Path) -> None:
    """Make a document one that a newer version of tailorstore wrote: whole by its checksum, and of a later format."""
    described = json.loads(path.read_text())
    ours = described["attributes"]["tailorstore"] if path.name == "zarr.json" else described
    ours |= {"format": 2, "new": "thing", CHECKSUM: BLANK}
    path.write_bytes(sealed(json.dumps(described, indent=1).encode()))


def flip_format(path: Path) -> None:
    """Change one bit, so that a document seems to be of a later format."""
    changed, times = re.subn(rb'("format": ?)1\b', rb"\g<1>9", path.read_bytes())
    assert times == 1, path
    path.write_bytes(changed)
