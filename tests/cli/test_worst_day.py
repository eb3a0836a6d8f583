"""What the command line says when something is lost: what it is, what it is not, and what to do next."""

import json
from pathlib import Path

from tests.cli.conftest import Run, answer, refusal


def commit_of(run: Run, step: int) -> str:
    commits = answer(run("log", "--json"))["commits"]
    return str(next(commit["id"] for commit in commits if commit["step"] == step))


def record_of(root: Path, name: str) -> Path:
    (record,) = (path for path in (root / "refs").iterdir() if f'"{name}"' in path.read_text())
    return record


def test_a_rebuild_that_would_lose_commits_is_refused_until_their_manifests_are_there(run: Run, root: Path) -> None:
    manifest = root / "commits" / f"{commit_of(run, 40)}.json"
    kept = json.loads(manifest.read_text())
    manifest.unlink()
    found = refusal(run("rebuild", "--yes", "--json"))
    assert found["error"] == "conflict"
    assert "1 commit" in found["message"]
    assert "verify --repair" in found["message"]
    assert "1 commit" in run("rebuild", "--dry-run").stdout
    assert commit_of(run, 40) == manifest.stem

    verified = run("verify")
    assert verified.exit_code == 5
    assert "a rebuild of the catalog would not find it" in verified.stdout
    assert run("verify", "--repair").exit_code == 0
    assert json.loads(manifest.read_text()) | {"checksum": ""} == kept | {"checksum": ""}
    assert run("rebuild", "--yes").exit_code == 0
    assert commit_of(run, 40) == manifest.stem


def test_a_rebuild_says_which_names_it_loses(run: Run, root: Path) -> None:
    record_of(root, "best").unlink()
    said = run("rebuild", "--yes").stdout
    assert "loses the tag best" in said
    assert "branch" not in said.partition("loses")[2]
    assert run("show", "best").exit_code == 3
    assert run("tag", "best", "20").exit_code == 0


def test_a_record_that_cannot_be_read_is_listed_with_what_it_may_mean(run: Run, root: Path) -> None:
    record = record_of(root, "best")
    record.write_text("{")
    said = run("rebuild", "--dry-run").stdout
    assert f"Could not read refs/{record.name}. A branch or tag may stand elsewhere" in said


def test_verify_says_of_an_object_only_what_is_wrong_with_it(run: Run, root: Path) -> None:
    version = next((root / "layers" / "head").iterdir())
    chunk = version / "head.weight" / "c.0.0"
    for damage, what in ((b"", "is short: it has 0 bytes"), (bytes(chunk.stat().st_size), "is not what was written")):
        chunk.write_bytes(damage)
        damages = json.loads(run("verify", "--json").stdout)["damages"]
        (found,) = (one["detail"] for one in damages)
        assert found.startswith(what)
        assert str(root) not in found
