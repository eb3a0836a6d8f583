"""From the words of fsspec's filesystems to obstore's; nothing here is connected to."""

import json
from pathlib import Path
from typing import Any

import pytest

from tailorstore.domain.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    InvalidInputError,
    MissingObjectError,
    StorageFullError,
    StorageUnavailableError,
    TailorError,
)
from tailorstore.storage.failures import Scrubber, from_transport
from tailorstore.storage.objects import open_objects

SECRET = "hunter2/hunter2+hunter2"


def config_of(url: str, options: dict[str, Any]) -> dict[str, Any]:
    objects: Any = open_objects(url, options)
    assert SECRET not in repr(objects) + str(objects) + objects.url
    # Below the retrying.
    store = objects._objects._store
    return {"prefix": store.prefix, **store.config, **(store.client_options or {})}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the machine's own settings out of it."""
    for name in ("ENDPOINT_URL", "ENDPOINT_URL_S3", "REGION", "DEFAULT_REGION", "PROFILE", "ACCESS_KEY_ID"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


def test_s3_without_an_endpoint_is_amazons() -> None:
    config = config_of("s3://bucket/a/b", {"key": "k" * 16, "secret": SECRET})
    assert config["prefix"] == "a/b"
    assert config["region"] == "us-east-1"
    assert config["virtual_hosted_style_request"] == "true"
    assert config["unsigned_payload"] == "true"
    assert "endpoint" not in config
    assert SECRET not in str(config)


@pytest.mark.parametrize(
    ("options", "endpoint", "signed"),
    [
        ({"endpoint_url": "http://host:9000/"}, "http://host:9000", "false"),
        ({"endpoint_url": "https://host"}, "https://host", "true"),
        ({"client_kwargs": {"endpoint_url": "host:9000"}}, "https://host:9000", "true"),
        ({"endpoint_url": "host:9000", "use_ssl": False}, "http://host:9000", "false"),
    ],
)
def test_endpoints_are_path_style_and_signed_where_nothing_else_protects(
    options: dict[str, Any], endpoint: str, signed: str
) -> None:
    config = config_of("s3://bucket", {"anon": True, **options})
    assert config["endpoint"] == endpoint
    assert config["virtual_hosted_style_request"] == "false"
    assert config["unsigned_payload"] == signed
    assert config["skip_signature"] == "true"


def test_other_words_of_s3fs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    config = config_of(
        "s3://bucket/x",
        {
            "key": "k" * 16,
            "secret": SECRET,
            "requester_pays": True,
            "s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "arn"},
            "config_kwargs": {"s3": {"addressing_style": "virtual"}, "max_pool_connections": 3},
            "use_listings_cache": True,
        },
    )
    assert config["region"] == "eu-central-1"
    assert config["server_side_encryption"] == "aws:kms"
    workers: Any = open_objects("s3://b", {"anon": True, "config_kwargs": {"max_pool_connections": 3}})
    assert workers.workers == 3
    with pytest.raises(InvalidInputError, match="'StorageClass'"):
        open_objects("s3://b", {"s3_additional_kwargs": {"StorageClass": "GLACIER"}})
    with pytest.raises(InvalidInputError, match="cannot be used"):
        open_objects("s3://b", {"client_kwargs": {"verify": str(tmp_path / "no-such-file.pem")}})


def test_google() -> None:
    service = {"type": "service_account", "private_key": SECRET, "client_email": "a@b", "private_key_id": "1"}
    assert config_of("gs://bucket/p", {"token": "anon", "project": "x"})["skip_signature"] == "true"
    assert config_of("gs://bucket/p", {"token": SECRET})["bearer_token"] == SECRET
    config = config_of("gcs://bucket/p", {"token": "anon", "endpoint_url": "http://localhost:4443"})
    assert config["base_url"] == "http://localhost:4443"
    with pytest.raises(InvalidInputError) as caught:
        open_objects("gs://bucket/p", {"token": service})  # not a real key
    assert SECRET not in str(caught.value) + str(caught.value.__cause__)
    with pytest.raises(InvalidInputError, match="transport='fsspec'"):
        open_objects("gs://bucket/p", {"token": object()})


def test_azure() -> None:
    key = "c2VjcmV0LXNlY3JldA=="
    config = config_of("az://container/p", {"account_name": "acc", "account_key": key})
    assert (config["account_name"], config["container_name"]) == ("acc", "container")
    config = config_of("abfss://container@acc.dfs.core.windows.net/p", {"sas_token": "sv=1&sig=abcdef"})
    assert (config["account_name"], config["container_name"], config["prefix"]) == ("acc", "container", "p")
    text = f"DefaultEndpointsProtocol=http;AccountName=acc;AccountKey={key};BlobEndpoint=http://127.0.0.1:10000/acc;"
    config = config_of("az://container/p", {"connection_string": text})
    assert (config["account_name"], config["account_key"]) == ("acc", key)
    with pytest.raises(InvalidInputError, match="credential object"):
        open_objects("az://container/p", {"account_name": "acc", "credential": object()})


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("status code: 403 Forbidden: <Code>AccessDenied</Code>", AccessDeniedError),
        ("status code: 401", AccessDeniedError),
        ("status code: 404 <Code>NoSuchKey</Code>", MissingObjectError),
        ("status code: 404 <Code>NoSuchBucket</Code>", BucketNotFoundError),
        ("status code: 507", StorageFullError),
        ("status code: 403 <Code>QuotaExceeded</Code>", StorageFullError),
        ("status code: 301 <Code>PermanentRedirect</Code>", InvalidInputError),
        ("status code: 500 <Code>InternalError</Code>", StorageUnavailableError),
        ("No space left on device (os error 28)", StorageFullError),
        ("Permission denied (os error 13)", AccessDeniedError),
        ("something unheard of", StorageUnavailableError),
        ("", StorageUnavailableError),
    ],
)
def test_what_servers_say_is_understood(said: str, expected: type[TailorError]) -> None:
    error = from_transport(RuntimeError(said), "writing", "s3://bucket/run", "a/b", Scrubber())
    assert type(error) is expected
    assert "s3://bucket/run" in str(error)


def test_a_scrubber_blots_out_every_spelling_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-environment")
    options = {
        "key": "AKIDAKID",
        "client_kwargs": {"aws_secret_access_key": SECRET},
        "token": {"private": ["deep-one"]},
    }
    scrubber = Scrubber(options)
    text = f"{SECRET} hunter2%2Fhunter2%2Bhunter2 hunter2/hunter2%2Bhunter2 AKIDAKID deep-one token-of-the-environment"
    assert scrubber.clean(text) == "*** *** *** *** *** ***"
    assert "hunter2" not in repr(scrubber)
    cause = scrubber.cause(ValueError(json.dumps({"Authorization": SECRET})))
    assert "hunter2" not in str(cause)
