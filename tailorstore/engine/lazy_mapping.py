"""Names to what is read only when it is asked for."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tailorstore.domain.errors import LayerNotFoundError


class LazyMapping(Mapping[str, Any]):
    """Names to tensors that are read when they are asked for; the names are read at the first look."""

    def __init__(self, entries: Callable[[], Mapping[str, Any]], what: str) -> None:
        """Take what gives the entries, and a word for messages."""
        self._entries = entries
        self._what = what
        self._found: Mapping[str, Any] | None = None

    def _all(self) -> Mapping[str, Any]:
        if self._found is None:
            self._found = self._entries()
        return self._found

    def forget(self) -> None:
        """Look anew next time."""
        self._found = None

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401
        """Return one entry.

        Raises:
            LayerNotFoundError: no such name (a ``KeyError``).
        """
        try:
            return self._all()[name]
        except KeyError:
            msg = f"{self._what} has no {name!r}"
            raise LayerNotFoundError(msg) from None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._all())

    def __len__(self) -> int:
        """Count the names."""
        return len(self._all())

    def __repr__(self) -> str:
        """Describe without reading."""
        return f"<{self._what}>"
