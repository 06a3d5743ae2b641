"""Losses whose target is alive: a peer, or the network's own deepest exit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formulas import draw, softmax
from softcache_train.objectives import cross_entropy, kd, mutual, own_exits

from softcache.errors import MismatchError, SpecError


def divergence(p, q):
    """The mean over rows of KL(p ‖ q), in loops."""
    rows = (
        [a * (math.log(a) - math.log(b)) for a, b in zip(*row, strict=True)] for row in zip(p, q, strict=True)
    )
    return sum(map(sum, rows)) / len(p)


def test_mutual_by_hand_has_the_peer_as_its_target():
    """The peer says 3/4 and 1/4, the student 1/2 and 1/2: 3/4 ln 3/2 + 1/4 ln 1/2, and the other way round 1/2 ln 2/3 +
    1/2 ln 2."""
    student, peer = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    theirs = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    mine = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)
    assert theirs != pytest.approx(mine, rel=0.05)
    assert mutual(student, peer).item() == pytest.approx(theirs)
    assert mutual(peer, student).item() == pytest.approx(mine)


@pytest.mark.parametrize("seed", range(3))
def test_mutual_is_its_formula(seed):
    many, classes = np.random.default_rng(seed).integers(1, 9, 2)
    student, peer = draw(many, classes, seed=seed, scale=2), draw(many, classes, seed=seed + 9, scale=2)
    expected = divergence(softmax(peer.numpy()), softmax(student.numpy()))
    assert mutual(student, peer).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert mutual(student.float(), peer.float()).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_mutual_moves_the_student_alone():
    """By softmax(z) − p_peer over the batch; the other way round it would be another gradient."""
    student, peer = draw(4, 5).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
    mutual(student, peer).backward()
    assert peer.grad is None
    torch.testing.assert_close(student.grad, ((student.softmax(1) - peer.softmax(1)) / 4).detach())
    assert torch.autograd.gradcheck(lambda z: mutual(z, peer), student)


def test_mutual_refuses_what_does_not_fit():
    with pytest.raises(MismatchError, match=r"\(4, 5\) and \(4, 6\)"):
        mutual(torch.zeros(4, 5), torch.zeros(4, 6))


def exits(many=4, classes=5, depth=3, shape=(6,), seed=0):
    logits = [draw(many, classes, seed=seed + e, scale=2) for e in range(depth)]
    features = [draw(many, *shape, seed=seed + 10 + e) for e in range(depth)]
    return logits, features, torch.arange(many) % classes


def taught(logits, features, labels, alpha, T, beta):  # noqa: N803
    """Zhang et al., in loops."""

    def ce(z):
        return -sum(math.log(row[y]) for row, y in zip(softmax(z), labels, strict=True)) / len(labels)

    loss = ce(logits[-1])
    for z, f in zip(logits[:-1], features[:-1], strict=True):
        loss += (1 - alpha) * ce(z) + alpha * T**2 * divergence(softmax(logits[-1] / T), softmax(z / T))
        loss += beta * sum(float(d) ** 2 for d in (f - features[-1]).ravel()) / len(labels)
    return loss


@pytest.mark.parametrize("seed", range(4))
def test_own_exits_is_its_formula(seed):
    random = np.random.default_rng(seed)
    depth, shape = int(random.integers(2, 5)), [(6,), (2, 3, 3)][seed % 2]
    options = {"alpha": random.uniform(), "T": random.uniform(1, 6), "beta": random.uniform(0, 0.5)}
    logits, features, labels = exits(depth=depth, shape=shape, seed=seed)
    numbers = [[x.numpy() for x in found] for found in (logits, features)]
    expected = taught(*numbers, labels.tolist(), **options)
    assert own_exits(logits, features, labels=labels, **options).item() == pytest.approx(expected, rel=1e-9)
    single = [[x.float() for x in found] for found in (logits, features)]
    assert own_exits(*single, labels=labels, **options).item() == pytest.approx(expected, rel=1e-5)
    expected = taught(*numbers, labels.tolist(), 0.1, 3, 1e-6)
    assert own_exits(logits, features, labels=labels).item() == pytest.approx(expected, rel=1e-9)


def test_own_exits_by_hand():
    """Two exits that are sure of nothing, ln 2 each; their features are 3 apart: ln 2 + 0.9 ln 2 + 1e-6 · 9."""
    logits = [torch.zeros(1, 2, dtype=torch.float64)] * 2
    features = [torch.tensor([[1.0, 5.0]]).double(), torch.tensor([[1.0, 2.0]]).double()]
    loss = own_exits(logits, features, labels=torch.tensor([1]))
    assert loss.item() == pytest.approx(1.9 * math.log(2) + 9e-6, rel=1e-12)


def test_own_exits_is_made_of_three_signals():
    logits, features, labels = exits()
    assert torch.equal(
        own_exits(logits, features, labels=labels, alpha=0, beta=0),
        cross_entropy(logits[2], labels)
        + cross_entropy(logits[0], labels)
        + cross_entropy(logits[1], labels),
    )
    only = own_exits(logits, features, labels=labels, alpha=1, beta=0) - cross_entropy(logits[2], labels)
    torch.testing.assert_close(only, kd(logits[0], logits[2], 3.0) + kd(logits[1], logits[2], 3.0))


def test_own_exits_teach_the_deepest_nothing_but_the_labels():
    logits, features, labels = exits()
    for x in (*logits, *features):
        x.requires_grad_()
    own_exits(logits, features, labels=labels, alpha=0.5, beta=0.1).backward()
    expected = (logits[-1].softmax(1) - torch.nn.functional.one_hot(labels, 5)) / 4
    torch.testing.assert_close(logits[-1].grad, expected.detach())
    assert features[-1].grad is None
    assert all(x.grad.any() for x in (*logits[:-1], *features[:-1]))


def test_own_exits_gradients_are_those_of_the_loss():
    logits, features, labels = exits(many=2, shape=(2, 2))
    early = [x.requires_grad_() for x in (*logits[:-1], *features[:-1])]
    options = {"labels": labels, "alpha": 0.5, "beta": 0.1}
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: own_exits([a, b, logits[-1]], [c, d, features[-1]], **options), early
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_number_of_own_exits(dtype):
    logits, features, labels = exits()
    given = [[x.to(dtype) for x in found] for found in (logits, features)]
    expected = own_exits(*([x.float() for x in found] for found in given), labels=labels)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = own_exits(*given, labels=labels)
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_own_exits_of_unknown_labels_learn_from_the_deepest():
    logits, features, _ = exits()
    loss = own_exits(logits, features, labels=torch.full((4,), -1), beta=0)
    torch.testing.assert_close(loss, 0.1 * (kd(logits[0], logits[2], 3.0) + kd(logits[1], logits[2], 3.0)))


def test_own_exits_refuse_what_does_not_fit():
    logits, features, labels = exits()
    with pytest.raises(MismatchError, match=r"own_exits takes logits and features .* 3 and 2"):
        own_exits(logits, features[:-1], labels=labels)
    with pytest.raises(MismatchError, match="at least two"):
        own_exits(logits[:1], features[:1], labels=labels)
    with pytest.raises(MismatchError, match="own_exits compares features of one shape"):
        own_exits(logits, [draw(4, 9), *features[1:]], labels=labels)
    for options in (
        {"alpha": 1.5},
        {"alpha": -0.1},
        {"beta": -1},
        {"beta": math.inf},
        {"T": 0},
        {"alpha": "1"},
    ):
        with pytest.raises(SpecError):
            own_exits(logits, features, labels=labels, **options)
