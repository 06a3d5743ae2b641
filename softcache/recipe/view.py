"""View: one concrete look at a sample, in integers: pixels of the source image, and what its pixel ops drew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from softcache.errors import DamageError
from softcache.recipe.mix import UNMIXED, Mix
from softcache.recipe.mosaic import UNTILED, Mosaic

MAX_PIXELS = 32767  # a side or an offset must fit the int16 it is stored in
MAX_PARAMETERS = 1024  # of all pixel ops of a recipe


@dataclass(frozen=True, slots=True)
class View:
    """The rectangle of the source image that is shown, mirrored left-right afterwards or not.

    Free of resolution: the teacher and the student render the same view at their own sizes. The
    rectangle may reach outside the image, where it shows zeros (black), or what the op FILL says. ``ops`` are the realised
    pixel ops, opcodes and their arguments (:mod:`softcache.recipe.opcodes`), done on the pixels resampled. All that is
    one tile of ``mosaic``, where there is one; and that is mixed with ``mix``.
    """

    x: int
    y: int
    width: int
    height: int
    image_width: int
    image_height: int
    flip: bool
    ops: tuple[int, ...] = ()
    mix: Mix | None = None
    mosaic: Mosaic | None = None

    FIELDS: ClassVar[int] = 7

    def pack(self) -> tuple[int, ...]:
        """The seven numbers of the geometry in order, each within int16."""
        return (
            self.x,
            self.y,
            self.width,
            self.height,
            self.image_width,
            self.image_height,
            int(self.flip),
        )

    def fields(self) -> dict[str, tuple[int, ...]]:
        """What is stored of the view, by the names of the arrays below ``view/``."""
        partner, mix = self.mix.pack() if self.mix else UNMIXED
        tiles, mosaic = self.mosaic.pack() if self.mosaic else UNTILED
        alone = {"geometry": self.pack(), "ops": self.ops}
        return alone | {"partner": partner, "mix": mix, "tiles": tiles, "mosaic": mosaic}

    @property
    def others(self) -> tuple[int, ...]:
        """The samples whose images are needed to render it, each once; its own may be among them, in a partner's mosaic."""
        found = [tile.sample for tile in self.mosaic.tiles] if self.mosaic else []
        if self.mix:
            found += [self.mix.partner, *self.mix.view.others]
        return tuple(dict.fromkeys(found))

    @classmethod
    def unpack(cls, row: Sequence[int], ops: Sequence[int] = ()) -> View:
        """The view of seven stored numbers and its ops (tuples, or integer arrays of one axis).

        Raises :class:`DamageError` for a rectangle or an image without pixels.
        """
        x, y, width, height, image_width, image_height, flip = map(int, row)
        if min(width, height, image_width, image_height) < 1:
            raise DamageError("a view of no size, which no recipe draws: rebuild the cache")
        return cls(x, y, width, height, image_width, image_height, bool(flip), tuple(map(int, ops)))
