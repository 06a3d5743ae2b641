"""Attention of gradients: what a small change of the image does to the loss.

Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", section 3.2, eq. 4. The normalised form is that of
Srinivas and Fleuret 2018, "Knowledge Transfer with Jacobian Matching".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import SpecError
from softcache_train.objectives.attention import unit
from softcache_train.objectives.checks import check_alike, check_labels
from softcache_train.objectives.precision import both, exactly, promoted


def gradient_attention(
    student_gradient: Tensor, teacher_gradient: Tensor, *, normalised: bool = False
) -> Tensor:
    """1/(2B) · Σᵢ ‖J_s − J_t‖², a scalar, with J = ∂L/∂x of each row's own cross entropy; ``normalised``, of J / ‖J‖₂.

    The gradient of the student's J is a second derivative: see :func:`input_gradient`. Both are of the same label and view
    and the very same pixels, in the same units: by pixels in 0 … 1 it is what it is by normalised ones, over their std.

    ``student_gradient`` and ``teacher_gradient`` float (B, 3, h, w). At least float32 is computed in. Raises
    :class:`MismatchError` when shapes differ.
    """
    check_alike("gradient_attention", "gradients (B, 3, h, w)", student_gradient, teacher_gradient, (4,))
    with exactly(student_gradient):
        ours, theirs = both(student_gradient, teacher_gradient)
        if normalised:
            ours, theirs = unit(ours), unit(theirs)
        return (ours - theirs).square().sum() / (2 * len(ours))


def input_gradient(student_logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """∂/∂x of each row's own cross entropy with its label, as ``images`` (B, 3, h, w), with a graph, so that a loss of it
    trains the student; zero of rows whose label is unknown (−1).

    ``student_logits`` (B, C) computed from ``images``, which must have required a gradient then; ``labels`` int64 (B,).
    Raises :class:`SpecError` where they did not, and :class:`MismatchError` for labels of another number.
    """
    check_labels("gradient_attention", student_logits, labels)
    if not images.requires_grad:
        raise SpecError(
            "the gradient of the images is asked for: call images.requires_grad_() before the student"
        )
    with exactly(student_logits):
        loss = F.cross_entropy(promoted(student_logits), labels, ignore_index=-1, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=torch.is_grad_enabled(), allow_unused=True)
    if gradient is None:
        raise SpecError(
            "the logits do not depend on these images: give those that the student was called with"
        )
    return gradient
