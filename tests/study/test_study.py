"""The study from end to end on the command line, with tiny models."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import tailorstore as ts
from tailorstore.cli.main import cli
from tailorstore.study.results import Record, Results, summarise

BUDGET = "budget(bytes_per_commit={filter}, by='drift').max_age(commits=4)"
STRATEGIES = ("parity()", "filter(first=1, last=1, every=5)", BUDGET, "light() @ 8/8", "light() @ 2/2")
SETTINGS = ("--size", "tiny", "--commits", "6", "--every", "2", "--evaluations", "2", "--resume", "2")


def study(out: Path, *args: str) -> Result:
    return CliRunner().invoke(cli, ["study", *SETTINGS, "--out", str(out), *args], prog_name="tailorstore")


def with_strategies(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--strategy", text)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Run a study once; return its folder and what it printed."""
    out: Path = tmp_path_factory.mktemp("study")
    result = study(out, "--json", *with_strategies(*STRATEGIES))
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


@pytest.fixture
def out(first: tuple[Path, Any], tmp_path: Path) -> Path:
    """Give a copy of the study's folder."""
    return Path(shutil.copytree(first[0], tmp_path / "out"))


def records_of(out: Path) -> dict[str, Record]:
    return {record.contender: record for record in Results(out)}


@pytest.mark.slow
def test_every_contender_is_led_along_the_run(first: tuple[Path, Any]) -> None:
    records = records_of(first[0])
    assert set(records) == {"all()", "(nudged)", *STRATEGIES}
    for record in records.values():
        assert len(record.bytes_written) == 6
        assert [look.number for look in record.looks] == [4, 5]
        assert record.bytes_full == records["all()"].bytes_written
        assert min(record.bytes_full) > record.bytes_logical[0]
        assert record.bytes_torch > record.bytes_logical[0]
        assert {look.full for look in record.looks} == {look.full for look in records["all()"].looks}
    assert records["all()"].share == 1
    assert all(look.lost("restored") == look.lost("resumed") == 0 for look in records["all()"].looks)
    assert records["parity()"].share == pytest.approx((1 + 5 / 2) / 6, rel=0.05)
    assert max(look.oldest for look in records["parity()"].looks) == 1
    # By its number, a filter's commits write the middle at the first and the last of six.
    assert [look.oldest for look in records[STRATEGIES[1]].looks] == [4, 0]
    assert records[BUDGET].strategy.startswith("budget(bytes_per_commit=")
    assert str(records[STRATEGIES[1]].bytes_per_commit) in records[BUDGET].strategy.replace("_", "")
    for look in (*records["light() @ 8/8"].looks, *records["light() @ 2/2"].looks):
        assert look.oldest == 0
        assert look.error is not None
    fine, coarse = (records[f"light() @ {bits}"].looks[-1] for bits in ("8/8", "2/2"))
    assert fine.error is not None
    assert coarse.error is not None
    assert fine.error < coarse.error
    assert abs(fine.lost("restored")) < abs(coarse.lost("restored"))


@pytest.mark.slow
def test_the_table_says_what_the_results_say(first: tuple[Path, Any]) -> None:
    out, printed = first
    text = (out / "pretrain-tiny-adamw.md").read_text()
    rows = {row[1]: row[0] for row in re.findall(r"^(\| `(.*?)` \|.*)$", text, flags=re.MULTILINE)}
    summaries = {summary.contender: summary for summary in summarise(Results(out))}
    assert rows.keys() == summaries.keys() == {one["contender"] for one in printed["contenders"]}
    for one in printed["contenders"]:
        summary = summaries[one["contender"]]
        assert one["share"] == summary.share
        assert f"| {summary.share:.4f} |" in rows[summary.contender]
        assert f"{summary.restored.value:+.3f} ± {summary.restored.error:.3f}" in rows[summary.contender]
        assert f"{summary.resumed.value:+.3f} ± {summary.resumed.error:.3f}" in rows[summary.contender]


