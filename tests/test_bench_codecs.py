"""What the benchmark of codecs says of peers and of errors, on numbers that are checked by hand."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

pytest.importorskip("torch")

import bench_codecs as bench
import bench_detection
import codec_maps

from softcache.codecs import Objects

VIEWS = np.random.default_rng(0).normal(0, 3, (3, 20, 100)).astype(np.float32)
ROWS = VIEWS.reshape(-1, 100)


def test_what_peers_write_is_counted_to_the_byte():
    assert bench.tinyvit(ROWS)["bytes"] == 44
    said = bench.ml_dr(VIEWS)
    p, index = bench.top_probabilities(ROWS[:1], 10)
    one = pickle.dumps({"params": [], "prob": (p[0].tolist(), index[0].tolist())}, protocol=4)
    files, gzipped = (said[f"ml-dr, k = 10, {how}"]["bytes"] for how in ("files", "gzipped"))
    assert 10 * (4 + 1) < gzipped < files < 2 * len(one)  # of each float32 a float64, half of it zeros


def test_peers_probabilities_are_whole_and_right_at_one():
    p, index = bench.top_probabilities(ROWS, 10)
    q = np.exp(bench.spread(p, index, 100)(1.0))
    assert np.allclose(q.sum(axis=1), 1) and np.allclose(np.take_along_axis(q, index, 1), p)
    true, kept = np.exp(bench.Logits(ROWS).log_probs(4.0)), np.exp(bench.fp16_top_k(ROWS, 10)(4.0))
    assert np.allclose(kept.sum(axis=1), 1)
    assert np.allclose(np.take_along_axis(kept, index, 1), np.take_along_axis(true, index, 1), rtol=2e-3)


def test_errors_of_class_logits_are_their_formulas():
    z = np.random.default_rng(1).normal(-4, 2, (2, 5, 3))
    y, weight = z + 0.1, np.array([[1, 1, 1, 4, 4.0]] * 2)
    p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-y))
    found = bench_detection.class_errors(z, y, weight)
    assert found["gradient"] == pytest.approx(np.linalg.norm(q - p) / np.linalg.norm(p))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert found["kl"] == pytest.approx(kl.sum(axis=2).mean())
    bias = (p * weight[..., None]).sum(axis=1), ((q - p) * weight[..., None]).sum(axis=1)
    assert found["bias"] == pytest.approx(np.linalg.norm(bias[1]) / np.linalg.norm(bias[0]))
    assert set(bench_detection.class_errors(z, z, weight).values()) == {0.0}


def test_rice_codes_are_counted_bit_by_bit():
    """One row of eight: 3 and 1 at the places 2 and 3. Gaps 2, 0 and numbers 2, 0: with r = 0 each takes 3 + 1 bits, with
    r = 1 each takes (1 + 1 + 1) + (0 + 1 + 1) = 5; and 4 bits of a count, 6 of parameters."""
    assert bench_detection.rice(np.array([[0, 0, 3, 1, 0, 0, 0, 0]], np.uint8)) * 8 == 4 + 4 + 4 + 6


def test_cells_under_boxes_are_those_whose_middle_is():
    shown = Objects(np.array([[0, 0, 0.5, 0.5], [0.7, 0.7, 1, 1]]), np.zeros(2, np.int64))
    under = codec_maps.inside(shown, 4, 4).astype(int).tolist()
    assert under == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert not codec_maps.inside(Objects(np.zeros((0, 4)), np.zeros(0, np.int64)), 3, 2).any()
