"""The order of rows: a pure function, the same global batches for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from softcache_train.order import Order

from softcache.errors import SpecError

SAMPLES = np.arange(100, 203)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_one_global_batch(world):
    order = Order(SAMPLES, views=3, global_batch=10, seed=5)
    for epoch in range(3):
        for step in range(order.steps):
            parts = [order.rows(epoch, step, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), order.rows(epoch, step))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(
    n=st.integers(1, 300),
    batch=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 50),
    world=st.integers(1, 8),
)
def test_an_epoch_shows_no_sample_twice(n, batch, seed, epoch, world):
    samples = np.arange(n) * 3
    if batch > n:
        with pytest.raises(SpecError, match="does not fit"):
            Order(samples, 1, batch, seed)
        return
    order = Order(samples, 1, batch, seed)
    shown = [order.rows(epoch, step, rank, world) for step in range(order.steps) for rank in range(world)]
    rows = np.concatenate(shown)
    assert len(rows) == order.steps * batch == len(np.unique(rows))
    assert np.isin(rows, samples).all()


@given(views=st.integers(1, 40), seed=st.integers(0, 2**31), cycle=st.integers(0, 5))
def test_a_cycle_uses_every_view_once(views, seed, cycle):
    order = Order(SAMPLES, views, 1, seed)
    epochs = range(cycle * views, (cycle + 1) * views)
    assert sorted(order.view(e) for e in epochs) == list(range(views))


def test_epochs_seeds_and_cycles_differ():
    order, other = Order(SAMPLES, 20, 50, seed=0), Order(SAMPLES, 20, 50, seed=1)
    assert not np.array_equal(order.rows(0, 0), order.rows(1, 0))
    assert not np.array_equal(order.rows(0, 0), other.rows(0, 0))
    assert [order.view(e) for e in range(20)] != [order.view(e) for e in range(20, 40)]


def test_pinned_rows():
    """A change of the order breaks the resume of every run there is: it must be deliberate."""
    order = Order(np.arange(1000), views=4, global_batch=8, seed=0)
    assert order.rows(3, 7).tolist() == [508, 690, 337, 635, 866, 434, 219, 6]
    assert [order.view(e) for e in range(8)] == [2, 1, 3, 0, 0, 2, 1, 3]


def test_outside_the_epoch():
    order = Order(SAMPLES, 1, 10, 0)
    with pytest.raises(IndexError):
        order.rows(0, order.steps)
    with pytest.raises(IndexError):
        order.rows(0, 0, rank=2, world=2)
