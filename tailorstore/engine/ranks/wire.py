"""Messages between ranks over connections of their own, and word of whoever is no longer at the other end.

The connections are gloo's, made directly and not by ``torch.distributed.new_group``: that derives the name under which
the ranks of a subset meet from how many groups each of them has, so it hangs where these numbers differ
(pytorch#173608), and again when a subset meets a second time after its first group was destroyed. Being nobody
else's, they also outlive ``destroy_process_group``, and need no device, whatever the trainer's backend is.

Nothing here raises when a rank is lost: each call returns what came, and who did not answer with what is known of it.
After that the connections are good for no more than telling the others, and :meth:`Wire.cut`.
"""

import logging
import os
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol, TypeAlias, cast

import numpy as np
import torch
import torch.distributed as dist

from tailorstore.domain.errors import MissingDependencyError, RankLostError
from tailorstore.engine.ranks.boxes import Bytes

logger = logging.getLogger("tailorstore")

Lost: TypeAlias = dict[int, str]
"""Ranks that cannot be reached any more → what became of them, as in "rank 3 …"."""


MESSAGE_BYTES: Final = 64 << 20
"""Longer data goes in several messages: in places, a transport counts the bytes of one in 31 bits."""

DIED: Final = "died (its connection is closed)"
_HEAD_BYTES: Final = 4096
"""The first message of a sending: its length in eight bytes, and as much of it as fits. Mostly that is all of it."""

_LENGTH_BYTES: Final = 8
_HEAD: Final = 0
_REST: Final = 1
_NEVER_SENT: Final = 2**31 - 1
_MOMENT: Final = timedelta(milliseconds=1)
"""The shortest wait: gloo takes 0 for one without end."""


class _Work(Protocol):
    def wait(self, timeout: timedelta = ..., /) -> bool: ...


class _Store(Protocol):
    def set(self, key: str, value: str, /) -> object: ...
    def get(self, key: str, /) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def delete_key(self, key: str, /) -> bool: ...


