"""Recipe: how views are made. A pure function of (seed, sample id, view number, image size).

A recipe is a spec read left to right: ``crop(32, pad=4)|flip``, ``resize(256)|center_crop(224)``.
A new op is one frozen dataclass and one line in :data:`OPS`. There are ops of geometry, which change the canvas, and
after them pixel ops (:mod:`.pixelop`), done on the pixels that were resampled; a mix with another sample's view
(:mod:`.mixing`) is last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Protocol

from softcache import spec as specs
from softcache.errors import SpecError
from softcache.keyed import Draws, draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.color_jitter import ColorJitter
from softcache.recipe.crop import CenterCrop, Crop, RandomResizedCrop
from softcache.recipe.erase import Cutout, Erase
from softcache.recipe.flip import Flip
from softcache.recipe.grayscale import Grayscale
from softcache.recipe.identity import Identity
from softcache.recipe.mix import Blend
from softcache.recipe.mixing import Cutmix, Mixing, Mixup, MixupOrCutmix, candidates
from softcache.recipe.pixelop import PixelOp
from softcache.recipe.rand_augment import RandAugment
from softcache.recipe.render import VERSION as RENDER_VERSION
from softcache.recipe.render import render
from softcache.recipe.resize import Resize
from softcache.recipe.solarize import Solarize
from softcache.recipe.view import MAX_PARAMETERS, MAX_PIXELS, View

__all__ = ["OPS", "Recipe", "View", "render"]


class Op(Protocol):
    """A frozen dataclass whose fields are the options of a spec word, checked at construction."""

    version: ClassVar[int]  # raised when the same options come to mean other views

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        """The canvas after this op; ``draws`` belongs to (seed, id, view, op)."""
        ...

    def size_after(self, size: Size | None) -> Size | None:
        """The size of the canvas after this op, where it is the same for every image."""
        ...


OPS: Mapping[str, type[Op]] = {
    "center_crop": CenterCrop,
    "color_jitter": ColorJitter,
    "crop": Crop,
    "cutmix": Cutmix,
    "cutout": Cutout,
    "erase": Erase,
    "flip": Flip,
    "grayscale": Grayscale,
    "identity": Identity,
    "mix": MixupOrCutmix,
    "mixup": Mixup,
    "rand_augment": RandAugment,
    "random_resized_crop": RandomResizedCrop,
    "resize": Resize,
    "solarize": Solarize,
}


@dataclass(frozen=True)
class Recipe:
    """``spec`` is made canonical (defaults are left out); ``seed`` keys every draw.

    Raises :class:`SpecError` for a spec that cannot be understood.
    """

    spec: str
    seed: int
    _steps: tuple[tuple[str, Op], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.spec.strip():
            raise SpecError("the recipe is empty; 'identity' is the whole image")
        calls = specs.parse(self.spec)
        steps = tuple((call.name, specs.construct(call, OPS, "recipe op")) for call in calls)
        _check_order(steps)
        object.__setattr__(self, "_steps", steps)
        object.__setattr__(self, "spec", specs.unparse(tuple(_call(*step) for step in steps)))
        if self.parameters > MAX_PARAMETERS:
            raise SpecError(
                f"the pixel ops of {self.spec!r} draw {self.parameters:,} numbers; at most {MAX_PARAMETERS:,}"
            )

    @property
    def parameters(self) -> int:
        """How many numbers :attr:`View.ops` holds, the same for every view."""
        return sum(op.parameters for _, op in self._steps if isinstance(op, PixelOp))

    @property
    def mixed(self) -> bool:
        """Are views mixed with those of other samples? Then see :meth:`mix`."""
        return isinstance(self._steps[-1][1], Mixing)

    @property
    def size(self) -> Size | None:
        """(height, width) that every view ends with, or None where it depends on the image."""
        return self._size(None)

    def _size(self, size: Size | None) -> Size | None:
        for _, op in self._steps:
            size = op.size_after(size)
        return size

    def view(self, id: str, k: int, width: int, height: int) -> View:
        """View number ``k`` of the sample ``id``, whose image is ``width`` × ``height`` pixels, not mixed.

        Raises :class:`SpecError` where an op cannot be done on an image of that size, or where a
        number of the view does not fit 16 bits.
        """
        canvas = Canvas.whole(height, width)
        for position, (name, op) in enumerate(self._steps):
            try:
                canvas = op.apply(canvas, draws(self.seed, id, k, position, name))
            except SpecError as e:
                raise SpecError(f"{self._on(id, width, height)}: {e}") from None
        view = canvas.view(height, width)
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
        if not self.mixed:
            return None
        name, op = self._steps[-1]
        size = self._size((height, width))
        assert isinstance(op, Mixing) and size is not None
        stream = draws(self.seed, id, k, len(self._steps) - 1, name)
        blend = op.blend(size, stream)
        return None if blend is None else (blend, candidates(sample, samples, stream))

    def _on(self, id: str, width: int, height: int) -> str:
        return f"recipe {self.spec!r} on {id!r}, an image of {width}x{height}"

    def identity(self) -> dict[str, Any]:
        """Everything that changes views or their pixels, as JSON-able values."""
        import PIL  # light: the version only

        return {
            "spec": self.spec,
            "seed": self.seed,
            "mixed": self.mixed,
            "ops": {name: op.version for name, op in self._steps},
            "parameters": self.parameters,
            "render": {"version": RENDER_VERSION, "pillow": PIL.__version__},
        }


def _check_order(steps: tuple[tuple[str, Op], ...]) -> None:
    """Geometry, then pixels, then the mix of what is whole: what is written must be what is done."""
    painted = None
    for name, op in steps:
        if isinstance(op, Mixing):
            if op is not steps[-1][1]:
                raise SpecError(f"{name!r} must come last in a recipe, and once")
        elif isinstance(op, PixelOp):
            painted = name
        elif painted is not None:
            raise SpecError(f"{name!r} comes after {painted!r}: write geometry first, then ops on pixels")


def _call(name: str, op: Op) -> specs.Call:
    """The one way to write ``op``: required options in order, others by name if not default."""
    values = [(f, _plain(getattr(op, f.name))) for f in fields(op)]
    args = tuple(value for f, value in values if f.default is MISSING)
    kwargs = tuple(sorted((f.name, value) for f, value in values if f.default not in (MISSING, value)))
    return specs.Call(name, args, kwargs)


def _plain(value: Any) -> Any:
    """``1.0`` and ``1`` mean the same and are written the same."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value
