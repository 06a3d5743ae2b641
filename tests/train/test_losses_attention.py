"""The attention losses against their formulas in numpy and loops, by hand, and in their invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formulas import BY_FORMULA, check_computed_in_float32, coded, draw
from softcache_train.objectives import (
    attention,
    gradient_attention,
    input_gradient,
    levels,
    masked_attention,
)
from softcache_train.targets import to_tensors
from torch import nn

from softcache.codecs.strength import StrengthMap
from softcache.errors import MismatchError, SpecError

MASK = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LOSSES = {
    "attention": attention,
    "masked_attention": lambda s, t: masked_attention(s, t, mask=MASK),
    "levels": lambda s, t: levels(s, t, level="low"),
    "levels middle": lambda s, t: levels(s, t, level="middle"),
    "levels high": lambda s, t: levels(s, t, level="high"),
    "gradient_attention": gradient_attention,
    "gradient_attention normalised": lambda s, t: gradient_attention(s, t, normalised=True),
}
SCALE_FREE = set(LOSSES) - {"gradient_attention"}


def random_case(seed):
    """(student, teacher, a random generator): maps of one random size, of different numbers of channels."""
    rng = np.random.default_rng(seed)
    rows, height, width, ours, theirs = rng.integers(2, 6, 5)
    student = rng.normal(0, 2, (rows, ours, height, width))
    return student, rng.normal(1, 3, (rows, theirs, height, width)), rng


def strengths(features, p):
    """Q of each row, flat: the mean over channels of |F|^p, over its L2 norm."""
    found = []
    for row in features:
        a = np.zeros(row[0].size)
        for channel in row:
            a += np.abs(channel.ravel()) ** p / len(row)
        found.append(a / math.sqrt(sum(a**2)))
    return np.array(found)


# -- each is its formula -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_attention_is_its_formula(seed):
    student, teacher, rng = random_case(seed)
    p = rng.uniform(1, 4)
    expected = np.mean((strengths(student, p) - strengths(teacher, p)) ** 2)
    found = attention(torch.tensor(student), torch.tensor(teacher), p=p)
    assert found.item() == pytest.approx(expected, **BY_FORMULA)


@pytest.mark.parametrize("seed", range(5))
def test_masked_attention_is_its_formula(seed):
    student, teacher, rng = random_case(seed)
    p, mask = rng.uniform(1, 4), rng.uniform(0, 2, student[:, 0].shape)
    total = 0.0
    for s, t, m in zip(strengths(student, p), strengths(teacher, p), mask, strict=True):
        total += sum((m.ravel() * (s - t)) ** 2)
    found = masked_attention(torch.tensor(student), torch.tensor(teacher), mask=torch.tensor(mask), p=p)
    assert found.item() == pytest.approx(total / len(student), **BY_FORMULA)


def cosine(a, b):
    return a @ b / math.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("seed", range(4))
def test_levels_are_their_formulas(seed):
    student, teacher, _ = random_case(seed)
    total, places = 0.0, student[0, 0].size
    for s, t in zip(student, teacher, strict=True):
        s, t = s.reshape(len(s), -1).T, t.reshape(len(t), -1).T
        for i in range(places):
            for j in range(places):
                total += (cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2
    ours, theirs = torch.tensor(student), torch.tensor(teacher)
    assert levels(ours, theirs, level="low").item() == pytest.approx(
        total / len(student) / places**2, **BY_FORMULA
    )

    activation = np.mean((strengths(student, 2) - strengths(teacher, 2)) ** 2)
    assert levels(ours, theirs, level="middle").item() == pytest.approx(activation, **BY_FORMULA)

    teacher = np.stack([t[np.arange(student.shape[1]) % len(t)] for t in teacher]) * 1.5
    channel = 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = ((x**2).mean(axis=(1, 2)) for x in (s, t))
        channel += np.mean((s / np.linalg.norm(s) - t / np.linalg.norm(t)) ** 2) / len(student)
    activation = np.mean((strengths(student, 2) - strengths(teacher, 2)) ** 2)
    found = levels(ours, torch.tensor(teacher), level="high")
    assert found.item() == pytest.approx(activation + channel, **BY_FORMULA)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_gradient_attention_is_its_formula(seed, normalised):
    student, teacher, _ = random_case(seed)
    teacher = teacher[:, :1].repeat(student.shape[1], axis=1)
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        if normalised:
            s, t = s / math.sqrt((s**2).sum()), t / math.sqrt((t**2).sum())
        total += 0.5 * ((s - t) ** 2).sum()
    found = gradient_attention(torch.tensor(student), torch.tensor(teacher), normalised=normalised)
    assert found.item() == pytest.approx(total / len(student), **BY_FORMULA)


# -- by hand -------------------------------------------------------------------------------------------


def test_attention_by_hand():
    """(3, 4) squared is (9, 16) and of channels (3, 4) and 0 half of it; over its norm that is (9, 16) / √337. The student
    looks at the first place only."""
    teacher = torch.tensor([[[[3.0, 4.0]], [[0.0, 0.0]]]])
    student = torch.tensor([[[[-7.0, 0.0]]]])
    expected = ((1 - 9 / math.sqrt(337)) ** 2 + (16 / math.sqrt(337)) ** 2) / 2
    assert attention(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    mask = torch.tensor([[[0.0, 1.0]]])
    found = masked_attention(student, teacher, mask=mask)
    assert found.item() == pytest.approx(256 / 337, rel=1e-6)


def test_levels_by_hand():
    """Two places that are at right angles in the one and alike in the other: two of four pairs are off by 1."""
    student = torch.tensor([[[[1.0, 0.0]], [[0.0, 5.0]]]])
    teacher = torch.ones(1, 1, 1, 2)
    assert levels(student, teacher, level="low").item() == pytest.approx(0.5)


def test_gradient_attention_by_hand():
    assert gradient_attention(torch.ones(2, 3, 1, 1), torch.zeros(2, 3, 1, 1)).item() == 1.5


# -- maps and features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_cached_map_of_attention_is_as_good_as_features(p):
    """Exactly where nothing is rounded, to a thousandth from the halves of the cache."""
    student, teacher = draw(3, 5, 8, 8, seed=1).float(), draw(3, 7, 8, 8, seed=2).float() * 30
    expected = attention(student, teacher, p=p)
    whole = teacher.abs().pow(p).mean(dim=1)
    torch.testing.assert_close(attention(student, whole, p=p), expected)
    cached = coded(teacher, f"strength({p})")
    assert isinstance(cached, StrengthMap)
    found = attention(student, to_tensors(cached).values, p=p)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    mask = torch.rand(3, 8, 8)
    torch.testing.assert_close(
        masked_attention(student, whole, mask=mask, p=p), masked_attention(student, teacher, mask=mask, p=p)
    )


def test_the_student_is_averaged_after_the_power():
    """pool(F²), not pool(F)²: of two places with opposite signs the mean is 0 and the strength is not."""
    student = draw(2, 3, 8, 8, seed=1)
    teacher = draw(2, 5, 4, 4, seed=2)
    a = student.square().mean(dim=1)
    pooled = torch.stack([a[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    torch.testing.assert_close(attention(student, teacher), attention(pooled.sqrt()[:, None], teacher))
    early = attention(torch.nn.functional.avg_pool2d(student, 2), teacher)
    assert early.item() != pytest.approx(attention(student, teacher).item(), rel=0.01)


def test_a_smaller_student_is_interpolated():
    assert attention(draw(2, 3, 4, 4), draw(2, 5, 8, 8)).isfinite()
    assert levels(draw(2, 3, 4, 4), draw(2, 5, 8, 8), level="low").isfinite()


# -- invariances ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_equality_is_zero_and_most_are_blind_to_scale(name):
    student, teacher = draw(3, 3, 4, 4, seed=1), draw(3, 3, 4, 4, seed=2)
    assert LOSSES[name](teacher, teacher).item() == pytest.approx(0, abs=1e-9)
    scale = torch.tensor([0.01, 3.0, 1e4])[:, None, None, None]
    if name in SCALE_FREE:
        torch.testing.assert_close(
            LOSSES[name](student * scale, teacher / scale), LOSSES[name](student, teacher)
        )
    else:
        assert LOSSES[name](student * 3, teacher * 3).item() == pytest.approx(
            9 * LOSSES[name](student, teacher).item()
        )


def test_a_mask_of_ones_is_attention_and_of_zeros_is_nothing():
    student, teacher = draw(3, 5, 4, 4, seed=1), draw(3, 7, 4, 4, seed=2)
    torch.testing.assert_close(
        masked_attention(student, teacher, mask=torch.ones(3, 1, 4, 4)), 16 * attention(student, teacher)
    )
    assert masked_attention(student, teacher, mask=torch.zeros(3, 4, 4)).item() == 0


@pytest.mark.parametrize(("quantile", "kept"), [(0.0, 16), (0.5, 8), (0.75, 4)])
def test_a_mask_from_attributions_by_quantile(quantile, kept):
    attributions = draw(3, 4, 4, seed=3)
    order = attributions.flatten(1).argsort(dim=1, descending=True)
    mask = torch.zeros(3, 16).scatter(1, order[:, :kept], 1.0).view(3, 4, 4)
    student, teacher = draw(3, 5, 4, 4, seed=1), draw(3, 7, 4, 4, seed=2)
    torch.testing.assert_close(
        masked_attention(student, teacher, mask=attributions, quantile=quantile),
        masked_attention(student, teacher, mask=mask),
    )


def test_attention_by_position_does_not_mind_the_number_of_channels_nor_their_order():
    student, teacher = draw(2, 4, 3, 3, seed=1), draw(2, 6, 3, 3, seed=2)
    turned, _ = torch.linalg.qr(draw(6, 6, seed=3))
    rotated = torch.einsum("dc,bchw->bdhw", turned, teacher)
    torch.testing.assert_close(levels(student, rotated, level="low"), levels(student, teacher, level="low"))


# -- gradients of gradients ----------------------------------------------------------------------------


def tiny(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 4, 5)).double()


def test_the_student_s_gradient_is_that_of_each_row_s_own_loss():
    student, images, labels = tiny(), draw(3, 3, 4, 4).requires_grad_(), torch.tensor([0, 4, 2])
    found = input_gradient(student(images), images, labels)
    step = 1e-6
    for i, c, y, x in [(0, 0, 0, 0), (1, 2, 3, 1), (2, 1, 2, 2)]:
        moved = images.detach().clone()
        moved[i, c, y, x] += step
        losses = [
            nn.functional.cross_entropy(student(at)[i : i + 1], labels[i : i + 1])
            for at in (moved, images.detach())
        ]
        assert found[i, c, y, x].item() == pytest.approx((losses[0] - losses[1]).item() / step, abs=1e-5)


@pytest.mark.parametrize("normalised", [False, True])
def test_double_backward_trains_the_student(normalised):
    """gradcheck with respect to the weights, through the gradient of the images."""
    student, labels = tiny(), torch.tensor([0, 4])
    teacher = draw(2, 3, 4, 4, seed=2)
    names = [n for n, _ in student.named_parameters()]

    def of(*weights):
        images = draw(2, 3, 4, 4, seed=1).requires_grad_()
        logits = torch.func.functional_call(student, dict(zip(names, weights, strict=True)), (images,))
        return gradient_attention(input_gradient(logits, images, labels), teacher, normalised=normalised)

    weights = [p.detach().clone().requires_grad_() for p in student.parameters()]
    assert torch.autograd.gradcheck(of, weights)


def test_a_student_with_its_teacher_s_gradient_has_nothing_to_learn():
    student, images, labels = tiny(), draw(2, 3, 4, 4), torch.tensor([1, 3])
    theirs = input_gradient(student(images.requires_grad_()), images, labels).detach()
    loss = gradient_attention(input_gradient(student(images), images, labels), theirs)
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def test_a_row_of_unknown_label_has_no_gradient():
    images = draw(2, 3, 4, 4).requires_grad_()
    found = input_gradient(tiny()(images), images, torch.tensor([1, -1]))
    assert found[0].any() and not found[1].any()


def test_images_that_ask_for_no_gradient_are_refused():
    student, images, labels = tiny(), draw(2, 3, 4, 4), torch.tensor([1, 3])
    with pytest.raises(SpecError, match=r"call images.requires_grad_\(\) before the student"):
        input_gradient(student(images), images, labels)
    logits = student(images)
    with pytest.raises(SpecError, match="do not depend on these images"):
        input_gradient(logits, images.clone().requires_grad_(), labels)
    with pytest.raises(MismatchError, match=r"\(2, 5\) and \(3,\)"):
        input_gradient(logits, images.requires_grad_(), torch.tensor([1, 3, 0]))


# -- numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    teacher = draw(3, 3, 4, 4, seed=1)
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name](x, teacher), draw(3, 3, 4, 4, seed=2).requires_grad_()
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_and_computed_in_float32_under_autocast_too(name, dtype):
    check_computed_in_float32(LOSSES[name], draw(3, 3, 4, 4, seed=1), draw(3, 3, 4, 4, seed=2), dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_flows_into_the_teacher_and_zeros_break_nothing(name):
    teacher = draw(3, 3, 4, 4, seed=1).requires_grad_()
    student = torch.zeros(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name](student, teacher)
    loss.backward()
    assert loss.isfinite() and teacher.grad is None and student.grad.isfinite().all()


# -- bad input -----------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name():
    x = draw(3, 3, 4, 4)
    for name in ("attention", "masked_attention", "levels", "gradient_attention"):
        for other in (x[:2], x[:, 0, 0], x.long()):
            with pytest.raises(MismatchError, match=rf"^{name} (takes|learns)"):
                LOSSES[name](x, other)
    with pytest.raises(MismatchError, match=r"the student's features \(B, C, H, W\), not \(3, 4, 4\)"):
        attention(x[:, 0], x)
    with pytest.raises(MismatchError, match="the teacher's has one: name an earlier layer"):
        attention(x, x[:, :, :1, :1])
    with pytest.raises(MismatchError, match=r"asks for as many channels.*take level: middle"):
        levels(x, x[:, :2], level="high")
    with pytest.raises(MismatchError, match=r"gradients .* of one shape"):
        gradient_attention(x, x[..., :2])
    with pytest.raises(MismatchError, match="masked_attention is given a mask with values below 0"):
        masked_attention(x, x, mask=x[:, :1])
    with pytest.raises(MismatchError, match=r"masked_attention takes a mask \(B, h, w\)"):
        masked_attention(x, x, mask=torch.ones(2, 4, 4))


def test_options_out_of_range_are_refused():
    x = draw(3, 3, 4, 4)
    for p in (0.5, -1, math.nan, "2"):
        with pytest.raises(SpecError, match="p must be finite and at least 1"):
            attention(x, x, p=p)
    with pytest.raises(SpecError, match="needs a mask: name the target that holds it"):
        masked_attention(x, x)
    for quantile in (-0.1, 1, 2, math.nan):
        with pytest.raises(SpecError, match="masked_attention: quantile"):
            masked_attention(x, x, mask=MASK, quantile=quantile)
    with pytest.raises(SpecError, match=r"level='mid'.*did you mean 'middle'"):
        levels(x, x, level="mid")
