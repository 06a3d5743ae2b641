"""HDF5 files, read as a stranger's: nothing but the one file is opened, and nothing larger than it can hold is made.

An HDF5 file may point at others (external links, external storage, virtual datasets), load a filter's library, and declare
a shape of which it stores nothing. Every dataset is therefore asked what it is before anything of it is read. libhdf5 itself
parses the file: what it does with bytes that are no HDF5 is its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from softcache.errors import DamageError, MismatchError, SpecError

_MAGIC = b"\x89HDF\r\n\x1a\n"
PIECE = 8 << 20  # bytes that are read at a time, about
_CACHE = (
    64 << 20
)  # bytes of chunks that libhdf5 keeps: files with chunks across all rows are read many times else
_MOST_CHUNK = 1 << 30
_DEFLATE = 1032  # a byte of deflate becomes no more; szip and lzf stay below
_COMPRESSING, _OTHERS = {1: "gzip", 4: "szip", 32000: "lzf"}, {2: "shuffle", 3: "fletcher32"}
_SHOWN, _LOOKED, _DEPTH = (
    40,
    1000,
    8,
)  # datasets that are told; links that are looked at for it; groups in groups


def library() -> Any:
    """h5py. :class:`SpecError` where it is not installed."""
    try:
        import h5py
    except ImportError as e:
        raise SpecError(f"HDF5 needs h5py: pip install 'softcache[hdf5]' ({e})") from e
    return h5py


def is_hdf5(path: Path) -> bool:
    """Is this an HDF5 file? MATLAB's have 512 bytes of their own before."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(520)
    return _MAGIC in (head[:8], head[512:])


@contextmanager
def _whole(what: str) -> Iterator[None]:
    """What libhdf5 says of bytes that are no HDF5 is damage."""
    try:
        yield
    except (KeyError, NotImplementedError, OSError, OverflowError, RuntimeError, TypeError, ValueError) as e:
        raise DamageError(f"{what} cannot be read: {_said(e)}; is the file whole?") from e


