"""Knowledge distillation on logits.

Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network". From hard labels: Touvron et al. 2021,
"Training data-efficient image transformers" (DeiT), eq. 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.codecs import sample
from softcache_train.objectives.checks import check_temperature
from softcache_train.objectives.logits import Target, kept_log_probs, scaled, understood
from softcache_train.objectives.precision import exactly, promoted
from softcache_train.targets import Hard, OfLogits, Sampled, Sparse


def kd(student_logits: Tensor, target: Target, T: float = 4.0) -> Tensor:  # noqa: N803
    """T²/B · Σᵢ KL(p_t(T) ‖ p_s(T)), a scalar, with p(T) = softmax(z/T) (Hinton §2).

    The factor T² keeps the size of the gradients, which scale as 1/T² (§2.1). Almost 0 may come out a little below 0, by
    rounding: a clamp would take its gradient away.

    From what ``topk`` or ``packed`` kept, with K the kept classes and P = 1 − Σ_K p the mass of the others, in closed form:
    Σ_K p_t log(p_t/p_s) + P_t log(P_t/P_s), the others being one bucket; or with ``tail=spread``
    Σ_K p_t log(p_t/p_s) + P_t (log(P_t/n) − 1/n Σ log p_s), over the n others. From ``sample``: −H(p_t) − 1/n Σ log p_s of
    the n classes drawn, whose mean over draws is the KL, as its gradient is that of the KL (arXiv:2503.16870, §3). From
    ``anchored``: the KL, with p_t(T) as its decoder has it, softmax(z_t/T + c(T)·[not kept of the view]). From
    ``argmax``: −log p_s(1) of the teacher's class, whatever T.

    ``student_logits`` float (B, C); ``target`` as ``batch["logits"]`` of a :class:`~softcache_train.Loader` or of a
    DataLoader over :func:`softcache.with_targets`, or the teacher's logits (B, C). At least float32 is computed in,
    under autocast too. Raises :class:`MismatchError` when the shapes differ, or ``topk`` kept the rows of a batch in
    different ways, and :class:`SpecError` unless T is finite and above 0, or outside the temperatures that ``topk`` kept.
    """
    known = understood(target, student_logits, "kd")
    check_temperature(T)
    with exactly(student_logits):
        return _kd(promoted(student_logits), known, T)


def _kd(z: Tensor, target: OfLogits, T: float) -> Tensor:  # noqa: N803
    if isinstance(target, Hard):
        return F.cross_entropy(z, target.values)
    if isinstance(target, Sparse):
        return T**2 * _sparse_kl(z, target, T)
    if isinstance(target, Sampled):
        sample.check(T, target.T)
        drawn = F.log_softmax(z / T, dim=1).gather(1, target.values)
        return -(T**2) * (drawn.mean(dim=1) + target.entropy.to(z.dtype)).mean()
    teacher = F.log_softmax(scaled(target, T, z.dtype), dim=1)
    return T**2 * F.kl_div(F.log_softmax(z / T, dim=1), teacher, reduction="batchmean", log_target=True)


def _sparse_kl(z: Tensor, target: Sparse, T: float) -> Tensor:  # noqa: N803
    p_t, rest = kept_log_probs(target, T, z.dtype)
    p_t = p_t.clamp_min(torch.finfo(z.dtype).min)  # of places where nothing is kept: 0 · ∞ is no number

    log_p = F.log_softmax(z / T, dim=1)
    kept = log_p.gather(1, target.index)
    left = log_p.scatter(1, target.index, 0.0 if target.tail.spread else -torch.inf)
    others = left.sum(1) / rest + rest.log() if target.tail.spread else left.logsumexp(1)
    p_s = torch.cat([kept, others[:, None]], dim=1)
    return (p_t.exp() * (p_t - p_s)).sum() / len(z)
