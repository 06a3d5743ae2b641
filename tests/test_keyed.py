from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcache.keyed import Permutation, draws, hash64

# -- draws: written in every cache, so they may never change ---------------------------------------------------


GOLDEN_WORDS = [2713407677499887898, 7436242686957701849]
GOLDEN_HASH = 1956344109866102870
GOLDEN_PERMUTATION = [3, 0, 1, 8, 9, 7, 6, 5, 4, 2]


def test_numbers_are_the_same_on_every_machine_and_in_every_version():
    stream = draws(0, "a/1.png", 3)
    assert [next(stream.words) for _ in range(2)] == GOLDEN_WORDS
    assert hash64("x", 1) == GOLDEN_HASH
    assert Permutation(10, "samples", 0).forward(np.arange(10)).tolist() == GOLDEN_PERMUTATION


def test_uniform_numbers_are_in_range_and_spread():
    numbers = np.array([draws("u", i).uniform(2.0, 4.0) for i in range(4000)])
    assert numbers.min() >= 2 and numbers.max() < 4
    assert np.histogram(numbers, 10, (2, 4))[0].min() > 300


def test_one_stream_is_spread_over_its_blocks():
    stream = draws("long")
    counts = np.bincount([stream.integer(10) for _ in range(5000)], minlength=10)
    assert counts.min() > 400 and len(counts) == 10


@given(st.integers(1, 2**40), st.integers(0, 100))
def test_integers_stay_below_their_count(count: int, key: int):
    assert 0 <= draws(key).integer(count) < count


def test_keys_are_kept_apart():
    keys = [(1,), ("1",), (1, 1), (11,), ("1", "1"), ("11",), ("", "1"), ("1", ""), (-1,), ()]
    assert len({hash64(*k) for k in keys}) == len(keys)


def test_a_stream_does_not_depend_on_other_streams():
    alone = [draws("b").uniform() for _ in range(3)]
    a, b = draws("a"), draws("b")
    a.uniform()
    assert b.uniform() == alone[0] == alone[1] == alone[2]


# -- Permutation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 65_537])
def test_every_size_is_permuted_and_back(n: int):
    permutation, index = Permutation(n, "k"), np.arange(n)
    positions = permutation.forward(index)
    assert np.array_equal(np.sort(positions), index)
    assert np.array_equal(permutation.inverse(positions), index)
    assert positions.dtype == np.int64


@given(st.integers(1, 2**40), st.lists(st.integers(0, 2**40 - 1), max_size=20))
def test_huge_sizes_need_no_array(n: int, index: list[int]):
    permutation, some = Permutation(n, 7), np.array([i % n for i in index], np.int64)
    positions = permutation.forward(some)
    assert np.array_equal(permutation.inverse(positions), some)
    assert not positions.size or (positions.min() >= 0 and positions.max() < n)


def test_other_keys_give_other_orders():
    orders = {tuple(Permutation(50, "k", key).forward(np.arange(50)).tolist()) for key in range(20)}
    assert len(orders) == 20


def test_a_sorted_list_comes_out_mixed():
    """Reading front to back is a shuffled stream: neighbours on disk were no neighbours in the source."""
    order = Permutation(10_000, "samples", 0).inverse(np.arange(10_000))
    assert np.mean(np.abs(np.diff(order)) < 100) < 0.05
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_every_order_of_three_occurs():
    seen = {tuple(Permutation(3, key).forward(np.arange(3)).tolist()) for key in range(200)}
    assert seen == set(itertools.permutations(range(3)))


def test_shape_is_kept_and_an_empty_question_has_an_empty_answer():
    permutation = Permutation(12, 0)
    assert permutation.forward(np.arange(12).reshape(3, 4)).shape == (3, 4)
    assert permutation.forward(np.array([], np.int64)).shape == (0,)


@pytest.mark.parametrize("index", [-1, 12])
def test_what_is_out_of_range_is_refused(index: int):
    with pytest.raises(IndexError):
        Permutation(12, 0).forward(np.array([index]))
