"""Local roots when the disk says no: the same answers from every transport."""

import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tailorstore.domain.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    InvalidInputError,
    MissingObjectError,
    StorageFullError,
    StorageUnavailableError,
    TailorError,
)
from tailorstore.storage.local import LocalObjects
from tailorstore.storage.objects import open_objects

TRANSPORTS = [None, "obstore", "fsspec"]
NOBODY = 65534


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of one MiB, if this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(  # the program's place differs between systems
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)],  # noqa: S607
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        # Without the right to mount, a limit on files' sizes gives the same kind of answer.
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        yield folder
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)  # noqa: S607


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_full_disk_is_told_and_what_was_there_stays(small_disk: Path, transport: str | None) -> None:
    objects = open_objects(small_disk / "root", transport=transport)
    objects.put("a/kept", b"k" * 1000)
    with pytest.raises(StorageFullError, match=r"no space left while writing a/c\.0.*tailorstore gc"):
        objects.put("a/c.0", bytes(3 << 20))
    assert bytes(objects.get("a/kept")) == b"k" * 1000
    if transport is None:
        # Nothing of it takes up the space that is wanted.
        assert [info.key for info in objects.list()] == ["a/kept"]
        objects.put("a/small", b"s" * 1000)


def test_a_size_limit_counts_as_a_full_disk(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import resource, sys
        from tailorstore.domain.errors import StorageFullError
        from tailorstore.storage.objects import open_objects
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for transport in (None, "fsspec"):
            objects = open_objects(sys.argv[1], transport=transport)
            try:
                objects.put(f"a/{transport}", bytes(200_000))
            except StorageFullError as error:
                print(error)
        """
    )
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout.count("no space left") == 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_directories_of_others_are_not_written_to(transport: str | None) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        root = Path(folder) / "root"
        writer = LocalObjects(str(root))
        writer.put("a/b", b"x")
        for path in (Path(folder), root, root / "a"):
            path.chmod(0o555)
        (root / "a/b").chmod(0o000)
        root_user = os.geteuid() == 0
        if root_user:
            # Nothing is forbidden to root.
            os.seteuid(NOBODY)
        try:
            objects = open_objects(root, transport=transport)
            for call in (
                lambda: objects.put("a/c", b"x"),
                lambda: objects.put("d/e/f", b"x"),
                lambda: objects.get("a/b"),
                lambda: objects.replace("a/b", b"y"),
            ):
                with pytest.raises(AccessDeniedError, match="access denied while"):
                    call()
            assert [failure.key for failure in objects.delete(["a/b", "a/never"])] == ["a/b"]
        finally:
            if root_user:
                os.seteuid(0)
            for path in (Path(folder), root, root / "a"):
                path.chmod(0o755)
            (root / "a/b").chmod(0o644)
        assert bytes(writer.get("a/b")) == b"x"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_root_that_is_a_file_is_refused(tmp_path: Path, transport: str | None) -> None:
    (tmp_path / "root").write_text("a file")
    with pytest.raises((InvalidInputError, AlreadyExistsError)):
        open_objects(tmp_path / "root", transport=transport).put("a/b", b"x")
    assert (tmp_path / "root").read_text() == "a file"


def test_listing_a_root_that_is_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    with pytest.raises(InvalidInputError, match=r"the root file://.*/root is a file, and must be a folder"):
        list(LocalObjects(str(tmp_path / "root")).list("commits/"))


def test_a_key_is_written_once(tmp_path: Path) -> None:
    objects = LocalObjects(str(tmp_path))
    objects.put("a/b", b"first")
    with pytest.raises(AlreadyExistsError, match="a/b exists already"):
        objects.put("a/b", b"second")
    assert bytes(objects.get("a/b")) == b"first"


def test_names_too_long_for_the_disk_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="too long"):
        LocalObjects(str(tmp_path)).put("a/" + "n" * 300, b"x")


def test_an_observer_that_fails_leaves_no_object(tmp_path: Path) -> None:
    def refuse(block: memoryview) -> None:
        raise ZeroDivisionError

    objects = LocalObjects(str(tmp_path / "root"))
    with pytest.raises(ZeroDivisionError):
        objects.put("a/b", b"x", refuse)
    assert list(objects.list()) == []


def test_replacing_fails_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = LocalObjects(str(tmp_path))
    objects.put("tailorstore.json", b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageFullError):
        objects.replace("tailorstore.json", b"new")
    assert bytes(objects.get("tailorstore.json")) == b"old"
    assert [info.key for info in objects.list()] == ["tailorstore.json"]


def test_a_directory_that_a_delete_takes_away_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = LocalObjects(str(tmp_path))
    real = os.mkdir
    pruned: list[str] = []

    def mkdir(path: str, mode: int = 0o777) -> None:
        if path.endswith("/v") and not pruned:
            # Just then another process deletes the last object of the layer, and its directory with it.
            pruned.append(path)
            os.rmdir(os.path.dirname(path))
        real(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert objects.put("layers/a/v/c.0", b"x") == 1
    assert pruned
    assert bytes(objects.get("layers/a/v/c.0")) == b"x"


def test_deleting_takes_empty_directories_along_but_never_the_root(tmp_path: Path) -> None:
    objects = LocalObjects(str(tmp_path / "root"))
    objects.put("layers/a/v/w/c.0", b"x")
    objects.put("layers/b/zarr.json", b"x")
    assert objects.delete(["layers/a/v/w/c.0"]) == []
    assert sorted(path.name for path in (tmp_path / "root/layers").iterdir()) == ["b"]
    assert objects.delete(["layers/b/zarr.json"]) == []
    assert list((tmp_path / "root").iterdir()) == []


def test_deleting_takes_no_directories_behind_a_link_along(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/a").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/layers").symlink_to(tmp_path / "elsewhere")
    assert len(LocalObjects(str(tmp_path / "root")).delete(["layers/a/zarr.json"])) == 1
    assert (tmp_path / "elsewhere/a").is_dir()


def test_sockets_pipes_and_links_to_directories_are_no_objects(tmp_path: Path) -> None:
    objects = LocalObjects(str(tmp_path))
    objects.put("a/b", b"x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [info.key for info in objects.list()] == ["a/b"]
    assert not objects.exists("pipe")
    assert objects.exists("a/b")


def test_what_stands_in_the_place_of_an_object_is_told(tmp_path: Path) -> None:
    objects = LocalObjects(str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"bytes")
    (tmp_path / "a" / "link").symlink_to("file")
    (tmp_path / "b").symlink_to("a")
    os.mkfifo(tmp_path / "a" / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "a" / "socket"))
    for key, what in {
        "a/link": "is a link, which is not followed;",
        "b/file": "lies behind a link, which is not followed;",
        "a/pipe": "is a pipe or device, not a plain file;",
        "a/socket": "is a pipe or device, not a plain file;",
        "a": "is a folder, not a plain file;",
        "a/file/below": "lies below a file;",
        "a/none": "is missing in ",
        "none/at/all": "is missing in ",
    }.items():
        for read in (objects.get, lambda key: objects.read_into(key, memoryview(bytearray(5)))):
            with pytest.raises(MissingObjectError, match=f"object {key} .*{what}"):
                read(key)


def test_opening_makes_nothing(tmp_path: Path) -> None:
    for transport in TRANSPORTS:
        objects = open_objects(tmp_path / "new" / "root", transport=transport)
        assert not objects.exists("tailorstore.json")
        assert list(objects.list()) == []
        with pytest.raises(TailorError):
            objects.get("tailorstore.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_flush_that_failed_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str | None
) -> None:
    objects = open_objects(tmp_path / "root", transport=transport)
    objects.put("a", b"x")
    real, failed = os.fsync, list[int]()

    def fail_once(descriptor: int) -> None:
        # As the kernel does: it tells once that bytes were lost, and the next flush goes well without them.
        if not failed:
            failed.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(StorageUnavailableError):
        objects.confirm({"a": 1})


def test_confirming_flushes_files_then_directories_up_to_the_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = LocalObjects(str(tmp_path / "new" / "root"))
    objects.put("layers/a/v/c.0", b"x")
    flushed: list[tuple[bool, int]] = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        status = os.fstat(descriptor)
        flushed.append((stat.S_ISDIR(status.st_mode), status.st_ino))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    objects.confirm({"layers/a/v/c.0": 1})
    root = tmp_path / "new" / "root"
    mount_point = next(folder for folder in root.parents if folder.is_mount())
    above = [folder for folder in root.parents if folder.is_relative_to(mount_point)]
    directories = [root / "layers/a/v", root / "layers/a", root / "layers", root, *above]
    assert flushed[0] == (False, (root / "layers/a/v/c.0").stat().st_ino)
    assert {inode for is_directory, inode in flushed[1:] if is_directory} == {
        path.stat().st_ino for path in directories
    }
    assert len(flushed) == 1 + len(directories)
