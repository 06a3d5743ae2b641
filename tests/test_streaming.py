"""A cache read straight from a remote gives the same rows, and takes no more room than it was given."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import s3
from conftest import SMALL

import softcache as sc
from softcache.cache import Cache
from softcache.errors import DamageError, NotPulled, SpecError, StoreError
from softcache.sharing.stream import _Streamed
from softcache.testing import flip_bit, toy_teacher

PLENTY = 1 << 30


@pytest.fixture
def store(small_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Faulty]:
    store = s3.Faulty()
    with store.serve() as endpoint:
        s3.use(monkeypatch, endpoint)
        sc.push(small_path, "s3://bucket/p", "v1", private=True, progress=False)
        store.asked.clear()
        yield store


def fetched(store: s3.Faulty) -> int:
    return sum("/blobs/" in name for verb, name in store.asked if verb == "GET")


def room(path: Path) -> int:
    """Bytes of shards in a folder."""
    shards = [f for part in ("targets", "view") for f in (path / part).rglob("c.*")]
    return sum(f.stat().st_size for f in shards)


def same(a: Cache, b: Cache, view: int, samples: np.ndarray) -> bool:
    one, other = a.read(view, samples), b.read(view, samples)
    values = all(
        np.array_equal(getattr(x, "values", x), getattr(other[n], "values", other[n])) for n, x in one.items()
    )
    return values and a.read_views(view, samples) == b.read_views(view, samples)


def test_rows_come_when_they_are_read_and_once(store: s3.Faulty, small_cache: Cache, tmp_path: Path):
    cache = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=PLENTY)
    assert cache.digest == small_cache.digest and cache.ids == small_cache.ids and room(tmp_path / "l") == 0
    store.asked.clear()
    one = small_cache.grid.permutation.inverse(np.arange(8))  # of one block
    here, there = (c.read(1, one, "map")["map"].values for c in (cache, small_cache))
    assert np.array_equal(here, there)
    assert fetched(store) == 1 + 3  # of the maps that block; of their scales the view
    for view in (0, 1, 0):
        assert same(cache, small_cache, view, np.arange(20))
    count = fetched(store)
    assert same(cache, small_cache, 1, np.arange(20)) and fetched(store) == count
    again = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=PLENTY)
    store.asked.clear()
    assert same(again, small_cache, 1, np.arange(20)) and fetched(store) == 0


@pytest.mark.parametrize("keep", [1, 9_000, 40_000])
def test_no_more_is_kept_than_was_allowed(
    store: s3.Faulty, small_cache: Cache, tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        cache = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=keep)
    assert ("again and again" in caplog.text) == (cache.reader.shards.largest_view() > keep)  # type: ignore[attr-defined]
    largest = max(f.stat().st_size for f in small_cache.path.rglob("c.*"))
    draw = np.random.default_rng(0)
    for _ in range(5):
        assert same(cache, small_cache, int(draw.integers(2)), draw.permutation(20)[:6])
        assert room(tmp_path / "l") <= max(keep, largest)
    held = sum(size for size, _ in cache.reader.shards._held.values())  # type: ignore[attr-defined]
    assert held == room(tmp_path / "l")


def test_a_student_sees_what_it_would_of_the_cache_itself(
    store: s3.Faulty, small_cache: Cache, small_folder: Path, tmp_path: Path
):
    import softcache_train as st

    cache, source = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=PLENTY), sc.Source(small_folder)
    ours, theirs = (
        st.Loader(c, source, global_batch=8, targets=["logits", "map"]) for c in (cache, small_cache)
    )
    for _ in range(2):
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a.index, b.index) and a.images.equal(b.images)
            assert all(a[n].values.equal(b[n].values) for n in ("logits", "map"))  # type: ignore[union-attr]
    assert not list((tmp_path / "l/targets/vector").rglob("c.*"))


def test_what_was_pulled_stays(store: s3.Faulty, small_cache: Cache, tmp_path: Path):
    sc.pull("s3://bucket/p", "v1", tmp_path / "l", targets="logits", progress=False)
    logits = room(tmp_path / "l")
    cache = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=1)
    for view in (0, 1):
        assert same(cache, small_cache, view, np.arange(20))
    assert room(tmp_path / "l") >= logits
    pulled = sc.open(tmp_path / "l")
    assert sc.verify(pulled, read_data=True) == [] and pulled.pulled_samples("logits").size == 20


def test_a_whole_cache_is_read_as_it_is(store: s3.Faulty, small_cache: Cache, tmp_path: Path):
    sc.pull("s3://bucket/p", "v1", tmp_path / "l", progress=False)
    cache = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=1)
    store.asked.clear()
    assert same(cache, small_cache, 1, np.arange(20)) and not store.asked
    assert not isinstance(cache.reader.shards, _Streamed)


def test_a_cache_of_parts_is_streamed(tmp_path: Path, small_folder: Path):
    settings = SMALL | {"targets": {"logits": "full(u8)"}}
    sc.build(tmp_path / "c", source=small_folder, teacher=toy_teacher(), **settings)
    sc.extend(
        tmp_path / "c", source=small_folder, teacher=toy_teacher(), targets={"map": "int8"}, progress=False
    )
    sc.extend(tmp_path / "c", source=small_folder, teacher=toy_teacher(), views=3, progress=False)
    sc.push(tmp_path / "c", tmp_path / "r", "v1", progress=False)
    whole, cache = sc.open(tmp_path / "c"), sc.stream(tmp_path / "r", "v1", tmp_path / "l", keep=30_000)
    for view in (2, 0, 1):
        assert same(cache, whole, view, np.arange(20))


def test_bad_bytes_are_not_read(store: s3.Faulty, tmp_path: Path):
    cache = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=PLENTY)
    for name in store.objects:
        store.always[name] = "swap"
    with pytest.raises(DamageError, match="not what it is called"):
        cache.read(0, np.arange(20), "logits")
    store.always.clear()
    cache.read(0, np.arange(20), "logits")


def test_a_fork_is_refused(store: s3.Faulty, tmp_path: Path):
    cache = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=PLENTY)
    child = os.fork()
    if child == 0:
        try:
            cache.read(0, np.arange(20), "logits")
        except StoreError as e:
            os._exit(7 if "a fork" in str(e) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_no_room_is_no_bound(tmp_path: Path):
    with pytest.raises(SpecError, match="keep=0"):
        sc.stream(tmp_path, "v1", tmp_path / "l", keep=0)


@pytest.mark.parametrize("target", ["logits", "map"])
@pytest.mark.parametrize("since", ["an earlier stream", "it was fetched"])
def test_a_shard_that_went_bad_is_fetched_again(
    store: s3.Faulty, small_cache: Cache, tmp_path: Path, target: str, since: str
):
    """A shard of small rows is read whole when it is opened; one of big rows has a checksum a row."""
    cache = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=PLENTY)
    cache.read(0, np.arange(20), target)
    big = target == "map"
    for path in (tmp_path / "l" / "targets" / target).rglob("c.0.*"):
        flip_bit(path, 100)
    if since == "an earlier stream":
        cache = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=PLENTY)
    elif not big:
        return  # it is in memory
    one, other = (c.read(0, np.arange(20), target)[target].values for c in (cache, small_cache))
    assert np.array_equal(one, other)


def test_what_a_stream_has_not_fetched_is_no_damage(store: s3.Faulty, small_cache: Cache, tmp_path: Path):
    cache = sc.stream("s3://bucket/p", "v1", tmp_path / "l", keep=PLENTY)
    cache.read(0, np.arange(20), "logits")
    assert sc.verify(cache, read_data=True) == []
    with pytest.raises(NotPulled, match="softcache pull"):
        sc.push(cache, tmp_path / "elsewhere", "v1", progress=False)
