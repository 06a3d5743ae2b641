"""A remote that is a folder, also one that many machines share."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from softcache.errors import StoreError
from softcache.remote import Item
from softcache.store import TEMPORARY, Disk, Store

_MOST_REPLACED = 1 << 20


class _Shared(Store):
    """A store that several may write the same name of at once: each has its own temporary file, no lock is needed."""

    def temporary(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMPORARY}")


class Folder:
    """See :class:`softcache.remote.Remote`. Links in it are not followed. ``root``: where it lies."""

    public = False
    card = False

    def __init__(self, root: Path, disk: Disk | None = None):
        self.where, self.address = str(root), str(root.absolute())
        self.root, self._store = root, _Shared(root, disk)

    def get(self, name: str, limit: int) -> bytes | None:
        return self._store.get(name, limit) if os.path.lexists(self._store.path(name)) else None

    def put(self, name: str, data: bytes) -> None:
        self._store.put(name, data)

    def replace(self, name: str, data: bytes, old: bytes | None) -> bool:
        if self.get(name, _MOST_REPLACED) != old:
            return False
        self.put(name, data)
        return True

    def list(self, prefix: str) -> Iterator[Item]:
        top = self._store.root / prefix
        for folder, _, files in os.walk(top, onerror=_refuse):
            for file in files:
                path = Path(folder, file)
                with contextlib.suppress(FileNotFoundError):  # somebody's temporary file
                    status = path.lstat()
                    name = path.relative_to(self._store.root).as_posix()
                    yield Item(name, status.st_size, time.time() - status.st_mtime)

    def delete(self, name: str) -> None:
        path = self._store.path(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            raise StoreError(f"cannot delete {path}: {e.strerror}") from e


def _refuse(e: OSError) -> None:
    if not isinstance(e, FileNotFoundError):  # what was never put is an empty folder
        raise StoreError(
            f"cannot list {e.filename}: {e.strerror}; mend it and run the same command again"
        ) from e
