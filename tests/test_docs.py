"""The README's examples run, and what it names exists."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import tailorstore as ts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_five_minute_tour_runs_as_it_stands(tmp_path: Path) -> None:
    # The first block is a sketch with the reader's own model; the tour is all that follows.
    program = "\n".join(BLOCKS[1:])
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for promised in re.findall(r"# ([\[({].*[\])}])$", program, flags=re.MULTILINE):
        if "…" not in promised:
            assert promised in done.stdout, promised
    assert (tmp_path / "tour.safetensors").stat().st_size > 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", README))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("line", re.findall(r"^\$ (tailorstore .*?)(?: +#.*)?$", README, flags=re.MULTILINE))
def test_commands_parse(line: str) -> None:
    from tailorstore.cli.main import cli

    _, name, *arguments = line.split()
    command = cli.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    command.make_context(name, list(arguments), resilient_parsing=True)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_words_of_the_design_are_the_words_of_the_code() -> None:
    """Every module that DESIGN.md draws exists."""
    design = (ROOT / "tailorstore" / "DESIGN.md").read_text()
    drawn = re.search(r"```\ntailorstore/\n(.*?)```", design, flags=re.DOTALL)
    assert drawn
    for floor in re.findall(r"^  (\w+)/ ", drawn[1], flags=re.MULTILINE):
        assert (ROOT / "tailorstore" / floor).is_dir(), floor
    for line in re.findall(r"^    ([a-z_, ]+?)(?:   .*)?$", drawn[1], flags=re.MULTILINE):
        for module in line.split(", "):
            assert (ROOT / "tailorstore" / "engine" / f"{module.strip()}.py").exists(), module


def test_the_example_for_distributed_checkpoint_runs(tmp_path: Path) -> None:
    [example] = re.findall(r"```python dcp\n(.*?)```", README, flags=re.DOTALL)
    state = {"model": {"weight": torch.arange(6.0)}}
    with ts.open_store(tmp_path / "run") as store, warnings.catch_warnings():
        # It tells that one process saves alone.
        warnings.simplefilter("ignore", UserWarning)
        exec(example, {"dcp": dcp, "state": state, "store": store, "step": 7})  # noqa: S102 - our own README
        assert store.checkout().step == 7
    assert torch.equal(state["model"]["weight"], torch.arange(6.0))
