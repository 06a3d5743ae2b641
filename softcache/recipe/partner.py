"""The views of a source's samples, and who they are mixed with: the partner is looked for among the samples whose
images can be read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from softcache.errors import SourceError, UnreadableImage
from softcache.recipe import Recipe, View
from softcache.recipe.mix import Mix

if TYPE_CHECKING:
    from softcache.source import Source


def drawn(recipe: Recipe, source: Source, sample: int, k: int, image: np.ndarray) -> View:
    """View number ``k`` of a sample whose image is given, not mixed."""
    boxes = source.boxes(sample) if recipe.boxed else None
    height, width = image.shape[:2]
    return recipe.view(source.ids[sample], k, width, height, None if boxes is None else boxes.xyxy)


def mixed(
    recipe: Recipe, view: View, sample: int, k: int, source: Source, skip_corrupt: bool = False
) -> tuple[View, np.ndarray | None]:
    """View number ``k`` of ``sample`` with what the recipe mixes it with, and the partner's image; or as it is.

    The partner is seen in its own view number ``k``, unmixed. With ``skip_corrupt`` one whose image cannot be read is
    passed over for the next that was drawn. Raises :class:`UnreadableImage` without it, and :class:`SourceError` when
    none can be read.
    """
    mix = recipe.mix(source.ids[sample], k, sample, len(source.ids), view.image_width, view.image_height)
    if mix is None:
        return view, None
    blend, partners = mix
    for partner in partners:
        try:
            image = source.image(partner)
        except UnreadableImage:
            if not skip_corrupt:
                raise
            continue
        theirs = drawn(recipe, source, partner, k, image)
        return replace(view, mix=Mix(partner, k, theirs, blend)), image
    raise SourceError(
        f"{source.ids[sample]!r} is the only image that can be read, and recipe {recipe.spec!r} mixes two: mend the "
        "images, or leave out the mix"
    )
