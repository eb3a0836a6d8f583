"""From the words of the fsspec filesystems and the standard environment variables to obstore's stores."""

import configparser
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from tailorstore.domain.errors import InvalidInputError
from tailorstore.storage.failures import Scrubber
from tailorstore.storage.timeouts import CONNECT_SECONDS, READ_SECONDS, SILENCE_SECONDS, configured_attempts

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Credential

_RETRIES = 16
_RETRY_SECONDS = 5.0
"""obstore itself begins no retry later than this: whoever calls it goes on, see ``storage.retrying``."""

_TUNING = frozenset({
    "asynchronous", "loop", "use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache",
    "default_block_size", "default_fill_cache", "default_cache_type", "cache_regions", "max_concurrency",
    "fixed_upload_size", "batch_size", "blocksize", "block_size", "cache_timeout", "consistency", "access", "project",
    "timeout", "check_connection", "version_aware", "default_location",
})  # fmt: skip
"""Options that tune the fsspec filesystem itself and mean nothing here."""


@dataclass(frozen=True, slots=True)
class CloudStores:
    """A root as obstore sees it: stores that differ in how long they wait."""

    make: "Callable[[ClientConfig, RetryConfig], ObjectStore]"
    silence_seconds: float = SILENCE_SECONDS
    """How long a server may say nothing."""
    connect_seconds: float = CONNECT_SECONDS
    retries: int = _RETRIES
    workers: int | None = None
    """How many calls at once were asked for."""
    endpoint: str | None = None
    """The server, where it is not the provider's own."""

    def reading(self) -> "ObjectStore":
        """Return a store for requests that send little: it is the server's silence that is timed."""
        return self._store({
            "read_timeout": timedelta(seconds=self.silence_seconds),
            "timeout": timedelta(seconds=max(READ_SECONDS, self.silence_seconds)),
        })  # fmt: skip

    def writing(self, seconds: float) -> "ObjectStore":
        """Return a store for puts, each of which may take so long."""
        return self._store({"timeout": timedelta(seconds=seconds)})

    def _store(self, timeouts: "ClientConfig") -> "ObjectStore":
        retry: RetryConfig = {
            "max_retries": self.retries,
            "retry_timeout": timedelta(seconds=_RETRY_SECONDS),
            # The pause is drawn between the first and `base` times the one before; with obstore's own base of 2 it
            # does not grow.
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 4},
        }
        return self.make({"connect_timeout": timedelta(seconds=self.connect_seconds), **timeouts}, retry)


