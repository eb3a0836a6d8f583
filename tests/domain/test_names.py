"""Names: layers are found for every architecture, and no name becomes a path."""

import re
import string
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorstore.domain.errors import BadNameError, InvalidInputError
from tailorstore.domain.names import check_name, escape, is_id, layer_rule, least_id, new_id, parse_ref


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.wte.weight", "transformer.wte"),
        ("transformer.h.11.attn.c_attn.weight", "transformer.h.11"),
        ("transformer.ln_f.bias", "transformer.ln_f"),
        ("model.layers.0.mlp.experts.3.w1.weight", "model.layers.0"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("vit.encoder.layer.7.attention.output.dense.bias", "vit.encoder.layer.7"),
        ("cls_token", "cls_token"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "encoder.block.2"),
        ("decoder.block.2.layer.1.EncDecAttention.k.weight", "decoder.block.2"),
        ("shared.weight", "shared"),
        ("0.weight", "0"),
        ("0", "0"),
    ],
)
def test_default_rule(name: str, layer: str) -> None:
    assert layer_rule()(name) == layer


def test_depth_tells_experts_apart() -> None:
    rule = layer_rule(2)
    assert rule("model.layers.0.mlp.experts.3.w1.weight") == "model.layers.0.mlp.experts.3"
    assert rule("model.layers.0.self_attn.q.weight") == "model.layers.0"
    assert rule("lm_head.weight") == "lm_head"
    with pytest.raises(InvalidInputError):
        layer_rule(0)


SAFE = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9_.=-]*")


@given(st.text())
def test_escaped_names_are_harmless_path_components(name: str) -> None:
    escaped = escape(name)
    assert SAFE.fullmatch(escaped)
    assert len(escaped) <= 160
    assert not escaped.startswith("__")
    assert escaped != "zarr.json"


@given(st.text(alphabet="a./=@A\\é _" + string.digits[:2]), st.text(alphabet="a./=@A\\é _" + string.digits[:2]))
def test_different_names_stay_different(a: str, b: str) -> None:
    assert (escape(a) == escape(b)) == (a == b)


def test_long_names_stay_different() -> None:
    names = [f"{'x' * 300}{number}" for number in range(50)]
    assert len({escape(name) for name in names}) == len(names)


@pytest.mark.parametrize("bad", ["", "latest", "12", "a@b", "-x", "../x", "a b", "é", "x" * 201, None])
def test_names_that_could_be_something_else_are_refused(bad: str) -> None:
    with pytest.raises(BadNameError):
        check_name("tag", bad)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("latest", "latest"),
        ("12", "step"),
        (12, "step"),
        ("main", "name"),
        ("main@12", "branch@step"),
        ("feature/x@0", "branch@step"),
        ("0a1b2c", "name"),
    ],
)
def test_refs(text: str | int, kind: str) -> None:
    assert parse_ref(text).kind == kind


@pytest.mark.parametrize("bad", ["", "main@", "@3", "main@x", "a b", -1, True, None, 1.5, "٣"])
def test_what_is_no_ref_is_refused(bad: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_ref(bad)


def test_ids_are_ids_and_never_read_as_steps() -> None:
    made = {new_id() for _ in range(2000)}
    assert len(made) == 2000
    assert all(is_id(one) and one[0].isalpha() for one in made)


@pytest.mark.parametrize("year", [1970, 2019, 2020, 2026, 2070, 2500])
def test_ids_sort_by_the_time_they_were_made_at(monkeypatch: pytest.MonkeyPatch, year: int) -> None:
    moment = datetime(year, 12, 31, tzinfo=UTC)
    monkeypatch.setattr("tailorstore.domain.names.time.time", moment.timestamp)
    one = new_id()
    assert is_id(one)
    assert least_id(moment) <= one < least_id(moment + timedelta(seconds=1)) or not 2020 <= year <= 2070
    # A clock that is out of all bounds makes ids that sort first or last.
    assert (one[:8] == "a0000000") is (year < 2020)
    assert (one[:8] == "ffffffff") is (year > 2070)
    monkeypatch.undo()
    assert (one < new_id()) is (year <= 2026 and moment < datetime.now(UTC))
