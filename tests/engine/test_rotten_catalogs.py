"""A catalog whose rows rotted or went gives nothing wrong, deletes nothing and writes nothing over."""

import random
import shutil
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import CatalogDamagedError, TailorError
from tests.catalog.kit import plain_sql
from tests.kit.models import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = timedelta(0)
STEPS = (1, 2, 3, 4)

ROT = {
    "a layer points to another version of it": (
        "UPDATE composites SET version_pk = (SELECT max(v.pk) FROM versions v WHERE v.layer_pk = composites.layer_pk)"
        " WHERE commit_pk = (SELECT min(pk) FROM commits)"
    ),
    "layers of composites are gone": "DELETE FROM composites WHERE version_pk % 3 = 0",
    "a version has another id": (
        "UPDATE versions SET version_id = 'f' || substr(version_id, 2) WHERE pk = (SELECT min(pk) FROM versions)"
    ),
    "a light version has another base": (
        "UPDATE versions SET base_pk = (SELECT max(v.pk) FROM versions v WHERE v.layer_pk = versions.layer_pk"
        " AND v.fidelity = 'full') WHERE fidelity = 'light'"
    ),
    "a version has another digest": (
        "UPDATE versions SET digest = 'xxh3-128:00000000000000000000000000000000'"
        " WHERE pk = (SELECT min(pk) FROM versions)"
    ),
    "a commit has another step": "UPDATE commits SET step = 100 WHERE pk = (SELECT min(pk) FROM commits)",
}
LOSS = {
    "versions are gone": "DELETE FROM versions WHERE pk % 4 = 0",
    "nothing of a commit is left but its row": (
        "DELETE FROM composites WHERE commit_pk = (SELECT min(pk) FROM commits)"
    ),
}


def weights(step: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(step)
    return {f"{layer}.w": torch.randn(20, 20, generator=chance) for layer in ("a", "b", "c")}


def composite(step: int) -> dict[str, torch.Tensor]:
    """Return what a checkout of a step gives, but for b, which is light from step 2 on."""
    return weights(step) | {"c.w": weights(1)["c.w"]} if step == 2 else weights(step)


def fill(root: Path, catalog: str | None = None) -> None:
    """Commit: c is left out at step 2, b is light at step 3, on the base of step 2."""
    with ts.open_store(root, catalog=catalog, light=ts.LightSettings(exact_below=16)) as store:
        store.commit(1, weights(1))
        store.commit(2, weights(2), mask=["a", "b"])
        store.commit(3, weights(3), mask={"a": True, "b": "light", "c": True})
        store.commit(4, weights(4))


def files(root: Path) -> dict[str, bytes]:
    """Return all that is in a root, but its catalog."""
    found = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("catalog.sqlite"))
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def read(store: ts.Store, step: int) -> dict[str, torch.Tensor]:
    """Return the weights of a step, without what was written light."""
    with store.checkout(step) as checkpoint:
        state = dict(checkpoint.model_state_dict())
        return {name: state[name] for name in state if checkpoint.fidelity[name[0]] == "full"}


def assert_refused(store: ts.Store, root: Path) -> None:
    """Fail if anything is deleted, or written over, because of what the catalog says."""
    before = files(root)
    acts: list[Callable[[], object]] = [
        lambda: store.gc(ts.KeepLast(1), grace=NOW),
        lambda: store.gc(ts.KeepLast(1), grace=NOW, dry_run=True),
        store.verify,
        lambda: store.verify(repair=True),
        store.rebuild_catalog,
    ]
    for act in acts:
        with pytest.raises(CatalogDamagedError, match="'tailorstore rebuild'"):
            act()
    assert files(root) == before


@pytest.mark.parametrize("what", [*ROT, *LOSS])
def test_rotten_rows_are_found_before_anything_goes_by_them(tmp_path: Path, catalog_url: str, what: str) -> None:
    root = tmp_path / "root"
    fill(root, catalog_url)
    with plain_sql(catalog_url) as connection:
        if what in LOSS and catalog_url.startswith("postgresql"):
            connection.execute("SET session_replication_role = replica")
        connection.execute((ROT | LOSS)[what])
        connection.commit()
    with ts.open_store(root, catalog=catalog_url) as store:
        assert_refused(store, root)
        wrong = 0
        for commit in store.log():
            try:
                found = read(store, commit.step)
            except CatalogDamagedError:
                wrong += 1
            else:
                assert_same(found, {name: composite(commit.step)[name] for name in found})
        assert wrong


def test_what_the_error_says_brings_everything_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    fill(root)
    with plain_sql(f"sqlite:///{root}/catalog.sqlite") as connection:
        connection.execute(ROT["layers of composites are gone"])
        connection.commit()
    for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
        (root / name).unlink(missing_ok=True)
    with ts.open_store(root) as store:
        store.rebuild_catalog()
        assert store.verify().ok
        for step in STEPS:
            found = read(store, step)
            assert_same(found, {name: composite(step)[name] for name in found})
        assert {commit.step for commit in store.gc(ts.KeepLast(1), grace=NOW).expired} == {1, 2, 3}


def test_a_bit_that_flips_in_the_file_gives_no_wrong_values(tmp_path: Path) -> None:
    base, root = tmp_path / "base", tmp_path / "root"
    fill(base)
    whole = (base / "catalog.sqlite").read_bytes()
    dice = random.Random(7)
    shutil.copytree(base, root)
    refused = right = 0
    for _ in range(60):
        rotten = bytearray(whole)
        at = dice.randrange(4096, len(rotten))
        while not rotten[at]:
            at = dice.randrange(4096, len(rotten))
        rotten[at] ^= 1 << dice.randrange(8)
        for name in ("catalog.sqlite-wal", "catalog.sqlite-shm"):
            (root / name).unlink(missing_ok=True)
        (root / "catalog.sqlite").write_bytes(rotten)
        try:
            with ts.open_store(root, create=False) as store:
                for step in STEPS:
                    try:
                        found = read(store, step)
                    except TailorError:
                        refused += 1
                    else:
                        right += 1
                        assert_same(found, {name: composite(step)[name] for name in found})
        except TailorError:
            refused += 1
    assert refused
    assert right


def test_a_manifest_that_stands_is_not_written_over(tmp_path: Path) -> None:
    """Whatever the catalog says of a commit: its manifest has a checksum of its own, a row has none."""
    root = tmp_path / "root"
    fill(root)
    with plain_sql(f"sqlite:///{root}/catalog.sqlite") as connection:
        connection.execute("UPDATE commits SET message = 'rot' WHERE step = 2")
        connection.commit()
    before = files(root)
    with ts.open_store(root) as store:
        report = store.verify(repair=True)
        assert [damage.key for damage in report.damages] == [f"commits/{store.show(2).id}.json"]
        assert "holds: message; 'tailorstore rebuild' goes by the manifest" in report.damages[0].detail
        assert not report.damages[0].mended
        assert files(root) == before
        assert store.rebuild_catalog().written == ()
        assert store.show(2).message is None
        assert store.verify().ok
    assert {name: data for name, data in files(root).items() if name != "tailorstore.json"} == {
        name: data for name, data in before.items() if name != "tailorstore.json"
    }
