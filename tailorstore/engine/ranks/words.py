"""What is said in a round of the ranks: a word from each, and the coordinator's answer to all."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tailorstore.domain import errors
from tailorstore.domain.errors import RankLostError, RanksDisagreeError, TailorError, UnavailableError
from tailorstore.engine.ranks.wire import Lost

_SHOWN: Final = 8
_SHORT_BYTES: Final = 2048
"""What all ranks said together goes along with the coordinator's answer if it is no longer; else along a tree."""
GO_ON: Final = "start the training anew from the store, which holds every commit that was published"
OR_ANOTHER: Final = ", or gave up because another rank was lost; its own error says which"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The error that every rank raises instead of going on."""

    error: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> "Refusal":
        """Describe an error by the nearest class that the other ranks have too."""
        for base in type(error).__mro__:
            if issubclass(base, TailorError) and getattr(errors, base.__name__, None) is base:
                return cls(base.__name__, str(error))
        return cls(UnavailableError.__name__, f"{type(error).__name__}: {error}")

    def as_error(self) -> TailorError:
        """Return a new error."""
        error: TailorError = getattr(errors, self.error)(self.message)
        return error


@dataclass(frozen=True, slots=True)
class Word:
    """What a rank brings to a round."""

    call: str
    failure: Refusal | None
    data: bytes

    def packed(self) -> bytes:
        """Return it as bytes."""
        return json_bytes([self.call, _listed(self.failure)]) + b"\n" + self.data

    @classmethod
    def unpacked(cls, packed: bytes) -> "Word":
        """Return the word that bytes hold."""
        head, _, data = packed.partition(b"\n")
        call, failure = json.loads(head)
        return cls(call, failure and Refusal(*failure), data)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the coordinator makes of all words: an error for everybody, or what each rank said.

    `last`: some ranks are lost, so nothing will be said after this.
    """

    refusal: Refusal | None
    last: bool = False
    sizes: tuple[int, ...] = ()
    said: bytes = b""

    def packed(self) -> bytes:
        """Return it as bytes, with what was said if that is short."""
        along = self.said if self.is_short else b""
        return json_bytes([_listed(self.refusal), self.last, self.sizes]) + b"\n" + along

    @classmethod
    def unpacked(cls, packed: bytes) -> "Answer":
        """Return the answer that bytes hold."""
        head, _, said = packed.partition(b"\n")
        refusal, last, sizes = json.loads(head)
        return cls(refusal and Refusal(*refusal), last, tuple(sizes), said)

    @property
    def is_short(self) -> bool:
        """Whether what was said goes along with the answer."""
        return sum(self.sizes) <= _SHORT_BYTES


def objection(words: Sequence[Word]) -> Refusal | None:
    """Return the error that all ranks must raise: one's failure, or that they are in different calls."""
    failed = [rank for rank, word in enumerate(words) if word.failure is not None]
    for rank in failed[:1]:
        word = words[rank]
        also = f" ({_named(failed[1:])} failed too)" if failed[1:] else ""
        elsewhere = [at for at, other in enumerate(words) if _block(other.call) != _block(word.call)]
        if elsewhere:
            also += f"; {_named(elsewhere)} called something else: {words[elsewhere[0]].call}"
        if word.failure is not None:
            return Refusal(word.failure.error, f"rank {rank}, while {word.call}: {word.failure.message}{also}")
    calls: dict[str, list[int]] = {}
    for rank, word in enumerate(words):
        calls.setdefault(word.call, []).append(rank)
    if len(calls) == 1:
        return None
    where = "; ".join(f"{_named(ranks)}: {call}" for call, ranks in calls.items())
    return Refusal(
        RanksDisagreeError.__name__,
        f"the ranks are in different calls ({where}); every rank must call the same of the store in the same order",
    )


def _block(call: str) -> str:
    return call.partition(" (")[0]


def lost_error(lost: Lost, call: str, unless: str = "") -> RankLostError:
    """Return the error for ranks that were lost in a call."""
    reasons: dict[str, list[int]] = {}
    for rank, reason in sorted(lost.items()):
        reasons.setdefault(reason, []).append(rank)
    who = ", ".join(f"{_named(ranks)} {reason}" for reason, ranks in reasons.items())
    return RankLostError(f"{who} while {call}{unless}; {GO_ON}")


def _named(ranks: Sequence[int]) -> str:
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def _listed(refusal: Refusal | None) -> list[str] | None:
    return None if refusal is None else [refusal.error, refusal.message]


def listed(ranks: Sequence[int]) -> str:
    """Return the numbers of some ranks for a message, the first of very many."""
    return ", ".join(map(str, ranks[:_SHOWN])) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def json_bytes(value: Any) -> bytes:  # noqa: ANN401 - JSON data
    """Return JSON data as bytes; NaN and infinities are allowed."""
    return json.dumps(value, separators=(",", ":")).encode()
