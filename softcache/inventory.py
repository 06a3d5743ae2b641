"""Every file of a cache, with its digest and size: what is verified, moved and mended."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from softcache import chosen, spec
from softcache import manifest as m
from softcache.cache import Cache
from softcache.documents import read_identity
from softcache.errors import DamageError, MismatchError
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
        content: its bytes, of what follows from the manifest (a ``zarr.json``, the choice of codecs); else None.
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
    for number, table in enumerate(tables):
        yield from of_part(cache, number, table)
    for name, data in derived(cache).items():
        yield File(name, m.Entry(sha256=spec.digest(data), bytes=len(data)), content=data)


def size(cache: Cache) -> int:
    """Bytes of all files. Raises as :func:`files`."""
    return sum(file.entry.bytes for file in files(cache)) + (cache.store.size(m.MANIFEST) or 0)


def of_part(cache: Cache, number: int, table: np.ndarray | None = None) -> Iterator[File]:
    """Those of one part; without those of its blocks where the ``table`` is lost. Raises as :func:`files`."""
    part, sealed = cache.parts[number], cache.sealed[number]
    yield File(part.identity_file, sealed.identity_file)
    for path, constant in sorted(sealed.constants.items()):
        yield File(constant.array(path).file(), constant)
    for block, entries in zip(part.grid.blocks(), () if table is None else table, strict=table is not None):
        *shards, receipt = (m.Entry(sha256=bytes(e["sha256"]).hex(), bytes=int(e["bytes"])) for e in entries)
        for array, entry in zip(part.arrays, shards, strict=True):
            target, _, field = array.path.removeprefix("targets/").rpartition("/")
            name = array.file(block.view, block.index)
            yield File(name, entry, target, field, block.view, block.index)
        yield File(part.receipt(block), receipt, view=block.view, shard=block.index)
    yield File(part.table_file, sealed.files)


def problem(cache: Cache, file: File, read_data: bool = False) -> str | None:
    """What is wrong with a file, in words; with ``read_data`` its content, too."""
    try:
        size = cache.store.size(file.file)
        if size is None:
            return "is missing"
        if size != file.entry.bytes:
            return f"has {size:,} bytes and should have {file.entry.bytes:,}"
        if read_data and cache.store.digest(file.file) != file.entry.sha256:
            return "its content is not what was written (sha256 differs)"
    except DamageError as e:  # a folder above it is a link, the disk cannot read it
        return str(e)
    return None


def derived(cache: Cache) -> dict[str, bytes]:
    """The files of a cache that follow from its manifest."""
    assert cache.manifest is not None
    choice = cache.manifest.choice
    found = {} if choice is None else {chosen.FILE: choice.to_bytes()}
    return found | metadata(cache.arrays.values(), cache.constants)


def metadata(arrays: Iterable[Array], constants: Mapping[str, m.Constant]) -> dict[str, bytes]:
    """Every ``zarr.json`` of a cache, by name: they follow from its manifest."""
    everything = [*arrays, *(c.array(path) for path, c in constants.items())]
    found = {f"{a.path}/zarr.json": a.metadata() for a in everything}
    return found | {(f"{g}/zarr.json" if g else "zarr.json"): group_metadata() for g in groups(everything)}


def begun(cache: Cache) -> Part | None:
    """The part that is being added to a finished cache; None where there is none, or what began is none."""
    number = len(cache.parts)
    if not cache.store.exists(identity_file(number)):
        return None
    try:
        identity = read_identity(cache.store, number)
    except (DamageError, MismatchError):
        return None
    return None if refuses(cache.parts, identity) else next_part(cache.parts, identity)


def unexpected(cache: Cache, names: Iterable[str]) -> list[str]:
    """Those of these files that do not belong to the part that is being added."""
    part = begun(cache)
    if part is None:
        return list(names)
    arrays = {array.path: array for array in part.arrays}
    return [name for name in names if not _expects(part, arrays, name)]


def _expects(part: Part, arrays: Mapping[str, Array], name: str) -> bool:
    """May a file of this name be there while the part is being made?"""
    own = tuple(part.constant(f"{root}/") for root in ("constants", "anchors"))
    if name in (part.identity_file, part.table_file) or name.startswith(own):
        return True
    path, _, file = name.rpartition("/")
    place = _PLACE.fullmatch(file)  # the names are not listed: a part may have any number of blocks
    if place is None:
        return False
    grid, (view, index) = part.grid, (int(n) for n in place.groups() if n is not None)
    if not (grid.first <= view < grid.views and index < grid.blocks_per_view):
        return False
    return name == part.receipt(grid.block(view, index)) or (
        path in arrays and name == arrays[path].file(view, index)
    )
