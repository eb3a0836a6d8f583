"""What the ranks say to one another arrives whole, a failure of one is everybody's, and nobody waits for the dead."""

import gc
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tailorstore.domain.errors import (
    ClosedError,
    InvalidInputError,
    LayerNotFoundError,
    RankLostError,
    StorageFullError,
)
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.wire import MESSAGE_BYTES
from tailorstore.engine.ranks.words import Word
from tests.kit.ranks import RanksFailedError, die, run_ranks

SHORT = timedelta(seconds=3)
LONG = timedelta(seconds=100)


def raised(call: Callable[[], object]) -> list[str]:
    """Return what was raised: class, message, and class of what it is chained to."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - looked at by the test
        return [type(error).__name__, str(error), type(error.__cause__).__name__]
    return []


# --- One process


def test_one_process_alone_needs_nobody() -> None:
    ranks = Ranks.join()
    assert (ranks.rank, ranks.size, ranks.hosts, ranks.coordinator, ranks.is_coordinator) == (0, 1, (0,), 0, True)
    assert ranks.gather((1, 2)) == [[1, 2]]
    assert ranks.share({"a": 1}) == {"a": 1}
    assert ranks.share_bytes(b"ab") == b"ab"
    assert ranks.exchange({}, {}) == {}
    with pytest.raises(OSError, match=r"^no space$"), ranks.together("writing"):
        raise OSError("no space")
    ranks.close()
    ranks.close()
    with pytest.raises(ClosedError, match="open it again"):
        ranks.gather(1)
    with pytest.raises(ClosedError), ranks.together("writing"):
        pass


# --- Talking


def _talk() -> dict[str, Any]:
    rank = dist.get_rank()
    ranks = Ranks.join(timeout=LONG)
    found: dict[str, Any] = {"me": [ranks.rank, ranks.size, list(ranks.hosts), ranks.is_coordinator]}
    found["values"] = ranks.gather(
        {"rank": rank, "figures": [math.inf, -0.0, 5e-324, 0.1 + rank], "z": None, "ä": "\n"}
    )
    found["nan"] = [math.isnan(one) for one in ranks.gather(math.nan)]
    found["shared"] = ranks.share({"from": rank})
    found["from the last"] = ranks.share_bytes(bytes([rank]), source=ranks.size - 1).hex()
    # None, some in the head, some more, some that need the tree, some of several messages.
    for nbytes in (0, 1, 700, 4087, 5000, MESSAGE_BYTES + 3):
        mine = np.arange(nbytes if rank == 1 else nbytes // 1000, dtype=np.uint32).astype(np.uint8) ^ np.uint8(rank)
        everybody = ranks.gather_bytes(mine.tobytes())
        right = [
            np.arange(nbytes if other == 1 else nbytes // 1000, dtype=np.uint32).astype(np.uint8) ^ np.uint8(other)
            for other in range(ranks.size)
        ]
        found[f"gathered {nbytes}"] = [one == other.tobytes() for one, other in zip(everybody, right, strict=True)]
    found["exchanged"] = _exchange(ranks)
    found["background"] = _in_background(ranks)
    found["forked"] = _forked(ranks)
    ranks.close()
    ranks.close()
    found["closed"] = raised(lambda: ranks.gather(1))
    found["again"] = Ranks.join(timeout=LONG).gather(rank)
    found["subset"] = _subset()
    later = Ranks.join(timeout=LONG)
    dist.destroy_process_group()
    found["without the world"] = later.gather(rank)
    # A world that carries nothing that is in host memory, as with nccl.
    meeting = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group("cuda:gloo", store=meeting, rank=rank, world_size=3)
    found["of devices only"] = raised(lambda: dist.all_reduce(torch.ones(1)))[0]
    found["beside it"] = Ranks.join(timeout=LONG).gather(rank)
    # Neither closed nor forgotten when the interpreter ends.
    globals()["_left_open"] = later
    return found


def _exchange(ranks: Ranks) -> list[Any]:
    """Send three messages' worth and an odd byte from 0 to 1, little from 2 to 0 and 1, nothing from 1 to 2."""
    much = np.random.default_rng(7).integers(0, 256, 2 * MESSAGE_BYTES + 1, dtype=np.uint8)
    little = np.arange(10, dtype=np.uint8)
    little.flags.writeable = False
    outgoing = {0: {1: much}, 1: {2: little[:0]}, 2: {0: little[::2], 1: little}}[ranks.rank]
    incoming = {0: {2: 5}, 1: {0: len(much), 2: 10}, 2: {1: 0}}[ranks.rank]
    arrived = ranks.exchange(outgoing, incoming)
    assert all(one.flags.writeable for one in arrived.values())
    if ranks.rank == 1:
        assert np.array_equal(arrived.pop(0), much)
    return sorted((other, data.tolist()) for other, data in arrived.items())


