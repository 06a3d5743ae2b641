"""The feature losses against their formulas in numpy and loops, by hand, and in their invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formulas import BY_FORMULA, check_computed_in_float32, coded, draw
from softcache_train.objectives import (
    ActivationBoundary,
    Channelwise,
    Hint,
    Pearson,
    Vid,
    activation_boundary,
    channelwise,
    hint,
    pearson,
)
from softcache_train.objectives.adapter import Adapter
from softcache_train.objectives.resample import resample
from softcache_train.targets import to_tensors

from softcache import codecs
from softcache.errors import MismatchError, SpecError
from softcache.targets.feature_map import FeatureMap

STATELESS = {
    "hint": hint,
    "pearson": pearson,
    "channelwise": lambda s, t: channelwise(s, t, T=2.0),
    "activation_boundary": activation_boundary,
}
LEARNED = {
    "hint": Hint,
    "pearson": Pearson,
    "channelwise": Channelwise,
    "activation_boundary": ActivationBoundary,
}
LEARNED["vid"] = Vid


def random_case(seed):
    """(student, teacher, a random generator): maps of a random size."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(2, 6, 4))
    return rng.normal(0, 2, shape), rng.normal(1, 3, shape), rng


# -- each is its formula -------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["cells", "mask", "rows"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_hint_is_its_formula(seed, masked, over):
    student, teacher, rng = random_case(seed)
    rows, channels, height, width = student.shape
    mask = rng.uniform(0, 2, (rows, height, width)) if masked else np.ones((rows, height, width))
    total = 0.0
    for i in range(rows):
        summed = 0.0
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    summed += mask[i, y, x] * (student[i, c, y, x] - teacher[i, c, y, x]) ** 2
        total += (
            summed / {"cells": channels * height * width, "mask": channels * mask[i].sum(), "rows": 1}[over]
        )
    given = {"mask": torch.tensor(mask)} if masked else {}
    found = hint(torch.tensor(student), torch.tensor(teacher), over=over, **given)
    assert found.item() == pytest.approx(total / rows, **BY_FORMULA)


@pytest.mark.parametrize("seed", range(5))
def test_pearson_is_its_formula(seed):
    student, teacher, _ = random_case(seed)
    total = 0.0
    for c in range(student.shape[1]):
        s, t = student[:, c].ravel(), teacher[:, c].ravel()
        s, t = (s - s.mean()) / s.std(), (t - t.mean()) / t.std()
        total += sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
    found = pearson(torch.tensor(student), torch.tensor(teacher)).item()
    assert found == pytest.approx(total / (2 * student.size), **BY_FORMULA)
    r = [np.corrcoef(student[:, c].ravel(), teacher[:, c].ravel())[0, 1] for c in range(student.shape[1])]
    assert found == pytest.approx(1 - np.mean(r), **BY_FORMULA)


@pytest.mark.parametrize("seed", range(5))
def test_channelwise_is_its_formula(seed):
    student, teacher, rng = random_case(seed)
    T = rng.uniform(0.5, 6)  # noqa: N806
    total = 0.0
    for i in range(len(student)):
        for c in range(student.shape[1]):
            q, p = (np.exp(x[i, c].ravel() / T) for x in (student, teacher))
            q, p = q / q.sum(), p / p.sum()
            total += T**2 / student.shape[1] * sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    found = channelwise(torch.tensor(student), torch.tensor(teacher), T=T)
    assert found.item() == pytest.approx(total / len(student), **BY_FORMULA)


@pytest.mark.parametrize("seed", range(5))
def test_activation_boundary_is_its_formula(seed):
    student, teacher, rng = random_case(seed)
    m = rng.uniform(0.2, 3)
    total = 0.0
    for s, t in zip(student.ravel(), teacher.ravel(), strict=True):
        total += (s + m) ** 2 * (s > -m and t <= 0) + (s - m) ** 2 * (s <= m and t > 0)
    found = activation_boundary(torch.tensor(student), torch.tensor(teacher), margin=m)
    assert found.item() == pytest.approx(total / len(student), **BY_FORMULA)


