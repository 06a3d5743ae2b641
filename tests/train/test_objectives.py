"""Losses against float64 transcriptions of their formulas, by hand, and in their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import coded, logits, softmax
from softcache_train.objectives import cross_entropy, kd
from softcache_train.targets import Dense, to_tensors

from softcache import codecs
from softcache.errors import MismatchError, SpecError
from softcache.targets import Items, Layout


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
    values = np.zeros((4, 5, 7), np.float32)
    items = Items.whole(Layout({"logits": 3, "boxes": 4}), values)
    for other in (items, to_tensors(items), items.arrays(), logits(4, 10).numpy()):
        with pytest.raises(MismatchError, match="kd learns from logits"):
            kd(logits(4, 10), other)
    with pytest.raises(MismatchError, match=r"\(4, 10\) and \(4, 9\)"):
        kd(torch.zeros(4, 10), torch.zeros(4, 9))
    with pytest.raises(MismatchError):
        kd(torch.zeros(4, 10), torch.zeros(1, 10))  # would broadcast
    for T in (0, -1.0, np.nan, np.inf):  # noqa: N806
        with pytest.raises(SpecError, match="T must be finite and above 0"):
            kd(torch.zeros(4, 10), torch.zeros(4, 10), T)


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


# -- from what topk kept -------------------------------------------------------------------------------


def bucket_kl(student: torch.Tensor, teacher: torch.Tensor, k: int, T: float) -> torch.Tensor:  # noqa: N803
    """Dense, from the teacher's own logits: its k largest classes, and all others as one."""
    index = teacher.argsort(dim=1, descending=True, stable=True)
    p, q = (torch.softmax(z / T, 1).gather(1, index) for z in (teacher, student))
    p, q = (torch.cat([x[:, :k], x[:, k:].sum(1, keepdim=True)], 1) for x in (p, q))
    return T**2 * (p * (p.log() - q.log())).sum(1).mean()


def spread_kl(student: torch.Tensor, teacher: torch.Tensor, k: int, T: float) -> torch.Tensor:  # noqa: N803
    """Dense, the teacher's mass beyond the k largest classes spread evenly."""
    index = teacher.argsort(dim=1, descending=True, stable=True)
    p, log_q = torch.softmax(teacher / T, 1), torch.log_softmax(student / T, 1)
    p, log_q = p.gather(1, index), log_q.gather(1, index)
    p = torch.cat([p[:, :k], p[:, k:].mean(1, keepdim=True).expand(-1, p.shape[1] - k)], 1)
    return T**2 * (p * (p.log() - log_q)).sum(1).mean()


@pytest.mark.parametrize(("tail", "dense"), [("bucket", bucket_kl), ("spread", spread_kl)])
@pytest.mark.parametrize("T", [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0])
@pytest.mark.parametrize(("classes", "k"), [(10, 3), (1000, 10), (5, 1), (5, 4)])
def test_sparse_kd_is_the_dense_formula_and_so_is_its_gradient(tail, dense, T, classes, k):  # noqa: N803
    """Also between the stored temperatures, where the tail is interpolated."""
    teacher = logits(16, classes, seed=2)
    ours, reference = (logits(16, classes, seed=1).requires_grad_() for _ in range(2))
    loss = kd(ours, to_tensors(coded(teacher, f"topk({k}, tail={tail})")), T)
    expected = dense(reference, teacher, k, T)
    assert loss.item() == pytest.approx(expected.item(), rel=0.02, abs=1e-3)
    loss.backward()
    expected.backward()
    error = (ours.grad - reference.grad).norm() / reference.grad.norm()
    assert error < (1e-3 if T in (1, 2, 4, 8) else 0.02)


def of_row(student: torch.Tensor, kept, T: float, spread: bool) -> torch.Tensor:  # noqa: N803
    """Of one row, by the definition, from what a codec kept of it: as many classes as have a value, and the rest."""
    k = int((kept.value > -np.inf).sum())
    index, rest = kept.index[:k], np.setdiff1d(np.arange(len(student)), kept.index[:k])
    log_p, log_rest = (torch.as_tensor(np.asarray(x)) for x in kept.split(T))
    log_p, log_q = log_p[:k], torch.log_softmax(student / T, 0)
    mine = log_q[rest].mean() + np.log(len(rest)) if spread else log_q[rest].logsumexp(0)
    return T**2 * ((log_p.exp() * (log_p - log_q[index])).sum() + log_rest.exp() * (log_rest - mine))


