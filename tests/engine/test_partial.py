"""Commits of a part of the model: what is not passed stays as the branch has it."""

from pathlib import Path

import pytest
import torch

import tailorstore as ts
from tailorstore.domain.errors import ModelMismatchError


def weights(**values: float) -> dict[str, torch.Tensor]:
    return {f"{layer}.w": torch.full((4,), value) for layer, value in values.items()}


def test_layers_that_are_not_passed_stay_and_new_ones_may_come(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "run") as store:
        full = store.commit(1, weights(a=1, b=1))
        part = store.commit(2, weights(b=2, c=2), partial=True)
        assert part.layers_written == ("b", "c")
        assert part.bytes_logical >= full.bytes_logical
        with store.checkout() as found:
            assert found.sources == {"@extra": 2, "a": 1, "b": 2, "c": 2}
            assert {name: tensor[0].item() for name, tensor in found.model_state_dict().items()} == {
                "a.w": 1.0,
                "b.w": 2.0,
                "c.w": 2.0,
            }
        with pytest.raises(ModelMismatchError, match="layer 'c' is gone"):
            store.commit(3, weights(a=3, b=3))


def test_part_of_a_layer_is_refused(tmp_path: Path) -> None:
    with ts.open_store(tmp_path / "run") as store:
        store.commit(1, {"a.w": torch.ones(2), "a.b": torch.ones(2), "c.w": torch.ones(2)})
        with pytest.raises(ModelMismatchError, match=r"'a.b' is gone from layer 'a'"):
            store.commit(2, {"a.w": torch.ones(2)}, partial=True)
        assert [commit.step for commit in store.log()] == [1]
