"""Arrays as people have them: HDF5, NPZ and NPY files, read in order and some megabytes at a time.

Nothing is ever unpickled, no array of Python objects is read, and what a file declares is held against what it stores before
room is made for it.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from softcache.errors import DamageError, MismatchError, SoftcacheError, SourceError, SpecError, suggest
from softcache.exchange import h5file

_DEFLATE = 1032
_STORED, _DEFLATED = 0, 8
_TEXTS = 256  # strings of any length that are read at a time
_LONGEST = 4096  # bytes of an id


class Stored(Protocol):
    """An array in a file. ``text``: of strings; else of whole or floating-point numbers."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def text(self) -> bool: ...
    def pieces(self) -> Iterator[np.ndarray]: ...


@dataclass(frozen=True)
class Arrays:
    """What is in a file. ``find`` raises :class:`MismatchError` where there is no such array, or none that can be read."""

    where: str
    names: list[str]
    find: Callable[[str], Stored]


@contextmanager
def opened(path: str | Path) -> Iterator[Arrays]:
    """The arrays of a file; what it is, its first bytes say.

    Raises :class:`SourceError` where there is none, :class:`DamageError` for one that is cut, :class:`SpecError` for one of
    another kind.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e.strerror}") from e
    if head.startswith(b"\x93NUMPY"):
        with path.open("rb") as file:
            one = _header(file, path.stem, str(path), path.stat().st_size)
            yield Arrays(
                str(path), [one.name], lambda name: one if name == one.name else _none(path, name, [one.name])
            )
    elif head.startswith(b"PK"):
        with _zip(path) as arrays:
            yield arrays
    elif h5file.is_hdf5(path):
        with h5file.opened(path) as file:
            yield Arrays(str(path), file.names(), file.dataset)
    else:
        raise SpecError(
            f"{path} is no HDF5, NPZ or NPY file (pickles and .pt files are not read: save the arrays with numpy.savez)"
        )


def _none(where: Path, name: str, names: list[str]) -> Any:
    there = f" (there are {', '.join(names[:40])})"
    raise MismatchError(f"{where} has no array {name!r}{suggest(name, names)}{there}")


# -- NPY and NPZ -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Npy:
    """An array whose file stands behind its header; it is read once."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    text: bool
    where: str
    _file: IO[bytes]
    _start: int

    def pieces(self) -> Iterator[np.ndarray]:
        row = math.prod(self.shape[1:])
        step = max(1, h5file.PIECE // max(1, row * self.dtype.itemsize))
        try:
            self._file.seek(self._start)
            for start in range(0, self.shape[0], step):
                rows = min(step, self.shape[0] - start)
                data = self._file.read(rows * row * self.dtype.itemsize)
                if len(data) != rows * row * self.dtype.itemsize:
                    raise DamageError(
                        f"{self.where}: {self.name!r} ends before its last row: is the file whole?"
                    )
                yield np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])
        except (OSError, zipfile.BadZipFile, EOFError, ValueError, zlib.error) as e:
            raise DamageError(f"{self.where}: {self.name!r} cannot be read: {e}; is the file whole?") from e


def _header(file: IO[bytes], name: str, where: str, size: int) -> _Npy:
    """What an NPY file of ``size`` bytes says of itself, refused where that is not what follows."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"a header of version {version}")
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
        start = file.tell()
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, zlib.error) as e:
        raise DamageError(f"{where}: {name!r} is no array of NumPy: {str(e).splitlines()[0]}") from e
    if dtype.kind not in "fiuUS":
        what = "Python objects, which would have to be unpickled" if dtype.hasobject else f"{dtype}"
        raise MismatchError(
            f"{where}: {name!r} holds {what}: save numbers as float32 or float16 arrays, and names as np.array(names)"
        )
    if fortran and len(shape) > 1:
        raise MismatchError(f"{where}: {name!r} is in Fortran order: save np.ascontiguousarray of it")
    if any(n < 0 for n in shape) or start + math.prod(shape) * dtype.itemsize != size:
        raise DamageError(
            f"{where}: {name!r} declares {dtype} {shape}, {math.prod(shape) * dtype.itemsize:,} bytes, and has "
            f"{size - start:,}: it was not written to its end, or was made to harm"
        )
    return _Npy(name, tuple(shape), dtype, dtype.kind in "US", where, file, start)


@contextmanager
def _zip(path: Path) -> Iterator[Arrays]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        raise DamageError(f"{path} cannot be opened as NPZ: {e}; is it whole?") from e
    with archive:
        members = archive.infolist()
        names = [one.filename.removesuffix(".npy") for one in members]
        if len(set(names)) < len(names):
            raise DamageError(
                f"{path} has two arrays of one name, {next(n for n in names if names.count(n) > 1)!r}"
            )
        if sum(one.compress_size for one in members) > path.stat().st_size:
            raise DamageError(f"{path} declares more than it holds: it was made to harm")

        def find(name: str) -> Stored:
            if name not in names:
                _none(path, name, names)
            one = members[names.index(name)]
            if one.compress_type not in (_STORED, _DEFLATED) or one.flag_bits & 1:
                raise MismatchError(f"{path}: {name!r} is not as numpy.savez writes it: save it again")
            if one.file_size > max(one.compress_size, 64) * _DEFLATE:
                raise DamageError(
                    f"{path}: {name!r} declares {one.file_size:,} bytes of {one.compress_size:,}"
                )
            try:
                file = archive.open(one)
            except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError) as e:
                raise DamageError(f"{path}: {name!r} cannot be opened: {e}") from e
            return _header(file, name, str(path), one.file_size)

        yield Arrays(str(path), names, find)


# -- text --------------------------------------------------------------------------------------------------


def texts(stored: Stored, where: str) -> list[str]:
    """The strings, or whole numbers as such, of an array along one axis. Raises :class:`SoftcacheError`."""
    if len(stored.shape) != 1 or not (stored.text or stored.dtype.kind in "iu"):
        raise MismatchError(
            f"{where}: {stored.name!r} is {stored.dtype} {stored.shape}; ids are text, or whole numbers, along one axis"
        )
    if stored.text and stored.dtype.kind != "O" and stored.dtype.itemsize > 4 * _LONGEST:
        raise MismatchError(
            f"{where}: {stored.name!r} holds text of {stored.dtype.itemsize:,} bytes: are these ids?"
        )
    found: list[str] = []
    for rows in _short_pieces(stored):
        for value in rows.tolist():
            found.append(_decoded(value, f"{where}: {stored.name!r}, row {len(found)}"))
    return found


def _short_pieces(stored: Stored) -> Iterator[np.ndarray]:
    """Strings of any length few at a time: each may be as long as the file."""
    if isinstance(stored, h5file.Dataset) and stored.dtype.kind == "O":
        for start in range(0, stored.shape[0], _TEXTS):
            yield stored.read(start=start, stop=start + _TEXTS)
    else:
        yield from stored.pieces()


def _decoded(value: str | bytes | int, where: str) -> str:
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as e:
        raise SoftcacheError(f"{where} is no UTF-8: {value!r:.80}") from e
    if len(text) > _LONGEST:
        raise SoftcacheError(f"{where} is {len(text):,} characters long: is this an id?")
    return text
