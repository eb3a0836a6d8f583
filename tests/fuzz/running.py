"""Runs targets within bounds of memory and time, and counts."""

import resource
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import HypothesisException

from tests.fuzz.targets import Target

HEADROOM_BYTES: Final = 3 << 30
"""Address space beyond what the process has when it begins. Of one gigabyte the store takes memory by a document's word
(``engine.light.proof``), and threads take more address space than memory."""
MOST_SECONDS: Final = 10.0
"""Processor time for one input. They take milliseconds; another process may have taken the rest of the machine."""


class TooSlowError(AssertionError):
    """An input took longer than any may."""


@dataclass
class Tally:
    """What became of one target's inputs."""

    target: str
    inputs: int = 0
    refused: int = 0
    """By an error that a caller is told to expect; the others meant something."""
    slowest_seconds: float = 0.0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)
    """Tracebacks, with the input."""


def limit_memory() -> None:
    """Let this process take no more than :data:`HEADROOM_BYTES` of address space beyond what it has."""
    with open("/proc/self/statm", encoding="ascii") as status:
        pages = int(status.read().split()[0])
    most = pages * resource.getpagesize() + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def run(name: str, target: Target, tally: Tally, *, inputs: int, start: int | None) -> None:
    """Give a target so many inputs, and add to the tally what came of them.

    Args:
        name: of the target.
        target: what to run.
        tally: counts so far.
        inputs: how many.
        start: where chance begins; ``None``: the same inputs at every run.
    """
    bounds = settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=start is None,
        # Shrinking would take longer than all the rest; what is found is printed as it is.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )

    @bounds
    @given(target.inputs)
    def check(value: Any) -> None:
        started = time.process_time()
        tally.inputs += 1
        try:
            target.check(value)
        except target.refusals:
            tally.refused += 1
        finally:
            took = time.process_time() - started
            tally.slowest_seconds = max(tally.slowest_seconds, took)
        if took > MOST_SECONDS:
            msg = f"{name}: one input took {took:.1f} s"
            raise TooSlowError(msg)

    if start is not None:
        check = seed(start)(check)
    began = time.monotonic()
    try:
        check()
    except HypothesisException:
        raise
    except Exception as error:  # noqa: BLE001 - whatever an input makes of the store is the finding
        notes = "\n".join(getattr(error, "__notes__", []))
        tally.findings.append(f"{name}: {''.join(traceback.format_exception(error))[-4000:]}\n{notes[-4000:]}")
    tally.seconds += time.monotonic() - began


def peak_bytes() -> int:
    """Return the most memory that this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
