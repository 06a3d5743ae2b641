"""The response losses against their formulas in numpy and loops, by hand, in their limits, and from what codecs kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import BY_FORMULA, check_computed_in_float32, coded, logits, softmax
from softcache_train.objectives import cross_entropy, dist, dkd, hard, kd, logits_mse, probs_mse
from softcache_train.targets import Dense, Hard, to_tensors

from softcache.errors import MismatchError, SpecError
from softcache.targets import Items, Layout


def random_case(seed):
    """(student, teacher, labels, a random generator) of a random size."""
    rng = np.random.default_rng(seed)
    rows, classes = int(rng.integers(2, 9)), int(rng.integers(2, 12))
    student, teacher = (rng.normal(0, rng.uniform(0.5, 4), (rows, classes)) for _ in range(2))
    return student, teacher, rng.integers(0, classes, rows), rng


# -- each is its formula -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_logits_mse_is_its_formula(seed):
    student, teacher, _, _ = random_case(seed)
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += sum(((a - sum(s) / len(s)) - (b - sum(t) / len(t))) ** 2 for a, b in zip(s, t, strict=True))
    found = logits_mse(torch.tensor(student), torch.tensor(teacher))
    assert found.item() == pytest.approx(total / student.size, **BY_FORMULA)


@pytest.mark.parametrize("seed", range(6))
def test_probs_mse_is_its_formula(seed):
    student, teacher, _, rng = random_case(seed)
    T = rng.uniform(0.5, 9)  # noqa: N806
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += T**2 * sum((softmax(s / T) - softmax(t / T)) ** 2)
    found = probs_mse(torch.tensor(student), torch.tensor(teacher), T=T)
    assert found.item() == pytest.approx(total / len(student), **BY_FORMULA)


@pytest.mark.parametrize("seed", range(6))
def test_hard_is_its_formula(seed):
    student, teacher, _, _ = random_case(seed)
    total = -sum(
        np.log(softmax(s))[max(range(len(t)), key=t.__getitem__)]
        for s, t in zip(student, teacher, strict=True)
    )
    found = hard(torch.tensor(student), torch.tensor(teacher))
    assert found.item() == pytest.approx(total / len(student), **BY_FORMULA)


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def decoupled(s, t, y, T):  # noqa: N803
    """TCKD and NCKD of one row, as the paper's section 3.1 defines them, from probabilities."""
    p, q = softmax(t / T), softmax(s / T)
    binary = kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
    others = [j for j in range(len(s)) if j != y]
    return binary, kl(p[others] / (1 - p[y]), q[others] / (1 - q[y]))


@pytest.mark.parametrize("seed", range(8))
def test_dkd_is_its_formula(seed):
    student, teacher, labels, rng = random_case(seed)
    T, alpha, beta = rng.uniform(1, 8), rng.uniform(0, 3), rng.uniform(0, 9)  # noqa: N806
    total = 0.0
    for s, t, y in zip(student, teacher, labels, strict=True):
        binary, others = decoupled(s, t, y, T)
        total += T**2 * (alpha * binary + beta * others)
    found = dkd(
        torch.tensor(student), torch.tensor(teacher), labels=torch.tensor(labels), alpha=alpha, beta=beta, T=T
    )
    assert found.item() == pytest.approx(total / len(student), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_dist_is_its_formula(seed):
    student, teacher, _, rng = random_case(seed)
    T, beta, gamma = rng.uniform(0.5, 8), rng.uniform(0, 3), rng.uniform(0, 3)  # noqa: N806
    p = np.stack([softmax(t / T) for t in teacher])
    q = np.stack([softmax(s / T) for s in student])
    inter = np.mean([1 - np.corrcoef(q[i], p[i])[0, 1] for i in range(len(p))])
    intra = np.mean([1 - np.corrcoef(q[:, j], p[:, j])[0, 1] for j in range(p.shape[1])])
    found = dist(torch.tensor(student), torch.tensor(teacher), beta=beta, gamma=gamma, T=T)
    assert found.item() == pytest.approx(T**2 * (beta * inter + gamma * intra), rel=1e-7, abs=1e-9)


# -- by hand -------------------------------------------------------------------------------------------


def test_logits_mse_by_hand():
    """(1, 3) and (0, 0), centred (−1, 1) and (0, 0): (1 + 1) / 2."""
    assert logits_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]])).item() == 1.0


def test_probs_mse_by_hand():
    """(1/2, 1/2) and (3/4, 1/4): 2 · 1/16."""
    teacher = torch.tensor([[np.log(3), 0.0]])
    assert probs_mse(torch.zeros(1, 2), teacher).item() == pytest.approx(1 / 8)


