"""Block-wise order: the same rows as a slow transcription takes, each once, near what is near, and well mixed."""

from __future__ import annotations

import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st
from softcache_train import Loader
from softcache_train.order import Order
from softcache_train.samples import Every, as_stored, trainable
from softcache_train.shuffle import Blocks, choose

import softcache as sc
from softcache import reader
from softcache.errors import SpecError
from softcache.keyed import Permutation
from softcache.source import Source
from softcache.testing import ToyImages, ToyTeacher


def slowly(blocks: Blocks, count: int, *keys: int) -> list[int]:
    """The whole order, with lists."""
    cut = [list(range(a, min(a + blocks.rows, count))) for a in range(0, count, blocks.rows)]
    turns = [cut[i] for i in Permutation(len(cut), "blocks", *keys).inverse(np.arange(len(cut)))]
    found: list[int] = []
    for number, first in enumerate(range(0, len(turns), blocks.together)):
        rows = [row for turn in turns[first : first + blocks.together] for row in turn]
        within = Permutation(len(rows), "window", *keys, number).inverse(np.arange(len(rows)))
        found += [rows[i] for i in within]
    return found


@given(
    count=st.integers(1, 400),
    rows=st.integers(1, 60),
    together=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)
def test_it_is_what_a_list_of_lists_gives(count, rows, together, seed, epoch):
    blocks = Blocks(rows, together)
    expected = slowly(blocks, count, seed, epoch)
    assert sorted(expected) == list(range(count))
    assert blocks.inverse(count, np.arange(count), seed, epoch).tolist() == expected
    some = np.random.default_rng(seed).permutation(count)[:7]
    assert blocks.inverse(count, some, seed, epoch).tolist() == [expected[i] for i in some]


def test_pinned_rows():
    """A change of the order breaks the resume of every run there is: it must be deliberate."""
    order = Order(np.arange(1000), views=4, global_batch=8, seed=0, blocks=Blocks(50, 4))
    assert order.rows(3, 7).tolist() == [307, 594, 601, 636, 632, 300, 555, 618]


@given(
    n=st.integers(1, 200),
    images=st.integers(1, 40),
    each=st.integers(1, 4),
    world=st.integers(1, 4),
    rows=st.sampled_from([None, 1, 7, 30]),
    seed=st.integers(0, 99),
)
def test_an_epoch_shows_no_sample_twice_whatever_the_shuffle(n, images, each, world, rows, seed):
    if not world <= images <= n:
        return
    order = Order(
        np.arange(n) * 3, 2 * each, images * each, seed, each, None if rows is None else Blocks(rows, 3)
    )
    for epoch in (0, 5):
        steps = [[order.rows(epoch, s, r, world) for r in range(world)] for s in range(order.steps)]
        for step, parts in enumerate(steps):
            assert np.array_equal(np.concatenate(parts), order.rows(epoch, step))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
        shown = np.concatenate([p for parts in steps for p in parts])
        assert len(shown) == n // images * images == len(np.unique(shown))
        assert np.isin(shown, np.arange(n) * 3).all()


def test_views_of_an_image_are_different_ones_and_a_cycle_uses_every_view_once():
    order = Order(np.arange(20), 12, 6, seed=3, views_per_image=3)
    for cycle in range(3):
        shown = [order.view(e, turn) for e in range(4 * cycle, 4 * cycle + 4) for turn in range(3)]
        assert sorted(shown) == list(range(12))
    assert order.steps == 10 and len(order.rows(0, 0)) == 2


@pytest.mark.parametrize(
    ("views", "batch", "each", "told"),
    [
        (10, 9, 3, "does not divide the 10 views .*train on views=9, or"),
        (2, 9, 3, r"does not divide the 2 views"),
        (9, 10, 3, "does not divide global_batch=10"),
        (9, 9, 0, "views_per_image=0: it is a whole number"),
        (9, 9, 1.5, r"views_per_image=1\.5"),
        (9, 63, 3, "global_batch=63 does not fit 20 samples"),
    ],
)
def test_views_that_do_not_come_out_even_are_refused(views, batch, each, told):
    with pytest.raises(SpecError, match=told):
        Order(np.arange(20), views, batch, 0, each)


