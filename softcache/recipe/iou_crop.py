"""``iou_crop``: a part of the canvas that shows enough of one of its boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from softcache.errors import SpecError
from softcache.keyed import Draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.options import interval, whole
from softcache.recipe.words import listed, span

_ROUNDS = 50  # after which there is no part that is good enough


@dataclass(frozen=True)
class IouCrop:
    """SSD's crop (Liu et al. 2016) as torchvision's RandomIoUCrop draws it.

    One of ``options`` is the least IoU that the part must have with a box whose middle it holds; 1 leaves the canvas as
    it is. Of ``trials`` parts, their sides ``min_scale`` to ``max_scale`` of the canvas's, the first that has it is taken;
    without one, another option is drawn. A canvas without boxes is left as it is.
    """

    min_scale: float = 0.3
    max_scale: float = 1.0
    min_aspect_ratio: float = 0.5
    max_aspect_ratio: float = 2.0
    options: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    trials: int = 40
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        interval(
            "iou_crop", "min_aspect_ratio, max_aspect_ratio", (self.min_aspect_ratio, self.max_aspect_ratio)
        )
        if interval("iou_crop", "min_scale, max_scale", (self.min_scale, self.max_scale))[1] > 1:
            raise SpecError(f"iou_crop: max_scale is a share of a side, at most 1, not {self.max_scale}")
        whole("iou_crop", "trials", self.trials, 1)
        known = isinstance(self.options, tuple) and all(
            type(o) in (int, float) and 0 <= o <= 1 for o in self.options
        )
        if not known or not self.options:
            raise SpecError(f"iou_crop: options are IoUs from 0 to 1, not {self.options!r}")

    def words(self) -> str:
        return (
            f"A random part is cut out, {span(self.min_scale, self.max_scale)} of each side and "
            f"{span(self.min_aspect_ratio, self.max_aspect_ratio)} times as wide as high, with an IoU with a box of "
            f"at least {listed(self.options)}, whichever is drawn (1 leaves all of it), in {self.trials:,} trials."
        )

    def size_after(self, size: Size | None) -> Size | None:
        return None

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        if canvas.boxes is None:
            raise SpecError(
                "iou_crop asks where the boxes are, and the source has none: leave it out, or give boxes"
            )
        boxes = canvas.seen(canvas.boxes)
        for _ in range(_ROUNDS if len(boxes) else 0):
            least = self.options[draws.integer(len(self.options))]
            if least >= 1:
                break
            for _ in range(self.trials):
                part = self._part(canvas, draws)
                if part is not None and _overlap(boxes, *part) >= least:
                    return canvas.crop(*part)
        return canvas

    def _part(self, canvas: Canvas, draws: Draws) -> tuple[int, int, int, int] | None:
        """y, x, height and width of a part, None where its proportions are not those that are asked for."""
        width, height = (
            int(side * draws.uniform(self.min_scale, self.max_scale))
            for side in (canvas.width, canvas.height)
        )
        if not height or not self.min_aspect_ratio <= width / height <= self.max_aspect_ratio:
            return None
        x, y = draws.integer(canvas.width - width + 1), draws.integer(canvas.height - height + 1)
        return y, x, height, width


def _overlap(boxes: np.ndarray, y: int, x: int, height: int, width: int) -> float:
    """The largest IoU with a box ``(n, 4)`` xyxy whose middle lies inside; -1 without one."""
    low, high = np.array([x, y]), np.array([x + width, y + height])
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    boxes = boxes[((low < middle) & (middle < high)).all(axis=1)]
    if not len(boxes):
        return -1.0
    common = (np.minimum(boxes[:, 2:], high) - np.maximum(boxes[:, :2], low)).clip(0).prod(axis=1)
    total = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + width * height - common
    return float((common / total).max())
