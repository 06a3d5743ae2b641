"""Ops that mix a view with another sample's: ``mixup``, ``cutmix``, and one or the other, ``mix``.

One at most in a recipe, as its last op; after a mosaic ``mixup`` alone. The partner is any other sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.mix import ONE, Blend
from softcache.recipe.options import probability
from softcache.recipe.words import often


class Mixing:
    """What the three have in common: they leave geometry alone."""

    version: ClassVar[int] = 1

    def size_after(self, size: Size | None) -> Size | None:
        return size

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        return canvas

    def blend(self, size: Size, draws: Draws) -> Blend | None:
        """How a picture of ``size`` (that of the canvas, in virtual pixels) is mixed; None where it is not."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mixup(Mixing):
    """Zhang et al. 2018: λ of the picture and 1 − λ of its partner's, λ ~ Beta(alpha, alpha), with probability ``p``."""

    alpha: float = 0.8
    p: float = 1.0

    def __post_init__(self) -> None:
        _positive("mixup", "alpha", self.alpha)
        probability("mixup", self.p)

    def words(self) -> str:
        return f"{often(self.p)} it is blended with another sample's view (mixup), {_law(self.alpha)}."

    def blend(self, size: Size, draws: Draws) -> Blend | None:
        return _mixup(self.alpha, draws) if draws.uniform() < self.p else None


@dataclass(frozen=True)
class Cutmix(Mixing):
    """Yun et al. 2019: a box of the partner's picture, 1 − λ of the area and cut at the edges, with probability ``p``.

    As theirs it lies on whole pixels of the canvas, and λ is then what the box really left.
    """

    alpha: float = 1.0
    p: float = 1.0

    def __post_init__(self) -> None:
        _positive("cutmix", "alpha", self.alpha)
        probability("cutmix", self.p)

    def words(self) -> str:
        return (
            f"{often(self.p)} a box of another sample's view is pasted into it (cutmix), {_law(self.alpha)}."
        )

    def blend(self, size: Size, draws: Draws) -> Blend | None:
        return _cutmix(self.alpha, size, draws) if draws.uniform() < self.p else None


@dataclass(frozen=True)
class MixupOrCutmix(Mixing):
    """With probability ``p`` a mix, and of those cutmix with probability ``switch``: what DeiT and timm do.

    ``mixup`` and ``cutmix`` are the alphas.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    p: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        _positive("mix", "mixup", self.mixup)
        _positive("mix", "cutmix", self.cutmix)
        probability("mix", self.p)
        probability("mix", self.switch, "switch")

    def words(self) -> str:
        return (
            f"{often(self.p)} it is mixed with another sample's view: with probability {self.switch:g} by cutmix, "
            f"{_law(self.cutmix)}, else by mixup, {_law(self.mixup)}."
        )

    def blend(self, size: Size, draws: Draws) -> Blend | None:
        if draws.uniform() >= self.p:
            return None
        if draws.uniform() < self.switch:
            return _cutmix(self.cutmix, size, draws)
        return _mixup(self.mixup, draws)


def candidates(sample: int, samples: int, draws: Draws) -> Iterator[int]:
    """Every other sample once, in a drawn order: the first that can be read is the partner."""
    seen: set[int] = set()
    while len(seen) < samples - 1:
        other = draws.integer(samples - 1)
        if other not in seen:
            seen.add(other)
            yield other + (other >= sample)


def beta(alpha: float, draws: Draws) -> float:
    """A number in 0…1 distributed as Beta(alpha, alpha).

    From 1/2 on it is Ulrich's (1984) closed form; below, Jöhnk's (1964) rejection, in logarithms for the tiniest alpha.
    """
    if alpha >= 0.5:
        u, v = draws.uniform(), draws.uniform()
        radius = 0.0 if alpha == 0.5 else u ** (2 / (2 * alpha - 1))
        return 0.5 + 0.5 * math.sqrt(1 - radius) * math.cos(2 * math.pi * v)
    while True:
        x, y = (math.log(1 - draws.uniform()) / alpha for _ in range(2))  # 1 - u is never 0
        if math.exp(x) + math.exp(y) <= 1:
            return 1 / (1 + math.exp(min(y - x, 700.0)))


def _mixup(alpha: float, draws: Draws) -> Blend | None:
    lam = round(beta(alpha, draws) * ONE)
    return Blend(lam) if lam < ONE else None


def _cutmix(alpha: float, size: Size, draws: Draws) -> Blend | None:
    cut = math.sqrt(1 - beta(alpha, draws))
    top, bottom = _side(size[0], cut, draws)
    left, right = _side(size[1], cut, draws)
    y, below = (round(edge * ONE / size[0]) for edge in (top, bottom))
    x, beside = (round(edge * ONE / size[1]) for edge in (left, right))
    if x == beside or y == below:
        return None
    lam = ONE - round(ONE * (bottom - top) * (right - left) / (size[0] * size[1]))
    return Blend(lam, x, y, beside - x, below - y)


def _side(length: int, share: float, draws: Draws) -> tuple[int, int]:
    """``share`` of a side about a drawn pixel, as far as it lies inside."""
    half, middle = int(length * share) // 2, draws.integer(length)
    return max(middle - half, 0), min(middle + half, length)


def _law(alpha: float) -> str:
    return f"λ from Beta({alpha:g}, {alpha:g})"


def _positive(op: str, name: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:  # pyright: ignore[reportOperatorIssue]
        raise SpecError(f"{op}: {name} must be a number above 0, not {value!r}")
