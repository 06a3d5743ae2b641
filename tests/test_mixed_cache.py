"""Caches of mixed views: built, resumed, read, verified, paired, and refused when they are damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import softcache as sc
from softcache import manifest as m
from softcache import testing
from softcache.cache import Cache
from softcache.checker import verify_live
from softcache.errors import (
    DamageError,
    InvalidRow,
    MismatchError,
    SourceError,
    SpecError,
    StoreError,
    UnreadableImage,
)
from softcache.recipe import Recipe, View, gather, render
from softcache.recipe.mix import ONE
from softcache.store import Store
from softcache.teachers import Options, load

ODD = 13
RECIPE = "random_resized_crop(8)|flip|mix(p=0.8)"


class Echo(testing.ToyTeacher):
    """Says what it is shown: ``pixels`` (3, 8, 8), which float16 holds exactly."""

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        said = {"pixels": pixels.transpose(0, 3, 1, 2).astype(np.float32)}
        return {"logits": super().__call__(pixels)["logits"]} | said


OPTIONS: dict[str, Any] = {
    "teacher": Echo(),
    "targets": {"logits": "full(u8)", "pixels": "f16"},
    "views": 3,
    "block_rows": 5,
    "batch": 4,
    "progress": False,
}


class Holes(testing.ToyImages):
    """Toy images of which some cannot be read."""

    holes: tuple[int, ...] = ()

    def __getitem__(self, i: int) -> Any:
        image, label = super().__getitem__(i)
        return (b"no image" if i in self.holes else png(image)), label


def png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def make(path: Path | Store, samples: int = ODD, recipe: str = RECIPE, **options: Any) -> Cache:
    return sc.build(path, source=sc.Source(testing.ToyImages(samples)), recipe=recipe, **OPTIONS | options)


@pytest.fixture(scope="module")
def source() -> sc.Source:
    return sc.Source(testing.ToyImages(ODD))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd number of samples, three views, most of them mixed. Copy it before you change it."""
    path = tmp_path_factory.mktemp("mixed") / "cache"
    make(path)
    return path


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


# --- what the teacher saw -------------------------------------------------------------------------------------


def by_hand(own: np.ndarray, other: np.ndarray, mix: list[int]) -> np.ndarray:
    """A mix, one value at a time, from the five stored numbers."""
    lam, x, y, width, height = mix
    out = own.copy()
    rows, columns, _ = own.shape
    for r, c, v in np.ndindex(own.shape):
        if width:
            inside = int(np.floor(y / ONE * rows + 0.5)) <= r < int(np.floor((y + height) / ONE * rows + 0.5))
            inside &= (
                int(np.floor(x / ONE * columns + 0.5)) <= c < int(np.floor((x + width) / ONE * columns + 0.5))
            )
            out[r, c, v] = other[r, c, v] if inside else own[r, c, v]
        else:
            out[r, c, v] = (lam * int(own[r, c, v]) + (ONE - lam) * int(other[r, c, v]) + 16383) // ONE
    return out


def test_the_teacher_saw_the_mix_that_is_stored(built: Path, source: sc.Source):
    """From the arrays as plain Zarr gives them; the partner's pixels are those of its own view, not mixed."""
    cache, group = sc.open(built), zarr.open_group(built, mode="r")
    names = ("view/partner", "view/mix", "view/geometry", "targets/pixels/value")
    partner, mix, geometry, said = (np.asarray(group[name]) for name in names)  # type: ignore[arg-type]
    positions = cache.grid.positions(np.arange(ODD))
    plain, kinds = Recipe("random_resized_crop(8)|flip", 0), set()
    for sample in range(ODD):
        for k in range(cache.views):
            row = k, positions[sample]
            image = source.image(sample)
            pixels = render(image, View.unpack(geometry[row].tolist()), (8, 8))
            who, number = partner[row].tolist()
            if who >= 0:
                assert who != sample and number == k
                theirs = View.unpack(geometry[number, positions[who]].tolist())
                other = source.image(who)
                assert theirs == plain.view(source.ids[who], number, other.shape[1], other.shape[0])
                pixels = by_hand(pixels, render(other, theirs, (8, 8)), mix[row].tolist())
            else:
                assert (who, number) == (-1, -1) and mix[row].tolist() == [ONE, 0, 0, 0, 0]
            kinds.add("none" if who < 0 else "cutmix" if mix[row][3] else "mixup")
            assert np.array_equal(said[row].transpose(1, 2, 0), pixels.astype(np.float16))
    assert kinds == {"none", "mixup", "cutmix"}


