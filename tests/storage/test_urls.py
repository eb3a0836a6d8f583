import os
import sys
from pathlib import Path

import pytest

from tailorstore.domain.errors import InvalidInputError, MissingDependencyError
from tailorstore.storage import urls
from tailorstore.storage.objects import normalise_url, open_objects, printable_url


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("/data/run", "file:///data/run"),
        ("/data//run///", "file:///data/run"),
        ("file:///data/run/", "file:///data/run"),
        ("file:///data/a%20b", "file:///data/a%20b"),
        ("local:///data", "file:///data"),
        ("/data/a b?c#d", "file:///data/a b?c#d"),
        ("s3://bucket", "s3://bucket"),
        ("S3A://bucket/a//b/", "s3://bucket/a/b"),
        ("gcs://bucket/p", "gs://bucket/p"),
        ("abfss://container@account.dfs.core.windows.net/p/", "abfs://container@account.dfs.core.windows.net/p"),
        ("memory://x/", "memory://x"),
    ],
)
def test_every_spelling_becomes_one(typed: str, url: str) -> None:
    assert normalise_url(typed) == url
    assert normalise_url(url) == url


def test_relative_paths_and_home_are_resolved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert normalise_url("runs/one") == f"file://{tmp_path}/runs/one"
    assert normalise_url(Path("runs") / "one") == f"file://{tmp_path}/runs/one"
    assert normalise_url("file://./runs") == f"file://{tmp_path}/runs"
    assert normalise_url("~/runs") == normalise_url("file://~/runs") == "file:///home/someone/runs"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("", "no URL or path"),
        ("  ", "no URL or path"),
        ("/a\0b", "no URL or path"),
        ("file://data/run", "three slashes"),
        ("s3:/bucket/run", "two slashes"),
        ("s3://", "names no bucket"),
        ("s3:///run", "names no bucket"),
        ("s3://bucket/a/../b", "'..'"),
        ("s3://bucket/a?region=x", "query"),
        ("s3://key:hunter2secret@bucket/a", "credentials"),
        ("nosuch://a/b", "unknown protocol 'nosuch'"),
    ],
)
def test_nonsense_is_refused_before_anything_is_opened(typed: str, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says) as caught:
        open_objects(typed)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("nonsense", [None, 7, b"/data"])
def test_other_types_are_refused(nonsense: object) -> None:
    with pytest.raises(InvalidInputError):
        normalise_url(nonsense)  # type: ignore[arg-type]


def test_a_protocol_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(MissingDependencyError, match="paramiko"):
        normalise_url("sftp://host/run")
    monkeypatch.setattr(urls, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install gcsfs"):
        open_objects("gs://bucket/run", transport="fsspec")


def test_unknown_transports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="unknown transport 'boto'"):
        open_objects(tmp_path, transport="boto")
    with pytest.raises(InvalidInputError, match="obstore does not speak memory://"):
        open_objects("memory://x", transport="obstore")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("file:///data/a@b?c=d", "file:///data/a@b?c=d"),
        ("/data/a:b@c", "/data/a:b@c"),
        ("s3://bucket/@extra/x", "s3://bucket/@extra/x"),
        (
            "postgresql+psycopg://me:hunter2@host:5432/db?sslmode=require",
            "postgresql+psycopg://***@host:5432/db?sslmode=***",
        ),
        ("ftp://me:hun/ter2@host/p", "ftp://***@host/p"),
        ("ftp://me:hun?ter2@host/p", "ftp://***@host/p"),
        ("ftp://me:hunter2@x@host/p", "ftp://***@host/p"),
        ("https://hunter2@host/a", "https://***@host/a"),
        ("https://host/a?X-Amz-Signature=hunter2&versionId", "https://host/a?X-Amz-Signature=***&versionId"),
        ("simplecache::https://me:hunter2@host/a", "simplecache::https://***@host/a"),
        ("abfs://container@account.dfs.core.windows.net/p", "abfs://container@account.dfs.core.windows.net/p"),
        ("abfs://container:hunter2@account/p", "abfs://***@account/p"),
    ],
)
def test_printable_urls_hold_no_secret(url: str, shown: str) -> None:
    assert printable_url(url) == shown
    assert "hunter2" not in printable_url(url)
