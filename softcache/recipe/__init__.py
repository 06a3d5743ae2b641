"""Recipe: how views are made. A pure function of (seed, sample id, view number, image size), and of the boxes where an
op asks for them.

A recipe is a spec read left to right: ``crop(32, pad=4)|flip``, ``resize(256)|center_crop(224)``.
A new op is one frozen dataclass, with a sentence for people, and one line in :data:`OPS`. There are ops of geometry, which
change the canvas, and after them pixel ops (:mod:`.pixelop`), done on the pixels that were resampled; then, perhaps, a
mosaic with the views of three other samples (:mod:`.mosaicking`), and a mix with one (:mod:`.mixing`). ``8: A; B`` is the
chain A for the first eight views and B for all others (:mod:`.phase`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from softcache.errors import SpecError
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.color_jitter import ColorJitter
from softcache.recipe.crop import CenterCrop, Crop, RandomResizedCrop
from softcache.recipe.erase import Cutout, Erase
from softcache.recipe.flip import Flip
from softcache.recipe.grayscale import Grayscale
from softcache.recipe.hsv_jitter import HsvJitter
from softcache.recipe.identity import Identity
from softcache.recipe.iou_crop import IouCrop
from softcache.recipe.letterbox import Letterbox
from softcache.recipe.mix import Blend
from softcache.recipe.mixing import Cutmix, Mixup, MixupOrCutmix, candidates
from softcache.recipe.mosaic import Frame
from softcache.recipe.mosaicking import Mosaicking
from softcache.recipe.phase import Op, Phase
from softcache.recipe.rand_augment import RandAugment
from softcache.recipe.random_affine import RandomAffine
from softcache.recipe.render import VERSION as RENDER_VERSION
from softcache.recipe.render import gather, render
from softcache.recipe.resize import Resize
from softcache.recipe.solarize import Solarize
from softcache.recipe.vflip import VFlip
from softcache.recipe.view import MAX_PARAMETERS, MAX_PIXELS, View
from softcache.recipe.zoom_out import ZoomOut

__all__ = ["OPS", "Recipe", "View", "gather", "render"]

_COUNT = re.compile(r"\s*[1-9][0-9]{0,6}\s*")  # of views: there are never more than 2**20

OPS: Mapping[str, type[Op]] = {
    "center_crop": CenterCrop,
    "color_jitter": ColorJitter,
    "crop": Crop,
    "cutmix": Cutmix,
    "cutout": Cutout,
    "erase": Erase,
    "flip": Flip,
    "grayscale": Grayscale,
    "hsv_jitter": HsvJitter,
    "identity": Identity,
    "iou_crop": IouCrop,
    "letterbox": Letterbox,
    "mix": MixupOrCutmix,
    "mixup": Mixup,
    "mosaic": Mosaicking,
    "rand_augment": RandAugment,
    "random_affine": RandomAffine,
    "random_resized_crop": RandomResizedCrop,
    "resize": Resize,
    "solarize": Solarize,
    "vflip": VFlip,
    "zoom_out": ZoomOut,
}


@dataclass(frozen=True)
class Recipe:
    """``spec`` is made canonical (defaults are left out); ``seed`` keys every draw.

    Raises :class:`SpecError` for a spec that cannot be understood.
    """

    spec: str
    seed: int
    _phases: tuple[Phase, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.spec.strip():
            raise SpecError("the recipe is empty; 'identity' is the whole image")
        phases = _phases(self.spec)
        object.__setattr__(self, "_phases", phases)
        object.__setattr__(self, "spec", _written(phases))
        if self.parameters > MAX_PARAMETERS:
            raise SpecError(
                f"the pixel ops of {self.spec!r} draw {self.parameters:,} numbers; at most {MAX_PARAMETERS:,}"
            )
        sizes = {phase.size(None): phase.spec for phase in phases}
        if len(sizes) > 1:
            told = " and ".join(f"{spec!r} with {_told(size)}" for size, spec in sizes.items())
            raise SpecError(
                f"the phases of a recipe end with one size of view, and {told}: give them one size"
            )

    @property
    def parameters(self) -> int:
        """How many numbers :attr:`View.ops` holds, the same for every view."""
        return max(phase.parameters for phase in self._phases)

    @property
    def mixed(self) -> bool:
        """Are views mixed with those of other samples? Then see :meth:`mix`."""
        return any(phase.mixing for phase in self._phases)

    @property
    def tiled(self) -> bool:
        """Are views mosaics? Then see :meth:`mosaic`."""
        return any(phase.tiled for phase in self._phases)

    @property
    def boxed(self) -> bool:
        """Does :meth:`view` ask for boxes?"""
        return any(phase.boxed for phase in self._phases)

    @property
    def starts(self) -> tuple[int, ...]:
        """The number of the first view of each phase."""
        return tuple(phase.first for phase in self._phases)

    @property
    def size(self) -> Size | None:
        """(height, width) that every view ends with, or None where it depends on the image."""
        return self._phases[0].size(None)

    def words(self) -> list[tuple[int, list[str]]]:
        """The number of the first view of each phase, and a sentence for each of its ops."""
        return [(phase.first, [op.words() for op in phase.ops]) for phase in self._phases]

    def view(
        self, id: str, k: int, width: int, height: int, boxes: np.ndarray | None = None, alone: bool = False
    ) -> View:
        """View number ``k`` of the sample ``id``, whose image is ``width`` × ``height`` pixels, alone.

        ``boxes`` of the image, xyxy float64 ``(n, 4)`` in its pixels, are needed where the recipe is :attr:`boxed`. With
        ``alone`` it is drawn as one that is no mosaic, which may be another rectangle.
        Raises :class:`SpecError` where an op cannot be done on an image of that size, or without boxes, or where a
        number of the view does not fit 16 bits.
        """
        try:
            canvas = self._phase(k).apply(Canvas.whole(height, width, boxes), self.seed, id, k, alone)
        except SpecError as e:
            raise SpecError(f"{self._on(id, width, height)}: {e}") from None
        view = canvas.view(height, width, self.parameters)
        if max(map(abs, view.pack())) > MAX_PIXELS:
            raise SpecError(
                f"{self._on(id, width, height)}: a view holds up to {MAX_PIXELS} pixels a side; "
                "make the image or the crop smaller"
            )
        return view

    def mix(
        self, id: str, k: int, sample: int, samples: int, width: int, height: int
    ) -> tuple[Blend, Iterator[int]] | None:
        """How that view is mixed, and the partners to try in order (every other of ``samples``); None where it is not.

        ``sample`` is the number of ``id``.
        """
        phase = self._phase(k)
        if phase.mixing is None:
            return None
        size = phase.size((height, width))
        assert size is not None
        stream = phase.draws(-1, self.seed, id, k)
        blend = phase.mixing.blend(size, stream)
        return None if blend is None else (blend, candidates(sample, samples, stream))

    def mosaic(self, id: str, k: int, sample: int, samples: int) -> tuple[Frame, Iterator[int]] | None:
        """Where the tiles of that view's mosaic lie, and the partners to try, as :meth:`mix`; None where it is none."""
        drawn = self._phase(k).mosaic(self.seed, id, k)
        return None if drawn is None else (drawn[0], candidates(sample, samples, drawn[1]))

    def joins(self, id: str, k: int) -> bool:
        """May that view be a tile of others' mosaics?"""
        return self._phase(k).joins(self.seed, id, k)

    def _phase(self, k: int) -> Phase:
        return next(phase for phase in reversed(self._phases) if phase.first <= k)

    def _on(self, id: str, width: int, height: int) -> str:
        return f"recipe {self.spec!r} on {id!r}, an image of {width}x{height}"

    def identity(self) -> dict[str, Any]:
        """Everything that changes views or their pixels, as JSON-able values."""
        import PIL  # light: the version only

        return {
            "spec": self.spec,
            "seed": self.seed,
            "mixed": self.mixed,
            "tiled": self.tiled,
            "ops": {name: op.version for phase in self._phases for name, op in phase.steps},
            "parameters": self.parameters,
            "render": {"version": RENDER_VERSION, "pillow": PIL.__version__},
        }