@pytest.mark.parametrize("seed", range(4))
def test_vid_is_its_formula(seed):
    student, teacher, rng = random_case(seed)
    teacher = np.concatenate([teacher, teacher[:, :1] * 2], axis=1)
    loss = Vid(student.shape[1:], teacher.shape[1:], variance=rng.uniform(0.5, 9)).double()
    with torch.no_grad():
        loss.scale += torch.tensor(rng.normal(0, 1, teacher.shape[1]))
    w1, w2, w3 = (loss.mean[i].weight.detach().numpy()[:, :, 0, 0] for i in (0, 2, 4))
    a = loss.scale.detach().numpy()
    total = 0.0
    for i, _, y, x in np.ndindex(len(student), 1, *student.shape[2:]):
        mu = w3 @ np.maximum(w2 @ np.maximum(w1 @ student[i, :, y, x], 0), 0)
        for c in range(teacher.shape[1]):
            variance = np.log(1 + np.exp(a[c])) + 1e-5
            total += 0.5 * ((mu[c] - teacher[i, c, y, x]) ** 2 / variance + np.log(variance))
    found = loss(torch.tensor(student), torch.tensor(teacher))
    assert found.item() == pytest.approx(total / teacher.size, **BY_FORMULA)


# -- by hand -------------------------------------------------------------------------------------------


def test_hint_by_hand():
    """One row, two channels, two cells that are off by 1 and by 3 in both: under a mask only the second counts."""
    student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 3.0]], [[1.0, 3.0]]]])
    mask = torch.tensor([[[0.0, 1.0]]])
    assert hint(student, teacher).item() == 5.0
    assert hint(student, teacher, over="rows").item() == 20.0
    assert hint(student, teacher, mask=mask).item() == 4.5
    assert hint(student, teacher, mask=mask, over="mask").item() == 9.0
    assert hint(student, teacher, mask=mask[:, None], over="rows").item() == 18.0


def test_pearson_by_hand():
    """1, 2, 3 and 1, 2, 3; 3, 2, 1; 5, 5, 5: correlations 1, −1, and half for what does not vary."""
    s = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)
    for t, expected in (([1.0, 2, 3], 0.0), ([3.0, 2, 1], 2.0), ([5.0, 5, 5], 0.5)):
        assert pearson(s, torch.tensor(t).reshape(1, 1, 1, 3)).item() == pytest.approx(expected, abs=1e-6)


