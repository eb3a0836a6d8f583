"""Masks: what each form means, and what is refused."""

from collections.abc import Mapping
from typing import Any

import pytest

from tailorstore.domain.errors import MaskError
from tailorstore.domain.mask import LayerState, MaskContext, resolve_mask
from tailorstore.domain.strategies import TopK

LAYERS = ["wte", "h.0", "h.1", "h.10", "head"]
CONTEXT = MaskContext("main", 7, {name: LayerState(name, 4, None) for name in LAYERS}, tied={"out": "wte"})


@pytest.mark.parametrize(
    ("mask", "chosen"),
    [
        (None, LAYERS),
        ([], []),
        (["h.1"], ["h.1"]),
        ("h.*", ["h.0", "h.1", "h.10"]),
        (["h.?", "head"], ["h.0", "h.1", "head"]),
        (("wte" for _ in range(1)), ["wte"]),
        ({"h.*": True, "h.1": False}, ["h.0", "h.10"]),
        ({"h.1": False, "h.*": True}, ["h.0", "h.10"]),
        ({"*": "full", "h.*": False}, ["wte", "head"]),
        ({"h.*": False}, []),
        (["out"], ["wte"]),
        (["ou*"], ["wte"]),
    ],
)
def test_forms(mask: Any, chosen: list[str]) -> None:
    assert list(resolve_mask(mask, CONTEXT)) == chosen


def test_a_strategy_may_hand_over_to_another_and_must_return_something() -> None:
    class Nothing:
        def select(self, context: MaskContext) -> None:
            return None

    class Handing:
        def select(self, context: MaskContext) -> Any:
            return Nothing() if context.step == 7 else None

    with pytest.raises(MaskError, match="strategy Nothing returned nothing"):
        resolve_mask(Handing(), CONTEXT)


def test_a_strategy_is_asked_with_what_it_needs_to_know() -> None:
    class Odd:
        def select(self, context: MaskContext) -> Mapping[str, bool]:
            assert context.step == 7
            return {name: at % 2 == 1 for at, name in enumerate(context.layers)}

    assert list(resolve_mask(Odd(), CONTEXT)) == ["h.0", "h.10"]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (["h.11"], r"unknown layer 'h\.11'.*nearest: 'h\.1"),
        (["x.*"], r"'x\.\*' matches no layer"),
        ({"h.1": 2}, "mask value"),
        ([3], "holds layer names"),
        ({3: True}, "holds layer names"),
        (7, "a mask is None"),
        (["@extra"], "written by every commit"),
        (
            "budget('2GB').max_age(5)",
            r"unknown layer.*write mask=ts\.parse_strategy\(\"budget\('2GB'\)\.max_age\(5\)\"\)",
        ),
        (TopK, r"the class TopK itself; .*mask=TopK\(…\)"),
    ],
)
def test_refused(mask: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        resolve_mask(mask, CONTEXT)
