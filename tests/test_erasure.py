"""What a teacher still tells of classes that are not its answer: by hand, against loops, of teachers trained here."""

from __future__ import annotations

from itertools import permutations
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache import erasure
from softcache.erasure import Erasure, of
from softcache.targets import Logits


def shares(p: Any) -> tuple[float, float, float]:
    found = erasure.shares(np.log(np.maximum(np.asarray(p, np.float64), 1e-300)), 1)
    assert found is not None
    return found.erased, found.of_class, found.of_image


def near(*expected: float) -> Any:
    return pytest.approx(expected, abs=1e-9)


# -- by hand -----------------------------------------------------------------------------------------------


def test_even_others_are_erased_and_one_other_is_not():
    assert shares([[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.85, 0.05]]) == near(1, 0, 0)
    assert shares([[0.9, 0.1, 0, 0], [0.6, 0.4, 0, 0], [0, 0.2, 0.8, 0]]) == near(0, 1, 0)


def test_what_only_the_image_says():
    """Of one answer, each other class once: the mean is even, and each row has all of it."""
    assert shares([[0.7, 0.3, 0, 0], [0.7, 0, 0.3, 0], [0.7, 0, 0, 0.3]]) == near(0, 0, 1)


def test_halves():
    """Two of four others, evenly: ln 2 of ln 4. One pair for every row is of the class; another pair in each row, of
    which the mean is even, is of the image."""
    assert shares([[0.8, 0.1, 0.1, 0, 0]] * 3) == near(0.5, 0.5, 0)
    assert shares([[0.8, 0.1, 0.1, 0, 0], [0.8, 0, 0, 0.1, 0.1]]) == near(0.5, 0, 0.5)


def test_nothing_can_be_said_of_two_classes_or_of_no_rows():
    assert erasure.shares(np.log([[0.9, 0.1]]), 1) is None and erasure.shares(np.zeros((0, 5)), 1) is None


def test_words():
    told = Erasure(0.61, 0.302, 0.088, 4.0, 1024).words()
    assert told == "at T=4 61.0% erased, 30.2% said of the class, 8.8% of the image (1,024 rows)"


# -- against loops, and what must hold ---------------------------------------------------------------------


def by_loops(z: np.ndarray, T: float) -> tuple[float, float, float]:  # noqa: N803
    rows, classes = z.shape
    q: dict[int, list[list[float]]] = {}
    for row in z.tolist():
        top = max(range(classes), key=row.__getitem__)
        others = [2.718281828459045 ** (x / T) for c, x in enumerate(row) if c != top]
        q.setdefault(top, []).append([x / sum(others) for x in others])
    erased = of_class = of_image = 0.0
    for own in q.values():
        mean = [sum(column) / len(own) for column in zip(*own, strict=True)]
        for row in own:
            erased += sum(x * log(1 / x) for x in row)
            of_class += sum(m * log(m * (classes - 1)) for m in mean)
            of_image += sum(x * log(x / m) for x, m in zip(row, mean, strict=True))
    return tuple(x / rows / log(classes - 1) for x in (erased, of_class, of_image))  # pyright: ignore


@pytest.mark.parametrize("seed", range(5))
def test_it_is_its_formula_and_sums_to_one(seed: int):
    rng = np.random.default_rng(seed)
    rows, classes = int(rng.integers(1, 40)), int(rng.integers(3, 9))
    z, T = rng.normal(size=(rows, classes)) * 3, float(rng.uniform(0.5, 8))  # noqa: N806
    found = erasure.shares(Logits(z).log_probs(T), T)
    assert found is not None and found.rows == rows
    told = found.erased, found.of_class, found.of_image
    assert told == near(*by_loops(z, T)) and sum(told) == pytest.approx(1) and min(told) > -1e-12


def test_it_is_blind_to_shifts_of_rows_and_to_the_order_of_classes_and_a_high_T_erases():  # noqa: N802
    z = np.random.default_rng(0).normal(size=(30, 4)) * 2
    first = by_loops(z, 1)
    for order in list(permutations(range(4)))[::7]:
        moved = Logits(z[:, order] + np.arange(30)[:, None]).log_probs(1)
        found = erasure.shares(moved, 1)
        assert found is not None and (found.erased, found.of_class, found.of_image) == near(*first)
    hot = [erasure.shares(Logits(z).log_probs(T), T) for T in (1, 4, 16, 1e4)]
    left = [1 - one.erased for one in hot if one]
    assert sorted(left, reverse=True) == left and left[-1] < 1e-6 < left[0]


# -- of caches and of teachers -----------------------------------------------------------------------------


def test_of_a_cache(small_cache: sc.Cache, small_folder: Path, tmp_path: Path):
    from softcache.testing import toy_teacher

    samples = np.arange(20)
    expected = by_loops(small_cache.read(0, samples)["logits"].values.astype(np.float64), 4)
    found = of(small_cache, "logits", 4, samples)
    assert found is not None and (found.erased, found.of_class, found.of_image) == near(*expected)
    some = {"source": small_folder, "teacher": toy_teacher(), "views": 1, "progress": False}
    for codec in ("topk(2)", "argmax"):
        kept = sc.build(tmp_path / codec, **some, recipe="flip", targets={"logits": codec})
        assert of(kept, "logits", 4, samples) is None  # what was left out is not known


def test_a_plan_tells_it(small_folder: Path):
    from softcache.telling import tell
    from softcache.testing import toy_teacher

    plan = sc.plan(source=small_folder, teacher=toy_teacher(), recipe="flip", progress=False)
    found = plan.erasure["logits"]
    assert found["T"] == 4 and found["erased"] + found["of_class"] + found["of_image"] == pytest.approx(1)
    assert "tells of classes that are not the answer: at T=4" in tell(plan, None)


def test_a_teacher_that_was_trained_with_smoothing_has_erased_more():
    """A small network on half of scikit-learn's digits, asked of the other half: at T = 1 and 4, and by each of the two
    things that Müller et al. name."""
    torch = pytest.importorskip("torch")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    found = {}
    for smoothing in (0.0, 0.1):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3, weight_decay=1e-4)
        for _ in range(300):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x[::2]), y[::2], label_smoothing=smoothing)
            loss.backward()
            optimizer.step()
        logits = net(x[1::2]).detach()
        assert (logits.argmax(1) == y[1::2]).float().mean() > 0.93
        for T in (1.0, 4.0):  # noqa: N806
            found[smoothing, T] = erasure.shares(Logits(logits.numpy()).log_probs(T), T)
    for T in (1.0, 4.0):  # noqa: N806
        plain, smoothed = found[0.0, T], found[0.1, T]
        assert smoothed.erased > plain.erased + 0.05, (T, plain, smoothed)
        assert smoothed.of_class < plain.of_class and smoothed.of_image < plain.of_image, (plain, smoothed)
