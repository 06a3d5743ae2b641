"""``topk(k)``: a row's k largest logits, and what the others weigh at several temperatures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from softcache.codecs.fields import Field, Fields, below, class_dtype, half_up
from softcache.errors import CodecError, SpecError

_LEVELS = 65535


@dataclass(frozen=True)
class TopK:
    """The ``k`` largest of ``C`` logits, and the rest's total mass at the temperatures ``at``: re-temperable.

    Probabilities that were cut off at one temperature are wrong at another; logits are not. Kept are: ``index``, the
    classes in falling order (the lower class first where two are equal); ``value``, how far each lies below the row's
    largest; and for each temperature of ``at`` the ``tail``, how far below it the *soft mean* of the other C − k lies:
    m(T) = T · log(Σ exp(z/T) / (C − k)). All distances share the row's ``step``, a 65,535th of the largest of them
    rounded up to float16; each is off by at most ``step / 2``. At the temperatures of ``at`` the kept probabilities
    and the tail's mass are therefore those of the full row but for the rounding; between them m is interpolated by
    the polynomial in 1/T through all of ``at`` (m is smooth there: the cumulant generating function of the tail);
    outside them a temperature is refused.

    ``tail`` says what an objective may make of the rest: ``bucket``, one class of its own, or ``spread``, its mass
    evenly over the C − k classes.
    """

    k: int
    at: tuple[float, ...] = (1, 2, 4, 8)
    tail: str = "bucket"

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("logits",)
    limit: ClassVar[float] = 32752.0

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1:
            raise SpecError(f"topk: k must be a whole number of at least 1, not {self.k!r}")
        check_tail("topk", self.at, self.tail)

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        if len(shape) != 1 or shape[0] <= self.k:
            raise CodecError(
                f"topk({self.k}) keeps {self.k} of more classes than that, and the teacher gives {shape}; "
                "keep fewer, or all of them with full(u8)"
            )
        return (
            Field("index", class_dtype(shape[0]), (self.k,)),
            Field("step", "float16", ()),
            Field("tail", "uint16", (len(self.at),)),
            Field("value", "uint16", (self.k,)),
        )

    def encode(self, values: np.ndarray) -> Fields:
        order = np.argsort(-values, axis=1, kind="stable")
        rows = np.take_along_axis(values, order, axis=1).astype(np.float64)
        kept = rows[:, :1] - rows[:, : self.k]
        tail = rows[:, :1] - np.stack([_soft_mean(rows[:, self.k :], T) for T in self.at], axis=1)
        tail = np.maximum(tail, 0)  # the last bit of a row of equal logits
        both = np.concatenate([kept, tail], axis=1)
        step = half_up(both.max(axis=1) / _LEVELS)
        divisor = np.where(step > 0, step, np.float16(1)).astype(np.float64)
        whole = np.rint(both / divisor[:, None]).astype(np.uint16)
        return {
            "index": order[:, : self.k].astype(class_dtype(values.shape[1])),
            "step": step,
            "tail": whole[:, self.k :],
            "value": whole[:, : self.k],
        }

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> SparseLogits:
        step = fields["step"].astype(np.float32)[:, None]
        return SparseLogits(
            below(fields["index"], shape[0], "class"),
            -step * fields["value"],
            -step * fields["tail"],
            self.known_tail(shape),
        )

    def known_tail(self, shape: tuple[int, ...]) -> Tail:
        """What rows of ``shape`` come back with."""
        return Tail(shape[0], tuple(map(float, self.at)), self.tail == "spread")

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        """Of ``value`` and ``tail`` alike: ``(n, 1)``."""
        return fields["step"].astype(np.float64)[:, None] * (0.5 + _LEVELS * 2.0**-23)


def check_tail(codec: str, at: Any, tail: str) -> None:
    """Raises :class:`SpecError` for temperatures that are none, and for another word than ``bucket`` and ``spread``."""
    numbers = isinstance(at, tuple) and 1 <= len(at) <= 8 and all(type(T) in (int, float) for T in at)
    if not numbers or at[0] <= 0 or any(a >= b for a, b in pairwise(at)):
        raise SpecError(
            f"{codec}: at must be one to eight rising temperatures above 0, like (1, 2, 4, 8), not {at}"
        )
    if tail not in ("bucket", "spread"):
        raise SpecError(f"{codec}: tail must be bucket or spread, not {tail!r}")


def _soft_mean(rows: np.ndarray, T: float) -> np.ndarray:  # noqa: N803 - the field's name
    """T · log(mean(exp(row / T))) of each row of falling numbers."""
    top = rows[:, :1]
    return top[:, 0] + T * np.log(np.exp((rows - top) / T).mean(axis=1))


@dataclass(frozen=True)
class Tail:
    """What is known of the classes that were not kept: there are ``classes`` in all, their soft mean was measured at
    the temperatures ``at``, and an objective takes them for one bucket, or ``spread`` evenly."""

    classes: int
    at: tuple[float, ...]
    spread: bool

    def weights(self, T: float) -> np.ndarray:  # noqa: N803
        """float64 ``(len(at),)``: m(T) is the sum of these times m at each of ``at`` (Lagrange, in 1/T).

        Raises :class:`SpecError` for a temperature outside ``at``.
        """
        if not self.at[0] <= T <= self.at[-1]:
            raise SpecError(
                f"the temperature {T} is outside the {self.at[0]:g} to {self.at[-1]:g} at which topk kept the tail; "
                "choose one within, or build with at= further apart, like topk(10, at=(1, 2, 4, 8, 20))"
            )
        nodes = 1 / np.array(self.at)
        gaps = nodes[:, None] - nodes
        np.fill_diagonal(gaps, 1)
        ratios = (1 / T - nodes) / gaps
        np.fill_diagonal(ratios, 1)
        return ratios.prod(axis=1)


@dataclass(frozen=True)
class SparseLogits:
    """Kept logits, relative to the row's largest.

    ``index`` int64 (…, k), classes in falling order; ``value`` float32 (…, k), at most 0; ``soft_mean`` float32
    (…, len(tail.at)), of the classes that were not kept. Where a row keeps fewer than k, ``value`` ends in −∞ and ``index``
    repeats the first class.
    """

    index: np.ndarray
    value: np.ndarray
    soft_mean: np.ndarray
    tail: Tail

    def __getitem__(self, row: int) -> SparseLogits:
        return SparseLogits(self.index[row], self.value[row], self.soft_mean[row], self.tail)

    def holds(self, T: float) -> bool:  # noqa: N803
        return self.tail.at[0] <= T <= self.tail.at[-1]

    def split(self, T: float = 1.0) -> tuple[np.ndarray, np.ndarray]:  # noqa: N803
        """Log-probabilities of the kept classes, float64 (…, k), and of all others together (…,).

        Raises :class:`SpecError` outside the stored temperatures.
        """
        soft_mean = self.soft_mean.astype(np.float64) @ self.tail.weights(T)
        kept, other = self.value.astype(np.float64) / T, soft_mean / T + self._log_rest()
        total = np.logaddexp(np.logaddexp.reduce(kept, axis=-1), other)
        return kept - total[..., None], other - total

    def dense(self, T: float = 1.0) -> np.ndarray:  # noqa: N803
        """Log-probabilities, float32 (…, C), the mass of the classes that were not kept spread evenly.

        Raises :class:`SpecError` outside the stored temperatures.
        """
        return self.log_probs(T).astype(np.float32)

    def log_probs(self, T: float = 1.0) -> np.ndarray:  # noqa: N803
        """As :meth:`dense`, in float64."""
        kept, other = self.split(T)
        out = np.repeat((other - self._log_rest())[..., None], self.tail.classes, axis=-1)
        np.put_along_axis(out, self.index, np.where(self.value > -np.inf, kept, kept[..., :1]), axis=-1)
        return out

    def _log_rest(self) -> np.ndarray:
        return np.log(self.tail.classes - (self.value > -np.inf).sum(axis=-1))

    def top1(self) -> np.ndarray:
        """The most probable class, int64 (…,)."""
        return self.index[..., 0]

    def arrays(self) -> dict[str, np.ndarray]:
        """What ``softcache_train.kd`` needs, as arrays that a DataLoader stacks."""
        tail = np.array([self.tail.spread, *self.tail.at])  # as float64: 0.1 must stay what it is
        lead = self.index.shape[:-1]
        return {
            "index": self.index,
            "value": self.value,
            "soft_mean": self.soft_mean,
            "tail": np.broadcast_to(tail, (*lead, len(tail))).copy(),
        }
