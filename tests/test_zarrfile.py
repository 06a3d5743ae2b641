"""Our files and zarr-python's are the same files; bytes that are not what was written are damage, never zeros."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import zstd

from softcache.errors import DamageError
from softcache.testing import DAMAGES, flip_bit
from softcache.zarrfile import (
    BIG_ROW,
    Array,
    Plain,
    Sharded,
    _content_size,
    group_metadata,
    groups,
    map_plain,
)

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float16", "float32"]
SAMPLES, BLOCK, VIEWS = 11, 4, 2  # the last file of a view is not full


def array_of(row: tuple[int, ...], dtype: str, samples: int = SAMPLES) -> Array:
    axes = ("view", "sample", *(f"axis_{i}" for i in range(len(row))))
    return Array("a/b", dtype, (VIEWS, samples, *row), (1, BLOCK, *row), axes)


def values_of(array: Array, seed: int = 0) -> np.ndarray:
    """Random bits that are numbers, compressible in part."""
    rng = np.random.default_rng(seed)
    if np.dtype(array.dtype).kind == "f":
        return rng.normal(0, 100, array.shape).astype(array.dtype)
    info = np.iinfo(array.dtype)
    values = rng.integers(info.min, info.max, array.shape, array.dtype, endpoint=True)
    values[..., ::2] = 3 if array.row else values[..., ::2]
    return values


def cells(array: Array):
    """(view, block, slice of the samples) of each file."""
    views, samples = array.shape[:2]
    for view in range(views):
        for index in range(-(-samples // array.chunk[1])):
            yield view, index, slice(index * array.chunk[1], (index + 1) * array.chunk[1])


def write(root: Path, array: Array, values: np.ndarray) -> None:
    for name in groups([array]):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "zarr.json").write_bytes(group_metadata())
    (root / array.path).mkdir()
    (root / array.path / "zarr.json").write_bytes(array.metadata())
    for view, index, rows in cells(array):
        (root / array.file(view, index)).write_bytes(array.encode(values[view, rows]))


def read(root: Path, array: Array) -> np.ndarray:
    """Everything, through our reader."""
    out = np.empty(array.shape, array.dtype)
    for view, index, rows in cells(array):
        place, path = out[view, rows], root / array.file(view, index)
        if array.big:
            shard = Sharded(path, array)
            for i in range(len(place)):
                shard.read(i, place[i])
        else:
            place[:] = map_plain(path, array)[: len(place)]
    return out


def rows_of(dtype: str) -> list[tuple[int, ...]]:
    size = np.dtype(dtype).itemsize
    return [(), (3,), (BIG_ROW // size - 1,), (BIG_ROW // size,), (2, 5, 1024 // size)]


CASES = [pytest.param(dtype, row, id=f"{dtype}-{row}") for dtype in DTYPES for row in rows_of(dtype)]
every_case = pytest.mark.parametrize(("dtype", "row"), CASES)


# -- zarr-python is the oracle ---------------------------------------------------------------------------------


@every_case
def test_zarr_python_reads_what_we_write(dtype: str, row: tuple[int, ...], tmp_path: Path):
    array = array_of(row, dtype)
    values = values_of(array)
    write(tmp_path, array, values)
    theirs = zarr.open_group(tmp_path, mode="r")["a/b"]
    assert isinstance(theirs, zarr.Array)
    assert theirs.dtype == np.dtype(dtype) and theirs.metadata.dimension_names == array.axes
    assert np.asarray(theirs[:]).tobytes() == values.tobytes()
    assert read(tmp_path, array).tobytes() == values.tobytes()


@every_case
def test_we_read_what_zarr_python_writes(dtype: str, row: tuple[int, ...], tmp_path: Path):
    array = array_of(row, dtype)
    values = values_of(array)
    (tmp_path / array.path).mkdir(parents=True)
    (tmp_path / array.path / "zarr.json").write_bytes(array.metadata())
    zarr.open_array(tmp_path / array.path, mode="r+")[:] = values
    assert read(tmp_path, array).tobytes() == values.tobytes()


@pytest.mark.parametrize("row", [(4,), (4, 1024)])
def test_the_row_size_alone_decides_how_a_file_looks(row: tuple[int, ...]):
    codecs = json.loads(array_of(row, "uint8").metadata())["codecs"]
    sharded = row == (4, 1024)
    assert [c["name"] for c in codecs] == (["sharding_indexed"] if sharded else ["bytes", "crc32c"])
    assert array_of(row, "uint8").big == sharded


def test_only_codecs_of_the_zarr_specification_are_used():
    text = array_of((64, 64), "float32").metadata().decode()
    names = {c["name"] for c in json.loads(text)["codecs"][0]["configuration"]["codecs"]}
    assert names == {"bytes", "zstd", "crc32c"}


@pytest.mark.parametrize("shape", [(5,), (1,), (3, 8, 8, 3), (0,), (0, 7)])
def test_a_constant_is_one_plain_file(shape: tuple[int, ...], tmp_path: Path):
    array = Array("ids/x", "int64", shape, shape, tuple(f"axis_{i}" for i in range(len(shape))), lead=1)
    values = np.arange(np.prod(shape)).reshape(shape)
    path = tmp_path / "file"
    path.write_bytes(array.encode(values))
    assert not array.big
    assert np.array_equal(map_plain(path, array).reshape(shape), values)


@pytest.mark.parametrize("row", [(3,), (4096,)])
def test_the_same_rows_make_the_same_bytes(row: tuple[int, ...]):
    array = array_of(row, "uint8")
    values = values_of(array)[0, :BLOCK]
    assert array.encode(values) == array.encode(np.asfortranarray(values)) == array.encode(values.copy())


def test_big_endian_rows_are_turned(tmp_path: Path):
    array = array_of((3,), "int32")
    values = values_of(array)[0, :BLOCK]
    assert array.encode(values.astype(">i4")) == array.encode(values)


@pytest.mark.parametrize("shape", [(BLOCK + 1, 3), (BLOCK, 4), (BLOCK,)])
def test_rows_that_do_not_fit_are_no_file(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="do not fit"):
        array_of((3,), "uint8").encode(np.zeros(shape, np.uint8))


def test_mapped_rows_cannot_be_written_to(tmp_path: Path):
    array = array_of((3,), "uint8")
    (tmp_path / "f").write_bytes(array.encode(values_of(array)[0, :BLOCK]))
    with pytest.raises(ValueError, match="read-only"):
        map_plain(tmp_path / "f", array)[0] = 1


def test_an_unknown_number_type_is_damage():
    with pytest.raises(DamageError, match="object"):
        array_of((3,), "object")


# -- damage ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "sharded", "edge"])
def one(request, tmp_path: Path) -> tuple[Path, Array, np.ndarray]:
    """One file, its array, and the rows in it."""
    array = array_of((5,) if request.param == "plain" else (4096,), "uint8")
    rows = values_of(array, seed=1)[0, : 3 if request.param == "edge" else BLOCK]
    path = tmp_path / "file"
    path.write_bytes(array.encode(rows))
    return path, array, rows


def rows_in(path: Path, array: Array, count: int) -> np.ndarray:
    """The rows of one file, into a buffer that held something else before."""
    if not array.big:
        return map_plain(path, array)[:count].copy()
    out, shard = np.full((count, *array.row), 0xEE, array.dtype), Sharded(path, array)
    for i in range(count):
        shard.read(i, out[i])
    return out


def test_an_undamaged_file_gives_its_rows(one):
    path, array, rows = one
    assert np.array_equal(rows_in(path, array, len(rows)), rows)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_damage(one, damage: str):
    path, array, rows = one
    DAMAGES[damage](path)
    with pytest.raises(DamageError, match="file"):
        rows_in(path, array, len(rows))


def test_one_flipped_bit_anywhere_is_damage(one):
    path, array, rows = one
    whole, bits = path.read_bytes(), 8 * path.stat().st_size
    ends = [*range(min(bits, 40)), *range(max(0, bits - 640), bits, 5)]  # the index and the checksums
    for bit in {*range(0, bits, bits // 100 + 1), *ends}:
        flip_bit(path, bit)
        with pytest.raises(DamageError):
            rows_in(path, array, len(rows))
        path.write_bytes(whole)


def test_a_file_cut_anywhere_is_damage(one):
    path, array, rows = one
    whole = path.read_bytes()
    for size in {*range(min(len(whole), 90)), len(whole) // 2, len(whole) - 68, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(DamageError):
            rows_in(path, array, len(rows))


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing"])
def test_what_is_no_file_is_damage_and_holds_nobody_up(one, kind: str):
    path, array, rows = one
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "nothing": lambda: None}[kind]()
    with pytest.raises(DamageError, match="file"):
        rows_in(path, array, len(rows))


# -- a file made by an enemy: every checksum is right ----------------------------------------------------------


def with_crc(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


ROW = np.arange(BIG_ROW, dtype=np.uint8)


def enemy(tmp_path: Path, bodies: list[bytes], index: list[tuple[int, int]] | None = None) -> Sharded:
    """A shard of these inner chunks (each gets its checksum), and this index in place of the true one."""
    parts = [with_crc(b) for b in bodies]
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    entries = index or [(s, len(p)) for s, p in zip(starts, parts, strict=False)]
    entries = entries + [(2**64 - 1, 2**64 - 1)] * (BLOCK - len(entries))
    path = tmp_path / "enemy"
    path.write_bytes(b"".join(parts) + with_crc(np.array(entries, "<u8").tobytes()))
    return Sharded(path, array_of((BIG_ROW,), "uint8"))


def packed(size: int) -> bytes:
    return bytes(zstd.compress(np.resize(ROW, size), 1))


def frame_without_size(data: bytes) -> bytes:
    """A zstd frame of one raw block that does not say how much it holds."""
    return b"\x28\xb5\x2f\xfd\x00\x58" + struct.pack("<I", len(data) << 3 | 1)[:3] + data


def test_an_honest_shard_made_this_way_is_read(tmp_path: Path):
    out = np.full(BIG_ROW, 0xEE, np.uint8)
    enemy(tmp_path, [packed(BIG_ROW)]).read(0, out)
    assert np.array_equal(out, ROW)


@pytest.mark.parametrize(
    "body",
    [
        packed(BIG_ROW - 1),
        packed(BIG_ROW // 2),
        packed(1),
        packed(BIG_ROW + 1),
        packed(50_000_000),
        packed(BIG_ROW // 2) * 2,
        packed(BIG_ROW) * 2,
        packed(BIG_ROW) + b"more",
        packed(BIG_ROW)[:-1],
        packed(BIG_ROW)[:5],
        packed(BIG_ROW)[:7],
        frame_without_size(ROW.tobytes()),
        frame_without_size(ROW[:100].tobytes()),
        b"\x50\x2a\x4d\x18" + struct.pack("<I", 8) + bytes(8),
        ROW.tobytes(),
        b"x",
        b"",
    ],
    ids=lambda b: f"{len(b)}-{b[:6].hex()}",
)
def test_a_row_of_another_length_is_damage_and_no_bomb(tmp_path: Path, body: bytes):
    shard = enemy(tmp_path, [body])
    with pytest.raises(DamageError, match="row 0"):
        shard.read(0, np.full(BIG_ROW, 0xEE, np.uint8))


@pytest.mark.parametrize(
    "entry",
    [
        (0, 2**63),
        (2**63, 2**63),
        (2**64 - 1, 10),
        (0, 2**64 - 1),
        (10**9, 50),
        (0, 0),
        (0, 4),
        (0, 3),
        (1, 40),
        (0, 10**6),
    ],
    ids=str,
)
def test_an_index_entry_that_points_elsewhere_is_damage(tmp_path: Path, entry: tuple[int, int]):
    shard = enemy(tmp_path, [packed(BIG_ROW)], [entry])
    with pytest.raises(DamageError, match="row 0"):
        shard.read(0, np.empty(BIG_ROW, np.uint8))


def test_an_entry_may_not_reach_into_the_index(tmp_path: Path):
    body = packed(BIG_ROW)
    shard = enemy(tmp_path, [body], [(0, len(body) + 4 + 16)])
    with pytest.raises(DamageError, match="outside"):
        shard.read(0, np.empty(BIG_ROW, np.uint8))


def test_an_absent_row_is_damage_and_not_zeros(tmp_path: Path):
    """Where zarr-python gives the fill value."""
    shard = enemy(tmp_path, [packed(BIG_ROW)])
    with pytest.raises(DamageError, match="row 1 is missing"):
        shard.read(1, np.empty(BIG_ROW, np.uint8))


@given(st.integers(1, 2_000_000))
def test_the_size_in_a_frame_is_read_as_zstd_writes_it(size: int):
    assert _content_size(memoryview(packed(size))) == size


@given(st.binary(max_size=30))
def test_no_bytes_break_the_reading_of_a_frame_s_size(data: bytes):
    for frame in (data, b"\x28\xb5\x2f\xfd" + data):
        assert (_content_size(memoryview(frame)) or 0) >= 0


# -- what becomes of files that are open -----------------------------------------------------------------------


@pytest.fixture(params=["plain", "sharded"])
def wide(request, tmp_path: Path) -> tuple[Path, Array, np.ndarray]:
    """A file of many pages."""
    row, rows = ((1000,), 500) if request.param == "plain" else ((8192,), 60)
    array = Array("a/b", "uint8", (1, rows, *row), (1, rows, *row), ("view", "sample", "axis_0"))
    values = np.random.default_rng(0).integers(0, 256, (rows, *row), np.uint8)
    (tmp_path / "file").write_bytes(array.encode(values))
    return tmp_path / "file", array, values


def last_row(path: Path, array: Array):
    """Opens a file; what it returns reads its last row."""
    if array.big:
        shard, out = Sharded(path, array), np.empty(array.row, array.dtype)
        return lambda: (shard.read(array.rows - 1, out), out)[1]
    plain = Plain(path, array)
    plain.rows()  # it is mapped from now on
    return lambda: plain.rows()[-1]


def test_a_file_whose_name_is_gone_is_read_on(wide):
    path, array, values = wide
    read = last_row(path, array)
    path.unlink()
    assert np.array_equal(read(), values[-1])


@pytest.mark.parametrize("left", [0, 5000])
def test_a_file_that_is_cut_while_it_is_read_is_told(wide, left: int):
    """In a process of its own: to read on from a mapping would end it by a signal."""
    path, array, _ = wide
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            read = last_row(path, array)
            os.truncate(path, left)
            try:
                read()
            except DamageError as e:
                status = 0 if f"{path} became shorter" in str(e) and "softcache repair" in str(e) else 3
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_rows_that_are_read_and_mapped_are_the_same(tmp_path: Path):
    array = array_of((3,), "int16")
    values = values_of(array)[0, :BLOCK]
    (tmp_path / "f").write_bytes(array.encode(values))
    plain = Plain(tmp_path / "f", array)
    assert np.array_equal(plain.all(), values) and np.array_equal(plain.rows(), values)
