"""Caches of detectors: built from a toy one, read back, resumed, compared, damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_manifest import at, refused, sign

import softcache as sc
from softcache import cli, testing
from softcache.errors import (
    CodecError,
    DamageError,
    MismatchError,
    NotBuilt,
    SpecError,
    StoreError,
    TeacherError,
)
from softcache.store import Store
from softcache.targets import Items
from softcache.teachers import Options
from softcache.teachers.ensemble import assemble
from softcache.testing import ToyDetector, ToyImages, toy_detector

TARGETS = {
    "detections": "top(6, background=5)",
    "queries": "all",
    "p3": "pool(2)|int8",
    "p3.attention": "attention",
}
OPTIONS: dict[str, Any] = {
    "recipe": "random_resized_crop(16)|flip",
    "targets": TARGETS,
    "views": 2,
    "block_rows": 8,
    "batch": 4,
    "progress": False,
}
SAMPLES = 20


def build(path: Path | Store, **options: Any) -> sc.Cache:
    return sc.build(path, **{"source": ToyImages(SAMPLES), "teacher": toy_detector()} | OPTIONS | options)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "cache"
    build(path)
    return path


@pytest.fixture(scope="module")
def cache(path: Path) -> sc.Cache:
    return sc.open(path)


def said(cache: sc.Cache, view: int) -> dict[str, np.ndarray]:
    """What the detector says of every view that is in the cache."""
    images = ToyImages(SAMPLES)
    views = cache.read_views(view, np.arange(SAMPLES))
    return toy_detector()(np.stack([sc.render(images[i][0], v, (16, 16)) for i, v in enumerate(views)]))


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("slab", [True, False])
def test_what_is_read_is_what_the_teacher_said_of_the_view(cache: sc.Cache, view: int, slab: bool):
    live, found = said(cache, view), cache.read(view, np.arange(SAMPLES), slab=slab)
    kept, target = found["detections"], cache.targets["detections"]
    whole = Items.whole(ToyDetector.layouts["detections"], live["detections"])
    order = np.argsort(-whole.scores().max(axis=-1), axis=-1, kind="stable")
    assert np.array_equal(kept.index[:, :6], order[:, :6]) and (kept.weight.sum(axis=1) == 21).all()
    there = whole.take(kept.index)
    assert np.abs(kept.parts["boxes"] - there.parts["boxes"]).max() <= 1 / 65535 + 1e-6
    assert np.abs(kept.parts["logits"] - there.parts["logits"]).max() <= 12 * 2**-11
    assert np.abs(kept.parts["distribution"] - there.parts["distribution"]).max() <= 16 / 255 / 2 * 1.01
    assert np.array_equal(kept.level(), (kept.index >= 16).astype(int) + (kept.index >= 20))
    assert target.layout == ToyDetector.layouts["detections"]

    queries = found["queries"]
    assert np.abs(queries.dense() - live["queries"]).max() <= 16 / 127 / 2 * 1.01
    assert np.array_equal(queries.layer(-1).index[0], np.arange(5, 10))
    assert queries.scores().shape == (SAMPLES, 10, 4)
    one = cache[cache.ids[3], view]["queries"]
    assert np.array_equal(one.dense(), queries[3].dense())


def test_a_pooled_map_is_the_mean_over_its_cells(cache: sc.Cache):
    live = said(cache, 0)["p3"].astype(np.float64)
    found = cache.read(0, np.arange(SAMPLES), "p3")["p3"].values
    assert found.shape == (SAMPLES, 6, 3, 4)
    expected = np.zeros(found.shape)
    for y in range(3):
        for x in range(4):
            expected[:, :, y, x] = live[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(axis=(2, 3))
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 127 / 2 * 1.01


def test_attention_is_what_fgd_weighs_by(cache: sc.Cache):
    live = said(cache, 0)["p3"].astype(np.float64)
    found = cache.read(0, np.arange(SAMPLES), ["p3.attention"])["p3.attention"]
    for row, f in enumerate(live):
        places, channels = np.abs(f).mean(axis=0), np.abs(f).mean(axis=(1, 2))
        spatial = 5 * 7 * np.exp(places / 0.5) / np.exp(places / 0.5).sum()
        channel = 6 * np.exp(channels / 0.5) / np.exp(channels / 0.5).sum()
        assert np.allclose(found.spatial[row], spatial, rtol=2**-10)
        assert np.allclose(found.channel[row], channel, rtol=2**-10)
    assert cache.targets["p3.attention"].kind == "attention_map"


def test_the_report_tells_of_every_part(cache: sc.Cache):
    report = cache.manifest.report  # type: ignore[union-attr]
    assert set(report.fidelity["detections"]) == {
        "boxes",
        "boxes_max",
        "boxes_clipped",
        "kl",
        "distribution_l2",
    }
    assert set(report.fidelity["queries"]) == {
        "boxes", "boxes_max", "boxes_clipped", "reference", "reference_max", "reference_clipped", "kl", "embedding_l2"
    }  # fmt: skip
    assert set(report.fidelity["p3.attention"]) == {
        "spatial_relative_l2", "spatial_cosine", "channel_relative_l2", "channel_cosine"
    }  # fmt: skip
    assert 0 < report.fidelity["detections"]["boxes"] < report.fidelity["detections"]["boxes_max"] < 1.6e-5
    assert 0 < report.fidelity["detections"]["kl"] < 1e-5 and 0 < report.fidelity["queries"]["kl"] < 1e-2
    assert 0 < report.fidelity["p3"]["relative_l2"] < 0.01
    assert set(report.equivariance) == {"p3"} and report.top1 is None


def test_fidelity_of_items_is_what_a_loop_finds(cache: sc.Cache):
    from softcache.measure import fidelity

    target, live = cache.targets["detections"], said(cache, 0)["detections"]
    kept = cache.read(0, np.arange(SAMPLES), "detections")["detections"]
    found = fidelity(target.wrap(live), kept)
    for row in range(SAMPLES):
        kls, off = [], []
        for place, index in enumerate(kept.index[row]):
            p, q = (
                1 / (1 + np.exp(-x.astype(np.float64)))
                for x in (live[row, index, :4], kept.parts["logits"][row, place])
            )
            kls.append((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum())
            off += np.abs(live[row, index, 4:8] - kept.parts["boxes"][row, place]).tolist()
        assert found["kl"][row] == pytest.approx(np.mean(kls), rel=1e-4, abs=1e-12)
        assert found["boxes"][row] == pytest.approx(np.mean(off)) and found["boxes_max"][row] == max(off)


def test_it_is_whole_and_the_living_teacher_agrees(cache: sc.Cache):
    assert sc.verify(cache, read_data=True) == []
    options = Options.like(cache.identity["teacher"], taps=("detections", "queries", "p3"))
    found = sc.verify_live(cache, sc.Source(ToyImages(SAMPLES)), assemble(toy_detector(), None, options), 12)
    assert found["detections"]["cache"]["shared"] == 1 and found["detections"]["cache"]["boxes_max"] < 1.6e-5
    assert (
        found["detections"]["control"]["kl"] == found["p3.attention"]["control"]["spatial_relative_l2"] == 0
    )
    assert found["p3"]["control"]["cosine"] == pytest.approx(1)
    assert found["p3"]["cache"]["cosine"] > 0.999


@pytest.mark.parametrize(
    ("target", "part"),
    [("detections", p) for p in ("logits", "boxes", "distribution")]
    + [("queries", p) for p in ("embedding", "logits", "boxes", "reference")],
)
def test_of_a_living_teacher_every_part_is_judged(cache: sc.Cache, target: str, part: str):
    def of_others(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One part is what it is for other pictures, or is nothing at all; the others are right."""
        (at,) = (at for name, at in columns if name == part)
        said = found[target].copy()
        said[..., at] = 0.25
        return found | {target: said}

    layout = ToyDetector.layouts[target]
    columns = list(layout.parts(np.arange(layout.width)))
    options = Options.like(cache.identity["teacher"], taps=("detections", "queries", "p3"))
    other = assemble(Broken(of_others), None, options)
    found = sc.verify_live(cache, sc.Source(ToyImages(SAMPLES)), other, 12)
    assert {name: sides["cache"]["wrong"] for name, sides in found.items()} == {
        name: 12 * (name == target) for name in TARGETS
    }
    assert all(sides["control"]["wrong"] == 0 for sides in found.values())


