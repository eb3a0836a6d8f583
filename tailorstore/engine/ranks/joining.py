"""Which ranks use a store together, and whether they see the same root."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tailorstore.domain.errors import AccessDeniedError, InvalidInputError, RanksDisagreeError
from tailorstore.domain.names import new_id, version_prefix
from tailorstore.domain.records import EXTRA_LAYER
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.words import listed
from tailorstore.storage.transport import Objects

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other: longer than any of them writes between two collectives."""


@dataclass(frozen=True, slots=True)
class RanksSetting:
    """Which ranks commit and restore together."""

    group: Any = "world"
    """``"world"``, ``"alone"``, or a process group."""
    timeout: timedelta = DEFAULT_TIMEOUT

    def is_joint(self) -> bool:
        """Whether there are other ranks now."""
        if self.group == "alone":
            return False
        return self.group != "world" or world_size() > 1

    def is_follower(self) -> bool:
        """Whether another rank talks to the catalog."""
        return self.is_joint() and dist.get_rank(None if self.group == "world" else self.group) > 0

    def of_child(self) -> "RanksSetting":
        """Return the setting for a forked child, which is no rank."""
        return RanksSetting("alone", self.timeout)


def world_size() -> int:
    """Return how many processes torch.distributed was initialised with; 1 if it was not."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _is_group(value: object) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def check_setting(group: object, timeout: object) -> RanksSetting:
    """Return the setting that ``open_store`` was given.

    Raises:
        InvalidInputError: it is none.
    """
    if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
        msg = f"ranks_timeout must be a timedelta above 0, not {timeout!r}"
        raise InvalidInputError(msg)
    if not (group in ("world", "alone") if isinstance(group, str) else _is_group(group)):
        msg = f"ranks must be 'world', 'alone' or a process group of torch.distributed, not {group!r}"
        raise InvalidInputError(msg)
    return RanksSetting(group, timeout)


def join(setting: RanksSetting, objects: Objects) -> Ranks:
    """Join the ranks that use a store together, and make sure that its root is the same place for all.

    Raises:
        RanksDisagreeError: it is not; nothing was written.
        RankLostError: a rank did not come in time.
    """
    ranks = Ranks.join(None if setting.group == "world" else setting.group, setting.timeout)
    try:
        _check_root(ranks, objects)
    except BaseException:
        ranks.close()
        raise
    return ranks


def _check_root(ranks: Ranks, objects: Objects) -> None:
    """Let the coordinator put something down, and all others look for it: equal names may be different disks."""
    urls = ranks.gather(objects.url)
    if len(set(urls)) > 1:
        shown = "; ".join(f"{url} on rank {urls.index(url)}" for url in dict.fromkeys(urls))
        msg = f"the ranks opened different stores: {shown}. Open the same one on every rank; nothing was written"
        raise RanksDisagreeError(msg)
    key: str | None = None
    with ranks.together("writing to the root"):
        if ranks.is_coordinator:
            key = _leave_word(objects)
    key = ranks.share(key)
    if key is None:
        return
    try:
        found = False
        with ranks.together("reading from the root"):
            found = objects.exists(key)
        without = [rank for rank, sees in enumerate(ranks.gather(found)) if not sees]
    finally:
        if ranks.is_coordinator:
            objects.delete([key])
    if without:
        msg = (
            f"{objects.url} is not the same place for all ranks: what rank 0 wrote there, rank {listed(without)} cannot"
            " see. Use a bucket or a shared file system, or give each host's ranks a store of their own with"
            " ranks=GROUP; nothing was written"
        )
        raise RanksDisagreeError(msg)


def _leave_word(objects: Objects) -> str | None:
    """Put an object down, and return its key; ``None`` where the root can only be read: then nothing can be lost."""
    # GC takes it for what a crashed commit left, should this process die before it is deleted.
    key = version_prefix(EXTRA_LAYER, new_id()) + "probe"
    try:
        objects.put(key, b"Is this the same place for all ranks?")
    except AccessDeniedError:
        return None
    return key