class _Gloo(Protocol):
    def send(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> _Work: ...
    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> _Work: ...
    def broadcast(self, tensor: torch.Tensor, root: int, /) -> _Work: ...


@dataclass(frozen=True, slots=True)
class _Posted:
    """A message that was handed over to gloo; `work` is None where gloo would not have it."""

    rank: int
    work: _Work | None


class Wire:
    """Connections from this rank to each of the others, closed when the object goes.

    Args:
        gloo: the connections.
        rank: this process's number.
        size: how many there are.
    """

    def __init__(self, gloo: _Gloo, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._gloo = gloo
        _OPEN.add(self)

    @classmethod
    def connect(cls, group: dist.ProcessGroup, timeout: timedelta) -> "Wire":
        """Connect the ranks of `group`, all of which call this.

        Args:
            group: of any backend; used only to find one another, through its store.
            timeout: how long to wait for the others.

        Raises:
            MissingDependencyError: this torch was built without gloo.
            RankLostError: some did not come in time.
        """
        if not dist.is_gloo_available():
            msg = "many ranks need gloo, and this torch was built without it; install a build that has it"
            raise MissingDependencyError(msg)
        rank, size = group.rank(), group.size()
        store = group.get_group_store()
        within = f"within {timeout.total_seconds():g} s"
        again = "every rank of the group must open the store, and several stores in the same order"
        try:
            name, absent = _meet(store, rank, size, timeout)
            if absent:
                msg = f"ranks {', '.join(map(str, absent))} did not come {within}; {again}"
                raise RankLostError(msg)
            place = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
            gloo = dist.ProcessGroupGloo(place, rank, size, timeout)
        except RuntimeError as error:
            msg = f"rank {rank} did not meet all {size - 1} others {within}; {again}"
            raise RankLostError(msg) from error
        # Torch's annotations leave the messages out.
        return cls(cast("_Gloo", gloo), rank, size)

    def send(self, data: bytes, ranks: Iterable[int], patience: float) -> Lost:
        """Send each of `ranks` the same, and return when they have it.

        Args:
            data: any number of bytes.
            ranks: who calls :meth:`receive`.
            patience: seconds until they must have done so.
        """
        head = np.zeros(_HEAD_BYTES, np.uint8)
        head[:_LENGTH_BYTES] = np.frombuffer(len(data).to_bytes(_LENGTH_BYTES, "little"), np.uint8)
        content = np.frombuffer(data, np.uint8)
        along = content[: _HEAD_BYTES - _LENGTH_BYTES]
        head[_LENGTH_BYTES : _LENGTH_BYTES + len(along)] = along
        rest = _tensor_of(content[len(along) :])
        posted = []
        for rank in ranks:
            posted.append(self._send(_tensor_of(head), rank, _HEAD))
            posted += [self._send(part, rank, _REST) for part in _parts(rest)]
        return _settle(posted, patience)

    def receive(self, ranks: Collection[int], patience: float) -> tuple[dict[int, bytes], Lost]:
        """Return what each of `ranks` sent.

        Args:
            ranks: who calls :meth:`send`.
            patience: seconds until each must have done so.
        """
        heads = {rank: np.empty(_HEAD_BYTES, np.uint8) for rank in ranks}
        lost = _settle([self._receive(_tensor_of(head), rank, _HEAD) for rank, head in heads.items()], patience)
        contents = {}
        rests = []
        for rank in heads.keys() - lost.keys():
            head = heads[rank]
            contents[rank] = np.empty(int.from_bytes(head[:_LENGTH_BYTES].tobytes(), "little"), np.uint8)
            along = head[_LENGTH_BYTES : _LENGTH_BYTES + len(contents[rank])]
            contents[rank][: len(along)] = along
            rests += self._receive_all(contents[rank][len(along) :], rank)
        lost |= _settle(rests, patience)
        return {rank: content.tobytes() for rank, content in contents.items() if rank not in lost}, lost

    def spread(self, data: Bytes, root: int, patience: float) -> bool:
        """Give every rank what `root` has, along a tree; false if somebody on the way is lost, and nobody knows who.

        Args:
            data: of the same length everywhere; elsewhere than on `root` it is filled. Writable.
            root: who has them.
            patience: seconds that a message may take.
        """
        return not any(_settle([self._broadcast(part, root)], patience) for part in _parts(_tensor_of(data)))

    def exchange(
        self, outgoing: Mapping[int, Bytes], incoming: Mapping[int, int], patience: float
    ) -> tuple[dict[int, Bytes], Lost]:
        """Send buffers to some ranks and receive from some, all at once.

        Args:
            outgoing: rank → its bytes; not to be changed until this returns.
            incoming: rank → number of bytes: just as many as that rank sends.
            patience: seconds in which at least one message must arrive.

        Returns:
            Rank → its bytes, one-dimensional; and the first rank that was found lost, if any.
        """
        arrived = {rank: np.empty(nbytes, np.uint8) for rank, nbytes in incoming.items()}
        posted = [one for rank, data in arrived.items() for one in self._receive_all(data, rank)]
        posted += [
            self._send(part, rank, _REST) for rank, data in outgoing.items() for part in _parts(_tensor_of(data))
        ]
        for one in posted:
            # The first says why. Of the rest nothing could be told: a wait that runs out closes every connection.
            if lost := _settle([one], patience):
                return {}, lost
        return arrived, {}

    def cut(self) -> None:
        """Close every connection now, so that whoever waits for this rank notices."""
        for rank in range(self.size):
            if rank != self.rank:
                # Gloo's abort() does nothing, and its connections live as long as any message that was ever posted.
                # A wait that runs out closes them all; one for a rank that is gone fails before it can.
                with suppress(RuntimeError):
                    self._gloo.recv([torch.empty(1)], rank, _NEVER_SENT).wait(_MOMENT)

    def keep(self) -> None:
        """Never close the connections in this process: in a fork, gloo would wait for threads that are not there."""
        _KEPT.append(self._gloo)

    def _send(self, tensor: torch.Tensor, rank: int, tag: int) -> _Posted:
        return _posted(rank, lambda: self._gloo.send([tensor], rank, tag))

    def _receive(self, tensor: torch.Tensor, rank: int, tag: int) -> _Posted:
        return _posted(rank, lambda: self._gloo.recv([tensor], rank, tag))

    def _broadcast(self, tensor: torch.Tensor, root: int) -> _Posted:
        return _posted(root, lambda: self._gloo.broadcast(tensor, root))

    def _receive_all(self, data: Bytes, rank: int) -> list[_Posted]:
        return [self._receive(part, rank, _REST) for part in _parts(_tensor_of(data))]


_OPEN: Final[weakref.WeakSet[Wire]] = weakref.WeakSet()
_KEPT: Final[list[_Gloo]] = []


def _keep_in_fork() -> None:
    for wire in _OPEN:
        wire.keep()


os.register_at_fork(after_in_child=_keep_in_fork)


def _meet(store: _Store, rank: int, size: int, timeout: timedelta) -> tuple[str, list[int]]:
    """Return a name that the ranks of this meeting have, and those of none before, which may have failed, or after.

    Rank 0 waits for all to be there, and tells each of them.

    Returns:
        The name; and the ranks that did not come, then known to all that did.

    Raises:
        RuntimeError: rank 0 did not come, or the store cannot be reached.
    """
    mine = f"tailorstore/{uuid.uuid4().hex}"
    here = [f"tailorstore/here/{other}" for other in range(size)]
    if rank > 0:
        store.set(here[rank], mine)
        try:
            store.wait([mine], 2 * timeout)
        finally:
            store.delete_key(here[rank])
        name, *others = store.get(mine).decode().split()
        return name, list(map(int, others))
    with suppress(RuntimeError):
        store.wait(here[1:], timeout)
    came = [other for other in range(1, size) if store.check([here[other]])]
    absent = sorted({*range(1, size)} - {*came})
    for other in came:
        store.set(store.get(here[other]).decode(), " ".join([mine, *map(str, absent)]))
    return mine, absent


def _posted(rank: int, post: Callable[[], _Work]) -> _Posted:
    try:
        return _Posted(rank, post())
    except RuntimeError as error:
        logger.info("no message to or from rank %d: %s", rank, error)
        return _Posted(rank, None)


def _settle(posted: Iterable[_Posted], patience: float) -> Lost:
    """Wait for messages, altogether `patience` seconds, and return the ranks with which they failed."""
    end = time.monotonic() + patience
    lost: Lost = {}
    for one in posted:
        try:
            if one.work is None:
                lost[one.rank] = DIED
            else:
                one.work.wait(max(_MOMENT, timedelta(seconds=end - time.monotonic())))
        except RuntimeError as error:
            logger.info("no message to or from rank %d: %s", one.rank, error)
            # Gloo says the same of all whose messages had not come when the first wait ran out.
            late = time.monotonic() >= end
            lost.setdefault(one.rank, f"did not answer within {patience:g} s" if late else DIED)
    return lost


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    return (tensor[start : start + MESSAGE_BYTES] for start in range(0, len(tensor), MESSAGE_BYTES))


def _tensor_of(data: Bytes) -> torch.Tensor:
    # Writable, because torch warns of other memory, even if all it will do is read.
    return torch.from_numpy(np.require(data, requirements=["C", "W"]))
