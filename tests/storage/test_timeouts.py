"""Deadlines of puts: short enough to find a silent server, long enough for a slow link."""

import time

import pytest

from tailorstore.domain.errors import InvalidInputError
from tailorstore.storage.timeouts import SILENCE_SECONDS, PutDeadlines, configured_attempts

MIB = 1 << 20


def test_an_object_of_32_mib_passes_a_slow_link_and_a_silent_server_is_asked_again_within_a_minute() -> None:
    given: list[float] = []
    PutDeadlines().run(32 * MIB, given.append)
    assert 32 * MIB / 1e6 < given[0] < 60
    deadlines = PutDeadlines()
    deadlines._slow = True
    deadlines.run(32 * MIB, given.append)
    # 0.25 MB/s
    assert given[1] > 32 * MIB / 0.25e6


def test_objects_of_like_sizes_share_a_deadline() -> None:
    given: list[float] = []
    for size in (0, 1, 1000, 256 << 10, (256 << 10) + 1, 4 * MIB, 5 * MIB, 32 * MIB, 32 * MIB + 1, 64 * MIB):
        PutDeadlines().run(size, given.append)
    assert [given.index(one) for one in given] == [0, 0, 0, 0, 4, 4, 6, 6, 8, 8]
    assert given == sorted(given)
    assert given[0] < SILENCE_SECONDS + 1


class MissedError(Exception):
    """A deadline that was missed."""


def miss(seconds: float) -> None:
    time.sleep(seconds + 0.01)
    raise MissedError


def test_a_put_that_missed_its_deadline_gets_a_longer_one_and_the_link_counts_as_slow() -> None:
    deadlines = PutDeadlines(silence_seconds=-0.2)
    given: list[float] = []

    def slowly(seconds: float) -> str:
        given.append(seconds)
        if len(given) == 1:
            miss(seconds)
        time.sleep(0.1)
        return "stored"

    assert deadlines.run(1, slowly) == "stored"
    assert deadlines.run(1, slowly) == "stored"
    assert given[0] < given[1] == given[2]


def test_a_put_that_hung_once_does_not_make_the_link_slow() -> None:
    deadlines = PutDeadlines(silence_seconds=-0.2)
    given: list[float] = []

    def attempt(seconds: float) -> None:
        given.append(seconds)
        if len(given) == 1:
            miss(seconds)

    deadlines.run(1, attempt)
    deadlines.run(1, attempt)
    assert given == [given[0], given[1], given[0]]


def test_what_fails_before_its_deadline_is_left_to_the_caller() -> None:
    given: list[float] = []

    def refuse(seconds: float) -> None:
        given.append(seconds)
        raise MissedError

    with pytest.raises(MissedError):
        PutDeadlines().run(1, refuse)
    assert len(given) == 1


def test_attempts_are_read_in_botocores_words() -> None:
    assert configured_attempts({}) is None
    assert configured_attempts({"retries": {"mode": "standard"}}) is None
    assert configured_attempts({"retries": {"total_max_attempts": 2}}) == 2
    assert configured_attempts({"retries": {"max_attempts": 2}}) == 3
    with pytest.raises(InvalidInputError, match="retries"):
        configured_attempts({"retries": {"often": 2}})
