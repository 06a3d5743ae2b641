"""``sample(n)``: classes drawn from a row's probabilities (Random Sampling KD: Anshumann et al. 2025, arXiv:2503.16870)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from softcache import keyed
from softcache.codecs.fields import Field, Fields, class_dtype
from softcache.errors import CodecError, SpecError


@dataclass(frozen=True)
class Sample:
    """``index``: ``n`` classes drawn from softmax(z / T), rising, each as often as it was drawn; ``entropy`` of that
    softmax, as a float16.

    The share p̂ of the draws that a class has is unbiased: its mean over draws is p, and so is the gradient of a loss that is
    linear in p, at this T and at no other. A student must therefore see many rows, each a few times: this is for language
    models. One number u in 0 … 1 is drawn, and the classes are those where the cumulated p reaches (u + i) / n, i = 0 …
    n − 1 (systematic resampling): a class is drawn ⌊n·p⌋ or ⌈n·p⌉ times, where draws one by one would scatter more. u
    follows from ``seed`` and from the row's logits themselves, so that it depends on no order, rank or batch.
    """

    n: int
    T: float = 1  # the paper's name
    seed: int = 0

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("logits",)
    limit: ClassVar[float] = float(np.finfo(np.float32).max) / 4

    example: ClassVar[str] = "sample(50)"

    def __post_init__(self) -> None:
        if type(self.n) is not int or not 1 <= self.n <= 65536:
            raise SpecError(f"sample: n must be a whole number from 1 to 65536, not {self.n!r}")
        if type(self.T) not in (int, float) or not 0 < self.T < inf:
            raise SpecError(f"sample: T must be a finite number above 0, not {self.T!r}")
        if type(self.seed) is not int:
            raise SpecError(f"sample: seed must be a whole number, not {self.seed!r}")

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        if len(shape) != 1 or shape[0] < 2:
            raise CodecError(f"sample draws from two or more classes, and the teacher gives {shape}")
        return (Field("entropy", "float16", ()), Field("index", class_dtype(shape[0]), (self.n,)))

    def encode(self, values: np.ndarray) -> Fields:
        z = values.astype(np.float64) / self.T
        z -= z.max(axis=1, keepdims=True)
        p = np.exp(z)
        total = p.sum(axis=1, keepdims=True)
        entropy = np.log(total[:, 0]) - (p * z).sum(axis=1) / total[:, 0]
        cumulated = np.cumsum(p, axis=1)
        index = np.zeros((len(values), self.n), np.int64)
        for row, (said, up_to) in enumerate(zip(values, cumulated, strict=True)):
            places = (self._offset(said) + np.arange(self.n)) / self.n * up_to[-1]
            index[row] = np.searchsorted(up_to, places, side="right")
        last = (p > 0).cumsum(axis=1).argmax(axis=1)  # rounding must not draw a class of no probability
        index = np.minimum(index, last[:, None])
        return {"entropy": entropy.astype(np.float16), "index": index.astype(class_dtype(values.shape[1]))}

    def _offset(self, row: np.ndarray) -> float:
        said = hashlib.blake2b((row.astype("<f4") + np.float32(0)).tobytes(), digest_size=16).hexdigest()
        return keyed.draws("sample", self.seed, said).uniform()

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> SampledLogits:
        return SampledLogits(
            fields["index"].astype(np.int64), fields["entropy"].astype(np.float32), float(self.T), shape[0]
        )

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        """Of ``entropy``, which is all that is rounded."""
        return np.maximum(fields["entropy"].astype(np.float64) * (1.001 * 2.0**-11), 2.0**-25)


@dataclass(frozen=True)
class SampledLogits:
    """``index`` int64 (…, n): classes as often as they were drawn at the temperature ``T``, of ``classes``; ``entropy``
    float32 (…,), of what they were drawn from."""

    index: np.ndarray
    entropy: np.ndarray
    T: float
    classes: int

    def __getitem__(self, row: int) -> SampledLogits:
        return SampledLogits(self.index[row], self.entropy[row], self.T, self.classes)

    def holds(self, T: float) -> bool:  # noqa: N803
        return T == self.T

    def probs(self, T: float) -> np.ndarray:  # noqa: N803
        """The share of each class in the draws, float64 (…, C): unbiased, and mostly zeros.

        Raises :class:`SpecError` at another temperature.
        """
        check(T, self.T)
        flat = self.index.reshape(-1, self.index.shape[-1])
        count = np.zeros((len(flat), self.classes))
        np.add.at(count, (np.arange(len(flat))[:, None], flat), 1)
        return (count / self.index.shape[-1]).reshape(*self.index.shape[:-1], self.classes)

    def log_probs(self, T: float = 1.0) -> np.ndarray:  # noqa: N803
        """The logarithm of :meth:`probs`: −∞ of what was not drawn."""
        with np.errstate(divide="ignore"):
            return np.log(self.probs(T))

    def dense(self, T: float = 1.0) -> np.ndarray:  # noqa: N803
        """As :meth:`log_probs`, in float32."""
        return self.log_probs(T).astype(np.float32)

    def top1(self) -> np.ndarray:
        """The class that was drawn most often, int64 (…,)."""
        return self.probs(self.T).argmax(axis=-1)

    def arrays(self) -> dict[str, np.ndarray]:
        """What ``softcache_train.kd`` needs, as arrays that a DataLoader stacks."""
        return {"draws": self.index, "entropy": self.entropy, "T": np.full(self.entropy.shape, self.T)}


def check(asked: float, drawn: float) -> None:
    """Raises :class:`SpecError` where they differ."""
    if asked != drawn:
        raise SpecError(
            f"sample drew classes at T={drawn:g}, which say nothing of T={asked:g}: train with T={drawn:g}, or build with "
            f"logits=sample(n, T={asked:g}), or with packed or topk, which hold every temperature from 1 to 8"
        )
