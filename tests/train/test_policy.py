"""Fresh views at every epoch: what becomes of the cached targets, and what is refused."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from softcache_train import Loader, cli, config, loop, policy
from softcache_train.online import LiveTeacher
from softcache_train.targets import Parts

import softcache as sc
from softcache.cache import Cache
from softcache.errors import MismatchError, SpecError
from softcache.keyed import draws
from softcache.recipe import OPS, Recipe, View, render
from softcache.recipe.canvas import Canvas
from softcache.source import Boxes, Source
from softcache.targets import request
from softcache.targets.layout import Layout
from softcache.warp import warp

CELL = 2
FRESH = "random_resized_crop(16, scale=(0.5, 1))|flip"


class Paintings:
    """Smooth pictures of 32 × 32 pixels: a zoom changes their cells little."""

    classes = toys.CLASSES

    def __init__(self, n: int = 40):
        self.targets = [i % 4 for i in range(n)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3)).astype(np.uint8)
        return np.array(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)), self.targets[i]


class Teacher:
    """Logits; the mean colour of cells of 2 × 2 pixels as ``map``, plus ``bias`` × where they are; and a ``vector``."""

    input_spec = {"size": (16, 16)}  # noqa: RUF012

    def __init__(self, bias: float = 0.0):
        self.bias, self.weights_digest = bias, f"{int(bias * 10):064x}"

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        n = 16 // CELL
        cells = pixels.astype(np.float32).reshape(len(pixels), n, CELL, n, CELL, 3).mean((2, 4)) / 64 + 1
        place = np.random.default_rng(0).normal(size=(3, n, n)).astype(np.float32)
        map_ = np.moveaxis(cells, -1, 1) + self.bias * place
        return {"logits": toys.teacher(pixels), "map": map_, "vector": map_[:, :, 0, 0]}


def build(
    path: Path, teacher: Callable[..., Any], source: Source, recipe: str = "identity", **options
) -> Cache:
    options = {"targets": {"logits": "full(f16)", "map": "f16"}, "batch": 8} | options
    return sc.build(path, source=source, teacher=teacher, recipe=recipe, progress=False, **options)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(Paintings())


@pytest.fixture(scope="module")
def canonical(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One view of the whole image, by a teacher whose map moves with it."""
    return build(tmp_path_factory.mktemp("canonical") / "c", Teacher(), source)


