"""Bases in host memory: light versions are differences to them, and reading them from storage each time is slow."""

import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from tailorstore.engine.tensors.memory import Tensor, nbytes

_SHARE = 0.5


def default_limit_bytes() -> int:
    """Return half of the machine's memory: bases are at most as large as the model's state."""
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _SHARE)


_caches: "weakref.WeakSet[BaseCache]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # Whoever holds a lock is a thread of the parent's.
    for cache in _caches:
        cache._start_empty()  # noqa: SLF001 - the same module


os.register_at_fork(after_in_child=_after_fork_in_child)


@dataclass(slots=True)
class _Held:
    version_id: str
    tensors: dict[str, Tensor]

    @property
    def size_bytes(self) -> int:
        return sum(nbytes(tensor) for tensor in self.tensors.values())


class BaseCache:
    """Tensors of full versions, at most one version of each layer. Thread-safe; what it gives must not be changed.

    What does not fit is not kept: it is read again when it is needed.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        """Allow ``limit_bytes``; default half of the machine's memory."""
        self._limit = default_limit_bytes() if limit_bytes is None else limit_bytes
        self._start_empty()
        _caches.add(self)

    def _start_empty(self) -> None:
        self._held: dict[str, _Held] = {}
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Host memory held."""
        with self._lock:
            return self._size()

    def get(self, layer: str, version_id: str) -> Mapping[str, Tensor]:
        """Return the tensors of a version that are held, by array path."""
        with self._lock:
            held = self._held.get(layer)
            if held is None or held.version_id != version_id:
                return {}
            return dict(held.tensors)

    def put(self, layer: str, version_id: str, tensors: Mapping[str, Tensor]) -> None:
        """Hold just these tensors of a layer from now on, if they fit."""
        with self._lock:
            self._held.pop(layer, None)
            new = _Held(version_id, dict(tensors))
            # Evicting what is as much in use as the new one would only make both be read each time.
            if new.tensors and self._size() + new.size_bytes <= self._limit:
                self._held[layer] = new

    def clear(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._held.clear()

    def _size(self) -> int:
        return sum(held.size_bytes for held in self._held.values())
