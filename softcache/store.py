"""Bytes put safely in a folder.

A file is written once, whole, by one writer: temporary file → fsync → rename → fsync of the folder. After
:meth:`Store.put` returns, the file survives a crash of the process and of the machine. The temporary name is a
function of the final one: writers of the same file exclude each other by :meth:`Store.claim`, and what a killed
writer left behind is overwritten by the next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from softcache.errors import DamageError, SpecError, StoreError

TEMPORARY = ".tmp"
CLAIMS = ".claims"
ANCHORS = ".anchors"
HIDDEN = (CLAIMS, ANCHORS)  # of builders at work
_PIECE = 1 << 20

Data = bytes | memoryview | Iterable[bytes | memoryview]


class Disk:
    """The operations of a disk that matter to safety; :mod:`softcache.testing` makes them fail one by one."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def write_file(self, path: Path, data: Data) -> None:
        """Write a new file whole and make its content durable; what had its name is unlinked, not written into."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            whole = isinstance(data, bytes | memoryview)
            for part in cast(Iterable[bytes], [data] if whole else data):
                self.write(fd, path, part)
            self.sync_file(fd, path)
        finally:
            os.close(fd)

    def write(self, fd: int, path: Path, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def sync_file(self, fd: int, path: Path) -> None:
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Store:
    """A folder of files named by POSIX paths relative to ``root``."""

    def __init__(self, root: str | Path, disk: Disk | None = None):
        self.root = Path(root)
        self.disk = disk or Disk()
        self._durable: set[Path] = set()

    def path(self, name: str) -> Path:
        """Where ``name`` lies. Raises :class:`DamageError` on a name that leaves the root, itself or by a link."""
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise DamageError(f"{name!r} is not a name inside {self.root}")
        folder = self.root
        for part in parts[:-1]:
            folder = folder / part
            if folder.is_symlink():
                raise DamageError(f"{folder} is a link: a cache holds none")
        return folder / parts[-1]

    def put(self, name: str, data: Data) -> None:
        """Write ``name`` whole and durably, or raise :class:`StoreError` and leave what was there.

        ``data`` may come in parts; what is raised while they are made leaves what was there, too.
        """
        path = self.path(name)
        temporary = self.temporary(path)
        try:
            self.make_folders(path.parent)
            self.disk.write_file(temporary, data)
            self.disk.rename(temporary, path)
            self.disk.sync_folder(path.parent)
        except BaseException as e:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if not isinstance(e, OSError):
                raise
            raise _explain(e, path, len(data) if isinstance(data, bytes | memoryview) else 0) from e

    def delete(self, name: str) -> None:
        """Take a file away, durably; nothing where it is not there."""
        path = self.path(name)
        try:
            path.unlink(missing_ok=True)
            self.disk.sync_folder(path.parent)
        except OSError as e:
            raise _explain(e, path, 0) from e

    def temporary(self, path: Path) -> Path:
        """Where the bytes of ``path`` are until they are whole."""
        return path.with_name(path.name + TEMPORARY)

    def make_folders(self, path: Path) -> None:
        """Make ``path`` and its missing parents, each durable before anything is put into it.

        One that is there is made durable too, once: who made it may have been killed before doing so.
        """
        inside = path == self.root or self.root in path.parents
        if path in self._durable or (not inside and path.is_dir()):
            return
        if path != path.parent:
            self.make_folders(path.parent)
        made = not path.is_dir()
        with contextlib.suppress(FileExistsError):
            self.disk.make_folder(path)
        with contextlib.suppress(*[] if made else [PermissionError]):  # the parent may be somebody else's
            self.disk.sync_folder(path.parent)
        self._durable.add(path)

    def get(self, name: str, limit: int | None = None) -> bytes:
        """The whole file. :class:`DamageError` when it is absent, a link, or longer than ``limit`` bytes."""
        path = self.path(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DamageError(f"{path} is missing") from None
        except OSError as e:
            raise DamageError(f"{path} cannot be opened: {e.strerror}") from e
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise DamageError(f"{path} is no file")
            if limit is not None and status.st_size > limit:
                raise DamageError(
                    f"{path} has {status.st_size:,} bytes; at most {limit:,} are read from such a file"
                )
            with os.fdopen(fd, "rb", closefd=False) as file:
                return file.read()
        except OSError as e:
            raise DamageError(f"{path} cannot be read: {e.strerror}") from e
        finally:
            os.close(fd)

    def digest(self, name: str) -> str:
        """The file's sha256, read in pieces. Raises :class:`DamageError` as :meth:`get` does."""
        try:
            with self.stream(name) as file:
                return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
        except OSError as e:
            raise DamageError(f"{self.path(name)} cannot be read: {e.strerror}") from e

    def stream(self, name: str) -> BinaryIO:
        """The file, opened to be read. :class:`DamageError` when it is absent or a link."""
        path = self.path(name)
        try:
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
        except OSError as e:
            raise DamageError(f"{path} cannot be read: {e.strerror}") from e

    def size(self, name: str) -> int | None:
        """Bytes of the file, or None where there is no regular file."""
        path = self.path(name)
        return path.stat().st_size if path.is_file() and not path.is_symlink() else None

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def names(self) -> list[str]:
        """Every file below the root, sorted, but those of running builders (claims, bases, temporary files)."""
        found = []
        for folder, folders, files in os.walk(self.root):
            here = Path(folder).relative_to(self.root)
            if not here.parts or here.parts[0] not in HIDDEN:
                links = [f for f in folders if Path(folder, f).is_symlink()]  # walk does not go into them
                found += [(here / f).as_posix() for f in files + links if not f.endswith(TEMPORARY)]
        return sorted(found)

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold ``name`` against other processes: yields False when another holds it. Freed when the holder dies."""
        path = self._claims() / name
        try:
            self.make_folders(self.root)  # durably: the cache will lie in it
            fd = _lock(path)
        except OSError as e:
            raise _explain(e, path, 0) from e
        try:
            yield fd is not None
        finally:
            if fd is not None:
                os.close(fd)

    def drop_claims(self) -> None:
        """Remove the claim files that nobody holds, once nothing is left to claim."""
        folder = self._claims()
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                fd = _lock(path)
                if fd is not None:
                    path.unlink()
                    os.close(fd)
            folder.rmdir()

    def _claims(self) -> Path:
        folder = self.root / CLAIMS
        if folder.is_symlink():
            raise DamageError(f"{folder} is a link: a cache holds none")
        return folder


class Opened(Store):
    """Files that a function opens for reading, by name: of an object store, or of a server. Nothing is put there."""

    def __init__(self, opener: Callable[[str], BinaryIO]):
        super().__init__("")
        self._opener = opener

    def stream(self, name: str) -> BinaryIO:
        try:
            return self._opener(name)
        except FileNotFoundError:
            raise DamageError(f"{name} is missing") from None
        except Exception as e:  # of whatever library that is
            raise StoreError(f"{name} cannot be opened: {type(e).__name__}: {e}") from e

    def get(self, name: str, limit: int | None = None) -> bytes:
        data = bytearray()
        with self.stream(name) as file:
            while part := file.read(_PIECE):
                data += part
                if limit is not None and len(data) > limit:
                    raise DamageError(
                        f"{name} has more than the {limit:,} bytes that are read from such a file"
                    )
        return bytes(data)

    def exists(self, name: str) -> bool:
        try:
            self.stream(name).close()
        except DamageError:
            return False
        return True


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of the file at ``path``, or None when another process does."""
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except FileNotFoundError:
            continue  # its folder was dropped this moment
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(fd).st_ino:
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass
        os.close(fd)  # the file was dropped while we locked it: what has its name now is another


def _explain(e: OSError, path: Path, size: int) -> StoreError:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"{size:,}" if size else "more"
        return StoreError(
            f"the disk is full: {path} needs {what} bytes. Free some space and run the same command again; "
            "what was committed is kept"
        )
    return StoreError(
        f"cannot write {path}: {e.strerror or e}. Mend it and run the same command again; what was committed is kept"
    )


def require_apart(cache: Path, out: Path) -> None:
    """:class:`SpecError` where what is written to ``out`` would lie in the folder of a cache, or around it."""
    folder, there = cache.resolve(), out.resolve()
    if there == folder or folder in there.parents:
        raise SpecError(f"{out} lies in the cache {cache}, which holds its own files only: write beside it")
    if there in folder.parents:
        raise SpecError(
            f"the cache {cache} lies in {out}, which is to hold its own files only: write beside it"
        )
