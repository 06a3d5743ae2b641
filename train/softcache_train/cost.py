"""What a network costs who runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cost:
    """``megabytes`` of ``parameters``, so many numbers; ``milliseconds`` for one image alone, the median."""

    megabytes: float
    parameters: int
    milliseconds: float


def cost(model: nn.Module, images: Tensor) -> Cost:
    """Measured where the model is, on each of ``images`` float32 (n, 3, h, w) by itself; it is left in evaluation mode."""
    return _measured(model.eval(), [*model.parameters()], images)


def cost_of_exit(student: nn.Module, number: int, images: Tensor) -> Cost:
    """As :func:`cost`, of a student with exits (see :mod:`softcache_train.students`) up to exit ``number``, from 1: of what
    that one needs, and no more. All its weights are left asking for a gradient."""
    early: Any = student.eval().requires_grad_()
    answer, held = partial(early.at_exit, number=number), [*student.parameters()]
    slopes = torch.autograd.grad(answer(images[:1]).sum(), held, allow_unused=True)
    return _measured(answer, [p for p, slope in zip(held, slopes, strict=True) if slope is not None], images)


@torch.inference_mode()
def _measured(answer: Callable[[Tensor], object], held: Sequence[nn.Parameter], images: Tensor) -> Cost:
    times = []
    for image in images.split(1):
        began = time.perf_counter()
        answer(image)
        times.append(time.perf_counter() - began)
    return Cost(
        megabytes=sum(p.numel() * p.element_size() for p in held) / 1e6,
        parameters=sum(p.numel() for p in held),
        milliseconds=1000 * median(times),
    )
