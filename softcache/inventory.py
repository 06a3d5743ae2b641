"""Every file of a cache, with its digest and size: what is verified, moved and mended."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from softcache import cache as caches
from softcache import manifest as m
from softcache import spec
from softcache.cache import Cache
from softcache.parts import Part, identity_file, next_part, refuses
from softcache.zarrfile import Array, group_metadata, groups

_PLACE = re.compile(r"v(\d{1,8})-b(\d{1,14})\.json|c\.(\d{1,8})\.(\d{1,14})[.0]*")  # view and block


@dataclass(frozen=True)
class File:
    """A file that the manifest names, or that follows from it.

    Attributes:
        file: its name inside the cache. entry: its sha256 and size.
        target, field, view, shard: where its values stand, of a shard (the target ``view`` is the views themselves); a
            receipt has ``view`` and ``shard`` alone; None of files of the cache as a whole.
        content: its bytes, of a ``zarr.json``, which follows from the manifest; else None.
    """

    file: str
    entry: m.Entry
    target: str | None = None
    field: str | None = None
    view: int | None = None
    shard: int | None = None
    content: bytes | None = None


def files(cache: Cache) -> Iterator[File]:
    """All files but the manifest, in the order in which they are written.

    Raises:
        NotBuilt: the build is not finished.
        DamageError: a table of files is missing or damaged.
    """
    tables = [cache.table(part.number) for part in cache.parts]  # first of all: nothing can be told without
    manifest = cache.manifest
    assert manifest is not None
    for part, sealed, table in zip(cache.parts, (manifest, *manifest.parts), tables, strict=True):
        yield File(part.identity_file, sealed.identity_file)
        for path, constant in sorted(sealed.constants.items()):
            yield File(constant.array(path).file(), constant)
        for block, entries in zip(part.grid.blocks(), table, strict=True):
            *shards, receipt = (
                m.Entry(sha256=bytes(e["sha256"]).hex(), bytes=int(e["bytes"])) for e in entries
            )
            for array, entry in zip(part.arrays, shards, strict=True):
                target, _, field = array.path.removeprefix("targets/").rpartition("/")
                name = array.file(block.view, block.index)
                yield File(name, entry, target, field, block.view, block.index)
            yield File(part.receipt(block), receipt, view=block.view, shard=block.index)
        yield File(part.table_file, sealed.files)
    for name, data in metadata(cache.arrays.values(), cache.constants).items():
        yield File(name, m.Entry(sha256=spec.digest(data), bytes=len(data)), content=data)


def metadata(arrays: Iterable[Array], constants: Mapping[str, m.Constant]) -> dict[str, bytes]:
    """Every ``zarr.json`` of a cache, by name: they follow from its manifest."""
    everything = [*arrays, *(c.array(path) for path, c in constants.items())]
    found = {f"{a.path}/zarr.json": a.metadata() for a in everything}
    return found | {(f"{g}/zarr.json" if g else "zarr.json"): group_metadata() for g in groups(everything)}


def begun(cache: Cache) -> Part | None:
    """The part that is being added to a finished cache; None where there is none."""
    number = len(cache.parts)
    if not cache.store.exists(identity_file(number)):
        return None
    identity = caches.read_identity(cache.store, number)
    return None if refuses(cache.parts, identity) else next_part(cache.parts, identity)


def expects(part: Part, name: str) -> bool:
    """May a file of this name be there while the part is being made? Its constants are written last."""
    if name in (part.identity_file, part.table_file):
        return True
    grid, arrays = part.grid, {array.path: array for array in part.arrays}
    path, _, file = name.rpartition("/")
    place = _PLACE.fullmatch(file)  # the names are not listed: a part may have any number of blocks
    if place is None:
        return False
    view, index = (int(n) for n in place.groups() if n is not None)
    if not (grid.first <= view < grid.views and index < grid.blocks_per_view):
        return False
    return name == part.receipt(grid.block(view, index)) or (
        path in arrays and name == arrays[path].file(view, index)
    )
