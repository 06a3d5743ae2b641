"""What a network costs who runs it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cost:
    """``megabytes`` of ``parameters``, so many numbers; ``milliseconds`` for one image alone, the median."""

    megabytes: float
    parameters: int
    milliseconds: float


@torch.inference_mode()
def cost(model: nn.Module, images: Tensor) -> Cost:
    """Measured where the model is, on each of ``images`` float32 (n, 3, h, w) by itself; it is left in evaluation mode."""
    model.eval()
    times = []
    for image in images.split(1):
        began = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - began)
    held = [*model.parameters()]
    return Cost(
        megabytes=sum(p.numel() * p.element_size() for p in held) / 1e6,
        parameters=sum(p.numel() for p in held),
        milliseconds=1000 * median(times),
    )
