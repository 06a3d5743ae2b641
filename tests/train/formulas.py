"""What the tests of losses draw, and what all of them ask of a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache import codecs

BY_FORMULA = {"rel": 1e-9, "abs": 1e-12}


def draw(*shape, seed=0, scale=1.0) -> Tensor:
    """float64, normal with that deviation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def logits(*shape, seed=0, scale=3.0) -> Tensor:
    """As :func:`draw`, as far apart as a network's."""
    return draw(*shape, seed=seed, scale=scale)


def softmax(z: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def coded(teacher: Tensor, text: str) -> Any:
    """What a codec gives back of a teacher's rows."""
    codec = codecs.parse(text).codec
    values = teacher.float().numpy()
    return codec.decode(codec.encode(values), values.shape[1:])


def check_computed_in_float32(
    loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, dtype: torch.dtype
) -> None:
    """Of halves it is to the last bit what it is of the same numbers in float32, under autocast too; and so is its gradient,
    rounded."""
    student, teacher = student.to(dtype), teacher.to(dtype)
    exact = student.float().clone().requires_grad_()
    expected = loss(exact, teacher.float())
    expected.backward()
    for autocast in (False, True):
        given = student.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = loss(given, teacher)
        found.backward()
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        assert given.grad.isfinite().all()
        torch.testing.assert_close(given.grad, exact.grad.to(dtype))
