"""Decoupled knowledge distillation.

Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv:2203.08679, eq. 6 and 7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache_train.objectives.checks import check_labels, check_temperature, check_weights
from softcache_train.objectives.logits import Target, whole
from softcache_train.objectives.precision import both, exactly


def dkd(
    student_logits: Tensor,
    target: Target,
    *,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    T: float = 4.0,  # noqa: N803
) -> Tensor:
    """T²/B · Σᵢ alpha · KL(b_t ‖ b_s) + beta · KL(p̂_t ‖ p̂_s), a scalar.

    b = (p[y], 1 − p[y]) is how sure of the label y one is (TCKD), p̂ = p / (1 − p[y]) over the other classes is how they
    compare (NCKD), p = softmax(z/T). ``kd`` is TCKD + (1 − p_t[y]) · NCKD (eq. 5): a sure teacher says little there, and as
    much as an unsure one here. T² is in the authors' code, not in the paper's formula. With two classes NCKD is 0.

    ``student_logits`` float (B, C); ``target`` as for :func:`~softcache_train.objectives.kd`, with every logit; ``labels``
    int64 (B,), −1 where unknown: such a row adds nothing and still counts in B. Defaults are the paper's for CIFAR-100 with
    most pairs of networks; the authors' warm-up is left to the weight of the loss. At least float32 is computed in. Raises
    :class:`MismatchError` when shapes differ, or logits were left out of the cache, and :class:`SpecError` for other
    options.
    """
    teacher_logits = whole(target, student_logits, "dkd")
    check_labels("dkd", student_logits, labels)
    check_weights("dkd", alpha=alpha, beta=beta)
    check_temperature(T)
    with exactly(student_logits):
        z_s, z_t = both(student_logits, teacher_logits)
        known = labels >= 0
        own = labels.clamp_min(0)[:, None]
        (b_s, p_s), (b_t, p_t) = (_decoupled(z / T, own) for z in (z_s, z_t))
        loss = alpha * _kl(b_t, b_s) + beta * _kl(p_t, p_s)
        return T**2 * torch.where(known, loss, 0).sum() / len(labels)


def _decoupled(z: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """log (p[y], 1 − p[y]), (B, 2), and log p̂ of the other classes, (B, C − 1)."""
    others = torch.arange(z.shape[1] - 1, device=z.device).expand(len(z), -1)
    log_p = F.log_softmax(z, dim=1)
    rest = log_p.gather(1, others + (others >= own))  # who has no other columns than these
    mass = rest.logsumexp(dim=1, keepdim=True)
    return torch.cat([log_p.gather(1, own), mass], dim=1), rest - mass


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)
