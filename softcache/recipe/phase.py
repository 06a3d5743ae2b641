"""Phase: one chain of ops, and the views that it draws. Most recipes have one; ``8: A; B`` has two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeGuard

from softcache import spec as specs
from softcache.errors import SpecError
from softcache.keyed import Draws, draws
from softcache.recipe.canvas import Canvas, Size
from softcache.recipe.iou_crop import IouCrop
from softcache.recipe.letterbox import Letterbox
from softcache.recipe.mixing import Mixing, Mixup
from softcache.recipe.mosaic import Frame
from softcache.recipe.mosaicking import Mosaicking
from softcache.recipe.pixelop import PixelOp
from softcache.recipe.random_affine import RandomAffine
from softcache.recipe.vflip import VFlip
from softcache.recipe.zoom_out import ZoomOut


class Op(Protocol):
    """A frozen dataclass whose fields are the options of a spec word, checked at construction."""

    version: ClassVar[int]  # raised when the same options come to mean other views

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def words(self) -> str:
        """What it does, with all its options: a sentence for a person."""
        ...

    def apply(self, canvas: Canvas, draws: Draws) -> Canvas:
        """The canvas after this op; ``draws`` belongs to (seed, id, view, op)."""
        ...

    def size_after(self, size: Size | None) -> Size | None:
        """The size of the canvas after this op, where it is the same for every image."""
        ...


@dataclass(frozen=True)
class Phase:
    """The ops of ``steps`` in order; of views from number ``first`` on."""

    first: int
    steps: tuple[tuple[str, Op], ...]

    @classmethod
    def parse(cls, first: int, text: str, known: Mapping[str, type[Op]]) -> Phase:
        """``text`` is one chain of ops out of ``known``. Raises :class:`SpecError` where it cannot be understood."""
        calls = specs.parse(text)
        steps = tuple((call.name, specs.construct(call, known, "recipe op")) for call in calls)
        _check_order(steps)
        _check_fills(steps)
        phase = cls(first, steps)
        if phase.mixing and phase.size((1, 1)) is None:
            raise SpecError(
                f"{phase.spec!r} mixes views whose size is drawn: write a resize or a letterbox before {steps[-1][0]!r}"
            )
        return phase

    @property
    def spec(self) -> str:
        return specs.unparse(tuple(_call(*step) for step in self.steps))

    @property
    def ops(self) -> list[Op]:
        return [op for _, op in self.steps]

    @property
    def parameters(self) -> int:
        """How many numbers :attr:`View.ops` holds at most."""
        painted = sum(op.parameters for op in self.ops if isinstance(op, PixelOp))
        fill = 2 * any(map(_fills, self.ops))
        vflip = any(isinstance(op, VFlip) for op in self.ops)
        return fill + vflip + 7 * any(map(_turns, self.ops)) + painted

    @property
    def boxed(self) -> bool:
        """Does an op ask where the boxes are?"""
        return any(isinstance(op, IouCrop) for op in self.ops)

    @property
    def mixing(self) -> Mixing | None:
        op = self.steps[-1][1]
        return op if isinstance(op, Mixing) else None

    @property
    def tiled(self) -> bool:
        """Are its views mosaics?"""
        return self._mosaicking is not None

    @property
    def _mosaicking(self) -> tuple[int, Mosaicking] | None:
        """The op that makes them, and its position."""
        return next(((i, op) for i, op in enumerate(self.ops) if isinstance(op, Mosaicking)), None)

    def mosaic(self, seed: int, id: str, k: int) -> tuple[Frame, Draws] | None:
        """Where the tiles of that view's mosaic lie, and the draws that go on to its partners; None without one."""
        if self._mosaicking is None:
            return None
        position, op = self._mosaicking
        stream = self.draws(position, seed, id, k)
        frame = op.frame(stream)
        return None if frame is None else (frame, stream)

    def joins(self, seed: int, id: str, k: int) -> bool:
        """May that view be a tile of others? Not where it is letterboxed, as it stands alone."""
        found = self._mosaicking
        return found is None or found[1].size is None or self.mosaic(seed, id, k) is not None

    def size(self, size: Size | None) -> Size | None:
        """(height, width) after all ops, where it is the same for every image (of ``size``)."""
        for op in self.ops:
            size = op.size_after(size)
        return size

    def draws(self, position: int, seed: int, id: str, k: int) -> Draws:
        """Those of the op at ``position``."""
        return draws(seed, id, k, position % len(self.steps), self.steps[position][0])

    def apply(self, canvas: Canvas, seed: int, id: str, k: int, alone: bool = False) -> Canvas:
        """The canvas of that view; with ``alone`` as if it drew no mosaic."""
        alone = alone or self.mosaic(seed, id, k) is None
        mosaicking, placed = self._mosaicking, False
        for position, (_, op) in enumerate(self.steps):
            stream = self.draws(position, seed, id, k)
            if mosaicking and not placed and isinstance(op, PixelOp | Mosaicking):
                canvas, placed = mosaicking[1].placed(canvas, stream, alone), True
            canvas = op.apply(canvas, stream)
        return canvas


