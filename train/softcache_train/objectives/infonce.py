"""Contrastive alignment: a student's embedding is nearer to its own sample's of the teacher than to the others'.

van den Oord, Li, Vinyals 2018, "Representation Learning with Contrastive Predictive Coding", arXiv:1807.03748, eq. 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache_train.objectives.checks import check_least
from softcache_train.objectives.precision import exactly
from softcache_train.objectives.rows import require_shapes, rows, unit, width


class InfoNCE(nn.Module):
    """−1/B · Σᵢ log (e^{⟨sᵢ, tᵢ⟩/τ} / Σⱼ e^{⟨sᵢ, tⱼ⟩/τ}), a scalar, of unit vectors over a batch.

    Shapes are of one row, without the batch. Where the student's is of another width than the teacher's, it is first
    moved by a linear map that is learned. τ = 0.07 is Wu et al.'s (2018, arXiv:1805.01978). Raises :class:`SpecError`
    unless ``tau`` is finite and above 0; when called, :class:`MismatchError` for a batch of one, where the loss is 0
    whatever the features, and for rows of other shapes or samples.
    """

    def __init__(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], *, tau: float = 0.07):
        super().__init__()
        check_least("infonce", 0, above=True, tau=tau)
        self.shapes, self.tau = (tuple(student_shape), tuple(teacher_shape)), tau
        ours = width("infonce", "student", student_shape)
        theirs = width("infonce", "teacher", teacher_shape)
        self.projection = nn.Linear(ours, theirs) if ours != theirs else nn.Identity()

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
        """``student_embedding`` float (B, *student_shape), ``teacher_embedding`` (B, *teacher_shape)."""
        require_shapes("infonce", (student_embedding, teacher_embedding), self.shapes)
        with exactly(student_embedding):
            student, teacher = rows("infonce", student_embedding, teacher_embedding, least=2)
            scores = unit(self.projection(student)) @ unit(teacher).T / self.tau
            return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
