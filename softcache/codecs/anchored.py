"""``anchored(…)``: what an image's views have in common is kept once, and of each view what it says differently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.codecs.bits import pack, packed_bytes, unpack
from softcache.codecs.fields import Field, Fields, below, class_dtype, half_down, half_up
from softcache.codecs.topk import Tail
from softcache.errors import CodecError, SpecError

AT = (1.0, 2.0, 4.0, 8.0)
# steps of least squared error for a normal distribution, by bits (Max 1960)
_GRID = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041}
_REACH = 3.0  # times the typical deviation, to which corrections of listed classes go
_LEAST = 1 / 32  # of the base's step is a correction's, of images whose views are all alike
_EXTRA = 6  # bits of the correction of a class that is not listed
_TAIL, _NATS = 6, 1 / 8  # bits and step of the correction of the rest's weight
_WORTH = 1.5  # the temperature at which a correction's worth is weighed


@dataclass(frozen=True)
class Anchored:
    """A base for each image, and for each view its corrections: re-temperable from T = 1 to 8.

    Four fifths of the variance of an ImageNet network's logits lie between images, not between views of one. The *base*
    is the mean of the image's first ``views`` views, centred: the ``listed`` largest classes by name, finely, all others in
    ``base`` bits each. It is written once and never changes, so that views can be added later. A view keeps a correction of
    ``bits`` for each listed class; the ``extra`` classes whose error would cost most, by name, with a correction; and at
    T = 1, 2, 4, 8 how much more or less all the others weigh together than the base says.

    So p(T) = softmax(r/T + c(T)·[not kept]): r is the base with its corrections, c is exact to 1/16 nat at those T, and in
    between the polynomial in 1/T through them, as of ``topk``. It pays from about fifteen views an image.
    """

    listed: int = 16
    bits: int = 4
    extra: int = 5
    base: int = 3
    views: int = 6

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("logits",)
    limit: ClassVar[float] = 16000.0  # centred and less another, a logit still is a float16

    def __post_init__(self) -> None:
        ranges = {"listed": (1, 4096), "bits": (2, 8), "extra": (1, 256), "base": (1, 6), "views": (2, 64)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise SpecError(f"anchored: {name} is a whole number from {low} to {high}, not {value!r}")

    def shared(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        """The fields of an image, which all its views share."""
        self._check(shape)
        return (
            Field("base", "uint8", (packed_bytes(shape[0], self.base),)),
            Field("grid", "float16", (5,)),
            Field("list", class_dtype(shape[0]), (self.listed,)),
            Field("listed", "uint8", (self.listed,)),
        )

    def fields(self, shape: tuple[int, ...]) -> tuple[Field, ...]:
        self._check(shape)
        return (
            Field("correction", "uint8", (packed_bytes(self.listed, self.bits),)),
            Field("extra", "uint8", (packed_bytes(self.extra, _EXTRA),)),
            Field("index", "uint8", (packed_bytes(self.extra, _index_bits(shape[0])),)),
            Field("tail", "uint8", (packed_bytes(len(AT), _TAIL),)),
        )

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 1 or shape[0] <= self.listed + self.extra:
            raise CodecError(
                f"anchored keeps {self.listed} + {self.extra} of more classes than that by name, and the teacher gives "
                f"{shape}; keep all of them with full(u8)"
            )

    def anchor(self, values: np.ndarray) -> Fields:
        """The shared fields of images from ``values``, float32 ``(views, n, C)``: what their first views say."""
        centred = np.array(values, np.float64, order="C")
        centred -= centred.mean(axis=-1, keepdims=True)
        mean = centred.mean(axis=0)
        named = np.argsort(-mean, axis=1, kind="stable")[:, : self.listed]
        top = np.take_along_axis(mean, named, 1)
        rest = np.ma.masked_array(mean, _among(named, mean.shape))
        middle = _half(rest.mean(axis=1))
        step = half_up(_GRID[self.base] * np.asarray(rest.std(axis=1)))
        half = 1 << (self.base - 1)
        level = np.floor(_over(mean - middle[:, None], step) + half)
        low = half_down(top[:, -1])
        fine = half_up((top[:, 0] - low.astype(np.float64)) / 255)
        found: Fields = {
            "base": pack(np.clip(level, 0, 2 * half - 1).astype(np.uint32), self.base),
            "grid": np.stack([middle, step, low, fine, np.zeros(len(mean), np.float16)], axis=1),
            "list": named.astype(class_dtype(mean.shape[1])),
            "listed": np.clip(np.rint(_over(top - low.astype(np.float64)[:, None], fine)), 0, 255).astype(
                np.uint8
            ),
        }
        off = np.take_along_axis(centred - self._base(found, mean.shape[1])[0], named[None], 2)
        typical = np.sqrt(np.square(off).mean(axis=2).mean(axis=0))
        move = np.maximum(typical * (2 * _REACH / (1 << self.bits)), step.astype(np.float64) * _LEAST)
        found["grid"][:, 4] = half_up(move)
        return found

    def _base(self, shared: Fields, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The base, float64 ``(n, C)``; the listed classes, int64; the step of corrections, float64 ``(n, 1)``."""
        middle, step, low, fine, move = shared["grid"].astype(np.float64).T[..., None]
        level = unpack(shared["base"], classes, self.base) - ((1 << (self.base - 1)) - 0.5)
        base, named = middle + step * level, below(shared["list"], classes, "class")
        np.put_along_axis(base, named, low + fine * shared["listed"], 1)
        return base, named, move

    def encode(self, values: np.ndarray, shared: Fields) -> Fields:
        """``shared``: of the image of each row."""
        said = values.astype(np.float64)
        said -= said.mean(axis=1, keepdims=True)
        found, named, move = self._base(shared, said.shape[1])
        correction = _levels(np.take_along_axis(said - found, named, 1), move, self.bits)
        _add(found, named, correction, move, self.bits)
        cost = np.exp(_log_softmax(said / _WORTH)) * np.square(said - found)
        index = np.sort(np.argsort(-cost, axis=1, kind="stable")[:, : self.extra], axis=1)
        extra = _levels(np.take_along_axis(said - found, index, 1), move, _EXTRA)
        _add(found, index, extra, move, _EXTRA)
        kept = _among(named, said.shape) | _among(index, said.shape)
        odds = np.stack([_odds(said / T, kept) - _odds(found / T, kept) for T in AT], axis=1)
        half = 1 << (_TAIL - 1)
        return {
            "correction": pack(correction, self.bits),
            "extra": pack(extra, _EXTRA),
            "index": pack(index, _index_bits(said.shape[1])),
            "tail": pack(np.clip(np.rint(odds / _NATS) + half, 0, 2 * half - 1), _TAIL),
        }

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> AnchoredLogits:
        """``fields``: those of the rows, and the shared ones of the image of each."""
        found, named, move = self._base(fields, shape[0])
        _add(found, named, unpack(fields["correction"], self.listed, self.bits), move, self.bits)
        index = unpack(fields["index"], self.extra, _index_bits(shape[0])).astype(np.int64)
        index = np.minimum(index, shape[0] - 1)  # of bytes that nobody wrote
        _add(found, index, unpack(fields["extra"], self.extra, _EXTRA), move, _EXTRA)
        tail = unpack(fields["tail"], len(AT), _TAIL).astype(np.float32) - (1 << (_TAIL - 1))
        rest = ~(_among(named, found.shape) | _among(index, found.shape))
        return AnchoredLogits(found.astype(np.float32), rest, tail * np.float32(_NATS))

    def bound(self, fields: Fields, shape: tuple[int, ...]) -> np.ndarray:
        """Of centred logits: half a step where a correction is within its range, and none (infinity) elsewhere."""
        _, named, move = self._base(fields, shape[0])
        bound = np.full((len(named), *shape), np.inf)
        for index, bits, name in ((named, self.bits, "correction"), (None, _EXTRA, "extra")):
            if index is None:
                index = unpack(fields["index"], self.extra, _index_bits(shape[0])).astype(np.int64)
            level = unpack(fields[name], index.shape[1], bits)
            inside = (level > 0) & (level < (1 << bits) - 1) & (move > 0)
            np.put_along_axis(bound, index, np.where(inside, move * (0.5 + 2**-9), np.inf), 1)
        return bound