def _turns(op: Op) -> bool:
    return isinstance(op, RandomAffine) and op.turns


def _fills(op: Op) -> TypeGuard[Letterbox | ZoomOut | Mosaicking]:
    """Does it say what is shown outside the image?"""
    return isinstance(op, Letterbox | ZoomOut) or (isinstance(op, Mosaicking) and op.size is not None)


def _check_order(steps: tuple[tuple[str, Op], ...]) -> None:
    """Geometry, then what turns, then pixels, then the mosaic and the mix of what is whole: what is written must be
    what is done."""
    painted = turned = tiled = None
    for name, op in steps:
        if isinstance(op, Mixing):
            if op is not steps[-1][1]:
                raise SpecError(f"{name!r} must come last in a recipe, and once")
            if tiled and not isinstance(op, Mixup):
                raise SpecError(f"{name!r} comes after {tiled!r}, which only 'mixup' may follow")
        elif tiled is not None:
            raise SpecError(
                f"{name!r} comes after {tiled!r}, which only 'mixup' may follow: write {name!r} before it, where it is done "
                "in every tile by itself"
            )
        elif isinstance(op, Mosaicking):
            tiled = name
            if op.size is not None:
                _check_proportions(steps, turned)
        elif isinstance(op, PixelOp):
            painted = name
        elif painted is not None:
            raise SpecError(f"{name!r} comes after {painted!r}: write geometry first, then ops on pixels")
        elif turned is not None:
            raise SpecError(
                f"{name!r} comes after a {turned!r} that turns or shears, out of which no rectangle can be cut: write "
                f"{name!r} before it"
            )
        elif _turns(op):
            turned = name


def _check_proportions(steps: tuple[tuple[str, Op], ...], turned: str | None) -> None:
    """Tiles have those of the rectangle that is shown, which no op before a mosaic of a size may take away."""
    if turned:
        raise SpecError(
            f"a {turned!r} that turns or shears leaves no rectangle with proportions to keep: write a letterbox before it "
            "and 'mosaic' without a size"
        )
    for name, op in steps:
        if not isinstance(op, Mosaicking) and op.size_after(None):
            raise SpecError(
                f"tiles of a 'mosaic' with a size keep the image's proportions, and {name!r} gives all views the same: "
                f"leave out {name!r}, or write 'mosaic' without a size"
            )


def _check_fills(steps: tuple[tuple[str, Op], ...]) -> None:
    fills = {op.fill: name for name, op in steps if _fills(op)}
    if len(fills) > 1:
        told = " and ".join(f"{name!r} with {fill}" for fill, name in fills.items())
        raise SpecError(
            f"what lies outside the image has one grey in a view, and {told} fill it: give both one fill"
        )


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