@pytest.mark.parametrize("tail", ["bucket", "spread"])
@pytest.mark.parametrize("T", [1.0, 3.0, 8.0])
@pytest.mark.parametrize(("classes", "size"), [(1000, 44), (10, 12), (2, 12)])
def test_kd_of_rows_that_keep_different_numbers_of_classes(tail, T, classes, size):  # noqa: N803
    teacher = logits(16, classes, seed=2) * torch.linspace(0.2, 8, 16)[:, None]
    kept = coded(teacher, f"packed({size}, tail={tail})")
    assert classes == 2 or len(set((kept.value > -np.inf).sum(1).tolist())) > 1
    ours, reference = (logits(16, classes, seed=1).requires_grad_() for _ in range(2))
    loss = kd(ours, to_tensors(kept), T)
    expected = torch.stack([of_row(z, kept[i], T, tail == "spread") for i, z in enumerate(reference)]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-5, atol=1e-9)
    assert not (ours.grad[:, 0] == 0).all()


def anchored(teacher: torch.Tensor):
    """Of rows against the base of two views, the rows and others beside them."""
    codec = codecs.anchored.Anchored(listed=4, extra=2, views=2)
    values = teacher.float().numpy()
    shared = codec.anchor(np.stack([values, values + logits(*teacher.shape, seed=9).float().numpy() / 4]))
    return codec.decode(codec.encode(values, shared) | shared, values.shape[1:])


@pytest.mark.parametrize("T", [1.0, 1.5, 4.0, 8.0])
@pytest.mark.parametrize("classes", [7, 300])
def test_anchored_kd_is_the_dense_formula_of_what_was_kept_and_so_is_its_gradient(T, classes):  # noqa: N803
    teacher = logits(16, classes, seed=2)
    kept = anchored(teacher)
    p = torch.as_tensor(kept.log_probs(T))
    ours, reference = (logits(16, classes, seed=1).requires_grad_() for _ in range(2))
    loss = kd(ours, to_tensors(kept), T)
    expected = T**2 * (p.exp() * (p - torch.log_softmax(reference / T, 1))).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-5, atol=1e-9)
    collated = torch.utils.data.default_collate([kept[i].arrays() for i in range(16)])
    assert torch.equal(kd(ours, collated, T), loss)
    single = kd(ours.detach().float(), to_tensors(kept), T)
    assert single.item() == pytest.approx(loss.item(), rel=1e-4)


def test_anchored_kd_refuses_other_temperatures_and_numbers_of_classes():
    target = to_tensors(anchored(logits(4, 9, seed=2)))
    with pytest.raises(SpecError, match="outside 1 to 8"):
        kd(logits(4, 9), target, 16.0)
    with pytest.raises(MismatchError, match=r"\(4, 8\) and \(4, 9\)"):
        kd(logits(4, 8), target, 2.0)
    assert torch.autograd.gradcheck(lambda z: kd(z, target, 3.0), logits(4, 9, seed=3).requires_grad_())


@pytest.mark.parametrize("tail", ["bucket", "spread"])
def test_sparse_kd_gradcheck(tail):
    target = to_tensors(coded(logits(3, 7, seed=4), f"topk(2, tail={tail})"))
    assert torch.autograd.gradcheck(lambda z: kd(z, target, 3.0), logits(3, 7, seed=3).requires_grad_())