@pytest.fixture(scope="module")
def stuck(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same by a teacher whose map says where its cells are, as a vision transformer's does."""
    return build(tmp_path_factory.mktemp("stuck") / "c", Teacher(bias=3.0), source)


def make(cache: Cache, source: Source, name: str = "warp", recipe: str | None = FRESH, **options) -> Loader:
    options = {"global_batch": 8, "workers": 0, "targets": ["map"]} | options
    return Loader(cache, source, policy=name, recipe=recipe, **options)


def assert_same(a, b):
    assert np.array_equal(a.index, b.index) and a.view == b.view and a.views == b.views
    assert torch.equal(a.images, b.images) and a.targets.keys() == b.targets.keys()
    assert all(torch.equal(a[name].values, b[name].values) for name in a.targets)


# -- fresh views -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["warp", "frozen"])
def test_pixels_are_those_of_fresh_views(canonical, source, name):
    loader = make(canonical, source, name)
    for epoch, step in [(0, 0), (3, 2)]:
        batch = loader.batch(epoch, step)
        assert batch.view == 0 and len(set(batch.views)) > 4
        spec = loader.input_spec
        for row, sample in enumerate(batch.index):
            pixels = render(source.image(int(sample)), batch.views[row], (16, 16))
            seen = (pixels / 255 - spec["mean"]) / spec["std"]
            np.testing.assert_allclose(batch.images[row].permute(1, 2, 0).numpy(), seen, atol=1e-6)


@pytest.mark.parametrize("name", ["warp", "frozen"])
def test_a_view_is_a_function_of_seed_epoch_and_sample(canonical, source, name):
    def seen(**options) -> dict[tuple[int, int], View]:
        loader = make(canonical, source, name, **options)
        batches = [(e, loader.batch(e, s)) for e in range(3) for s in range(len(loader))]
        return {(e, i): v for e, b in batches for i, v in zip(b.index.tolist(), b.views, strict=True)}

    once = seen()
    assert len(once) == 3 * 40 and len(set(once.values())) > 100
    assert seen(global_batch=5) == once
    assert len(set(once.items()) & set(seen(seed=1).items())) < 6
    drawn = Recipe(FRESH, make(canonical, source, name).policy.recipe.seed)
    assert all(drawn.view(canonical.ids[i], e, 32, 32) == view for (e, i), view in once.items())


@pytest.mark.parametrize("name", ["warp", "frozen"])
def test_neither_ranks_nor_threads_nor_a_stop_change_anything(canonical, source, name):
    alone = make(canonical, source, name)
    whole = [*alone, *alone]
    threaded = make(canonical, source, name, workers=3)
    for a, b in zip(itertools.chain(threaded, threaded), whole, strict=True):
        assert_same(a, b)
    resumed = make(canonical, source, name, workers=2)
    resumed.epoch, resumed.step = 1, 3
    for a, b in zip(resumed, whole[len(alone) + 3 :], strict=True):
        assert_same(a, b)
    for world in (2, 3):
        team = [make(canonical, source, name, rank=rank, world=world) for rank in range(world)]
        for joined, *parts in zip(whole[: len(alone)], *team, strict=True):
            assert [v for p in parts for v in p.views] == joined.views
            for key in joined.targets:
                assert torch.equal(torch.cat([p[key].values for p in parts]), joined[key].values)


def test_exact_is_as_it_was(canonical, source):
    plain = Loader(canonical, source, global_batch=8, workers=0)
    for batch, other in zip(plain, make(canonical, source, "exact", None, targets=None), strict=True):
        assert_same(batch, other)
        assert batch.views == canonical.read_views(0, batch.index)


# -- warp ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["identity", "flip", FRESH])
def test_a_warped_map_is_what_the_teacher_says_of_the_fresh_view(canonical, source, recipe):
    """The toy's map is exactly equivariant to a flip, and nearly so to a zoom."""
    batch = make(canonical, source, recipe=recipe, warp_threshold=0.9).batch(1, 2)
    pixels = np.stack(
        [render(source.image(int(i)), v, (16, 16)) for i, v in zip(batch.index, batch.views, strict=True)]
    )
    truth, found = Teacher()(pixels)["map"], batch["map"].values.numpy()
    still = np.stack([canonical[canonical.ids[i], 0]["map"].values for i in batch.index])
    if recipe == FRESH:
        assert np.abs(found - truth).mean() < 0.15 * np.abs(still - truth).mean()
    else:
        np.testing.assert_allclose(found, truth, atol=4e-3)  # f16
    assert found.dtype == np.float32


def test_warp_goes_from_the_cached_view_to_the_fresh_one(source, tmp_path):
    """Canonical views that are crops and mirrored themselves."""
    cache = build(tmp_path / "c", Teacher(), source, recipe="center_crop((24, 28))|flip")
    batch = make(cache, source, recipe="center_crop((24, 20))|crop(14)|flip", warp_threshold=0).batch(0, 1)
    seen = cache.read_views(0, batch.index)
    assert {v.flip for v in seen} == {v.flip for v in batch.views} == {True, False}
    said = cache.read(0, batch.index, ["map"])["map"].values
    np.testing.assert_array_equal(batch["map"].values.numpy(), warp(said, seen, batch.views))


def test_a_target_that_does_not_move_is_refused_with_its_figure(stuck, source):
    figures = stuck.manifest.report.equivariance["map"]
    assert figures["flip"] < 0.9
    told = rf"'map' does not move with a flip.*{figures['flip']:.4f} \({figures['flip_ignored']:.4f} not warped\).*0\.95"
    with pytest.raises(MismatchError, match=told):
        make(stuck, source, recipe="flip")
    with pytest.raises(MismatchError, match=r"'map' does not move with a shift.*Use exact views"):
        make(stuck, source, recipe="crop(16)")
    make(stuck, source, recipe="identity")
    make(stuck, source, recipe="flip", warp_threshold=figures["flip"])
    make(stuck, source, recipe="flip", targets=[])


def test_a_zoom_counts_where_the_recipe_crops(canonical, source):
    figures = canonical.manifest.report.equivariance["map"]
    assert figures["flip"] == figures["shift"] == 1 > figures["zoom"]
    make(canonical, source, recipe="flip", warp_threshold=1)
    with pytest.raises(MismatchError, match="does not move with a zoom"):
        make(canonical, source, recipe="crop(16)", warp_threshold=1)


def test_the_cached_views_own_flips_count(source, tmp_path):
    cache = build(tmp_path / "c", Teacher(bias=3.0), source, recipe="flip")
    with pytest.raises(MismatchError, match="does not move with a flip"):
        make(cache, source, recipe="identity")


@pytest.mark.parametrize(("target", "kind"), [("logits", "logits"), ("vector", "embedding")])
def test_what_holds_for_its_view_only_is_refused(source, tmp_path, target, kind):
    cache = build(
        tmp_path / "c", Teacher(), source, targets={"vector": "f16", "map": "f16", "logits": "full(u8)"}
    )
    with pytest.raises(SpecError, match=rf"'{target}' \({kind}\) is view-locked.*policy=frozen"):
        make(cache, source, targets=["map", target])


def test_what_never_changes_passes(canonical, source, monkeypatch):
    monkeypatch.setattr(sc.targets.LogitsKind, "law", "invariant")
    batch = make(canonical, source, targets=["logits", "map"], warp_threshold=0.9).batch(0, 0)
    said = canonical.read(0, batch.index)
    assert torch.equal(batch["logits"].values, torch.from_numpy(said["logits"].values))
    assert not np.allclose(batch["map"].values, said["map"].values, atol=1e-2)


def test_a_cache_without_a_probe_is_refused(canonical, source):
    report = canonical.manifest.report.model_copy(update={"equivariance": {}})
    old = Cache(
        canonical.store, canonical._identity, canonical.manifest.model_copy(update={"report": report})
    )
    with pytest.raises(
        MismatchError, match=r"'map' moves under a flip is not in the report.*build the cache again"
    ):
        make(old, source, recipe="flip")
    part = {"map": {"same": 1.0, "flip": 1.0, "flip_ignored": 0.5}}
    report = report.model_copy(update={"equivariance": part})
    old = Cache(
        canonical.store, canonical._identity, canonical.manifest.model_copy(update={"report": report})
    )
    with pytest.raises(MismatchError, match=r"under a shift .* cells are too few"):
        make(old, source, recipe="crop(16)")


def test_of_several_caches_each_has_its_own_figures(canonical, stuck, source):
    both = sc.open([canonical.path, stuck.path])
    batch = make(both, source, recipe="flip", targets=["0.map"]).batch(0, 0)
    assert torch.equal(
        batch["0.map"].values, make(canonical, source, recipe="flip").batch(0, 0)["map"].values
    )
    with pytest.raises(MismatchError, match=r"'1\.map' does not move with a flip"):
        make(both, source, recipe="flip", targets=["0.map", "1.map"])


def test_what_the_teacher_did_not_see_is_refused(canonical, source):
    loader = make(canonical, source, recipe="crop(32, pad=4)", warp_threshold=0.9)
    with pytest.raises(
        MismatchError, match=r"shows 32x32 at \(.*\) of '.*', and the teacher saw 32x32 at \(0, 0\)"
    ):
        loader.batch(0, 0)
    make(canonical, source, "frozen", recipe="crop(32, pad=4)").batch(0, 0)


def test_every_op_that_moves_a_view_is_known():
    """An op that is not in the policy's table leaves the rectangle alone, whatever it draws."""
    options = {"color_jitter": (0.4,), "cutout": (4,), "resize": (7,)}
    for name, op in OPS.items():
        if name in policy.MOVES:
            continue
        made = op(*options.get(name, ()))
        for k in range(20):
            canvas = made.apply(Canvas.whole(20, 24), draws(name, k))
            view, whole = canvas.view(20, 24), Canvas.whole(20, 24).view(20, 24)
            fields = [(v.x, v.y, v.width, v.height, v.flip) for v in (view, whole)]
            assert fields[0] == fields[1], f"{name} moves the view: say so in policy.MOVES"


def test_fresh_views_are_drawn_with_the_samples_boxes(canonical, source, monkeypatch):
    boxes = np.array([[4.0, 4, 20, 20], [10, 2, 30, 30]])
    every = Boxes(boxes, np.zeros(2, int), np.zeros(2, bool), np.zeros(2, bool))
    monkeypatch.setattr(Source, "boxes", lambda self, i: every)
    loader = make(canonical, source, "frozen", recipe="iou_crop|resize((16, 16))")
    made = loader.policy.recipe
    assert made is not None
    batch, cut = loader.batch(3, 0), 0
    for sample, view in zip(batch.index, batch.views, strict=True):
        assert view == made.view(canonical.ids[int(sample)], 3, 32, 32, boxes)
        cut += view.width < 32
    assert cut
    monkeypatch.undo()
    with pytest.raises(SpecError, match="the source has none"):
        make(canonical, source, "frozen", recipe="iou_crop|resize((16, 16))").batch(3, 0)


@pytest.mark.parametrize("recipe", ["vflip(p=1)", "rand_augment(n=9)"])
def test_what_is_no_rectangle_is_not_warped(canonical, source, recipe):
    with pytest.raises(SpecError, match="one rectangle of an image to another"):
        make(canonical, source, recipe=recipe, warp_threshold=0).batch(0, 0)


# -- frozen ----------------------------------------------------------------------------------------


def test_frozen_targets_are_those_of_the_canonical_view(stuck, source, caplog):
    loader = make(stuck, source, "frozen", targets=None)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert (
        "did not see these pixels" in caplog.text
        and "Beyer" in caplog.text
        and "\n" not in caplog.messages[0]
    )
    for epoch in (0, 5):
        batch = loader.batch(epoch, 1)
        said = stuck.read(0, batch.index)
        assert batch.views != stuck.read_views(0, batch.index)
        for name in ("logits", "map"):
            assert torch.equal(batch[name].values, torch.from_numpy(said[name].values))
    assert len(caplog.records) == 1


def test_frozen_warns_once_and_of_targets_only(stuck, source, caplog):
    make(stuck, source, "frozen", targets=[])
    make(stuck, source, "frozen", rank=1, world=2)
    make(stuck, source, "exact", None)
    assert not caplog.records


def test_only_view_number_0_is_shown_of_many(source, tmp_path):
    cache = build(tmp_path / "c", Teacher(), source, recipe=FRESH, views=3)
    loader = make(cache, source, "frozen")
    for epoch in range(4):
        batch = loader.batch(epoch, 0)
        assert batch.view == 0
        said = cache.read(0, batch.index, ["map"])["map"].values
        assert torch.equal(batch["map"].values, torch.from_numpy(said))


# -- a live teacher --------------------------------------------------------------------------------


class Live(LiveTeacher):
    def __init__(self):
        shapes = {"logits": (4,), "map": (3, 8, 8)}
        asked = [request(f"{name}=f16" if name == "map" else name + "=full(f16)") for name in shapes]
        teacher: Any = Teacher(bias=3.0)
        teacher.input_spec = SimpleNamespace(size=(16, 16))
        super().__init__(teacher, [one.resolve(shapes[one.name]) for one in asked])


def test_a_live_teacher_sees_the_fresh_views(canonical, source):
    batch = make(canonical, source, "exact", FRESH, target_source=Live()).batch(2, 1)
    assert batch.views == make(canonical, source, "frozen").batch(2, 1).views
    pixels = np.stack(
        [render(source.image(int(i)), v, (16, 16)) for i, v in zip(batch.index, batch.views, strict=True)]
    )
    assert torch.equal(batch["map"].values, torch.from_numpy(Teacher(bias=3.0)(pixels)["map"]))


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "wrap"}, "did you mean 'warp'"),
        ({"recipe": None}, "policy=warp shows fresh views: say how"),
        ({"name": "frozen", "recipe": None}, "policy=frozen shows fresh views"),
        ({"name": "exact"}, "no targets of"),
        ({"name": "warp", "target_source": Live()}, "a live teacher sees the fresh views itself"),
        ({"name": "frozen", "recipe": "flop"}, "flop"),
    ],
)
def test_options_that_do_not_go_together(canonical, source, options, told):
    with pytest.raises(SpecError, match=told):
        make(canonical, source, **options)


