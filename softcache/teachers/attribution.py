"""What in a layer speaks for an answer: integrated gradients.

Sundararajan, Taly and Yan 2017, "Axiomatic Attribution for Deep Networks", of a layer's output instead of the image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcache.errors import SpecError, TeacherError


def integrated_gradients(
    function: Callable[[Tensor], Tensor],
    features: Tensor,
    labels: Tensor,
    *,
    steps: int = 50,
    baseline: float | Tensor = 0.0,
) -> Tensor:
    """(h − h′) · ∫₀¹ ∂f_y/∂h (h′ + α (h − h′)) dα, as ``features`` (B, …), by the midpoints of ``steps`` intervals.

    Summed over a row it is f_y(h) − f_y(h′), but for the rule's error: see :func:`completeness_gap`. Sum a map's over its
    channels for where.

    Args:
        function: the rest of the network, in evaluation mode: features (B, …) → (B, C), each row by itself.
        features: h, float (B, …), the layer's output.
        labels: y, int64 (B,), the column whose value is explained.
        steps: forward and backward passes.
        baseline: h′, a number or a tensor that broadcasts to ``features``.

    Raises:
        SpecError: ``steps`` below 1, or labels of another number or kind.
        TeacherError: the function's answer does not depend on the features, or is no (B, C).
    """
    if type(steps) is not int or steps < 1:
        raise SpecError(f"integrated gradients: steps must be a whole number of at least 1, not {steps!r}")
    h = features.detach()
    start = torch.as_tensor(baseline, dtype=h.dtype, device=h.device).expand_as(h)
    total = torch.zeros_like(h)
    for step in range(steps):
        with torch.enable_grad():
            point = torch.lerp(start, h, (step + 0.5) / steps).requires_grad_()
            answer = _answers(function, point, labels).sum()
            if not answer.requires_grad:
                raise TeacherError("integrated gradients: the answer does not depend on these features")
            (slope,) = torch.autograd.grad(answer, point)
        total += slope
    return (h - start) * (total / steps)


@torch.no_grad()
def completeness_gap(
    attributions: Tensor,
    function: Callable[[Tensor], Tensor],
    features: Tensor,
    labels: Tensor,
    *,
    baseline: float | Tensor = 0.0,
) -> Tensor:
    """|Σ attributions − (f_y(h) − f_y(h′))| / |f_y(h) − f_y(h′)| of each row, (B,); arguments as above.

    0 for an exact integral; 0.05 and more asks for more steps. Where the answer does not change at all, it is the sum's
    size.
    """
    h = features.detach()
    start = torch.as_tensor(baseline, dtype=h.dtype, device=h.device).expand_as(h)
    change = _answers(function, h, labels) - _answers(function, start, labels)
    gap = (attributions.flatten(1).sum(dim=1) - change).abs()
    return gap / change.abs().where(change != 0, 1)


def _answers(function: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor) -> Tensor:
    """f_y of each row, (B,)."""
    answer = function(features)
    if answer.ndim != 2 or len(answer) != len(features):
        raise TeacherError(
            f"integrated gradients explain one column of (B, C), and the function gives {tuple(answer.shape)} for features "
            f"{tuple(features.shape)}"
        )
    if labels.shape != answer.shape[:1] or labels.is_floating_point():
        raise SpecError(
            f"integrated gradients take a label a row, int64 (B,), not {labels.dtype} {tuple(labels.shape)} for "
            f"{tuple(answer.shape)}"
        )
    return answer.gather(1, labels[:, None])[:, 0]
