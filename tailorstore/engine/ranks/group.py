"""What the ranks of a store say to one another, and how all of them learn that one has failed.

Everything but the bulk of an exchange goes in *rounds*: each rank brings a word (which call it is in, whether it has
failed, what it has to say) to the coordinator, who tells all of them either what everybody said or the error that all
of them raise. So the coordinator knows who is missing, a failure ends whatever the others are in, and ranks that
wandered into different calls are told so instead of waiting for one another.
"""

import contextlib
import itertools
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch.distributed as dist

from tailorstore.domain.errors import (
    ClosedError,
    InvalidInputError,
    RankLostError,
    TailorError,
)
from tailorstore.engine.ranks.boxes import Box, Bytes, Window
from tailorstore.engine.ranks.waiting import Waiting
from tailorstore.engine.ranks.wire import DIED, Wire
from tailorstore.engine.ranks.words import GO_ON, OR_ANOTHER, Answer, Refusal, Word, json_bytes, lost_error, objection

COORDINATOR: Final = 0
TIMEOUT: Final = timedelta(minutes=10)
"""How late a rank may be. One that died is noticed at once; this is for hosts that vanish and programs that hang."""

_KNOWN_TO: Final = "_tailorstore_known_to"
"""The attribute of an error that all ranks know of already: the id of the `Ranks` that told them."""


