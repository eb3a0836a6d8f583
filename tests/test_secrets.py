"""No secret is in anything that is printed, raised, logged or stored, in whatever spelling."""

import base64
import contextlib
import json
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, quote_plus

import pytest
import torch
from click.testing import CliRunner

import tailorstore as ts
from tailorstore.catalog.urls import parse_url
from tailorstore.cli.main import cli
from tailorstore.cli.settings import Settings
from tests.kit.postgres import PostgresServer
from tests.kit.processes import HOST
from tests.kit.s3 import S3Key, S3Server

PLANTED: Final = "pl4nted/s3kr1t+w0rd=%7E&x"
"""Of characters that every encoding writes in its own way."""
REFUSED: Final = (ts.TailorError,)


def spellings(secret: str) -> list[str]:
    """Return the ways in which a secret may be written."""
    raw = secret.encode()
    found = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), raw.hex(), json.dumps(secret)[1:-1]}
    # Wherever it begins among the three bytes that base64 takes at once; ends depend on what is beside it.
    for lead in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            coded = encode(b"x" * lead + raw).decode()
            found.add(coded[4 if lead else 0 : len(coded) - 4])
    return sorted(found)


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and all that stand behind it or are grouped in it."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


def told_by(error: BaseException) -> str:
    """Return all that an error says to whoever prints, logs or pickles it."""
    texts = list(traceback.format_exception(error))
    for one in chain_of(error):
        texts += [repr(one), str(one), repr(one.args), repr(vars(one)), *getattr(one, "__notes__", [])]
    return "\n".join(texts)


class Watch:
    """Gathers what was told, and looks for secrets in it."""

    def __init__(self, *secrets: str) -> None:
        self.secrets = secrets
        self.told: list[tuple[str, str]] = []
        self.kinds: set[str] = set()

    def tell(self, where: str, text: str) -> None:
        self.told.append((where, text))

    @contextlib.contextmanager
    def refusal(self, where: str) -> Iterator[None]:
        """Demand that the block is refused, and keep what that said."""
        with pytest.raises(REFUSED) as caught:
            yield
        self.kinds.add(type(caught.value).__name__)
        self.tell(where, told_by(caught.value))

    def files(self, *folders: Path) -> int:
        """Keep what all files below some folders hold, and what they are called; return how many there are."""
        count = 0
        for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
            count += 1
            self.tell(str(path), str(path) + path.read_bytes().decode("latin-1"))
        return count

    def check(self) -> None:
        assert self.told
        for secret in self.secrets:
            for spelling in spellings(secret):
                leaks = [where for where, text in self.told if spelling in text]
                assert leaks == [], spelling


@pytest.fixture
def watch(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[Watch]:
    """Give a watch that also looks at what was logged, at every level, and printed."""
    caplog.set_level(logging.DEBUG)
    watch = Watch(PLANTED)
    yield watch
    for record in caplog.records:
        # What others log of their own requests at DEBUG is theirs; to us it is the user's own switch.
        if record.name.startswith("tailorstore") or record.levelno >= logging.INFO:
            watch.tell(f"log of {record.name}", record.getMessage() + str(record.exc_text))
    printed = capfd.readouterr()
    watch.tell("output", printed.out + printed.err)
    watch.check()


def test_the_watch_finds_secrets_in_every_spelling() -> None:
    def fail() -> None:
        try:
            raise KeyError(f"Basic {base64.b64encode(f'me:{PLANTED}'.encode()).decode()}")
        except KeyError:
            raise ts.TailorError("nothing here") from None

    for text in (PLANTED, quote_plus(PLANTED), base64.b64encode(f"ab{PLANTED}c".encode()).decode()):
        watch = Watch(PLANTED)
        watch.tell("x", f"...{text}...")
        with pytest.raises(AssertionError):
            watch.check()
    watch = Watch(PLANTED)
    with watch.refusal("hidden context"):
        fail()
    with pytest.raises(AssertionError):
        watch.check()


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIDEXAMPLE:{PLANTED}@bucket/run",
        f"s3://bucket/run?X-Amz-Signature={PLANTED}",
        f"az://container/run?sv=2024&sig={PLANTED}",
        f"ftp://me:{quote(PLANTED, safe='')}@127.0.0.1:9/run",
        f"ftp://me:{PLANTED}@127.0.0.1:9/run",
        f"what://me:{PLANTED}@host/run",
        f"simplecache::ftp://me:{quote(PLANTED, safe='')}@127.0.0.1:9/run",
    ],
)
def test_secrets_in_urls_are_in_no_error(watch: Watch, url: str, tmp_path: Path) -> None:
    with watch.refusal(url.partition(":")[0]):
        ts.open_store(url, catalog=f"sqlite:///{tmp_path}/catalog.sqlite")
    for more in ([], ["--json"]):
        result = CliRunner().invoke(cli, ["log", "--store", url, *more], prog_name="tailorstore")
        assert result.exit_code != 0
        watch.tell("command line", result.output + result.stderr)