def test_channelwise_by_hand():
    """The teacher looks 3 : 1, the student 1 : 1."""
    teacher = torch.tensor([math.log(3), 0.0]).reshape(1, 1, 1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert channelwise(torch.zeros(1, 1, 1, 2), teacher).item() == pytest.approx(expected, rel=1e-5)


def test_activation_boundary_by_hand():
    student = torch.tensor([[-2.0, 0.0, 2.0, -2.0, 0.0, 2.0]])
    teacher = torch.tensor([[-1.0, 0.0, -1.0, 1.0, 1.0, 1.0]])
    assert activation_boundary(student, teacher).item() == 0 + 1 + 9 + 9 + 1 + 0


def test_vid_by_hand():
    """At first, whatever the layers: σ² = 5; of a student that says zeros ½ (t² / 5 + ln 5)."""
    loss = Vid((2, 1, 1), (3, 1, 1))
    assert loss.variance.tolist() == pytest.approx([5.0] * 3)
    found = loss(torch.zeros(4, 2, 1, 1), torch.full((4, 3, 1, 1), 2.0))
    assert found.item() == pytest.approx((4 / 5 + math.log(5)) / 2, rel=1e-5)


def test_vid_is_least_where_the_spread_is_that_of_what_it_cannot_know():
    """Of a student that says zeros: σ² = mean t², and nothing pulls at it there."""
    teacher = draw(64, 1, 4, 4, seed=3, scale=3.0)
    wanted = teacher.square().mean().item()
    for variance, slope in ((wanted / 2, -1), (wanted, 0), (wanted * 2, 1)):
        loss = Vid((2, 4, 4), (1, 4, 4), variance=variance).double()
        loss(torch.zeros(64, 2, 4, 4, dtype=torch.float64), teacher).backward()
        assert np.sign(round(loss.scale.grad.item(), 6)) == slope


# -- limits and invariances ----------------------------------------------------------------------------


def test_pearson_is_blind_to_scale_and_offset_of_channels():
    student, teacher = draw(3, 4, 5, 5, seed=1), draw(3, 4, 5, 5, seed=2)
    scale, offset = torch.tensor([1e-3, 2.0, 1e4, 7.0]), torch.tensor([5.0, -3.0, 0.0, 1e3])
    moved = teacher * scale[:, None, None] + offset[:, None, None]
    torch.testing.assert_close(pearson(student, moved), pearson(student, teacher))
    assert pearson(moved, teacher).item() == pytest.approx(0, abs=1e-9)


def test_pearson_measures_a_channel_over_the_batch_not_a_row():
    """A row's own scale counts: PKD standardises a channel over the batch."""
    student, teacher = draw(3, 4, 5, 5, seed=1), draw(3, 4, 5, 5, seed=2)
    moved = teacher * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    assert pearson(student, moved).item() != pytest.approx(pearson(student, teacher).item(), abs=1e-3)


def test_channelwise_is_blind_to_shifts_of_channels_and_has_its_limit():
    student, teacher = draw(3, 4, 5, 5, seed=1), draw(3, 4, 5, 5, seed=2)
    shift = draw(3, 4, 1, 1, seed=3, scale=9.0)
    torch.testing.assert_close(channelwise(student + shift, teacher), channelwise(student, teacher))
    hot = channelwise(student, teacher, T=1e4)
    torch.testing.assert_close(
        hot, (student - teacher).var(dim=(2, 3), correction=0).mean() / 2, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("name", ["hint", "pearson", "channelwise"])
def test_equality_is_zero(name):
    teacher = draw(3, 4, 5, 5)
    assert STATELESS[name](teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def test_the_order_of_places_does_not_matter():
    student, teacher, order = draw(3, 4, 5, 5, seed=1), draw(3, 4, 5, 5, seed=2), torch.randperm(25)
    mixed = [x.flatten(2)[:, :, order].reshape(x.shape) for x in (student, teacher)]
    for loss in STATELESS.values():
        torch.testing.assert_close(loss(*mixed), loss(student, teacher))


@pytest.mark.parametrize("over", ["cells", "mask", "rows"])
def test_a_mask_of_ones_is_no_mask_and_what_is_masked_does_not_matter(over):
    student, teacher = draw(3, 4, 6, 6, seed=1), draw(3, 4, 6, 6, seed=2)
    ones = torch.ones(3, 6, 6)
    torch.testing.assert_close(
        hint(student, teacher, mask=ones, over=over), hint(student, teacher, over=over)
    )
    mask = (draw(3, 6, 6, seed=4) > 0).double()
    broken = torch.where(mask[:, None] > 0, student, 1e6)
    torch.testing.assert_close(
        hint(broken, teacher, mask=mask, over=over), hint(student, teacher, mask=mask, over=over)
    )


def test_over_mask_is_a_mean_whatever_the_mask_s_size_or_scale():
    student, teacher = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0)
    mask = torch.zeros(2, 4, 4)
    mask[0, 0, 0] = 0.1
    assert hint(student, teacher, mask=mask, over="mask").item() == pytest.approx(
        2.0
    )  # the second row is empty
    mask[1] = 7
    assert hint(student, teacher, mask=mask, over="mask").item() == pytest.approx(4.0)


def test_an_empty_mask_teaches_nothing_and_breaks_nothing():
    student = draw(2, 3, 4, 4).requires_grad_()
    loss = hint(student, draw(2, 3, 4, 4, seed=1), mask=torch.zeros(2, 4, 4), over="mask")
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


def test_a_finer_mask_is_averaged_over_areas():
    """A cutout of a quarter of the pixels, of cells of 4 × 4 pixels."""
    student, teacher = draw(1, 3, 2, 2, seed=1), draw(1, 3, 2, 2, seed=2)
    pixels = torch.ones(1, 8, 8)
    pixels[:, :4, :2] = 0
    cells = torch.tensor([[[0.5, 1.0], [1.0, 1.0]]])
    torch.testing.assert_close(hint(student, teacher, mask=pixels), hint(student, teacher, mask=cells))


# -- from what codecs kept -----------------------------------------------------------------------------


def test_activation_boundary_of_packed_signs_is_the_same_to_the_last_bit():
    teacher = draw(5, 3, 7, 7, seed=1).float()
    teacher[0, 0, 0] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 0.0])
    signs = to_tensors(FeatureMap(coded(teacher, "sign"))).values
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = (draw(5, 3, 7, 7, seed=2).to(dtype).requires_grad_() for _ in range(2))
        found, expected = activation_boundary(ours, signs), activation_boundary(theirs, teacher)
        assert torch.equal(found, expected)
        found.backward()
        expected.backward()
        assert torch.equal(ours.grad, theirs.grad)