def _phases(text: str) -> tuple[Phase, ...]:
    """``8: A; B``: A for eight views, B for the rest."""
    *before, last = text.split(";")
    if before and not last.strip():
        raise SpecError(
            f"nothing stands after the last ';' of {text!r}: write there how all views that are left are made, as in "
            "'8: A; B', or leave out the ';' and the number for one phase alone"
        )
    phases, first = [], 0
    for part in before:
        count, colon, chain = part.partition(":")
        if not colon or not _COUNT.fullmatch(count):
            raise SpecError(
                f"the phase {part.strip()!r} of {text!r} does not say how many views it is for: write '8: A; B', A for "
                "the first eight views and B for the rest"
            )
        if not chain.strip():
            raise SpecError(
                f"the phase {part.strip()!r} of {text!r} has no ops: 'identity' is the whole image"
            )
        phases.append(Phase.parse(first, chain, OPS))
        first += int(count)
    if ":" in last:
        raise SpecError(
            f"the last phase of {text!r} is for all views that are left: write it without a number, as in '8: A; B'"
        )
    return (*phases, Phase.parse(first, last, OPS))


def _written(phases: tuple[Phase, ...]) -> str:
    counts = [after.first - phase.first for phase, after in pairwise(phases)]
    before = [f"{count}: {phase.spec}" for count, phase in zip(counts, phases, strict=False)]
    return "; ".join([*before, phases[-1].spec])


def _told(size: Size | None) -> str:
    return "a size that depends on the image" if size is None else f"{size[1]}x{size[0]}"
