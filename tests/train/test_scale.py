"""What holds for a thousand million rows, tried on as many as a test may have; and all of them, slowly."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from softcache_train.order import Order
from softcache_train.samples import AsTheyLie, Every
from softcache_train.shuffle import Blocks

import softcache as sc
from softcache.block import Grid

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import scale
import shuffle_quality


@pytest.mark.parametrize("blocks", [None, Blocks(1 << 16)])
def test_an_order_of_a_thousand_million_samples_has_no_array_of_them(blocks):
    grid, few = Grid(10**9, 1, 1 << 16, 5), np.arange(0, 10**9, 10**6)
    every = Every(grid.samples, few)
    tracemalloc.start()
    order = Order(every if blocks is None else AsTheyLie(grid, every), 1, 1000, 3, 1, blocks)
    shown = [order.rows(2, step, rank, 4) for step in (0, order.steps - 1) for rank in range(4)]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2_000_000
    rows = np.concatenate(shown)
    assert order.steps == (10**9 - 1000) // 1000 and len(np.unique(rows)) == 2000
    assert rows.min() >= 0 and rows.max() < 10**9 and not np.isin(rows, few).any()
    if blocks is not None:
        for step in (0, 4):  # a batch is of the blocks of one window, or of two
            places = grid.positions(np.concatenate(shown[step : step + 4]))
            assert len(np.unique(places >> 16)) <= 2 * 2 * blocks.together


def test_a_generated_cache_opens_and_reads_like_another(tmp_path: Path):
    scale.generate(tmp_path / "c", 20_000_000, 3, 1 << 18)
    cache = sc.open(tmp_path / "c")
    assert (cache.samples, cache.views, len(cache.invalid)) == (20_000_000, 3, 1000)
    samples = np.array([17, 19_999_999, 17, 5_000_000])
    said = cache.read(2, samples, slab=False)["logits"].values
    assert np.array_equal(said[0], said[2]) and np.isfinite(said).all() and np.ptp(said) > 0
    assert len(cache.read_views(1, samples, slab=False)) == 4
    real = sum(
        path.lstat().st_size for path in {p.stat().st_ino: p for p in (tmp_path / "c").rglob("c.*")}.values()
    )
    assert real > 100 * sum(a.row_bytes for a in cache.arrays.values())
    figures = scale.measure(tmp_path / "c")
    assert figures.keys() >= {"open, s", "blocks: order, µs a batch", "global: first batch, s"}


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "views"), [(10**8, 10), (10**9, 1)])
def test_a_thousand_million_rows_open_in_a_moment_and_in_little_memory(samples: int, views: int):
    """200 MB is what is promised, and read by blocks it stays so; how long it takes is only measured."""
    found = scale.run(samples, views, 1 << 16)
    assert found["MB after open, s"] < 200
    assert found["MB after blocks: the next twenty, ms each"] < 200


def test_blocks_are_shuffled_as_well_as_their_page_says():
    found = shuffle_quality.table(60_000, 1000, 100, 50)
    whole, blocks, lying, by_class = (
        found[name] for name in ("global", "blocks, 16 together", "as it lies", "sorted by class")
    )
    for one in (whole, blocks, lying):  # whatever the order, rows lie shuffled
        assert 0.95 < one["class mix"] < 1.05
    assert by_class["class mix"] > 40
    assert abs(whole["order"]) < 0.02 and abs(blocks["order"]) < 0.3 and lying["order"] == 1
    assert 0.95 < whole["neighbours"] < 1.05 and 0.95 < whole["meet again"] < 1.05
    assert 3 < blocks["neighbours"] < 5 and 1 < blocks["meet again"] < 2  # 60 blocks, 16 together
    assert blocks["files a hundred"] <= 16 < whole["files a batch"]
