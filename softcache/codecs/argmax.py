"""``argmax``: the class a teacher decided for, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.codecs.fields import Field, Fields, below, class_dtype
from softcache.errors import CodecError, SpecError


@dataclass(frozen=True)
class Argmax:
    """``index``, the class of the largest logit (the lower one where two are equal). Exact."""

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("logits",)
    limit: ClassVar[float] = float(np.finfo(np.float32).max)

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        if len(shape) != 1 or shape[0] < 2:
            raise CodecError(f"argmax holds the class of two or more logits, and the teacher gives {shape}")
        return (Field("index", class_dtype(shape[0]), ()),)

    def encode(self, values: np.ndarray) -> Fields:
        return {"index": values.argmax(axis=1).astype(class_dtype(values.shape[1]))}

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> HardLabels:
        return HardLabels(below(fields["index"], shape[0], "class"), shape[0])

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros((len(fields["index"]), 1))


@dataclass(frozen=True)
class HardLabels:
    """``index`` int64 (…,): the teacher's class, of ``classes``. It has no probabilities."""

    index: np.ndarray
    classes: int

    def __getitem__(self, row: int) -> HardLabels:
        return HardLabels(self.index[row], self.classes)

    def holds(self, T: float) -> bool:  # noqa: N803 - a decision has no temperature
        return False

    def dense(self, T: float = 1.0) -> np.ndarray:  # noqa: N803
        """Raises :class:`SpecError`: what the other classes were given was not kept."""
        raise SpecError(
            "argmax kept the teacher's class (.index) and no probabilities: for those, build with logits=full(u8) or "
            "logits=topk(10)"
        )

    def top1(self) -> np.ndarray:
        return self.index

    def arrays(self) -> np.ndarray:
        """The classes, as a DataLoader stacks them."""
        return self.index
