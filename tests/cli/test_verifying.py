"""verify, scrub, checkout --fallback, and the marks of quarantine: what a person reads on the worst day."""

import json
from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tailorstore.cli.progress import amount
from tailorstore.cli.values import Share
from tailorstore.domain.names import manifest_key
from tests.cli.conftest import Run, answer, refusal
from tests.kit.damage import files_of, flip, prefix_of, remove


def damage_layer(root: Path, layer: str, ref: int | str = "latest") -> str:
    """Flip a bit of a layer's version in the composite of a ref; return the prefix of the version."""
    with ts.open_store(root) as store:
        prefix = prefix_of(store, layer, ref)
    flip(files_of(root, prefix, "chunks")[0])
    return prefix


def test_verify_says_what_each_commit_loses_and_what_to_do(run: Run, root: Path) -> None:
    damage_layer(root, "blocks.0", 50)
    with ts.open_store(root) as store:
        remove(root / manifest_key(store.show(20).id))
    result = run("verify")
    assert result.exit_code == 5
    text = result.stdout
    assert "What commits lose" in text
    assert "1 layer: blocks.0" in text
    assert "its manifest: a rebuild of the catalog would not find it" in text
    assert "checkout latest --fallback" in text
    assert "verify --repair" in text
    document = json.loads(run("verify", "--json").stdout)
    assert {loss["step"]: loss["manifest"] for loss in document["losses"]}[20] is True
    assert all(loss["layers"] in ([], ["blocks.0"]) for loss in document["losses"])


def test_repair_says_what_it_made_again_and_what_is_in_quarantine(run: Run, root: Path) -> None:
    prefix = damage_layer(root, "head")
    with ts.open_store(root) as store:
        remove(files_of(root, prefix_of(store, "blocks.2"), "documents")[0])
    result = run("verify", "--repair")
    assert result.exit_code == 5
    assert "Made 1 document again, exactly." in result.stdout
    assert f"In quarantine: {prefix}" in result.stdout
    assert "writes it anew" in result.stdout
    for marked in (run("show").stdout, run("checkout").stderr, run("log").stdout):
        assert "quarantine" in marked
        assert "head" in marked
    assert "In quarantine" in run("show").stdout
    shown = answer(run("show", "--json"))
    assert [layer["name"] for layer in shown["layers"] if layer["quarantined"]] == ["head"]
    listed = answer(run("log", "--json"))
    assert set(map(tuple, listed["quarantined"].values())) == {("head",)}
    assert listed["quarantined"].keys() <= {commit["id"] for commit in listed["commits"]}
    marked_layers = [one["layer"] for one in answer(run("checkout", "--json"))["layers"] if one["quarantined"]]
    assert marked_layers == ["head"]


def test_what_is_in_quarantine_is_said_to_be_there_and_advised_no_more(run: Run, root: Path) -> None:
    prefix = damage_layer(root, "blocks.0", 50)
    assert json.loads(run("verify", "--json").stdout)["quarantined"] == []
    first = run("verify").stdout
    assert "in quarantine" not in first
    assert "puts damaged layers into quarantine" in first
    assert "makes again what follows" not in first, "there is nothing of that kind"
    assert "In quarantine: " + prefix in run("verify", "--repair").stdout
    for args in (("verify",), ("verify", "latest"), ("scrub", "--fraction", "1")):
        text = run(*args).stdout
        assert "is not what was written (its digest differs) - in quarantine" in text
        assert "that captures the layer writes it anew" in text
        assert "verify --repair' puts" not in text
        assert "checkout latest --fallback" in text
        assert json.loads(run(*args, "--json").stdout)["quarantined"] == [prefix]


def test_only_what_applies_is_advised(run: Run, root: Path) -> None:
    with ts.open_store(root) as store:
        remove(root / manifest_key(store.show(20).id))
    text = run("verify").stdout
    assert "'tailorstore verify --repair' makes again" in text
    assert "quarantine" not in text
    assert "--fallback" not in text, "no layer is lost"
    run("verify", "--repair")
    damage_layer(root, "head", 10)
    with ts.open_store(root) as store:
        newest = prefix_of(store, "head", 50)
    flip(files_of(root, newest, "chunks")[0])
    text = run("verify").stdout
    assert "--fallback" not in text
    assert "Every commit that led to the newest loses layers" in text


