"""WebDataset: one tar a block, whose members are arrays of the whole block, in the order of :mod:`softcache.tars`.

With ``embed`` the images, or the very pixels the teacher saw, stand behind the arrays, sample by sample, so that a tar is
read once from front to back. Every tar is the same bytes on every run. ``tars.json`` and at last ``softcache.json`` commit
the export; until then the same call goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from softcache import cache as caches
from softcache import inventory, shown, spec, tars
from softcache import manifest as m
from softcache.block import Block
from softcache.cache import Cache
from softcache.errors import DamageError, SourceError, SpecError
from softcache.exchange.embedding import Embedding, embedded
from softcache.exchange.files import holds, require_exportable
from softcache.members import IMAGES, MOST, Contents, Embed, Member
from softcache.recipe import View, gather, render
from softcache.source import Source
from softcache.store import Store
from softcache.ustar import BLOCK, END, header, npy_header, padding

_ROWS = 64  # of big rows or of samples, that are made at a time

_MAGIC = (
    (b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II", "tif"),
    (b"MM", "tif"), (b"P", "ppm"),
)  # fmt: skip


def recognise(path: Path) -> bool:
    """Is this folder an export to WebDataset?"""
    return (path / tars.NAME).is_file()


def export(
    cache: Cache, out: str | Path | Store, *, embed: Embed = "nothing", source: Source | None = None
) -> str:
    """Write a cache as tars into the folder ``out``, or go on with that.

    Args:
        embed: ``images``, the source's bytes of every sample, once a view; or ``views``, the pixels that the teacher saw.
        source: what the cache was built from, needed where something is embedded.

    Returns:
        The export's digest: the name of exactly these tars.

    Raises:
        NotBuilt: the cache is unfinished. NotPulled: some of it is not here.
        SpecError: it, or what is asked for, cannot be exported; ``out`` holds something else, or lies in the cache.
        MismatchError: the source is another than the cache was built from, in any image or label.
        DamageError: a file of the cache is not what was written. StoreError: the disk is full or fails.
    """
    store = out if isinstance(out, Store) else Store(out)
    require_exportable(cache, store.root)
    work = _Work(cache, embed, embedded(cache, embed, source))
    _refuse_foreign(store, work)
    with store.claim("export") as mine:
        if not mine:
            raise SpecError(f"another process is exporting to {store.root}: wait for it")
        digest = _write(store, work)
    store.drop_claims()
    return digest


def restore(path: str | Path, out: str | Path | Store) -> Cache:
    """Make the cache again, byte for byte, of an export in the folder ``path``; or go on with that.

    Raises:
        DamageError: the export is not what was written, naming tar and member.
        MismatchError: compressed rows cannot be made as they were, see :meth:`softcache.tars.Tars.as_cached`; or ``out``
            holds another cache.
        SpecError: ``out`` holds something else. StoreError: the disk is full or fails.
    """
    cache = caches.open(path)
    if cache.tars is None or cache.manifest is None:
        raise SpecError(f"{path} is no export to tars: it holds no {tars.NAME}")
    store = out if isinstance(out, Store) else Store(out)
    holds(store, cache.store.get(m.MANIFEST, m.MAX_JSON), cache.digest)
    files = {one.file: one for one in inventory.files(cache)}
    foreign = sorted(set(store.names()) - files.keys() - {m.MANIFEST}) if store.root.is_dir() else []
    if foreign:
        raise SpecError(
            f"{store.root} holds {foreign[0]!r}, which is not of this cache: choose an empty folder"
        )
    entries = {name: one.entry for name, one in files.items()}
    for block in cache.grid.blocks():
        with cache.store.stream(tars.file(block)) as tar:
            for member, content in cache.tars.walk(block, tar, lambda one: one.kind in ("array", "receipt")):
                name, data = cache.tars.as_cached(block, member, content, entries)
                _put(store, name, data)
    for name, one in reversed(files.items()):
        if one.shard is None:
            _put(store, name, _whole(cache, one) if one.content is None else one.content)
    _put(store, m.MANIFEST, cache.store.get(m.MANIFEST, m.MAX_JSON))
    return caches.open(store.root)


def _put(store: Store, name: str, data: bytes) -> None:
    if store.size(name) != len(data) or store.digest(name) != spec.digest(data):
        store.put(name, data)


def _whole(cache: Cache, one: inventory.File) -> bytes:
    data = cache.store.get(one.file, one.entry.bytes)
    if spec.digest(data) != one.entry.sha256:
        raise DamageError(
            f"{cache.store.path(one.file)} is not what was written: verify {cache.path} and mend it"
        )
    return data


# -- tars ------------------------------------------------------------------------------------------------------


class _Work:
    """What there is to write."""

    def __init__(self, cache: Cache, embed: Embed, embedding: Embedding | None):
        self.embed: Embed = embed
        self.cache, self.embedding = cache, embedding
        self.contents = Contents(cache, embed)
        self.files = [one for one in inventory.files(cache) if one.content is None]
        self.shards = {one.file: one for one in self.files if one.shard is not None}
        self.of = bytes.fromhex(spec.digest(spec.canonical_json([cache.digest, embed, tars.VERSION])))

    def names(self) -> set[str]:
        """Every file of the export."""
        own = {m.MANIFEST, *(one.file for one in self.files if one.shard is None)}
        return own | tars.names(self.cache.grid)


def _refuse_foreign(store: Store, work: _Work) -> None:
    """:class:`SpecError` where the folder holds anything but this export, whole or begun."""
    if not store.root.is_dir():
        return
    expected, found = work.names(), store.names()
    for name in found:
        if name not in expected or (name.endswith(".index") and _head(store, name)["of"] != np.void(work.of)):
            raise SpecError(
                f"{store.root} holds {name!r}, which is not of this export: choose an empty folder, or delete it"
            )


def _head(store: Store, name: str) -> Any:
    data = store.get(name)
    return np.frombuffer(data.ljust(tars.HEAD.itemsize, b"\0"), tars.HEAD, 1)[0]


def _write(store: Store, work: _Work) -> str:
    cache = work.cache
    rows = [_block(store, work, block) for block in cache.grid.blocks()]
    table = np.array(rows, tars.PAIR).tobytes()
    _put(store, tars.TABLE, table)
    manifest = tars.Manifest(
        format="softcache-tars",
        version=tars.VERSION,
        cache=cache.digest,
        embed=work.embed,
        table=m.Entry(sha256=spec.digest(table), bytes=len(table)),
    ).signed()
    _put(store, tars.NAME, manifest.to_bytes())
    for one in reversed(work.files):  # the identity at the end: with it a folder is that of a build
        if one.shard is None:
            _put(store, one.file, _whole(cache, one))
    _put(store, m.MANIFEST, cache.store.get(m.MANIFEST, m.MAX_JSON))
    return manifest.digest


def _block(store: Store, work: _Work, block: Block) -> tuple[Any, Any]:
    """Write the tar of a block and then its index, where they are not there. Returns their entries."""
    name, index = tars.file(block), tars.index_file(block)
    if store.exists(index):
        head = _head(store, index)
        if store.size(name) == int(head["tar"]["bytes"]):
            return head["tar"], _entry(store.get(index))
    places: list[tuple[int, int, bytes, int]] = []
    total = hashlib.sha256()
    store.put(name, _chunks(work, block, places, total))
    last = places[-1]
    tar = (total.digest(), last[0] + last[1] + padding(last[1]) + len(END))
    data = np.array((tar, work.of), tars.HEAD).tobytes() + np.array(places, tars.PLACE).tobytes()
    store.put(index, data)
    return tar, _entry(data)


def _entry(data: bytes) -> tuple[bytes, int]:
    return hashlib.sha256(data).digest(), len(data)


def _chunks(
    work: _Work, block: Block, places: list[tuple[int, int, bytes, int]], total: Any
) -> Iterator[bytes | memoryview]:
    """The bytes of a block's tar. ``places`` and ``total`` have grown by them."""
    at = 0
    for member, kind, size, parts in _members(work, block):
        digest = hashlib.sha256()
        head = header(member.named(kind), size)
        total.update(head)
        yield head
        for part in parts:
            digest.update(part)
            total.update(part)
            yield part
        zeros = bytes(padding(size))
        total.update(zeros)
        yield zeros
        places.append((at + BLOCK, size, digest.digest(), kind))
        at += BLOCK + size + len(zeros)
    total.update(END)
    yield END