def test_pearson_from_int8_is_that_of_values_not_of_codes():
    teacher = draw(6, 4, 5, 5, seed=1).float() * torch.logspace(-2, 2, 6)[:, None, None, None]
    codec = codecs.parse("int8").codec
    fields = codec.encode(teacher.numpy())
    decoded = torch.from_numpy(codec.decode(fields, (4, 5, 5)))
    student = teacher + draw(6, 4, 5, 5, seed=2).float() * 5
    expected = pearson(student, teacher).item()
    assert pearson(student, decoded).item() == pytest.approx(expected, rel=0.01)
    codes = torch.from_numpy(fields["value"]).float()  # each row on a scale of its own
    assert pearson(student, codes).item() > 10 * expected


# -- adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "learned"),
    [
        ((4, 6, 6), (4, 6, 6), {}, 0),
        ((4, 6, 6), (7, 6, 6), {}, 4 * 7 + 7),
        ((4, 6, 6), (7, 3, 3), {"kind": "3x3"}, 9 * 4 * 7 + 7),
        ((4, 3, 3), (7, 6, 9), {"kind": "1x1", "batch_norm": True}, 4 * 7 + 14),
        ((4, 6, 6), (4, 3, 3), {"kind": "none"}, 0),
        ((4,), (7,), {}, 4 * 7 + 7),
        ((4,), (4,), {"kind": "1x1"}, 4 * 4 + 4),
        ((4, 6, 6), (7,), {}, 4 * 7 + 7),
    ],
)
def test_an_adapter_gives_the_teacher_s_shape(ours, theirs, options, learned):
    adapter = Adapter(ours, theirs, **options)
    found = adapter(torch.randn(5, *ours, dtype=torch.bfloat16))
    assert found.shape == (5, *theirs) and found.dtype == torch.float32
    assert sum(p.numel() for p in adapter.parameters()) == learned


def test_an_adapter_resamples_the_student_and_the_teacher_stays():
    """6 × 6 to 3 × 3 by areas of four, 3 × 3 to 6 × 6 bilinearly."""
    x = draw(2, 3, 6, 6)
    small = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    torch.testing.assert_close(Adapter((3, 6, 6), (3, 3, 3))(x), small)
    torch.testing.assert_close(resample(x, (3, 3)), small)
    wide = resample(x, (12, 3))
    expected = torch.nn.functional.interpolate(x, (12, 3), mode="bilinear")
    torch.testing.assert_close(wide, expected)
    assert resample(x, (6, 6)) is x


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("theirs", [(5, 4, 4), (3, 4, 4), (3, 2, 2), (5, 8, 8)])
def test_learned_losses_move_the_student_and_what_they_learn(name, theirs):
    loss = LEARNED[name]((3, 4, 4), theirs)
    student = draw(6, 3, 4, 4, seed=1).float().requires_grad_()
    teacher = draw(6, *theirs, seed=2).float().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.ndim == 0 and value.isfinite() and student.grad.any() and teacher.grad is None
    for parameter in loss.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    always = {"hint", "vid", "activation_boundary"}
    assert bool(list(loss.parameters())) == (name in always or theirs[0] != 3)


@pytest.mark.parametrize("name", ["hint", "pearson", "activation_boundary", "vid"])
def test_learned_losses_take_vectors(name):
    loss = LEARNED[name]((3,), (5,))
    assert loss(draw(6, 3).float(), draw(6, 5, seed=1).float()).isfinite()


