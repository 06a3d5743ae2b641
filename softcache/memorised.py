"""Has the teacher learned the very images by heart that it is asked about? Then it is certain of everything, and says no
more than the labels do: nothing is left of what distillation is for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CERTAIN = (
    0.01  # mean entropy, as a share of log(classes), below which nothing is left to learn but the labels
)
RIGHT = 0.99  # of the labelled rows
LEAST = 100  # labelled rows, below which nothing is said
_GAP = 0.02  # of accuracy, to what it is elsewhere
_SIGMAS = 3.0


@dataclass(frozen=True)
class Answers:
    """What is known of a teacher's answers to some images: ``rows`` that have a label, the share ``top1`` of them where the
    label is what it thinks most probable, and ``entropy``, the mean of softmax(logits) in nats."""

    rows: int
    top1: float
    entropy: float
    classes: int

    def words(self) -> str:
        """``99.90 % of 1,024 rows are right, mean entropy 0.0065 nats``."""
        return f"{self.top1:.2%} of {self.rows:,} rows are right, mean entropy {self.entropy:.2g} nats"


def entropies(logits: np.ndarray) -> np.ndarray:
    """Of softmax of each row of float32 ``(n, C)``, in nats: float64 ``(n,)``."""
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    p = np.exp(z)
    total = p.sum(axis=-1)
    return np.log(total) - (p * z).sum(axis=-1) / total


def warning(here: Answers, elsewhere: Answers | None = None) -> str | None:
    """What to tell of a teacher that seems to have memorised these images; None where nothing speaks for it.

    With answers ``elsewhere``, to images that it was not trained on: it is right far more often here (two points, and more
    than chance explains). Without: it is right on 99 % and its entropy is below a hundredth of log(classes). That may be an
    easy task, which only images from elsewhere can tell, and the warning says so.
    """
    if here.rows < LEAST:
        return None
    told = f"NOTE: the teacher seems to have memorised these images: {here.words()}"
    if elsewhere is not None and elsewhere.rows:
        gap = here.top1 - elsewhere.top1
        chance = math.sqrt(sum(_variance(one) for one in (here, elsewhere)))
        if gap <= max(_GAP, _SIGMAS * chance):
            return None
        return f"{told}, and elsewhere {elsewhere.words()}. {_WHAT_TO_DO}"
    if here.top1 < RIGHT or here.entropy > CERTAIN * math.log(here.classes):
        return None
    return (
        f"{told}. Or the task is easy for it: softcache plan --elsewhere SPLIT compares with images that it was not "
        f"trained on. {_WHAT_TO_DO}"
    )


_WHAT_TO_DO = (
    "What it says is then little more than the labels: cache images that it has not seen, or stronger augmentation, or a "
    "teacher that was trained on others"
)


def _variance(one: Answers) -> float:
    """Of the share that is right; as if one more were right and one more wrong, so that no share is certain."""
    share = (one.top1 * one.rows + 1) / (one.rows + 2)
    return share * (1 - share) / one.rows