@dataclass(frozen=True)
class AnchoredLogits:
    """Logits of which some were kept for the view, and the rest are the image's.

    ``value`` float32 (…, C), centred; ``rest`` bool (…, C), those that were not kept for the view; ``shift`` float32
    (…, 4), what is added to all of them, after division by T, at T = 1, 2, 4, 8.
    """

    value: np.ndarray
    rest: np.ndarray
    shift: np.ndarray

    def __getitem__(self, row: int) -> AnchoredLogits:
        return AnchoredLogits(self.value[row], self.rest[row], self.shift[row])

    def holds(self, T: float) -> bool:  # noqa: N803
        return AT[0] <= T <= AT[-1]

    def log_probs(self, T: float = 1.0) -> np.ndarray:  # noqa: N803
        """Log-probabilities, float64 (…, C). Raises :class:`SpecError` unless T is from 1 to 8."""
        shift = self.shift.astype(np.float64) @ weights(T)
        return _log_softmax(self.value.astype(np.float64) / T + shift[..., None] * self.rest)

    def dense(self, T: float = 1.0) -> np.ndarray:  # noqa: N803
        """As :meth:`log_probs`, in float32."""
        return self.log_probs(T).astype(np.float32)

    def top1(self) -> np.ndarray:
        """The most probable class at T = 1, int64 (…,)."""
        return self.log_probs().argmax(axis=-1)

    def arrays(self) -> dict[str, np.ndarray]:
        """What ``softcache_train.kd`` needs, as arrays that a DataLoader stacks."""
        return {"value": self.value, "rest": self.rest, "shift": self.shift}


