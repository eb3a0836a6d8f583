"""What can happen to a store, one function each; the name says what. ``tests/data/damaged`` says what must follow.

Most damages are done to a kept store when a test wants them: they know of a store only where its objects lie. Those in
:data:`STORED` need this version's code to come about, and are kept as archives.
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import tailorstore as ts
from tailorstore.domain.names import layer_component, new_id
from tailorstore.domain.records import Binding
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.manifests import read_binding, write_binding
from tests.kit.kept import refs_of


@dataclass(frozen=True, slots=True)
class Victim:
    """A store that something happens to."""

    root: Path
    kept: Mapping[str, Any]
    """The JSON of the good store that it was."""
    other: Path
    """Root of a store that has nothing to do with it."""

    def commit(self, ref: str) -> str:
        return refs_of(self.kept)[ref]

    def manifest(self, ref: str) -> Path:
        return self.root / "commits" / f"{self.commit(ref)}.json"

    def version(self, layer: str, ref: str) -> Path:
        """Return where the version of a layer lies that a composite has."""
        composite = self.kept["commits"][self.commit(ref)]["composite"]
        version = self.commit(ref) if layer == "@extra" else composite[layer]
        return self.root / "layers" / layer_component(layer) / str(version)

    def record(self, name: str) -> Path:
        """Return the newest record of a tag or branch."""
        records = {path: json.loads(path.read_text()) for path in (self.root / "refs").glob("*.json")}
        of_name = [path for path, record in records.items() if record["name"] == name]
        return max(of_name, key=lambda path: str(records[path]["created_at"]))

    @property
    def catalog(self) -> Path:
        return self.root / "catalog.sqlite"


Damage = Callable[[Victim], None]

DAMAGES: Final[dict[str, Damage]] = {}
"""Done to a kept store."""

STORED: Final[dict[str, Damage]] = {}
"""Done once, by the version that wrote the store, and kept."""


def damage(function: Damage) -> Damage:
    DAMAGES[_name(function)] = function
    return function


def stored(function: Damage) -> Damage:
    STORED[_name(function)] = function
    return function


def _name(function: Damage) -> str:
    return str(function.__name__).replace("_", "-")


def flip(path: Path, at: float = 0.5) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 4
    path.write_bytes(raw)


def swap(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


# --- Objects of layers


@damage
def chunk_flipped(store: Victim) -> None:
    flip(store.version("a", "main@5") / "a.w" / "c.1")


@damage
def chunk_short(store: Victim) -> None:
    path = store.version("a", "main@2") / "a.w" / "c.0"
    path.write_bytes(path.read_bytes()[:-1])


@damage
def chunk_long(store: Victim) -> None:
    with (store.version("a", "side@3") / "a.w" / "c.2").open("ab") as file:
        file.write(b"\0")


@damage
def chunk_missing(store: Victim) -> None:
    (store.version("b/c", "main@1") / "b=2Fc.w" / "c.0").unlink()


@damage
def chunk_zeroed(store: Victim) -> None:
    """As after a power cut, where a file has its length and not its content."""
    path = store.version("a", "adrift") / "@optim" / "exp_avg" / "a.w" / "c.0"
    path.write_bytes(bytes(path.stat().st_size))


@damage
def group_document_missing(store: Victim) -> None:
    (store.version("d", "main@4") / "zarr.json").unlink()


@damage
def group_document_flipped(store: Victim) -> None:
    flip(store.version("b/c", "trial@6") / "zarr.json")


@damage
def array_document_missing(store: Victim) -> None:
    (store.version("a", "main@1") / "a.w" / "zarr.json").unlink()


@damage
def array_document_flipped(store: Victim) -> None:
    flip(store.version("a", "main@5") / "a.v" / "zarr.json")


@damage
def extra_state_missing(store: Victim) -> None:
    shutil.rmtree(store.version("@extra", "side@3"))


@damage
def base_of_light_missing(store: Victim) -> None:
    shutil.rmtree(store.version("d", "main@1"))


@damage
def layer_directory_swapped(store: Victim) -> None:
    swap(store.version("a", "main@1"), store.version("a", "main@2"))


# --- Manifests and records


@damage
def manifest_missing(store: Victim) -> None:
    store.manifest("main@2").unlink()


@damage
def manifest_of_the_head_missing(store: Victim) -> None:
    store.manifest("main@5").unlink()


@damage
def manifest_flipped(store: Victim) -> None:
    flip(store.manifest("main@4"))


@damage
def manifests_swapped(store: Victim) -> None:
    swap(store.manifest("main@1"), store.manifest("main@2"))


@damage
def manifest_of_another_store(store: Victim) -> None:
    for manifest in (store.other / "commits").iterdir():
        shutil.copy2(manifest, store.root / "commits")


@damage
def ref_record_flipped(store: Victim) -> None:
    flip(store.record("adrift"))


@damage
def ref_record_missing(store: Victim) -> None:
    store.record("best").unlink()


@damage
def half_written_record(store: Victim) -> None:
    """As a process may leave it that is killed while it names a commit, where files cannot be renamed."""
    whole = store.record("best")
    half = whole.with_name(f"{new_id()}.json")
    half.write_bytes(whole.read_bytes()[:100])
    shutil.copystat(whole, half)


# --- The root


@damage
def root_document_missing(store: Victim) -> None:
    (store.root / "tailorstore.json").unlink()


@damage
def root_document_empty(store: Victim) -> None:
    (store.root / "tailorstore.json").write_bytes(b"")


@damage
def root_document_flipped(store: Victim) -> None:
    flip(store.root / "tailorstore.json")


@damage
def root_half_deleted(store: Victim) -> None:
    """All versions of one layer and two of four manifests of a branch."""
    shutil.rmtree(store.version("a", "main@1").parent)
    store.manifest("main@1").unlink()
    store.manifest("main@4").unlink()


@damage
def half_written_replacement(store: Victim) -> None:
    """As a process leaves it that is killed while it takes the root over."""
    whole = store.root / "tailorstore.json"
    half = store.root / f"tailorstore.json.{'ab' * 8}.new"
    half.write_bytes(whole.read_bytes()[:50])
    shutil.copystat(whole, half)


@damage
def strangers(store: Victim) -> None:
    """Files that people and their tools leave anywhere."""
    for name in (".DS_Store", "notes.txt", "layers/a/README", "commits/backup of all.json", "layers/new/x/y/z"):
        path = store.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not tailorstore's")
        shutil.copystat(store.root / "tailorstore.json", path)


# --- The catalog


@damage
def catalog_missing(store: Victim) -> None:
    store.catalog.unlink()


@damage
def catalog_empty(store: Victim) -> None:
    store.catalog.write_bytes(b"")


@damage
def catalog_truncated(store: Victim) -> None:
    store.catalog.write_bytes(store.catalog.read_bytes()[: store.catalog.stat().st_size // 2])


@damage
def catalog_overwritten(store: Victim) -> None:
    store.catalog.write_bytes(b"this is not a database " * 1000)


@damage
def catalog_of_another_root(store: Victim) -> None:
    shutil.copy2(store.other / "catalog.sqlite", store.catalog)


@damage
def catalog_newer_than_root(store: Victim) -> None:
    """The root was restored from a backup, and the catalog was not."""
    store.manifest("main@5").unlink()
    shutil.rmtree(store.version("a", "main@5"))
    shutil.rmtree(store.version("@extra", "main@5"))


# --- What needs a running tailorstore


@stored
def catalog_older_than_root(store: Victim) -> None:
    """The catalog was restored from a backup, and the root was not: ``main`` has got step 5 since."""
    shutil.copy2(earlier_catalog(store.root), store.catalog)


KILLED: Final = """
import os, signal, sys
import tailorstore as ts
from tests.kit.kept import seed_generators
seed_generators()
store = ts.open_store(sys.argv[1], chunk_bytes=1024)
store._catalog.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.commit(6, {name: tensor + 1 for name, tensor in store.checkout().model_state_dict().items()})
"""


@stored
def leftover_of_a_killed_commit(store: Victim) -> None:
    """A trainer was killed just before it would have published step 6: manifest and layers are there."""
    done = subprocess.run([sys.executable, "-c", KILLED, store.root], check=False)
    assert done.returncode == -signal.SIGKILL


@stored
def expired_manifest_left(store: Victim) -> None:
    """GC was killed after it dropped step 2 of ``main`` from the catalog, and before it deleted anything."""
    manifest = store.manifest("main@2")
    kept = manifest.read_bytes()
    with ts.open_store(store.root, create=False) as opened:
        report = opened.gc(ts.KeepTagged(), grace=timedelta(days=1))
    assert [commit.step for commit in report.expired] == [2]
    assert not report.versions_swept
    assert not manifest.exists()
    manifest.write_bytes(kept)


@stored
def half_swept(store: Victim) -> None:
    """GC was killed while it deleted the versions that only step 5 of the tag ``adrift``, since deleted, had held."""
    doomed = store.version("a", "adrift")
    with ts.open_store(store.root, create=False) as opened:
        opened.delete_tag("adrift")
        report = opened.gc(ts.KeepBest("good", 100, "max"), grace=timedelta(days=1))
    assert [(commit.step, commit.branch) for commit in report.expired] == [(5, "trial")]
    shutil.rmtree(doomed / "a.w")
    (doomed / "zarr.json").unlink()


@stored
def claimed_by_a_killed_rebuild(store: Victim) -> None:
    """A rebuild into another catalog was killed once it had claimed the root."""
    objects = LocalObjects(str(store.root))
    binding = read_binding(objects)
    assert binding is not None
    write_binding(objects, Binding(binding.store_id, new_id(), binding.epoch + 1), replace=True)


def earlier_catalog(root: Path) -> Path:
    """Return where the catalog is put as it was before the last commit of the store that is damaged."""
    return root.with_name(f"{root.name}-earlier.sqlite")