def test_boxes_a_little_off_are_wrong_and_by_less_than_processors_differ_are_not(cache: sc.Cache):
    def moved(by: float):
        def move(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return found | {"queries": found["queries"] + by * (np.arange(21) // 4 == 3)[:21]}  # of its boxes

        return move

    options = Options.like(cache.identity["teacher"], taps=("detections", "queries", "p3"))
    for by, wrong in ((0.03, 12), (1e-4, 0)):
        other = assemble(Broken(moved(by)), None, options)
        found = sc.verify_live(cache, sc.Source(ToyImages(SAMPLES)), other, 12)
        assert found["queries"]["cache"]["wrong"] == wrong


def test_a_living_teacher_of_other_shapes_is_told(cache: sc.Cache):
    options = Options.like(cache.identity["teacher"], taps=("detections", "queries", "p3"))
    other = assemble(Broken(lambda found: found | {"queries": found["queries"][:, 1:]}), None, options)
    with pytest.raises(
        MismatchError, match=r"'queries' of the cache is .10, 21., and the teacher gives .9, 21."
    ):
        sc.verify_live(cache, sc.Source(ToyImages(SAMPLES)), other, 12)


def test_the_commands_know_such_a_cache(path: Path, tmp_path: Path, capsys, monkeypatch):
    folder = testing.make_image_folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    flags = [
        "--source",
        str(folder),
        "--teacher",
        "softcache.testing:toy_detector",
        "--recipe",
        "random_resized_crop(16)",
    ]
    flags += [f"--target={name}={codec}" for name, codec in TARGETS.items()]
    assert cli.main(["build", *flags, "--batch", "8", "-o", "c"]) == 0
    assert cli.main(["show", "c"]) == 0
    shown = capsys.readouterr().out
    assert "detections (21, 24) as top(6, background=5)" in shown
    assert "logits 4, boxes 4, distribution 16; sigmoid; 3 levels; toy" in shown
    assert "embedding 8, logits 5, boxes 4, reference 4; softmax; background 4; 2 layers" in shown
    assert "constant constants/query_embed: float32 (5, 8)" in shown
    assert cli.main(["verify", "c", "--read-data"]) == 0
    live = ["--live", "5", "--source", str(folder), "--teacher", "softcache.testing:toy_detector", "--json"]
    capsys.readouterr()
    assert cli.main(["verify", "c", *live]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(TARGETS)
    assert cli.main(["plan", *flags, "--batch", "8"]) == 0
    assert "detections: 407 bytes a row; boxes" in capsys.readouterr().out
    assert cli.main(["diff", str(path), "c"]) == 3


def test_two_caches_are_compared_by_the_items_that_both_hold(cache: sc.Cache, tmp_path: Path):
    other = build(tmp_path / "c", targets={"detections": "top(9, logits=f16)", "p3": "pool(2)|f16"})
    found = sc.diff(cache, other)["values"]
    assert 6 / 9 <= found["detections"]["shared"] < 1 and found["detections"]["boxes"] == 0
    few = build(tmp_path / "d", targets={"detections": "top(1)"}, views=1)
    assert sc.diff(few, build(tmp_path / "e", targets={"detections": "all"}, views=1))["same"] is False


def test_plan_counts_the_bytes(tmp_path: Path):
    options = {"source": ToyImages(400), "teacher": toy_detector()} | OPTIONS | {"progress": True}
    del options["progress"]
    found = sc.plan(tmp_path / "c", **options, pilot=100)
    sc.build(tmp_path / "c", **options, progress=False)
    real = sum(f.stat().st_size for f in (tmp_path / "c").rglob("*") if f.is_file())
    assert found.predicted_bytes == pytest.approx(real, rel=0.02)


def test_zarr_reads_every_field(path: Path, cache: sc.Cache):
    zarr = pytest.importorskip("zarr")
    group = zarr.open(str(path), mode="r")
    fields = set(group["targets/detections"])
    assert fields == {"boxes", "distribution", "distribution_low", "distribution_step", "index", "logits"}
    position = cache.grid.positions(np.array([7]))[0]
    kept = cache.read(1, np.array([7]), "detections")["detections"]
    assert np.array_equal(group["targets/detections/index"][1, position], kept.index[0])
    assert np.array_equal(group["constants/query_embed"][:], ToyDetector().constants()["query_embed"])


def test_a_dataset_yields_items_that_a_loader_stacks(cache: sc.Cache):
    torch_data = pytest.importorskip("torch.utils.data")
    dataset = sc.with_targets(ToyImages(SAMPLES), cache)
    batch = next(iter(torch_data.DataLoader(dataset, batch_size=4)))
    assert set(batch["detections"]) == {"index", "weight", "logits", "boxes", "distribution"}
    assert batch["detections"]["boxes"].shape == (4, 11, 4) and batch["detections"]["index"].shape == (4, 11)
    assert batch["p3.attention"]["spatial"].shape == (4, 5, 7) and batch["p3"].shape == (4, 6, 3, 4)


def test_the_trainers_batches_hold_items(cache: sc.Cache):
    pytest.importorskip("torch")
    from softcache_train.objectives.kd import kd
    from softcache_train.targets import CacheTargets

    batch = CacheTargets(cache)(0, np.arange(4))
    moved = batch["detections"].to("cpu")
    assert moved.values["boxes"].shape == (4, 11, 4) and not moved.constant()
    assert batch["p3.attention"].values["channel"].shape == (4, 6)
    import torch

    with pytest.raises(MismatchError, match="learns from logits, and this target has index, weight"):
        kd(torch.zeros(4, 4), batch["detections"])


def test_caches_of_two_detectors_are_read_as_one(path: Path, tmp_path: Path):
    build(tmp_path / "other", targets={"detections": "all"})
    both = sc.open([path, tmp_path / "other"])
    found = both.read(0, np.array([3, 5]), ["0.detections", "1.detections"])
    assert found["0.detections"].index.shape == (2, 11) and found["1.detections"].index.shape == (2, 21)
    assert found["1.detections"].layout == ToyDetector.layouts["detections"]
    assert both.targets["0.p3.attention"].kind == "attention_map"


# -- builds that stop, and others ------------------------------------------------------------------------------


def test_a_build_goes_on_after_an_error_at_any_moment(path: Path, tmp_path: Path):
    manifest, disk = (path / "softcache.json").read_bytes(), testing.CountingDisk()
    build(Store(tmp_path / "counted", disk))
    for n, step in enumerate(range(3, disk.operations, disk.operations // 12)):
        root = tmp_path / str(n)
        with pytest.raises(StoreError):
            build(Store(root, testing.FailingDisk(step)))
        assert sc.verify(build(root), read_data=True) == []
        assert (root / "softcache.json").read_bytes() == manifest


def test_a_build_goes_on_after_a_kill(tmp_path: Path):
    folder = testing.make_image_folder(tmp_path / "images")
    command = [
        sys.executable,
        "-m",
        "softcache.cli",
        "build",
        "--source",
        str(folder),
        "--recipe",
        "random_resized_crop(16)",
    ]
    command += ["--teacher", "softcache.testing:toy_detector", "--batch", "4", "--block-rows", "4"]
    command += [f"--target={name}={codec}" for name, codec in TARGETS.items()]
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, capture_output=True, timeout=120)
    root = tmp_path / "killed"
    slow = os.environ | {"SOFTCACHE_TOY_DELAY": "0.2"}
    process = subprocess.Popen([*command, "-o", str(root)], env=slow, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(root.glob("receipts/v*.json"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = sc.open(root)
    assert not begun.complete and begun.targets["detections"].layout == ToyDetector.layouts["detections"]
    with pytest.raises(NotBuilt, match="constants/head is written at the end"):
        begun.constant("constants/head")
    subprocess.run([*command, "-o", str(root)], check=True, capture_output=True, timeout=120)
    assert (root / "softcache.json").read_bytes() == (tmp_path / "whole" / "softcache.json").read_bytes()


def like(**changes: Any) -> ToyDetector:
    detector = toy_detector()
    detector.layouts = ToyDetector.layouts | {
        "detections": replace(ToyDetector.layouts["detections"], **changes)
    }
    return detector


def test_another_layout_is_another_build(path: Path, tmp_path: Path):
    import shutil

    copy = shutil.copytree(path, tmp_path / "c")
    for changes in ({"head": "other"}, {"score": "softmax"}, {"levels": ((2, 2), (4, 4), (1, 1))}):
        with pytest.raises(MismatchError, match=rf"targets\.detections\.layout\.{next(iter(changes))} is"):
            build(copy, teacher=like(**changes))
    assert build(copy).teacher_rows == 0


class Broken(ToyDetector):
    def __init__(self, change: Any):
        self.change = change

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        found = super().__call__(pixels)
        return found if len(pixels) == 1 else self.change(found)


def put(value: float) -> Any:
    def change(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found["detections"][2, 5, 6] = value
        return found

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_box_that_is_no_number_is_refused_with_its_image(tmp_path: Path, value: float):
    with pytest.raises(TeacherError, match=r"target 'detections' of the image '\d+' is not finite"):
        build(tmp_path / "c", teacher=Broken(put(value)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_of_noise_is_refused_without_a_warning(tmp_path: Path, value: float):
    class Bad(Broken):
        def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
            found = ToyDetector.__call__(self, pixels)
            found["detections"][0, 5, 6] = value
            return found

    with pytest.raises(TeacherError, match="a picture of noise with values that are not finite"):
        build(tmp_path / "c", teacher=Bad(None))


def test_a_box_far_outside_is_kept_at_the_border(tmp_path: Path):
    cache = build(tmp_path / "c", teacher=Broken(put(30.0)), targets={"detections": "all"}, batch=4)
    assert cache.read(0, np.arange(SAMPLES))["detections"].parts["boxes"].max() == pytest.approx(1.5)
    fidelity = cache.manifest.report.fidelity["detections"]  # type: ignore[union-attr]
    assert fidelity["boxes_clipped"] > 0 and fidelity["boxes_max"] < 1.6e-5


def test_a_teacher_that_answers_in_pixels_is_refused(tmp_path: Path):
    def in_pixels(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found["detections"][..., 4:8] *= 640
        return found

    with pytest.raises(
        TeacherError, match=r"'detections': the boxes' coordinates are .* does the teacher answer in pixels"
    ):
        build(tmp_path / "c", teacher=Broken(in_pixels))


def test_an_unknown_constant_is_a_matter_of_usage(cache: sc.Cache):
    with pytest.raises(SpecError, match=r"no constant 'zzz' \(known: constants/head, constants/query"):
        cache.constant("zzz")
    with pytest.raises(DamageError):
        cache.constant("canary/nothing")


def test_a_target_of_which_nothing_is_left_is_told(tmp_path: Path, capsys):
    for share, lost in ((1e-12, True), (1, False)):
        small = Broken(lambda found, share=share: found | {"p3": found["p3"] * np.float32(share)})
        build(tmp_path / str(lost), teacher=small, targets={"p3": "f16"}, progress=True)
        assert ("NOTE: nothing of it is left" in capsys.readouterr().err) == lost


def test_a_limit_that_was_forgotten_is_told(tmp_path: Path):
    build(tmp_path / "c", source=sc.Source(ToyImages(SAMPLES), limit=8), views=1)
    with pytest.raises(MismatchError, match=r"was it built with a limit\? Say --limit 8"):
        sc.extend(tmp_path / "c", source=ToyImages(SAMPLES), teacher=toy_detector(), views=2, progress=False)


def test_a_mosaic_of_views_of_any_proportions_is_told(tmp_path: Path, capsys):
    for recipe, told in (("flip|mosaic", True), ("mosaic(16)", False)):
        build(tmp_path / recipe, recipe=recipe, progress=True, targets={"detections": "all"}, views=1)
        assert ("say mosaic((16, 16)), whose tiles keep theirs" in capsys.readouterr().err) == told


def test_what_is_kept_otherwise_than_asked_is_told(tmp_path: Path):
    for targets, told in (
        ({"p3": "all"}, r"'p3' is a map \(6, 5, 7\), and 'all' holds items: codecs for maps are .*int8"),
        ({"p3.attention": "int8"}, r"p3.attention=attention\(0.5\) is kept of the map 'p3'"),
        ({"p3": "pool(2)|foreground(10)"}, r"say foreground\(10, pool=2\)"),
    ):
        with pytest.raises(sc.SoftcacheError, match=told):
            build(tmp_path / "c", targets=targets)


def test_what_is_stretched_is_told(tmp_path: Path, capsys):
    for recipe, told in (("resize((8, 16))", True), ("letterbox(32)", False), ("flip", False)):
        build(tmp_path / recipe, recipe=recipe, progress=True, targets={"detections": "all"})
        assert (
            "views are 16x8 and the teacher sees 16x16: they are stretched" in capsys.readouterr().err
        ) == told


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"targets": {"detections": "top(22)"}}, CodecError, "keeps 22 items, and the teacher gives 21"),
        ({"targets": {"queries": "top(3)"}}, CodecError, "several layers"),
        ({"targets": {"detection": "all"}}, TeacherError, "no target 'detection' .did you mean 'detections'"),
        ({"targets": {"p3": "all"}}, CodecError, "'p3' is a map .6, 5, 7., and 'all' holds items"),
        ({"targets": {"p3": "attention(0)"}}, SpecError, "tau must be a number above 0"),
        ({"targets": {"p4.attention": "attention"}}, TeacherError, "no target 'p4'"),
        ({"targets": {"queries": "pool(2)|int8"}}, CodecError, "codecs for it: all, top"),
        ({"teacher": like(levels=((4, 4),))}, TeacherError, "levels of its layout have 16 cells"),
        ({"flip_tta": True}, SpecError, "'detections' has no mean over an image and its mirror"),
        (
            {"teacher": [toy_detector(), toy_detector()]},
            TeacherError,
            "have no target 'detections'.*'0.logits'",
        ),
    ],
)
def test_what_cannot_be_built_is_one_line_and_writes_nothing(
    tmp_path: Path, options: Any, kind: type, told: str
):
    with pytest.raises(kind, match=told) as caught:
        build(tmp_path / "c", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "c" / "receipts").exists()


def test_two_detectors_run_as_one_each_with_its_items(tmp_path: Path):
    targets = {"0.detections": "top(3)", "1.queries": "all", "1.p3.attention": "attention(1.0)"}
    cache = build(tmp_path / "c", teacher=[toy_detector(), toy_detector()], targets=targets)
    found = cache.read(1, np.arange(SAMPLES))
    assert found["0.detections"].index.shape == (SAMPLES, 3)
    assert cache.targets["1.queries"].layout == ToyDetector.layouts["queries"]
    assert np.array_equal(cache.constant("constants/1/head"), np.arange(9))
    assert sc.verify(cache, read_data=True) == []


# -- constants -------------------------------------------------------------------------------------------------


def test_constants_are_written_once_and_verified(path: Path, cache: sc.Cache, tmp_path: Path):
    for name, values in toy_detector().constants().items():
        assert np.array_equal(cache.constant(f"constants/{name}"), values)
        assert cache.constant(f"constants/{name}").dtype == values.dtype
    import shutil

    copy = Path(shutil.copytree(path, tmp_path / "c"))
    testing.flip_bit(copy / "constants" / "head" / "c.0")
    assert [d.file for d in sc.verify(copy, read_data=True)] == ["constants/head/c.0"]


@pytest.mark.parametrize(
    ("constants", "told"),
    [
        ({"a b": np.zeros(3)}, "named 'a b'"),
        ({"../x": np.zeros(3, np.float32)}, r"named '\.\./x'"),
        ({"x": np.zeros(3)}, "is float64"),
        ({"x": np.float32(3)}, r"float32 \(\)"),
        ({"x": np.zeros((0, 3), np.float32)}, r"\(0, 3\)"),
        ({"x": np.array(["a"])}, "at least one number"),
    ],
)
def test_what_is_no_constant_is_refused_before_the_build(tmp_path: Path, constants: Any, told: str):
    detector = toy_detector()
    detector.constants = lambda: constants  # type: ignore[method-assign]
    with pytest.raises(TeacherError, match=told):
        build(tmp_path / "c", teacher=detector)
    assert not (tmp_path / "c" / "receipts").exists()


# -- modules ---------------------------------------------------------------------------------------------------


def make_module() -> Any:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        input_spec = {"size": (16, 16), "mean": (0, 0, 0), "std": (1, 1, 1)}  # noqa: RUF012
        layouts = {"one2one.detections": sc.Layout({"logits": 3, "boxes": 4}, levels=((4, 4),))}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.neck = torch.nn.Conv2d(3, 7, 4, stride=4)

        def forward(self, x: Any) -> Any:
            p2 = self.neck(x)
            return {"one2one.detections": p2.flatten(2).transpose(1, 2), "p2": p2, "note": "text"}

        def constants(self) -> Any:
            return {"bias": self.neck.bias}

    torch.manual_seed(0)
    return Net()


def test_a_module_may_answer_by_name(tmp_path: Path):
    module = make_module()
    targets = {
        "one2one.detections": "all(logits=f16)",
        "p2": "f16",
        "neck": "f16",
        "neck.attention": "attention",
    }
    cache = build(tmp_path / "c", teacher=module, targets=targets, ignore_labels=True)
    found = cache.read(0, np.arange(SAMPLES))
    assert np.array_equal(found["p2"].values, found["neck"].values)
    maps = found["p2"].values.reshape(SAMPLES, 7, 16).transpose(0, 2, 1).copy()
    maps[..., 3:] = maps[..., 3:].clip(-0.5, 1.5)
    assert np.allclose(found["one2one.detections"].dense(), maps, atol=1e-3)
    assert np.allclose(cache.constant("constants/bias"), module.neck.bias.detach().numpy())
    for name, told in (("p22", "no target 'p22'.*'p2'"), ("note", "no target 'note'")):
        with pytest.raises(TeacherError, match=told):
            build(tmp_path / "d", teacher=module, targets={name: "f16"}, ignore_labels=True)


# -- signed by an enemy ----------------------------------------------------------------------------------------

LAYOUT = ("identity", "targets", "detections", "layout")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (at(*LAYOUT, to=[]), DamageError),
        (at(*LAYOUT, to={}), DamageError),
        (at(*LAYOUT, "more", to=1), DamageError),
        (at(*LAYOUT, "columns", to={"logits": 24}), DamageError),
        (at(*LAYOUT, "columns", to=[["logits"]]), DamageError),
        (at(*LAYOUT, "columns", to=[["logits", "4"]]), DamageError),
        (at(*LAYOUT, "background", to=True), DamageError),
        (at(*LAYOUT, "levels", to=[[4, 4, 4]]), DamageError),
        (at(*LAYOUT, to=None), DamageError),
        (lambda v: v["identity"]["targets"]["detections"].pop("layout"), MismatchError),
        (at(*LAYOUT, "columns", to=[]), MismatchError),
        (at(*LAYOUT, "columns", to=[["logits", 20], ["boxes", 5]]), MismatchError),
        (at(*LAYOUT, "columns", to=[["logits", 1 << 40], ["boxes", 4]]), MismatchError),
        (at(*LAYOUT, "columns", to=[["logits", -1], ["boxes", 4], ["deltas", 21]]), MismatchError),
        (at(*LAYOUT, "columns", to=[["embedding", 24]]), MismatchError),
        (at(*LAYOUT, "columns", to=[["__class__", 24]]), MismatchError),
        (at(*LAYOUT, "score", to="eval"), MismatchError),
        (at(*LAYOUT, "background", to=9), MismatchError),
        (at(*LAYOUT, "levels", to=[[0, 4]]), MismatchError),
        (at(*LAYOUT, "levels", to=[[1 << 40, 1 << 40]]), MismatchError),
        (at(*LAYOUT, "levels", to=[[1, 1]] * 20), MismatchError),
        (at(*LAYOUT, "levels", to=[[1, 1]] * 100_000), MismatchError),
        (at(*LAYOUT, "layers", to=0), MismatchError),
        (at(*LAYOUT, "layers", to=7), MismatchError),
        (at("identity", "targets", "detections", "codec", to="top(1000000000)"), MismatchError),
        (at("identity", "targets", "detections", "codec", to="top(1, background=1000000000)"), MismatchError),
        (at("identity", "targets", "detections", "codec", to="top(1, layout=3)"), MismatchError),
        (at("identity", "targets", "detections", "shape", to=[1 << 24, 24]), MismatchError),
        (at("identity", "targets", "p3", "codec", to="pool(0)|int8"), MismatchError),
        (at("identity", "targets", "p3", "shape", to=[6, 5]), MismatchError),
        (at("identity", "targets", "p3.attention", "shape", to=[1, 1 << 24, 1]), MismatchError),
    ],
)
def test_a_layout_that_lies_is_refused(path: Path, tmp_path: Path, change: Any, kind: type):
    import shutil

    copy = Path(shutil.copytree(path, tmp_path / "c"))
    sign(copy, change)
    refused(copy, kind)


def test_a_giant_target_opens_at_once_and_allocates_nothing(path: Path, tmp_path: Path):
    import shutil

    copy = Path(shutil.copytree(path, tmp_path / "c"))

    def giant(value: Any) -> None:
        value["identity"]["targets"]["detections"] |= {"shape": [1 << 24, 24], "codec": "all"}
        value["identity"]["targets"]["detections"]["layout"]["levels"] = [[1 << 12, 1 << 12]]

    sign(copy, giant)
    code = f"""
import resource, numpy as np
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
import softcache as sc
from softcache.errors import DamageError
try:
    sc.open({str(copy)!r}).read(0, np.arange(3))
except DamageError as e:
    print(e)
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0 and done.stdout, done.stderr
