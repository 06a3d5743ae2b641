"""A damaged cache made whole again, from a remote that has it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from softcache import blobs
from softcache import cache as caches
from softcache.cache import Cache
from softcache.checker import FOREIGN, Damage, verify
from softcache.inventory import files
from softcache.remote import Remote, connect


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        mended: files that were damaged and are whole. fetched: bytes that came from the remote.
        left: what is still wrong: where no remote was named, or files that are none of the cache.
    """

    mended: list[str]
    fetched: int
    left: list[Damage]


def repair(cache: Cache | str | Path, remote: str | Path | Remote | None = None) -> Repaired:
    """Find what is damaged, reading every byte, and put right what can be.

    ``zarr.json`` files follow from the manifest; all others are fetched from ``remote``, by default the one that a part of
    the cache was pulled from. A file that is none of the cache is told, and left alone.

    Raises:
        NotBuilt: the cache is not finished.
        DamageError: its manifest is damaged, or the remote's bytes are.
        StoreError: the remote has not the bytes, or cannot be read.
    """
    cache = cache if isinstance(cache, Cache) else caches.open(cache)
    if remote is None and cache.pulled:
        remote = cache.pulled.remote
    elsewhere = connect(remote) if isinstance(remote, str | Path) else remote
    mended: list[str] = []
    fetched = 0
    if elsewhere:  # nothing can be told of the others without the tables
        for table in blobs.first_files(cache):
            if not _whole(cache, table.file, table.entry.sha256):
                cache.store.put(table.file, blobs.fetch(elsewhere, table))
                mended.append(table.file)
                fetched += table.entry.bytes
    damaged = verify(cache, read_data=True)
    broken = {damage.file for damage in damaged if damage.problem != FOREIGN}
    tables = {table.file for table in blobs.first_files(cache)}
    for file in files(cache) if broken and not broken & tables else ():
        if file.file not in broken:
            continue
        if file.content is not None:
            cache.store.put(file.file, file.content)
        elif elsewhere:
            cache.store.put(file.file, blobs.fetch(elsewhere, file))
            fetched += file.entry.bytes
        else:
            continue
        mended.append(file.file)
    return Repaired(mended, fetched, [d for d in damaged if d.file not in mended])


def _whole(cache: Cache, name: str, sha256: str) -> bool:
    return cache.store.exists(name) and cache.store.digest(name) == sha256
