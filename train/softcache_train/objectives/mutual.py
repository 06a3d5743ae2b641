"""Deep mutual learning: networks that are trained together teach each other.

Zhang, Xiang, Hospedales, Lu 2018, "Deep Mutual Learning", arXiv:1706.00384, §2.
"""

from __future__ import annotations

from torch import Tensor

from softcache_train.objectives.kd import kd


def mutual(student_logits: Tensor, peer_logits: Tensor) -> Tensor:
    """1/B · Σᵢ KL(p_peer ‖ p_student), a scalar, with p = softmax(z): the peer is the target, whichever of the two learns.

    ``student_logits`` float (B, C) of the network that learns, ``peer_logits`` (B, C) of the other, into which no gradient
    flows. Each network has its own cross entropy beside it, and with several peers the mean over them. Raises
    :class:`MismatchError` when the shapes differ.
    """
    return kd(student_logits, peer_logits, T=1.0)
