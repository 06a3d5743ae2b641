"""Contrastive representation distillation, with a memory of what was said of every sample.

Tian, Krishnan, Isola 2020, "Contrastive Representation Distillation", arXiv:1910.10699, §3.2.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.errors import MismatchError, SpecError, counted
from softcache_train.objectives.checks import check_least
from softcache_train.objectives.precision import exactly
from softcache_train.objectives.rows import require_shapes, rows, unit, width


class CRD(nn.Module):
    """−1/B · Σᵢ [log D(aᵢ, mᵢ) + Σₖ log(1 − D(aᵢ, mₖ))], a scalar, with D = h / (h + K/N) and h(a, m) = e^{⟨a, m⟩/τ} / Z:
    once with the student's vectors as a and a memory of the teacher's as m, once the other way round, added.

    Vectors are linear maps of the rows to ``dim`` numbers, both learned, scaled to length 1. ``negatives`` K samples k ≠ i
    are drawn evenly and with replacement from the N = ``samples`` of the cache (torch's global random stream); the
    authors' code leaves out those of i's class. Z is N times the mean of e^{⟨a, m⟩/τ} over the first batch, and stays. The
    memory starts at random; a sample's vector in it becomes, after each step that shows it, ``momentum`` of what it was
    and the rest of the new one, scaled to length 1, and no gradient flows into it. Memory and Z are buffers, 8·N·dim bytes
    of them. Several ranks have one Z, and remember what all of them saw.

    Shapes are of one row, without the batch. Defaults are the authors', who weigh it with 0.8. Raises :class:`SpecError`
    for options out of their ranges; when called, :class:`MismatchError` for rows of other shapes, or other samples.
    """

    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...],
        *,
        samples: int,
        dim: int = 128,
        negatives: int = 16384,
        tau: float = 0.07,
        momentum: float = 0.5,
    ):
        super().__init__()
        if samples < 2:
            raise SpecError(f"crd: there are none to tell apart in a cache of {counted(samples, 'sample')}")
        check_least("crd", 1, dim=dim, negatives=negatives)
        check_least("crd", 0, above=True, tau=tau)
        check_least("crd", 0, momentum=momentum)
        for name, number in (("dim", dim), ("negatives", negatives)):
            if not isinstance(number, int):
                raise SpecError(f"crd: {name} is a whole number, not {number}")
        if momentum >= 1:
            raise SpecError(f"crd: momentum is what is kept of a vector, and below 1, not {momentum}")
        self.shapes = tuple(student_shape), tuple(teacher_shape)
        self.samples, self.negatives = samples, negatives
        self.student = nn.Linear(width("crd", "student", student_shape), dim)
        self.teacher = nn.Linear(width("crd", "teacher", teacher_shape), dim)
        self.of_student, self.of_teacher = (Memory(samples, dim, tau, momentum) for _ in range(2))

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor, *, index: Tensor) -> Tensor:
        """``student_embedding`` float (B, *student_shape), ``teacher_embedding`` (B, *teacher_shape), ``index`` int64
        (B,), the samples' numbers in the cache."""
        require_shapes("crd", (student_embedding, teacher_embedding), self.shapes)
        self._require_samples(index, len(student_embedding))
        with exactly(student_embedding):
            given = rows("crd", student_embedding, teacher_embedding, least=1)
            student, teacher = unit(self.student(given[0])), unit(self.teacher(given[1]))
            others = torch.randint(self.samples - 1, (len(index), self.negatives), device=index.device)
            drawn = torch.cat([index[:, None], others + (others >= index[:, None])], dim=1)
            loss = self._contrast(self.of_teacher(student, drawn)) + self._contrast(
                self.of_student(teacher, drawn)
            )
            self.of_student.remember(index, student.detach())
            self.of_teacher.remember(index, teacher.detach())
            return loss

    def _contrast(self, log_h: Tensor) -> Tensor:
        # log D = −log(1 + e^(log K/N − log h)), and log(1 − D) likewise: nothing overflows
        above = log_h - math.log(self.negatives / self.samples)
        return (F.softplus(-above[:, 0]) + F.softplus(above[:, 1:]).sum(1)).mean()

    def _require_samples(self, index: Tensor, many: int) -> None:
        if index.shape != (many,) or index.dtype != torch.int64:
            raise MismatchError(f"crd takes index int64 ({many},), not {index.dtype} {tuple(index.shape)}")
        # an accelerator would have to be waited for
        if index.device.type == "cpu" and ((index < 0) | (index >= self.samples)).any():
            raise MismatchError(f"crd was made for {self.samples} samples, and index has {index.tolist()}")


class Memory(nn.Module):
    """A vector of every sample, (N, dim), and log Z, not a number before the first batch."""

    vectors: Tensor
    log_z: Tensor

    def __init__(self, samples: int, dim: int, tau: float, momentum: float):
        super().__init__()
        self.tau, self.momentum = tau, momentum
        # of length 1 or so, as those that will take their place
        self.register_buffer("vectors", (2 * torch.rand(samples, dim) - 1) * math.sqrt(3 / dim))
        self.register_buffer("log_z", torch.tensor(math.nan))

    def forward(self, anchors: Tensor, drawn: Tensor) -> Tensor:
        """log h of each of ``anchors`` (B, dim) with the samples that were ``drawn`` for it, int64 (B, K), as (B, K)."""
        if len(self.vectors) <= drawn.shape[1] * anchors.shape[1]:
            # all there are: less than the vectors drawn would be; a copy, since the backward pass wants what was there
            scores = (anchors @ self.vectors.clone().T).gather(1, drawn) / self.tau
        else:
            scores = torch.einsum("bd,bkd->bk", anchors, self.vectors[drawn]) / self.tau
        found = of_all_ranks(scores.detach().logsumexp(1))
        mean = found.logsumexp(0) - math.log(len(found) * scores.shape[1])
        self.log_z.copy_(torch.where(self.log_z.isnan(), mean + math.log(len(self.vectors)), self.log_z))
        return scores - self.log_z.clone()

    @torch.no_grad()
    def remember(self, index: Tensor, vectors: Tensor) -> None:
        """Take in the ``vectors`` (B, dim) of the samples ``index``, of this rank and all others."""
        index, vectors = of_all_ranks(index), of_all_ranks(vectors)
        kept = self.momentum * self.vectors[index] + (1 - self.momentum) * vectors
        self.vectors[index] = unit(kept)


def of_all_ranks(x: Tensor) -> Tensor:
    """``x`` (n, …) of every rank, one behind the other, whatever their n."""
    if not dist.is_initialized():
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    padded = x.new_zeros(int(max(sizes)), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