def test_what_the_cache_reads_renders_to_the_same_pixels(built: Path, source: sc.Source):
    cache = sc.open(built)
    shuffled = np.random.default_rng(0).permutation(ODD)
    for k in range(cache.views):
        said = cache.read(k, shuffled)["pixels"].values
        for sample, view, pixels in zip(shuffled.tolist(), cache.read_views(k, shuffled), said, strict=True):
            images = gather(sample, view, source.image)
            assert np.array_equal(render(images[sample], view, (8, 8), images), pixels.transpose(1, 2, 0))
            assert cache[cache.ids[sample], k].view == view
            assert view.mix is None or view.mix.view.mix is None


def test_it_is_whole_and_is_the_teachers(built: Path, source: sc.Source):
    cache = sc.open(built)
    assert sc.verify(cache, read_data=True) == []
    assert "pixels equal" in sc.pair(cache, source, every=True).message
    found = verify_live(cache, source, load(Echo(), Options(batch=4)), 20)
    assert found["pixels"]["cache"]["relative_l2"] == 0 and found["logits"]["cache"]["kl_T1"] < 1e-2


def test_identity_says_so_and_only_then(built: Path, tmp_path: Path):
    assert sc.open(built).identity["recipe"]["mixed"] is True
    plain = make(tmp_path / "plain", recipe="random_resized_crop(8)|flip")
    stored = plain.store.get(m.MANIFEST)
    assert b'"mixed"' not in stored and not plain.mixed
    assert not [name for name in plain.store.names() if "partner" in name or "/mix" in name]
    assert all(view.mix is None for view in plain.read_views(0, np.arange(ODD)))


def test_top1_is_told_of_the_larger_part(tmp_path: Path):
    """A teacher that names the brighter picture: of black and white ones it sees which shows more."""

    class Ends:
        classes = ("black", "white")

        def __len__(self) -> int:
            return 20

        def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
            return np.full((8, 8, 3), 255 * (i % 2), np.uint8), i % 2

    def teacher(pixels: np.ndarray) -> np.ndarray:
        mean = pixels.reshape(len(pixels), -1).mean(axis=1)
        return np.stack([127.5 - mean, mean - 127.5], axis=1).astype(np.float32)

    teacher.input_spec = {"size": (8, 8)}  # type: ignore[attr-defined]
    cache = sc.build(
        tmp_path / "c", source=Ends(), teacher=teacher, recipe="mixup(alpha=1)", views=3, progress=False
    )
    assert cache.manifest and cache.manifest.report.labelled == 60
    assert cache.manifest.report.teacher_top1 == 1.0


def test_one_class_and_two_samples_will_do(tmp_path: Path):
    class Ants(testing.ToyImages):
        def __init__(self, n: int):
            super().__init__(n)
            self.targets = [0] * n

    cache = sc.build(tmp_path / "c", source=Ants(2), recipe="cutmix", **OPTIONS)
    views = [view for k in range(3) for view in cache.read_views(k, np.arange(2))]
    assert {v.mix.partner for v in views if v.mix} == {0, 1}
    assert sc.verify(cache, read_data=True) == []


# --- what cannot be mixed -------------------------------------------------------------------------------------


def test_one_sample_is_refused_before_anything_is_loaded(tmp_path: Path):
    with pytest.raises(SpecError, match=r"mixes every sample with another.*1 sample,"):
        make(tmp_path / "c", samples=1, teacher="no.such:teacher")
    assert not (tmp_path / "c").exists()


def test_an_unreadable_partner_stops_the_build_as_any_unreadable_image(tmp_path: Path):
    images = Holes(ODD)
    images.holes = (4,)
    with pytest.raises(SourceError, match=r"1 image cannot be read.*--skip-corrupt"):
        sc.build(tmp_path / "c", source=sc.Source(images), recipe=RECIPE, **OPTIONS)


def test_with_skip_corrupt_the_next_partner_is_taken(tmp_path: Path, source: sc.Source):
    images = Holes(ODD)
    images.holes = (4, 7)
    holed = sc.build(tmp_path / "c", source=sc.Source(images), recipe=RECIPE, skip_corrupt=True, **OPTIONS)
    whole = sc.build(tmp_path / "w", source=sc.Source(Holes(ODD)), recipe=RECIPE, **OPTIONS)
    good = np.setdiff1d(np.arange(ODD), (4, 7))
    changed = 0
    for k in range(3):
        for ours, theirs in zip(holed.read_views(k, good), whole.read_views(k, good), strict=True):
            assert (ours.mix is None) == (theirs.mix is None)
            if ours.mix and theirs.mix:
                assert ours.mix.blend == theirs.mix.blend and ours.mix.partner not in (4, 7)
                changed += ours != theirs
                assert ours == theirs or theirs.mix.partner in (4, 7)
    assert changed
    assert (
        sc.verify(holed, read_data=True) == [] and "pixels equal" in sc.pair(holed, sc.Source(images)).message
    )
    with pytest.raises(InvalidRow):
        holed.read_views(0, np.array([4]))