def test_hard_by_hand():
    assert hard(torch.zeros(3, 4), torch.eye(3, 4)).item() == pytest.approx(np.log(4))


def test_dkd_by_hand():
    """The teacher says 1/2, 3/8, 1/8 of label 0, the student a third each: TCKD = ln 2 of 1/2 against 1/3 and 1/2 against
    2/3, NCKD of 3/4 and 1/4 against halves."""
    teacher, student = torch.tensor([[1 / 2, 3 / 8, 1 / 8]]).log(), torch.zeros(1, 3)
    labels = torch.tensor([0])
    tckd = 0.5 * np.log(3 / 2) + 0.5 * np.log(3 / 4)
    nckd = 0.75 * np.log(3 / 2) + 0.25 * np.log(1 / 2)
    for alpha, beta in ((1, 0), (0, 1), (2, 3)):
        found = dkd(student, teacher, labels=labels, alpha=alpha, beta=beta, T=1.0)
        assert found.item() == pytest.approx(alpha * tckd + beta * nckd, rel=1e-5)


def test_dist_by_hand():
    """Two classes: in a row ρ is ±1. Rows agree once and differ once: inter 1; within a class the two rows go opposite
    ways: intra 2."""
    student = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert dist(student, teacher, beta=1, gamma=0).item() == pytest.approx(1.0)
    assert dist(student, teacher, beta=0, gamma=1).item() == pytest.approx(2.0)


# -- limits and invariances ----------------------------------------------------------------------------


def test_kd_at_high_temperature_is_half_of_logits_mse():
    student, teacher = logits(5, 10, seed=5), logits(5, 10, seed=6)
    (hot,) = torch.autograd.grad(kd(student.requires_grad_(), teacher, 1e5), student)
    (squares,) = torch.autograd.grad(logits_mse(student, teacher), student)
    torch.testing.assert_close(hot, squares / 2, rtol=1e-3, atol=1e-6)


def test_kd_is_tckd_and_nckd():
    """Eq. 5: KD = TCKD + (1 − p_t[y]) · NCKD, of one row."""
    student, teacher, labels = logits(1, 7, seed=1), logits(1, 7, seed=2), torch.tensor([3])
    for T in (1.0, 4.0):  # noqa: N806
        p = torch.softmax(teacher / T, 1)[0, 3].item()
        found = dkd(student, teacher, labels=labels, alpha=1.0, beta=1 - p, T=T)
        torch.testing.assert_close(found, kd(student, teacher, T))


def norms(objective, **options):
    found = []
    for T in (4.0, 8.0, 20.0):  # noqa: N806
        student = logits(64, 10, seed=7, scale=1.0).requires_grad_()
        objective(student, logits(64, 10, seed=8), T=T, **options).backward()
        found.append(student.grad.norm().item())
    return found


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (probs_mse, {}),
        (dkd, {"labels": torch.arange(64) % 10}),
        (dkd, {"labels": torch.zeros(64).long(), "alpha": 0}),
    ],
)
def test_gradients_keep_their_size_over_temperatures(objective, options):
    found = norms(objective, **options)
    assert max(found) / min(found) < 1.6


def losses(classes=6, rows=4):
    labels = torch.arange(rows) % classes
    return {
        "logits_mse": logits_mse,
        "probs_mse": lambda s, t: probs_mse(s, t, T=2.0),
        "hard": hard,
        "dkd": lambda s, t: dkd(s, t, labels=labels, T=2.0),
        "dist": lambda s, t: dist(s, t, T=2.0),
    }


@pytest.mark.parametrize("name", losses())
def test_a_shift_of_a_row_changes_nothing_and_equality_is_zero(name):
    loss, student, teacher = losses()[name], logits(4, 6, seed=9), logits(4, 6, seed=10)
    shift = torch.tensor([[3.0], [-1.0], [0.0], [50.0]], dtype=torch.float64)
    torch.testing.assert_close(loss(student + shift, teacher - shift), loss(student, teacher))
    if name != "hard":
        same = teacher.clone().requires_grad_()
        loss(same + shift, teacher).backward()
        assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-9)
        assert same.grad.abs().max() < 1e-7


