"""Several teachers' logits → those of one, for the KD term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from softcache.errors import SpecError
from softcache_train.targets import Dense, Mixed

Mean = Literal["geometric", "arithmetic"]


def combine(targets: Sequence[object], T: float, how: Mean = "geometric") -> Dense | Mixed:  # noqa: N803
    """Logits z, float32 (B, C), whose softmax(z / T) is a mean of what M teachers say at ``T``.

    ``geometric``: z = mean_m z_m, which is valid at every T. ``arithmetic``: softmax(z / T) = mean_m softmax(z_m / T)
    (Hinton et al. 2015, section 1, name both). Of mixed views both are combined, before their probabilities are mixed.
    Raises :class:`SpecError` for targets that are no dense logits.
    """
    first = targets[0]
    if isinstance(first, Mixed):
        mixes = [one for one in targets if isinstance(one, Mixed)]
        own, partner = (
            combine([one.own for one in mixes], T, how),
            combine([one.partner for one in mixes], T, how),
        )
        assert isinstance(own, Dense) and isinstance(partner, Dense)
        return Mixed(own, partner, first.lam)
    values: list[Tensor] = []
    for target in targets:
        if not isinstance(target, Dense):
            raise SpecError(
                "several targets are combined from whole logits: cache them with full(u8) or full(f16)"
            )
        values.append(target.values.float())
    stacked = torch.stack(values)
    if how == "geometric":
        return Dense(stacked.mean(dim=0))
    return Dense(
        T * (torch.log_softmax(stacked / T, dim=-1).logsumexp(dim=0) - torch.tensor(len(values)).log())
    )
