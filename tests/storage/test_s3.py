"""S3 beyond what all transports share: its errors, its limits and the ways to say who one is."""

import contextlib
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tailorstore.domain.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    InvalidInputError,
    StorageUnavailableError,
    TailorError,
)
from tailorstore.storage.objects import Objects, open_objects
from tests.conftest import Root
from tests.kit.s3 import S3Server

pytestmark = pytest.mark.s3
TRANSPORTS = ["obstore", "fsspec"]
Calls = list[tuple[str, Callable[[Objects], object]]]
CALLS: Calls = [
    ("put", lambda o: o.put("a/b", b"x")),
    ("get", lambda o: o.get("a/b")),
    ("read_into", lambda o: o.read_into("a/b", memoryview(bytearray(1)))),
    ("replace", lambda o: o.replace("a/b", b"x")),
    ("exists", lambda o: o.exists("a/b")),
    ("list", lambda o: list(o.list("a/"))),
    ("delete", lambda o: o.delete(["a/b", "a/c"])),
]
READS = ("get", "read_into", "exists", "list")
IMPATIENT = {"connect_timeout": 0.5, "read_timeout": 0.5, "retries": {"total_max_attempts": 2}}


@pytest.fixture(autouse=True)
def nobody_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the machine's own credentials out of it."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "ENDPOINT_URL", "ENDPOINT_URL_S3", "PROFILE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name in ("REGION", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def everything_said(error: BaseException) -> str:
    """Return all that a log could show of an error, chained errors and their attributes included."""
    said = "".join(traceback.format_exception(error))
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is not None:
            said += f"{current!r} {current.args!r} {getattr(current, '__dict__', '')!r}"
            assert type(current).__module__.startswith("tailorstore.")
            pending += [current.__cause__, current.__context__]
    return said