def test_mixed_views_are_refused(canonical, source):
    mixed = Cache(canonical.store, canonical._identity, canonical.manifest)
    mixed.identity["recipe"]["ops"] = {"flip": 1, "cutmix": 1}
    pairing = make(canonical, source, "exact", None).pairing
    for name in ("warp", "frozen"):
        with pytest.raises(SpecError, match="the cache's recipe has 'cutmix'"):
            make(mixed, source, name, pairing=pairing)
        if "mixup" in OPS:
            with pytest.raises(SpecError, match="recipe has 'mixup'"):
                make(canonical, source, name, "mixup")


# -- the training loop -----------------------------------------------------------------------------

QUICK = {
    "student": "toys:plain",
    "epochs": 2,
    "global_batch": 10,
    "lr": 0.02,
    "warmup_epochs": 0,
    "workers": 0,
}


def run(cache: Cache, source: Source, out: Path, **options) -> loop.Result:
    return loop.train(config.check(QUICK | {"out": str(out)} | options), cache, source)


def test_a_student_is_trained_on_frozen_targets(cache, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    options = {**QUICK, "policy": "frozen", "recipe": "crop(16, pad=2)|flip"}
    (tmp_path / "c.yaml").write_text(json.dumps(options))
    args = [str(tmp_path / "c.yaml"), "--cache", str(cache.path), "--source", str(images), "--json"]
    assert cli.main([*args, "-o", str(tmp_path / "run")]) == 0
    assert cli.main([*args, "-o", str(tmp_path / "exact"), "--set", "policy=exact", "recipe=null"]) == 0
    frozen, exact = map(json.loads, capsys.readouterr().out.splitlines())
    assert frozen["epochs"] == 2 and Path(frozen["model"]).read_bytes() != Path(exact["model"]).read_bytes()
    assert cli.main([*args, "--set", "policy=warp"]) == 1
    assert "'logits' (logits) is view-locked" in capsys.readouterr().err


def test_a_resumed_run_draws_the_same_fresh_views(cache, images, tmp_path, monkeypatch):
    source = Source(images, split="train")
    options = {"policy": "frozen", "recipe": "crop(16, pad=2)|flip", "checkpoint_every": 3}
    whole = run(cache, source, tmp_path / "whole", **options)

    class Stop(BaseException):
        pass

    step, seen = loop.Progress.step, []

    def stop(self, n):
        seen.append(n)
        if len(seen) == 17:
            raise Stop
        step(self, n)

    monkeypatch.setattr(loop.Progress, "step", stop)
    with pytest.raises(Stop):
        run(cache, source, tmp_path / "parts", **options)
    monkeypatch.setattr(loop.Progress, "step", step)
    parts = run(cache, source, tmp_path / "parts", **options)
    assert Path(parts.model).read_bytes() == Path(whole.model).read_bytes()


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"teacher": "toys:teacher_factory"}])
def test_fresh_views_with_labels_only_or_a_live_teacher(cache, images, tmp_path, options, caplog):
    result = run(
        cache, Source(images, split="train"), tmp_path / "run", recipe="crop(16, pad=2)|flip", **options
    )
    assert result.epochs == 2 and result.top1 is not None
    assert not caplog.records


