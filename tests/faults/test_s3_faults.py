"""Faults on the way between an S3 client and a real S3 server, by both transports."""

import hashlib
import random
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

import tailorstore as ts
from tailorstore.domain.errors import AccessDeniedError, StorageUnavailableError, TailorError
from tailorstore.storage.objects import Objects, open_objects
from tests.crash.content import check_composites, commit
from tests.faults.work import SETTINGS, check_after, work_through
from tests.kit.faults import at_random, nth
from tests.kit.s3 import S3Server
from tests.kit.s3_proxy import TRANSIENT, S3Proxy, run_proxy

pytestmark = pytest.mark.s3
Transport = Literal["obstore", "fsspec"]
TRANSPORTS: list[Transport] = ["obstore", "fsspec"]
ATTENTIVE = {"connect_timeout": 2, "read_timeout": 0.6}
"""Patient as by default, but sooner to take silence for a fault."""
ONE_TRY = {"connect_timeout": 5, "read_timeout": 10, "retries": {"total_max_attempts": 1}}
DATA = random.Random(1).randbytes(1 << 20)


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[S3Proxy]:
    with run_proxy(s3_server, hang_seconds=5, trickle_seconds=0.2) as running:
        yield running


@pytest.fixture
def url(proxy: S3Proxy) -> str:
    return f"s3://{proxy.server.bucket}/{uuid.uuid4().hex[:12]}/run"


def perform(objects: Objects, verb: str) -> None:
    """Make the call that sends a request of this verb, and fail unless it does its work."""
    key = f"layers/l/v/{uuid.uuid4().hex}"
    if verb == "put":
        assert objects.put(key, DATA) == len(DATA)
    elif verb == "get":
        seen, target = hashlib.sha256(), memoryview(bytearray(len(DATA)))
        objects.read_into("layers/l/v/c", target, seen.update)
        assert target == DATA
        assert seen.digest() == hashlib.sha256(DATA).digest()
        assert objects.get("layers/l/v/c", limit=len(DATA)) == DATA
    elif verb == "head":
        assert objects.exists("layers/l/v/c")
    elif verb == "list":
        assert [info.key for info in objects.list("layers/l/v/c/")] == []
        assert "layers/l/v/c" in [info.key for info in objects.list("layers/")]
    else:
        assert objects.delete([key, f"{key}x"]) == []


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transient_fault_of_every_request_is_invisible(proxy: S3Proxy, url: str, transport: Transport) -> None:
    objects = open_objects(url, proxy.storage_options(config_kwargs=ATTENTIVE), transport)
    objects.put("layers/l/v/c", DATA)
    struck = 0
    for kind, verbs in TRANSIENT.items():
        for verb in verbs if kind != "stale listing" else ():
            with proxy.faults(nth(kind, verbs=(verb,))) as injected:
                perform(objects, verb)
            assert injected == {(kind, verb): 1}
            struck += 1
    assert struck == sum(map(len, TRANSIENT.values())) - 1
    # Whatever was put twice, or by half, or with a flipped bit at first, is what it should be.
    for info in objects.list("layers/l/v/"):
        assert objects.get(info.key) == DATA
    objects.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_store_works_while_a_tenth_of_all_requests_fail(
    proxy: S3Proxy, url: str, transport: Transport, tmp_path: Path
) -> None:
    options = proxy.storage_options(config_kwargs=ATTENTIVE)
    opened = partial(ts.open_store, url, storage_options=options, transport=transport, **SETTINGS)
    kinds = {kind: verbs for kind, verbs in TRANSIENT.items() if kind != "stale listing"}
    with proxy.faults(at_random(5, 0.1, kinds)) as injected:
        work_through(opened, tmp_path, light=transport == "obstore")
    kinds_struck = Counter(kind for kind, _ in injected)
    assert injected.total() >= 20, injected
    assert len(kinds_struck) >= 6, injected
    direct = partial(ts.open_store, url, storage_options=proxy.server.storage_options(), **SETTINGS)
    check_after(direct, f"sqlite:///{tmp_path}/second.db", [90, 40, 20])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_objects_that_listings_do_not_show_yet_hold_no_commit_up(
    proxy: S3Proxy, url: str, transport: Transport, tmp_path: Path
) -> None:
    options = proxy.storage_options(config_kwargs=ATTENTIVE)
    opened = partial(ts.open_store, url, storage_options=options, transport=transport, **SETTINGS)
    with proxy.faults(nth("stale listing", times=None)) as injected:
        work_through(opened, tmp_path, listings_lag=True)
    assert injected.total() >= 3
    direct = partial(ts.open_store, url, storage_options=proxy.server.storage_options(), **SETTINGS)
    check_after(direct, f"sqlite:///{tmp_path}/first.db", [40, 20])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("kind", "key", "error"),
    [
        ("swallowed put", "/c.", StorageUnavailableError),
        ("swallowed put", "zarr.json", StorageUnavailableError),
        ("swallowed put", "commits/", StorageUnavailableError),
        ("500", "layers/", StorageUnavailableError),
        ("reset after", "commits/", StorageUnavailableError),
        ("denied", "commits/", AccessDeniedError),
        ("skewed", "layers/", AccessDeniedError),
    ],
)
def test_what_does_not_pass_ends_in_its_error_and_changes_nothing(
    proxy: S3Proxy, url: str, transport: Transport, kind: str, key: str, error: type[TailorError], tmp_path: Path
) -> None:
    catalog = f"sqlite:///{tmp_path}/catalog.db"
    direct = partial(ts.open_store, url, storage_options=proxy.server.storage_options(), **SETTINGS)
    with direct(catalog=catalog) as store:
        commit(store, 10)
        commit(store, 20)
    options = proxy.storage_options(config_kwargs=ONE_TRY)
    with ts.open_store(url, catalog=catalog, storage_options=options, transport=transport, **SETTINGS) as store:
        with proxy.faults(nth(kind, verbs=("put",), key=key, times=None)) as injected, pytest.raises(error) as caught:
            commit(store, 30)
        assert injected.total() >= 1
        assert check_composites(store) == [20, 10]
    if kind == "skewed":
        assert "clock of this machine" in str(caught.value)
    if kind == "500":
        assert proxy.endpoint_url in str(caught.value)
    check_after(direct, catalog, [20, 10])


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_server_whose_clock_is_off_makes_nothing_look_older_than_it_is(
    proxy: S3Proxy, url: str, hours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "clock_ahead", timedelta(hours=hours))
    options: dict[str, Any] = proxy.storage_options(config_kwargs=ATTENTIVE)
    with ts.open_store(url, catalog=f"sqlite:///{tmp_path}/c.db", storage_options=options, **SETTINGS) as store:
        commit(store, 10)
        leftover = "layers/a/0123456789abcdef0123/zarr.json"
        store._objects.put(leftover, b"{}")
        report = store.gc(grace=timedelta(hours=1))
        assert report.leftovers_swept == 0
        assert store._objects.exists(leftover)
        report = store.gc(grace=timedelta(0))
        assert report.leftovers_swept == 1
        assert not store._objects.exists(leftover)
        assert check_composites(store) == [10]
