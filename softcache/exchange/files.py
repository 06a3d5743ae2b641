"""Files that are written whole or not at all, and rows laid aside on the disk while they are put in order."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from softcache import manifest as m
from softcache.cache import Cache
from softcache.documents import read_manifest
from softcache.errors import MismatchError, NotBuilt, NotPulled, SpecError, StoreError
from softcache.several import Combined
from softcache.store import TEMPORARY, Disk, Store, require_apart


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yields where to write the new file that will be ``path`` when all went well: fsync, then rename.

    Raises :class:`SpecError` where there is something of that name, :class:`StoreError` for what the disk refuses.
    """
    if os.path.lexists(path):
        raise SpecError(f"{path} is there already: name another file, or delete it")
    temporary, disk = path.with_name(path.name + TEMPORARY), Disk()
    temporary.unlink(missing_ok=True)  # of a process that was killed
    try:
        yield temporary
        fd = os.open(temporary, os.O_RDONLY)
        try:
            disk.sync_file(fd, temporary)
        finally:
            os.close(fd)
        disk.rename(temporary, path)
        disk.sync_folder(path.parent)
    except OSError as e:
        raise StoreError(f"cannot write {path}: {e.strerror or e}; nothing is left of it") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def require_exportable(cache: Cache, out: Path) -> None:
    """Refuse what is no single finished cache that is here as a whole, and to write into or around it."""
    if isinstance(cache, Combined):
        raise SpecError(f"{cache.path} are several caches: export each by itself")
    if cache.tars:
        raise SpecError(
            f"{cache.path} is an export itself: softcache import it first, and export the cache that this makes"
        )
    if not cache.complete:
        raise NotBuilt(
            f"{cache.path} is not finished: run the same build-cache command again, then export it"
        )
    if cache.pulled:
        raise NotPulled(
            f"{cache.path} holds some of a cache, as it was pulled, and an export is of all of it: "
            f"{cache.pulled.command(cache.path)} fetches the rest"
        )
    require_apart(cache.path, out)


def holds(store: Store, raw: bytes, digest: str) -> bool:
    """Is there a finished cache, the one of this manifest? :class:`MismatchError` where it is another one, if only in the
    licences that were stated."""
    if not store.exists(m.MANIFEST):
        return False
    if store.get(m.MANIFEST, m.MAX_JSON) != raw:
        raise MismatchError(
            f"{store.root} holds another cache, {read_manifest(store).digest}, and this is {digest}: name an empty or a new "
            "folder"
        )
    return True


class Patient(io.FileIO):
    """A new file for a library that does not survive a disk's refusal (libhdf5 crashes): it is told that all went well, and
    :meth:`check` says that it did not."""

    def __init__(self, path: Path):
        super().__init__(path, "x+")
        self._refused: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data)
        try:
            while left and self._refused is None:
                left = left[super().write(left) :]
        except OSError as e:
            self._refused = e
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as e:
            self._refused = e
            return size or 0

    def check(self) -> None:
        """Raises what the disk said."""
        if self._refused is not None:
            raise self._refused


def aside(folder: Path, dtype: np.dtype | str, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file without a name in ``folder``, which is gone with it. :class:`StoreError` on a full disk."""
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a mapped file that finds no room kills the process
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(f"cannot write in {folder}: {e.strerror}") from e
            raise StoreError(
                f"the disk is full: {folder} needs {size:,} bytes besides the cache's own, for the time of the import"
            ) from e
        return np.memmap(file, dtype, "r+", shape=shape)
