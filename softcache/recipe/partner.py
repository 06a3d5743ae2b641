"""The views of a source's samples, whole: partners are looked for among the samples whose images can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from softcache.errors import SourceError, UnreadableImage
from softcache.recipe import Recipe, View
from softcache.recipe.mix import Mix
from softcache.recipe.mosaic import TILES, Mosaic, Tile

if TYPE_CHECKING:
    from softcache.source import Source


def drawn(
    recipe: Recipe, source: Source, sample: int, k: int, image: np.ndarray, alone: bool = False
) -> View:
    """View number ``k`` of a sample whose image is given, without what it is shown with; ``alone`` as in
    :meth:`Recipe.view`."""
    boxes = source.boxes(sample) if recipe.boxed else None
    height, width = image.shape[:2]
    return recipe.view(source.ids[sample], k, width, height, None if boxes is None else boxes.xyxy, alone)


@dataclass(frozen=True)
class Drawer:
    """Draws views with all that they are shown with. ``look`` gives the pixels of a sample.

    Partners are seen in their own view of the same number: in a mosaic alone, in a mix with their mosaic. With
    ``skip_corrupt`` one whose image cannot be read is passed over for the next that was drawn.
    """

    recipe: Recipe
    source: Source
    look: Callable[[int], np.ndarray]
    skip_corrupt: bool = False

    def see(self, sample: int, k: int, image: np.ndarray) -> tuple[View, dict[int, np.ndarray]]:
        """View number ``k`` of ``sample``, and the images that it needs, its own too, by sample.

        Raises :class:`UnreadableImage` without ``skip_corrupt``, and :class:`SourceError` when no other can be read.
        """
        images = {sample: image}
        view = self._tiled(sample, k, images)
        ids = self.source.ids
        mix = self.recipe.mix(ids[sample], k, sample, len(ids), view.image_width, view.image_height)
        if mix is None:
            return view, images
        blend, order = mix
        partner = next(self._read(order, images), None)
        if partner is None:
            raise self._nobody(sample)
        return replace(view, mix=Mix(partner, k, self._tiled(partner, k, images), blend)), images

    def _tiled(self, sample: int, k: int, images: dict[int, np.ndarray]) -> View:
        """A view with its mosaic, the images of which are added."""
        view, ids = drawn(self.recipe, self.source, sample, k, images[sample]), self.source.ids
        mosaic = self.recipe.mosaic(ids[sample], k, sample, len(ids))
        if mosaic is None:
            return view
        frame, order = mosaic
        joining = (i for i in order if self.recipe.joins(ids[i], k))
        found = list(islice(self._read(joining, images), TILES))
        if not found:
            if all(self.recipe.joins(id, k) for id in ids):
                raise self._nobody(sample)
            # and so nobody's mosaic shows this one, and its row may hold another rectangle
            return drawn(self.recipe, self.source, sample, k, images[sample], alone=True)
        others = [found[i % len(found)] for i in range(TILES)]  # of few samples, one is shown again
        tiles = [Tile(i, k, drawn(self.recipe, self.source, i, k, images[i])) for i in others]
        return replace(view, mosaic=Mosaic(tuple(tiles), frame))

    def _nobody(self, sample: int) -> SourceError:
        return SourceError(
            f"{self.source.ids[sample]!r} is the only image that can be read, and recipe {self.recipe.spec!r} shows "
            "several together: mend the images, or leave out mixes and mosaics"
        )

    def _read(self, order: Iterable[int], images: dict[int, np.ndarray]) -> Iterator[int]:
        for other in order:
            try:
                if other not in images:
                    images[other] = self.look(other)
            except UnreadableImage:
                if not self.skip_corrupt:
                    raise
                continue
            yield other
