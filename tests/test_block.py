from __future__ import annotations

import numpy as np
import pytest

from softcache import block
from softcache.block import Block, Grid

GRIDS = [Grid(1, 1, 1, 0), Grid(10, 2, 4, 0), Grid(12, 3, 4, 7), Grid(5, 1, 64, 1), Grid(100, 2, 1, 2)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@every_grid
def test_blocks_cover_every_row_once_and_never_cross_a_view(grid: Grid):
    rows = [(b.view, p) for b in grid.blocks() for p in range(b.start, b.start + b.rows)]
    assert rows == [(v, p) for v in range(grid.views) for p in range(grid.samples)]
    assert all(1 <= b.rows <= grid.block_rows for b in grid.blocks())


@every_grid
def test_a_block_found_by_number_is_the_block_of_the_list(grid: Grid):
    blocks = list(grid.blocks())
    assert len(blocks) == grid.views * grid.blocks_per_view
    assert [grid.block(b.view, b.index) for b in blocks] == blocks == sorted(blocks)
    assert len({b.name for b in blocks}) == len(blocks)


@every_grid
def test_samples_of_a_block_are_where_positions_says(grid: Grid):
    for b in grid.blocks():
        samples = grid.samples_of(b)
        assert np.array_equal(grid.positions(samples), np.arange(b.start, b.start + b.rows))


@every_grid
def test_every_sample_stands_in_one_place(grid: Grid):
    positions = grid.positions(np.arange(grid.samples))
    assert np.array_equal(np.sort(positions), np.arange(grid.samples))
    assert positions.dtype == np.int64


@every_grid
def test_with_and_without_the_remembered_array_it_is_the_same(grid: Grid, monkeypatch):
    samples = np.arange(grid.samples)[::-1]
    remembered = grid.positions(samples)
    monkeypatch.setattr(block, "_REMEMBERED", 0)
    assert np.array_equal(grid.positions(samples), remembered)


def test_all_views_have_the_samples_in_the_same_place():
    grid = Grid(10, 2, 4, 0)
    assert np.array_equal(grid.samples_of(grid.block(0, 1)), grid.samples_of(grid.block(1, 1)))


def test_the_key_decides_the_order():
    orders = [tuple(Grid(20, 1, 4, key).positions(np.arange(20))) for key in range(5)]
    assert len(set(orders)) == 5


def test_a_block_is_named_by_view_and_number():
    assert Block(3, 12, 48, 4).name == "v0003-b000012"
