"""``tailorstore heatmap``: what was measured, drawn on terminals, in pipes and as SVG."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.cells import cell_len

import tailorstore as ts
from tailorstore.cli.drawing import Heatmap, color_of, scale_of, step_marks, svg
from tests.cli.conftest import LAYERS, Run, answer, refusal

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Make a store with a layer that held NaN at the last of three commits."""
    root = tmp_path / "damaged"
    model = {f"layers.{number}.weight": torch.ones(4, 4) for number in (1, 2, 10)}
    with ts.open_store(root) as store:
        store.commit(1, model)
        for number, tensor in enumerate(model.values()):
            tensor += 10.0**number
        store.commit(2, model, mask=["layers.1"])
        model["layers.2.weight"][0, 0] = math.nan
        store.commit(3, model)
    return root


def on_terminal(run: Run, width: int, *args: str, **env: str) -> str:
    known = {"FORCE_COLOR": "1", "COLUMNS": str(width), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    result = run("heatmap", *args, env={**known, **env})
    assert result.exit_code == 0, result.output
    return result.stdout


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)  # noqa: S314 - our own


def test_json_has_the_figures_of_one_measure(run: Run) -> None:
    document = answer(run("heatmap", "--json"))

    assert document.keys() == {"branch", "measure", "steps", "layers", "values", "finite"}
    assert (document["branch"], document["measure"]) == ("main", "drift")
    assert document["steps"] == [10, 20, 30, 40, 50]
    assert document["layers"] == list(LAYERS)
    assert document["values"][0] == [None] * 5
    # Every step adds 1 to each of 256 elements; blocks.1 is written at the first commit, as all are.
    assert document["values"][1] == pytest.approx([16.0] * 5)
    assert document["values"][2] == pytest.approx([32.0, 32.0, 16.0, 32.0, 32.0])
    assert document["finite"] == [[True] * 5] * 5


def test_json_is_limited_to_the_newest_commits_and_to_a_branch(run: Run) -> None:
    assert answer(run("heatmap", "--json", "--limit", "2"))["steps"] == [40, 50]
    assert answer(run("heatmap", "--json", "--limit", "0"))["steps"] == [10, 20, 30, 40, 50]
    assert answer(run("heatmap", "--json", "--branch", "retry"))["steps"] == [10, 20, 30]
    assert refusal(run("heatmap", "--json", "--branch", "nowhere"))["error"] == "branch_not_found"


def test_a_pipe_gets_characters_from_low_to_high(run: Run, damaged: Path) -> None:
    lines = run("heatmap", "--store", str(damaged)).stdout.splitlines()

    assert lines[0] == "drift on main, 3 commits"
    assert lines[2:6] == [" layers.1   ..", " layers.2   +!", "layers.10   @@", "     step  1"]
    assert lines[7].startswith("4 ..")
    assert lines[7].endswith("@ 400  (log scale)")
    assert "blank has no figure" in lines[8]
    assert "NaN or infinities" in lines[9]


def test_a_linear_scale_begins_at_zero(run: Run, damaged: Path) -> None:
    lines = run("heatmap", "--store", str(damaged), "--linear").stdout.splitlines()
    assert lines[2:5] == [" layers.1   ..", " layers.2   :!", "layers.10   @@"]
    assert lines[7].startswith("0 ..")
    assert lines[7].endswith("400  (linear scale)")


def test_terminals_get_colours_and_those_without_get_characters(run: Run) -> None:
    assert "\x1b[48;2;253;231;37m" in on_terminal(run, 80)
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "linux", "COLORTERM": ""}):
        text = on_terminal(run, 80, **env)
        assert "\x1b[48" not in text
        assert "@@@@" in text


@pytest.mark.parametrize("width", [40, 60, 120])
def test_pictures_fit_the_terminal_and_say_what_was_left_out(run: Run, tmp_path: Path, width: int) -> None:
    root = tmp_path / "long"
    model = {"a.very.long.name.of.a.layer.that.is.number.1.weight": torch.ones(2)}
    with ts.open_store(root) as store:
        for step in range(1, 131):
            model["a.very.long.name.of.a.layer.that.is.number.1.weight"] += 1
            store.commit(step, model)
    for env in ({}, {"NO_COLOR": "1"}):
        text = COLOUR.sub("", on_terminal(run, width, "--store", str(root), **env))
        lines = text.splitlines()
        assert max(cell_len(line) for line in lines[:7]) <= width
        assert "number.1 " in lines[2]
        assert re.fullmatch(r"[0-9]+ of 130 commits are drawn\.", lines[6])
    assert "are drawn" not in run("heatmap", "--store", str(root)).stdout


def test_few_commits_are_drawn_wider(run: Run, damaged: Path) -> None:
    lines = on_terminal(run, 80, "--store", str(damaged), NO_COLOR="1").splitlines()
    assert COLOUR.sub("", lines[4]) == "layers.10      @@@@@@@@"
    assert COLOUR.sub("", lines[5]) == "     step  1   2   3"


def test_a_measure_without_figures_is_blank(run: Run) -> None:
    text = run("heatmap", "--measure", "gradient").stdout
    assert "blocks.10\n" in text
    assert "blank has no figure" in text


