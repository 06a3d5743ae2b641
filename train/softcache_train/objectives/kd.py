"""Knowledge distillation on logits.

Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network". From hard labels: Touvron et al. 2021,
"Training data-efficient image transformers" (DeiT), eq. 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.codecs import sample
from softcache.codecs.topk import Tail
from softcache.errors import MismatchError, SpecError
from softcache_train.targets import BatchTarget, Dense, Hard, OfLogits, Parts, Sampled, Sparse

Target = BatchTarget | Tensor | Mapping[str, Tensor]


def kd(student_logits: Tensor, target: Target, T: float = 4.0) -> Tensor:  # noqa: N803
    """T²/B · Σᵢ KL(p_t(T) ‖ p_s(T)), a scalar, with p(T) = softmax(z/T) (Hinton §2).

    The factor T² keeps the size of the gradients, which scale as 1/T² (§2.1).

    From what ``topk`` or ``packed`` kept, with K the kept classes and P = 1 − Σ_K p the mass of the others, in closed form:
    Σ_K p_t log(p_t/p_s) + P_t log(P_t/P_s), the others being one bucket; or with ``tail=spread``
    Σ_K p_t log(p_t/p_s) + P_t (log(P_t/n) − 1/n Σ log p_s), over the n others. From ``sample``: −H(p_t) − 1/n Σ log p_s of
    the n classes drawn, whose mean over draws is the KL, as its gradient is that of the KL (arXiv:2503.16870, §3). From
    ``argmax``: −log p_s(1) of the teacher's class, whatever T.

    ``student_logits`` float (B, C); ``target`` as ``batch["logits"]`` of a :class:`~softcache_train.Loader` or of a
    DataLoader over :func:`softcache.with_targets`, or the teacher's logits (B, C). At least float32 is computed in,
    under autocast too. Raises :class:`MismatchError` when the shapes differ, or ``topk`` kept the rows of a batch in
    different ways, and :class:`SpecError` unless T is finite and above 0, or outside the temperatures that ``topk`` kept.
    """
    target = _understood(target, student_logits)
    if not 0 < T < math.inf:
        raise SpecError(f"the temperature T must be finite and above 0, not {T}")
    with torch.autocast(student_logits.device.type, enabled=False):
        return _kd(student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)), target, T)


def _kd(z: Tensor, target: OfLogits, T: float) -> Tensor:  # noqa: N803
    if isinstance(target, Hard):
        return F.cross_entropy(z, target.values)
    if isinstance(target, Sparse):
        return T**2 * _sparse_kl(z, target, T)
    if isinstance(target, Sampled):
        sample.check(T, target.T)
        drawn = F.log_softmax(z / T, dim=1).gather(1, target.values)
        return -(T**2) * (drawn.mean(dim=1) + target.entropy.to(z.dtype)).mean()
    teacher = F.log_softmax(target.values.detach().to(z.dtype) / T, dim=1)
    return T**2 * F.kl_div(F.log_softmax(z / T, dim=1), teacher, reduction="batchmean", log_target=True)


def _sparse_kl(z: Tensor, target: Sparse, T: float) -> Tensor:  # noqa: N803
    weights = torch.as_tensor(target.tail.weights(T), dtype=z.dtype, device=z.device)
    rest = z.shape[1] - torch.isfinite(target.values).sum(1).to(z.dtype)
    log_rest = rest.log()
    # no matmul, whose precision autocast and TF32 would lower
    other = (target.soft_mean.to(z.dtype) * weights).sum(1) / T + log_rest
    p_t = F.log_softmax(torch.cat([target.values.to(z.dtype) / T, other[:, None]], dim=1), dim=1)
    p_t = p_t.clamp_min(torch.finfo(z.dtype).min)  # of places where nothing is kept: 0 · ∞ is no number

    log_p = F.log_softmax(z / T, dim=1)
    kept = log_p.gather(1, target.index)
    left = log_p.scatter(1, target.index, 0.0 if target.tail.spread else -torch.inf)
    others = left.sum(1) / rest + log_rest if target.tail.spread else left.logsumexp(1)
    p_s = torch.cat([kept, others[:, None]], dim=1)
    return (p_t.exp() * (p_t - p_s)).sum() / len(z)


def _understood(target: Target, student_logits: Tensor) -> OfLogits:
    if isinstance(target, Tensor):
        target = Hard(target, student_logits.shape[-1]) if not target.is_floating_point() else Dense(target)
    elif isinstance(target, Mapping):
        if not {"tail", "draws"} & target.keys():
            raise MismatchError(f"kd learns from logits, and this target has {', '.join(map(str, target))}")
        target = _collated(target, student_logits.shape[-1])
    if isinstance(target, Parts):
        raise MismatchError(f"kd learns from logits, and this target has {', '.join(target.values)}")
    if not isinstance(target, Dense | Sparse | Sampled | Hard):
        raise MismatchError(
            f"kd learns from logits as tensors, batch['logits'] of a Loader, not from a {type(target).__name__}"
        )
    if isinstance(target, Dense):
        shape = tuple(target.values.shape)
    else:
        classes = target.tail.classes if isinstance(target, Sparse) else target.classes
        shape = (len(target.values), classes)
    if student_logits.ndim != 2 or tuple(student_logits.shape) != shape:
        raise MismatchError(
            f"kd takes student and teacher logits of one shape (B, C), not {tuple(student_logits.shape)} and {shape}"
        )
    return target


def _collated(target: Mapping[str, Tensor], classes: int) -> Sparse | Sampled:
    """What a DataLoader made of ``arrays()`` of :class:`softcache.codecs.SparseLogits` or ``SampledLogits``."""
    if "draws" in target:
        drawn = sorted(set(target["T"].tolist()))
        if len(drawn) > 1:
            raise MismatchError(f"kd: the rows of this batch were drawn at T={drawn[0]:g} and T={drawn[1]:g}")
        return Sampled(target["draws"], target["entropy"], drawn[0], classes)
    tails = sorted(set(map(tuple, target["tail"].tolist())))
    if len(tails) > 1:
        told = [f"tail={'spread' if spread else 'bucket'}, at={tuple(at)}" for spread, *at in tails[:2]]
        raise MismatchError(
            f"kd: topk kept the rows of this batch in different ways ({told[0]} and {told[1]}): take the batches of each "
            "dataset by themselves, or build the caches with one codec"
        )
    spread, *at = tails[0]
    tail = Tail(classes, tuple(at), bool(spread))
    return Sparse(target["index"], target["value"], target["soft_mean"], tail)
