"""Real text that every Python has: the sources and the documentation of its standard library, as bytes."""

import importlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"})
_HELD_OUT_EVERY = 20
_LEAST_BYTES = 200_000


def load_text() -> tuple[Tensor, Tensor]:
    """Return the bytes to train on and the bytes held out; the same on every call.

    Raises:
        RuntimeError: this Python came without the sources of its library.
    """
    documents = [path.read_bytes() for path in library_sources()]
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    documents += [topics[name].encode() for name in sorted(topics)]
    # Whole documents are held out, so that nothing of them has been seen in training.
    held_out = b"".join(documents[::_HELD_OUT_EVERY])
    train = b"".join(document for at, document in enumerate(documents) if at % _HELD_OUT_EVERY)
    if len(train) < _LEAST_BYTES:
        msg = "this Python came without the sources of its standard library, and the demo trains on those"
        raise RuntimeError(msg)
    return _as_tensor(train), _as_tensor(held_out)


def library_sources() -> list[Path]:
    """Return the files of the standard library, sorted; tests and what others installed are left out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in library.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(library).parts))


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Batches:
    """Windows of a text in a shuffled order that depends on nothing but the text: a position says it all."""

    def __init__(self, text: Tensor, context: int, batch: int) -> None:
        """Cut a text into windows of ``context`` bytes, ``batch`` of which go together."""
        self._text = text
        self._context = context
        self._batch = batch
        windows = (len(text) - 1) // context
        self._order = torch.randperm(windows, generator=torch.Generator().manual_seed(0))

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """Return the batch at a position: bytes, and for each the byte that follows it."""
        windows = torch.arange(position * self._batch, (position + 1) * self._batch) % len(self._order)
        starts = self._order[windows].unsqueeze(1) * self._context
        both = self._text[starts + torch.arange(self._context + 1)].long()
        return both[:, :-1], both[:, 1:]
