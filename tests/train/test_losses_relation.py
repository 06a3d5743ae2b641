"""Losses on the relations between samples, against transcriptions in loops and by hand."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from formulas import check_computed_in_float32, draw
from softcache_train.objectives import InfoNCE, cc, rkd

from softcache.errors import MismatchError, SpecError


def huber(a, b):
    d = abs(a - b)
    return d**2 / 2 if d <= 1 else d - 0.5


def distance_loss(s, t):
    """Park et al., in loops."""
    many = len(s)
    pairs = [(i, j) for i in range(many) for j in range(many) if i != j]
    mean = [sum(math.dist(x[i], x[j]) for i, j in pairs) / len(pairs) for x in (s, t)]
    losses = (huber(math.dist(s[i], s[j]) / mean[0], math.dist(t[i], t[j]) / mean[1]) for i, j in pairs)
    return sum(losses) / many**2


def angle_at(x, i, j, k):
    a, b = x[i] - x[j], x[k] - x[j]
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def angle_loss(s, t):
    many = range(len(s))
    triples = [(i, j, k) for i in many for j in many for k in many if i != j and k != j]
    return sum(huber(angle_at(s, *one), angle_at(t, *one)) for one in triples) / len(s) ** 3


@pytest.mark.parametrize("seed", range(4))
def test_rkd_is_its_formula(seed):
    random = np.random.default_rng(seed)
    many, wide, theirs = random.integers(3, 9), *random.integers(1, 12, 2)
    student, teacher = draw(many, wide, seed=seed), draw(many, theirs, seed=seed + 100, scale=5)
    weights = {"distance": random.uniform(0, 40), "angle": random.uniform(0, 80)}
    expected = weights["distance"] * distance_loss(student.numpy(), teacher.numpy())
    expected += weights["angle"] * angle_loss(student.numpy(), teacher.numpy())
    assert rkd(student, teacher, **weights).item() == pytest.approx(expected, rel=1e-9)
    assert rkd(student.float(), teacher.float(), **weights).item() == pytest.approx(expected, rel=1e-5)
    alone = rkd(student, teacher, distance=1, angle=0), rkd(student, teacher, distance=0, angle=1)
    torch.testing.assert_close(25 * alone[0] + 50 * alone[1], rkd(student, teacher))


def test_rkd_by_hand():
    """Teacher: a right triangle of sides 3, 4, 5, their mean 4; student: points 0, 1, 2 on a line, their mean 4/3."""
    teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    student = torch.tensor([[0.0], [1.0], [2.0]])
    # (0,1): 3/4 and 3/4; (0,2): 1 and 3/2; (1,2): 5/4 and 3/4; each twice of nine, and Huber's half square
    expected = 2 * (0 + 0.5**2 + 0.5**2) / 2 / 9
    assert rkd(student, teacher, distance=1, angle=0).item() == pytest.approx(expected)
    # cosines of the teacher: 0, 3/5, 4/5 at the three; the student's 1, -1, 1; each in both orders, of 27
    expected = 2 * (1 / 2 + (1.6 - 1 / 2) + 0.2**2 / 2) / 27
    assert rkd(student, teacher, distance=0, angle=1).item() == pytest.approx(expected)


def moved(x, seed):
    """Turned or mirrored, scaled and shifted."""
    turn = torch.linalg.qr(draw(x.shape[1], x.shape[1], seed=seed))[0]
    return 7.5 * x @ turn + draw(x.shape[1], seed=seed + 1)


def test_rkd_does_not_see_scale_rotation_or_shift():
    student, teacher = draw(6, 5), draw(6, 8, seed=1)
    expected = rkd(student, teacher)
    torch.testing.assert_close(rkd(moved(student, 2), teacher), expected)
    torch.testing.assert_close(rkd(student, moved(teacher, 3)), expected)
    assert rkd(moved(teacher, 4), teacher).item() == pytest.approx(0, abs=1e-12)


def test_rkd_of_angles_a_few_samples_at_a_time_is_the_same(monkeypatch):
    module = sys.modules["softcache_train.objectives.rkd"]  # the package has a function of that name
    found = []
    for cells in (1 << 22, 7 * 7 * 3, 1):
        monkeypatch.setattr(module, "CELLS", cells)
        student = draw(7, 5).requires_grad_()
        loss = rkd(student, draw(7, 4, seed=1))
        found.append((loss, *torch.autograd.grad(loss, student)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("same", ["all", "two"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_rkd_of_the_same_features_is_finite(same, whose):
    student, teacher = (torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    fixed = student if whose == "student" else teacher
    fixed[: 2 if same == "two" else None] = fixed[0].clone()
    student.requires_grad_()
    loss = rkd(student, teacher)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert student.grad.isfinite().all() and student.grad.abs().max() < 1e3


def test_rkd_holds_for_close_rows_far_from_zero():
    """As differences, not products: distances of 0.01 at 100 have all their digits."""
    student, teacher = draw(5, 6, scale=0.01) + 100, draw(5, 6, seed=1)
    student = student.float().double()
    assert rkd(student.float(), teacher.float()).item() == pytest.approx(
        rkd(student, teacher).item(), rel=1e-5
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_rkd_refuses_batches_without_relations(rows):
    with pytest.raises(MismatchError, match=f"rkd compares .* among {rows} says nothing.*at least 3"):
        rkd(draw(rows, 4), draw(rows, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"distance": -1},
        {"angle": math.nan},
        {"distance": math.inf},
        {"distance": 0, "angle": 0},
        {"angle": "1"},
    ],
)
def test_rkd_refuses_weights(options):
    with pytest.raises(SpecError, match="rkd: "):
        rkd(draw(4, 4), draw(4, 4), **options)


def congruence(s, t, gamma, order):
    """Peng et al., in loops."""

    def kernel(x, y):
        cosine = sum(a * b for a, b in zip(x, y, strict=True)) / np.linalg.norm(x) / np.linalg.norm(y)
        terms = ((2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1))
        return math.exp(-2 * gamma) * sum(terms)

    many = len(s)
    differences = (kernel(s[i], s[j]) - kernel(t[i], t[j]) for i in range(many) for j in range(many))
    return sum(d**2 for d in differences) / many**2


@pytest.mark.parametrize("seed", range(4))
def test_cc_is_its_formula(seed):
    random = np.random.default_rng(seed)
    many, wide, theirs = random.integers(2, 9), *random.integers(2, 12, 2)
    gamma, order = random.uniform(0.05, 2), int(random.integers(1, 6))
    student, teacher = draw(many, wide, seed=seed), draw(many, theirs, seed=seed + 100, scale=5)
    expected = congruence(student.numpy(), teacher.numpy(), gamma, order)
    assert cc(student, teacher, gamma=gamma, order=order).item() == pytest.approx(expected, rel=1e-9)
    assert cc(student.float(), teacher.float(), gamma=gamma, order=order).item() == pytest.approx(
        expected, rel=1e-5
    )
    assert cc(student, teacher).item() == pytest.approx(
        congruence(student.numpy(), teacher.numpy(), 0.4, 2), rel=1e-9
    )


def test_cc_by_hand():
    """Cosines 0 and 1 of two samples: K = e^-0.8 and e^-0.8 (1 + 0.8 + 0.32), twice of four pairs."""
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0], [5.0]])
    expected = 2 * (math.exp(-0.8) * 1.12) ** 2 / 4
    assert cc(student, teacher).item() == pytest.approx(expected)


def test_cc_comes_to_the_gaussian_kernel():
    student, teacher = (torch.nn.functional.normalize(draw(6, 5, seed=i)) for i in (0, 1))
    kernels = [torch.exp(-0.7 * torch.cdist(x, x) ** 2) for x in (student, teacher)]
    expected = torch.mean((kernels[0] - kernels[1]) ** 2)
    torch.testing.assert_close(cc(student, teacher, gamma=0.7, order=20), expected)


def test_cc_does_not_see_lengths_or_rotation():
    student, teacher = draw(6, 5), draw(6, 8, seed=1)
    turn = torch.linalg.qr(draw(5, 5, seed=2))[0]
    lengths = torch.rand(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    torch.testing.assert_close(cc(lengths * student @ turn, teacher), cc(student, teacher))


def test_cc_of_features_of_length_zero_is_finite():
    student = torch.zeros(4, 3, requires_grad=True)
    loss = cc(student, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_cc_refuses_what_does_not_fit():
    with pytest.raises(MismatchError, match="cc compares"):
        cc(draw(1, 4), draw(1, 4))
    for gamma in (0, -1, math.inf, math.nan, None):
        with pytest.raises(SpecError, match="cc: gamma must be finite and above 0"):
            cc(draw(4, 4), draw(4, 4), gamma=gamma)
    for order in (0, -1, 1.5, "2"):
        with pytest.raises(SpecError, match="cc: order "):
            cc(draw(4, 4), draw(4, 4), order=order)


def contrast(s, t, tau):
    """Oord et al., in loops."""
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    rows = ([math.exp(s[i] @ t[j] / tau) for j in range(len(t))] for i in range(len(s)))
    return sum(-math.log(row[i] / sum(row)) for i, row in enumerate(rows)) / len(s)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("widths", [(6, 6), (3, 6), (6, 3)])
def test_infonce_is_its_formula(seed, widths):
    random = np.random.default_rng(seed)
    many, tau = random.integers(2, 9), random.uniform(0.05, 2)
    student, teacher = draw(many, widths[0], seed=seed), draw(many, widths[1], seed=seed + 100, scale=5)
    torch.manual_seed(seed)
    loss = InfoNCE((widths[0],), (widths[1],), tau=tau).double()
    if widths[0] == widths[1]:
        assert not list(loss.parameters())
        seen = student.numpy()
    else:
        weight, bias = (p.detach().numpy() for p in loss.projection.parameters())
        seen = student.numpy() @ weight.T + bias
    expected = contrast(seen, teacher.numpy(), tau)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert loss.float()(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-5)


def test_infonce_by_hand():
    """Own scores of 1, the other's 0 and -1, at tau 1."""
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    expected = (2 * math.log(1 + math.exp(-1) + math.exp(-2)) + math.log(1 + 2 * math.exp(-1))) / 3
    assert InfoNCE((2,), (2,), tau=1.0)(3 * teacher, teacher).item() == pytest.approx(expected)


