"""The last linear layer of a network: what goes into it, and the layer itself, where its logits are what it gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from softcache.codecs.head import BIAS, WEIGHT
from softcache.errors import TeacherError

HEAD = "logits.head"  # what goes in, as a target of the teacher's


class LastLayer:
    """Of the linear layers of ``model`` that run for an image the last."""

    def __init__(self, model: torch.nn.Module, name: str):
        self._name = name
        self._ran: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor] | None = None
        self._layer: torch.nn.Linear | None = None
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        self._ran = module, inputs[0], output

    def input_of(self, logits: torch.Tensor | None) -> torch.Tensor:
        """What went into it, ``(B, d)``, of these logits. :class:`TeacherError` where they are not what it gave."""
        ran, self._ran = self._ran, None
        if ran is None or logits is None or ran[1].ndim != 2 or not _same(ran[2], logits):
            raise TeacherError(
                f"the logits of the teacher {self._name} are not what its last linear layer makes of one vector an image, "
                "which head keeps: keep them with full(u8)"
            )
        self._layer = ran[0]
        return ran[1].clone()

    def constants(self) -> dict[str, np.ndarray]:
        """Weight (C, d) and bias (C,), float32, once it has run."""
        if self._layer is None:
            return {}
        weight, bias = self._layer.weight, self._layer.bias
        if bias is None:
            bias = torch.zeros(len(weight))
        return {n: v.detach().float().cpu().numpy() for n, v in ((WEIGHT, weight), (BIAS, bias))}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Is one the other? What is no number is like itself: who keeps it says so."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