def test_where_there_is_no_terminal_a_line_now_and_then_says_how_far_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("verify").stderr == ""
    monkeypatch.setattr("tailorstore.cli.progress._LINE_SECONDS", 0)
    result = run("verify", "--json")
    assert "verifying versions 1/" in result.stderr
    assert ", verifying bytes " in result.stderr.splitlines()[-1]
    assert answer(result)["ok"]


def test_a_store_without_quarantine_has_no_marks(run: Run) -> None:
    assert "quarantine" not in run("log").stdout
    assert "quarantine" not in run("show").stdout
    assert answer(run("log", "--json"))["quarantined"] == {}


def test_repair_that_makes_everything_again_exits_with_0(run: Run, root: Path) -> None:
    with ts.open_store(root) as store:
        remove(root / manifest_key(store.show(20).id))
    assert run("verify", "--repair").exit_code == 0
    assert "Everything is as it was written" in run("verify").stdout


def test_what_is_put_back_is_said_to_have_left_quarantine(run: Run, root: Path) -> None:
    prefix = damage_layer(root, "head")
    run("verify", "--repair")
    flip(files_of(root, prefix, "chunks")[0])
    assert f"Whole again, and out of quarantine: {prefix}" in run("verify", "--repair").stdout


def test_objects_that_nothing_explains_are_listed(run: Run, root: Path) -> None:
    (root / "layers" / "head" / "notes.txt").write_text("five!")
    result = run("verify")
    assert result.exit_code == 0
    assert "Objects that nothing explains" in result.stdout
    assert "layers/head/notes.txt" in result.stdout
    assert answer(run("verify", "--json"))["unknown"] == [{"key": "layers/head/notes.txt", "bytes": 5}]


def test_checkout_falls_back_and_says_so(run: Run, root: Path, tmp_path: Path) -> None:
    with ts.open_store(root) as store:
        newest = {layer.name: layer for layer in store.layers()}
        name = next(name for name, layer in newest.items() if layer.source_step == 50 and not name.startswith("@"))
    damage_layer(root, name)
    result = run("checkout", "latest", "--fallback")
    assert result.exit_code == 0
    assert "step 50 on 'main' does not verify; step 40 is the newest before it that does" in result.stderr
    assert "The composite of step 40" in result.stdout
    document = answer(run("checkout", "--fallback", "--json"))
    assert (document["commit"]["step"], document["fallback_from"]["step"]) == (40, 50)
    path = tmp_path / "model.pt"
    written = answer(run("checkout", "--fallback", "--to", str(path), "--json"))
    assert written["fallback_from"]["step"] == 50
    assert torch.load(path, weights_only=True)["model"]
    assert answer(run("checkout", "40", "--fallback", "--json"))["fallback_from"] is None


def test_checkout_ends_with_5_where_nothing_verifies(run: Run, root: Path) -> None:
    for commit in range(10, 60, 10):
        with ts.open_store(root) as store:
            path = files_of(root, prefix_of(store, "@extra", commit), "group")[0]
        remove(path)
    assert "no commit that led to step 50" in refusal(run("checkout", "--fallback", "--json"))["message"]
    assert run("checkout", "--fallback").exit_code == 5


def test_scrub_reads_a_part_and_exits_as_verify_does(run: Run, root: Path) -> None:
    all_versions = answer(run("verify", "--json"))["versions"]
    document = answer(run("scrub", "--fraction", "1/5", "--json"))
    assert 0 < document["versions"] < all_versions
    assert "Everything is as it was written" in run("scrub", "--fraction", "100%").stdout
    damage_layer(root, "head")
    assert run("scrub", "--fraction", "1").exit_code == 5
    assert run("scrub").exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"), [("1/30", 1 / 30), ("3%", 0.03), ("0.05", 0.05), ("1", 1.0), ("100%", 1.0), (" 1/4 ", 0.25)]
)
def test_parts_of_a_whole_are_written_in_several_ways(text: str, expected: float) -> None:
    assert Share().convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["", "0", "-1/3", "1.5", "101%", "1/0", "a third", "nan", "inf", "1/3/4"])
def test_other_texts_are_no_parts_of_a_whole(run: Run, text: str) -> None:
    assert "is no part of a whole" in run("scrub", f"--fraction={text}").stderr


def test_bytes_are_shown_as_sizes_in_progress() -> None:
    assert amount("verifying bytes", 1500, 3000) == "1.50 kB/3.00 kB"
    assert amount("verifying versions", 1500, 3000) == "1,500/3,000"
