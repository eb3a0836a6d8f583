"""How tables look on terminals of different kinds."""

import contextlib
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

import tailorstore as ts
from tests.cli.conftest import Run

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize(
    "args", [("log",), ("show",), ("diff", "10"), ("checkout",), ("tag",), ("gc", "--keep-last", "1", "-n")]
)
def test_tables_fit_the_terminal(run: Run, args: tuple[str, ...], width: int) -> None:
    result = run(*args, env={"FORCE_COLOR": "1", "COLUMNS": str(width), "TERM": "xterm"})
    lines = COLOUR.sub("", result.stdout).splitlines()
    rule = next(at for at, line in enumerate(lines) if line.startswith("─"))
    table = "\n".join(lines[rule - 1 :]).split("\n\n")[0].splitlines()
    assert len(table) > 2
    assert max(cell_len(line.rstrip()) for line in table) <= width


def test_narrow_terminals_leave_out_what_can_be_spared(run: Run) -> None:
    wide = COLOUR.sub("", run("log", env={"FORCE_COLOR": "1", "COLUMNS": "120", "TERM": "xterm"}).stdout)
    narrow = COLOUR.sub("", run("log", env={"FORCE_COLOR": "1", "COLUMNS": "64", "TERM": "xterm"}).stdout)
    assert "message" in wide
    assert "message" not in narrow
    assert "loss=2.5" in narrow


def test_no_color_is_honoured(run: Run) -> None:
    env = {"FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm"}
    assert "\x1b[33m" in run("log", env=env).stdout
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", run("log", env={**env, "NO_COLOR": "1"}).stdout)


def test_pipes_get_neither_frames_nor_colours_nor_cut_lines(run: Run) -> None:
    text = run("show", env={"COLUMNS": "20"}).stdout
    assert "\x1b" not in text
    assert "─" not in text
    assert "blocks.10         30        20  full" in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_names_cannot_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "odd"
    names = ["evil\x1b[2J.weight", "new\nline.weight", "[bold]markup[/bold].weight", "宽度.weight", "half\udcff.weight"]
    with ts.open_store(root) as store:
        store.commit(1, {name: torch.zeros(1) for name in names}, message="rung \a bell")
    for env in ({}, {"FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm"}):
        for command in ("show", "checkout", "log"):
            text = COLOUR.sub("", run(command, "--store", str(root), env=env).stdout)
            assert "\x1b" not in text
            assert "\a" not in text
        text = COLOUR.sub("", run("checkout", "--store", str(root), env=env).stdout)
        assert "evil\\x1b[2J" in text
        assert "new\\nline" in text
        assert "[bold]markup[/bold]" in text
        assert "宽度" in text
    assert run("show", "--json", "--store", str(root)).exit_code == 0


def test_sentences_are_folded_between_words(root: Path) -> None:
    text = _on_terminal(50, "stats", "--store", str(root))
    assert max(cell_len(line) for line in text.splitlines() if "/" not in line) <= 50
    error = _on_terminal(40, "show", "nothing", "--store", str(root))
    assert error.startswith("Error: no tag, branch or commit")
    assert max(cell_len(line) for line in error.splitlines()) <= 40
    assert "nothing" in error.replace("\n", " ")


def _on_terminal(width: int, *args: str) -> str:
    """Run a command with both streams on a terminal of some width; return what it shows, without colours."""
    outer, inner = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm"}
    command = [sys.executable, "-m", "tailorstore.cli.main", *args]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=inner, stderr=inner, env=environment)
    os.close(inner)
    shown = b""
    # The end of a terminal whose other side is closed is an error on Linux.
    with contextlib.suppress(OSError):
        while part := os.read(outer, 65536):
            shown += part
    os.close(outer)
    process.wait(timeout=60)
    return COLOUR.sub("", shown.decode().replace("\r\n", "\n"))
