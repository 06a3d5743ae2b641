"""How far do a teacher's maps move with the view? Measured once, at the end of a build, on a few images.

For a mirrored, a shifted and a zoomed image: the cosine between the map the teacher gives of it and the map of the
plain image moved likewise (``flip``, ``shift``, ``zoom``), and beside it the cosine when the map is not moved at all
(``flip_ignored``, …). ``same`` is the control: the same image again, at another place of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from softcache.identity import IMPORTED
from softcache.job import Job
from softcache.keyed import Permutation
from softcache.recipe import View, render
from softcache.teachers import Teacher
from softcache.warp import warp

ROWS = 16
DIGITS = 4  # of the figures in the report: what the last bits of floats cannot reach
_EDGE = 1  # cells along the border that a shift is not compared on


@np.errstate(invalid="ignore", over="ignore", divide="ignore")  # of answers that are not finite
def equivariance(job: Job, invalid: list[int]) -> dict[str, dict[str, float]]:
    """Target → its figures, for the targets of law ``spatial``; without one, the teacher is not asked, nor is one of
    which there are arrays only.

    ``shift`` is one cell of the map right and down, compared away from the border; it is left out where a cell is no
    whole number of pixels, or the map has less than four cells a side. ``zoom`` shows the middle three quarters of each
    side.
    """
    names = [n for n, t in job.targets.items() if t.law == "spatial"]
    if not names or job.identity.teacher.name.startswith(IMPORTED):
        return {}
    images = [job.source.image(i) for i in _samples(job, invalid)]
    whole, middle = [_part(i, 1.0) for i in images], [_part(i, 0.75) for i in images]
    mirrored = [_part(i, 1.0, flip=True) for i in images]
    plain = _look(job, images, whole)
    said, again = _ask(job, names, plain), _ask(job, names, plain[::-1])
    found = {n: {"same": _cosine(said[n], again[n][::-1])} for n in names}
    for key, views in (("flip", mirrored), ("zoom", middle)):
        moved = _ask(job, names, _look(job, images, views))
        for n in names:
            found[n][key] = _cosine(warp(said[n], whole, views), moved[n])
            found[n][f"{key}_ignored"] = _cosine(said[n], moved[n])
    for n, (down, right) in _strides(job, names):
        moved = _ask(job, [n], _shifted(plain, down, right))[n]
        here, there = slice(_EDGE, -1 - _EDGE), slice(1 + _EDGE, -_EDGE)
        found[n]["shift"] = _cosine(said[n][..., here, here], moved[..., there, there])
        found[n]["shift_ignored"] = _cosine(said[n][..., there, there], moved[..., there, there])
    return {n: {k: round(v, DIGITS) for k, v in sorted(figures.items())} for n, figures in found.items()}


def answers(teacher: Teacher, pixels: np.ndarray, batch: int, **given: np.ndarray) -> dict[str, np.ndarray]:
    """The teacher's answers to any number of rows, in batches padded to full size as the builder's are."""
    parts = []
    for start in range(0, len(pixels), batch):
        rows = min(batch, len(pixels) - start)
        seen, *more = (_padded(v[start : start + rows], batch) for v in (pixels, *given.values()))
        said = teacher(seen, **dict(zip(given, more, strict=True)))
        parts.append({k: v[:rows] for k, v in said.items()})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


def _samples(job: Job, invalid: list[int]) -> list[int]:
    """Up to sixteen readable samples, chosen by key."""
    n = job.grid.samples
    some = Permutation(n, "probe", job.recipe.seed).inverse(np.arange(min(n, ROWS + len(invalid))))
    return some[~np.isin(some, invalid)][:ROWS].tolist()


def _part(image: np.ndarray, share: float, flip: bool = False) -> View:
    """The middle of an image, ``share`` of each side."""
    height, width = image.shape[:2]
    h, w = max(1, int(height * share)), max(1, int(width * share))
    return View((width - w) // 2, (height - h) // 2, w, h, width, height, flip)


def _look(job: Job, images: list[np.ndarray], views: list[View]) -> np.ndarray:
    size = job.teacher.input_spec.size
    return np.stack([render(image, view, size) for image, view in zip(images, views, strict=True)])


def _ask(job: Job, names: list[str], pixels: np.ndarray) -> dict[str, np.ndarray]:
    said = answers(job.teacher, np.ascontiguousarray(pixels), job.batch)
    return {n: said[n] for n in names}


def _strides(job: Job, names: list[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Targets with the pixels, (down, right), of one cell of their maps."""
    height, width = job.teacher.input_spec.size
    for name in names:
        _, h, w = job.targets[name].shape
        if min(h, w) > 1 + 2 * _EDGE and height % h == 0 and width % w == 0:
            yield name, (height // h, width // w)


def _shifted(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved down and right, black where nothing comes from."""
    moved = np.zeros_like(pixels)
    moved[:, down:, right:] = pixels[:, :-down, :-right]
    return moved


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over images and cells of the cosine along the channels, ``(B, C, h, w)``; two empty cells are alike, and
    what is not finite is like nothing."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / (norms[0] * norms[1])
    cosine = np.where((norms[0] == 0) & (norms[1] == 0), 1.0, cosine)
    return float(np.where(np.isfinite(cosine), cosine, 0.0).mean())
