"""What goes wrong, how it is said, and with which exit code."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tailorstore.cli.errors import error_kind
from tailorstore.cli.secrets import secrets_in
from tailorstore.domain import errors
from tests.cli.conftest import Run, refusal

COMMAND = [sys.executable, "-m", "tailorstore.cli.main"]


@pytest.mark.parametrize(
    ("args", "code", "kind"),
    [
        (("show", "nothing"), 3, "ref_not_found"),
        (("show", "15"), 3, "ref_not_found"),
        (("log", "--branch", "nothing"), 3, "branch_not_found"),
        (("log", "--store", "/nowhere/at/all"), 3, "store_not_found"),
        (("show", "main@now"), 2, "invalid_input"),
        (("tag", "latest"), 2, "bad_name"),
        (("log", "--store", "what://is/this"), 2, "invalid_input"),
        (("log", "--catalog", "mysql://host/db"), 2, "invalid_input"),
        (("log", "--limit", "many"), 2, "usage"),
        (("diff",), 2, "usage"),
        (("frobnicate",), 2, "usage"),
        (("--frobnicate", "log"), 2, "usage"),
        (("tag", "best"), 4, "tag_exists"),
    ],
)
def test_exit_codes_and_kinds(run: Run, args: tuple[str, ...], code: int, kind: str) -> None:
    plain = run(*args)
    assert plain.exit_code == code
    assert plain.stdout == ""
    assert "Error:" in plain.stderr
    as_json = run("--json", *args)
    assert as_json.exit_code == code
    assert refusal(as_json)["error"] == kind
    assert as_json.stderr == ""


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TailorError)]
)
def test_the_name_of_an_error_is_that_of_its_class_in_words(kind: type[errors.TailorError]) -> None:
    words = error_kind(kind("")).split("_")
    assert "".join(word.capitalize() for word in words) == kind.__name__.removesuffix("Error")


def test_one_letter_is_a_word() -> None:
    assert error_kind(errors.NotAStoreError("")) == "not_a_store"


def test_no_store_says_how_to_name_one(run: Run) -> None:
    result = run("log", env={"TAILORSTORE_URL": ""})
    assert result.exit_code == 2
    assert "--store" in result.stderr
    assert "TAILORSTORE_URL" in result.stderr


def test_a_broken_root_document_is_told_and_without_commits_exits_with_5(run: Run, root: Path) -> None:
    (root / "tailorstore.json").write_text("{")
    result = run("log")
    assert result.exit_code == 0
    assert "tailorstore rebuild" in result.stderr
    shutil.rmtree(root / "commits")
    assert run("log").exit_code == 5


def test_unreachable_catalog_exits_with_6(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.database.OPENING_SECONDS", 0.5)
    result = run("init", "--store", "memory://unreachable", "--catalog", "postgresql://u:hunter2@127.0.0.1:9/db")
    assert result.exit_code == 6
    assert "hunter2" not in result.output


def test_it_is_told_that_a_catalog_is_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.database._SILENT_SECONDS", 0.1)
    monkeypatch.setattr("tailorstore.catalog.database.OPENING_SECONDS", 0.5)
    result = run("init", "--store", "memory://unreachable", "--catalog", "postgresql://u:hunter2@127.0.0.1:9/db")
    assert result.stderr.count("Warning: waiting for the catalog postgresql") == 1
    assert "(up to 0.5 s)" in result.stderr
    assert "hunter2" not in result.output


def test_unexpected_errors_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by my own fault: s3kr1t-token")

    monkeypatch.setattr("tailorstore.engine.store.Store.stats", fail)
    result = run("stats", "--storage-option", "token=s3kr1t-token")
    assert result.exit_code == 1
    assert (
        result.stderr == "Error: ZeroDivisionError: by my own fault: *** (set TAILORSTORE_DEBUG=1 for the traceback)\n"
    )


@pytest.mark.parametrize(
    "args",
    [
        ("--store", "s3://AKIDEXAMPLE:wJalrXUtn@bucket/run", "log"),
        ("--store", "ftp://me:wJalrXUtn@127.0.0.1:9/run", "log"),
        ("--catalog", "postgresql://me:wJalrXUtn@127.0.0.1:9/db", "init", "--store", "memory://secrets"),
        ("--store", "memory://secrets", "log", "--storage-option", "wJalrXUtn"),
        ("--store", "s3://bucket/run", "log", "--storage-option", "secret=wJalrXUtn", "--storage-option", "oops=1"),
    ],
)
def test_secrets_are_never_printed(run: Run, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorstore.catalog.database.OPENING_SECONDS", 0.5)
    for more in ((), ("--json",)):
        result = run(*args, *more, env={"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_REGION": "x"})
        assert result.exit_code != 0
        assert "wJalrXUtn" not in result.output


def test_which_texts_are_secret() -> None:
    urls = {"store": "ftp://me:p%40ssword@host/x?token=abcdef&list=public", "catalog": None}
    options = {"key": "AKIDEXAMPLE", "client_kwargs": {"endpoint_url": "http://host", "aws_secret_access_key": "xyzzy"}}
    found = secrets_in(urls, options)
    assert set(found) >= {"p%40ssword", "p@ssword", "abcdef", "AKIDEXAMPLE", "xyzzy"}
    assert not {"public", "http://host", "host"} & set(found)


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "TAILORSTORE_URL": str(root), "PYTHONUNBUFFERED": "1"}


def test_a_closed_pipe_ends_it_quietly(root: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        ended = subprocess.run(
            [*COMMAND, "log"], stdout=closed, stderr=subprocess.PIPE, env=_environment(root), timeout=120, check=False
        )
    assert ended.stderr == b""
    assert ended.returncode == 141


def test_an_interrupt_ends_it_quietly(root: Path, tmp_path: Path) -> None:
    # A catalog behind a pipe that nobody writes to: the command hangs until it is interrupted.
    script = (
        "import sys, time, tailorstore.engine.store as s\n"
        "s.Store.stats = lambda self: (print('ready', flush=True), time.sleep(60))\n"
        "from tailorstore.cli.main import cli\n"
        "cli(['stats'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(root),
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "Interrupted."
