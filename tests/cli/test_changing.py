"""init, tag, branch, gc, verify, rebuild, upgrade: what they change, and when they refuse."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import tailorstore as ts
from tests.cli.conftest import Run, answer, refusal


def test_init_makes_a_store_once(run: Run, tmp_path: Path) -> None:
    where = str(tmp_path / "new")
    first = answer(run("init", "--store", where, "--json"))
    assert first == {
        "store": f"file://{where}",
        "catalog": f"sqlite:///{where}/catalog.sqlite",
        "created": True,
        "writable": True,
    }
    assert answer(run("init", "--store", where, "--json"))["created"] is False
    assert "was there already" in run("init", "--store", where).stdout


def test_tag_names_a_commit(run: Run) -> None:
    assert "Tag old is step 10 on main" in run("tag", "old", "10").stdout
    assert answer(run("show", "old", "--json"))["tags"] == ["old"]
    assert answer(run("tag", "new", "--json"))["commit"]["step"] == 50
    listed = answer(run("tag", "--list", "--json"))["tags"]
    assert [tag["name"] for tag in listed] == ["best", "new", "old"]
    assert listed[0].keys() == {"name", "commit", "step", "created_at"}
    assert "best" in run("tag").stdout


def test_tag_is_never_moved(run: Run) -> None:
    assert run("tag", "best", "50").exit_code == 4
    assert run("tag", "--delete", "best").stdout == "Removed tag best.\n"
    assert answer(run("tag", "best", "50", "--json"))["commit"]["step"] == 50
    assert run("tag", "--delete", "worst").exit_code == 3


def test_tag_does_one_thing_at_a_time(run: Run) -> None:
    assert run("tag", "a", "--delete", "best").exit_code == 2
    assert run("tag", "--list", "--delete", "best").exit_code == 2


def test_branch_starts_at_a_commit(run: Run) -> None:
    assert "Branch warmup stands at step 20" in run("branch", "warmup", "20").stdout
    assert [branch["name"] for branch in answer(run("branch", "--json"))["branches"]] == ["main", "retry", "warmup"]
    assert "retry" in run("branch").stdout
    assert answer(run("branch", "--delete", "warmup", "--json")) == {"deleted": "warmup"}


def test_branch_moves_only_when_told(run: Run) -> None:
    assert refusal(run("branch", "retry", "20", "--json"))["error"] == "branch_exists"
    assert answer(run("branch", "retry", "20", "--move", "--json"))["commit"]["step"] == 20
    assert run("branch", "--move").exit_code == 2


def test_gc_without_a_policy_keeps_every_commit(run: Run) -> None:
    document = answer(run("gc", "--json"))
    assert len(document["kept"]) == 5
    assert document["expired"] == []


def test_gc_dry_run_prints_the_plan_and_changes_nothing(run: Run) -> None:
    text = run("gc", "--keep-last", "1", "--dry-run").stdout

    verdicts = {line.split()[0]: line for line in text.split("\n\n")[0].splitlines()[1:]}
    assert "drop" in verdicts["10"]
    assert "drop" in verdicts["40"]
    assert "tag best" in verdicts["20"]
    assert "newest of retry" in verdicts["30"]
    assert "last 1 of 1 on main" in verdicts["50"]
    assert "Would drop 2 commits and keep 3." in text
    assert "grace period (24 h)" in text
    assert len(answer(run("log", "--json"))["commits"]) == 5


def test_gc_drops_and_sweeps(run: Run) -> None:
    document = answer(run("gc", "--keep-last", "1", "--grace", "0s", "--yes", "--json"))

    assert [commit["step"] for commit in document["expired"]] == [10, 40]
    assert document["versions_swept"] > 0
    assert document["bytes_freed"] > 0
    assert document.keys() == {
        "dry_run",
        "kept",
        "expired",
        "versions_doomed",
        "bytes_doomed",
        "versions_swept",
        "leftovers_swept",
        "objects_deleted",
        "bytes_freed",
        "deletes_failed",
        "grace",
        "bytes_to_free",
    }
    assert answer(run("verify", "--json"))["ok"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("--keep-best", "loss"), {20, 30, 50}),
        (("--keep-best", "loss:1:max"), {10, 20, 30, 50}),
        (("--keep-best", "loss:2"), {10, 20, 30, 40, 50}),
        (("--keep-every", "20"), {10, 20, 30, 40, 50}),
        (("--keep-within", "1d12h"), {10, 20, 30, 40, 50}),
        (("--keep-tagged",), {20, 30, 50}),
        (("--keep-last", "2", "--keep-best", "loss:1:max"), {10, 20, 30, 40, 50}),
    ],
)
def test_gc_policies(run: Run, options: tuple[str, ...], kept: set[int]) -> None:
    document = answer(run("gc", *options, "--dry-run", "--json"))
    assert {10, 20, 30, 40, 50} - {commit["step"] for commit in document["expired"]} == kept


@pytest.mark.parametrize(
    "options",
    [
        ("--keep-last", "0"),
        ("--keep-best", ":"),
        ("--keep-best", "loss:0"),
        ("--keep-within", "soon"),
        ("--keep-within", "7"),
        ("--grace", "-1h"),
    ],
)
def test_gc_refuses_policies_that_mean_nothing(run: Run, options: tuple[str, ...]) -> None:
    assert run("gc", *options, "--dry-run").exit_code == 2


@pytest.mark.parametrize(("reply", "left"), [("n", 5), ("y", 3)])
def test_gc_asks_on_a_terminal(root: Path, reply: str, left: int) -> None:
    outer, inner = pty.openpty()
    command = [sys.executable, "-m", "tailorstore.cli.main", "gc", "--keep-last", "1", "--store", str(root)]
    process = subprocess.Popen(command, stdin=inner, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(inner)
    os.write(outer, f"{reply}\n".encode())
    output, errors = process.communicate(timeout=120)
    os.close(outer)

    assert process.returncode == 0, errors
    assert "Would drop 2 commits" in output
    assert "Drop 2 commits and free" in errors
    with ts.open_store(root) as store:
        assert len(store.log()) == left


def test_verify_says_that_all_is_well(run: Run) -> None:
    assert "Everything is as it was written" in run("verify").stdout
    assert answer(run("verify", "best", "--json")).keys() == {
        *("versions", "objects", "bytes_read", "damages", "losses", "unknown", "awaiting_gc"),
        *("quarantined", "lifted", "recorded", "unrecorded", "ok"),
    }


def test_verify_finds_damage_and_exits_with_5(run: Run, root: Path) -> None:
    chunk = next((root / "layers" / "head").rglob("c.*"))
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)

    result = run("verify")
    assert result.exit_code == 5
    assert "flipped" in result.stdout
    assert "Found 1 damage" in result.stdout
    as_json = run("verify", "--json")
    assert as_json.exit_code == 5
    assert '"ok": false' in as_json.stdout


def test_rebuild_takes_the_root_over(run: Run, root: Path, tmp_path: Path) -> None:
    other = f"sqlite:///{tmp_path}/other.sqlite"
    assert run("tag", "mine", "--catalog", other).exit_code == 4
    assert refusal(run("rebuild", "--catalog", other, "--json"))["error"] == "usage"

    document = answer(run("rebuild", "--catalog", other, "--yes", "--json"))
    lists = {"branches", "tags", "unplaced", "unclaimed", "unreadable", "dangling", "incomplete", "written"}
    assert document.keys() == {"commits", "versions", "epoch", "dry_run", *lists}
    assert (document["commits"], document["branches"], document["tags"]) == (5, ["main", "retry"], ["best"])
    assert run("tag", "mine", "--catalog", other).exit_code == 0
    lost = refusal(run("tag", "his", "--json"))
    assert lost["error"] == "root_taken"
    assert "rebuild" in lost["message"]


def test_rebuild_in_words(run: Run) -> None:
    assert "owns file://" in run("rebuild", "--yes").stdout


def test_rebuild_tells_of_layers_whose_manifest_is_gone(run: Run, root: Path) -> None:
    sorted((root / "commits").iterdir())[1].unlink()
    for path in root.glob("catalog.sqlite*"):
        path.unlink()
    assert "1 commit whose manifest is gone, or that never got so far: their layers are kept" in (
        run("rebuild", "--yes").stdout.replace("\n", " ")
    )


def test_rebuild_tells_what_it_would_find_and_what_is_lost(run: Run, root: Path) -> None:
    manifests = sorted((root / "commits").iterdir())
    manifests[-1].write_bytes(b"half")
    lost = next((root / "layers" / "blocks.0").iterdir())
    (lost / "zarr.json").unlink()
    # A catalog that knows more than the root would put it there first.
    for path in root.glob("catalog.sqlite*"):
        path.unlink()
    before = {path: path.read_bytes() for path in (root / "commits").iterdir()}
    document = answer(run("rebuild", "--dry-run", "--json"))
    assert (document["dry_run"], document["commits"]) == (True, 4)
    assert document["unreadable"] == [f"commits/{manifests[-1].name}"]
    assert {layer for commit in document["incomplete"] for layer in commit["layers"]} == {"blocks.0"}
    said = run("rebuild", "-n").stdout
    assert "Nothing was changed" in said
    assert f"Could not read commits/{manifests[-1].name}. A branch may stand at an earlier step than it did." in said
    assert "gc deletes nothing until that is put back" in said.replace("\n", " ")
    assert "lost layers, as listed. Chunks are not looked at: 'tailorstore verify' reads them." in said.replace(
        "\n", " "
    )
    assert document["incomplete"][0]["id"][:12] in said
    assert {path: path.read_bytes() for path in (root / "commits").iterdir()} == before
    assert run("tag", "mine").exit_code == 4


def test_upgrade_says_what_it_found(run: Run, tmp_path: Path) -> None:
    document = answer(run("upgrade", "--json"))
    assert document["before"] == document["after"]
    assert "which is what this version needs" in run("upgrade").stdout
    fresh = answer(run("upgrade", "--catalog", f"sqlite:///{tmp_path}/fresh.sqlite", "--json"))
    assert fresh["before"] is None