def test_infonce_is_log_b_where_nothing_is_known():
    assert InfoNCE((4,), (4,))(torch.ones(8, 4), torch.ones(8, 4)).item() == pytest.approx(math.log(8))
    loss = InfoNCE((4,), (4,))(torch.zeros(8, 4), torch.randn(8, 4))
    assert loss.item() == pytest.approx(math.log(8))


def test_infonce_learns_its_projection():
    loss = InfoNCE((3,), (5,))
    loss(torch.randn(4, 3), torch.randn(4, 5)).backward()
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    assert list(loss.state_dict()) == ["projection.weight", "projection.bias"]


def test_infonce_refuses_what_does_not_fit():
    with pytest.raises(MismatchError, match="infonce compares"):
        InfoNCE((4,), (4,))(draw(1, 4), draw(1, 4))
    with pytest.raises(MismatchError, match=r"made for rows of \(4,\) .* \(5,\) .*not \(5,\) and \(5,\)"):
        InfoNCE((4,), (5,))(draw(2, 5), draw(2, 5))
    for tau in (0, -1, math.inf, math.nan, "1"):
        with pytest.raises(SpecError, match="tau must be finite and above 0"):
            InfoNCE((4,), (4,), tau=tau)


# -- what holds for each of them ---------------------------------------------------------------------