def s3_stores(path: str, options: Mapping[str, Any], scrubber: Scrubber) -> CloudStores:
    """Return the stores of ``bucket/prefix``.

    What stands in the options counts most, then the environment, then the profile in ``~/.aws``; where none of them
    has keys, obstore asks the machine's role (container, web identity, EC2).

    Raises:
        InvalidInputError: an option that only s3fs understands.
    """
    given = _Options("s3fs", options)
    client = given.nested("client_kwargs")
    config = given.nested("config_kwargs")
    profile = _Profile(given.take("profile") or os.environ.get("AWS_PROFILE"))
    key = given.take("key", "username") or client.take("aws_access_key_id")
    secret = given.take("secret", "password") or client.take("aws_secret_access_key")
    token = given.take("token") or client.take("aws_session_token")
    if not (key and secret):
        key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        # A token belongs to the keys that it came with and to no others.
        token = os.environ.get("AWS_SESSION_TOKEN")
    if not (key and secret):
        key, secret, token = profile.keys()
        scrubber.add(secret, token)
    endpoint = (
        given.take("endpoint_url")
        or client.take("endpoint_url")
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or profile.setting("endpoint_url")
    )
    region = (
        client.take("region_name")
        or os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
        or profile.setting("region")
        or "us-east-1"
    )
    use_ssl = given.take("use_ssl", default=True) and client.take("use_ssl", default=True)
    verify = client.take("verify", default=True)
    addressing = config.nested("s3").take("addressing_style")
    workers = config.take("max_pool_connections")
    anon = bool(given.take("anon", default=False)) or not isinstance(config.take("signature_version", default=""), str)
    connect = float(config.take("connect_timeout", default=CONNECT_SECONDS))
    silence = float(config.take("read_timeout", default=SILENCE_SECONDS))
    retries = _retries(config)
    extra = _s3_extra(given)
    for part in (given, client, config):
        part.refuse_rest()

    client_options: ClientConfig = {}
    if endpoint:
        if "://" not in endpoint:
            endpoint = f"{'https' if use_ssl else 'http'}://{endpoint}"
        extra["endpoint"] = endpoint.rstrip("/")
    # Over TLS the payload's own SHA-256 protects nothing more and costs 0.55 s of processor time for 1 GB.
    plain = (endpoint or "https:").startswith("http:") or not use_ssl
    extra["unsigned_payload"] = not plain
    if plain and not anon:
        # Costs nothing more once it is signed, and some servers check this alone: a flipped bit would be taken.
        extra["checksum_algorithm"] = "SHA256"
    client_options["allow_http"] = plain
    if verify is False:
        client_options["allow_invalid_certificates"] = True
    elif isinstance(verify, (str, os.PathLike)):
        client_options["root_certificate"] = Path(verify).read_bytes()
    if addressing != "virtual" and endpoint:
        extra["virtual_hosted_style_request"] = False
    elif addressing != "path":
        extra["virtual_hosted_style_request"] = True
    if anon:
        extra["skip_signature"] = True
    elif key and secret:
        credential: S3Credential = {
            "access_key_id": key,
            "secret_access_key": secret,
            "token": token,
            "expires_at": None,
        }
        # By a provider and not by arguments, which obstore would mix with a session token of the environment.
        extra["credential_provider"] = lambda: credential
    bucket, _, prefix = path.partition("/")

    def make(timeouts: "ClientConfig", retry: "RetryConfig") -> "ObjectStore":
        client: ClientConfig = {**client_options, **timeouts}
        return S3Store(bucket, prefix=prefix or None, region=region, client_options=client, retry_config=retry, **extra)

    return CloudStores(make, silence, connect, retries, workers, extra.get("endpoint"))


def google_stores(path: str, options: Mapping[str, Any]) -> CloudStores:
    """Return the stores of ``bucket/prefix``, from the options of gcsfs.

    Raises:
        InvalidInputError: an option that only gcsfs understands.
    """
    given = _Options("gcsfs", options)
    token = given.take("token")
    endpoint = given.take("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST")
    given.refuse_rest()
    extra: dict[str, Any] = {}
    if token == "anon":  # noqa: S105 - gcsfs's word for none
        extra["skip_signature"] = True
    elif isinstance(token, Mapping):
        extra["service_account_key"] = json.dumps(dict(token))
    elif isinstance(token, str) and token not in ("google_default", "cloud", "cache"):
        if os.path.exists(os.path.expanduser(token)):
            extra["application_credentials"] = os.path.expanduser(token)
        else:
            extra["bearer_token"] = token
    elif token is not None and not isinstance(token, str):
        msg = "obstore takes Google's token as a path, dictionary, access token or 'anon'; or use transport='fsspec'"
        raise InvalidInputError(msg)
    client_options: ClientConfig = {}
    if endpoint:
        endpoint = endpoint if "://" in endpoint else f"http://{endpoint}"
        extra["base_url"] = endpoint.rstrip("/")
        client_options["allow_http"] = endpoint.startswith("http:")
    bucket, _, prefix = path.partition("/")

    def make(timeouts: "ClientConfig", retry: "RetryConfig") -> "ObjectStore":
        client: ClientConfig = {**client_options, **timeouts}
        return GCSStore(bucket, prefix=prefix or None, client_options=client, retry_config=retry, **extra)

    return CloudStores(make, endpoint=extra.get("base_url"))