# -- boxes -------------------------------------------------------------------------------------------------


class Marked:
    """One bright mark on a dark picture of 40 × 48 pixels."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> np.ndarray:
        image = np.zeros((40, 48, 3), np.uint8)
        x, y = np.random.default_rng(i).integers(12, 24, 2)
        image[y : y + 8, x : x + 10] = 255
        return image


class Finder:
    """The box around what is bright, as the only detection; a distribution, which is of the view alone."""

    input_spec = {"size": (96, 96)}  # noqa: RUF012
    layouts = {"detections": Layout({"logits": 2, "boxes": 4, "distribution": 8})}  # noqa: RUF012
    weights_digest = 64 * "a"

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.zeros((len(pixels), 1, 14), np.float32)
        for row, image in zip(rows, pixels, strict=True):
            row[0, :6] = 1, -1, *around(image)
        return {"detections": rows}


def around(image: np.ndarray) -> list[float]:
    """The box around what is bright, in the unit square."""
    y, x = np.nonzero(image[..., 0] > 127)
    if not len(x):
        return [0, 0, 1, 1]  # of noise
    height, width = image.shape[:2]
    return [x.min() / width, y.min() / height, (x.max() + 1) / width, (y.max() + 1) / height]


def test_boxes_are_warped_to_where_the_mark_is_in_a_fresh_view(tmp_path: Path):
    marked = Source(Marked())
    cache = build(tmp_path / "c", Finder(), marked, "letterbox(96)", targets={"detections": "all"})
    fresh = "letterbox(96)|random_resized_crop(96, scale=(0.6, 1), ratio=(1, 1))|flip"
    loader = Loader(cache, marked, global_batch=16, policy="warp", recipe=fresh, seed=1)
    batch = next(iter(loader))
    target = batch["detections"]
    assert isinstance(target, Parts)
    found = target.values
    assert set(found) == {"logits", "boxes", "weight"}
    for row, view, (box,) in zip(batch.index, batch.views, found["boxes"].numpy(), strict=True):
        pixels = render(marked.image(row), view, (96, 96))
        assert np.abs(box - around(pixels)).max() < 2.5 / 96
    assert len({view.flip for view in batch.views}) == 2
