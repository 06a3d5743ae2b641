"""Caches of an enemy, for tests of readers, ours and yours: they lie, and their digests are right.

``HOSTILE[name].make(copy)`` turns a copy of a finished cache into one; see :class:`Attack`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from softcache import cache as caches
from softcache import manifest as m
from softcache import spec
from softcache.documents import read_receipt
from softcache.errors import DamageError, MismatchError, SoftcacheError
from softcache.parts import identity_file
from softcache.zarrfile import Array

Change = Callable[[dict[str, Any]], object]


def sign(path: Path, change: Change = lambda value: None) -> None:
    """Make every digest of a finished cache right again: receipts, tables, constants and manifest.

    Change its shards and constants before that, in place; ``change`` changes the values of the manifest.
    """
    cache = caches.open(path)
    value = json.loads((path / m.MANIFEST).read_bytes())
    for part, sealed in zip(cache.parts, (value, *value.get("parts", ())), strict=True):
        receipts = []
        for block in part.grid.blocks():
            receipt, _ = read_receipt(cache.store, part, block)
            files = [_entry(path / array.file(block.view, block.index)) for array in part.arrays]
            raw = receipt.model_copy(update={"files": files}).signed().to_bytes()
            (path / part.receipt(block)).write_bytes(raw)
            receipts.append((m.Receipt.model_validate_json(raw), raw))
        (path / part.table_file).write_bytes(m.pack_table(receipts))
        sealed["files"] = _entry(path / part.table_file).model_dump()
        for name, stored in sealed["constants"].items():
            stored |= _entry(path / m.Constant(**stored).array(name).file()).model_dump()
    change(value)
    for number, sealed in enumerate([value, *value.get("parts", ())]):
        raw = spec.canonical_json(sealed["identity"])
        sealed["identity_file"] = {"sha256": spec.digest(raw), "bytes": len(raw)}
        (path / identity_file(number)).write_bytes(raw)
    value.pop("digest", None)
    signed = value | {"digest": spec.digest(spec.canonical_json(value))}
    (path / m.MANIFEST).write_bytes(spec.canonical_json(signed))


def _entry(path: Path) -> m.Entry:
    data = path.read_bytes()
    return m.Entry(sha256=spec.digest(data), bytes=len(data))


# -- attacks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """What a cache may try, and what must come of it.

    Attributes:
        make: does it to a copy of a finished cache; those on rows want a target of large rows (``int8`` of a map), one of
            ``argmax``, and no ops on pixels.
        tries: what for, in words.
        error: what is raised, None where nothing may happen at all.
        step: when: on ``open``, by asking for the ``ids``, to ``read`` every target of every sample, to render the
            ``views``, to ``verify`` (which then names the file instead, if error is None).
    """

    make: Callable[[Path], object]
    tries: str
    error: type[SoftcacheError] | None = DamageError
    step: str = "open"


def _signed(*keys: Any, to: Any) -> Callable[[Path], None]:
    """A value of the manifest, and digests that fit."""

    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return lambda path: sign(path, change)


def _renamed(path: Path, name: str, *keys: str) -> None:
    """One of a mapping in the manifest under another name."""

    def change(value: Any) -> None:
        for key in keys:
            value = value[key]
        value[name] = value.pop(max(value))

    sign(path, change)


def _text(make: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Other text in the manifest's place."""
    return lambda path: (path / m.MANIFEST).write_bytes(make((path / m.MANIFEST).read_bytes()))


def _linked(path: Path, name: str) -> None:
    """Moved out of the cache, and a link there."""
    aside = path.with_name(f"{path.name}-{name.replace('/', '-')}")
    (path / name).rename(aside)
    (path / name).symlink_to(aside)


def _many_targets(path: Path) -> None:
    def change(value: Any) -> None:
        targets = value["identity"]["targets"]
        one = targets[max(targets)]
        targets.update({f"t{i}": one for i in range(5_000)})

    sign(path, change)