def azure_stores(path: str, options: Mapping[str, Any]) -> CloudStores:
    """Return the stores of ``container/prefix`` or ``container@account.host/prefix``, from the options of adlfs.

    Raises:
        InvalidInputError: an option that only adlfs understands.
    """
    given = _Options("adlfs", options)
    container, _, prefix = path.partition("/")
    container, _, host = container.partition("@")
    extra: dict[str, Any] = {"account_name": host.partition(".")[0]} if host else {}
    connection = dict(
        part.partition("=")[::2] for part in (given.take("connection_string") or "").split(";") if "=" in part
    )
    words = {
        "account_name": connection.get("AccountName"),
        "account_key": connection.get("AccountKey"),
        "sas_token": connection.get("SharedAccessSignature"),
        "account_host": connection.get("BlobEndpoint"),
        "client_id": None,
        "client_secret": None,
        "tenant_id": None,
    }
    names = {"sas_token": "sas_key", "account_host": "endpoint"}
    for word, fallback in words.items():
        value = given.take(word) or fallback
        if value:
            extra[names.get(word, word)] = value
    credential = given.take("credential")
    if isinstance(credential, str):
        extra["account_key"] = credential
    elif credential is not None:
        msg = "obstore takes no Azure credential object; give account_key, sas_token, or client_id and client_secret"
        raise InvalidInputError(msg)
    if given.take("anon", default=False) is True:
        extra["skip_signature"] = True
    given.refuse_rest()
    client_options: ClientConfig = {}
    endpoint = extra.get("endpoint")
    if endpoint:
        extra["endpoint"] = endpoint if "://" in endpoint else f"https://{endpoint}"
        client_options["allow_http"] = extra["endpoint"].startswith("http:")

    def make(timeouts: "ClientConfig", retry: "RetryConfig") -> "ObjectStore":
        client: ClientConfig = {**client_options, **timeouts}
        return AzureStore(container, prefix=prefix or None, client_options=client, retry_config=retry, **extra)

    return CloudStores(make, endpoint=extra.get("endpoint"))


def local_stores() -> CloudStores:
    """Return a store of the whole machine's files."""
    return CloudStores(lambda timeouts, retry: LocalStore())


class _Options:
    """Options that are taken one by one, so that what nobody understood can be named."""

    def __init__(self, package: str, options: Mapping[str, Any]) -> None:
        self._package = package
        self._left = dict(options)

    def take(self, *names: str, default: Any = None) -> Any:  # noqa: ANN401 - options are of any type
        found = default
        for name in reversed(names):
            value = self._left.pop(name, None)
            found = found if value is None else value
        return found

    def nested(self, name: str) -> "_Options":
        value = self._left.pop(name, None) or {}
        if not isinstance(value, Mapping):
            msg = f"storage option {name!r} must be a dictionary, not {type(value).__name__}"
            raise InvalidInputError(msg)
        return _Options(self._package, value)

    def refuse_rest(self) -> None:
        unknown = sorted(name for name in self._left if name not in _TUNING)
        if unknown:
            msg = (
                f"storage options {', '.join(map(repr, unknown))} are not understood; check their spelling, or use "
                f"transport='fsspec' if they are meant for {self._package}"
            )
            raise InvalidInputError(msg)


class _Profile:
    """Static keys and settings of a profile in AWS's own files. Never raises: a broken file is one without keys."""

    def __init__(self, name: str | None) -> None:
        self._credentials = self._section("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name or "default")
        section = f"profile {name}" if name and name != "default" else "default"
        self._config = self._section("AWS_CONFIG_FILE", "~/.aws/config", section)

    @staticmethod
    def _section(variable: str, default: str, section: str) -> Mapping[str, str]:
        parser = configparser.ConfigParser(interpolation=None, default_section="")
        try:
            parser.read(os.path.expanduser(os.environ.get(variable, default)), encoding="utf-8")
            return dict(parser[section])
        except (configparser.Error, KeyError, OSError, UnicodeDecodeError):
            return {}

    def keys(self) -> tuple[str | None, str | None, str | None]:
        for source in (self._credentials, self._config):
            if source.get("aws_access_key_id") and source.get("aws_secret_access_key"):
                return source["aws_access_key_id"], source["aws_secret_access_key"], source.get("aws_session_token")
        return None, None, None

    def setting(self, name: str) -> str | None:
        return self._config.get(name) or self._credentials.get(name)


def _retries(config: _Options) -> int:
    """Return how often obstore is to repeat a request, from botocore's words where they are given."""
    attempts = configured_attempts({"retries": config.take("retries")})
    return _RETRIES if attempts is None else attempts - 1


def _s3_extra(given: _Options) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    additional = given.nested("s3_additional_kwargs")
    for word, name in (("ServerSideEncryption", "server_side_encryption"), ("SSEKMSKeyId", "sse_kms_key_id")):
        value = additional.take(word)
        if value is not None:
            extra[name] = value
    additional.refuse_rest()
    if given.take("requester_pays", default=False):
        extra["request_payer"] = True
    return extra
