"""What ``softcache-train demo`` measures: accuracy before and after the shift of a bias, fidelity, cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.cache import Cache
from softcache.manifest import Report
from softcache.source import Source
from softcache_train.cost import Cost
from softcache_train.loader import normalise
from softcache_train.students.digits import INPUT_SPEC

THREE = 3


@dataclass(frozen=True)
class Score:
    """One network on the test split: accuracies in 0…1, as it is and with its output for 3 shifted.

    ``kl`` is KL(teacher ‖ network) in nats at T = 1, as it is.
    """

    overall: float
    threes: float
    shift: float
    shifted_overall: float
    shifted_threes: float
    kl: float


@dataclass(frozen=True)
class Found:
    """Everything that was measured. ``shown`` and ``test`` are int64 (10,): images of each digit, in all
    batches of all students and in the test split."""

    out: Path
    cache: Cache
    teacher_spec: str
    T: float
    hard: list[Score]
    soft: list[Score]
    teacher: Score
    student_cost: Cost
    teacher_cost: Cost
    shown: np.ndarray
    test: np.ndarray
    seconds: float

    @property
    def picture(self) -> Path:
        return self.out / "demo.png"

    @property
    def report(self) -> Report:
        """What the build measured."""
        assert self.cache.manifest is not None
        return self.cache.manifest.report

    @property
    def bytes_a_view(self) -> tuple[int, float]:
        """Of logits, and of all that is kept of a view on disk."""
        report, rows = self.report, self.cache.samples * self.cache.views
        return report.bytes_per_row["logits"], report.bytes / rows

    def as_json(self) -> dict[str, Any]:
        logits, disk = self.bytes_a_view
        return {
            "hard": [asdict(s) for s in self.hard],
            "cache": [asdict(s) for s in self.soft],
            "teacher": {"overall": self.teacher.overall, "threes": self.teacher.threes},
            "cost": {"student": asdict(self.student_cost), "teacher": asdict(self.teacher_cost)},
            "built": {
                "path": str(self.cache.path),
                "digest": self.cache.digest,
                "samples": self.cache.samples,
                "views": self.cache.views,
                "bytes_a_view": {"logits": logits, "disk": disk},
                "fidelity": self.report.fidelity["logits"],
            },
            "T": self.T,
            "shown": self.shown.tolist(),
            "test": self.test.tolist(),
            "picture": str(self.picture),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Judge:
    """Scores networks on ``test``, their shift chosen on ``val``; each is (images, labels)."""

    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    said: Tensor
    """The teacher's logits on the test images."""

    @classmethod
    def of(cls, teacher: nn.Module, val: Source, test: Source) -> Judge:
        images, labels = whole(test)
        return cls(whole(val), (images, labels), answer(teacher, images))

    @property
    def of_teacher(self) -> Score:
        """It needs no shift, and is no distance from itself."""
        overall, threes = accuracy(self.said, self.test[1])
        return Score(overall, threes, 0.0, overall, threes, 0.0)

    def __call__(self, student: nn.Module) -> Score:
        shift = best_shift(answer(student, self.val[0]), self.val[1])
        logits, labels = answer(student, self.test[0]), self.test[1]
        log_p, log_q = F.log_softmax(self.said, 1), F.log_softmax(logits, 1)
        kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()
        return Score(*accuracy(logits, labels), shift, *accuracy(shifted(logits, shift), labels), kl)


def whole(source: Source) -> tuple[Tensor, Tensor]:
    """All images of a source as the networks see them, and the labels."""
    pixels = np.stack([source.image(i) for i in range(len(source))])
    return normalise(pixels, INPUT_SPEC), torch.from_numpy(source.labels)


@torch.inference_mode()
def answer(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Of all images, and of the 3s."""
    right = (logits.argmax(1) == labels).double()
    return right.mean().item(), right[labels == THREE].mean().item()


def shifted(logits: Tensor, shift: float) -> Tensor:
    """What a network would say if its output bias for 3 were larger by ``shift``."""
    return logits + shift * F.one_hot(torch.tensor(THREE), logits.shape[1])


def best_shift(logits: Tensor, labels: Tensor) -> float:
    """The δ with the best accuracy over all digits; of equals the middle one.

    An image becomes a 3 where δ passes its margin, and nothing happens between two margins: the middles
    between them, and 0, are all there is to try.
    """
    is_three = F.one_hot(torch.tensor(THREE), logits.shape[1]).bool()
    margins = (logits.masked_fill(is_three, -torch.inf).amax(1) - logits[:, THREE]).sort().values
    shifts = torch.cat([torch.zeros(1), (margins[1:] + margins[:-1]) / 2]).sort().values.tolist()
    overall = np.array([accuracy(shifted(logits, shift), labels)[0] for shift in shifts])
    best = np.flatnonzero(overall == overall.max())
    return shifts[int(best[len(best) // 2])]
