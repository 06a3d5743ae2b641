"""What the losses of logits share: a batch's target understood, whatever a codec kept of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.codecs import anchored
from softcache.codecs.topk import Tail
from softcache.errors import MismatchError
from softcache_train.targets import (
    Anchored,
    BatchTarget,
    Dense,
    Hard,
    Mixed,
    OfLogits,
    Parts,
    Sampled,
    Sparse,
)

Target = BatchTarget | Tensor | Mapping[str, Tensor]


def understood(target: Target, student_logits: Tensor, who: str) -> OfLogits:
    """The target of logits that ``who`` is given, of the student's shape (B, C). Raises :class:`MismatchError`."""
    if isinstance(target, Tensor):
        target = Hard(target, student_logits.shape[-1]) if not target.is_floating_point() else Dense(target)
    elif isinstance(target, Mapping):
        if not {"tail", "draws", "rest"} & target.keys():
            raise MismatchError(
                f"{who} learns from logits, and this target has {', '.join(map(str, target))}"
            )
        target = _collated(target, student_logits.shape[-1], who)
    if isinstance(target, Parts):
        raise MismatchError(f"{who} learns from logits, and this target has {', '.join(target.values)}")
    if not isinstance(target, Dense | Sparse | Anchored | Mixed | Sampled | Hard):
        raise MismatchError(
            f"{who} learns from logits as tensors, batch['logits'] of a Loader, not from a {type(target).__name__}"
        )
    if isinstance(target, Dense | Anchored | Mixed):
        shape = tuple((target.own if isinstance(target, Mixed) else target).values.shape)
    else:
        classes = target.tail.classes if isinstance(target, Sparse) else target.classes
        shape = (len(target.values), classes)
    if student_logits.ndim != 2 or tuple(student_logits.shape) != shape:
        raise MismatchError(
            f"{who} takes student and teacher logits of one shape (B, C), not {tuple(student_logits.shape)} and {shape}"
        )
    return target


def whole(target: Target, student_logits: Tensor, who: str) -> Tensor:
    """The teacher's logits (B, C), every one of them. Raises :class:`MismatchError` where a codec left some out."""
    found = understood(target, student_logits, who)
    if isinstance(found, Dense):
        return found.values
    kept = {
        Anchored: "corrections of its image's",
        Mixed: "those of two views that are mixed as probabilities",
        Sparse: "the largest",
        Sampled: "draws",
        Hard: "the teacher's class",
    }[type(found)]
    raise MismatchError(
        f"{who} needs whole logits, and the cache has {kept} of each row: cache them with full(u8) or full(f16)"
    )


def scaled(target: Dense | Anchored | Mixed, T: float, dtype: torch.dtype) -> Tensor:  # noqa: N803
    """Numbers (B, C) whose softmax is p_t(T). Raises :class:`SpecError` for a T at which ``anchored`` knows none."""
    if isinstance(target, Mixed):
        own, partner = (F.log_softmax(scaled(one, T, dtype), 1) for one in (target.own, target.partner))
        lam = target.lam.to(dtype)[:, None]
        return torch.logaddexp(lam.log() + own, (1 - lam).log() + partner)
    values = target.values.detach().to(dtype) / T
    if isinstance(target, Dense):
        return values
    return values + target.rest * _between(target.shift, anchored.weights(T), dtype)[:, None]


def kept_log_probs(target: Sparse, T: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # noqa: N803
    """log p_t(T) of the kept classes and, last, of all others together, (B, k + 1), −∞ in places where nothing is kept; and
    how many the others are, (B,)."""
    rest = target.tail.classes - torch.isfinite(target.values).sum(1).to(dtype)
    other = _between(target.soft_mean, target.tail.weights(T), dtype) / T + rest.log()
    return F.log_softmax(torch.cat([target.values.to(dtype) / T, other[:, None]], dim=1), dim=1), rest


def _between(known: Tensor, weights: np.ndarray, dtype: torch.dtype) -> Tensor:
    """What is known at some temperatures, (B, n), at another one, (B,)."""
    # no matmul, whose precision autocast and TF32 would lower
    return (known.to(dtype) * torch.as_tensor(weights, dtype=dtype, device=known.device)).sum(1)


def _collated(target: Mapping[str, Tensor], classes: int, who: str) -> Sparse | Anchored | Sampled:
    """What a DataLoader made of ``arrays()`` of :class:`softcache.codecs.SparseLogits`, ``AnchoredLogits`` or
    ``SampledLogits``."""
    if "rest" in target:
        return Anchored(target["value"], target["rest"], target["shift"])
    if "draws" in target:
        drawn = sorted(set(target["T"].tolist()))
        if len(drawn) > 1:
            raise MismatchError(
                f"{who}: the rows of this batch were drawn at T={drawn[0]:g} and T={drawn[1]:g}"
            )
        return Sampled(target["draws"], target["entropy"], drawn[0], classes)
    tails = sorted(set(map(tuple, target["tail"].tolist())))
    if len(tails) > 1:
        told = [f"tail={'spread' if spread else 'bucket'}, at={tuple(at)}" for spread, *at in tails[:2]]
        raise MismatchError(
            f"{who}: topk kept the rows of this batch in different ways ({told[0]} and {told[1]}): take the batches of each "
            "dataset by themselves, or build the caches with one codec"
        )
    spread, *at = tails[0]
    tail = Tail(classes, tuple(at), bool(spread))
    return Sparse(target["index"], target["value"], target["soft_mean"], tail)
