"""A cache as one HDF5 file, and back: every field as it is encoded, samples in the order of the ids.

``targets/NAME/FIELD`` and ``view/FIELD`` are ``(views, samples, …)``. float16 fields are float32 here, which holds them
exactly: MATLAB has no halves. ``ids``, ``classes``, all attributes and ``decoded/`` are for people; an import reads the
rest, and what it makes is the cache that was exported, to the last byte, or it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from softcache import inventory, spec
from softcache import manifest as m
from softcache.cache import Cache
from softcache.errors import DamageError, MismatchError, SoftcacheError, StoreError
from softcache.exchange.files import Patient, aside, holds, require_exportable, written
from softcache.exchange.h5file import File, is_hdf5, library, opened
from softcache.exchange.words import ABOUT, COLUMNS, formula
from softcache.store import Store
from softcache.targets import Target
from softcache.zarrfile import BIG_ROW, Array

MARK = "softcache-hdf5-1"
_WINDOW = 8 << 20  # bytes of rows in memory
_CHUNK = 64 << 10  # bytes of a chunk, where a row is not more
_NAMES = 200  # bytes of a file's name in a cache


# -- out ---------------------------------------------------------------------------------------------------


def export(cache: Cache, out: str | Path, *, decoded: bool = False) -> None:
    """Write a finished cache into the new HDF5 file ``out``.

    Args:
        decoded: also ``decoded/NAME``, float32, of targets that decode to plain numbers.

    Raises:
        NotBuilt: the cache is not finished. NotPulled: some of it is not here. DamageError: it is damaged.
        SpecError: it is no cache in a folder; ``out`` is there, or in the cache; or h5py is not.
        StoreError: the disk does not take it.
    """
    require_exportable(cache, Path(out))
    h5py = library()
    with written(Path(out)) as temporary:
        disk = Patient(temporary)
        with disk, h5py.File(disk, "w") as file:
            _about(cache, file)
            _rows(cache, file, decoded, disk.check)
            _files(cache, file)
        disk.check()


def _about(cache: Cache, file: Any) -> None:
    manifest, recipe = cache.manifest, cache.identity["recipe"]
    assert manifest is not None
    _tell(file, format=MARK, digest=manifest.digest, about=ABOUT, recipe=recipe["spec"])
    _text(file, "manifest", [manifest.to_bytes()], scalar=True)
    _tell(file["manifest"], about="softcache.json of the cache: JSON, docs/format.md says what is in it")
    _text(file, "ids", [id.encode() for id in cache.ids])
    _tell(file["ids"], about="the samples' ids: axis 'sample' of all datasets follows them")
    if cache.classes:
        _text(file, "classes", [name.encode() for name in cache.classes])
        _tell(file["classes"], about="class names, in the order of logits and class indices, from 0")


def _rows(cache: Cache, file: Any, decoded: bool, check: Callable[[], None]) -> None:
    """All arrays of rows, some megabytes at a time."""
    groups: dict[str, dict[str, Array]] = {}
    for array in cache.arrays.values():
        path, _, field = array.path.rpartition("/")
        groups.setdefault(path, {})[field] = array
    for path, arrays in groups.items():
        target = cache.targets.get(path.removeprefix("targets/"))
        step = _step(cache.samples, sum(a.row_bytes for a in arrays.values()))
        sets = {
            f: _create(file, a.path, a.shape, _wide(a.dtype), a.row_bytes, step) for f, a in arrays.items()
        }
        for field, array in arrays.items():
            _describe(sets[field], array)
        plain = None
        if target is not None:
            _tell(file[path], kind=target.kind, codec=target.spec, decode=formula(target))
            if decoded and (row := _plain(cache, target)) is not None:
                shape = (cache.views, cache.samples, *row)
                size = 4 * int(np.prod(row))
                plain = _create(file, f"decoded/{target.name}", shape, "float32", size, step)
                _tell(plain, about=f"{path}, decoded")
        for view in range(cache.views):
            for start in range(0, cache.samples, step):
                samples = np.arange(start, min(start + step, cache.samples))
                fields = cache.reader.fields(path, view, cache.grid.positions(samples), slab=False)
                for field, values in fields.items():
                    sets[field][view, start : start + len(samples)] = values.astype(
                        _wide(arrays[field].dtype)
                    )
                check()
                if plain is not None and target is not None:
                    beside = cache.beside(target.name, cache.grid.positions(samples))
                    plain[view, start : start + len(samples)] = target.decode(fields | beside).values


def _plain(cache: Cache, target: Target) -> tuple[int, ...] | None:
    """The shape of a decoded row, where it is plain numbers."""
    none = {f.name: np.zeros((1, *f.shape), f.dtype) for f in target.fields}
    values = getattr(target.decode(none | cache.beside(target.name, np.zeros(1, np.int64))), "values", None)
    return values.shape[1:] if isinstance(values, np.ndarray) else None


def _step(samples: int, row: int) -> int:
    """Rows of a window, a power of two."""
    return 1 << max(0, min(samples - 1, _WINDOW // row).bit_length() - 1)


def _wide(dtype: str) -> str:
    return "float32" if dtype == "float16" else dtype


def _create(
    file: Any, path: str, shape: tuple[int, ...], dtype: str, row: int, step: int, kept: str = ""
) -> Any:
    """A dataset in chunks of some rows; compressed where the cache's are, or where half of a number is zeros."""
    rows = min(step, shape[1], 1 << max(0, (_CHUNK // row).bit_length() - 1))
    squeezed: dict[str, Any] = {}
    if row >= BIG_ROW or dtype == "float32":
        squeezed = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    return file.create_dataset(
        path, shape, dtype, chunks=(1, rows, *shape[2:]), track_times=False, fill_time="never", **squeezed
    )


def _describe(dataset: Any, array: Array) -> None:
    columns = COLUMNS.get(array.path)
    told = {"axes": ", ".join(array.axes), "dtype": array.dtype}
    _tell(dataset, **told | ({"columns": ", ".join(columns)} if columns else {}))


def _files(cache: Cache, file: Any) -> None:
    """What is no array of rows and does not follow from the manifest, byte for byte, one after the other."""
    kept = [f for f in inventory.files(cache) if f.target is None and f.content is None]
    ends = np.cumsum([f.entry.bytes for f in kept], dtype=np.int64)
    group = file.create_group("files")
    _tell(group, about="files of the cache: bytes[end[i-1]:end[i]] is the one called name[i]")
    _text(file, "files/name", [f.file.encode() for f in kept])
    group.create_dataset("end", data=ends, track_times=False)
    content = group.create_dataset("bytes", (int(ends[-1]),), "uint8", track_times=False, fill_time="never")
    for one, end in zip(kept, ends.tolist(), strict=True):
        data = cache.store.get(one.file)
        if len(data) != one.entry.bytes or spec.digest(data) != one.entry.sha256:
            raise DamageError(
                f"{cache.store.path(one.file)} is not what was written: softcache verify {cache.path}"
            )
        content[end - len(data) : end] = np.frombuffer(data, np.uint8)


def _text(file: Any, path: str, texts: list[bytes], scalar: bool = False) -> None:
    """Text of a fixed length, UTF-8, padded with zeros: what every reader of HDF5 knows."""
    dtype = library().string_dtype("utf-8", max(1, *map(len, texts)))
    values = np.array(texts[0] if scalar else texts, dtype)
    squeezed = (
        {} if scalar else {"compression": "gzip", "compression_opts": 1, "chunks": (min(len(texts), 1024),)}
    )
    file.create_dataset(path, data=values, dtype=dtype, track_times=False, **squeezed)


def _tell(of: Any, **said: str) -> None:
    for name, text in said.items():
        raw = text.encode()
        of.attrs.create(name, raw, dtype=library().string_dtype("utf-8", max(1, len(raw))))


# -- and back ----------------------------------------------------------------------------------------------


def recognise(path: Path) -> bool:
    """Was this file made by :func:`export`? What it is worth is seen when it is read.

    Raises :class:`DamageError` for an HDF5 file that cannot be opened, :class:`SpecError` where h5py is not installed.
    """
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        return all(name in file for name in ("manifest", "files/name", "files/end", "files/bytes"))


def restore(path: str | Path, out: str | Path) -> Cache:
    """Make the cache again that was exported; run again after a stop, it starts anew.

    Raises:
        DamageError: what the file holds is not what its manifest says.
        MismatchError: the file has another layout, or compressed rows cannot be made as they were by this zstd; or the
            folder holds something else.
    """
    with opened(Path(path)) as file:
        return _restored(file, out)


def _restored(file: File, out: str | Path) -> Cache:
    raw = _manifest(file)
    where = f"the manifest in {file.path}"
    manifest = m.read(m.Manifest, raw, where, "export the cache again")
    if not manifest.stands_for(raw) or not all(p.holds_together() for p in (manifest, *manifest.parts)):
        raise DamageError(
            f"{where} was edited: its digest does not match its content; export the cache again"
        )
    store = Store(out)
    cache = Cache(store, manifest.identity, manifest)
    if _there(store, raw, cache):
        return cache
    with store.claim("import") as mine:
        if not mine:
            raise StoreError(f"another process imports into {store.root}: wait for it")
        _restore(file, cache, raw)
    store.drop_claims()
    return cache


def _manifest(file: File) -> bytes:
    dataset = file.dataset("manifest")
    if not dataset.text or dataset.shape or dataset.dtype.kind != "S" or dataset.dtype.itemsize > m.MAX_JSON:
        raise MismatchError(f"{file.path}: 'manifest' is no text of up to {m.MAX_JSON:,} bytes")
    return bytes(dataset.whole())


def _there(store: Store, raw: bytes, cache: Cache) -> bool:
    """Is it there already? :class:`MismatchError` where something else is."""
    if holds(store, raw, cache.digest):
        return True
    first = cache.parts[0]
    theirs = store.names()
    begun = store.exists(first.identity_file) and store.get(first.identity_file) == first.identity.to_bytes()
    if theirs and not begun:
        raise MismatchError(
            f"{store.root} holds something else, for example {theirs[0]!r}: name an empty or a new folder for the cache"
        )
    return False


def _restore(file: File, cache: Cache, raw: bytes) -> None:
    """Identity and tables, then shards, then receipts and constants, and the manifest: what is there, is whole."""
    store, small = cache.store, _Small(file)
    assert cache.manifest is not None
    for part, sealed in zip(cache.parts, (cache.manifest, *cache.manifest.parts), strict=True):
        for name, entry in ((part.identity_file, sealed.identity_file), (part.table_file, sealed.files)):
            store.put(name, small.get(name, entry))
    files = list(inventory.files(cache))
    entries = {f.file: f.entry for f in files if f.target is not None}
    for array in cache.arrays.values():
        _restore_array(file, cache, array, entries)
    for one in files:
        if one.target is None and one.content is None:
            store.put(one.file, small.get(one.file, one.entry))
    store.put(m.MANIFEST, raw)
    for one in files:
        if one.content is not None:
            store.put(one.file, one.content)


class _Small:
    """The files that are kept as they are."""

    def __init__(self, file: File):
        self._bytes = file.dataset("files/bytes")
        names, ends = file.dataset("files/name"), file.dataset("files/end")
        plain = names.dtype.kind == "S" and names.dtype.itemsize <= _NAMES and len(names.shape) == 1
        if not plain or ends.dtype != np.int64 or ends.shape != names.shape or self._bytes.dtype != np.uint8:
            raise MismatchError(
                f"{file.path}: 'files' has another layout than softcache export --to hdf5 writes"
            )
        stops = ends.read().tolist()
        self._places = dict(zip(names.read().tolist(), pairwise([0, *stops]), strict=True))
        self._where = str(file.path)

    def get(self, name: str, entry: m.Entry) -> bytes:
        start, stop = self._places.get(name.encode(), (0, 0))
        if not 0 <= start <= stop <= self._bytes.shape[0] or stop - start != entry.bytes:
            raise DamageError(
                f"{self._where} does not hold {name} of {entry.bytes:,} bytes: export the cache again"
            )
        data = self._bytes.read(start=start, stop=stop).tobytes()
        if spec.digest(data) != entry.sha256:
            raise DamageError(f"{self._where}: {name} is not what the manifest says: export the cache again")
        return data


def _restore_array(file: File, cache: Cache, array: Array, entries: dict[str, m.Entry]) -> None:
    """The shards of an array: a view's rows are laid aside on the disk, since blocks take them in another order."""
    wide = np.dtype(_wide(array.dtype))
    row = max(1, array.row_bytes // np.dtype(array.dtype).itemsize * wide.itemsize)
    dataset = file.dataset(array.path, most_chunk=max(_CHUNK, row))
    if dataset.shape != array.shape or dataset.dtype != wide:
        raise MismatchError(
            f"{file.path}: {array.path!r} is {dataset.dtype} {dataset.shape}, and its manifest implies {wide} {array.shape}"
        )
    kept = aside(cache.store.root, wide, (cache.samples, *array.row))
    step = _step(cache.samples, row)
    for view in range(cache.views):
        for start in range(0, cache.samples, step):
            rows = dataset.read(view, start=start, stop=start + step)
            kept[start : start + len(rows)] = rows
        for index in range(cache.grid.blocks_per_view):
            block = cache.grid.block(view, index)
            data = array.encode(kept[cache.grid.samples_of(block)].astype(array.dtype))
            name = array.file(view, index)
            if spec.digest(data) != entries[name].sha256:
                raise _another(file, cache, array, view, index)
            cache.store.put(name, data)


def _another(file: File, cache: Cache, array: Array, view: int, index: int) -> SoftcacheError:
    where = f"{file.path}: view {view} of {array.path!r} (block {index})"
    ours, theirs = version("numcodecs"), cache.identity["libraries"].get("numcodecs")
    if array.big and ours != theirs:
        return MismatchError(
            f"{where} is compressed otherwise by numcodecs {ours} than by {theirs}, which wrote the cache: install that one"
        )
    return DamageError(
        f"{where} is not what was exported: export the cache again, and delete {cache.store.root}"
    )