def test_the_only_readable_image_has_no_partner(tmp_path: Path):
    images = Holes(3)
    images.holes = (0, 2)
    with pytest.raises(SourceError, match="is the only image that can be read"):
        sc.build(tmp_path / "c", source=sc.Source(images), recipe="mixup", skip_corrupt=True, **OPTIONS)


def test_caches_are_opened_together_where_their_partners_are_the_same(built: Path, tmp_path: Path):
    cache, every = sc.open(built), np.arange(ODD)
    make(tmp_path / "same", teacher=testing.toy_teacher(), targets={"logits": "full(f16)"})
    both = sc.open([built, tmp_path / "same"])
    assert both.read_views(1, every) == cache.read_views(1, every)
    backwards = sc.Source(testing.ToyImages(ODD))
    backwards._take(list(reversed(backwards._rows)))
    sc.build(tmp_path / "backwards", source=backwards, recipe=RECIPE, **OPTIONS)
    with pytest.raises(MismatchError, match=r"order of the ids differ: .* draws partners by their number"):
        sc.open([built, tmp_path / "backwards"])


# --- a stop, and damage ---------------------------------------------------------------------------------------


def test_a_build_that_was_broken_off_anywhere_ends_with_the_same_bytes(built: Path, tmp_path: Path):
    disk = testing.CountingDisk()
    make(Store(tmp_path / "counted", disk))
    stopped = 0
    for at in range(3, disk.operations, 29):
        root = tmp_path / f"at{at}"
        with pytest.raises(StoreError):
            make(Store(root, testing.FailingDisk(at)))
        stopped += 1
        make(root)
        assert (root / m.MANIFEST).read_bytes() == (built / m.MANIFEST).read_bytes()
        shutil.rmtree(root)
    assert stopped > 10


def test_blocks_that_are_there_can_be_read_before_the_end(tmp_path: Path, built: Path):
    whole = sc.open(built)
    root = Path(shutil.copytree(built, tmp_path / "c"))
    (root / m.MANIFEST).unlink()
    unfinished = sc.open(root)
    assert unfinished.read_views(1, np.arange(ODD)) == whole.read_views(1, np.arange(ODD))


def rewrite(cache: Cache, name: str, sample: int, values: list[int]) -> None:
    """Store other numbers for one row of view 1, with a checksum that fits."""
    array = cache.arrays[f"view/{name}"]
    block, row = divmod(int(cache.grid.positions(np.array([sample]))[0]), cache.grid.block_rows)
    path = cache.store.path(array.file(1, block))
    rows = np.frombuffer(path.read_bytes()[:-4], array.dtype).reshape(-1, *array.row).copy()
    rows[row] = values
    path.write_bytes(array.encode(rows))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("partner", [ODD, 1]),
        ("partner", [1 << 40, 1]),
        ("partner", [-2, 1]),
        ("partner", [-1, 1]),
        ("partner", [5, 1]),  # itself
        ("partner", [3, 3]),
        ("partner", [3, -1]),
        ("mix", [-1, 0, 0, 0, 0]),
        ("mix", [100, 0, -1, 5, 5]),
        ("mix", [100, 30_000, 0, 3_000, 5]),
        ("mix", [100, 0, 32_767, 5, 5]),
        ("mix", [100, 0, 0, 0, 5]),
    ],
)
def test_a_mix_that_cannot_be_is_damage_and_its_row_is_named(copy: Path, name: str, values: list[int]):
    cache = sc.open(copy)
    sample = 5
    if cache.read_views(1, np.array([sample]))[0].mix is None:
        pytest.fail("the sample of this test has to be mixed: choose another")
    rewrite(cache, name, sample, values)
    cache = sc.open(copy)
    with pytest.raises(
        DamageError, match=rf"view 1 of {cache.ids[sample]!r} .* is mixed with what cannot be"
    ) as e:
        cache.read_views(1, np.arange(ODD))
    assert e.value.exit_code == 2 and str(values) in str(e.value)
    assert sc.verify(copy, read_data=True)[0].file.startswith(f"view/{name}/")


