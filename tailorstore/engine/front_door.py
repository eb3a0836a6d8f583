"""``open_store``: from a URL to a store."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from tailorstore.domain.errors import InvalidInputError, StoreNotFoundError
from tailorstore.domain.light import LightSettings
from tailorstore.domain.names import DEFAULT_BRANCH, LayerRule, check_name, layer_rule
from tailorstore.domain.records import DEFAULT_LEASE
from tailorstore.engine.commits import Commits
from tailorstore.engine.opening import default_catalog, open_root
from tailorstore.engine.plan import Layout
from tailorstore.engine.ranks.joining import DEFAULT_TIMEOUT, check_setting
from tailorstore.engine.session import Session
from tailorstore.engine.store import Store
from tailorstore.storage.codecs import CODECS
from tailorstore.storage.manifests import read_binding
from tailorstore.storage.objects import normalise_url, open_objects, printable_url

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_CHUNK_BYTES = 32 << 20
_SMALLEST_CHUNK_BYTES = 1024
_SHORTEST_LEASE = timedelta(seconds=1)


def open_store(
    url: str | os.PathLike[str],
    *,
    catalog: str | None = None,
    branch: str = DEFAULT_BRANCH,
    storage_options: Mapping[str, Any] | None = None,
    create: bool = True,
    transport: Literal["obstore", "fsspec"] | None = None,
    layers: int | LayerRule = 1,
    codec: Literal["none", "lz4", "zstd"] = "none",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    lease: timedelta = DEFAULT_LEASE,
    light: LightSettings | None = None,
    ranks: "Literal['world', 'alone'] | ProcessGroup" = "world",
    ranks_timeout: timedelta = DEFAULT_TIMEOUT,
) -> Store:
    """Open the store at a URL, making it if there is none.

    Args:
        url: the root: a path, ``file://``, ``s3://bucket/prefix``, ``gs://``, ``memory://`` or any fsspec URL.
        catalog: ``sqlite:///path.db`` or ``postgresql+psycopg://…``. Default: a SQLite file inside a local root; for a
            remote root one in the user's data directory.
        branch: where commits go and what ``latest`` means; its first commit makes it.
        storage_options: in the words of the fsspec filesystem; or nothing and the standard ``AWS_*`` variables.
        create: make the store if there is none.
        transport: ``None`` for the fastest that speaks the URL, ``"obstore"`` or ``"fsspec"``.
        layers: how tensors are sorted into layers: a depth (a layer is a name up to its first integer part, 2: up to
            the second, for experts), or a function from tensor name to layer name.
        codec: ``"none"``, ``"lz4"`` or ``"zstd"``: lossless; worth it where storage is slower than about 1 GB/s.
        chunk_bytes: largest chunk, at least 1024.
        lease: how long a commit or reader that died keeps GC away from what it held.
        light: how light versions are made, and when a layer is due in full; ``None`` for the defaults.
        ranks: which processes commit, check out and restore together, each call on all of them: every one that
            torch.distributed was initialised with, those of a process group, or ``"alone"``: this one for itself. Rank
            0 of them alone talks to the catalog to commit; history can be read on any.
        ranks_timeout: how long they wait for one that does not come.

    Raises:
        StoreNotFoundError: there is no store and ``create`` is false.
        NotAStoreError, FormatTooNewError, SchemaOutdatedError, SchemaTooNewError: something else is there, or
            another version's; the message says what to do.
        InvalidInputError: an argument cannot be used.
        BucketNotFoundError, AccessDeniedError, UnavailableError: root or catalog cannot be reached.
    """
    check_name("branch", branch)
    if codec not in CODECS:
        msg = f"unknown codec {codec!r}; use one of {', '.join(CODECS)}"
        raise InvalidInputError(msg)
    if not isinstance(chunk_bytes, int) or chunk_bytes < _SMALLEST_CHUNK_BYTES:
        msg = f"chunk_bytes must be at least {_SMALLEST_CHUNK_BYTES}, not {chunk_bytes!r}"
        raise InvalidInputError(msg)
    if not isinstance(lease, timedelta) or lease < _SHORTEST_LEASE:
        msg = f"lease must be a timedelta of at least {_SHORTEST_LEASE}, not {lease!r}"
        raise InvalidInputError(msg)
    if not callable(layers) and (not isinstance(layers, int) or isinstance(layers, bool)):
        msg = f"layers must be a depth or a function from tensor name to layer name, not {layers!r}"
        raise InvalidInputError(msg)
    if storage_options is not None and not isinstance(storage_options, Mapping):
        msg = f"storage_options must map names to values, not be a {type(storage_options).__name__}"
        raise InvalidInputError(msg)
    if light is not None and not isinstance(light, LightSettings):
        msg = f"light must be LightSettings(…), not {light!r}"
        raise InvalidInputError(msg)
    setting = check_setting(ranks, ranks_timeout)
    rule = layers if callable(layers) else layer_rule(layers)
    objects = open_objects(normalise_url(url), storage_options, transport)
    catalog_url = catalog or default_catalog(printable_url(normalise_url(url)))
    try:
        opened = None if setting.is_follower() else open_root(objects, catalog_url, create=create)
        if opened is None and not create and read_binding(objects) is None:
            msg = f"there is no store at {objects.url}; make one with open_store(...) on every rank"
            raise StoreNotFoundError(msg)
    except BaseException:
        objects.close()
        raise
    session = Session(objects, opened, catalog_url, lease)
    layout = Layout(chunk_bytes, codec)
    commits = Commits(session, branch=branch, rule=rule, layout=layout, light=light or LightSettings(), ranks=setting)
    return Store(session, commits)
