"""``logits=score``: class logits of items as their scores."""

from __future__ import annotations

from math import exp, expm1, log, log1p
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_item_caches import SAMPLES, build

import softcache as sc
from softcache import codecs
from softcache.codecs.items import All
from softcache.codecs.score import Score
from softcache.targets import Layout
from softcache.teachers import Options
from softcache.teachers.ensemble import assemble
from softcache.testing import ToyImages, toy_detector

each_score = pytest.mark.parametrize("softmax", [False, True])
LOGITS = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    elements=st.floats(-20, 20, width=32) | st.sampled_from([0.0, 30000.0, -30000.0, -8.0, 3.0]),
)


def scores(item: np.ndarray, softmax: bool) -> list[float]:
    """One item's, by the formula."""
    z = [float(x) for x in item]
    if softmax:
        return [1 / sum(exp(min(b - a, 700)) for b in z) for a in z]
    return [1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x)) for x in z]


def kept(values: np.ndarray, softmax: bool, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores before and after, and the numbers between, all ``(n, K, C)``."""
    codec, shape = Score(softmax, weight), values.shape[1:]
    fields = codec.encode(values)
    logits = codec.decode(fields, shape).astype(np.float64)
    q = np.exp(logits) if softmax else np.exp(-np.logaddexp(0, -logits))
    p = np.array([[scores(item, softmax) for item in row] for row in values])
    return p, q, fields["value"].swapaxes(1, 2)


@each_score
@given(values=LOGITS)
def test_scores_are_within_the_stated_error(softmax: bool, values: np.ndarray):
    p, q, value = kept(values, softmax, np.ones(values.shape[1]))
    low = value == 0
    assert (np.abs(q - p)[~low] <= 0.004 * np.cbrt(p[~low])).all()
    assert (p[low] < 9e-5).all() and (q[low] < 9e-5).all()


@each_score
@given(values=LOGITS, seed=st.integers(0, 1000))
def test_what_is_too_small_for_the_grid_keeps_its_sum(softmax: bool, values: np.ndarray, seed: int):
    weight = np.random.default_rng(seed).integers(1, 50, values.shape[1]).astype(np.float64)
    p, q, value = kept(values, softmax, weight)
    for row in range(len(values)):
        low = (value[row] == 0) * weight[:, None]
        assert (low * q[row]).sum() == pytest.approx(
            (low * p[row]).sum(), rel=0.02, abs=1e-20
        )  # a half below -32


@each_score
def test_the_fields_are_what_the_format_says(softmax: bool):
    rng = np.random.default_rng(0)
    values, weight = rng.normal(-6, 4, (4, 7, 5)).astype(np.float32), np.array([1, 1, 1, 1, 9, 9, 8.0])
    codec = Score(softmax, weight)
    fields = codec.encode(values)
    assert {f.name: (f.dtype, f.shape) for f in codec.fields((7, 5))} == {
        "rest": ("float16", ()),
        "value": ("uint8", (5, 7)),
    }
    decoded = codec.decode(fields, (7, 5))
    for row, rest, numbers, back in zip(values, fields["rest"], fields["value"], decoded, strict=True):
        small = []
        for k, item in enumerate(row):
            for c, p in enumerate(scores(item, softmax)):
                v = round(255 * p ** (2 / 3))
                assert numbers[c, k] == v
                if v == 0:
                    small.append((weight[k], p))
                    assert back[k, c] == np.float32(rest)
                else:
                    q = ((v if v < 255 else 254.75) / 255) ** 1.5
                    assert back[k, c] == pytest.approx(log(q) if softmax else log(q) - log1p(-q), rel=1e-6)
        mean = sum(w * p for w, p in small) / sum(w for w, _ in small)
        assert float(rest) == pytest.approx(log(mean) if softmax else -log(expm1(-log(mean))), rel=1e-3)


@each_score
@pytest.mark.parametrize("value", [30000.0, -30000.0, 0.0])
def test_saturated_and_equal_logits(softmax: bool, value: float):
    values = np.full((2, 3, 4), value, np.float32)
    values[1, 0, 2] += 1000
    p, q, _ = kept(values, softmax, np.ones(3))
    assert np.isfinite(
        Score(softmax, np.ones(3)).decode(Score(softmax, np.ones(3)).encode(values), (3, 4))
    ).all()
    assert np.abs(q - p).max() <= 0.004


def test_one_class_has_a_score_of_its_own():
    values = np.array([[[-3.0], [2.0]]], np.float32)
    p, q, _ = kept(values, False, np.ones(2))
    assert np.abs(q - p).max() < 0.003


def test_without_logits_it_is_all():
    values = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    layout = Layout({"embedding": 6})
    one, other = (codecs.parse(text).codec for text in ("all", "all(logits=score)"))
    assert isinstance(one, All) and isinstance(other, All)
    for name, field in one.laid_out(layout).encode(values).items():
        assert np.array_equal(other.laid_out(layout).encode(values)[name], field)


def test_a_cache_of_scores(tmp_path: Path):
    targets = {"detections": "top(6, background=5, logits=score)", "queries": "all(logits=score)"}
    cache = build(tmp_path / "c", targets=targets)
    found = cache.read(0, np.arange(SAMPLES))
    whole = build(tmp_path / "d", targets={"detections": "top(6, background=5)", "queries": "all"})
    for name, said in whole.read(0, np.arange(SAMPLES)).items():
        assert np.array_equal(said.index, found[name].index)
        assert np.abs(said.scores() - found[name].scores()).max() < 0.01
        assert found[name].parts["logits"].dtype == np.float32
    report = cache.manifest.report  # pyright: ignore[reportOptionalMemberAccess]
    assert 0 < report.fidelity["detections"]["kl"] < 0.01
    teacher = assemble(toy_detector(), None, Options(taps=tuple(targets)))
    live = sc.verify_live(cache, sc.Source(ToyImages(SAMPLES)), teacher, 12)
    assert all(live[name]["cache"]["wrong"] == 0 for name in targets)


def test_what_real_queries_cost_and_lose(shared_data: Path):
    """DEIMv2-Atto on photographs: half the bytes of ``u8``, and 2 % of the gradient of sigmoid losses."""
    from detectors import pictures

    from softcache.teachers import load

    teacher = load(f"onnx:{shared_data}/weights/deimv2_atto_coco_320.onnx", Options(taps=("detections",)))
    logits = teacher(pictures(shared_data, 6, (320, 320)))["detections"][..., :80]
    p, q, value = kept(logits, False, np.ones(logits.shape[1]))
    assert np.linalg.norm(q - p) < 0.02 * np.linalg.norm(p)
    from numcodecs import Zstd

    packed = np.mean([len(Zstd(1).encode(row.swapaxes(0, 1).tobytes())) for row in value])
    assert packed < 0.6 * logits[0].size
