"""Old caches stay readable: every cache in tests/golden opens, is whole, and holds what it held when it was written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import softcache as sc
from softcache.testing import ToyImages

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from make_golden import contents

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.*"))


LOGS = {"shared", "packed"}  # decoded through logarithms, whose last bit is the processor's


def test_there_is_one_for_every_format():
    assert {path.name for path in GOLDEN} >= {"1.0", "1.1", "1.2", "1.3"}


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_it_is_whole_and_the_one_that_was_written(golden: Path):
    cache = sc.open(golden / "cache")
    assert cache.digest == (golden / "digest").read_text().strip()
    assert sc.verify(cache, read_data=True) == []


def test_1_0_is_read_as_it_was_written():
    golden = Path(__file__).parent / "golden" / "1.0"
    cache = sc.open(golden / "cache")
    samples = np.arange(cache.samples)
    for view in range(cache.views):
        for name, target in cache.read(view, samples).items():
            # the expected values were rounded to halves, to keep them small
            kept = np.load(golden / f"{name}-{view}.npy", allow_pickle=False)
            np.testing.assert_array_equal(target.values.astype(np.float16), kept)
        geometry = [v.pack() for v in cache.read_views(view, samples)]
        np.testing.assert_array_equal(geometry, np.load(golden / f"view-{view}.npy", allow_pickle=False))


@pytest.mark.parametrize("golden", [g for g in GOLDEN if g.name != "1.0"], ids=lambda path: path.name)
def test_its_pixels_and_targets_are_what_they_were(golden: Path):
    """Pixels, too: every op of its recipe renders what it rendered when the teacher looked."""
    for view, rows in contents(sc.open(golden / "cache"), sc.Source(ToyImages(11))).items():
        with np.load(golden / f"view-{view}.npz", allow_pickle=False) as kept:
            assert set(rows) == set(kept.files)
            for name, values in rows.items():
                if name.split(".")[0] in LOGS:
                    np.testing.assert_allclose(values, kept[name], rtol=1e-6, atol=1e-6, err_msg=name)
                else:
                    np.testing.assert_array_equal(values, kept[name], err_msg=name)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_it_pairs_with_the_images_it_was_made_of(golden: Path):
    assert "pixels equal" in sc.pair(sc.open(golden / "cache"), sc.Source(ToyImages(11))).message