@pytest.mark.parametrize("transport", ["obstore", "fsspec"])
def test_secrets_in_storage_options_are_in_no_error(
    watch: Watch, s3_server: S3Server, tmp_path: Path, transport: Any
) -> None:
    wrong = S3Key(s3_server.admin.key, PLANTED)
    catalog = f"sqlite:///{tmp_path}/catalog.sqlite"
    url = f"s3://{s3_server.bucket}/secrets"
    strange: list[dict[str, Any]] = [{"token": PLANTED}, {}, {"password": {"x": PLANTED}}]
    for besides in strange:
        with watch.refusal("wrong secret"):
            storage_options = {**s3_server.storage_options(wrong), **besides}
            ts.open_store(url, catalog=catalog, storage_options=storage_options, transport=transport)
    arguments = ["--store", url, "--catalog", catalog, "--transport", transport]
    given = [f"secret={PLANTED}", f"token={PLANTED}", f"key={wrong.key}", f"endpoint_url={s3_server.endpoint_url}"]
    for more in ([], ["--json"]):
        command = ["log", *arguments, *(part for one in given for part in ("--storage-option", one)), *more]
        result = CliRunner().invoke(cli, command, prog_name="tailorstore")
        assert result.exit_code != 0
        watch.tell("command line", result.output + result.stderr)
    assert "AccessDeniedError" in watch.kinds