def _in_background(ranks: Ranks) -> list[int]:
    """Gather in a thread while the trainer's own collectives go on, in no common order."""
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.extend(sum(ranks.gather(turn)) for turn in range(30)))
    thread.start()
    total = torch.zeros(3)
    for _ in range(30):
        one = torch.ones(3)
        dist.all_reduce(one)
        total += one
    thread.join()
    return [int(total[0]), *seen]


def _forked(ranks: Ranks) -> list[Any]:
    """Use, close and forget the connections in a fork, which must neither hang nor disturb its parent."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = raised(lambda: ranks.gather(1))
            ranks.close()
            del ranks
            gc.collect()
            os.write(writes, "; ".join(found[:2]).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    return [said, os.waitpid(child, 0)[1], ranks.gather(ranks.rank)]


def _subset() -> list[Any]:
    """Join the last two ranks twice, of which one is in more groups than the other."""
    rank = dist.get_rank()
    pair = dist.new_group([1, 2])
    if rank == 0:
        return raised(lambda: Ranks.join(pair, LONG))
    if rank == 1:
        dist.new_group([1], use_local_synchronization=True)
    found: list[Any] = []
    for _ in range(2):
        ranks = Ranks.join(pair, LONG)
        found.append([ranks.rank, ranks.gather(rank)])
        ranks.close()
    return found


def test_ranks_talk() -> None:
    results = run_ranks(_talk, 3)
    for rank, found in enumerate(results):
        assert found["me"] == [rank, 3, [0, 0, 0], rank == 0]
        assert [value["rank"] for value in found["values"]] == [0, 1, 2]
        assert [list(value) for value in found["values"]] == [["rank", "figures", "z", "ä"]] * 3
        assert str(found["values"][1]["figures"]) == "[inf, -0.0, 5e-324, 1.1]"
        assert found["nan"] == [True] * 3
        assert found["shared"] == {"from": 0}
        assert found["from the last"] == "02"
        gathered = {name: right for name, right in found.items() if name.startswith("gathered")}
        assert gathered == {f"gathered {n}": [True] * 3 for n in (0, 1, 700, 4087, 5000, MESSAGE_BYTES + 3)}
        assert found["background"] == [90, *range(0, 90, 3)]
        said, status, still = found["forked"]
        assert (said.split(";")[0], status, still) == ("RankLostError", 0, [0, 1, 2])
        assert f"forked from rank {rank}" in said
        assert found["closed"][0] == "ClosedError"
        assert found["of devices only"] == "RuntimeError"
        assert found["again"] == found["without the world"] == found["beside it"] == [0, 1, 2]
    assert [found["exchanged"] for found in results] == [
        [[2, [0, 2, 4, 6, 8]]],
        [[2, list(range(10))]],
        [[1, []]],
    ]
    assert results[0]["subset"][0] == InvalidInputError.__name__
    assert [found["subset"] for found in results[1:]] == [[[0, [1, 2]]] * 2, [[1, [1, 2]]] * 2]


# --- Failing


def _fail() -> dict[str, Any]:
    rank = dist.get_rank()
    ranks = Ranks.join(timeout=LONG)
    found: dict[str, Any] = {}

    def attempt(name: str, failures: dict[int, BaseException], meanwhile: Callable[[], object] | None = None) -> None:
        def call() -> None:
            with ranks.together("writing layers"):
                if rank in failures:
                    raise failures[rank]
                if meanwhile is not None:
                    meanwhile()

        found[name] = raised(call)

    full = StorageFullError("no space left; free some")
    attempt("none", {})
    attempt("one", {1: full})
    attempt("the coordinator", {0: LayerNotFoundError("no layer 'a'")})
    attempt("not ours", {2: ValueError("odd")})
    attempt("some", {1: full, 2: ValueError("odd")})
    attempt("all", dict.fromkeys(range(3), full))
    attempt("lost elsewhere", {1: RankLostError("rank 9 of another store died")})
    attempt("interrupted", {1: KeyboardInterrupt()})
    attempt("exiting", {1: SystemExit(3)})
    attempt("while gathering", {1: full}, lambda: ranks.gather(1))
    attempt("while exchanging", {1: full}, lambda: ranks.exchange({}, {}))
    attempt("in an inner block", {}, lambda: _inside(ranks, KeyboardInterrupt() if rank == 1 else None))
    attempt("known already", {}, lambda: _inside(ranks, full if rank == 2 else None))
    found["apart"] = raised(lambda: ranks.gather(1) if rank == 2 else ranks.share(1))
    found["apart in blocks"] = raised(lambda: _inside(ranks, None) if rank == 0 else ranks.gather(1))
    # An error of before says nothing of this time.
    attempt("the same again", {1: full})
    found["after"] = ranks.gather(rank)
    found["interrupted midway"] = _interrupted(ranks)
    found["from then on"] = raised(lambda: ranks.gather(1))
    return found


def _inside(ranks: Ranks, failure: BaseException | None) -> None:
    with ranks.together("reading layers"):
        if failure is not None:
            raise failure
        ranks.gather(1)


def _interrupted(ranks: Ranks) -> list[str]:
    """Interrupt rank 1 after it was heard, before it hears the answer."""

    def call() -> None:
        with ranks.together("hashing"):
            if ranks.rank == 1:
                with ranks._joined() as wire:
                    wire.send(Word("hashing (gathering)", None, b"1").packed(), [0], 60)
                    raise KeyboardInterrupt
            ranks.gather(1)
            ranks.gather(2)

    return raised(call)


def test_what_fails_on_one_rank_fails_on_all() -> None:
    results = run_ranks(_fail, 3)
    assert [found["none"] for found in results] == [[], [], []]

    def of(name: str) -> tuple[str, str, list[str]]:
        """Return class and message, which all ranks must agree on, and what they are chained to."""
        kinds = {(found[name][0], found[name][1]) for found in results}
        assert len(kinds) == 1, (name, kinds)
        return *kinds.pop(), [found[name][2] for found in results]

    message = "rank 1, while writing layers: no space left; free some"
    assert of("one") == ("StorageFullError", message, ["NoneType", "StorageFullError", "NoneType"])
    assert of("the coordinator") == (
        "LayerNotFoundError",
        "rank 0, while writing layers: no layer 'a'",
        ["LayerNotFoundError", "NoneType", "NoneType"],
    )
    assert of("not ours") == (
        "UnavailableError",
        "rank 2, while writing layers: ValueError: odd",
        ["NoneType", "NoneType", "ValueError"],
    )
    also = f"{message} (rank 2 failed too)"
    assert of("some") == ("StorageFullError", also, ["NoneType", "StorageFullError", "ValueError"])
    assert of("all")[1].endswith("rank 0, while writing layers: no space left; free some (ranks 1 and 2 failed too)")
    assert of("lost elsewhere")[:2] == ("RankLostError", "rank 1, while writing layers: rank 9 of another store died")
    for name, error in (("interrupted", "KeyboardInterrupt"), ("exiting", "SystemExit")):
        assert [found[name][0] for found in results] == ["UnavailableError", error, "UnavailableError"]
        assert results[0][name][1].startswith(f"rank 1, while writing layers: {error}")
    assert of("while gathering") == of("while exchanging") == of("one") == of("the same again")
    inner = [found["in an inner block"][0] for found in results]
    assert inner == ["UnavailableError", "KeyboardInterrupt", "UnavailableError"]
    assert of("known already")[:2] == ("StorageFullError", "rank 2, while reading layers: no space left; free some")
    assert of("apart")[0] == of("apart in blocks")[0] == "RanksDisagreeError"
    assert "(ranks 0 and 1: sharing; rank 2: gathering)" in of("apart")[1]
    assert "(rank 0: reading layers (gathering); ranks 1 and 2: gathering)" in of("apart in blocks")[1]
    assert [found["after"] for found in results] == [[0, 1, 2]] * 3
    midway = [found["interrupted midway"] for found in results]
    assert [error for error, *_ in midway] == ["RankLostError", "KeyboardInterrupt", "RankLostError"]
    assert "rank 1 died" in midway[0][1]
    assert "while hashing (gathering)" in midway[0][1]
    assert [found["from then on"][0] for found in results] == ["RankLostError"] * 3


# --- Dying


def _lose(notes: str) -> None:
    """Lose one rank after another, each in another way, and note what those that are left see of it."""
    rank = dist.get_rank()
    groups = {size: dist.new_group(list(range(size))) for size in range(2, 7)}
    found: dict[str, Any] = {}

    def see(
        name: str, size: int, victim: int, call: Callable[[Ranks], object], dies: Callable[[Ranks], object]
    ) -> None:
        if rank >= size:
            return
        ranks = Ranks.join(groups[size], LONG)
        ranks.gather(1)
        if rank == victim:
            (Path(notes) / str(rank)).write_text(json.dumps(found))
            dies(ranks)
            die()
        began = time.monotonic()
        found[name] = [raised(lambda: call(ranks)), raised(lambda: ranks.share(1)), time.monotonic() - began]

    found["late"] = _come_late(groups[6])
    found["not there"] = raised(lambda: Ranks.join(groups[5], SHORT)) if rank < 4 else []
    dist.barrier()

    see("gather", 6, 5, lambda ranks: ranks.gather(1), lambda _: None)
    # Heard, and not there for the answer: the others go on to the end of the block.
    see("together", 5, 4, _inside_with_nothing, lambda ranks: _speak(ranks, "reading layers (gathering)"))
    see("share", 4, 3, lambda ranks: ranks.share_bytes(bytes(1 << 20)), lambda ranks: _hear(ranks, "sharing"))
    see("exchange", 3, 2, _exchange_much, lambda ranks: ranks._round("exchanging", b"[]"))
    see("coordinator", 2, 0, lambda ranks: ranks.share(1), lambda _: None)
    (Path(notes) / str(rank)).write_text(json.dumps(found))


def _inside_with_nothing(ranks: Ranks) -> None:
    _inside(ranks, None)


def _speak(ranks: Ranks, call: str) -> None:
    with ranks._joined() as wire:
        wire.send(Word(call, None, b"1").packed(), [0], 60)


def _hear(ranks: Ranks, call: str) -> None:
    with ranks._joined() as wire:
        ranks._attend(wire, Word(call, None, b""))


def _exchange_much(ranks: Ranks) -> None:
    much = np.zeros(MESSAGE_BYTES + 1, np.uint8)
    ranks.exchange({2: much, 1 - ranks.rank: much}, {2: len(much), 1 - ranks.rank: len(much)})


def _come_late(group: dist.ProcessGroup) -> list[Any]:
    """Let the last rank come when the others have given up."""
    ranks = Ranks.join(group, SHORT)
    if ranks.rank == 5:
        dist.barrier()
    found = [raised(lambda: ranks.gather(1)), raised(lambda: ranks.gather(1))]
    if ranks.rank != 5:
        dist.barrier()
    return found


def test_the_others_notice_when_a_rank_is_lost(tmp_path: Path) -> None:
    run_ranks(_lose, 6, tmp_path, dying=[0, 2, 3, 4, 5])
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(6)]

    # What the coordinator finds out by itself, it can tell the others only while it lives and has connections.
    late = [one["late"] for one in found]
    assert re.match(r"rank 5 did not answer within 3 s while gathering; start the training anew", late[0][0][1])
    assert all(re.match("rank 0 died .*, or gave up because another rank was lost", one[0][1]) for one in late[1:])
    assert {error for first, second in late for error in (first[0], second[0])} == {"RankLostError"}
    assert all("no longer connected, since: rank " in second[1] for _, second in late)

    for one in found[:4]:
        assert one["not there"][0] == "RankLostError"
        assert one["not there"][1].startswith("ranks 4 did not come within 3 s; every rank of the group must open")

    for name, survivors, message in (
        ("gather", 5, r"rank 5 died \(its connection is closed\) while gathering; start the training anew"),
        ("together", 4, r"rank 4 died \(its connection is closed\) while reading layers; start"),
        ("exchange", 2, r"rank [012] died .* while exchanging, or gave up because another rank was lost"),
    ):
        for one in found[:survivors]:
            (error, text, _), (then, also, _), seconds = one[name]
            assert (error, then) == ("RankLostError", "RankLostError"), name
            assert re.match(message, text), text
            assert re.match("the ranks of this store are no longer connected, since: rank ", also), also
            assert seconds < LONG.total_seconds() / 2, name
    assert any(re.match("rank 2 died", one["exchange"][0][1]) for one in found[:2])

    # Of a tree those that the dead rank was not to serve get what they wait for; the next call finds out.
    share = [one["share"] for one in found[:3]]
    assert {first[0] if first else "" for first, *_ in share} <= {"RankLostError", ""}
    assert any(first for first, *_ in share)
    assert [second[0] for _, second, _ in share] == ["RankLostError"] * 3

    (error, text, _), (then, *_), _ = found[1]["coordinator"]
    assert (error, then) == ("RankLostError", "RankLostError")
    assert re.match(r"rank 0 died .* while sharing, or gave up", text)


# --- The kit


def _raise_on_the_last(size: int) -> list[int]:
    rank = dist.get_rank()
    print(f"rank {rank} was here")  # noqa: T201 - what it says must be in the report
    if rank == size - 1:
        msg = "this one failed"
        raise ValueError(msg)
    dist.barrier()
    return [rank]


def test_a_failing_rank_fails_the_test_and_says_why() -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(_raise_on_the_last, 2, 2)
    report = str(caught.value)
    assert "--- rank 1 ended with status 1" in report
    assert "rank 1 was here" in report
    assert "ValueError: this one failed" in report
    assert "rank 0 was here" in report