LOSSES = {
    "rkd": rkd,
    "cc": cc,
    "infonce": lambda s, t: InfoNCE(tuple(s.shape[1:]), tuple(t.shape[1:]))(s, t),
}
each = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each
def test_gradients_are_those_of_the_loss(loss):
    teacher = draw(5, 4, seed=1)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), draw(5, 4).requires_grad_())


@each
def test_the_order_of_the_batch_does_not_matter(loss):
    student, teacher, order = draw(6, 4), draw(6, 4, seed=1), torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))
    assert loss(student[order], teacher).item() != pytest.approx(loss(student, teacher).item(), rel=1e-3)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast_change_no_number(loss, dtype):
    check_computed_in_float32(loss, draw(6, 32), draw(6, 32, seed=1), dtype)


@each
def test_no_gradient_flows_into_the_teacher(loss):
    student, teacher = draw(4, 5).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.any() and teacher.grad is None


@each
def test_maps_are_vectors(loss):
    student, teacher = draw(5, 2, 3, 2), draw(5, 3, 2, 2, seed=1)
    torch.testing.assert_close(loss(student, teacher), loss(student.flatten(1), teacher.flatten(1)))


@each
@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4,), (4, 3)), ((4, 3), (4,))])
def test_other_samples_are_refused(loss, shapes):
    with pytest.raises(MismatchError):
        loss(torch.ones(shapes[0]), torch.ones(shapes[1]))


def test_several_layers_in_one_term_are_refused():
    for loss in (rkd, cc):
        with pytest.raises(MismatchError, match=f"{loss.__name__} learns from .* is a tuple"):
            loss((draw(4, 4),) * 2, (draw(4, 4),) * 2)
    with pytest.raises(MismatchError, match="infonce compares one layer of each, and the teacher's are"):
        InfoNCE((4,), ((4,), (4,)))
