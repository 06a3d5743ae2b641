"""Mixes: what is drawn, how it is kept, and the pixels it makes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcache.errors import MismatchError, SpecError
from softcache.keyed import draws
from softcache.recipe import Recipe, View, render
from softcache.recipe.mix import ONE, Blend, Mix
from softcache.recipe.mixing import Cutmix, Mixup, MixupOrCutmix, beta, candidates

stats = pytest.importorskip("scipy.stats")

parts = st.integers(0, ONE)
sides = st.integers(1, 40)
WHOLE = (0, 0, 32, 24, 32, 24, False)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def blends(op, count: int, size: tuple[int, int] = (32, 32)) -> list[Blend | None]:
    return [op.blend(size, draws(0, str(i))) for i in range(count)]


# --- Blend --------------------------------------------------------------------------------------


@given(st.builds(Blend, parts, parts, parts, parts, parts))
def test_a_blend_survives_its_int16_row(blend: Blend):
    row = np.array(blend.pack(), np.int16)
    assert row.shape == (Blend.FIELDS,)
    again = Blend.unpack(row.tolist())
    assert again == blend and type(again.lam) is int


@given(lam=parts, seed=st.integers(0, 99))
def test_mixup_is_its_formula_rounded(lam: int, seed: int):
    own, other = picture(5, 6, seed), picture(5, 6, seed + 1)
    mixed = Blend(lam)(own, other)
    exact = lam / ONE * own.astype(np.float64) + (1 - lam / ONE) * other
    assert mixed.dtype == np.uint8 and np.abs(mixed - exact).max() <= 0.5 + 1e-9
    assert np.array_equal(Blend(lam)(own, own), own)


def test_the_ends_of_mixup_are_the_pictures_themselves():
    own, other = picture(5, 6), picture(5, 6, 1)
    assert np.array_equal(Blend(ONE)(own, other), own)
    assert np.array_equal(Blend(0)(own, other), other)


@given(height=sides, width=sides, data=st.data())
def test_cutmix_pastes_the_box_and_nothing_else(height: int, width: int, data: st.DataObject):
    """Against the definition: a pixel is the partner's where its edges lie within the rounded edges of the box."""
    top, left = data.draw(st.integers(0, ONE)), data.draw(st.integers(0, ONE))
    down, across = data.draw(st.integers(0, ONE - top)), data.draw(st.integers(1, max(1, ONE - left)))
    own, other = picture(height, width), picture(height, width, 1)
    kept = own.copy()
    mixed = Blend(0, left, top, across, down)(own, other)
    assert np.array_equal(own, kept)

    def edge(part: int, side: int) -> int:
        return int(np.floor(part / ONE * side + 0.5))

    y, x = np.mgrid[:height, :width]
    inside = (y >= edge(top, height)) & (y < edge(top + down, height))
    inside &= (x >= edge(left, width)) & (x < edge(left + across, width))
    assert np.array_equal(mixed, np.where(inside[..., None], other, own))


