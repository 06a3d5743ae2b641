"""Which views a batch shows, and what the cache's targets are for them.

* ``exact``: the cached views, and what the teacher said of these very pixels.
* ``warp``: at every epoch a fresh view of every sample, drawn by a recipe; the targets are those of
  the cached view number 0, the canonical one, moved to the fresh view. Boxes move exactly, and the
  class scores with them; maps can be moved where the build's probe found that the teacher's do so.
* ``frozen``: fresh views, with the canonical view's targets as they are. A known mistake (Beyer et
  al. 2022, "Knowledge distillation: A good teacher is patient and consistent", arXiv:2106.05237),
  kept for comparison.

A live teacher sees what is shown: it goes with ``exact``, and a recipe then gives it and the
student fresh views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from softcache.errors import MismatchError, SpecError, nearest
from softcache.geometry import to_source, to_view
from softcache.keyed import hash64
from softcache.recipe import Recipe, View
from softcache.warp import warp
from softcache_train.targets import BatchTarget, CacheTargets, Dense, Parts, TargetSource

if TYPE_CHECKING:
    from softcache.cache import Cache

POLICIES = ("exact", "warp", "frozen")
THRESHOLD = 0.95

# what an op does to the rectangle, as the probe names it; every other op leaves it alone
MOVES = {
    "flip": ("flip",),
    "center_crop": ("shift", "zoom"),
    "crop": ("shift", "zoom"),
    "iou_crop": ("shift", "zoom"),
    "letterbox": ("shift", "zoom"),
    "random_affine": ("shift", "zoom"),
    "random_resized_crop": ("shift", "zoom"),
    "zoom_out": ("shift", "zoom"),
}
MIXES = ("mixup", "cutmix", "mix", "mosaic")


@dataclass(frozen=True)
class ViewPolicy:
    """A policy made for one cache. ``recipe`` draws fresh views; None shows the cached ones.

    ``boxes`` tells those of a sample, xyxy ``(n, 4)`` in its pixels, to recipes that ask; None where there are none.
    """

    cache: Cache
    name: str
    recipe: Recipe | None
    warning: str | None
    boxes: Callable[[int], np.ndarray | None] | None = None

    @classmethod
    def make(
        cls,
        cache: Cache,
        name: str,
        recipe: str | None,
        seed: int,
        target_source: TargetSource,
        threshold: float,
        boxes: Callable[[int], np.ndarray | None] | None = None,
    ) -> ViewPolicy:
        """Check that the policy goes with the cache and its targets.

        Raises:
            SpecError: options that do not go together, or a target that holds for its own view only.
            MismatchError: the teacher's maps do not move well enough with the views of the recipe.
        """
        if name not in POLICIES:
            raise SpecError(f"policy {name!r}{nearest(name, POLICIES)}")
        if name == "warp" or not recipe:
            cache.require_replayable(f"policy={name}")
        names = target_source.names if isinstance(target_source, CacheTargets) else None
        if name == "exact":
            if recipe and names:
                raise SpecError(
                    f"recipe={recipe!r} draws views the cache has no targets of: leave it out to train on the cached "
                    "views, or say policy=warp or policy=frozen"
                )
        elif recipe is None:
            raise SpecError(
                f"policy={name} shows fresh views: say how they are drawn, such as recipe='crop(32, pad=4)|flip'"
            )
        elif names is None:
            raise SpecError(
                f"policy={name} is about the cache's targets; a live teacher sees the fresh views itself: leave "
                "policy out and keep the recipe"
            )
        made = None if recipe is None else Recipe(recipe, hash64("fresh views", seed))
        if made is not None:
            _refuse_mixes(cache, made)
        if made is not None and name == "warp":
            _check_warp(cache, names or (), _moves(cache, made), threshold)
        return cls(cache, name, made, FROZEN if name == "frozen" and names else None, boxes)

    @property
    def fresh(self) -> bool:
        return self.recipe is not None

    def views(self, epoch: int, view: int, samples: np.ndarray) -> list[View]:
        """What is shown of ``samples`` (int64 (B,)): a function of (seed, epoch, sample) alone.

        Raises :class:`MismatchError` where ``warp`` would show what the teacher did not see.
        """
        seen = self.cache.read_views(view, samples)
        if self.recipe is None:
            return seen
        ids = [self.cache.ids[int(sample)] for sample in samples]
        shown = [
            self.recipe.view(id, epoch, v.image_width, v.image_height, self._boxes(sample))
            for sample, id, v in zip(samples.tolist(), ids, seen, strict=True)
        ]
        if self.name == "warp":
            for id, a, b in zip(ids, seen, shown, strict=True):
                _require_inside(id, a, b, self.recipe.spec)
        return shown

    def _boxes(self, sample: int) -> np.ndarray | None:
        return self.boxes(sample) if self.boxes and self.recipe and self.recipe.boxed else None

    def targets(
        self, said: dict[str, BatchTarget], view: int, samples: np.ndarray, shown: list[View]
    ) -> dict[str, BatchTarget]:
        """The targets of view number ``view``, for the views that are shown."""
        if self.name != "warp":
            return said
        seen = self.cache.read_views(view, samples)
        return {name: self._moved(name, target, seen, shown) for name, target in said.items()}

    def _moved(self, name: str, target: BatchTarget, seen: list[View], shown: list[View]) -> BatchTarget:
        law = self.cache.targets[name].law
        if law == "invariant":
            return target
        if law == "box":
            assert isinstance(target, Parts)
            return _moved_boxes(target, seen, shown)
        assert isinstance(target, Dense)
        return Dense(torch.from_numpy(warp(target.values.numpy(), seen, shown)))


BOXES, WITH_BOXES = ("boxes", "reference"), ("logits", "objectness", "valid", "weight")


def _moved_boxes(target: Parts, seen: list[View], shown: list[View]) -> Parts:
    """Items with their boxes in the views that are shown, and what is true there, too: not cells, nor distributions."""
    moved = {name: target.values[name].numpy() for name in BOXES if name in target.values}
    for name, boxes in moved.items():
        rows = [to_view(b, to_source(a, row)) for a, b, row in zip(seen, shown, boxes, strict=True)]
        moved[name] = np.stack(rows).astype(np.float32)
    kept = {name: target.values[name] for name in WITH_BOXES if name in target.values}
    return Parts(kept | {name: torch.from_numpy(boxes) for name, boxes in moved.items()})


FROZEN = (
    "policy=frozen: the targets are those of another view than the student sees, a known mistake (Beyer et al. 2022: "
    "the teacher did not see these pixels); policy=exact with several cached views is the remedy"
)


def _moves(cache: Cache, recipe: Recipe) -> list[str]:
    """How fresh views may lie to the canonical ones, as the probe names it."""
    ops = [*recipe.identity()["ops"], *cache.identity["recipe"]["ops"]]
    return sorted({move for op in ops for move in MOVES.get(op, ())})


def _refuse_mixes(cache: Cache, recipe: Recipe) -> None:
    for whose, ops in (("", recipe.identity()["ops"]), ("the cache's ", cache.identity["recipe"]["ops"])):
        for op in ops:
            if op in MIXES:
                raise SpecError(
                    f"{whose}recipe has {op!r}: views of several samples are trained on as they were cached, with "
                    "policy=exact and no recipe"
                )


def _check_warp(cache: Cache, names: tuple[str, ...], moves: list[str], threshold: float) -> None:
    for name in names:
        law = cache.targets[name].law
        if law in ("invariant", "box"):
            continue
        if law != "spatial":
            raise SpecError(
                f"policy=warp: the target {name!r} ({cache.targets[name].kind}) is {law}, it holds for its exact view "
                "only and cannot be warped: use exact views, name the targets to read without it, or policy=frozen"
            )
        _check_probe(cache, name, cache.equivariance.get(name, {}), moves, threshold)


def _check_probe(
    cache: Cache, name: str, figures: dict[str, float], moves: list[str], threshold: float
) -> None:
    for move in moves:
        if move not in figures:
            why = (
                f"its {cache.targets[name].shape} cells are too few, or no whole number of the teacher's pixels"
                if figures
                else "this softcache's build measures it: build the cache again"
            )
            raise MismatchError(
                f"policy=warp: how the target {name!r} moves under a {move} is not in the report of {cache.path}; "
                f"{why}, or use exact views"
            )
        if figures[move] < threshold:
            raise MismatchError(
                f"policy=warp: the teacher's {name!r} does not move with a {move}: warped, its cosine to what the "
                f"teacher says of the view is {figures[move]:.4f} ({figures[f'{move}_ignored']:.4f} not warped), and "
                f"{threshold:g} is asked for. Use exact views (cache several), a recipe without a {move}, or a lower "
                "warp_threshold if you must"
            )


def _require_inside(id: str, seen: View, shown: View, recipe: str) -> None:
    inside = (
        seen.x <= shown.x
        and seen.y <= shown.y
        and shown.x + shown.width <= seen.x + seen.width
        and shown.y + shown.height <= seen.y + seen.height
    )
    if not inside:
        told = [f"{v.width}x{v.height} at ({v.x}, {v.y})" for v in (shown, seen)]
        raise MismatchError(
            f"policy=warp: the recipe {recipe!r} shows {told[0]} of {id!r}, and the teacher saw {told[1]}: nothing is "
            "known of the rest. Draw fresh views inside the cached one, or cache the whole image with recipe=identity"
        )