def test_dist_is_blind_to_scale_of_probabilities_and_dkd_to_the_order_of_the_others():
    """Y_s = a·Y_t + b row by row: as far as the teacher is concerned the same relation."""
    p = torch.softmax(logits(5, 4, seed=1), 1)
    a = 0.5
    mixed = a * p + (1 - a) / 4  # still probabilities, and a straight line of the teacher's
    assert dist(mixed.log(), p.log()).item() == pytest.approx(0, abs=1e-9)
    student, teacher, labels = logits(3, 5, seed=2), logits(3, 5, seed=3), torch.tensor([0, 0, 0])
    order = torch.tensor([0, 3, 1, 4, 2])
    torch.testing.assert_close(
        dkd(student, teacher, labels=labels), dkd(student[:, order], teacher[:, order], labels=labels)
    )


def test_dkd_of_unknown_labels():
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    labels = torch.tensor([0, -1, 2, -1, -1, 1])
    known = labels >= 0
    expected = dkd(student[known], teacher[known], labels=labels[known]) * known.sum() / 6
    torch.testing.assert_close(dkd(student, teacher, labels=labels), expected)
    assert dkd(student, teacher, labels=torch.full((6,), -1)).item() == 0


def test_dkd_of_a_teacher_that_is_sure_to_the_last_bit():
    """1 − p[y] is 0 in float32, and its logarithm is not."""
    teacher = torch.tensor([[200.0, 1.0, 0.0]])
    student = torch.tensor([[300.0, 0.0, 0.0]], requires_grad=True)
    loss = dkd(student, teacher, labels=torch.tensor([0]), T=1.0)
    loss.backward()
    assert loss.isfinite() and loss > 0 and student.grad.isfinite().all()


def test_dist_of_constant_logits_is_finite():
    student = torch.zeros(4, 5, requires_grad=True)
    loss = dist(student, logits(4, 5).float())
    loss.backward()
    assert loss.item() == pytest.approx(2.0) and student.grad.isfinite().all()


# -- numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", losses())
def test_gradcheck(name):
    teacher = logits(4, 6, seed=12, scale=1.0)
    assert torch.autograd.gradcheck(
        lambda z: losses()[name](z, teacher), logits(4, 6, seed=11, scale=1.0).requires_grad_()
    )


@pytest.mark.parametrize("name", losses())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_and_computed_in_float32_under_autocast_too(name, dtype):
    def loss(student, teacher):
        return losses()[name](student, Dense(teacher))

    check_computed_in_float32(loss, logits(4, 6, seed=1), logits(4, 6, seed=2), dtype)


@pytest.mark.parametrize("name", losses())
def test_no_gradient_flows_into_the_teacher(name):
    teacher = logits(4, 6).requires_grad_()
    losses()[name](logits(4, 6, seed=1).requires_grad_(), teacher).backward()
    assert teacher.grad is None


# -- from what codecs kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["topk(2)", "packed(12)", "argmax"])
def test_hard_from_what_codecs_kept_is_that_of_whole_logits(text):
    student, teacher = logits(16, 20, seed=1), logits(16, 20, seed=2)
    expected = hard(student, teacher)
    torch.testing.assert_close(hard(student, to_tensors(coded(teacher, text))), expected)
    torch.testing.assert_close(expected, cross_entropy(student, teacher.argmax(1)))


def squares_of_row(student, kept, T, spread):  # noqa: N803
    k = int((kept.value > -np.inf).sum())
    index, rest = kept.index[:k], np.setdiff1d(np.arange(len(student)), kept.index[:k])
    log_p, log_rest = kept.split(T)
    q = softmax(student / T)
    total = sum((q[j] - np.exp(lp)) ** 2 for j, lp in zip(index, log_p[:k], strict=True))
    if spread:
        return total + sum((q[j] - np.exp(log_rest) / len(rest)) ** 2 for j in rest)
    return total + (q[rest].sum() - np.exp(log_rest)) ** 2