# --- what is drawn ------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.5, 0.8, 1, 2, 8.5])
def test_beta_is_scipys(alpha: float):
    found = [beta(alpha, draws(7, alpha_id, str(alpha))) for alpha_id in range(20_000)]
    assert min(found) >= 0 and max(found) <= 1
    assert stats.kstest(found, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_beta_of_a_small_alpha_is_scipys():
    """Next to 1 a float cannot tell its values apart, so here it is the shares below a few points."""
    found = np.array([beta(0.05, draws(7, i)) for i in range(20_000)])
    for point in (1e-9, 1e-4, 0.1, 0.5, 0.9, 0.9999):
        assert abs((found < point).mean() - stats.beta(0.05, 0.05).cdf(point)) < 0.015


def test_beta_of_next_to_nothing_is_a_coin():
    found = np.array([beta(1e-300, draws(i)) for i in range(500)])
    assert set(found.round(9)) == {0.0, 1.0} and 200 < found.sum() < 300


def test_mixups_lambda_is_a_beta():
    found = [b.lam / ONE for b in blends(Mixup(0.4), 20_000) if b]
    assert stats.kstest(found, stats.beta(0.4, 0.4).cdf).pvalue > 0.01


def test_cutmix_is_the_papers_box():
    """The authors' ``rand_bbox``, transcribed, with numpy's generator: the same distributions."""
    rng, width, height = np.random.default_rng(0), 48, 32
    theirs = []
    for _ in range(20_000):
        cut = np.sqrt(1 - rng.beta(1.0, 1.0))
        cut_w, cut_h = int(width * cut), int(height * cut)
        cx, cy = rng.integers(width), rng.integers(height)
        x1, y1 = np.clip(cx - cut_w // 2, 0, width), np.clip(cy - cut_h // 2, 0, height)
        x2, y2 = np.clip(cx + cut_w // 2, 0, width), np.clip(cy + cut_h // 2, 0, height)
        theirs.append((x1, y1, x2 - x1, y2 - y1, 1 - (x2 - x1) * (y2 - y1) / (width * height)))
    theirs = np.array([t for t in theirs if t[2] * t[3]])
    ours = np.array(
        [
            (b.x * width / ONE, b.y * height / ONE, b.width * width / ONE, b.height * height / ONE, b.share)
            for b in blends(Cutmix(), 20_000, (height, width))
            if b
        ]
    )
    assert abs(len(ours) - len(theirs)) < 250
    for column in range(5):
        assert stats.ks_2samp(np.round(ours[:, column], 2), np.round(theirs[:, column], 2)).pvalue > 0.005


@given(size=st.tuples(st.integers(1, 600), st.integers(1, 600)), seed=st.integers(0, 10_000))
def test_cutmixs_lambda_is_the_share_of_the_area_it_left(size: tuple[int, int], seed: int):
    """At the canvas's own size the box lies on whole pixels, so that λ is the counted area to the last part."""
    blend = Cutmix().blend(size, draws(seed))
    if blend is None:
        return
    own = np.zeros((*size, 3), np.uint8)
    area = int((blend(own, own + 1)[..., 0] == 1).sum())
    assert blend.lam == ONE - round(ONE * area / (size[0] * size[1]))
    assert all(0 <= part <= ONE for part in blend.pack())
    assert blend.x + blend.width <= ONE and blend.y + blend.height <= ONE
    # at another size edges are rounded: each is off by half a pixel at most, and λ stays what it is
    small = np.zeros((24, 24, 3), np.uint8)
    other = (blend(small, small + 1)[..., 0] == 0).mean()
    assert abs(other - blend.share) <= 2 / 24 + 1e-9


def test_mix_is_one_or_the_other():
    found = blends(MixupOrCutmix(p=0.8, switch=0.25), 8000)
    kinds = np.array(["none" if b is None else "cutmix" if b.width else "mixup" for b in found])
    assert abs((kinds == "mixup").mean() - 0.6) < 0.02
    assert abs((kinds == "cutmix").mean() - 0.2) < 0.02  # but for the few boxes that are empty
    mixup = [b.share for b in found if b and not b.width]
    assert stats.kstest(mixup, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    assert not any(blends(MixupOrCutmix(p=0), 100)) and not any(blends(Mixup(p=0), 100))


@pytest.mark.parametrize("samples", [2, 3, 7])
def test_candidates_are_all_the_others_once(samples: int):
    for sample in range(samples):
        found = list(candidates(sample, samples, draws("x", sample)))
        assert sorted(found) == [i for i in range(samples) if i != sample]


def test_partners_are_drawn_evenly():
    first = [next(candidates(3, 10, draws(i))) for i in range(9000)]
    counts = np.bincount(first, minlength=10)
    assert counts[3] == 0 and np.delete(counts, 3).min() > 880 and counts.max() < 1120


# --- in a recipe --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mixup|flip", "'mixup' must come last"),
        ("cutmix|mixup", "'cutmix' must come last"),
        ("mix|mix", "'mix' must come last"),
        ("mixup(alpha=0)", "alpha must be a number above 0"),
        ("cutmix(alpha=-1)", "alpha must be a number above 0"),
        ("mixup(alpha=True)", "alpha must be a number above 0"),
        ("mix(mixup=0)", "mixup must be a number above 0"),
        ("mix(cutmix=much)", "cutmix must be a number above 0"),
        ("mixup(p=1.5)", "p must be a probability"),
        ("cutmix(p=-0.1)", "p must be a probability"),
        ("mix(p=2)", "p must be a probability"),
        ("mix(switch=1.1)", "switch must be a probability"),
    ],
)
def test_recipes_that_cannot_be(spec: str, says: str):
    with pytest.raises(SpecError, match=says):
        Recipe(spec, 0)


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("flip|mixup()", "flip|mixup"),
        ("mixup(0.8, p=1.0)", "mixup"),
        ("cutmix(alpha=0.5)", "cutmix(alpha=0.5)"),
        ("mix(mixup=0.2, switch=0.5)", "mix(mixup=0.2)"),
    ],
)
def test_canonical_spec(spec: str, canonical: str):
    recipe = Recipe(spec, 0)
    assert recipe.spec == canonical and recipe.mixed and recipe.identity()["mixed"] is True
    assert Recipe(canonical, 0) == recipe
    assert not Recipe("flip", 0).mixed


