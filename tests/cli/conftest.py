"""A store with some history, a copy of it for every test, and a way to call the command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import tailorstore as ts
from tailorstore.cli.main import cli

Run = Callable[..., Result]

LAYERS = ("blocks.0", "blocks.1", "blocks.2", "blocks.10", "head")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what the machine's environment would change."""
    for name in ("TAILORSTORE_URL", "TAILORSTORE_CATALOG", "TAILORSTORE_DEBUG", "FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store of five commits: steps 10 to 50, the tag ``best`` at 20, the branch ``retry`` at 30."""
    root: Path = tmp_path_factory.mktemp("cli") / "store"
    torch.manual_seed(0)
    model = {f"{layer}.weight": torch.randn(32, 8) for layer in LAYERS}
    with ts.open_store(root) as store:
        for number in range(1, 6):
            for tensor in model.values():
                tensor += 1
            store.commit(
                10 * number,
                model,
                mask=[LAYERS[number % len(LAYERS)]],
                metrics={"loss": float("nan") if number == 3 else 5.0 / number},
                message=f"number {number}",
            )
        store.tag("best", 20)
        store.branch("retry", 30)
    return root


@pytest.fixture
def root(history: Path, tmp_path: Path) -> Path:
    """Give a copy of the store to do with as one likes."""
    return Path(shutil.copytree(history, tmp_path / "store"))


@pytest.fixture
def run(root: Path) -> Run:
    """Give a function that calls a command on the store."""
    runner = CliRunner()

    def call(*args: str, env: dict[str, str] | None = None) -> Result:
        return runner.invoke(cli, args, env={"TAILORSTORE_URL": str(root), **(env or {})}, prog_name="tailorstore")

    return call


def answer(result: Result) -> Any:
    """Return the one document that a successful call with ``--json`` printed."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(result: Result) -> dict[str, str]:
    """Return the document that a call with ``--json`` printed about its failure."""
    assert result.exit_code != 0
    document: dict[str, str] = json.loads(result.stdout)
    assert document.keys() == {"error", "message"}
    return document
