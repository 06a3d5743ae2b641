"""Old caches stay readable: every cache in tests/golden opens, is whole, and holds what it held when it was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import softcache as sc

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.*"))


def test_there_is_one_for_every_format():
    assert {path.name for path in GOLDEN} >= {"1.0"}


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_it_is_read_as_it_was_written(golden: Path):
    cache = sc.open(golden / "cache")
    assert cache.digest == (golden / "digest").read_text().strip()
    assert sc.verify(cache, read_data=True) == []
    samples = np.arange(cache.samples)
    for view in range(cache.views):
        for name, target in cache.read(view, samples).items():
            # the expected values were rounded to halves, to keep them small
            kept = np.load(golden / f"{name}-{view}.npy", allow_pickle=False)
            np.testing.assert_array_equal(target.values.astype(np.float16), kept)
        geometry = [v.pack() for v in cache.read_views(view, samples)]
        np.testing.assert_array_equal(geometry, np.load(golden / f"view-{view}.npy", allow_pickle=False))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_it_pairs_with_the_images_it_was_made_of(golden: Path):
    from softcache.testing import ToyImages

    assert "pixels equal" in sc.pair(sc.open(golden / "cache"), sc.Source(ToyImages(11))).message
