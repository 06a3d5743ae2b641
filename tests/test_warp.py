"""A map moved from one view to another: against a scalar transcription, and against torch's own resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcache.recipe import View
from softcache.warp import warp

SIDE = 40
WHOLE = View(0, 0, SIDE, SIDE, SIDE, SIDE, False)


@st.composite
def inside(draw: st.DrawFn, outer: View = WHOLE) -> View:
    """A view inside another."""
    width, height = draw(st.integers(1, outer.width)), draw(st.integers(1, outer.height))
    x = outer.x + draw(st.integers(0, outer.width - width))
    y = outer.y + draw(st.integers(0, outer.height - height))
    return View(x, y, width, height, SIDE, SIDE, draw(st.booleans()))


def cell(values: np.ndarray, seen: View, shown: View, i: int, j: int) -> np.ndarray:
    """One cell of the moved map, by the definition: where its centre lies in the image, and what was said there."""
    _, h, w = values.shape
    u, v = (j + 0.5) / w, (i + 0.5) / h
    x = shown.x + (1 - u if shown.flip else u) * shown.width
    y = shown.y + v * shown.height
    u, v = (x - seen.x) / seen.width, (y - seen.y) / seen.height
    u = 1 - u if seen.flip else u
    column, row = (min(max(share * n - 0.5, 0), n - 1) for share, n in ((u, w), (v, h)))
    left, top = math.floor(column), math.floor(row)
    right, bottom = min(left + 1, w - 1), min(top + 1, h - 1)
    a, b = column - left, row - top
    upper = values[:, top, left] * (1 - a) + values[:, top, right] * a
    lower = values[:, bottom, left] * (1 - a) + values[:, bottom, right] * a
    return upper * (1 - b) + lower * b


@given(st.lists(st.tuples(inside(), inside()), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 6))
def test_every_cell_is_what_was_said_where_it_lies(pairs, h, w):
    values = np.random.default_rng(0).normal(size=(len(pairs), 3, h, w)).astype(np.float32)
    moved = warp(values, [a for a, _ in pairs], [b for _, b in pairs])
    assert moved.dtype == np.float32 and moved.shape == values.shape
    for n, (seen, shown) in enumerate(pairs):
        wanted = [[cell(values[n].astype(np.float64), seen, shown, i, j) for j in range(w)] for i in range(h)]
        np.testing.assert_allclose(moved[n], np.moveaxis(np.array(wanted), -1, 0), atol=1e-5)


def test_torch_resamples_alike():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    values = rng.normal(size=(6, 5, 7, 9)).astype(np.float32)
    seen = [View(2, 3, 33, 30, SIDE, SIDE, bool(n % 2)) for n in range(6)]
    shown = [View(2 + n, 5 + n, 20 - n, 11 + n, SIDE, SIDE, n > 2) for n in range(6)]
    theta = []
    for a, b in zip(seen, shown, strict=True):
        # in [-1, 1] over each view: image x of the shown view's coordinate, and back to the seen view's
        to_image = lambda v: ((-1 if v.flip else 1) * v.width / 2, v.x + v.width / 2)  # noqa: E731
        (sa, oa), (sb, ob) = to_image(a), to_image(b)
        theta.append(
            [[sb / sa, 0, (ob - oa) / sa],
             [0, b.height / a.height, (b.y + b.height / 2 - a.y - a.height / 2) / (a.height / 2)]]
        )  # fmt: skip
    grid = torch.nn.functional.affine_grid(torch.tensor(theta), list(values.shape), align_corners=False)
    wanted = torch.nn.functional.grid_sample(
        torch.from_numpy(values), grid.float(), "bilinear", "border", align_corners=False
    )
    np.testing.assert_allclose(warp(values, seen, shown), wanted.numpy(), atol=1e-5)


@given(inside())
def test_the_same_view_changes_nothing_and_its_mirror_image_mirrors(view):
    values = np.random.default_rng(2).normal(size=(1, 2, 5, 4)).astype(np.float32)
    mirror = View(view.x, view.y, view.width, view.height, SIDE, SIDE, not view.flip)
    np.testing.assert_allclose(warp(values, [view], [view]), values, atol=1e-6)
    np.testing.assert_allclose(warp(values, [view], [mirror]), values[..., ::-1], atol=1e-6)


@given(inside())
def test_a_slope_stays_the_same_slope(shown):
    """A map that says where it is in the image says so after the move, but for half a cell at the border."""
    n = 8
    centre = (np.arange(n) + 0.5) / n * SIDE
    x, y = np.broadcast_to(centre, (n, n)), np.broadcast_to(centre[:, None], (n, n))
    moved = warp(np.stack([x, y])[None].astype(np.float32), [WHOLE], [shown])[0]
    u = centre / SIDE
    wanted_x = shown.x + (1 - u if shown.flip else u) * shown.width
    wanted_y = shown.y + u * shown.height
    half = SIDE / n / 2
    np.testing.assert_allclose(
        moved[0], np.broadcast_to(np.clip(wanted_x, half, SIDE - half), (n, n)), atol=1e-4
    )
    np.testing.assert_allclose(
        moved[1], np.broadcast_to(np.clip(wanted_y, half, SIDE - half)[:, None], (n, n)), atol=1e-4
    )
