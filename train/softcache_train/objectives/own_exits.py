"""Be your own teacher: the early exits of a network learn from its last.

Zhang, Song, Gao, Chen, Bao, Ma 2019, "Be Your Own Teacher", arXiv:1905.08094, §3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softcache.errors import MismatchError, SpecError
from softcache_train.objectives.checks import check_least
from softcache_train.objectives.cross_entropy import cross_entropy
from softcache_train.objectives.kd import kd
from softcache_train.objectives.precision import both, exactly


def own_exits(
    exit_logits: Sequence[Tensor],
    exit_features: Sequence[Tensor],
    *,
    labels: Tensor,
    alpha: float = 0.1,
    T: float = 3.0,  # noqa: N803
    beta: float = 1e-6,
) -> Tensor:
    """CE(z_n) + Σ_{e < n} [(1 − alpha) · CE(z_e) + alpha · T² KL(p_n(T) ‖ p_e(T)) + beta · ‖f_e − f_n‖²], a scalar, each a
    mean over the batch, with the logits z_e, p = softmax(z/T) and the features f_e of exits 1, …, n.

    ``exit_logits`` float (B, C) each and ``exit_features`` (B, …) of one shape each, from the first exit to the deepest,
    which gets no gradient from what the others learn of it; ``labels`` int64 (B,), −1 where unknown. ‖·‖² is the sum over
    a sample's features. The authors' code, where beta is 1e-6 too, adds it over the samples of a batch, 128 of them, so
    that 1.28e-4 here is as strong; and it weighs the deepest exit's CE with 1 − alpha too.

    Raises :class:`MismatchError` for shapes that differ, fewer than two exits, or not as many features as logits, and
    :class:`SpecError` for options out of their ranges.
    """
    check_least("own_exits", 0, alpha=alpha, beta=beta)
    if alpha > 1:
        raise SpecError(f"own_exits: alpha is a share, and at most 1, not {alpha}")
    if len(exit_logits) != len(exit_features) or len(exit_logits) < 2:
        raise MismatchError(
            "own_exits takes logits and features of the same exits, at least two, not "
            f"{len(exit_logits)} and {len(exit_features)}"
        )
    *early, deepest = exit_logits
    loss = cross_entropy(deepest, labels)
    for logits, features in zip(early, exit_features[:-1], strict=True):
        loss = loss + (1 - alpha) * cross_entropy(logits, labels)
        loss = loss + alpha * kd(logits, deepest.detach(), T) + beta * _apart(features, exit_features[-1])
    return loss


def _apart(features: Tensor, deepest: Tensor) -> Tensor:
    if features.shape != deepest.shape:
        raise MismatchError(
            "own_exits compares features of one shape (B, …), and an early exit's are "
            f"{tuple(features.shape)}, the deepest's {tuple(deepest.shape)}"
        )
    with exactly(features):
        ours, theirs = both(features, deepest)
        return torch.sum((ours - theirs) ** 2) / len(ours)
