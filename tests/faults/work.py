"""What a store does while its storage fails, and what it must be afterwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import tailorstore as ts
from tests.crash.content import NOW, check_composites, commit
from tests.kit.audit import assert_root_is_exact, let_claims_lapse, refs

SETTINGS: Final[dict[str, Any]] = {
    "chunk_bytes": 1024,
    "light": ts.LightSettings(weight_bits=4, slot_bits=4, exact_below=64),
}
Open = Callable[..., ts.Store]
"""Opens the store; takes ``catalog`` and ``create`` as :func:`tailorstore.open_store` does."""


def work_through(open_one: Open, folder: Path, *, light: bool = False, listings_lag: bool = False) -> None:
    """Do everything that a store can do, once, and fail unless all of it goes well.

    Args:
        open_one: opens the store; storage may fail under it.
        folder: for catalogs.
        light: commit light versions where that is possible.
        listings_lag: whether listings may lag behind: a history that is read from one may lack what is new.
    """
    with open_one(catalog=f"sqlite:///{folder}/first.db") as store:
        commit(store, 10, light=light)
        commit(store, 20, block=False, light=light)
        store.tag("kept", 20)
        commit(store, 30, block=False, light=light)
        commit(store, 40, light=light)
        assert check_composites(store) == [40, 30, 20, 10]
        assert store.verify().ok
        store.gc(ts.KeepLast(1), grace=NOW)
        assert check_composites(store) == [40, 20]
    with open_one(catalog=f"sqlite:///{folder}/first.db", create=False) as store:
        assert refs(store) == {"branch main": 40, "tag kept": 20}
        assert check_composites(store) == [40, 20]
        assert store.verify("latest").ok
    if listings_lag:
        return
    with open_one(catalog=f"sqlite:///{folder}/second.db") as store:
        assert not store.writable
        store.rebuild_catalog()
        assert check_composites(store) == [40, 20]
        commit(store, 90, light=light)


def check_after(open_one: Open, catalog: str, steps: list[int]) -> None:
    """Fail unless a store, asked without any fault, holds these steps to the bit, is whole, and goes on."""
    with open_one(catalog=catalog, create=False) as store:
        assert check_composites(store) == steps
        assert store.verify().ok
        let_claims_lapse(store)
        assert store.gc(grace=NOW).deletes_failed == 0
        assert_root_is_exact(store)
        if 90 not in steps:
            commit(store, 90)
            assert check_composites(store) == [90, *steps]
