"""Who may read what is written: everything follows the umask, and what nobody else needs is private whatever it is."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

WRITE: Final = """
import json, os, stat, sys
import torch
import tailorstore as ts

def write(umask, root, export):
    os.umask(umask)
    with ts.open_store(root, chunk_bytes=1024) as store:
        store.commit(1, {"a.w": torch.arange(600.0)})
        store.commit(2, {"a.w": torch.arange(600.0) + 1}, extra={"array": torch.arange(5)})
        store.tag("best", 1)
        store.checkout().export(f"{export}/model.safetensors")
        store.checkout().export(f"{export}/model.pt", format="torch")
        # While it is open, so that what SQLite keeps beside its file is there.
        paths = [os.path.join(folder, name) for folder, _, files in os.walk(root) for name in [".", *files]]
        paths += [f"{export}/{name}" for name in os.listdir(export)]
        return {path: os.stat(path).st_mode for path in paths}

folder = sys.argv[1]
found = {umask: write(int(umask, 8), f"{folder}/{umask}", f"{folder}/export-{umask}") for umask in sys.argv[2:]}
print(json.dumps(found))
"""
UMASKS: Final = ("077", "022", "002")


def python(script: str, *args: str, **environment: str) -> Any:
    """Return what a script of Python prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_files_and_folders_of_a_root_and_exports_follow_the_umask(tmp_path: Path) -> None:
    for umask in UMASKS:
        (tmp_path / f"export-{umask}").mkdir()
    # A folder that a group shares: whatever is made in it belongs to the group.
    (tmp_path / "002").mkdir()
    (tmp_path / "002").chmod(0o2775)
    found = python(WRITE, str(tmp_path), *UMASKS)
    for umask in UMASKS:
        names = {Path(path).name for path in found[umask]}
        assert names >= {"catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", "tailorstore.json", "zarr.json"}
        assert names >= {"model.safetensors", "model.pt", "c.0"}
        masked = ~int(umask, 8)
        for path, mode in found[umask].items():
            if stat.S_ISDIR(mode):
                assert mode & 0o777 == 0o777 & masked, (path, oct(mode))
                assert bool(mode & stat.S_ISGID) == (umask == "002"), path
            else:
                assert mode & 0o777 == 0o666 & masked, (path, oct(mode))


PRIVATE: Final = """
import json, os, stat, sys
import torch
import tailorstore as ts
from tailorstore.engine.opening import default_catalog

os.umask(0)
found = {}

def look(folder):
    found[os.path.basename(folder)] = stat.S_IMODE(os.stat(folder).st_mode)

with ts.open_store("memory://modes") as store:
    store.commit(1, {"a.w": torch.ones(3)})
    look(os.path.dirname(default_catalog("memory://modes").removeprefix("sqlite:///")))
# As a remote root has it, without the server.
remote = default_catalog("s3://bucket/run")
with ts.open_store("memory://remote", catalog=remote) as store:
    store.commit(1, {"a.w": torch.ones(3)})
    look(os.path.dirname(remote.removeprefix("sqlite:///")))
with ts.open_store("memory://modes", catalog=f"sqlite:///{sys.argv[1]}/other.sqlite") as store:
    # Another catalog owns the root: it is read from its manifests, through a catalog of the moment.
    assert len(store.log()) == 1
    (copy,) = [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("tailorstore-copy-")]
    look(os.path.join(os.environ["TMPDIR"], copy))
print(json.dumps(found))
"""


def test_folders_of_catalogs_that_are_one_person_s_are_private_whatever_the_umask(tmp_path: Path) -> None:
    for name in ("tmp", "data"):
        (tmp_path / name).mkdir()
    environment = {"TMPDIR": str(tmp_path / "tmp"), "XDG_DATA_HOME": str(tmp_path / "data")}
    found = python(PRIVATE, str(tmp_path), **environment)
    assert len(found) == 3
    assert "catalogs" in found
    assert set(found.values()) == {0o700}, found
