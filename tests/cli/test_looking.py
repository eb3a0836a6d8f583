"""log, show, diff, checkout, stats: what they say of a store."""

import json
from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tests.cli.conftest import LAYERS, Run, answer, refusal


def test_log_lists_commits_newest_first(run: Run) -> None:
    lines = run("log").stdout.splitlines()

    assert lines[0].split() == [
        "step",
        "commit",
        "when",
        "layers",
        "written",
        "of",
        "full",
        "metrics",
        "names",
        "message",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["50", "40", "30", "20", "10"]
    assert "loss=2.5" in lines[4]
    assert "best" in lines[4]
    assert "loss=nan" in lines[3]
    assert "retry" in lines[3]


def test_log_in_json_has_whole_commits(run: Run) -> None:
    document = answer(run("log", "--json"))

    assert document["branch"] == "main"
    commit = document["commits"][2]
    assert commit.keys() == {
        "id",
        "step",
        "branch",
        "parent",
        "created_at",
        "message",
        "metrics",
        "layers_written",
        "bytes_written",
        "bytes_logical",
    }
    assert commit["step"] == 30
    assert commit["metrics"] == {"loss": "nan"}
    assert commit["layers_written"] == [LAYERS[3]]
    assert commit["created_at"].endswith("+00:00")


def test_log_stops_at_its_limit_and_says_so(run: Run) -> None:
    result = run("log", "--limit", "2")

    assert len(result.stdout.splitlines()) == 3
    assert "--limit 0" in result.stderr
    assert len(answer(run("log", "--limit", "2", "--json"))["commits"]) == 2
    assert len(run("log", "--limit", "0").stdout.splitlines()) == 6


def test_log_of_another_branch(run: Run) -> None:
    assert [commit["step"] for commit in answer(run("log", "--branch", "retry", "--json"))["commits"]] == [30, 20, 10]


def test_log_of_a_store_without_commits_says_not_found(run: Run, tmp_path: Path) -> None:
    empty = str(tmp_path / "empty")
    assert run("init", "--store", empty).exit_code == 0
    assert refusal(run("log", "--store", empty, "--json"))["error"] == "branch_not_found"


def test_show_lists_layers_as_people_count(run: Run) -> None:
    result = run("show", "best")

    assert "step       20" in result.stdout
    assert "tags       best" in result.stdout
    table = result.stdout.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == [
        "layer",
        "@extra",
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "blocks.10",
        "head",
    ]


def test_show_in_json(run: Run) -> None:
    document = answer(run("show", "30", "--json"))

    assert document.keys() == {"commit", "branches", "tags", "layers", "conditions"}
    assert document["branches"] == ["retry"]
    layers = {layer["name"]: layer for layer in document["layers"]}
    assert layers["blocks.10"]["source_step"] == 30
    assert layers["blocks.0"]["staleness"] == 20
    assert layers["blocks.0"].keys() == {
        "name",
        "source_step",
        "staleness",
        "fidelity",
        "version_id",
        "bytes_logical",
        "bytes_stored",
        "versions",
        "base_step",
        "error",
        "quarantined",
    }
    assert document["conditions"]["blocks.0"] == {
        "layer": "blocks.0",
        "source_step": 10,
        "staleness": 20,
        "age": 2,
        "fidelity": "full",
        "error": 0.0,
        "damage": None,
    }


def test_diff_lists_what_changed(run: Run) -> None:
    text = run("diff", "10", "30").stdout
    assert "3 of 6 layers differ." in text  # @extra always does: it counts commits
    assert "blocks.0" not in text
    assert "blocks.0" in run("diff", "10", "30", "--all").stdout


def test_diff_in_json(run: Run) -> None:
    document = answer(run("diff", "10", "--json"))

    assert (document["a"]["step"], document["b"]["step"]) == (10, 50)
    assert {entry["layer"]: entry["change"] for entry in document["layers"]}["head"] == "changed"
    assert document["layers"][0].keys() == {"layer", "change", "step_a", "step_b", "bytes_logical"}


def test_checkout_shows_source_steps(run: Run) -> None:
    text = run("checkout", "30").stdout
    assert "The composite of step 30 on main: 6 layers of 3 steps (10 to 30)." in text

    document = answer(run("checkout", "30", "--json"))
    assert document["layers"][0].keys() == {"layer", "source_step", "staleness", "fidelity", "quarantined"}
    assert {layer["layer"]: layer["source_step"] for layer in document["layers"]}["blocks.2"] == 20


@pytest.mark.parametrize(
    ("name", "kind"), [("model.safetensors", "safetensors"), ("model.pt", "torch"), ("x", "safetensors")]
)
def test_checkout_writes_the_format_that_the_name_says(
    run: Run, root: Path, tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / name
    document = answer(run("checkout", "40", "--to", str(path), "--json"))

    assert (document["format"], document["path"], document["bytes"]) == (kind, str(path), path.stat().st_size)
    if kind == "torch":
        loaded = torch.load(path, weights_only=True)
        with ts.open_store(root) as store, store.checkout(40) as checkpoint:
            assert torch.equal(loaded["model"]["head.weight"], checkpoint.model["head.weight"].load())


def test_checkout_replaces_a_file_only_when_told(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("mine")
    refused = run("checkout", "--to", str(path))
    assert refused.exit_code == 4
    assert "--overwrite" in refused.stderr
    assert path.read_text() == "mine"
    assert "Wrote the composite of step 50" in run("checkout", "--to", str(path), "--overwrite").stdout


def test_checkout_options_need_a_path(run: Run) -> None:
    assert run("checkout", "--optim").exit_code == 2


def test_stats(run: Run, root: Path) -> None:
    text = run("stats").stdout
    assert f"store        file://{root}" in text
    assert "commits      5" in text

    document = answer(run("stats", "--json"))
    assert document.keys() == {
        "store",
        "catalog",
        "writable",
        "commits",
        "branches",
        "tags",
        "layers",
        "versions",
        "versions_doomed",
        "bytes_logical",
        "bytes_stored",
        "bytes_doomed",
        "leases",
    }
    assert (document["commits"], document["branches"], document["tags"], document["writable"]) == (5, 2, 1, True)


def test_json_is_one_document_on_stdout_and_nothing_on_stderr(run: Run) -> None:
    for args in (
        ("log",),
        ("show",),
        ("diff", "10"),
        ("checkout",),
        ("stats",),
        ("tag",),
        ("branch",),
        ("verify",),
        ("gc",),
    ):
        result = run(*args, "--json")
        json.loads(result.stdout)
        assert result.stderr == "", args
