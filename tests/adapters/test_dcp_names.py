"""Names: which value of a state dict is stored where, and the way back."""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorstore.adapters.dcp.ids import step_in
from tailorstore.adapters.dcp.names import SMALL_BYTES, Entry, Names, Path, Place, find_places
from tailorstore.adapters.dcp.options import groups_of, options_of
from tailorstore.domain.errors import InvalidInputError

BIG = SMALL_BYTES + 4


def tensor(*path: str | int, nbytes: int = 64, spread: bool = False) -> Entry:
    return Entry(path, (nbytes // 4,), "float32", nbytes, spread)


def value(*path: str | int) -> Entry:
    return Entry(path)


def nested(key: Path, name: str) -> list[Entry]:
    return [tensor(*key, "state", name, slot) for slot in ("exp_avg", "exp_avg_sq")]


def first_places(entries: Iterable[Entry]) -> tuple[Names, dict[Path, Place]]:
    return find_places(list(entries), None, (), ())


def test_a_model_and_its_optimizer_go_by_the_rule_in_both_spellings() -> None:
    model = [tensor("model", "a.weight"), tensor("model", "a.bias")]
    spelled = {
        False: [tensor("optim", "state", "a.weight", "exp_avg"), value("optim", "state", "a.bias", "step")],
        True: [tensor("optim", "state.a.weight.exp_avg"), value("optim", "state.a.bias.step")],
    }
    for flat, slots in spelled.items():
        names, places = first_places([*model, *slots])
        assert names == Names(("model",), ("optim",), flat)
        assert list(places.values()) == [
            Place("a.weight"),
            Place("a.bias"),
            Place("a.weight", "exp_avg"),
            Place("a.bias", "step"),
        ]
        assert names.paths(places.values()) == {place: path for path, place in places.items()}


def test_a_model_may_lie_at_the_top_or_deep_inside() -> None:
    names, places = first_places([tensor("a.w"), *nested(("optimizer",), "a.w")])
    assert (names.model, names.optim, names.others) == ((), ("optimizer",), {})
    assert places["a.w",] == Place("a.w")
    names, places = first_places([tensor("app", "parts", 0, "a.w"), *nested(("app", "optim"), "a.w")])
    assert (names.model, names.optim) == (("app", "parts", 0), ("app", "optim"))
    assert places["app", "parts", 0, "a.w"] == Place("a.w")


def test_averaged_weights_do_not_pass_for_the_model() -> None:
    entries = [tensor("ema", "a.w", nbytes=BIG), tensor("model", "a.w", nbytes=BIG), *nested(("optim",), "a.w")]
    names, places = first_places(entries)
    assert names.model == ("model",)
    assert places["ema", "a.w"] == Place("ema.a.w")
    assert names.others == {("ema", "a.w"): Place("ema.a.w")}
    assert places["optim", "state", "a.w", "exp_avg"] == Place("a.w", "exp_avg")


@pytest.mark.parametrize(("flat", "option"), [(False, ("param_groups", 0, "lr")), (True, ("param_groups.w.lr",))])
def test_an_optimizer_may_have_nothing_but_options(flat: bool, option: Path) -> None:
    names, places = first_places([tensor("model", "w"), value("sgd", *option)])
    assert names == Names(("model",), ("sgd",), flat)
    assert places == {("model", "w"): Place("w")}
    names, _ = first_places([tensor("model", "w"), value("one", *option), value("two", *option)])
    assert names.optim is None


def test_slots_are_tensors_of_their_own_where_nobody_can_tell_whose_they_are() -> None:
    both = [tensor(net, "0.w", nbytes=BIG) for net in ("g", "d")]
    slots = [tensor("opt", "state", "0.w", "exp_avg", nbytes=BIG), value("opt", "state", "0.w", "step")]
    names, places = first_places([*both, *slots])
    assert names.optim is None
    assert places["opt", "state", "0.w", "exp_avg"] == Place("opt.state.0.w.exp_avg")
    assert ("opt", "state", "0.w", "step") not in places


def test_each_of_two_optimizers_finds_its_own_parameters() -> None:
    entries = [
        *(tensor("g", name, nbytes=BIG) for name in ("up.w", "up.b")),
        tensor("d", "down.w", nbytes=BIG),
        *nested(("opt_g",), "up.w"),
        *nested(("opt_g",), "up.b"),
        *nested(("opt_d",), "down.w"),
    ]
    names, places = first_places(entries)
    assert (names.model, names.optim) == (("g",), ("opt_g",))
    assert places["opt_d", "state", "down.w", "exp_avg"] == Place("d.down.w", "exp_avg")
    assert names.paths(places.values()) == {place: path for path, place in places.items()}


def test_two_optimizers_of_one_model_share_it() -> None:
    entries = [tensor("model", "w"), tensor("model", "b"), *nested(("muon",), "w"), *nested(("adamw",), "b")]
    entries.append(tensor("muon", "state", "w", "more"))
    names, places = first_places(entries)
    assert names.optim == ("muon",)
    assert places["adamw", "state", "b", "exp_avg"] == Place("b", "exp_avg")
    assert names.others["adamw", "state", "b", "exp_avg"] == Place("b", "exp_avg")


def test_what_is_small_and_no_part_of_a_model_stays_outside_of_layers() -> None:
    entries = [
        tensor("model", "w"),
        tensor("train", "step", nbytes=4),
        tensor("rng", "cpu", nbytes=5056),
        tensor("replay", "buffer", nbytes=BIG),
        tensor("shadow", "w", nbytes=8, spread=True),
        value("train", "seen"),
        tensor("optim", "param_groups", 0, "lr", nbytes=4),
    ]
    _, places = first_places(entries)
    assert places.keys() == {("model", "w"), ("replay", "buffer"), ("shadow", "w")}


def test_a_submodule_named_state_is_no_optimizer() -> None:
    entries = [tensor("model", "state.proj.weight"), tensor("model", "proj.weight")]
    names, places = first_places(entries)
    assert names == Names(("model",), None)
    assert names.paths(places.values()).keys() == set(places.values())
    assert len(set(places.values())) == 2


def test_names_that_would_meet_are_kept_apart() -> None:
    entries = [tensor("model", "ema.w"), tensor("ema", "w", nbytes=BIG), *nested(("optim",), "ema.w")]
    names, places = first_places(entries)
    assert places["model", "ema.w"] == Place("ema.w")
    assert places["ema", "w"] == Place("ema.w~")
    assert names.paths(places.values()) == {place: path for path, place in places.items()}


def test_a_branch_goes_on_as_it_began() -> None:
    first = [tensor("model", "w"), *nested(("optim",), "w"), tensor("ema", "w", nbytes=BIG), tensor("rng", "cpu")]
    names, places = first_places(first)
    stored = [place.tensor for place in places.values() if place.slot is None]
    # A state dict in which all would be found elsewhere, had it come first.
    later = [tensor("ema", "w", nbytes=4), tensor("ema", "v", nbytes=BIG), tensor("rng", "cpu", nbytes=BIG)]
    after, more = find_places(later, names, stored, [("rng", "cpu")])
    _, spread = find_places([tensor("rng", "cpu", spread=True)], names, stored, [("rng", "cpu")])
    assert spread == {("rng", "cpu"): Place("rng.cpu")}
    assert more == {("ema", "w"): Place("ema.w"), ("ema", "v"): Place("ema.v")}
    assert after.others == {("ema", "w"): Place("ema.w"), ("ema", "v"): Place("ema.v")}
    assert (after.model, after.optim) == (("model",), ("optim",))


def test_a_branch_takes_up_the_optimizer_that_comes_later() -> None:
    names, _ = first_places([tensor("model", "w")])
    assert names.optim is None
    after, places = find_places([tensor("model", "w"), *nested(("optim",), "w")], names, ["w"], [])
    assert after.optim == ("optim",)
    assert places["optim", "state", "w", "exp_avg"] == Place("w", "exp_avg")


def test_slots_without_their_parameter_are_refused() -> None:
    names, _ = first_places([tensor("model", "a.w"), *nested(("optim",), "a.w")])
    with pytest.raises(InvalidInputError, match=r"optim\.state\.a\.w\.exp_avg .* 'a\.w' is not"):
        find_places(nested(("optim",), "a.w"), names, ["a.w"], [])


keys = st.sampled_from(["model", "ema", "optim", "state", "param_groups", "w", "a.w", "state.w.m", "state.a.w", "0"])
paths = st.lists(keys, min_size=1, max_size=5).map(tuple)


@given(st.dictionaries(paths, st.sampled_from([None, 4, BIG]), max_size=12), st.data())
def test_every_place_leads_back_to_its_path_whatever_the_state_dict(
    sizes: dict[Path, Any], data: st.DataObject
) -> None:
    entries = {
        ".".join(map(str, path)): Entry(path) if nbytes is None else tensor(*path, nbytes=nbytes)
        for path, nbytes in sizes.items()
    }
    first = data.draw(st.lists(st.sampled_from(list(entries.values())), unique=True)) if entries else []
    names, places = first_places(first)
    stored = {place.tensor for place in places.values() if place.slot is None}
    kept = [entry.path for entry in first if entry.path not in places]
    try:
        after, more = find_places(list(entries.values()), names, stored, kept)
    except InvalidInputError:
        return
    everything = {**places, **more}
    assert all(everything[path] == place for path, place in places.items())
    assert len(set(everything.values())) == len(everything)
    assert after.paths(everything.values()) == {place: path for path, place in everything.items()}
    tensors = {place.tensor for place in everything.values() if place.slot is None}
    assert all(place.tensor in tensors for place in everything.values())


@pytest.mark.parametrize("flat", [False, True])
def test_parameter_groups_are_what_their_options_spell(flat: bool) -> None:
    groups: list[dict[str, Any]] = [
        {"lr": 0.1, "betas": (0.9, 0.95), "params": ["a.w", "a.b"]},
        {"lr": 0.2, "betas": (0.9, 0.95), "params": ["b.w"]},
    ]
    names = Names(("model",), ("optim",), flat)
    options = options_of(names, groups)
    other: dict[Path, Any] = {("optim", "param_groups", "left"): 1, ("train", "step"): 2}
    tensors = dict.fromkeys(["a.w", "a.b", "b.w"])
    assert groups_of(names, {**options, **other}, tensors) == (groups, set(options))
    assert groups_of(Names(("model",), None), options, tensors) == ([], set())


def test_options_without_names_are_no_groups() -> None:
    names = Names(("model",), ("optim",))
    assert groups_of(names, {("optim", "param_groups", 0, "lr"): 0.1}, {}) == ([], set())


@pytest.mark.parametrize(
    ("checkpoint_id", "step"),
    [("run/step-1200", 1200), ("7", 7), (9, 9), ("s3://b/p/global_step_40/", 40), ("v2", None), ("latest", None)],
)
def test_an_id_says_its_step(checkpoint_id: str | int, step: int | None) -> None:
    assert step_in(checkpoint_id) == step