def test_sparse_kd_of_the_teacher_itself_is_nothing():
    """The bucket has no opinion on what is in it: its gradient is zero at equality, too."""
    teacher = logits(8, 100, seed=5)
    student = (teacher + 3).requires_grad_()
    loss = kd(student, to_tensors(coded(teacher, "topk(5)")), 4.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-4


def test_sparse_kd_from_a_data_loader_is_the_same():
    decoded = coded(logits(6, 20, seed=6), "topk(4, tail=spread, at=(0.1, 1, 4))")
    collated = torch.utils.data.default_collate([decoded[i].arrays() for i in range(6)])
    student = logits(6, 20)
    for T in (0.1, 4.0):  # noqa: N806
        assert kd(student, collated, T).item() == kd(student, to_tensors(decoded), T).item()


def test_sparse_kd_takes_extreme_logits():
    teacher = torch.tensor([[3e4, 0.0, -3e4, 1.0]])
    loss = kd(torch.zeros(1, 4), to_tensors(coded(teacher, "topk(1)")), 1.0)
    assert loss.item() == pytest.approx(np.log(4))
    far = torch.tensor([[-6e4, 6e4, 6e4, 6e4]], requires_grad=True)
    kd(far, to_tensors(coded(teacher, "topk(1)")), 1.0).backward()
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("T", [0.5, 8.5, 100])
def test_sparse_kd_outside_the_stored_temperatures_is_refused(T):  # noqa: N803
    with pytest.raises(SpecError, match="outside the 1 to 8"):
        kd(logits(2, 5), to_tensors(coded(logits(2, 5), "topk(2)")), T)


def test_kd_from_hard_labels_is_cross_entropy_whatever_the_temperature():
    teacher, student = logits(6, 5, seed=7), logits(6, 5)
    hard = to_tensors(coded(teacher, "argmax"))
    expected = cross_entropy(student, teacher.argmax(1))
    for T in (1.0, 4.0):  # noqa: N806
        torch.testing.assert_close(kd(student, hard, T), expected)
        torch.testing.assert_close(kd(student, teacher.argmax(1), T), expected)
        _, gradient = loss_and_gradient(kd, student, hard, T)
        onehot = torch.eye(5, dtype=torch.float64)[teacher.argmax(1)]
        torch.testing.assert_close(gradient, (torch.softmax(student, 1) - onehot) / 6)


def loss_and_gradient(objective, z, *args):
    z = z.clone().requires_grad_()
    loss = objective(z, *args)
    loss.backward()
    return loss, z.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1.0, 1.5, 4.0, 6.5])
@pytest.mark.parametrize(
    "text", [None, "anchored", "topk(10)", "topk(10, tail=spread)", "packed(44)", "argmax"]
)
def test_autocast_changes_no_number_of_kd(text, T, dtype):  # noqa: N803
    teacher = logits(16, 1000, seed=2).float()
    kept = anchored(teacher) if text == "anchored" else text and coded(teacher, text)
    target = Dense(teacher) if text is None else to_tensors(kept)
    student = logits(16, 1000, seed=1).to(dtype)
    expected = loss_and_gradient(kd, student, target, T)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradient(kd, student, target, T)
    assert found[0].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_number_of_cross_entropy(dtype, mixed):
    z, y = logits(16, 1000, seed=1).to(dtype), torch.arange(16)
    args = (y, y.flip(0), torch.linspace(0, 1, 16)) if mixed else (y,)
    expected = loss_and_gradient(cross_entropy, z.float(), *args)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = loss_and_gradient(cross_entropy, z, *args)
        assert found[0].dtype == torch.float32 and torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1].to(dtype))


@pytest.mark.parametrize("other", ["topk(4, at=(1, 2, 4, 16))", "topk(4, tail=spread)"])
def test_kd_refuses_a_batch_of_rows_kept_in_different_ways(other):
    one, two = (coded(logits(3, 20, seed=6), text) for text in ("topk(4)", other))
    collated = torch.utils.data.default_collate([d[i].arrays() for d in (one, two) for i in range(3)])
    with pytest.raises(MismatchError, match="topk kept the rows of this batch in different ways"):
        kd(logits(6, 20), collated, 2.0)


@pytest.mark.parametrize("text", ["topk(2)", "argmax"])
def test_kd_refuses_kept_classes_of_another_number(text):
    with pytest.raises(MismatchError, match=r"\(2, 9\) and \(2, 5\)"):
        kd(logits(2, 9), to_tensors(coded(logits(2, 5), text)))
    with pytest.raises(MismatchError):
        kd(logits(3, 5), to_tensors(coded(logits(2, 5), text)))