def test_a_partner_that_is_invalid_is_damage(tmp_path: Path):
    images = Holes(ODD)
    images.holes = (4,)
    cache = sc.build(tmp_path / "c", source=sc.Source(images), recipe="mixup", skip_corrupt=True, **OPTIONS)
    rewrite(cache, "partner", 9, [4, 1])
    good = np.setdiff1d(np.arange(ODD), 4)
    for finished in (True, False):
        if not finished:
            (tmp_path / "c" / m.MANIFEST).unlink()
        cache = sc.open(tmp_path / "c")
        with pytest.raises(DamageError, match=rf"view 1 of {cache.ids[9]!r} .*partner \[4, 1\]"):
            cache.read_views(1, good)


# --- is this the source it was built from? --------------------------------------------------------------------


def test_the_canaries_see_their_partners(tmp_path: Path):
    class Changed(testing.ToyImages):
        """The image of one sample is negative."""

        def __init__(self, n: int, which: int):
            super().__init__(n)
            self.which = which

        def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
            image, label = super().__getitem__(i)
            return (255 - image if i == self.which else image), label

    cache = make(tmp_path / "c", samples=41, recipe="crop(8)|mixup(alpha=8)")
    canaries = set(cache.constant("canary/sample").tolist())
    partners = set(cache.constant("canary/partner")[:, 0].tolist())
    other, indifferent = min(partners - canaries), min(set(range(41)) - partners - canaries)
    sc.pair(cache, sc.Source(Changed(41, indifferent)))
    with pytest.raises(MismatchError, match="levels on average"):
        sc.pair(cache, sc.Source(Changed(41, other)))


def test_a_partner_of_a_canary_that_became_unreadable_is_named(built: Path, monkeypatch: pytest.MonkeyPatch):
    cache, source = sc.open(built), sc.Source(testing.ToyImages(ODD))
    partner = int(cache.constant("canary/partner")[:, 0].max())
    image = source.image

    def broken(i: int) -> np.ndarray:
        if i == partner:
            raise UnreadableImage(f"cannot read {i}")
        return image(i)

    monkeypatch.setattr(source, "image", broken)
    with pytest.raises(MismatchError, match="cannot be rendered"):
        sc.pair(cache, source)


@pytest.mark.parametrize("values", [[ODD, 0], [0, 99], [-5, -5]])
def test_canaries_with_impossible_partners_are_damage(copy: Path, values: list[int]):
    cache = sc.open(copy)
    assert cache.manifest
    array = cache.manifest.constants["canary/partner"].array("canary/partner")
    rows = cache.constant("canary/partner").copy()
    rows[0] = values
    cache.store.path(array.file()).write_bytes(array.encode(rows))
    with pytest.raises(DamageError, match="not what a build writes"):
        sc.pair(sc.open(copy), sc.Source(testing.ToyImages(ODD)))


# --- the real thing -------------------------------------------------------------------------------------------


def test_mixed_targets_are_not_the_teachers_answer_to_the_mixed_picture(shared_data: Path, tmp_path: Path):
    """Why mixes are exact: λ·p + (1 − λ)·p̃ of what a real network says of two pictures is far from what it says of
    the mixed one, and the cache holds the latter."""
    pytest.importorskip("torch")
    common: dict[str, Any] = {
        "source": shared_data / "cifar10",
        "split": "test",
        "limit": 64,
        "teacher": "softcache_train.students:resnet56",
        "weights": shared_data / "weights" / "cifar10_resnet56.safetensors",
        "targets": {"logits": "full(f16)"},
        "progress": False,
    }
    plain = sc.build(tmp_path / "plain", recipe="crop(32, pad=4)|flip", **common)
    mixed = sc.build(tmp_path / "mixed", recipe="crop(32, pad=4)|flip|mix", **common)
    source = sc.Source(shared_data / "cifar10", split="test", limit=64)
    found = verify_live(mixed, source, load(common["teacher"], Options(weights=common["weights"])), 32)
    assert found["logits"]["cache"]["kl_T1"] < 1e-5

    every = np.arange(64)
    views = mixed.read_views(0, every)
    lam = np.array([v.mix.blend.share if v.mix else 1.0 for v in views])[:, None]
    partner = np.array([v.mix.partner if v.mix else i for i, v in enumerate(views)])
    p = np.exp(plain.read(0, every)["logits"].dense())
    exact = np.exp(mixed.read(0, every)["logits"].dense())
    approximate = lam * p + (1 - lam) * p[partner]
    far = np.abs(exact - approximate).sum(axis=1) / 2  # total variation
    unmixed = lam[:, 0] == 1
    assert far[~unmixed].mean() > 0.1 and (far[~unmixed] > 0.3).any()
    assert np.abs(p - exact)[unmixed].max(initial=0) < 1e-3
