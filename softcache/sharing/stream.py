"""A cache read straight from a remote: shards come when they are first touched, into a folder of bounded size."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from softcache import blobs
from softcache import manifest as m
from softcache.block import Block
from softcache.cache import Cache
from softcache.errors import DamageError, SpecError, StoreError
from softcache.inventory import File
from softcache.pulled import Pulled
from softcache.reader import Files
from softcache.remote import Remote, connect
from softcache.sharing.pull import pull
from softcache.zarrfile import Array


def stream(remote: str | Path | Remote, tag: str, local: str | Path, *, keep: int) -> Cache:
    """Open a cache where it lies. A shard is fetched when a row of it is first read, verified, and kept in ``local``.

    Once more than ``keep`` bytes of shards are there, those that were fetched first are deleted. An epoch reads one view in
    random order, so this is made for a ``keep`` that holds the targets one reads in one view (a warning tells how much
    that is, where it does not): then every shard is fetched once an epoch at most. With less, shards come again and again;
    pull the cache, or a part of it, instead. Small fields of the view that is read are in memory, too.

    What an earlier stream left in ``local`` is used again. What was pulled there stays, and does not count. One process
    streams into a folder, and its cache is not to be read after a fork: workers of a ``DataLoader`` need their own.

    Args:
        remote, tag: as for :func:`softcache.pull`. local: the folder. keep: bytes of shards.

    Raises:
        SpecError, MismatchError, DamageError, StoreError: as :func:`softcache.pull`; reading a row raises them as well.
    """
    if keep < 1:
        raise SpecError(f"keep={keep}: how many bytes of shards may lie in {local}, such as 20_000_000_000")
    remote = connect(remote) if isinstance(remote, str | Path) else remote
    cache = pull(remote, tag, local, targets=(), progress=False)
    if cache.pulled is not None:
        shards = _Streamed(cache, cache.pulled, remote, keep)
        cache.reader.shards, cache.pulled = shards, None  # all rows can be had
        if (largest := shards.largest_view()) > keep:
            logging.getLogger(__name__).warning(
                f"a view of {cache.digest} takes {largest:,} bytes and keep is {keep:,}: rows in random order fetch shards "
                "again and again, unless you read few of its targets; pull it, or keep more"
            )
    return cache


class _Healing:
    """A shard of big rows, fetched once more where a row of it fails its checksum."""

    def __init__(self, shard: Any, again: Callable[[], Any]):
        self._shard, self._again = shard, again

    def read(self, row: int, out: np.ndarray) -> None:
        try:
            self._shard.read(row, out)
        except DamageError:
            self._shard = self._again()
            self._shard.read(row, out)


class _Streamed(Files):
    """See :class:`softcache.reader.Shards`."""

    def __init__(self, cache: Cache, here: Pulled, remote: Remote, keep: int):
        super().__init__(cache.store)
        self._cache, self._here, self._remote, self._keep = cache, here, remote, keep
        self._tables = [cache.table(part.number) for part in cache.parts]
        self._columns = [{array.path: i for i, array in enumerate(part.arrays)} for part in cache.parts]
        self._held: OrderedDict[str, tuple[int, tuple[str, int, int]]] = OrderedDict()
        self._verified: set[str] = set()
        self._lock, self._process = threading.Lock(), os.getpid()
        for file in blobs.all_files(cache):
            if file.target is None or here.has(file) or cache.store.size(file.file) != file.entry.bytes:
                continue
            path = f"{'' if file.target == 'view' else 'targets/'}{file.target}/{file.field}"
            self._held[file.file] = file.entry.bytes, (path, file.view or 0, file.shard or 0)

    def open(self, array: Array, block: Block) -> Any:
        if os.getpid() != self._process:
            raise StoreError(
                f"{self._cache.path} is streamed, which a fork cannot go on with: read it in the process that opened it, or "
                "pull it"
            )
        name, target = (
            array.file(block.view, block.index),
            array.path.removeprefix("targets/").partition("/")[0],
        )
        if self._here.covers(target, block.view, block.index):
            return super().open(array, block)
        with self._lock:
            if name not in self._held or not self._seen(name, array, block):
                self._fetch(name, array, block)
            try:
                opened = super().open(array, block)
            except DamageError:  # the disk has changed it since
                self._fetch(name, array, block)
                opened = super().open(array, block)
            return _Healing(opened, lambda: self._again(name, array, block)) if array.big else opened

    def _seen(self, name: str, array: Array, block: Block) -> bool:
        """Is what lies there what was put there? Read once: it may be of an earlier stream."""
        if name not in self._verified:
            entry = self._entry(array.path, block)
            if not self._store.exists(name) or self._store.digest(name) != entry.sha256:
                return False
            self._verified.add(name)
        return True

    def _again(self, name: str, array: Array, block: Block) -> Any:
        with self._lock:
            self._fetch(name, array, block)
            return super().open(array, block)

    def _fetch(self, name: str, array: Array, block: Block) -> None:
        entry = self._entry(array.path, block)
        if self._held.pop(name, None):  # it was bad
            self._cache.reader.forget((array.path, block.view, block.index))
            self._store.delete(name)
        data = blobs.fetch(self._remote, File(name, entry))
        while self._held and len(data) + sum(size for size, _ in self._held.values()) > self._keep:
            old, (_, key) = self._held.popitem(last=False)
            self._cache.reader.forget(key)  # else what is deleted would stay on the disk
            self._store.delete(old)
        self._store.put(name, data)
        self._held[name] = entry.bytes, (array.path, block.view, block.index)
        self._verified.add(name)

    def _entry(self, path: str, block: Block) -> m.Entry:
        for part, table, columns in zip(self._cache.parts, self._tables, self._columns, strict=True):
            if path in columns and part.grid.first <= block.view < part.grid.views:
                row = (block.view - part.grid.first) * part.grid.blocks_per_view + block.index
                entry = table[row, columns[path]]
                return m.Entry(sha256=bytes(entry["sha256"]).hex(), bytes=int(entry["bytes"]))
        raise AssertionError(f"{path} of view {block.view} is in no part")

    def largest_view(self) -> int:
        """Bytes of all shards of a view, of the one with most."""
        views = np.zeros(self._cache.views, np.int64)
        for part, table in zip(self._cache.parts, self._tables, strict=True):
            shards = table["bytes"][:, :-1].astype(np.int64).sum(axis=1)
            views[part.grid.first : part.grid.views] += shards.reshape(-1, part.grid.blocks_per_view).sum(
                axis=1
            )
        return int(views.max())