@pytest.mark.slow
def test_the_pictures_show_every_strategy(first: tuple[Path, Any]) -> None:
    out, printed = first
    assert {Path(path).name for path in printed["written"]} == {
        "results.jsonl",
        *(f"pretrain-tiny-adamw.{kind}" for kind in ("md", "svg", "png")),
    }
    svg = (out / "pretrain-tiny-adamw.svg").read_text()
    for label in ("parity()", "filter(first=1, last=1, every=5)", "light()", "frontier", "8/8", "2/2", "0.1 %"):
        assert f"<!-- {label} -->" in svg, label
    assert (out / "pretrain-tiny-adamw.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_is_known_is_not_done_again(out: Path) -> None:
    known = (out / "results.jsonl").read_text()
    picture = (out / "pretrain-tiny-adamw.svg").read_text()
    result = study(out, *with_strategies(*STRATEGIES))
    assert result.exit_code == 0, result.output
    assert "known already" in result.stderr
    assert (out / "results.jsonl").read_text() == known
    assert (out / "pretrain-tiny-adamw.svg").read_text() == picture


@pytest.mark.slow
def test_strategies_can_be_added_later(out: Path) -> None:
    known = (out / "results.jsonl").read_text()
    result = study(out, *with_strategies("round_robin(2)"))
    assert result.exit_code == 0, result.output
    assert "training" not in result.stderr
    text = (out / "results.jsonl").read_text()
    assert text.startswith(known)
    added = Record.from_json(json.loads(text.removeprefix(known)))
    assert added.contender == "round_robin(2)"
    assert added.looks[0].full == records_of(out)["parity()"].looks[0].full


@pytest.mark.slow
@pytest.mark.parametrize("discard", [(), ("--discard",)], ids=["kept", "discarded"])
def test_a_study_can_be_repeated_to_the_bit(first: tuple[Path, Any], tmp_path: Path, discard: tuple[str, ...]) -> None:
    result = study(tmp_path, *discard, *with_strategies("parity()", STRATEGIES[1], BUDGET, "light() @ 2/2"))
    assert result.exit_code == 0, result.output
    before, after = records_of(first[0]), records_of(tmp_path)
    assert before.keys() - after.keys() == {"light() @ 8/8"}
    for contender, record in after.items():
        assert record.looks == before[contender].looks
        assert record.share == pytest.approx(before[contender].share, rel=1e-4)
    with ts.open_store(tmp_path / "runs" / "pretrain-tiny-adamw-0" / "full") as store:
        assert len(store.log()) == (1 if discard else 6)


@pytest.mark.slow
def test_factors_come_from_what_was_written(tmp_path: Path) -> None:
    result = study(tmp_path, "--json", "--factors", "--precision", "mixed", "--freeze", "*embed*")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    rows = [row["bytes_written"] for row in printed["rows"]]
    kinds = [row["what"].partition(":")[0] for row in printed["rows"]]
    assert kinds == [
        "a torch.save file at every commit",
        "full commits, every layer written",
        "unchanged layers not written again",
        "codec zstd",
        "selection",
        "light versions",
        "bfloat16 weights derived from their masters",
    ]
    # Tensors this tiny do not get smaller by a codec; all else does what it says.
    assert rows[1] > rows[2]
    assert rows[3] > rows[4]
    assert rows[5] > rows[6]
    text = (tmp_path / "pretrain-tiny-adamw-mixed-frozen-factors.md").read_text()
    for before, row in zip([rows[0], *rows], rows, strict=False):
        assert f"| {row:,} | {before / row:.2f}× | {rows[0] / row:.2f}× |" in text


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--strategy", "lihgt()"), 2, "light"),
        (("--strategy", "light() @ 7/7"), 2, "bits"),
        (("--task", "vision", "--size", "300m"), 2, "300m"),
        (("--draw-only",), 3, "no results of pretrain-tiny-adamw"),
        (("--evaluations", "7"), 2, "fewer than 7"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, args: tuple[str, ...], code: int, said: str) -> None:
    result = study(tmp_path, "--json", *args)
    assert result.exit_code == code, result.output
    assert said in json.loads(result.stdout)["message"]
    assert not (tmp_path / "runs").exists()
