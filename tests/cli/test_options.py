"""Where options may stand, and what their values may be."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from tailorstore.cli.values import Best, Duration, StorageOption, nested
from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.retention import KeepBest
from tests.cli.conftest import Run, answer


@pytest.mark.parametrize(
    "args",
    [
        ("--store", "ROOT", "--branch", "retry", "--json", "log"),
        ("log", "--store", "ROOT", "--branch", "retry", "--json"),
        ("--branch", "main", "--store", "/nowhere", "log", "--store", "ROOT", "--branch", "retry", "--json"),
        ("--json", "log", "--branch", "retry"),
    ],
)
def test_options_stand_before_or_after_the_command(run: Run, root: Path, args: tuple[str, ...]) -> None:
    env = {"TAILORSTORE_URL": str(root) if "ROOT" not in args else "/not/this/one"}
    document = answer(run(*(arg.replace("ROOT", str(root)) for arg in args), env=env))
    assert document["branch"] == "retry"


def test_storage_options_add_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def catch(url: str, **options: Any) -> None:
        seen.update(options, url=url)
        raise InvalidInputError("seen enough")

    monkeypatch.setattr("tailorstore.engine.front_door.open_store", catch)
    run(
        *("--storage-option", "key=123", "--storage-option", "client_kwargs.region_name=eu-1", "--store", "s3://b/r"),
        *("log", "--storage-option", "anon=false", "--storage-option", "retries=3", "--transport", "fsspec"),
        *("--catalog", "sqlite:///x.db", "--storage-option", 'config={"a": 1}'),
    )
    assert seen == {
        "url": "s3://b/r",
        "catalog": "sqlite:///x.db",
        "branch": "main",
        "transport": "fsspec",
        "create": False,
        "storage_options": {
            "key": "123",
            "client_kwargs": {"region_name": "eu-1"},
            "anon": False,
            "retries": 3,
            "config": {"a": 1},
        },
    }


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("1.5h", timedelta(minutes=90)),
        ("7d", timedelta(days=7)),
        ("2W", timedelta(weeks=2)),
        ("1d12h", timedelta(hours=36)),
        ("0", timedelta(0)),
    ],
)
def test_durations(text: str, length: timedelta) -> None:
    assert Duration().convert(text, None, None) == length


@pytest.mark.parametrize("text", ["", "7", "d", "1y", "7d!", "-1d", "99999999999w"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Duration().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("loss", KeepBest("loss")),
        ("loss:3", KeepBest("loss", 3)),
        ("accuracy:2:max", KeepBest("accuracy", 2, "max")),
        ("accuracy:max", KeepBest("accuracy", 1, "max")),
        ("eval:loss:3", KeepBest("eval:loss", 3)),
    ],
)
def test_best(text: str, policy: KeepBest) -> None:
    assert Best().convert(text, None, None) == policy


@pytest.mark.parametrize("text", ["novalue", "=x", "a..b=1", "."])
def test_what_is_no_storage_option(text: str) -> None:
    with pytest.raises(click.BadParameter):
        StorageOption().convert(text, None, None)


def test_storage_options_cannot_be_value_and_folder() -> None:
    with pytest.raises(InvalidInputError, match="reaches inside"):
        nested({"a": 1, "a.b": 2})
