"""Settings that mean nothing are refused by name."""

from typing import Any

import pytest

import tailorstore as ts
from tailorstore.domain.light import LightTable, LightTensor

WRONG: list[tuple[str, Any]] = [
    *(("weight_bits", bad) for bad in (0, 1, 7, 16, -4, 4.0, True, "4", None)),
    *(("slot_bits", bad) for bad in (1, 4.0, None, "4", {"exp_avg": 7}, {"*": True}, [4])),
    *(("block", bad) for bad in (0, 8, 100, 8192, 128.0, True, "128", None)),
    *(("max_weight_error", bad) for bad in (-0.1, float("nan"), None, "0.1", True)),
    *(("max_slot_error", bad) for bad in (-1, float("nan"))),
    *(("due_error", bad) for bad in (-1, float("nan"))),
    *(("max_base_commits", bad) for bad in (0, -1, 1.5, True, "10")),
    *(("max_base_steps", bad) for bad in (0, -1, 1.5, True)),
    *(("exact_below", bad) for bad in (0, -1, 1.5, True, None)),
]


@pytest.mark.parametrize(("setting", "bad"), WRONG)
def test_settings_that_mean_nothing_are_refused(setting: str, bad: Any) -> None:
    with pytest.raises(ts.InvalidInputError, match=setting):
        ts.LightSettings(**{setting: bad})


def test_settings_that_mean_something_are_taken() -> None:
    ts.LightSettings(weight_bits=2, slot_bits={}, block=4096, max_weight_error=0, due_error=float("inf"), exact_below=1)
    ts.LightSettings(max_base_commits=None, max_base_steps=1, slot_bits=8)


def test_bits_go_by_slot() -> None:
    assert ts.LightSettings(slot_bits=3).bits_of_slot("exp_avg") == 3
    settings = ts.LightSettings(slot_bits={"exp_avg": 2, "*": 8})
    assert [settings.bits_of_slot(slot) for slot in ("exp_avg", "exp_avg_sq")] == [2, 8]
    assert ts.LightSettings(slot_bits={"exp_avg": 8}).bits_of_slot("exp_avg_sq") == ts.LightSettings().slot_bits


def test_a_table_knows_what_needs_the_base() -> None:
    codings = {"difference": True, "ratio": True, "value": False, "log": False, "exact": False}
    tensors = {name: LightTensor("float32", (2, 3), name) for name in codings}  # type: ignore[arg-type]
    tensors |= {f"of {name}": LightTensor("bfloat16", (2, 3), "rounded", of=name) for name in codings}
    table = LightTable(128, tensors)
    for name, needs in codings.items():
        assert table.needs_base(name) == table.needs_base(f"of {name}") == needs
    assert tensors["exact"].elements == 6