@pytest.mark.parametrize("tail", ["bucket", "spread"])
@pytest.mark.parametrize("T", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("text", ["topk(3, tail={})", "packed(12, tail={})"])
def test_probs_mse_from_what_was_kept(text, tail, T):  # noqa: N803
    student = logits(12, 10, seed=1)
    teacher = logits(12, 10, seed=2) * torch.linspace(0.2, 6, 12)[:, None]
    rows = coded(teacher, text.format(tail))
    expected = np.mean(
        [squares_of_row(z, rows[i], T, tail == "spread") for i, z in enumerate(student.numpy())]
    )
    target = to_tensors(rows)
    assert probs_mse(student, target, T=T).item() == pytest.approx(T**2 * expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("tail", ["bucket", "spread"])
def test_probs_mse_gradient_from_what_was_kept(tail):
    target = to_tensors(coded(logits(3, 7, seed=4), f"packed(12, tail={tail})"))
    assert torch.autograd.gradcheck(
        lambda z: probs_mse(z, target, T=3.0), logits(3, 7, seed=3).requires_grad_()
    )


def test_probs_mse_with_nothing_left_out_is_that_of_whole_logits():
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)
    for tail in ("bucket", "spread"):
        sparse = to_tensors(coded(teacher, f"topk(4, tail={tail})"))
        torch.testing.assert_close(
            probs_mse(student, sparse, T=2.0), probs_mse(student, teacher, T=2.0), rtol=1e-3, atol=1e-5
        )


def test_probs_mse_from_draws_has_the_right_gradient_on_average():
    teacher, student = logits(1, 6, seed=1, scale=1.0), logits(1, 6, seed=2).requires_grad_()
    (expected,) = torch.autograd.grad(probs_mse(student, teacher), student)
    target = to_tensors(coded(teacher.repeat(200, 1) + torch.arange(200)[:, None] * 1e-3, "sample(5)"))
    many = student.detach().repeat(200, 1).requires_grad_()
    (found,) = torch.autograd.grad(probs_mse(many, target), many)
    torch.testing.assert_close(found.sum(0), expected[0], atol=0.02, rtol=0.05)
    with pytest.raises(SpecError, match="T=1"):
        probs_mse(many, target, T=2.0)


def test_probs_mse_from_hard_labels_is_that_of_a_sure_teacher():
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)
    sure = torch.where(torch.nn.functional.one_hot(teacher.argmax(1), 5) > 0, 1e4, 0.0).double()
    torch.testing.assert_close(
        probs_mse(student, to_tensors(coded(teacher, "argmax"))), probs_mse(student, sure)
    )


def test_a_data_loader_s_batch_is_the_same():
    decoded = coded(logits(6, 20, seed=6), "topk(4, tail=spread)")
    collated = torch.utils.data.default_collate([decoded[i].arrays() for i in range(6)])
    student = logits(6, 20)
    for loss in (hard, probs_mse):
        assert loss(student, collated).item() == loss(student, to_tensors(decoded)).item()


# -- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logits_mse", "dkd", "dist"])
@pytest.mark.parametrize(
    ("text", "told"), [("topk(2)", "the largest"), ("sample(3)", "draws"), ("argmax", "the teacher's class")]
)
def test_who_needs_whole_logits_says_so(name, text, told):
    with pytest.raises(MismatchError, match=rf"{name} needs whole logits.*{told}.*full\(u8\) or full\(f16\)"):
        losses()[name](logits(4, 6), to_tensors(coded(logits(4, 6), text)))


def test_hard_refuses_draws():
    with pytest.raises(MismatchError, match="sample kept draws: cache it with argmax"):
        hard(logits(4, 6), to_tensors(coded(logits(4, 6), "sample(3)")))


@pytest.mark.parametrize("name", losses())
def test_what_does_not_fit_is_refused_by_name(name):
    loss = losses()[name]
    with pytest.raises(MismatchError, match=rf"{name} takes .*\(4, 6\) and \(4, 5\)"):
        loss(logits(4, 6), logits(4, 5))
    with pytest.raises(MismatchError, match=r"\(4, 6\) and \(1, 6\)"):
        loss(logits(4, 6), logits(1, 6))  # would broadcast
    with pytest.raises(MismatchError, match=r"\(4, 6\) and \(4, 9\)"):
        loss(logits(4, 6), Hard(torch.zeros(4, dtype=torch.int64), 9))
    items = to_tensors(Items.whole(Layout({"logits": 2, "boxes": 4}), np.zeros((4, 5, 6), np.float32)))
    with pytest.raises(MismatchError, match=f"{name} learns from logits, and this target has"):
        loss(logits(4, 6), items)


def test_options_out_of_range_are_refused():
    z, y = logits(4, 6), torch.arange(4)
    for T in (0, -1.0, np.nan, np.inf, "4"):  # noqa: N806
        for loss, others in ((probs_mse, {}), (dist, {}), (dkd, {"labels": y})):
            with pytest.raises(SpecError, match="T must be finite and above 0"):
                loss(z, z, T=T, **others)
    with pytest.raises(SpecError, match="dkd: the weight alpha must be finite and at least 0, not -1"):
        dkd(z, z, labels=y, alpha=-1)
    with pytest.raises(SpecError, match="dist: beta and gamma are all 0"):
        dist(z, z, beta=0, gamma=0)
    with pytest.raises(MismatchError, match=r"labels \(B,\), not \(4, 6\) and \(3,\)"):
        dkd(z, z, labels=y[:3])
    with pytest.raises(MismatchError, match="this batch has one: raise global_batch"):
        dist(z[:1], z[:1])