def failing(objects: Objects, call: Callable[[Objects], object], expected: type[TailorError]) -> str:
    with pytest.raises(expected) as caught:
        call(objects)
    return everything_said(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_wrong_secrets_are_refused_and_never_shown(s3_server: S3Server, s3_root: Root, transport: str) -> None:
    wrong = s3_server.admin.with_wrong_secret()
    options = {**s3_server.storage_options(wrong), "token": None}
    objects = open_objects(s3_root.url, options, transport)
    for name, call in CALLS:
        said = failing(objects, call, AccessDeniedError)
        assert s3_root.url in said, name
        assert wrong.secret not in said
    assert wrong.secret not in repr(objects) + objects.url
    objects.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_session_tokens_are_never_shown(s3_server: S3Server, s3_root: Root, transport: str) -> None:
    options = {**s3_server.storage_options(), "token": "a-session-token/with+signs=="}
    objects = open_objects(s3_root.url, options, transport)
    for _, call in CALLS:
        said = failing(objects, call, AccessDeniedError)
        assert "a-session-token" not in said
        assert s3_server.admin.secret not in said
    objects.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_whoever_may_only_read_can_read(s3_server: S3Server, s3_root: Root, transport: str) -> None:
    writer = open_objects(s3_root.url, s3_root.storage_options)
    writer.put("a/b", b"x")
    reader = open_objects(s3_root.url, s3_server.storage_options(s3_server.reader), transport)
    for name, call in CALLS:
        if name in READS:
            call(reader)
        elif name == "delete":
            # Some servers refuse the request, others each key of it.
            with contextlib.suppress(AccessDeniedError):
                assert {failure.key for failure in reader.delete(["a/b", "a/c"])} >= {"a/b"}
        else:
            failing(reader, call, AccessDeniedError)
    assert writer.exists("a/b")
    reader.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_missing_buckets_are_told_from_missing_objects(s3_server: S3Server, transport: str) -> None:
    for name, call in CALLS:
        objects = open_objects("s3://no-such-bucket-here/run", s3_server.storage_options(), transport)
        said = failing(objects, call, BucketNotFoundError)
        assert "s3://no-such-bucket-here/run" in said, name
        objects.close()
    with contextlib.closing(s3_server.client()) as client:
        assert "no-such-bucket-here" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Give a port that takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        held: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    held.append(listening.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=accept)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", ["closed_port", "silent_port"])
def test_endpoints_that_do_not_answer_fail_in_bounded_time(
    request: pytest.FixtureRequest, s3_server: S3Server, transport: str, kind: str
) -> None:
    options = {
        **s3_server.storage_options(),
        "endpoint_url": f"http://127.0.0.1:{request.getfixturevalue(kind)}",
        "config_kwargs": IMPATIENT,
    }
    objects = open_objects("s3://bucket/run", options, transport)
    for name, call in (CALLS[0], CALLS[1], CALLS[-1]):
        started = time.monotonic()
        said = failing(objects, call, StorageUnavailableError)
        assert time.monotonic() - started < 30, name
        assert s3_server.admin.secret not in said
        assert str(options["endpoint_url"]) in said
    objects.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_more_objects_than_a_page_are_listed_and_deleted(s3_root: Root, transport: str) -> None:
    objects = open_objects(s3_root.url, s3_root.storage_options, transport)
    keys = [f"layers/l{number % 7}/v/p{number:04}/zarr.json" for number in range(2105)]
    filler = open_objects(s3_root.url, s3_root.storage_options)
    threads = [
        threading.Thread(target=lambda part=part: [filler.put(key, b"x") for key in keys[part::8]]) for part in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(info.key for info in objects.list()) == sorted(keys)
    assert objects.delete([*keys[:2050], "layers/never/was"]) == []
    assert sorted(info.key for info in objects.list("layers/")) == sorted(keys[2050:])
    assert objects.delete(keys) == []
    assert list(objects.list()) == []
    objects.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_siblings_of_the_root_are_not_touched(s3_root: Root, transport: str) -> None:
    sibling = open_objects(s3_root.url + "2", s3_root.storage_options)
    sibling.put("a/b", b"theirs")
    objects = open_objects(s3_root.url, s3_root.storage_options, transport)
    objects.put("a/b", b"mine")
    assert [(info.key, info.size) for info in objects.list()] == [("a/b", 4)]
    assert objects.delete(["a/b"]) == []
    assert bytes(sibling.get("a/b")) == b"theirs"
    objects.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_standard_environment_says_who_one_is(
    s3_server: S3Server, s3_root: Root, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    objects = open_objects(s3_root.url, transport=transport)
    objects.put("a", b"x")
    assert bytes(objects.get("a")) == b"x"
    objects.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_options_count_more_than_the_environment(
    s3_server: S3Server, s3_root: Root, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment(s3_server.admin.with_wrong_secret()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-of-somebody-else")
    objects = open_objects(s3_root.url, s3_root.storage_options, transport)
    objects.put("a", b"x")
    assert objects.exists("a")
    objects.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("named", [False, True])
def test_profiles_in_aws_files_are_read(
    s3_server: S3Server,
    s3_root: Root,
    transport: str,
    named: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = s3_server.admin
    name = "team" if named else "default"
    (tmp_path / "credentials").write_text(
        f"[{name}]\naws_access_key_id = {key.key}\naws_secret_access_key = {key.secret}\n"
    )
    section = "profile team" if named else "default"
    (tmp_path / "config").write_text(
        f"[{section}]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint_url}\ns3 =\n  addressing_style = path\n"
    )
    if named:
        monkeypatch.setenv("AWS_PROFILE", "team")
    objects = open_objects(s3_root.url, transport=transport)
    objects.put("a", b"x")
    assert objects.exists("a")
    objects.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("way", ["client_kwargs", "plain host", "virtual words"])
def test_the_words_of_s3fs_are_understood_alike(s3_server: S3Server, s3_root: Root, transport: str, way: str) -> None:
    key = s3_server.admin
    host = s3_server.endpoint_url.removeprefix("http://")
    options: dict[str, Any] = {
        "client_kwargs": {
            "endpoint_url": s3_server.endpoint_url,
            "region_name": "us-east-1",
            "aws_access_key_id": key.key,
            "aws_secret_access_key": key.secret,
            "verify": False,
        },
        "plain host": {"key": key.key, "secret": key.secret, "endpoint_url": f"http://{host}", "use_ssl": False},
        "virtual words": {
            "username": key.key,
            "password": key.secret,
            "endpoint_url": s3_server.endpoint_url + "/",
            "config_kwargs": {"s3": {"addressing_style": "path"}, "max_pool_connections": 4, "connect_timeout": 5},
            "default_block_size": 1 << 20,
            "s3_additional_kwargs": {},
            "anon": False,
        },
    }[way]
    options = {"client_kwargs": options} if way == "client_kwargs" else options
    objects = open_objects(s3_root.url, options, transport)
    objects.put("a", b"x")
    assert objects.exists("a")
    objects.close()


def test_options_that_obstore_cannot_say_are_named() -> None:
    with pytest.raises(InvalidInputError, match=r"'sekret', 'session' are not understood.*transport='fsspec'"):
        open_objects("s3://bucket/run", {"sekret": "hunter2-hunter2", "session": object()})
    with pytest.raises(InvalidInputError, match="'client_kwargs' must be a dictionary"):
        open_objects("s3://bucket/run", {"client_kwargs": "no"})


@pytest.mark.parametrize(
    "options",
    [
        {"oops": "hunter2-hunter2"},
        {"client_kwargs": {"oops": 1}},
        {"config_kwargs": {"oops": 1}},
        {"endpoint_url": "nonsense"},
    ],
)
def test_options_that_s3fs_does_not_understand_are_told_and_not_tried_again(options: dict[str, Any]) -> None:
    objects = open_objects("s3://bucket/run", {"key": "a", "secret": "hunter2-hunter2", **options}, "fsspec")
    with pytest.raises(InvalidInputError, match="check storage_options") as caught:
        objects.get("a")
    assert "hunter2" not in everything_said(caught.value)
    objects.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_large_objects_pass_whole(s3_root: Root, transport: str) -> None:
    data = uuid.uuid4().bytes * (2 << 20)
    objects = open_objects(s3_root.url, s3_root.storage_options, transport)
    objects.put("a/c.0.0", data)
    target = memoryview(bytearray(len(data)))
    objects.read_into("a/c.0.0", target)
    assert target == data
    objects.close()
