"""A checkpoint store for training runs: Zarr arrays per layer in any object storage, and a catalog of steps.

``open_store`` is the front door::

    import tailorstore as ts

    store = ts.open_store("s3://bucket/run")
    store.commit(step, model, optim, mask=ts.strategies.Budget("2GB").max_age(commits=5))
    store.checkout("latest").restore(model, optim)

Importing this package imports neither torch nor SQLAlchemy; the first use of ``open_store`` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tailorstore.domain import strategies
from tailorstore.domain.condition import Bounds, CompositeWarning
from tailorstore.domain.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ConflictError,
    IntegrityError,
    InvalidInputError,
    NotFoundError,
    TailorError,
    UnavailableError,
    VersionError,
)
from tailorstore.domain.light import LightSettings
from tailorstore.domain.mask import MaskContext, Strategy
from tailorstore.domain.records import Commit
from tailorstore.domain.retention import KeepBest, KeepEvery, KeepLast, KeepTagged, KeepWithin
from tailorstore.domain.strategies import parse_strategy

if TYPE_CHECKING:
    from tailorstore.engine.checkout import Checkpoint
    from tailorstore.engine.front_door import open_store
    from tailorstore.engine.pending import PendingCommit
    from tailorstore.engine.store import Store
    from tailorstore.engine.tensors.lazy import LazyTensor

__version__ = "0.1.0"

__all__ = [
    "AccessDeniedError",
    "AlreadyExistsError",
    "Bounds",
    "Checkpoint",
    "Commit",
    "CompositeWarning",
    "ConflictError",
    "IntegrityError",
    "InvalidInputError",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepTagged",
    "KeepWithin",
    "LazyTensor",
    "LightSettings",
    "MaskContext",
    "NotFoundError",
    "PendingCommit",
    "Store",
    "Strategy",
    "TailorError",
    "UnavailableError",
    "VersionError",
    "open_store",
    "parse_strategy",
    "strategies",
]

_LAZY = {
    "Checkpoint": "tailorstore.engine.checkout",
    "LazyTensor": "tailorstore.engine.tensors.lazy",
    "PendingCommit": "tailorstore.engine.pending",
    "Store": "tailorstore.engine.store",
    "open_store": "tailorstore.engine.front_door",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what needs torch or SQLAlchemy when it is first asked for."""
    if name not in _LAZY:
        msg = f"module 'tailorstore' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*__all__, "__version__"])