def test_a_regressor_that_is_right_leaves_nothing_to_learn():
    student, join = draw(8, 3, 4, 4, seed=1), draw(5, 3, seed=2)
    teacher = torch.einsum("dc,bchw->bdhw", join, student) + 2
    loss = Hint((3, 4, 4), (5, 4, 4)).double()
    with torch.no_grad():
        loss.adapter.join[0].weight.copy_(join[:, :, None, None])
        loss.adapter.join[0].bias.fill_(2)
    assert loss(student, teacher).item() == pytest.approx(0, abs=1e-20)


def test_hint_hands_its_mask_and_options_on():
    student, teacher, mask = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1), torch.rand(2, 4, 4)
    for over in ("cells", "mask", "rows"):
        for quantile in (None, 0.25):
            loss = Hint((3, 4, 4), (3, 4, 4), adapter="none", over=over, quantile=quantile)
            expected = hint(student, teacher, mask=mask, over=over, quantile=quantile)
            assert torch.equal(loss(student, teacher, mask=mask), expected)


@pytest.mark.parametrize(("quantile", "kept"), [(0.0, 16), (0.5, 8), (0.75, 4)])
def test_a_mask_from_attributions_by_quantile(quantile, kept):
    """Of each image those cells that speak for the label most, however negative; finer ones are averaged first."""
    attributions = draw(2, 4, 4, seed=3) - 9
    order = attributions.flatten(1).argsort(dim=1, descending=True)
    mask = torch.zeros(2, 16).scatter(1, order[:, :kept], 1.0).view(2, 4, 4)
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    expected = hint(student, teacher, mask=mask)
    torch.testing.assert_close(hint(student, teacher, mask=attributions, quantile=quantile), expected)
    finer = attributions.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    torch.testing.assert_close(hint(student, teacher, mask=finer, quantile=quantile), expected)


# -- numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATELESS)
def test_gradcheck(name):
    teacher = draw(2, 3, 3, 3, seed=1)
    assert torch.autograd.gradcheck(
        lambda x: STATELESS[name](x, teacher), draw(2, 3, 3, 3, seed=2).requires_grad_()
    )


@pytest.mark.parametrize("over", ["cells", "mask", "rows"])
def test_gradcheck_of_a_masked_hint(over):
    teacher, mask = draw(2, 3, 3, 3, seed=1), torch.rand(2, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: hint(x, teacher, mask=mask, over=over), draw(2, 3, 3, 3, seed=2).requires_grad_()
    )


@pytest.mark.parametrize("name", LEARNED)
def test_gradcheck_of_student_and_adapter(name):
    loss = LEARNED[name]((2, 4, 4), (3, 2, 2)).double()
    teacher, values = draw(3, 3, 2, 2, seed=1), [p.detach().clone() for p in loss.parameters()]
    names = [n for n, _ in loss.named_parameters()]

    def of(student, *parameters):
        return torch.func.functional_call(loss, dict(zip(names, parameters, strict=True)), (student, teacher))

    inputs = [draw(3, 2, 4, 4, seed=2), *values]
    loss.eval()  # running statistics of a batch norm would count the calls
    assert torch.autograd.gradcheck(of, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_and_computed_in_float32_under_autocast_too(name, dtype):
    check_computed_in_float32(STATELESS[name], draw(3, 4, 5, 5, seed=1), draw(3, 4, 5, 5, seed=2), dtype)


@pytest.mark.parametrize("name", LEARNED)
def test_adapters_compute_in_float32_under_autocast_too(name):
    loss = LEARNED[name]((3, 4, 4), (5, 2, 2))
    student, teacher = draw(6, 3, 4, 4).bfloat16(), draw(6, 5, 2, 2, seed=1).half()
    expected = loss(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher), expected)


def test_constant_features_are_finite_and_so_are_their_gradients():
    for loss in STATELESS.values():
        student = torch.full((3, 4, 5, 5), 2.0, requires_grad=True)
        value = loss(student, draw(3, 4, 5, 5).float())
        value.backward()
        assert value.isfinite() and student.grad.isfinite().all()


