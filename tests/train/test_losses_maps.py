"""Losses on what channels do together, against transcriptions in loops and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import check_computed_in_float32, draw
from softcache_train.objectives import fsp, gram, nst

from softcache.errors import MismatchError


def matrices(first, second):
    """(B, C, C'), in loops over samples and channels; of maps in numpy."""
    return np.array(
        [[[np.mean(a * b) for b in two] for a in one] for one, two in zip(first, second, strict=True)]
    )


def halved(x):
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))


@pytest.mark.parametrize("seed", range(3))
def test_gram_is_its_formula(seed):
    b, c, *sizes = np.random.default_rng(seed).integers(1, 7, 6)
    student = draw(b, c, *sizes[:2], seed=seed)
    teacher = draw(b, c, *sizes[2:], seed=seed + 100, scale=2)
    ours, theirs = (matrices(x.numpy(), x.numpy()) for x in (student, teacher))
    expected = np.sum((ours - theirs) ** 2) / (b * c * c)
    assert gram(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert gram(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-5)
    assert gram(student, torch.from_numpy(theirs)).item() == pytest.approx(expected, rel=1e-9)


def test_gram_by_hand():
    """One place: channels 1 and 2 make 1 2 / 2 4, and 0 and 1 make 0 0 / 0 1."""
    student, teacher = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    loss = gram(student.view(1, 2, 1, 1), teacher.view(1, 2, 1, 1))
    assert loss.item() == pytest.approx((1 + 4 + 4 + 9) / 4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("later", [(6, 4), (3, 2)])
def test_fsp_is_its_formula(seed, later):
    """Of maps of one size and, as a stride leaves them, of half of it."""
    b, c1, c2 = np.random.default_rng(seed).integers(1, 6, 3)
    student = draw(b, c1, 6, 4, seed=seed), draw(b, c2, *later, seed=seed + 1)
    teacher = draw(b, c1, 6, 4, seed=seed + 2), draw(b, c2, *later, seed=seed + 3, scale=2)
    ours, theirs = (
        matrices(x.numpy() if later == (6, 4) else halved(x.numpy()), y.numpy())
        for x, y in (student, teacher)
    )
    expected = np.sum((ours - theirs) ** 2) / (b * c1 * c2)
    assert fsp(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert fsp(student, torch.from_numpy(theirs)).item() == pytest.approx(expected, rel=1e-9)
    single = [[x.float() for x in pair] for pair in (student, teacher)]
    assert fsp(*single).item() == pytest.approx(expected, rel=1e-5)


def test_fsp_by_hand():
    """Two places: (1, 2) then (3, 4) make 11/2 in the student, (1, 0) then (2, 5) make 1 in the teacher."""
    maps = ([1.0, 2.0], [3.0, 4.0]), ([1.0, 0.0], [2.0, 5.0])
    student, teacher = ([torch.tensor(x).view(1, 1, 1, 2) for x in pair] for pair in maps)
    assert fsp(student, teacher).item() == pytest.approx(4.5**2)


def test_fsp_of_a_map_with_itself_is_gram():
    student, teacher = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1)
    torch.testing.assert_close(fsp([student, student], [teacher, teacher]), gram(student, teacher))


def discrepancy(s, t):
    """Huang and Wang, in loops over pairs of channels of one sample."""
    s, t = ([x.ravel() / np.linalg.norm(x) for x in maps] for maps in (s, t))

    def mean(one, two):
        return np.mean([(x @ y) ** 2 for x in one for y in two])

    return mean(t, t) + mean(s, s) - 2 * mean(s, t)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [(6, 4), (3, 2)])
def test_nst_is_its_formula(seed, size):
    b, ours, theirs = np.random.default_rng(seed).integers(1, 7, 3)
    student, teacher = draw(b, ours, *size, seed=seed), draw(b, theirs, 6, 4, seed=seed + 100, scale=3)
    given = teacher.numpy() if size == (6, 4) else halved(teacher.numpy())
    expected = np.mean([discrepancy(s, t) for s, t in zip(student.numpy(), given, strict=True)])
    assert nst(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert nst(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-5)
    assert nst(teacher, student).item() == pytest.approx(expected, rel=1e-9)


def test_nst_by_hand():
    """The teacher's two channels fire at one place each, the student's one at both alike: 1/2 + 1 - 2 · 1/2."""
    teacher = torch.tensor([[2.0, 0.0], [0.0, 5.0]]).view(1, 2, 1, 2)
    student = torch.tensor([3.0, 3.0]).view(1, 1, 1, 2)
    assert nst(student, teacher).item() == pytest.approx(0.5)


def test_nst_does_not_see_scales_order_or_repetition_of_channels():
    student, teacher = draw(3, 4, 5, 5), draw(3, 6, 5, 5, seed=1)
    scales = torch.rand(3, 4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    other = (scales * student)[:, [2, 0, 3, 1]].repeat(1, 2, 1, 1)
    torch.testing.assert_close(nst(other, teacher), nst(student, teacher))
    assert nst(teacher.flip(1), teacher).item() == pytest.approx(0, abs=1e-12)


def test_nst_of_channels_that_are_zero_is_finite():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = nst(student, torch.ones(2, 5, 4, 4))
    loss.backward()
    assert loss.item() == pytest.approx(1) and student.grad.isfinite().all()


# -- what holds for each of them ---------------------------------------------------------------------


def of_pairs(student, teacher):
    """fsp of what the other losses take: the map, and the map of half its channels."""
    return fsp([student, student[:, ::2]], [teacher, teacher[:, ::2]])


each = pytest.mark.parametrize("loss", [gram, of_pairs, nst], ids=["gram", "fsp", "nst"])


@each
def test_gradients_are_those_of_the_loss(loss):
    teacher = draw(2, 3, 4, 2, seed=1)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), draw(2, 3, 4, 2).requires_grad_())


@each
def test_the_order_of_samples_and_places_does_not_matter(loss):
    student, teacher = draw(4, 3, 2, 6), draw(4, 3, 2, 6, seed=1)
    expected = loss(student, teacher)
    torch.testing.assert_close(loss(student[[2, 0, 3, 1]], teacher[[2, 0, 3, 1]]), expected)
    torch.testing.assert_close(loss(student.flip(2, 3), teacher.flip(2, 3)), expected)
    assert loss(student[[2, 0, 3, 1]], teacher).item() != pytest.approx(expected.item(), rel=1e-3)


@each
def test_it_is_zero_at_equality_and_a_mean_over_the_batch(loss):
    student, teacher = draw(4, 3, 4, 4), draw(4, 3, 4, 4, seed=1)
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    alone = torch.stack([loss(s[None], t[None]) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(loss(student, teacher), alone.mean())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast_change_no_number(loss, dtype):
    check_computed_in_float32(loss, draw(3, 8, 4, 4), draw(3, 8, 4, 4, seed=1), dtype)


@each
def test_no_gradient_flows_into_the_teacher(loss):
    student, teacher = draw(2, 3, 4, 4).requires_grad_(), draw(2, 3, 4, 4, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.any() and teacher.grad is None


def test_what_does_not_fit_is_refused():
    maps = torch.ones(2, 3, 4, 4)
    for other in (torch.ones(2, 5, 4, 4), torch.ones(2, 3, 5)):
        with pytest.raises(MismatchError, match=r"gram compares .*the student's are .*choose layers"):
            gram(maps, other)
    for given in ((torch.ones(2, 3), maps), (maps, maps[:1]), (torch.ones(2, 3, 3), maps)):
        with pytest.raises(MismatchError, match="gram takes "):
            gram(*given)
    with pytest.raises(MismatchError, match=r"gram learns from maps .*, and the student's is a tuple"):
        gram((maps, maps), maps)
    for given in (
        ([maps], [maps] * 2),
        ([maps] * 2, [maps]),
        ([maps] * 2, [maps] * 3),
        ([maps, maps[:1]], [maps] * 2),
        (maps[0], [maps] * 2),
        (maps, maps),
    ):
        with pytest.raises(MismatchError, match="fsp takes two maps"):
            fsp(*given)
    for other in ([maps, maps[:, :2]], maps[:, :, :2, 0]):
        with pytest.raises(MismatchError, match="fsp compares"):
            fsp([maps, maps], other)
    for other in (torch.ones(1, 3, 4, 4), torch.ones(2, 3, 4)):
        with pytest.raises(MismatchError, match="nst takes maps"):
            nst(maps, other)
