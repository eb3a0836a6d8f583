"""The commands and options that people's scripts rely on: frozen here, so that none changes by accident."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from tailorstore.cli.errors import EXIT_CODES
from tailorstore.cli.main import cli

COMMON = ["--branch", "--catalog", "--json", "--storage-option", "--store", "--transport"]
OWN = {
    "init": [],
    "demo": ["--mask", "--quick", "--steps", "--to"],
    "bench": ["--gigabytes", "--repeat"],
    "study": [
        "--commits",
        "--discard",
        "--draw-only",
        "--evaluations",
        "--every",
        "--factors",
        "--freeze",
        "--optimizer",
        "--out",
        "--precision",
        "--resume",
        "--seeds",
        "--size",
        "--strategy",
        "--task",
        "--work",
    ],
    "log": ["--limit", "-n"],
    "show": ["ref"],
    "diff": ["--all", "a", "b"],
    "checkout": ["--fallback", "--format", "--optim", "--overwrite", "--to", "ref"],
    "heatmap": ["--limit", "--linear", "--measure", "--output", "--overwrite", "-n"],
    "stats": [],
    "strategies": ["text"],
    "tag": ["--delete", "--list", "name", "ref"],
    "branch": ["--delete", "--list", "--move", "name", "ref"],
    "gc": [
        "--dry-run",
        "--grace",
        "--keep-best",
        "--keep-every",
        "--keep-last",
        "--keep-tagged",
        "--keep-within",
        "--yes",
        "-n",
        "-y",
    ],
    "verify": ["--repair", "ref"],
    "scrub": ["--fraction"],
    "rebuild": ["--dry-run", "-n", "--yes", "-y"],
    "upgrade": [],
}


def _command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def _names(command: click.Command) -> list[str]:
    return sorted(name for param in command.params for name in param.opts)


def test_commands_are_frozen() -> None:
    assert cli.list_commands(click.Context(cli)) == list(OWN)


@pytest.mark.parametrize("name", OWN)
def test_options_are_frozen(name: str) -> None:
    assert _names(_command(name)) == sorted([*OWN[name], *COMMON])


def test_options_of_the_group_are_frozen() -> None:
    assert _names(cli) == sorted([*COMMON, "--version"])


@pytest.mark.parametrize("name", OWN)
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"], prog_name="tailorstore")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"tailorstore {name}" in result.output.split("Examples:")[1]
    command = _command(name)
    assert all(param.help for param in command.params if isinstance(param, click.Option))
    listed = CliRunner().invoke(cli, ["--help"]).output
    assert f"  {name} " in listed
    assert "..." not in listed.partition("Begin:")[2]


def test_help_lists_exit_codes_and_environment() -> None:
    text = " ".join(CliRunner().invoke(cli, ["--help"]).output.split())
    for code, meaning in EXIT_CODES:
        assert f"{code} {meaning}" in text
    assert "TAILORSTORE_URL" in text
    assert "TAILORSTORE_CATALOG" in text


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).output.startswith("tailorstore, version ")


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["log", "--help"], ["gc", "--help"], ["demo", "--help"]])
def test_help_does_not_wait_for_heavy_imports(args: list[str]) -> None:
    script = (
        "import sys\n"
        "from tailorstore.cli.main import cli\n"
        f"cli.main({args!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'sqlalchemy', 'zarr', 'fsspec', 'obstore', 'rich.console'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, stdout=subprocess.DEVNULL)