def weights(T: float) -> np.ndarray:  # noqa: N803
    """float64 (4,): the shift at T is the sum of these times those at 1, 2, 4, 8. :class:`SpecError` outside 1 … 8."""
    if not AT[0] <= T <= AT[-1]:
        raise SpecError(
            f"the temperature {T} is outside {AT[0]:g} to {AT[-1]:g}, at which anchored knows what those classes weigh that "
            "a view did not keep: choose one within, or keep all classes with full(u8)"
        )
    return Tail(0, AT, False).weights(T)


def _index_bits(classes: int) -> int:
    return max(1, (classes - 1).bit_length())


def _among(index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    found = np.zeros(shape, bool)
    np.put_along_axis(found, index, True, 1)
    return found


def _half(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float16)


def _over(x: np.ndarray, step: np.ndarray) -> np.ndarray:
    """``x`` (n, …) in steps of its row; 0 where the step is 0."""
    step = step.astype(np.float64).reshape(-1, 1)
    return np.divide(x, step, out=np.zeros_like(x), where=step > 0)


def _levels(off: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
    """Which of the 2**bits cells of a step each error lies in, the outermost reaching on for ever."""
    half = 1 << (bits - 1)
    return np.clip(np.floor(_over(off, step) + half), 0, 2 * half - 1).astype(np.uint32)


def _add(values: np.ndarray, index: np.ndarray, level: np.ndarray, step: np.ndarray, bits: int) -> None:
    """Put the middles of the cells onto the values at the index, in place."""
    found = np.take_along_axis(values, index, 1) + step * (level - ((1 << (bits - 1)) - 0.5))
    np.put_along_axis(values, index, found, 1)


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def _odds(z: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Log of how many times the kept classes' weight all others have, (n,)."""
    return _log_sum(np.where(kept, -np.inf, z)) - _log_sum(np.where(kept, z, -np.inf))


def _log_sum(z: np.ndarray) -> np.ndarray:
    top = z.max(axis=1)
    return top + np.log(np.exp(z - top[:, None]).sum(axis=1))