def _members(work: _Work, block: Block) -> Iterator[tuple[Member, int, int, Iterator[bytes | memoryview]]]:
    """(member, kind of image, size, its bytes in parts) of each member of a block."""
    made: Mapping[str, np.ndarray] = {}
    rows: Iterator[tuple[bytes, bytes]] = iter(())
    if work.embedding:
        views = _views(work.cache, block, work.contents)
        made = _told(work, block, views)
        rows = _samples(work, block, views)
    pending = b""
    for member in work.contents.members(block):
        kind = 0
        if member.kind == "array":
            assert member.size is not None
            if member.size > MOST:
                raise SpecError(
                    f"{member.name} would have {member.size:,} bytes, and a member has up to {MOST:,}: build the cache with "
                    "a smaller --block-rows"
                )
            yield member, 0, member.size, _array(work, block, member)
            continue
        if member.kind == "receipt":
            data = _whole(work.cache, work.shards[member.of])
        elif member.kind == "ids":
            ids = work.cache.ids
            data = spec.canonical_json([ids[i] for i in work.cache.grid.samples_of(block).tolist()])
        elif member.kind in ("label", "shown"):
            data = member.head + made[member.of].astype(np.dtype(member.dtype).newbyteorder("<")).tobytes()
        elif member.kind == "sample":
            data = pending
        else:
            data, pending = next(rows)
            kind = _kind(data) if member.kind == "image" else 0
        if len(data) > member.most:
            raise SpecError(
                f"{member.name} has {len(data):,} bytes, and an export holds up to {member.most:,} of such"
            )
        yield member, kind, len(data), iter((data,))


