"""What a disk may hold after its power was cut: whatever was flushed, and of the rest anything.

:class:`Disk` is told what a process did to files, in order, and knows what of it is durable: a file's content up to
its last flush, and of a folder the entries that it had at its own last flush. After the cut a file that was not flushed
has its old content, its new one, a part of it, or zeros of its length; an entry that was not flushed points to whatever
it pointed to since, or to nothing; what was unlinked may be back. That is more than file systems lose, and all that
POSIX lets them lose.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Happening = tuple[str, Any, Any]
"""What happened, and to what: ``("write", path, bytes)``, ``("rename", path, path)``, …"""


@dataclass(slots=True)
class File:
    """A file's content, whatever its names."""

    durable: bytes = b""
    now: bytes = b""

    def flush(self) -> None:
        self.durable = self.now

    def after_cut(self, dice: random.Random | None) -> bytes:
        """Return what may be left; without ``dice`` nothing but what is sure to be."""
        if dice is None or self.now == self.durable:
            return self.durable
        part = dice.randrange(len(self.now) + 1)
        return dice.choice(
            [
                self.durable,
                self.now,
                self.now[:part],
                bytes(len(self.now)),
                self.now[:part] + bytes(len(self.now) - part),
            ]
        )


@dataclass(slots=True)
class Folder:
    """A folder's entries."""

    now: "dict[str, File | Folder]" = field(default_factory=dict)
    since: "dict[str, list[File | Folder | None]]" = field(default_factory=dict)
    """What each entry pointed to that changed since the last flush; first what it points to durably."""

    def point(self, name: str, to: "File | Folder | None") -> None:
        """Make an entry, or remove it."""
        self.since.setdefault(name, [self.now.get(name)]).append(to)
        if to is None:
            del self.now[name]
        else:
            self.now[name] = to

    def flush(self) -> None:
        self.since.clear()

    def write(self, path: Path, dice: random.Random | None) -> None:
        """Make a folder as it may be after a cut; without ``dice`` everything that is not sure to be left is lost."""
        path.mkdir()
        for name in sorted(self.now.keys() | self.since.keys()):
            pointed_to = self.since.get(name, [self.now.get(name)])
            found = pointed_to[0] if dice is None else dice.choice(pointed_to)
            if isinstance(found, Folder):
                found.write(path / name, dice)
            elif found is not None:
                (path / name).write_bytes(found.after_cut(dice))


class Disk:
    """A folder, durable itself, and all that a process did below it."""

    def __init__(self, top: str) -> None:
        self._top = top
        self.root = Folder()

    def apply(self, happening: Happening) -> None:
        """Do what the process did."""
        what, path, more = happening
        if what == "fsync":
            self._find(path).flush()
            return
        folder, name = self._place(path)
        match what:
            case "mkdir":
                folder.point(name, Folder())
            case "create":
                folder.point(name, File())
            case "write":
                file = folder.now[name]
                assert isinstance(file, File)
                file.now += more
            case "unlink" | "rmdir":
                folder.point(name, None)
            case "link" | "rename":
                target, new_name = self._place(more)
                target.point(new_name, folder.now[name])
                if what == "rename":
                    folder.point(name, None)
            case "database":
                self._put_database(folder, name, more)
            case _:
                raise ValueError(what)

    @staticmethod
    def _put_database(folder: Folder, name: str, content: dict[str, bytes]) -> None:
        """Note the files of a database that has just committed: SQLite has flushed them, and their entries."""
        for suffix in ("", "-wal"):
            folder.since.pop(name + suffix, None)
            folder.now.pop(name + suffix, None)
            if suffix in content:
                folder.now[name + suffix] = File(content[suffix], content[suffix])

    def _find(self, path: str) -> File | Folder:
        found: File | Folder = self.root
        for part in path.removeprefix(self._top).strip("/").split("/"):
            if part:
                assert isinstance(found, Folder)
                found = found.now[part]
        return found

    def _place(self, path: str) -> tuple[Folder, str]:
        folder, _, name = path.rpartition("/")
        found = self._find(folder)
        assert isinstance(found, Folder)
        return found, name