class Ranks:
    """The processes that commit and restore together.

    Every method but ``close`` is called by all ranks in the same order (it is *collective*) and by one thread at a
    time. Nothing else of torch.distributed is used after joining, so these calls and the trainer's never meet.

    When a rank dies, or comes too late, the others get a RankLostError; from then on every call raises one at once.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        hosts: for each rank the number of its host, from 0; ranks with equal numbers run on one host.
    """

    coordinator: Final = COORDINATOR

    def __init__(self, wire: Wire | None, timeout: timedelta) -> None:
        """Take over connections; see :meth:`join` and :meth:`alone`."""
        self.rank = wire.rank if wire else 0
        self.size = wire.size if wire else 1
        self._wire = wire
        self._process = os.getpid()
        self._patience = timeout.total_seconds()
        self._doing = ""
        self._end: Refusal | None = None
        self._boxes = _new_boxes() if wire else []
        self._turn = 0
        self._waiting = Waiting()
        self._shelves: dict[int, int] = {}
        self._windows: dict[int, list[Window]] = {}
        mine = [[box.path, box.token.hex()] for box in self._boxes]
        told = self.gather([socket.gethostname(), mine])
        numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in told))}
        self.hosts = tuple(numbers[name] for name, _ in told)
        self._windows = self._open_windows([boxes for _, boxes in told])
        seen = self.gather(list(self._windows))
        self._neighbours = frozenset(rank for rank in self._windows if self.rank in seen[rank])

    @classmethod
    def join(cls, group: dist.ProcessGroup | None = None, timeout: timedelta = TIMEOUT) -> "Ranks":
        """Connect the ranks of `group`; collective over them.

        Args:
            group: of any backend; None: all ranks, or just this process where torch.distributed is not initialised.
            timeout: how late a rank may be. Who waits for the coordinator waits twice as long, so that the
                coordinator, which knows who is missing, is the first to give up.

        Raises:
            InvalidInputError: this process is not one of the group.
            MissingDependencyError: this torch has no gloo.
            RankLostError: some ranks did not join in time.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls.alone()
        members = dist.group.WORLD if group is None else group
        if not isinstance(members, dist.ProcessGroup):
            msg = f"rank {dist.get_rank()} is not a member of the group; only members may open a store with it"
            raise InvalidInputError(msg)
        if members.size() == 1:
            return cls.alone()
        waiting = Waiting()
        waiting.begin(f"rank {members.rank()} of {members.size()} waits for the others to use the store")
        try:
            wire = Wire.connect(members, timeout)
        finally:
            waiting.close()
        return cls(wire, timeout)

    @classmethod
    def alone(cls) -> "Ranks":
        """Return the ranks of a single process, which never communicates."""
        return cls(None, TIMEOUT)

    @property
    def is_coordinator(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == COORDINATOR

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401 - JSON data
        """Return what every rank passed, in the order of ranks, on every rank.

        Args:
            value: what JSON can express, plus NaN and infinities. One's own also comes back as JSON has it: tuples
                as lists, keys as text.

        Raises:
            RankLostError: see the class.
            RanksDisagreeError: some ranks are in another call. All raise it.
            TailorError: a rank failed in :meth:`together` while others were here. All raise it.
        """
        return [json.loads(one) for one in self.gather_bytes(json_bytes(value))]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return what every rank passed, in the order of ranks, on every rank; errors as in :meth:`gather`."""
        return self._round("gathering", data)

    def share(self, value: Any) -> Any:  # noqa: ANN401 - JSON data
        """Return the coordinator's value on every rank; the others' is ignored. As :meth:`gather` otherwise."""
        return json.loads(self.share_bytes(json_bytes(value) if self.is_coordinator else None))

    def share_bytes(self, data: bytes | None, source: int = COORDINATOR) -> bytes:
        """Return the bytes of rank `source` on every rank; errors as in :meth:`gather`.

        Args:
            data: ignored elsewhere than on `source`.
            source: who has them.
        """
        mine = data or b"" if self.rank == source else b""
        return self._round("sharing", mine)[source]

    def outbox(self, sizes: Mapping[int, int]) -> dict[int, Bytes]:
        """Return memory for what is to be sent, by rank; valid until the exchange after the next one.

        For ranks of this host it is memory that they can look into: what is filled in here need not travel. Not
        collective.
        """
        near = {rank: size for rank, size in sizes.items() if rank in self._neighbours}
        placed = self._boxes[self._turn].place(near) if near else {}
        self._shelves = {rank: at for rank, (at, _) in placed.items()}
        return {rank: placed[rank][1] if rank in placed else np.empty(size, np.uint8) for rank, size in sizes.items()}

    def exchange(self, outgoing: Mapping[int, Bytes], incoming: Mapping[int, int]) -> dict[int, Bytes]:
        """Send buffers to some ranks and receive from some.

        Args:
            outgoing: other rank → uint8 array of one dimension, contiguous; best from :meth:`outbox`.
            incoming: other rank → how many bytes it sends here. Every rank must know this rightly.

        Returns:
            Other rank → its bytes, in an array of one dimension, valid until this rank's next exchange.

        Raises:
            RankLostError: see the class.
            TailorError: as in :meth:`gather`.
        """
        shelves, self._shelves = self._shelves, {}
        # A box is looked into until the others come to their next exchange: the one after that may have it again.
        turn, self._turn = self._turn, 1 - self._turn
        said = self._round("exchanging", json_bytes(list(shelves.items())))
        if self.size == 1:
            return {}
        on_shelves = {rank: dict(json.loads(said[rank])).get(self.rank) for rank in incoming}
        with self._joined() as wire:
            arrived, lost = wire.exchange(
                {rank: data for rank, data in outgoing.items() if rank not in shelves},
                {rank: size for rank, size in incoming.items() if on_shelves[rank] is None},
                self._patience,
            )
            if lost:
                raise lost_error(lost, self._call("exchanging"), OR_ANOTHER)
            for rank, at in on_shelves.items():
                if at is not None:
                    arrived[rank] = self._windows[rank][turn].look(at, incoming[rank])
        return arrived

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Let every rank do something by itself, and go on only if all have succeeded.

        A rank that fails tells the others at the end of the block, or at the next call that they make in it. Then all
        raise the same error: of the class of the first failing rank's own, with a message that names that rank. On the
        rank itself it is chained to its own; its KeyboardInterrupt or SystemExit goes on as itself.

        Args:
            what: "writing layers": for messages, after "while".

        Raises:
            TailorError: what a rank failed with; UnavailableError if that was none of tailorstore's errors.
            RankLostError: see the class.
        """
        outer, self._doing = self._doing, what
        try:
            yield
            self._round("", b"")
        except BaseException as error:
            if self.size > 1 and not self._is_known(error):
                self._tell(error)
            raise
        finally:
            self._doing = outer

    def close(self) -> None:
        """Close the connections; ranks that still wait for this one get a RankLostError. Twice does no harm."""
        self._wire = None
        self._waiting.close()
        self._windows = {}
        for box in self._boxes:
            box.close()
        self._boxes = []
        self._end = Refusal(ClosedError.__name__, "these ranks were closed with their store; open it again")

    def _open_windows(self, boxes: Sequence[Sequence[Sequence[str]]]) -> dict[int, list[Window]]:
        """Return windows into the boxes of this host's other ranks, by rank."""
        found = {}
        for rank, described in enumerate(boxes):
            if rank != self.rank and self.hosts[rank] == self.hosts[self.rank] and described and self._boxes:
                windows = [Window(path, bytes.fromhex(token)) for path, token in described]
                if all(window.is_open() for window in windows):
                    found[rank] = windows
        return found

    def _is_known(self, error: BaseException) -> bool:
        return self._end is not None or getattr(error, _KNOWN_TO, None) == id(self)

    def _tell(self, error: BaseException) -> None:
        """Tell the others that this rank has failed, and raise what all raise; return if its own error is to go on."""
        try:
            self._round("", b"", Refusal.of(error))
        except TailorError as agreed:
            if isinstance(error, Exception):
                raise agreed from error
            setattr(error, _KNOWN_TO, id(self))

    def _round(self, kind: str, data: bytes, failure: Refusal | None = None) -> list[bytes]:
        """Return what every rank brought, or raise what all raise."""
        if self.size == 1 and self._end is None:
            return [data]
        mine = Word(self._call(kind), failure, data)
        with self._joined() as wire, self._patient(mine.call):
            answer = self._preside(wire, mine) if self.is_coordinator else self._attend(wire, mine)
            said = answer.said if answer.is_short else self._spread(wire, answer, mine.call)
        if answer.refusal is not None:
            error = answer.refusal.as_error()
            setattr(error, _KNOWN_TO, id(self))
            raise error
        ends = itertools.accumulate(answer.sizes)
        return [said[end - size : end] for size, end in zip(answer.sizes, ends, strict=True)]

    def _preside(self, wire: Wire, mine: Word) -> Answer:
        """Hear all ranks, and tell them what follows."""
        others = range(1, self.size)
        packed, lost = wire.receive(others, self._patience)
        words = [mine, *(Word.unpacked(packed[rank]) for rank in others if rank in packed)]
        refusal = Refusal.of(lost_error(lost, mine.call)) if lost else objection(words)
        data = [] if refusal else [word.data for word in words]
        answer = Answer(refusal, bool(lost), tuple(map(len, data)), b"".join(data))
        # Also if some are lost: the others are still there to be told, unless the connections closed with the wait.
        unheard = wire.send(answer.packed(), [rank for rank in others if rank not in lost], self._patience)
        # A rank that died after it was heard is found out, and named to all, in the next round.
        if lost := lost or {rank: reason for rank, reason in unheard.items() if reason != DIED}:
            raise lost_error(lost, mine.call)
        return answer

    def _attend(self, wire: Wire, mine: Word) -> Answer:
        """Have oneself heard by the coordinator, and hear what follows."""
        lost = wire.send(mine.packed(), [COORDINATOR], 2 * self._patience)
        packed: dict[int, bytes] = {}
        if not lost:
            packed, lost = wire.receive([COORDINATOR], 2 * self._patience)
        if lost:
            raise lost_error(lost, mine.call, OR_ANOTHER)
        answer = Answer.unpacked(packed[COORDINATOR])
        if answer.refusal is not None and answer.last:
            raise answer.refusal.as_error()
        return answer

    def _spread(self, wire: Wire, answer: Answer, call: str) -> bytes:
        """Return on all ranks what all ranks said, which the coordinator has."""
        said = np.empty(sum(answer.sizes), np.uint8)
        if self.is_coordinator:
            said[:] = np.frombuffer(answer.said, np.uint8)
        if not wire.spread(said, COORDINATOR, self._patience):
            msg = f"a rank died or did not answer while {call}; {GO_ON}"
            raise RankLostError(msg)
        return said.tobytes()

    @contextlib.contextmanager
    def _patient(self, call: str) -> Iterator[None]:
        """Say so when the others are waited for very long: most often one of them never called."""
        self._waiting.begin(f"rank {self.rank} of {self.size} waits for the others, {call}")
        try:
            yield
        finally:
            self._waiting.end()

    def _call(self, kind: str) -> str:
        return f"{self._doing} ({kind})" if self._doing and kind else self._doing or kind

    @contextlib.contextmanager
    def _joined(self) -> Iterator[Wire]:
        """Give the connections, and cut them if the block is left by an error: nobody knows what is still under way."""
        if self._end is not None:
            raise self._end.as_error()
        if self._wire is None or self._process != os.getpid():
            msg = f"this process was forked from rank {self.rank} and is no rank itself; use the store in its parent"
            raise RankLostError(msg)
        try:
            yield self._wire
        except BaseException as error:
            self._wire.cut()
            self._wire = None
            reason = str(error) or type(error).__name__
            self._end = Refusal(
                RankLostError.__name__, f"the ranks of this store are no longer connected, since: {reason}"
            )
            raise


def _new_boxes() -> list[Box]:
    """Return two boxes, used in turns; none where the system has no such thing."""
    try:
        return [Box(), Box()]
    except (OSError, AttributeError):
        return []