# -- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATELESS)
def test_what_does_not_fit_is_refused_by_name(name):
    loss = STATELESS[name]
    for other in ((2, 3, 4, 5), (2, 5, 4, 4), (1, 3, 4, 4)):
        with pytest.raises(MismatchError, match=rf"{name} takes .*\(2, 3, 4, 4\) and the teacher's "):
            loss(draw(2, 3, 4, 4), draw(*other))
    with pytest.raises(MismatchError, match=f"{name} learns from .* the teacher's is a torch.int64 tensor"):
        loss(draw(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.int64))
    with pytest.raises(MismatchError, match=f"{name} learns from .* the teacher's is a ndarray"):
        loss(draw(2, 3, 4, 4), draw(2, 3, 4, 4).numpy())


def test_shapes_that_no_adapter_joins_are_refused():
    with pytest.raises(MismatchError, match=r"no map is made of a vector: the student's \(4,\)"):
        Hint((4,), (4, 3, 3))
    with pytest.raises(MismatchError, match="differ in channels: take adapter: 1x1"):
        Pearson((4, 3, 3), (5, 3, 3), adapter="none")
    with pytest.raises(MismatchError, match=r"maps \(C, h, w\) and vectors"):
        Vid((4, 3), (4, 3))
    with pytest.raises(MismatchError, match=r"made for the student's \(4, 3, 3\), and is given \(5, 3, 3\)"):
        Hint((4, 3, 3), (4, 3, 3))(draw(2, 5, 3, 3), draw(2, 4, 3, 3))
    with pytest.raises(MismatchError, match=r"vid was made for the teacher's \(4, 3, 3\)"):
        Vid((4, 3, 3), (4, 3, 3))(draw(2, 4, 3, 3), draw(2, 5, 3, 3))


def test_masks_that_do_not_fit_are_refused():
    x = draw(2, 3, 4, 4)
    for mask in (torch.ones(1, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(4, 4)):
        with pytest.raises(MismatchError, match=r"hint takes a mask \(B, h, w\)"):
            hint(x, x, mask=mask)
    with pytest.raises(
        MismatchError, match=r"values below 0, as attributions have: quantile: 0.5 makes a mask"
    ):
        hint(x, x, mask=draw(2, 4, 4))
    with pytest.raises(MismatchError, match="at least as fine as its maps"):
        hint(x, x, mask=torch.ones(2, 2, 8))
    with pytest.raises(MismatchError, match=r"for maps \(B, C, H, W\)"):
        hint(draw(2, 3), draw(2, 3), mask=torch.ones(2, 4, 4))


def test_options_out_of_range_are_refused():
    x = draw(2, 3, 4, 4)
    for margin in (0, -1.0, math.nan, math.inf, "1"):
        with pytest.raises(SpecError, match="margin must be finite and above 0"):
            activation_boundary(x, x, margin=margin)
        with pytest.raises(SpecError, match="margin must be finite and above 0"):
            ActivationBoundary((3, 4, 4), (3, 4, 4), margin=margin)
    for T in (0, math.nan):  # noqa: N806
        with pytest.raises(SpecError, match="T must be finite and above 0"):
            channelwise(x, x, T=T)
        with pytest.raises(SpecError, match="T must be finite and above 0"):
            Channelwise((3, 4, 4), (3, 4, 4), T=T)
    with pytest.raises(SpecError, match="variance must be finite and above 1e-05, not 0"):
        Vid((3, 4, 4), (3, 4, 4), variance=0)
    with pytest.raises(SpecError, match=r"adapter='1x2' \(did you mean '1x1'\?\)"):
        Hint((3, 4, 4), (3, 4, 4), adapter="1x2")
    for quantile in (-0.1, 1, math.nan, "half"):
        with pytest.raises(SpecError, match="hint: quantile must be"):
            Hint((3, 4, 4), (3, 4, 4), quantile=quantile)
    with pytest.raises(SpecError, match=r"over='cell' \(did you mean 'cells'\?\)"):
        Hint((3, 4, 4), (3, 4, 4), over="cell")


def test_what_cannot_vary_is_refused():
    with pytest.raises(MismatchError, match="raise global_batch"):
        pearson(draw(1, 5), draw(1, 5))
    with pytest.raises(MismatchError, match="has one: name an earlier layer"):
        channelwise(draw(3, 5, 1, 1), draw(3, 5, 1, 1))