def test_secrets_in_the_environment_are_in_no_error(
    watch: Watch, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment(S3Key(s3_server.admin.key, PLANTED)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SESSION_TOKEN", PLANTED)
    for transport in ("obstore", "fsspec"):
        with watch.refusal("environment"):
            ts.open_store(
                f"s3://{s3_server.bucket}/env",
                catalog=f"sqlite:///{tmp_path}/catalog.sqlite",
                transport=transport,
            )
    result = CliRunner().invoke(cli, ["--json", "log", "--store", f"s3://{s3_server.bucket}/env"])
    assert result.exit_code != 0
    watch.tell("command line", result.output + result.stderr)
    assert watch.kinds == {"AccessDeniedError"}


def test_passwords_of_catalogs_are_in_no_error(
    watch: Watch, postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = quote(PLANTED, safe="")
    at = f"{HOST}:{postgres_server.port}"
    urls = [
        f"postgresql://postgres:{coded}@{at}/postgres",
        f"postgresql://postgres@{at}/postgres?password={coded}",
        f"postgresql://postgres@{at}/postgres?sslpassword={coded}",
        f"postgresql://postgres:{coded}@{at}/nothing-of-this-name",
        f"postgresql://postgres:{PLANTED}@{at}/postgres",
        f"mysql://me:{coded}@host/db",
        f"sqlite:///{tmp_path}/c.db?password={coded}",
    ]
    for url in urls:
        with watch.refusal(url[:40]):
            ts.open_store(f"file://{tmp_path}/root", catalog=url)
        result = CliRunner().invoke(cli, ["--json", "init", "--store", f"{tmp_path}/root", "--catalog", url])
        assert result.exit_code != 0
        watch.tell("command line", result.output + result.stderr)
    monkeypatch.setenv("PGPASSWORD", PLANTED)
    with watch.refusal("PGPASSWORD"):
        ts.open_store(f"file://{tmp_path}/root", catalog=f"postgresql://postgres@{at}/postgres")
    assert watch.kinds >= {"AccessDeniedError", "InvalidInputError"}
    assert watch.files(tmp_path) >= 0


def test_nothing_that_knows_a_secret_shows_it(watch: Watch, s3_server: S3Server, tmp_path: Path) -> None:
    parsed = parse_url(f"postgresql://me:{quote(PLANTED, safe='')}@host/db?sslpassword={quote(PLANTED, safe='')}")
    settings = Settings(
        store=f"ftp://me:{PLANTED}@host/x", catalog=f"postgresql://me:{PLANTED}@h/d", storage_option={"secret": PLANTED}
    )
    for known in (parsed, settings):
        watch.tell(type(known).__name__, f"{known!r} {known}")
    help_text = CliRunner().invoke(cli, ["--help"], env={"TAILORSTORE_URL": f"s3://k:{PLANTED}@b/x"})
    watch.tell("help", help_text.output)


def use(root: str, catalog: str, options: dict[str, Any], tell: Callable[[str, str], None]) -> None:
    """Do with a store all that writes something, by the library and by the command line."""
    with ts.open_store(root, catalog=catalog, storage_options=options, chunk_bytes=1024) as store:
        store.commit(
            1, {"a.w": torch.arange(600.0)}, extra={"x": torch.arange(4)}, message="one", metrics={"loss": 1.0}
        )
        store.commit(2, {"a.w": torch.arange(600.0) + 1})
        store.tag("best", 1)
        store.branch("side", 1)
        checkpoint = store.checkout("best")
        for known in (store, checkpoint, checkpoint.model["a.w"], checkpoint.commit, store.stats(), store.verify()):
            tell(type(known).__name__, f"{known!r} {known}")
        tell("store's objects", repr(vars(store)) + repr(store._objects))
        tell("gc", repr(store.gc(ts.KeepLast(1))))
        tell("zarr", repr(checkpoint.zarr()) + repr(dict(checkpoint.zarr().attrs)))
        for refused in (lambda: store.checkout("nothing"), lambda: store.commit(1, {"a.w": torch.ones(3)})):
            try:
                refused()
            except ts.TailorError as error:
                tell("refusal", told_by(error))
    options_given = [part for name, value in options.items() for part in ("--storage-option", f"{name}={value}")]
    for command in (["log"], ["show"], ["stats"], ["branches"], ["tags"], ["verify"], ["gc"], ["diff", "1", "2"]):
        for more in ([], ["--json"]):
            arguments = [*more, *command, "--store", root, "--catalog", catalog, *options_given]
            result = CliRunner().invoke(cli, arguments, prog_name="tailorstore")
            tell(f"command {command[0]}", result.output + result.stderr)


def test_what_is_stored_and_shown_holds_no_secret(
    watch: Watch, s3_server: S3Server, postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With credentials that work, in the bucket and in Postgres, and with a local catalog beside."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    watch.secrets = (s3_server.admin.secret, postgres_server.password)
    options = s3_server.storage_options()
    region = options.pop("client_kwargs")["region_name"]
    monkeypatch.setenv("AWS_REGION", region)
    root = f"s3://{s3_server.bucket}/stored/{os.getpid()}"
    with postgres_server.create_database() as url:
        use(root, url, options, watch.tell)
        with postgres_server.connect(url.rpartition("/")[2].partition("?")[0]) as connection:
            tables = connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
            ).fetchall()
            assert len(tables) > 5
            for (table,) in tables:
                rows = connection.execute(f'SELECT t::text FROM "{table}" t').fetchall()  # noqa: S608
                watch.tell(f"table {table}", repr(rows))
    use(f"{root}-local", f"sqlite:///{tmp_path}/catalogs/catalog.sqlite", options, watch.tell)
    with contextlib.closing(s3_server.client()) as client:
        keys = s3_server.keys(root)
        assert len(keys) > 10
        for key in keys:
            body = client.get_object(Bucket=s3_server.bucket, Key=key)["Body"].read()
            watch.tell(key, key + body.decode("latin-1"))
    assert watch.files(tmp_path) > 0
