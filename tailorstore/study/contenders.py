"""Contenders: a strategy, how light versions are made, and the codec; written and read as one line of text.

``STRATEGY [@ WEIGHTS/SLOTS] [+ CODEC]``, where WEIGHTS and SLOTS are bits per element of light versions, and
``{filter}`` in the strategy stands for the bytes that the filter wrote per commit in the same run.
"""

import re
from dataclasses import dataclass
from typing import Any

from tailorstore.domain.errors import InvalidInputError
from tailorstore.domain.light import LightSettings
from tailorstore.domain.mask import Strategy
from tailorstore.domain.strategies import parse_strategy
from tailorstore.storage.codecs import CODECS

FULL = "all()"
"""Is not led along the run: the run's own store is it."""
NUDGED = "(nudged)"
"""No contender, but what chance alone does: the full state with every weight moved by one unit in the last place."""

_FILTER = "{filter}"
_UNBOUNDED = 1e9


@dataclass(frozen=True, slots=True)
class Contender:
    """What is led along a run."""

    strategy: str
    bits: str | None = None
    """``WEIGHTS/SLOTS``; ``None`` for the defaults of the store, bounds included."""
    codec: str = "none"

    @property
    def text(self) -> str:
        """The line that :func:`parse_contender` reads."""
        bits = f" @ {self.bits}" if self.bits else ""
        codec = f" + {self.codec}" if self.codec != "none" else ""
        return f"{self.strategy}{bits}{codec}"

    @property
    def asks_for_filter(self) -> bool:
        """Whether the filter must have been led along the run before."""
        return _FILTER in self.strategy

    def mask(self, filter_bytes: int | None) -> Strategy:
        """Return the strategy.

        Args:
            filter_bytes: what the filter wrote per commit, the first commit left out.

        Raises:
            MaskError: there is no such strategy.
            InvalidInputError: the filter is asked for, and has not been led along the run.
        """
        if self.asks_for_filter and filter_bytes is None:
            msg = f"{self.text!r} wants to write what the filter writes: name a filter(…) strategy before it"
            raise InvalidInputError(msg)
        return parse_strategy(self.strategy.replace(_FILTER, str(filter_bytes)))

    def options(self) -> dict[str, Any]:
        """Return what the contender's store is opened with."""
        if self.bits is None:
            return {"codec": self.codec, "light": LightSettings()}
        weights, _, slots = self.bits.partition("/")
        # Without bounds, so that it is these bits that are studied and not what is done where they do not suffice.
        light = LightSettings(
            weight_bits=int(weights),
            slot_bits=int(slots),
            max_weight_error=_UNBOUNDED,
            max_slot_error=_UNBOUNDED,
            due_error=_UNBOUNDED,
        )
        return {"codec": self.codec, "light": light}


def parse_contender(text: str) -> Contender:
    """Read a contender.

    Raises:
        InvalidInputError: not ``STRATEGY [@ WEIGHTS/SLOTS] [+ CODEC]``, or bits or codec are unknown.
        MaskError: there is no such strategy.

    Examples:
        >>> parse_contender("staggered(10) @ 4/3 + zstd")
        Contender(strategy='staggered(10)', bits='4/3', codec='zstd')
    """
    found = re.fullmatch(r"(?P<strategy>[^@+]+?)(\s*@\s*(?P<bits>\d/\d))?(\s*\+\s*(?P<codec>\w+))?\s*", text)
    if found is None:
        msg = f"{text!r} is no contender; write STRATEGY, STRATEGY @ 4/3 (bits of weights and slots), or … + zstd"
        raise InvalidInputError(msg)
    if (found["codec"] or "none") not in CODECS:
        msg = f"{text!r} names the codec {found['codec']!r}; use one of {', '.join(CODECS)}"
        raise InvalidInputError(msg)
    contender = Contender(found["strategy"].strip(), found["bits"], found["codec"] or "none")
    contender.mask(filter_bytes=1 << 30)
    contender.options()
    return contender


SHOWN_LIGHT = Contender("light()")
"""Light versions as a store makes them by default: what the table of factors shows."""

FILTERS = {
    "pretrain": "filter(first=1, last=1, every=5)",
    "finetune": "filter(first=1, last=1, every=5)",
    "vision": "filter(first=1, last=1, every=5)",
}
"""The paper's filter, at the tasks' numbers of blocks."""

_SAME_BYTES = (
    "budget(bytes_per_commit={filter}, by='curvature').max_age(commits=10)",
    "budget(bytes_per_commit={filter}, by='drift').max_age(commits=10)",
    "budget(bytes_per_commit={filter}, by='relative_drift').max_age(commits=10)",
    "budget(bytes_per_commit={filter}, by='importance').max_age(commits=10)",
    "top_k(4, by='drift')",
    "round_robin(4)",
)

_LIGHT = (
    *(f"light() @ {bits}" for bits in ("8/8", "4/4", "4/3", "4/2", "3/3", "3/2", "2/2")),
    *(f"staggered({n}) @ {bits}" for n in (10, 25) for bits in ("4/4", "3/3", "2/2")),
)


def default_contenders(task: str) -> list[str]:
    """Return the lines of all contenders of a task, those first that others ask for."""
    return ["parity()", FILTERS[task], *_SAME_BYTES, *_LIGHT]
