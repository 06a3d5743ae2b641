"""``…|plain``: rows that are stored as they are, however large, and are the rows that would have been compressed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import softcache as sc
from softcache import codecs, reader
from softcache.cache import Cache
from softcache.codecs import Pooled
from softcache.errors import DamageError, SpecError
from softcache.exchange import hdf5, webdataset
from softcache.targets import Target, request
from softcache.testing import flip_bit, toy_teacher

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import minimal_reader as minimal
from conftest import SMALL

PLAIN: dict[str, Any] = SMALL | {"targets": {"logits": "full(u8)", "map": "int8|plain", "vector": "f16"}}
SAMPLES = np.random.default_rng(0).integers(0, 20, 50)  # with some of them twice


@pytest.fixture(scope="module")
def plain(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("plain") / "cache"
    return sc.build(path, source=small_folder, teacher=toy_teacher(), **PLAIN)


def test_the_rows_are_those_of_a_cache_that_compresses(plain: Cache, small_cache: Cache):
    assert plain.arrays["targets/map/value"].row_bytes == 4096 and not plain.arrays["targets/map/value"].big
    for view in range(2):
        for slab in (True, False):
            found, wanted = (c.read(view, SAMPLES, slab=slab) for c in (plain, small_cache))
            assert found.keys() == wanted.keys()
            for name in found:
                assert np.array_equal(found[name].values, wanted[name].values), name


def test_big_plain_rows_are_never_gathered_into_a_slab(plain: Cache):
    cache = sc.open(plain.path)
    cache.read(0, SAMPLES, "map")
    assert cache.reader._slabs["targets/map", 0][0].dtype.names == ("scale",)
    first = cache.reader.fields("targets/map", 0, np.arange(20))["value"]
    assert cache.reader.fields("targets/map", 1, np.arange(20))["value"].base is first.base  # used again


def test_files_that_are_let_go_of_are_opened_again(plain: Cache, small_cache: Cache, monkeypatch):
    monkeypatch.setattr(reader, "_open_files", lambda: 2)
    found = sc.open(plain.path).read(1, SAMPLES, "map", slab=False)["map"].values
    assert np.array_equal(found, small_cache.read(1, SAMPLES, "map")["map"].values)


def test_zarr_python_and_the_minimal_reader_read_it(plain: Cache):
    array = plain.arrays["targets/map/value"]
    assert [c["name"] for c in json.loads(array.metadata())["codecs"]] == ["bytes", "crc32c"]
    group: Any = zarr.open_group(plain.path, mode="r")
    mine = minimal.Cache(plain.path)
    everything = np.arange(20)
    for view in range(2):
        rows = plain.reader.fields("targets/map", view, everything)["value"].copy()
        assert np.array_equal(group[array.path][view], rows)
        for sample, position in enumerate(plain.grid.positions(everything)):
            assert np.array_equal(dict(mine.rows("targets/map/", view, sample))["value"], rows[position])


def test_it_goes_through_tars_and_hdf5_and_comes_back(plain: Cache, tmp_path: Path):
    webdataset.export(plain, tmp_path / "tars")
    opened = sc.open(tmp_path / "tars").read(1, SAMPLES)["map"].values
    assert np.array_equal(opened, plain.read(1, SAMPLES)["map"].values)
    webdataset.restore(tmp_path / "tars", tmp_path / "from tars")
    hdf5.export(plain, tmp_path / "file.h5")
    hdf5.restore(tmp_path / "file.h5", tmp_path / "from hdf5")
    for folder in ("from tars", "from hdf5"):
        assert sc.open(tmp_path / folder).digest == plain.digest
        assert sc.verify(sc.open(tmp_path / folder), read_data=True) == []


def test_one_flipped_bit_is_found(plain: Cache, small_folder: Path, tmp_path: Path):
    cache = sc.build(tmp_path / "copy", source=small_folder, teacher=toy_teacher(), **PLAIN)
    assert cache.digest == plain.digest
    path = cache.store.path(cache.arrays["targets/map/value"].file(1, 1))
    flip_bit(path, 8 * 5000 + 3)
    with pytest.raises(DamageError, match="checksum"):
        sc.open(cache.path).read(1, np.arange(20), "map")
    (damage,) = sc.verify(sc.open(cache.path), read_data=True)
    assert (damage.target, damage.view, damage.shard) == ("map", 1, 1)


def test_it_stands_behind_any_codec_and_changes_nothing_but_how_fields_are_stored():
    named = codecs.parse(" pool(2) | int8|plain")
    assert named.spec == "pool(2)|int8|plain" and named.codec == codecs.parse("pool(2)|int8").codec
    assert isinstance(named.codec, Pooled)
    target = request(f"p3={named.spec}").resolve((8, 6, 6))
    assert all(f.plain for f in target.fields)
    assert Target.from_identity("p3", target.identity()) == target
    assert not any(f.plain for f in request("p3=int8").resolve((8, 6, 6)).fields)


@pytest.mark.parametrize("text", ["plain", "plain|int8", "int8|plain|plain", "int8|plain(1)", "int8|plane"])
def test_what_is_no_codec_is_refused(text: str):
    with pytest.raises(SpecError):
        codecs.parse(text)
