"""Losses against float64 transcriptions of their formulas, by hand, and in their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from softcache_train.objectives import cross_entropy, kd
from softcache_train.targets import Dense

from softcache.errors import MismatchError, SpecError


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_kd_is_its_formula(T, classes):  # noqa: N803
    student, teacher = logits(8, classes, seed=1), logits(8, classes, seed=2)
    p, q = softmax(teacher.numpy() / T), softmax(student.numpy() / T)
    formula = T**2 * np.mean(np.sum(p * (np.log(p) - np.log(q)), axis=1))
    assert kd(student, teacher, T).item() == pytest.approx(formula, rel=1e-10)
    assert kd(student.float(), Dense(teacher.float()), T).item() == pytest.approx(formula, rel=1e-4)


@pytest.mark.parametrize(("T", "cat"), [(1.0, 0.982), (4.0, 0.731), (10.0, 0.599)])
def test_kd_by_hand_on_cat_and_dog(T, cat):  # noqa: N803
    """Logits 5 and 1: cat .982, .731, .599 at T = 1, 4, 10. A student that says 1/2 each is off by
    T² · (ln 2 − H(p))."""
    p = 1 / (1 + np.exp(-4 / T))
    assert p == pytest.approx(cat, abs=5e-4)
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    loss = kd(torch.zeros(1, 2), torch.tensor([[5.0, 1.0]]), T)
    assert loss.item() == pytest.approx(T**2 * (np.log(2) - entropy), rel=1e-5)


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_kd_gradient(T):  # noqa: N803
    """∂/∂z_s = T (softmax(z_s/T) − softmax(z_t/T)) / B."""
    student, teacher = logits(5, 7, seed=3).requires_grad_(), logits(5, 7, seed=4)
    assert torch.autograd.gradcheck(lambda z: kd(z, teacher, T), student)
    kd(student, teacher, T).backward()
    expected = T * (torch.softmax(student / T, 1) - torch.softmax(teacher / T, 1)) / 5
    torch.testing.assert_close(student.grad, expected.detach())


def test_kd_gradient_at_high_temperature_is_that_of_centred_logits():
    """T → ∞: (z_s − z_t) / C after centring (Hinton et al. §2.1; T² is in the loss)."""
    student, teacher = logits(1, 10, seed=5).requires_grad_(), logits(1, 10, seed=6)
    kd(student, teacher, 1e4).backward()
    difference = (student - teacher).detach()
    torch.testing.assert_close(
        student.grad, (difference - difference.mean(1, keepdim=True)) / 10, rtol=1e-3, atol=1e-6
    )


def test_kd_gradients_keep_their_size_over_temperatures():
    norms = []
    for T in (4.0, 8.0, 20.0):  # noqa: N806
        student, teacher = (
            logits(64, 10, seed=7, scale=1.0).requires_grad_(),
            logits(64, 10, seed=8),
        )
        kd(student, teacher, T).backward()
        norms.append(student.grad.norm().item())
    assert max(norms) / min(norms) < 1.5


def test_kd_is_zero_at_equality_and_blind_to_shifts():
    student = logits(4, 6, seed=9).requires_grad_()
    loss = kd(student, student.detach() + 3.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12


def test_kd_takes_half_precision_and_extreme_logits():
    student, teacher = torch.zeros(2, 3, dtype=torch.float16), torch.tensor([[6e4, 0, -6e4]] * 2)
    assert kd(student, teacher, 1.0).isfinite()
    assert kd(student, teacher, 1.0).dtype == torch.float32


def test_kd_sends_no_gradient_to_the_teacher():
    teacher = logits(2, 3).requires_grad_()
    kd(logits(2, 3, seed=1).requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_kd_refuses_what_does_not_fit():
    with pytest.raises(MismatchError, match=r"\(4, 10\) and \(4, 9\)"):
        kd(torch.zeros(4, 10), torch.zeros(4, 9))
    with pytest.raises(MismatchError):
        kd(torch.zeros(4, 10), torch.zeros(1, 10))  # would broadcast
    with pytest.raises(SpecError, match="T must be above 0"):
        kd(torch.zeros(4, 10), torch.zeros(4, 10), 0)


def test_cross_entropy_is_its_formula():
    z, y = logits(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    formula = -np.mean(np.log(softmax(z.numpy()))[np.arange(6), y.numpy()])
    assert cross_entropy(z, y).item() == pytest.approx(formula, rel=1e-12)


def test_cross_entropy_of_unknown_labels():
    z, y = logits(6, 5), torch.tensor([0, -1, 2, -1, -1, 1])
    known = y >= 0
    expected = cross_entropy(z[known], y[known]) * known.sum() / 6
    torch.testing.assert_close(cross_entropy(z, y), expected)
    assert cross_entropy(z, torch.full((6,), -1)).item() == 0


def test_cross_entropy_refuses_what_does_not_fit():
    with pytest.raises(MismatchError):
        cross_entropy(torch.zeros(4, 10), torch.zeros(3, dtype=torch.int64))