def _numbers(path: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Numbers of all files of a small array, their checksums and all digests right."""
    cache = caches.open(path)
    array = cache.arrays[name] if name in cache.arrays else cache.constants[name].array(name)
    files = {array.file()} if array.lead == 1 else {array.file(b.view, b.index) for b in cache.grid.blocks()}
    for file in files:
        body = (path / file).read_bytes()[:-4]
        values = np.frombuffer(body, array.dtype).reshape(array.rows, *array.row).copy()
        change(values)
        (path / file).write_bytes(values.tobytes() + _crc(values.tobytes()))
    sign(path)


def _crc(data: bytes) -> bytes:
    return struct.pack("<I", google_crc32c.value(data))


def _overlapping(offsets: np.ndarray) -> None:
    """Every second id is all of the text: of a few megabytes they would be terabytes."""
    offsets[1::2], offsets[2::2] = offsets[-1], 0


def _frames(make: Callable[[int], bytes]) -> Callable[[Path], None]:
    """Every row of a sharded array is the frame that ``make`` gives for so many bytes."""

    def attack(path: Path) -> None:
        cache = caches.open(path)
        array = next(a for a in cache.arrays.values() if a.big)
        body = make(array.row_bytes)
        _shards(path, cache, array, body + _crc(body), 0, len(body) + 4)
        sign(path)

    return attack


def _outside(path: Path) -> None:
    cache = caches.open(path)
    _shards(path, cache, next(a for a in cache.arrays.values() if a.big), b"", 1 << 62, 1 << 62)
    sign(path)


def _shards(path: Path, cache: caches.Cache, array: Array, data: bytes, offset: int, size: int) -> None:
    index = struct.pack("<QQ", offset, size) * array.rows
    for block in cache.grid.blocks():
        (path / array.file(block.view, block.index)).write_bytes(data + index + _crc(index))


def _frame(size: int, *blocks: tuple[int, bool]) -> bytes:
    """A zstd frame that says it holds ``size`` bytes, of runs (RFC 8878, 3.1.1.2): each 3 bytes and one for its length."""
    runs = [struct.pack("<I", length << 3 | 1 << 1 | last)[:3] + b"A" for length, last in blocks]
    return b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"".join(runs)


def _endless_part(path: Path) -> None:
    """A part that is said to have begun, of more files than there are atoms, and one file to look for among them."""
    identity = json.loads((path / identity_file(0)).read_bytes())
    identity["grid"].update(first=identity["grid"]["views"], views=1 << 20, block_rows=1, samples=1 << 40)
    (path / "parts" / "1").mkdir(parents=True)
    (path / identity_file(1)).write_bytes(spec.canonical_json(identity))
    (path / "parts" / "1" / "x").write_bytes(b"")


def _swapped(path: Path) -> None:
    """The rows of two blocks change places: whole, and wrong."""
    cache = caches.open(path)
    for array in cache.arrays.values():
        if array.path.startswith("targets/"):
            a, b = (path / array.file(0, index) for index in (0, 1))
            raw = a.read_bytes()
            a.write_bytes(b.read_bytes())
            b.write_bytes(raw)
    sign(path)


def _huge_view(geometry: np.ndarray) -> None:
    geometry[..., 2:4] = 32767


def _no_view(geometry: np.ndarray) -> None:
    geometry[..., 2] = 0


_RUN = 1 << 17

HOSTILE: dict[str, Attack] = {
    "deep JSON": Attack(_text(lambda raw: b"[" * m.MAX_JSON), "to overflow the stack"),
    "wide JSON": Attack(
        _text(lambda raw: raw.replace(b'"invalid":[', b'"invalid":[' + b"-1," * 2_700_000 + b"-1")),
        "gigabytes of messages, one for each of millions of wrong values",
    ),
    "many keys": Attack(
        _text(lambda raw: raw[:-3] + b"," + b",".join(b'"%d":1' % i for i in range(700_000)) + b"}"),
        "likewise",
    ),
    "long JSON": Attack(_text(lambda raw: raw.ljust(m.MAX_JSON + 1)), "memory, by a manifest of any size"),
    "a key twice": Attack(
        _text(lambda raw: raw.replace(b'"format":', b'"format":"softcache","format":')),
        "to be read in two ways by two programs",
    ),
    "UTF-16": Attack(_text(lambda raw: raw.decode().encode("utf-16")), "likewise"),
    "a long number": Attack(
        _text(lambda raw: raw.replace(b'"seed":', b'"seed":' + b"9" * 100_000)), "quadratic time"
    ),
    "half a surrogate": Attack(
        _text(lambda raw: raw.replace(b'"spec":"', b'"spec":"\\ud800')), "text that cannot be printed"
    ),
    "not a number": Attack(
        _text(lambda raw: raw.replace(b'"top1":', b'"top1":NaN,"x":')), "JSON that is none"
    ),
    "a newer format": Attack(_signed("identity", "version", to=[99, 0]), "to be misread", MismatchError),
    "a target with a path": Attack(
        lambda path: _renamed(path, "../../../etc", "identity", "targets"), "to have files outside read"
    ),
    "a constant with a path": Attack(
        lambda path: _renamed(path, "../../etc/passwd", "constants"), "likewise"
    ),
    "a constant among shards": Attack(
        lambda path: _renamed(path, "targets/extra/value", "constants"), "two arrays of one name"
    ),
    "a constant inside another": Attack(
        lambda path: _renamed(path, "ids/bytes/more", "constants"), "an array that is a group too"
    ),
    "a constant of another part": Attack(
        lambda path: _renamed(path, "parts/7/constants/x", "constants"), "likewise"
    ),
    "many axes": Attack(_signed("constants", "ids/bytes", "shape", to=[1] * 100), "an error of numpy's"),
    "a linked manifest": Attack(lambda path: _linked(path, m.MANIFEST), "to have a file outside read"),
    "a linked folder": Attack(lambda path: _linked(path, "ids"), "likewise", step="ids"),
    "a linked folder above": Attack(lambda path: _linked(path, "targets"), "likewise", step="read"),
    "a linked file": Attack(lambda path: _linked(path, "ids/bytes/c.0"), "likewise", step="ids"),
    "a huge grid": Attack(
        lambda path: sign(
            path, lambda v: v["identity"]["grid"].update(samples=1 << 40, views=1 << 20, block_rows=1)
        ),
        "memory for what is not there",
        step="ids",
    ),
    "a grid that could be": Attack(
        _signed("identity", "grid", "samples", to=1 << 24),
        "likewise, small enough to be kept in memory",
        step="ids",
    ),
    "huge rows": Attack(
        lambda path: sign(
            path,
            lambda v: [
                t.update(shape=[1 << 24] * len(t["shape"])) for t in v["identity"]["targets"].values()
            ],
        ),
        "likewise",
    ),
    "thousands of targets": Attack(_many_targets, "time"),
    "code for a codec": Attack(
        lambda path: sign(
            path,
            lambda v: [t.update(codec="__import__('os').abort()") for t in v["identity"]["targets"].values()],
        ),
        "to be run",
        MismatchError,
    ),
    "a nested codec": Attack(
        lambda path: sign(
            path, lambda v: [t.update(codec="f16(" + "(" * 2000) for t in v["identity"]["targets"].values()]
        ),
        "to overflow the stack",
        MismatchError,
    ),
    "a module for a teacher": Attack(
        _signed("identity", "teacher", "name", to="antigravity:fly"), "to be imported", None, "all"
    ),
    "a terminal's commands": Attack(
        _signed("identity", "recipe", "spec", to="\x1b]0;owned\x07\x1b[2J"), "to be shown", None, "all"
    ),
    "views by no renderer": Attack(
        _signed("identity", "recipe", "render", to={}), "an error that is none of ours", MismatchError, "pair"
    ),
    "invalid twice": Attack(_signed("invalid", to=[1, 1]), "to be counted wrong"),
    "overlapping ids": Attack(
        lambda path: _numbers(path, "ids/offsets", _overlapping),
        "memory, by text that is used again and again",
        step="ids",
    ),
    "a row that outgrows its size": Attack(
        _frames(lambda size: _frame(size, *[(_RUN, False)] * 10_000, (1, True))),
        "a gigabyte out of 40 kB",
        step="read",
    ),
    "a row that claims a terabyte": Attack(
        _frames(lambda size: _frame(1 << 40, (size, True))),
        "memory before anything is decompressed",
        step="read",
    ),
    "a row that falls short": Attack(
        _frames(lambda size: _frame(size, (1, True))), "what was in memory before", step="read"
    ),
    "rows outside their file": Attack(_outside, "what lies behind it in memory", step="read"),
    "a class there is none of": Attack(
        lambda path: _numbers(path, "targets/logits/index", lambda index: index.fill(255)),
        "to index out of an array",
        step="read",
    ),
    "a view of no size": Attack(
        lambda path: _numbers(path, "view/geometry", _no_view), "a division by zero", step="views"
    ),
    "a view of a billion pixels": Attack(
        lambda path: _numbers(path, "view/geometry", _huge_view), "3 GB out of 14 bytes", step="views"
    ),
    "a part without end": Attack(
        _endless_part, "time, by names of files that might be there", None, "verify"
    ),
    "rows that changed places": Attack(_swapped, "wrong targets: only verify --live finds them", None, "all"),
}