@dataclass(frozen=True)
class Dataset:
    """A dataset that was looked at: all of it is in the file.

    Attributes:
        name: where it is in the file. shape, dtype: as it says; ``dtype`` is of numbers, or of text (see :attr:`text`).
        text: strings, of whatever length.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    text: bool
    where: str
    _opened: Any

    @cached_property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, *place: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``start … stop-1`` of the axis after those at which ``place`` says where. :class:`DamageError`."""
        with _whole(f"{self.where}: {self.name!r}"):
            return self._opened[(*place, slice(start, stop))]

    def whole(self) -> Any:
        """All of it, of a single value too. :class:`DamageError`."""
        with _whole(f"{self.where}: {self.name!r}"):
            return self._opened[()]

    def pieces(self) -> Iterator[np.ndarray]:
        """Its rows in order, some megabytes at a time, whole chunks where it has any."""
        chunk = self._opened.chunks[0] if self._opened.chunks else 1
        rows = max(1, PIECE // max(1, self.row_bytes) // chunk * chunk)
        for start in range(0, self.shape[0], rows):
            yield self.read(start=start, stop=min(start + rows, self.shape[0]))


@contextmanager
def opened(path: Path) -> Iterator[File]:
    """The file, to be read. :class:`DamageError` for what is no HDF5 file, or a cut one."""
    if not is_hdf5(path):  # a pipe would hold libhdf5 up for ever
        raise DamageError(f"{path} is no HDF5 file, or is cut off: get it anew")
    with _whole(str(path)):
        file = library().File(path, "r", locking=False, rdcc_nbytes=_CACHE)
    with file:
        yield File(file, path, path.stat().st_size)


class File:
    """An open HDF5 file."""

    def __init__(self, file: Any, path: Path, size: int):
        self._file, self.path, self.size = file, path, size
        self._counted: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        """Is there something of that name in the file itself?"""
        try:
            with _whole(f"{self.path}: {name!r}"):
                self._open(name)
        except MismatchError:
            return False
        return True

    def dataset(self, name: str, most_chunk: int = _MOST_CHUNK) -> Dataset:
        """The dataset of that name, which is whole and in this file.

        Raises:
            MismatchError: there is none, or none that can be read here: one in another file, a virtual one, with a filter
                of its own, of what are no numbers and no text, or with chunks of more than ``most_chunk`` bytes.
            DamageError: it declares more than the file holds.
        """
        with _whole(f"{self.path}: {name!r}"):
            return self._dataset(name, most_chunk)

    def _dataset(self, name: str, most_chunk: int) -> Dataset:
        h5py, where = library(), f"{self.path}"
        id = self._open(name)
        if not isinstance(id, h5py.h5d.DatasetID):
            raise MismatchError(f"{where}: {name!r} is no dataset{self._known()}")
        made = id.get_create_plist()
        if made.get_layout() == h5py.h5d.VIRTUAL or made.get_external_count():
            raise MismatchError(
                f"{where}: the values of {name!r} lie in other files, which are not opened: copy it into one file, such as "
                "with h5repack"
            )
        dtype, text = self._type(name, id)
        if id.shape is None:
            raise MismatchError(f"{where}: {name!r} holds nothing")
        shape = tuple(int(n) for n in id.shape)
        self._require_whole(name, id, made, shape, dtype, most_chunk)
        return Dataset(name, shape, dtype, text, where, h5py.Dataset(id))

    def names(self) -> list[str]:
        """Its datasets, at most some; what lies behind links is left out."""
        h5py = library()
        found: list[str] = []
        waiting, looked = deque([(b"/", 0)]), 0
        with _whole(str(self.path)):
            while waiting and len(found) < _SHOWN:
                path, depth = waiting.popleft()
                group = h5py.h5g.open(self._file.id, path)
                for raw in group:
                    looked += 1
                    if looked > _LOOKED or group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
                        continue
                    here, name = h5py.h5o.open(group, raw), path.rstrip(b"/") + b"/" + raw
                    if isinstance(here, h5py.h5d.DatasetID):
                        found.append(name.decode(errors="replace"))
                    elif isinstance(here, h5py.h5g.GroupID) and depth < _DEPTH:
                        waiting.append((name, depth + 1))
        return found[:_SHOWN]

    def _known(self) -> str:
        names = self.names()
        return f" (there are {', '.join(names)})" if names else " (there are no datasets)"

    def _open(self, name: str) -> Any:
        """The object of that name, going along hard links only: others may leave the file."""
        h5py = library()
        here = h5py.h5g.open(self._file.id, b"/")
        for part in name.strip("/").split("/"):
            raw = part.encode()
            if not isinstance(here, h5py.h5g.GroupID) or not here.links.exists(raw):
                raise MismatchError(f"{self.path} has no {name!r}{self._known()}")
            if here.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
                raise MismatchError(
                    f"{self.path}: {name!r} is a link, which is not followed: name the dataset itself, or copy it into the "
                    "file"
                )
            here = h5py.h5o.open(here, raw)
        return here

    def _type(self, name: str, id: Any) -> tuple[np.dtype, bool]:
        h5py = library()
        try:
            dtype = id.dtype
        except (TypeError, ValueError, NotImplementedError) as e:
            raise MismatchError(
                f"{self.path}: the number type of {name!r} is not known here: {_said(e)}"
            ) from None
        text = h5py.check_string_dtype(dtype) is not None
        if dtype.kind not in "fiu" and not text:
            raise MismatchError(
                f"{self.path}: {name!r} holds {_kind(dtype)}, and numbers or text are read: save it as a plain array"
            )
        return dtype, text

    def _require_whole(
        self, name: str, id: Any, made: Any, shape: tuple[int, ...], dtype: np.dtype, most_chunk: int
    ) -> None:
        """Refuse what would become more than the file can hold."""
        h5py, where = library(), f"{self.path}: {name!r}"
        declared = math.prod(shape) * dtype.itemsize
        codes = [made.get_filter(i)[0] for i in range(made.get_nfilters())]
        for code in codes:
            if code not in _COMPRESSING | _OTHERS:
                raise MismatchError(
                    f"{where} is compressed with the filter number {code}, and {', '.join(_COMPRESSING.values())} are read "
                    "here: save it again with gzip, such as with h5repack -f GZIP=1"
                )
        compressing = [code for code in codes if code in _COMPRESSING]
        if len(compressing) > 1:
            raise MismatchError(f"{where} is compressed twice: save it again with gzip alone")
        stored = id.get_storage_size()
        self._counted[name] = stored
        whole = declared <= stored * (_DEFLATE if compressing else 1)
        if made.get_layout() == h5py.h5d.CHUNKED:
            chunk = made.get_chunk()
            if math.prod(chunk) * dtype.itemsize > most_chunk:
                raise MismatchError(
                    f"{where} has chunks of {math.prod(chunk) * dtype.itemsize:,} bytes, and up to {most_chunk:,} are read: "
                    "save it with smaller ones"
                )
            there = math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
            whole = whole and id.get_num_chunks() == there
        if not whole or sum(self._counted.values()) > self.size:
            raise DamageError(
                f"{where} declares {declared:,} bytes, and the file of {self.size:,} does not hold as many: it was not "
                "written to its end, or was made to harm"
            )


def _kind(dtype: np.dtype) -> str:
    h5py = library()
    if h5py.check_vlen_dtype(dtype) is not None:
        return "lists of varying length"
    if h5py.check_ref_dtype(dtype) is not None:
        return "references"
    return {"O": "objects", "V": "records", "c": "complex numbers", "b": "truth values"}.get(
        dtype.kind, str(dtype)
    )


def _said(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
