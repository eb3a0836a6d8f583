"""The paper's two recipes (LLMTailor, arXiv 2602.22158) at its models' layer counts: bytes over a run of 16 saves.

The saves are commits 1 to 16, after the full first commit that every branch has: the paper does not count that one.
"""

import pytest

from tailorstore.domain.mask import LayerState, MaskContext, Strategy
from tailorstore.domain.strategies import Filter, Parity

SAVES = range(1, 17)

BYTES_PER_PARAMETER = 14
"""bfloat16 weights, float32 master weights and two moments."""


def decoder(*, blocks: int, hidden: int, inner: int, keys: int, vocabulary: int, biases: bool) -> dict[str, int]:
    """Return the parameters of each layer of a Llama-shaped model with an untied head."""
    attention = 2 * hidden * hidden + 2 * hidden * keys + (hidden + 2 * keys if biases else 0)
    block = attention + 3 * hidden * inner + 2 * hidden
    return {
        "model.embed_tokens": vocabulary * hidden,
        **{f"model.layers.{at}": block for at in range(blocks)},
        "model.norm": hidden,
        "lm_head": vocabulary * hidden,
    }


LLAMA = decoder(blocks=32, hidden=4096, inner=14336, keys=1024, vocabulary=128256, biases=False)
QWEN = decoder(blocks=28, hidden=3584, inner=18944, keys=512, vocabulary=152064, biases=True)


def cumulative(strategy: Strategy, parameters: dict[str, int]) -> int:
    layers = {name: LayerState(name, count * BYTES_PER_PARAMETER, 0) for name, count in parameters.items()}
    return sum(
        layers[name].bytes_logical
        for number in SAVES
        for name in strategy.select(MaskContext("main", 100 * number, layers, {}, number))
    )


def full(parameters: dict[str, int]) -> int:
    return len(SAVES) * BYTES_PER_PARAMETER * sum(parameters.values())


def factor(strategy: Strategy, parameters: dict[str, int]) -> float:
    return full(parameters) / cumulative(strategy, parameters)


def test_the_models_are_those_of_the_paper() -> None:
    assert sum(LLAMA.values()) == 8_030_261_248
    assert sum(QWEN.values()) == 7_615_616_512
    assert len(LLAMA) == 32 + 3
    assert len(QWEN) == 28 + 3
    # The paper: 1799.52 GB.
    assert full(LLAMA) / 1e9 == pytest.approx(1799.52, rel=1e-3)


@pytest.mark.parametrize("parameters", [LLAMA, QWEN])
@pytest.mark.parametrize("start", ["even", "odd"])
def test_parity_halves_the_bytes(parameters: dict[str, int], start: str) -> None:
    strategy = Parity("even" if start == "even" else "odd")
    assert cumulative(strategy, parameters) * 2 == full(parameters)


@pytest.mark.parametrize(("parameters", "reported"), [(LLAMA, 4.3), (QWEN, 4.2)])
def test_the_filter_comes_to_the_papers_factor_when_two_blocks_are_written_always(
    parameters: dict[str, int], reported: float
) -> None:
    # "First few + last 2 layers at every save, the middle 1 in 5": the reported bytes leave room for two blocks at
    # every save and nothing else, so the auxiliaries must go with the middle.
    for recipe in (
        Filter(first=0, last=2, every=5, auxiliaries=False),
        Filter(first=1, last=1, every=5, auxiliaries=False),
    ):
        assert round(factor(recipe, parameters), 1) == reported
    # The paper for Llama: 420 GB.
    assert cumulative(Filter(0, 2, 5, auxiliaries=False), LLAMA) / 1e9 == pytest.approx(420, rel=0.01)


@pytest.mark.parametrize(("parameters", "most"), [(LLAMA, 3.41), (QWEN, 3.29)])
def test_embedding_and_head_at_every_save_would_not_leave_room_for_that(
    parameters: dict[str, int], most: float
) -> None:
    # An eighth of the bytes: with them at every save and the middle at one in five, no choice of ends comes to 4.3.
    assert factor(Filter(first=0, last=0, every=5), parameters) == pytest.approx(most, abs=0.01)
    assert 2.4 < factor(Filter(first=2, last=2, every=5), parameters) < 2.7