# -- samples without an array of them --------------------------------------------------------------------------


@given(count=st.integers(0, 80), without=st.sets(st.integers(0, 79)))
def test_every_sample_but_a_few(count, without):
    few = np.array(sorted(i for i in without if i < count), np.int64)
    expected = np.setdiff1d(np.arange(count), few)
    found = Every(count, few)
    assert len(found) == len(expected)
    assert np.array_equal(np.asarray(found), expected) and np.asarray(found).dtype == np.int64
    backwards = np.arange(len(expected))[::-1]
    assert np.array_equal(found[backwards], expected[::-1])


@pytest.fixture(scope="module")
def holed(tmp_path_factory):
    """A cache of 40 samples in blocks of 12, of which three could not be read."""
    folder = toys.write_imagefolder(tmp_path_factory.mktemp("holed") / "images", "train", 10, seed=0)
    for name in ("grey/003", "red/000", "blue/009"):
        path = folder / "train" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:60])
    source = Source(folder, split="train")
    return toys.build(folder / "c", source, skip_corrupt=True, block_rows=12), source


def test_samples_as_they_are_stored(holed):
    cache, _ = holed
    whole = trainable(cache)
    expected = [
        s
        for index in range(cache.grid.blocks_per_view)
        for s in cache.grid.samples_of(cache.grid.block(0, index)).tolist()
        if s not in cache.invalid
    ]
    stored = as_stored(cache, whole)
    assert len(whole) == len(stored) == 37
    assert stored[np.arange(37)].tolist() == expected
    some = np.array([5, 31, 2, 2, 17])
    assert as_stored(cache, some).tolist() == [s for s in expected for _ in range((some == s).sum())]


def test_samples_of_several_caches_as_they_are_stored(tmp_path):
    paths, teacher = [tmp_path / "a", tmp_path / "b"], ToyTeacher()
    for path, n, first in zip(paths, (20, 30), (0, 100), strict=True):
        source = Source(ToyImages(n, seed=n), ids=[str(first + i) for i in range(n)])
        sc.build(path, source=source, teacher=teacher, progress=False, block_rows=8, batch=4)
    joined = sc.open(paths)
    stored = as_stored(joined, trainable(joined))
    a, b = (sc.open(p).grid for p in paths)
    expected = [*a.permutation.inverse(np.arange(20)), *(20 + b.permutation.inverse(np.arange(30)))]
    assert stored[np.arange(50)].tolist() == expected
    both = sc.open([paths[0], paths[0]])
    assert as_stored(both, trainable(both))[np.arange(20)].tolist() == expected[:20]


# -- chosen by itself ------------------------------------------------------------------------------------------


def test_what_fits_in_memory_is_shuffled_globally_and_what_does_not_block_by_block(
    cache, source, monkeypatch
):
    names = ["logits"]
    measured = sum(a.row_bytes for a in cache.arrays.values())
    assert choose(cache, 120, names, 1, "auto") is None
    monkeypatch.setattr(reader, "SLAB_BYTES", measured * 120)
    assert choose(cache, 120, names, 1, "auto") is None
    assert choose(cache, 120, names, 2, "auto") == choose(cache, 121, names, 1, "auto") is not None
    assert choose(cache, 121, names, 1, "global") is None
    assert choose(cache, 2, names, 1, "blocks") == Blocks(120 // 16)
    assert choose(cache, 121, [], 1, "auto") is None
    monkeypatch.setattr(reader, "SLAB_BYTES", 1 << 30)
    assert choose(cache, 2, names, 1, "blocks") == Blocks(cache.grid.block_rows)
    with pytest.raises(SpecError, match="did you mean 'blocks'"):
        Loader(cache, source, global_batch=16, shuffle="block")
