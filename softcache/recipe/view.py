"""View: one concrete look at a sample, in integer pixels of the source image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

MAX_PIXELS = 32767  # a side or an offset must fit the int16 it is stored in


@dataclass(frozen=True, slots=True)
class View:
    """The rectangle of the source image that is shown, mirrored left-right afterwards or not.

    Free of resolution: the teacher and the student render the same view at their own sizes. The
    rectangle may reach outside the image, where it shows zeros (black).
    """

    x: int
    y: int
    width: int
    height: int
    image_width: int
    image_height: int
    flip: bool

    FIELDS: ClassVar[int] = 7

    def pack(self) -> tuple[int, ...]:
        """The seven fields in order, each within int16."""
        return (
            self.x,
            self.y,
            self.width,
            self.height,
            self.image_width,
            self.image_height,
            int(self.flip),
        )

    @classmethod
    def unpack(cls, row: Sequence[int]) -> View:
        """The view of seven stored numbers (a tuple, or an integer array of shape ``(7,)``)."""
        x, y, width, height, image_width, image_height, flip = map(int, row)
        return cls(x, y, width, height, image_width, image_height, bool(flip))
