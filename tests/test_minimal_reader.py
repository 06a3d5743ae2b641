"""The page of the format is complete: a reader of 150 lines that was written from it alone reads what softcache reads."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache import codecs
from softcache.codecs import AttentionMap, HardLabels, Items, SparseLogits
from softcache.keyed import Permutation

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import minimal_reader as minimal

ROOT = Path(__file__).resolve().parents[1]
READER = ROOT / "tools" / "minimal_reader.py"
GOLDEN = [
    path for path in sorted((ROOT / "tests" / "golden").glob("*.*")) if path.name <= "1.2"
]  # whose codecs it knows
each = pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)


def parts(decoded: Any) -> dict[str, np.ndarray]:
    """What softcache decodes, by the names of the page's fields."""
    match decoded:
        case Items():
            return decoded.arrays()
        case AttentionMap():
            return {"spatial": decoded.spatial, "channel": decoded.channel}
        case SparseLogits():
            return {"index": decoded.index, "value": -decoded.value, "tail": -decoded.soft_mean}
        case HardLabels():
            return {"index": decoded.index}
        case _:
            return {"value": getattr(decoded, "values", decoded)}


def same(rows: list[dict[str, np.ndarray]], wanted: dict[str, np.ndarray]) -> None:
    assert all(row.keys() == wanted.keys() for row in rows)
    for name, values in wanted.items():
        np.testing.assert_array_equal(np.stack([row[name] for row in rows]), values, err_msg=name)


def test_it_is_short_and_imports_nothing_of_softcache():
    text = READER.read_text()
    assert len(text.splitlines()) <= 150
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in imports if isinstance(node, ast.ImportFrom)}
    allowed = {"hashlib", "json", "pathlib", "re", "sys"} | {"google_crc32c", "numcodecs", "numpy"}
    assert {name.split(".")[0] for name in names} <= allowed


@each
def test_it_reads_every_field_of_every_row(golden: Path):
    cache, mine = sc.open(golden / "cache"), minimal.Cache(golden / "cache")
    assert mine.manifest["digest"] == (golden / "digest").read_text().strip()
    assert mine.ids == list(cache.ids)
    assert {f: tuple(np.dtype(t).shape) for f, t in mine.fields.items()} == {
        f: a.row for f, a in cache.arrays.items()
    }
    samples = np.arange(cache.samples)
    folders = {path.rpartition("/")[0] for path in cache.arrays}
    assert folders == {"view", *(f"targets/{name}" for name in cache.targets)}
    for view in range(cache.views):
        for folder in sorted(folders):
            wanted = cache.reader.fields(folder, view, cache.grid.positions(samples))
            same([dict(mine.rows(f"{folder}/", view, sample)) for sample in range(cache.samples)], wanted)


@each
def test_it_decodes_every_target(golden: Path):
    cache, mine = sc.open(golden / "cache"), minimal.Cache(golden / "cache")
    assert mine.targets.keys() == cache.targets.keys()
    for view in range(cache.views):
        for name, decoded in cache.read(view, np.arange(cache.samples)).items():
            rows = [mine.target(name, view, sample) for sample in range(cache.samples)]
            same(rows, parts(decoded))
            assert all(row[f].dtype == "f4" for row in rows for f in row if f != "index")


@each
def test_it_reads_every_constant(golden: Path):
    cache, mine = sc.open(golden / "cache"), minimal.Cache(golden / "cache")
    assert "ids/bytes" in cache.constants
    for path in cache.constants:
        found = mine.constant(path)
        np.testing.assert_array_equal(found, cache.constant(path))
        assert found.dtype == cache.constant(path).dtype


@each
def test_it_knows_every_file_but_the_manifest_and_zarrs(golden: Path):
    folder = golden / "cache"
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    known = set(minimal.Cache(folder).files)
    assert known == {path for path in there if path != "softcache.json" and Path(path).name != "zarr.json"}


@each
def test_it_refuses_a_flipped_bit(golden: Path, tmp_path: Path):
    folder = tmp_path / "cache"
    shutil.copytree(golden / "cache", folder)
    mine = minimal.Cache(folder)
    for path in [f for f in mine.files if f.startswith("targets/") and "/c.1." in f]:
        whole = (folder / path).read_bytes()
        (folder / path).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(ValueError, match="damaged"):
            mine.file(path)
        (folder / path).write_bytes(whole)
    manifest = (folder / "softcache.json").read_bytes()
    (folder / "softcache.json").write_bytes(manifest.replace(b'"seed":0', b'"seed":1'))
    with pytest.raises(ValueError, match="damaged"):
        minimal.Cache(folder)


def test_a_crc_is_checked_too():
    data = (GOLDEN[0] / "cache" / "ids" / "bytes" / "c.0").read_bytes()
    assert minimal.unsealed(data) == data[:-4]
    with pytest.raises(ValueError, match="CRC"):
        minimal.unsealed(bytes([data[0] ^ 1]) + data[1:])


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 16, 17, 300])
def test_positions_are_those_of_any_size_and_key(samples: int):
    for key in (0, 7, -1, 2**40):
        wanted = Permutation(samples, "samples", key).forward(np.arange(samples))
        assert [minimal.position(i, samples, key) for i in range(samples)] == wanted.tolist()


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("full(f16)", (300,)),
        ("full(dtype=u8)", (300,)),
        ("topk(k=3, at=(1, 3))", (256,)),
        ("topk(3, (2,), tail=spread)", (257,)),
        ("argmax", (70000,)),
        ("int4", (7,)),
        ("int8", (7,)),
        ("int4", (3, 5)),
        ("pool(n=2)|int4", (3, 5, 7)),
        ("pool(2)|pool(2)|f16", (3, 9, 7)),
        ("attention(1e-05)", (3, 5, 7)),
    ],
)
def test_fields_follow_from_any_spelling(spec: str, shape: tuple[int, ...]):
    known = codecs.parse(spec)
    values = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    encoded = known.codec.encode(values)
    fields, always, packed = minimal.codec(known.spec, shape, None)
    assert {f: np.dtype(t) for f, t in fields.items()} == {
        f.name: np.dtype((f.dtype, f.shape)) for f in known.codec.fields(shape)
    }
    mine = minimal.Cache.__new__(minimal.Cache)
    mine.targets = {"it": (always, packed)}
    mine.rows = lambda *_: [(f, values[0]) for f, values in encoded.items()]
    same([mine.target("it", 0, 0)], parts(known.codec.decode(encoded, shape)))


def test_the_command_line():
    cache = GOLDEN[-1] / "cache"
    run = [sys.executable, READER, cache]
    said = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert "all whole" in said
    said = subprocess.run([*run, "p3", "0", "7"], check=True, capture_output=True, text=True).stdout
    assert "geometry" in said
