"""What time it is where the objects lie: ages are told by that clock, which may be hours off from this machine's."""

from datetime import UTC, datetime
from secrets import token_hex

from tailorstore.domain.errors import AccessDeniedError, StorageFullError
from tailorstore.domain.names import ROOT_DOCUMENT
from tailorstore.storage.transport import ObjectInfo, Objects


class StorageClock:
    """Tells the storage's time, as of the beginning of a listing, from an object that is put just before it."""

    def __init__(self, objects: Objects, *, ask: bool) -> None:
        """Put a probe.

        Args:
            objects: the root.
            ask: whether to; where nothing may be written this machine's clock has to do.

        Raises:
            StorageUnavailableError: the root cannot be reached.
        """
        self._objects = objects
        self._probe: str | None = None
        self._newest: datetime | None = None
        self._told = None if ask else datetime.now(UTC)
        if ask:
            # Named like what a dying process leaves beside `tailorstore.json`: GC sweeps it, should this one die.
            key = f"{ROOT_DOCUMENT}.{token_hex(8)}.new"
            try:
                objects.put(key, b"")
            except (StorageFullError, AccessDeniedError):
                return  # whoever cannot write may delete, and make room
            self._probe = key

    def see(self, info: ObjectInfo) -> bool:
        """Look at a listed object; returns whether it is the probe."""
        if info.key == self._probe:
            self._told = info.modified
            return True
        if info.modified is not None and (self._newest is None or info.modified > self._newest):
            self._newest = info.modified
        return False

    def put_away(self) -> None:
        """Delete the probe, as far as possible."""
        if self._probe is not None:
            self._objects.delete([self._probe])

    def now(self) -> datetime | None:
        """Return the storage's time, or a time that it has passed; ``None`` where it tells none.

        Where the listing does not show the probe, it is at least as late as the newest object that it does show: so
        nothing is ever taken for older than it is.
        """
        return self._told or self._newest
