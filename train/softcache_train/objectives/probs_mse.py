"""Probabilities matched by squares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.codecs import sample
from softcache_train.objectives.checks import check_temperature
from softcache_train.objectives.logits import Target, kept_log_probs, scaled, understood
from softcache_train.objectives.precision import exactly, promoted
from softcache_train.targets import Hard, OfLogits, Sampled, Sparse


def probs_mse(student_logits: Tensor, target: Target, *, T: float = 1.0) -> Tensor:  # noqa: N803
    """T²/B · Σᵢ ‖p_s(T) − p_t(T)‖², a scalar, with p(T) = softmax(z/T); at T = 1 Brier's score against soft labels.

    The factor T² keeps the size of the gradients, as in ``kd``.

    From what ``topk`` or ``packed`` kept: Σ_K (p_s − p_t)² + (P_s − P_t)² with P the mass of the others, one bucket; or with
    ``tail=spread`` Σ_K (p_s − p_t)² + Σ (p_s − P_t/n)² over the n others. From ``sample``: p_t is each class's share of the
    draws, whose gradient is right on average, and whose value is too large by the draws' scatter. From ``argmax``: p_t is 1
    for the teacher's class.

    ``student_logits`` float (B, C); ``target`` as for :func:`~softcache_train.objectives.kd`. At least float32 is computed
    in. Raises :class:`MismatchError` when the shapes differ, and :class:`SpecError` unless T is finite and above 0, or not
    one that the codec kept.
    """
    known = understood(target, student_logits, "probs_mse")
    check_temperature(T)
    with exactly(student_logits):
        z = promoted(student_logits)
        return T**2 * _squares(F.softmax(z / T, dim=1), known, T) / len(z)


def _squares(p: Tensor, target: OfLogits, T: float) -> Tensor:  # noqa: N803
    if isinstance(target, Sparse):
        return _sparse(p, target, T)
    if isinstance(target, Hard):
        teacher = F.one_hot(target.values, p.shape[1]).to(p.dtype)
    elif isinstance(target, Sampled):
        sample.check(T, target.T)
        once = torch.full_like(target.values, 1 / target.values.shape[1], dtype=p.dtype)
        teacher = torch.zeros_like(p).scatter_add(1, target.values, once)
    else:
        teacher = F.softmax(scaled(target, T, p.dtype), dim=1)
    return (p - teacher).square().sum()


def _sparse(p: Tensor, target: Sparse, T: float) -> Tensor:  # noqa: N803
    log_t, rest = kept_log_probs(target, T, p.dtype)
    t, other = log_t[:, :-1].exp(), log_t[:, -1:].exp()
    kept = torch.where(torch.isfinite(target.values), p.gather(1, target.index) - t, 0)
    if target.tail.spread:
        others = (p - other / rest[:, None]).scatter(1, target.index, 0)
    else:
        others = p.scatter(1, target.index, 0).sum(dim=1, keepdim=True) - other
    return kept.square().sum() + others.square().sum()
