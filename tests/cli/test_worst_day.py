"""What the command line says when something is lost: what it is, what it is not, and what to do next."""

import json
from pathlib import Path

from tests.cli.conftest import Run, answer
from tests.kit.damage import flip


def commit_of(run: Run, step: int) -> str:
    commits = answer(run("log", "--json"))["commits"]
    return str(next(commit["id"] for commit in commits if commit["step"] == step))


def record_of(root: Path, name: str) -> Path:
    (record,) = (path for path in (root / "refs").iterdir() if f'"{name}"' in path.read_text())
    return record


def test_a_rebuild_by_the_owner_loses_nothing_that_it_knows(run: Run, root: Path) -> None:
    manifest = root / "commits" / f"{commit_of(run, 40)}.json"
    kept = json.loads(manifest.read_text())
    manifest.unlink()
    record_of(root, "best").unlink()
    verified = run("verify")
    assert verified.exit_code == 5
    assert "a rebuild of the catalog would not find it" in verified.stdout
    assert "A rebuild would not find as they are: tag best. 'tailorstore verify --repair' records them" in (
        verified.stdout
    )
    before, said = answer(run("log", "--json")), run("rebuild", "--dry-run").stdout
    assert "holds 5 commits" in said
    assert "Would write 2 documents again first, which the root had lost" in said
    assert not manifest.exists()
    assert "Wrote 2 documents again first" in run("rebuild", "--yes").stdout
    assert answer(run("log", "--json")) == before
    assert json.loads(manifest.read_text()) | {"checksum": ""} == kept | {"checksum": ""}
    assert run("show", "best").exit_code == 0
    assert run("verify").exit_code == 0


def test_a_rebuild_is_not_advised_while_it_is_done(run: Run, root: Path) -> None:
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    assert "'tailorstore rebuild' makes a new one" in run("log").stderr
    for args in (("--dry-run",), ("--yes",)):
        assert run("rebuild", *args).stderr == ""


def test_an_empty_file_is_not_called_a_catalog_that_is_not_there(run: Run, root: Path) -> None:
    for left in root.glob("catalog.sqlite-*"):
        left.unlink()
    (root / "catalog.sqlite").write_bytes(b"")
    said = run("log").stderr
    assert "catalog.sqlite is an empty file: reading the root" in said
    assert "there is no catalog" not in said
    assert (root / "catalog.sqlite").stat().st_size == 0, "looking at it makes no database of it"
    assert run("rebuild", "--yes").exit_code == 0
    assert run("log").stderr == ""


def test_repair_says_which_names_it_recorded(run: Run, root: Path) -> None:
    record = record_of(root, "best")
    flip(record)
    found = run("verify")
    assert found.exit_code == 5
    assert f"refs/{record.name}" in found.stdout.replace("\n", "")
    assert "(tag or branch)" in found.stdout
    mended = run("verify", "--repair")
    assert mended.exit_code == 0
    assert "Recorded again: tag best." in mended.stdout
    assert "Made" not in mended.stdout
    assert not record.exists()
    assert "Everything is as it was written" in run("verify").stdout


def test_a_record_that_cannot_be_read_is_listed_with_what_it_may_mean(run: Run, root: Path) -> None:
    record = record_of(root, "best")
    record.write_text("{")
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    said = run("rebuild", "--dry-run").stdout
    assert f"Could not read refs/{record.name}. A branch or tag may stand elsewhere" in said


def test_a_tag_whose_commit_cannot_be_read_is_named_and_gc_waits_for_a_person(run: Run, root: Path) -> None:
    tagged = root / "commits" / f"{commit_of(run, 20)}.json"
    tagged.write_bytes(tagged.read_bytes()[:-9])
    flip(next((root / "refs").iterdir()))
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    warning = (
        "1 manifest and 1 record of tags or branches could not be read: 'tailorstore rebuild --dry-run' lists them."
    )
    for _ in range(2):
        verified = run("verify")
        assert verified.exit_code == 5
        assert f"commits/{tagged.name}" in verified.stdout.replace("\n", "")
        for command in ("log", "tag", "branch"):
            for arguments in ((), ("--json",)):
                listed = run(command, *arguments)
                assert (listed.exit_code, warning in listed.stderr.replace("\n", " ")) == (0, True)
        run("rebuild", "--yes")
    refused = run("gc", "--keep-last", "1", "--yes")
    assert refused.exit_code == 5
    assert tagged.name in refused.stderr.replace("\n", "")
    tagged.unlink()
    for record in (root / "refs").iterdir():
        record.unlink()
    assert run("gc", "--keep-last", "1", "--yes").exit_code == 0
    assert "could not be read" not in run("log").stderr


def test_names_of_commits_that_cannot_be_read_are_listed(run: Run, root: Path) -> None:
    (root / "commits" / f"{commit_of(run, 20)}.json").unlink()
    for left in root.glob("catalog.sqlite*"):
        left.unlink()
    for arguments in (("--dry-run",), ("--yes",)):
        said = run("rebuild", *arguments).stdout.replace("\n", " ")
        assert "Cannot be found where they were" in said
        assert said.rstrip().endswith("tag best.")


def test_a_root_whose_document_is_gone_is_not_said_to_be_of_another_catalog(run: Run, root: Path) -> None:
    (root / "tailorstore.json").unlink()
    for command in (("gc", "--yes"), ("verify", "--repair"), ("tag", "mine"), ("branch", "--delete", "retry")):
        refused = run(*command)
        assert refused.exit_code == 4
        assert "tailorstore.json of" in refused.stderr
        assert "is gone, which says whose it is" in refused.stderr.replace("\n", " ")
        assert "belongs to" not in refused.stderr


def test_verify_says_of_an_object_only_what_is_wrong_with_it(run: Run, root: Path) -> None:
    version = next((root / "layers" / "head").iterdir())
    chunk = version / "head.weight" / "c.0.0"
    for damage, what in ((b"", "is short: it has 0 bytes"), (bytes(chunk.stat().st_size), "is not what was written")):
        chunk.write_bytes(damage)
        damages = json.loads(run("verify", "--json").stdout)["damages"]
        (found,) = (one["detail"] for one in damages)
        assert found.startswith(what)
        assert str(root) not in found
