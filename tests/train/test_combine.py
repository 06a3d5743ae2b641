"""Several teachers in every loss of logits: the mean of their probabilities at the loss's own T, against float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from formulas import softmax
from softcache_train import config as configs
from softcache_train import loop, terms
from softcache_train.taps import Seen
from softcache_train.targets import Dense

from softcache.errors import SpecError
from softcache.targets import request

TWO = {"target": ["0.logits", "1.logits"]}
OPTIONS = {"student": "toys:plain", "epochs": 1}
RNG = np.random.default_rng(0)
STUDENT, LABELS = RNG.normal(size=(9, 5)) * 2, RNG.integers(0, 5, 9)
TEACHERS = RNG.normal(size=(2, 9, 5)) * np.array([1, 6]).reshape(2, 1, 1)  # of which one is far surer


class Batch:
    """What a term reads of one."""

    images, labels = torch.zeros(9, 3, 2, 2), torch.tensor(LABELS)

    def __getitem__(self, name):
        return Dense(torch.tensor(TEACHERS[int(name[0])]))


def loss_of(name, **options):
    asked = configs.check({**OPTIONS, "objectives": [{name: {**TWO, **options}}]}).terms[0]
    term = terms.Term(asked, None, {}, (1, 1, 1))  # pyright: ignore[reportArgumentType]
    logits = torch.tensor(STUDENT, requires_grad=True)
    return term(Seen(Batch.images, logits), Batch()).item()  # pyright: ignore[reportArgumentType]


def mean(T):  # noqa: N803
    return softmax(TEACHERS / T).mean(axis=0)


def kl(p, q):
    return (p * np.log(p / q)).sum(axis=-1)


def kd(T):  # noqa: N803
    return T**2 * kl(mean(T), softmax(STUDENT / T)).mean()


def probs_mse(T):  # noqa: N803
    return T**2 * ((softmax(STUDENT / T) - mean(T)) ** 2).sum(axis=1).mean()


def hard(_):
    return -np.log(softmax(STUDENT)[np.arange(9), mean(1).argmax(axis=1)]).mean()


def dkd(T):  # noqa: N803
    total = 0.0
    for p, q, y in zip(mean(T), softmax(STUDENT / T), LABELS, strict=True):
        others = [c for c in range(5) if c != y]
        sure = kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]]))
        total += sure + 8 * kl(p[others] / (1 - p[y]), q[others] / (1 - q[y]))
    return T**2 * total / 9


def dist(T):  # noqa: N803
    p, q = mean(T), softmax(STUDENT / T)
    rows = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]
    columns = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)]
    return T**2 * (np.mean(rows) + np.mean(columns))


@pytest.mark.parametrize(
    ("formula", "default"), [(kd, 4.0), (probs_mse, 1.0), (hard, None), (dkd, 4.0), (dist, 1.0)]
)
def test_the_mean_of_probabilities_is_that_at_the_losss_own_temperature(formula, default):
    """Which is its default where none is said."""
    name = formula.__name__
    assert loss_of(name, combine="arithmetic") == pytest.approx(formula(default), rel=1e-5)
    for T in (1.5, 8) if default else ():  # noqa: N806
        assert loss_of(name, combine="arithmetic", T=T) == pytest.approx(formula(T), rel=1e-5)
    assert loss_of(name) != pytest.approx(formula(default), rel=1e-2)  # geometric: the sure one decides


def test_logits_are_combined_as_logits():
    centred = [z - z.mean(axis=1, keepdims=True) for z in (STUDENT, TEACHERS.mean(axis=0))]
    assert loss_of("logits_mse") == pytest.approx(((centred[0] - centred[1]) ** 2).mean(), rel=1e-5)
    with pytest.raises(SpecError, match="logits_mse: combine: arithmetic is the mean of probabilities"):
        loss_of("logits_mse", combine="arithmetic")


@pytest.mark.parametrize(
    "asked", [{"attention": {"target": "layer3", "combine": "arithmetic"}}, {"mutual": TWO}]
)
def test_what_has_no_several_teachers_is_refused(asked):
    (name,) = asked
    with pytest.raises(SpecError, match=rf"{name}: combine: arithmetic|{name} learns from 1 target"):
        configs.check({**OPTIONS, "objectives": [{name: {**asked[name]}}]})


@pytest.mark.parametrize("codec", ["topk(2)", "packed(6)", "sample(3)", "argmax", "anchored"])
def test_what_is_no_whole_logits_is_refused_before_the_first_step(codec):
    (asked,) = configs.check({**OPTIONS, "objectives": [{"kd": TWO}]}).terms
    targets = {name: request(f"{name}={codec}").resolve((5,)) for name in TWO["target"]}
    cache: Any = SimpleNamespace(targets=targets)
    with pytest.raises(SpecError, match="several targets are combined from whole logits"):
        loop._check_kept(asked, cache)
