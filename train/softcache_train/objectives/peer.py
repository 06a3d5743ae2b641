"""A peer that is trained beside the student: deep mutual learning as a term of the student's loss.

Zhang, Xiang, Hospedales, Lu 2018, "Deep Mutual Learning", arXiv:1706.00384, §2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from softcache.errors import SpecError
from softcache_train import students
from softcache_train.objectives.checks import check_least
from softcache_train.objectives.cross_entropy import cross_entropy
from softcache_train.objectives.kd import kd
from softcache_train.objectives.mutual import mutual

if TYPE_CHECKING:
    from softcache_train.loader import Batch
    from softcache_train.taps import Seen


class Peer(nn.Module):
    """KL(p_peer ‖ p) of the student, and the peer's own loss, CE + KL(p ‖ p_peer), which moves the peer alone.

    ``student_shape`` (C,). ``peer``: a name from :mod:`softcache_train.students`, or ``package.module:factory``. Where the
    term has a ``target``, the peer learns from it too: with ``taught`` · kd at ``T``.
    """

    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...] | None,
        *,
        peer: str,
        taught: float = 1.0,
        T: float = 4.0,  # noqa: N803
    ):
        super().__init__()
        check_least("mutual", 0, taught=taught)
        if not isinstance(peer, str):
            raise SpecError(f"mutual: peer names a student, such as peer: resnet8, not {peer!r}")
        self.peer = students.make(peer, student_shape[0])
        self.taught = taught if teacher_shape else 0.0
        self.T = T

    def forward(self, seen: Seen, batch: Batch, target: str | None) -> Tensor:
        logits = self.peer(batch.images)
        own = cross_entropy(logits, batch.labels, batch.partner_labels, batch.lam) + mutual(
            logits, seen.logits.detach()
        )
        if target is not None:
            own = own + self.taught * kd(logits, batch[target], self.T)
        return mutual(seen.logits, logits.detach()) + own