def _array(work: _Work, block: Block, member: Member) -> Iterator[bytes | memoryview]:
    """An array's rows in one block, its shard being what was written."""
    cache, array = work.cache, work.cache.arrays[member.of]
    name = array.file(block.view, block.index)
    if cache.store.digest(name) != work.shards[name].entry.sha256:
        raise DamageError(
            f"{cache.store.path(name)} is not what was written: verify {cache.path} and mend it"
        )
    yield member.head
    rows = cache.reader.shards.open(array, block)
    if not array.big:
        yield rows.all()[: block.rows].tobytes()
        return
    some = np.empty((_ROWS, *array.row), np.dtype(array.dtype))
    for start in range(0, block.rows, _ROWS):
        n = min(_ROWS, block.rows - start)
        for i in range(n):
            rows.read(start + i, some[i])
        yield some[:n].astype(some.dtype.newbyteorder("<"), copy=False).tobytes()


def _views(cache: Cache, block: Block, contents: Contents) -> dict[int, View]:
    """The views of a block's valid rows, by row."""
    rows = contents.rows(block)
    samples = cache.grid.samples_of(block)[rows]
    return dict(zip(rows.tolist(), cache.read_views(block.view, samples, slab=False), strict=True))


def _told(work: _Work, block: Block, views: Mapping[int, View]) -> dict[str, np.ndarray]:
    """Labels, and what views are shown with, by name."""
    cache, embedding = work.cache, work.embedding
    assert embedding
    samples = cache.grid.samples_of(block).tolist()
    found = {"label": np.full(block.rows, -1, np.int64), "partner_label": np.full(block.rows, -1, np.int64)}
    room = shown.room(block.rows, cache.parameters, cache.mixed, cache.tiled)
    for row, view in views.items():
        found["label"][row] = embedding.label(samples[row], view)
        partner = (view.mix.partner, view.mix.view) if view.mix else (samples[row], view)
        found["partner_label"][row] = embedding.label(*partner)
        shown.keep(room, row, view)
    return found | room


def _samples(work: _Work, block: Block, views: Mapping[int, View]) -> Iterator[tuple[bytes, bytes]]:
    """Image or pixels, and what is told of it, of each of these rows; made by threads, some ahead."""
    cache, embedding, embed = work.cache, work.embedding, work.embed
    assert embedding
    samples, size = cache.grid.samples_of(block).tolist(), work.contents.size

    def make(row: int) -> tuple[bytes, bytes]:
        sample, view = samples[row], views[row]
        if embed == "images":
            data = embedding.content(sample)
        else:
            images = gather(sample, view, embedding.image)
            data = pixels_head + render(images[sample], view, size, images).tobytes()
        return data, spec.canonical_json(_sample(cache, embedding, block, sample, view))

    pixels_head = npy_header("uint8", (*size, 3))
    rows = list(views)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), _ROWS):
            yield from pool.map(make, rows[start : start + _ROWS])


def _sample(cache: Cache, embedding: Embedding, block: Block, sample: int, view: View) -> dict[str, Any]:
    """What is told of a sample: for those who read the tars with other software."""
    label = embedding.label(sample, view)
    found: dict[str, Any] = {"id": cache.ids[sample], "sample": sample, "view": block.view, "label": label}
    if cache.classes and label >= 0:
        found["class"] = cache.classes[label]
    stored = {name.removeprefix("view/") for name in cache.arrays if name.startswith("view/")}
    return found | {name: list(values) for name, values in view.fields().items() if name in stored}


def _kind(content: bytes) -> int:
    """The kind of an image, by its first bytes: an index into :data:`softcache.members.IMAGES`."""
    found = next((name for magic, name in _MAGIC if content.startswith(magic)), None)
    if found is None:
        raise SourceError(
            f"an image begins with {content[:4]!r}, as no format that is known: export with --embed-views"
        )
    return IMAGES.index(found)