def test_a_mix_leaves_the_geometry_alone():
    plain, mixed = Recipe("crop(16, pad=4)|flip", 3), Recipe("crop(16, pad=4)|flip|cutmix", 3)
    assert mixed.size == (16, 16)
    assert [mixed.view("a", k, 20, 20) for k in range(9)] == [plain.view("a", k, 20, 20) for k in range(9)]


def test_a_mix_is_a_function_of_its_keys():
    def drawn(seed, id, k, sample=0, spec="mix"):
        found = Recipe(spec, seed).mix(id, k, sample, 100, 32, 32)
        return found and (found[0], tuple(itertools.islice(found[1], 5)))

    base = drawn(0, "a", 0)
    assert drawn(0, "a", 0) == base
    assert (
        len({base, drawn(1, "a", 0), drawn(0, "b", 0), drawn(0, "a", 1), drawn(0, "a", 0, spec="flip|mix")})
        == 5
    )
    assert Recipe("flip", 0).mix("a", 0, 0, 100, 32, 32) is None


def test_a_known_mix_stays_what_it_is():
    # stored caches depend on these: a change here needs a new op version
    found = []
    for spec in ("mixup", "cutmix", "crop(24)|mix", "mixup(alpha=0.2)"):
        blend, partners = Recipe(spec, 3).mix("a", 5, 4, 1000, 48, 32)  # type: ignore[misc]
        found.append((blend.pack(), next(partners)))
    assert found == KNOWN


KNOWN = [
    ((19073, 0, 0, 0, 0), 470),
    ((28735, 0, 0, 14336, 9216), 585),
    ((11887, 0, 0, 0, 0), 176),
    ((911, 0, 0, 0, 0), 470),
]


# --- rendering ----------------------------------------------------------------------------------


def test_a_mixed_view_is_its_two_views_blended():
    own, other = picture(24, 32), picture(40, 40, 1)
    partner = View(4, 4, 16, 12, 40, 40, True)
    for blend in (Blend(20_000), Blend(30_000, 0, ONE // 2, ONE // 2, ONE // 3)):
        view = View(*WHOLE, mix=Mix(9, 0, partner, blend))
        for size in ((24, 32), (12, 16), (48, 64)):
            expected = blend(render(own, View(*WHOLE), size), render(other, partner, size))
            assert np.array_equal(render(own, view, size, {9: other}), expected)


def test_a_mixed_view_is_never_rendered_without_its_partner():
    view = View(*WHOLE, mix=Mix(9, 0, View(*WHOLE), Blend(9)))
    for others in ({}, {3: picture(24, 32)}):
        with pytest.raises(MismatchError, match="shows sample 9 too"):
            render(picture(24, 32), view, (24, 32), others)