def test_names_cannot_steer_the_terminal_or_break_the_picture(run: Run, tmp_path: Path) -> None:
    root, path = tmp_path / "odd", tmp_path / "odd.svg"
    names = ["evil\x1b[2J", "new\nline", "[bold]markup", "<script>&", "宽度", "half\udcff"]
    with ts.open_store(root) as store:
        store.commit(1, {f"{name}.weight": torch.zeros(1) for name in names})
    for env in ({}, {"FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm-256color"}):
        text = COLOUR.sub("", run("heatmap", "--store", str(root), env=env).stdout)
        assert "\x1b" not in text
        assert "evil\\x1b[2J" in text
        assert "[bold]markup" in text
    assert run("heatmap", "--store", str(root), "--output", str(path)).exit_code == 0
    texts = [element.text for element in parsed(path.read_text()).iter(f"{SVG}text")]
    assert {"<script>&", "new\\nline", "half\\udcff"} <= set(texts)


# --- SVG -----------------------------------------------------------------------------------------------------------


def test_svg_has_axes_legend_and_a_rectangle_for_each_run_of_cells(run: Run, damaged: Path, tmp_path: Path) -> None:
    path = tmp_path / "drift.svg"
    result = run("heatmap", "--store", str(damaged), "--output", str(path))
    assert result.stdout == f"Drew drift of 3 layers at 3 commits into {path}.\n"
    picture = parsed(path.read_text())
    texts = [element.text for element in picture.iter(f"{SVG}text")]
    for expected in ("drift on main, 3 commits", "layers.10", "step", "layer", "1", "3", "4", "400", "log scale"):
        assert expected in texts
    group = picture.find(f"{SVG}g")
    assert group is not None
    fills = [element.get("fill") for element in group]
    assert fills == ["#440154", "#22928b", "#d62728", "#fde725"]
    assert [float(element.get("width", "0")) for element in group] == [56, 28, 28, 56]


def test_svg_in_json_names_the_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "drift.SVG"
    assert answer(run("heatmap", "--output", str(path), "--json"))["path"] == str(path)
    assert parsed(path.read_text()).tag == f"{SVG}svg"


def test_a_file_is_replaced_only_when_told(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "drift.svg"
    path.write_text("mine")
    refused = run("heatmap", "--output", str(path))
    assert refused.exit_code == 4
    assert "--overwrite" in refused.stderr
    assert path.read_text() == "mine"
    assert run("heatmap", "--output", str(path), "--overwrite").exit_code == 0
    assert path.read_text().startswith("<svg")


def test_wrong_usage_is_refused(run: Run, tmp_path: Path) -> None:
    for args in (
        ("--output", str(tmp_path / "drift.png")),
        ("--output", str(tmp_path / "no" / "folder.svg")),
        ("--overwrite",),
        ("--measure", "drfit"),
        ("--limit", "-1"),
    ):
        result = run("heatmap", *args)
        assert result.exit_code == 2, args
    assert "'drift'" in run("heatmap", "--measure", "drfit").stderr
    assert ".svg" in run("heatmap", "--output", "x.png").stderr
    assert json.loads(run("heatmap", "--output", "x.png", "--json").stdout)["error"] == "usage"


def heatmap(rows: int, columns: int) -> Heatmap:
    cells = tuple(tuple(float(1 + (row * columns + at) % 97) for at in range(columns)) for row in range(rows))
    steps = tuple(100 * (at + 1) for at in range(columns))
    return Heatmap(
        "drift", tuple(f"layers.{row}" for row in range(rows)), steps, cells, scale_of([1, 97], linear=False)
    )


def test_large_pictures_stay_within_bounds() -> None:
    for rows, columns in ((400, 3000), (1, 1), (1, 5000), (500, 1)):
        picture = parsed(svg(heatmap(rows, columns)))
        assert float(picture.get("width", "0")) < 1600
        assert float(picture.get("height", "0")) < 3300
        texts = " ".join(element.text or "" for element in picture.iter(f"{SVG}text"))
        assert (f"of {columns} commits are drawn" in texts) == (columns > 500)


def test_thinning_keeps_the_newest_step_and_equal_distances() -> None:
    drawn = heatmap(2, 100).thinned(30)
    assert drawn.steps[-1] == 10_000
    assert len(drawn.steps) == len(drawn.cells[0]) == 25
    assert {b - a for a, b in pairwise(drawn.steps)} == {400}
    assert heatmap(2, 30).thinned(30) == heatmap(2, 30)


def test_scales_give_every_figure_a_place() -> None:
    log, linear = (scale_of([math.nan, 0.0, 0.01, 1.0, 100.0, math.inf], linear=linear) for linear in (False, True))
    assert [log.level(value) for value in (0.0, 0.01, 1.0, 100.0)] == pytest.approx([0, 0, 0.5, 1])
    assert [linear.level(value) for value in (0.0, 50.0, 100.0)] == pytest.approx([0, 0.5, 1])
    assert [log.at(level) for level in (0.0, 0.5, 1.0)] == pytest.approx([0.01, 1, 100])
    for empty in (scale_of([], linear=False), scale_of([0.0, math.nan], linear=True)):
        assert (empty.level(0.0), empty.at(1.0)) == (0.0, 0.0)
    one = scale_of([5.0], linear=False)
    assert (one.level(5.0), one.at(0.5)) == (0.0, 5.0)


def test_colours_grow_brighter_with_the_level() -> None:
    def brightness(level: float) -> float:
        red, green, blue = color_of(level)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    found = [brightness(at / 50) for at in range(51)]
    assert found == sorted(found)


def test_step_numbers_never_touch() -> None:
    for letters in (0.3, 1, 2.5, 4):
        marks = step_marks([10**6 + at for at in range(100)], letters)
        assert all((b - a) * letters >= 9 for (a, _), (b, _) in pairwise(marks))
    assert step_marks([], 1) == []
