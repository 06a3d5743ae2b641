"""A build is what was asked for, or one line that names what is wrong and leaves the folder as it was."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL

import softcache as sc
from softcache import job
from softcache import manifest as m
from softcache.errors import (
    CodecError,
    MismatchError,
    SoftcacheError,
    SourceError,
    SpecError,
    TeacherError,
)
from softcache.source import Source
from softcache.store import Disk, Store
from softcache.testing import ToyImages, ToyTeacher, make_image_folder, toy_teacher


def build(out: Path | Store, source: Any, **options: Any) -> sc.Cache:
    return sc.build(out, source=source, **{"teacher": toy_teacher(), **SMALL, **options})


def snapshot(path: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's content and inode."""
    found = sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): (p.read_bytes(), p.stat().st_ino) for p in found}


def logits_teacher(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    """The toy teacher with its logits changed."""

    def teacher(pixels: np.ndarray) -> np.ndarray:
        return change(toy_teacher()(pixels)["logits"].copy())

    teacher.input_spec = {"size": (8, 8)}
    return teacher


# -- refusing to mix (promise 2) -------------------------------------------------------------------------------


class Reweighted(ToyTeacher):
    weights_digest = "0" * 64


REFUSED = {
    "recipe": ({"recipe": "flip"}, r"recipe\.spec is random_resized_crop\(8\)\|flip there and flip here"),
    "seed": ({"seed": 1}, r"grid\.key is 0 there and 1 here"),
    "views": ({"views": 3}, r"grid\.views is 2 there and 3 here"),
    "block_rows": ({"block_rows": 4}, r"grid\.block_rows is 8 there and 4 here"),
    "batch": ({"batch": 8}, r"teacher\.batch is 4 there and 8 here"),
    "codec": (
        {"targets": SMALL["targets"] | {"logits": "full(f16)"}},
        r"targets\.logits\.codec is full\(u8\) there",
    ),
    "another target": ({"targets": {"logits": "full(u8)"}}, r"targets\.map"),
    "one more target": ({"targets": SMALL["targets"] | {"x": "f16"}}, r"targets\.x"),
    "input size": ({"input_size": (8, 9)}, r"teacher\.input_spec\.size"),
    "the teacher's name": (
        {"teacher": logits_teacher(lambda x: x)},
        r"teacher\.name is softcache\.testing:ToyTeacher",
    ),
    "the teacher's weights": ({"teacher": Reweighted()}, r"teacher\.weights"),
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "half"])
@pytest.mark.parametrize(("options", "told"), REFUSED.values(), ids=REFUSED)
def test_another_build_is_not_mixed_in_and_the_field_is_named(
    small_copy: Path, small_folder: Path, options: dict, told: str, finished: bool
):
    if not finished:
        (small_copy / m.MANIFEST).unlink()
        (small_copy / "receipts" / "v0001-b000001.json").unlink()
    before = snapshot(small_copy)
    with pytest.raises(MismatchError, match=told) as caught:
        build(small_copy, small_folder, **options)
    assert caught.value.exit_code == 3 and "or name another folder" in str(caught.value)
    assert snapshot(small_copy) == before


def test_another_source_is_not_mixed_in(small_copy: Path, small_folder: Path, tmp_path: Path):
    images = Path(shutil.copytree(small_folder, tmp_path / "images"))
    before = snapshot(small_copy)
    shutil.copy(images / "ant" / "0000.png", images / "ant" / "0004.png")
    with pytest.raises(MismatchError, match=r"source\.content"):
        build(small_copy, images)
    (images / "bee").rename(images / "bug")
    with pytest.raises(MismatchError, match=r"source\.classes"):
        build(small_copy, images)
    with pytest.raises(MismatchError, match=r"source\.ids"):
        build(small_copy, images, limit=10)
    assert snapshot(small_copy) == before


def test_the_same_build_again_changes_nothing_and_runs_no_teacher(
    small_copy: Path, small_folder: Path, monkeypatch
):
    before = snapshot(small_copy)
    monkeypatch.setattr(ToyTeacher, "__call__", None)
    cache = build(small_copy, small_folder)
    assert snapshot(small_copy) == before and cache.complete


def test_a_build_goes_on_where_it_stopped(small_copy: Path, small_folder: Path, tmp_path: Path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("SOFTCACHE_TOY_LOG", str(log))
    whole = snapshot(small_copy)
    (small_copy / m.MANIFEST).unlink()
    (small_copy / "receipts" / "v0001-b000002.json").unlink()
    build(small_copy, small_folder)
    probed = 4 * 16  # the map's probe: sixteen images, as they are, once more, mirrored, zoomed
    assert len(log.read_text().split()) == 4 + probed  # the rows of that block
    again = snapshot(small_copy)
    assert {n: data for n, (data, _) in again.items()} == {n: data for n, (data, _) in whole.items()}
    shards = {n for n in whole if re.match(r"(targets|view)/.*/c\.", n)}
    assert {n for n in shards if whole[n][1] != again[n][1]} == {n for n in shards if "/c.1.2" in n}


@pytest.mark.parametrize("path", ["elsewhere", "here"])
def test_neither_the_folder_nor_the_number_of_threads_changes_a_byte(
    small_path: Path, small_folder: Path, tmp_path: Path, path: str
):
    cache = build(tmp_path / path / "deep", small_folder, workers=1 if path == "here" else 4)
    mine, theirs = snapshot(cache.path), snapshot(small_path)
    assert {n: data for n, (data, _) in mine.items()} == {n: data for n, (data, _) in theirs.items()}


# -- folders that hold something else --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["thesis.txt", "a/b.txt", ".hidden", "softcache.json", "receipts/v0000-b000000.json"]
)
def test_a_folder_that_holds_something_else_is_refused_and_untouched(
    tmp_path: Path, small_folder: Path, name: str
):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(MismatchError, match=rf"holds something else, for example '{name}'"):
        build(tmp_path / "out", small_folder)
    assert snapshot(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, small_folder: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SpecError, match="is a file: name a folder"):
        build(tmp_path / "out", small_folder)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_will_do(tmp_path: Path):
    (tmp_path / "out").mkdir()
    assert build(tmp_path / "out", ToyImages(3)).complete


def test_an_edited_manifest_is_not_built_over(small_copy: Path, small_folder: Path):
    file = small_copy / m.MANIFEST
    file.write_bytes(file.read_bytes().replace(b'"top1":', b'"top2":'))
    before = snapshot(small_copy)
    with pytest.raises(SoftcacheError) as caught:
        build(small_copy, small_folder)
    assert caught.value.exit_code == 2 and snapshot(small_copy) == before


def test_metadata_of_zarr_is_written_anew(small_copy: Path, small_folder: Path):
    before = snapshot(small_copy)
    (small_copy / "zarr.json").unlink()
    (small_copy / "targets" / "map" / "value" / "zarr.json").write_text("{}")
    build(small_copy, small_folder)
    assert {n: d for n, (d, _) in snapshot(small_copy).items()} == {n: d for n, (d, _) in before.items()}


# -- what the teacher says -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ["full(u8)", "full(f16)"])
def test_one_number_that_is_not_finite_is_refused_with_its_image(tmp_path: Path, value: float, codec: str):
    """The rows of the batch that are padding may be anything; a row of the dataset may not."""

    def spoil(logits: np.ndarray) -> np.ndarray:
        first = logits[:, 0] == marked
        logits[first, 2] = value
        return logits

    images = ToyImages(11)
    source, size = Source(images), (8, 8)
    view = sc.Recipe("identity", 0).view("7", 0, *images[7][0].shape[1::-1])
    marked = toy_teacher()(sc.render(source.image(7), view, size)[None])["logits"][0, 0]
    with pytest.raises(
        TeacherError, match=r"'logits' of the image '7' is not finite.*normalisation"
    ) as caught:
        build(
            tmp_path / "c",
            images,
            teacher=logits_teacher(spoil),
            recipe="identity",
            targets={"logits": codec},
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c" / m.MANIFEST).exists()


def test_what_the_padding_of_a_batch_gives_does_not_matter(tmp_path: Path):
    """Five images in batches of four: three rows of the second batch are nobody's."""

    def spoil(logits: np.ndarray) -> np.ndarray:
        return np.where(logits == black, np.nan, logits)

    black = toy_teacher()(np.zeros((1, 8, 8, 3), np.uint8))["logits"]
    teacher = logits_teacher(spoil)
    cache = build(tmp_path / "c", ToyImages(5), teacher=teacher, targets={"logits": "full(u8)"})
    assert np.isfinite(cache.read(0, np.arange(5))["logits"].values).all()


@pytest.mark.parametrize(("codec", "limit"), [("full(u8)", 32752), ("full(f16)", 32752)])
def test_values_past_the_codec_are_refused_and_values_at_it_are_not(tmp_path: Path, codec: str, limit: float):
    def teacher_of(top: float):
        return logits_teacher(lambda logits: np.clip(logits * 1e9, -top, top).astype(np.float32))

    with pytest.raises(
        TeacherError, match=rf"reaches \S+, past {limit}: '{re.escape(codec)}' cannot hold it"
    ):
        build(tmp_path / "a", ToyImages(5), teacher=teacher_of(limit + 1), targets={"logits": codec})
    build(tmp_path / "b", ToyImages(5), teacher=teacher_of(limit), targets={"logits": codec})


def test_a_target_the_teacher_does_not_have_lists_those_it_has(tmp_path: Path):
    with pytest.raises(TeacherError, match=r"no target 'mapp' .did you mean 'map'"):
        build(tmp_path / "c", ToyImages(3), targets={"mapp": "int8"})
    assert not (tmp_path / "c").exists()


def test_a_codec_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(CodecError, match="codecs for it: f16, foreground, int4, int8, sign"):
        build(tmp_path / "c", ToyImages(3), targets={"map": "full(u8)"})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "answer",
    [
        lambda p: np.zeros((len(p) + 1, 4)),
        lambda p: np.zeros((4,)) if len(p) > 1 else np.zeros((1, 4)),
        lambda p: np.zeros((len(p), 4 if len(p) == 1 else 5)),
        lambda p: {"logits": np.zeros((len(p), 4))} if len(p) == 1 else {"other": np.zeros((len(p), 4))},
    ],
    ids=["a row too many", "no batch axis", "another width", "another name"],
)
def test_an_answer_of_another_shape_is_refused(tmp_path: Path, answer):
    answer.input_spec = {"size": (8, 8)}
    with pytest.raises(TeacherError, match=r"'logits': the teacher gave .* for a batch of 4 rows of \(4,\)"):
        build(tmp_path / "c", ToyImages(5), teacher=answer, targets={"logits": "full(u8)"})


def test_a_teacher_of_other_classes_is_refused_unless_labels_are_ignored(tmp_path: Path):
    teacher = logits_teacher(lambda logits: np.repeat(logits, 2, axis=1))
    with pytest.raises(MismatchError, match=r"8 classes and the source names 4.*--ignore-labels"):
        build(tmp_path / "c", ToyImages(5), teacher=teacher, targets={"logits": "full(u8)"})
    cache = build(
        tmp_path / "c", ToyImages(5), teacher=teacher, targets={"logits": "full(u8)"}, ignore_labels=True
    )
    assert cache.classes is None and cache.manifest is not None and cache.manifest.report.top1 is None


# -- top-1 and the other numbers of the report -----------------------------------------------------------------


def label_of(images: ToyImages, wrong: set[int]) -> Callable[..., Any]:
    """A teacher that knows the class of every image but some, from its mean colour."""
    means = {}
    for i in range(len(images)):
        image, label = images[i]
        means[round(float(image.mean()), 4)] = (label + 1) % 4 if i in wrong else label

    class Oracle:
        input_spec = {"size": (8, 8)}  # noqa: RUF012

        def __init__(self):
            self.labels = means

        def __call__(self, pixels: np.ndarray) -> np.ndarray:
            labels = [self.labels.get(round(float(p.mean()), 4), 0) for p in pixels]
            return np.eye(4, dtype=np.float32)[labels]

    return Oracle()


class Flat(ToyImages):
    """Images of one colour each, so that no crop changes what they are."""

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return np.full((8, 8, 3), 3 + 5 * i, np.uint8), self.targets[i]


def test_top1_of_what_was_cached_is_told_and_kept(tmp_path: Path, capsys):
    images = Flat(20)
    cache = build(
        tmp_path / "c",
        images,
        teacher=label_of(images, wrong={3, 4, 5}),
        targets={"logits": "full(u8)"},
        recipe="flip",
        progress=True,
    )
    report = cache.manifest.report
    assert report.labelled == 40 and report.top1 == pytest.approx(17 / 20)
    assert "top-1 of what was cached against the labels: 85.00% of 40 rows" in capsys.readouterr().err


class Unlabelled(ToyImages):
    def __init__(self, n: int):
        super().__init__(n)
        self.targets = [-1] * n


def test_without_labels_there_is_no_top1(tmp_path: Path):
    report = build(tmp_path / "c", Unlabelled(5)).manifest.report
    assert report.labelled == 0 and report.top1 is None


def test_the_report_says_how_faithful_and_how_large(small_cache: sc.Cache):
    report = small_cache.manifest.report
    assert report.bytes_per_row == {"logits": 4 + 4, "map": 4096 + 2 * 16, "vector": 48}
    assert 0 < report.fidelity["logits"]["kl_T1"] < 1e-2 and report.fidelity["vector"]["relative_l2"] < 1e-3
    assert report.fidelity["map"]["cosine"] > 0.9999
    shards = [
        p
        for p in small_cache.path.rglob("c.*")
        if p.relative_to(small_cache.path).parts[0] in ("targets", "view")
    ]
    assert report.bytes == sum(p.stat().st_size for p in shards)


# -- images that cannot be read --------------------------------------------------------------------------------


@pytest.fixture
def corrupt(tmp_path: Path) -> Path:
    images = make_image_folder(tmp_path / "images", per_class=5)
    (images / "ant" / "0000.png").write_bytes(b"")
    (images / "cow" / "0006.png").write_bytes((images / "cow" / "0006.png").read_bytes()[:-40])
    return images


def test_unreadable_images_are_refused_with_all_their_ids(tmp_path: Path, corrupt: Path):
    with pytest.raises(
        SourceError, match=r"2 images cannot be read: 'ant/0000\.png', 'cow/0006\.png'\. Say --skip"
    ):
        build(tmp_path / "c", corrupt)
    assert not (tmp_path / "c" / m.MANIFEST).exists()


def test_skip_corrupt_keeps_the_rows_and_lists_them(tmp_path: Path, corrupt: Path):
    cache = build(tmp_path / "c", corrupt, skip_corrupt=True)
    assert cache.samples == 20 and [cache.ids[i] for i in cache.invalid] == ["ant/0000.png", "cow/0006.png"]
    assert cache.manifest.report.labelled == 36
    assert sc.verify(cache, read_data=True) == []
    assert not set(cache.invalid.tolist()) & set(cache.constant("canary/sample").tolist())
    sc.pair(cache, Source(corrupt))


def test_rows_of_good_images_do_not_change_when_others_are_skipped(
    tmp_path: Path, corrupt: Path, small_cache
):
    """Views and values are functions of the sample, never of its neighbours."""
    cache = build(tmp_path / "c", corrupt, skip_corrupt=True)
    good = np.setdiff1d(np.arange(20), cache.invalid)
    for view in range(2):
        mine, theirs = cache.read(view, good), small_cache.read(view, good)
        assert all(np.array_equal(mine[n].values, theirs[n].values) for n in mine)


def test_a_build_refused_for_its_images_can_go_on_with_skip_corrupt(tmp_path: Path, corrupt: Path):
    with pytest.raises(SourceError):
        build(tmp_path / "c", corrupt)
    again = build(tmp_path / "c", corrupt, skip_corrupt=True)
    assert again.digest == build(tmp_path / "d", corrupt, skip_corrupt=True).digest


def test_a_whole_batch_of_unreadable_images_is_skipped(tmp_path: Path, small_folder: Path):
    """The first batch of a block is the one whose fidelity is measured: here it has no row to measure."""
    images = Path(shutil.copytree(small_folder, tmp_path / "images"))
    grid, ids = sc.open(build(tmp_path / "a", images).path).grid, Source(images).ids
    lost = grid.samples_of(grid.block(0, 1))[:4]
    for i in lost:
        (images / ids[i]).write_bytes(b"")
    cache = build(tmp_path / "b", images, skip_corrupt=True)
    assert cache.invalid.tolist() == sorted(lost.tolist())
    assert cache.manifest.report.fidelity["map"]["cosine"] > 0.9999


def test_when_no_image_can_be_read_there_is_no_cache(tmp_path: Path, corrupt: Path):
    for path in corrupt.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(SourceError, match="none of the 20 images"):
        build(tmp_path / "c", corrupt, skip_corrupt=True)


# -- what is asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"views": 0}, SoftcacheError, "views"),
        ({"batch": 0}, SpecError, "at least 1"),
        ({"block_rows": 0}, SpecError, "from 1"),
        ({"workers": 0}, SpecError, "at least 1"),
        ({"rank": 2, "world": 2}, SpecError, "rank 2 of world 2"),
        ({"rank": -1}, SpecError, "rank -1"),
        ({"recipe": "crap(8)"}, SpecError, "did you mean 'crop'"),
        ({"recipe": "crop(50)"}, SpecError, "larger than its canvas"),
        ({"targets": {}}, SpecError, "no target"),
        (
            {"targets": {"logits": "int8"}},
            CodecError,
            "codecs for it: anchored, argmax, full, head, packed, sample, topk",
        ),
        ({"precision": "f8"}, SpecError, "precision"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_one_line(tmp_path: Path, options: dict, error, told: str):
    with pytest.raises(error, match=told) as caught:
        build(tmp_path / "c", ToyImages(5), **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c" / m.MANIFEST).exists()


def test_a_source_that_was_made_already_takes_no_more_options(tmp_path: Path, small_folder: Path):
    with pytest.raises(SpecError, match="belong to the Source"):
        build(tmp_path / "c", Source(small_folder), limit=3)


@pytest.mark.parametrize("size", [9, (9, 9)])
def test_a_square_input_is_one_number_or_two(tmp_path: Path, size):
    cache = build(tmp_path / "c", ToyImages(3), input_size=size)
    assert cache.identity["teacher"]["input_spec"]["size"] == [9, 9]
    assert cache.constant("canary/pixels").shape[1:] == (9, 9, 3)


@pytest.mark.parametrize(("samples", "batch"), [(3, 64), (64, 64), (100, 64), (300, 64), (300, 7)])
def test_blocks_are_whole_batches_by_default(tmp_path: Path, samples: int, batch: int):
    """What is padding is computed for nothing."""
    cache = build(
        tmp_path / "c", ToyImages(samples), block_rows=None, batch=batch, targets={"logits": "full(u8)"}
    )
    rows, asked = cache.grid.block_rows, cache.identity["teacher"]["batch"]
    assert asked <= batch and rows % asked == 0
    computed = sum(-(-b.rows // asked) * asked for b in cache.grid.blocks())
    assert computed - samples * cache.views < batch * cache.views


def test_blocks_hold_about_so_many_bytes_by_default(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(job, "_BLOCK_BYTES", 16 * 4128)
    cache = build(tmp_path / "c", ToyImages(200), block_rows=None, batch=4, targets={"map": "int8"}, views=1)
    assert 8 <= cache.grid.block_rows <= 16


def test_what_is_progress_goes_to_stderr_and_can_be_silenced(tmp_path: Path, capsys):
    build(tmp_path / "a", ToyImages(5), progress=False)
    assert capsys.readouterr() == ("", "")
    build(tmp_path / "b", ToyImages(5), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "rows through the teacher" in err and "the limit was" in err and "digest" in err


def test_the_identity_names_what_changes_values_and_no_place(small_cache: sc.Cache, small_folder: Path):
    identity = small_cache.identity
    assert set(identity) == {"version", "source", "recipe", "teacher", "targets", "grid", "libraries"}
    assert {"softcache", "numpy", "numcodecs", "machine"} <= set(identity["libraries"])
    assert {"pillow", "simplejpeg"} == set(identity["source"]["decoder"])
    assert str(small_folder) not in json.dumps(identity)


class Watched(Disk):
    """A slow disk that asks, at each shard written, whether another builder could claim its block."""

    def __init__(self) -> None:
        self.claimed_by_another: list[bool] = []

    def sync_file(self, fd: int, path: Path) -> None:
        if found := re.search(r"logits/value/c\.(\d)\.(\d)", str(path)):
            time.sleep(0.2)
            root = path.parents[3]
            with Store(root).claim(f"v{int(found[1]):04d}-b{int(found[2]):06d}") as mine:
                self.claimed_by_another.append(mine)
        super().sync_file(fd, path)


def test_a_block_stays_claimed_until_it_is_written_though_the_build_fails_meanwhile(tmp_path: Path):
    """Or another builder would write the same temporary files at the same time."""
    disk, calls = Watched(), []

    def teacher(pixels: np.ndarray) -> np.ndarray:
        calls.append(len(pixels))
        if len(calls) > 4:  # after the probe, with the first blocks still being written
            raise RuntimeError("the teacher went away")
        return toy_teacher()(pixels)["logits"]

    teacher.input_spec = {"size": (8, 8)}
    options = {"targets": {"logits": "full(u8)"}, "teacher": teacher, "block_rows": 4}
    with pytest.raises(TeacherError, match="went away"):
        build(Store(tmp_path / "c", disk), ToyImages(20), **options)
    assert (
        disk.claimed_by_another == [False] * len(disk.claimed_by_another) and len(disk.claimed_by_another) > 1
    )


# -- the teacher's rows ------------------------------------------------------------------------------------------


def test_the_teachers_rows_are_counted_and_none_are_asked_twice(tmp_path: Path):
    first = build(tmp_path / "c", ToyImages(20))
    assert first.teacher_rows == first.samples * first.views
    assert build(tmp_path / "c", ToyImages(20)).teacher_rows == 0
    (tmp_path / "c" / "softcache.json").unlink()
    next((tmp_path / "c" / "receipts").glob("v0000-b000001.json")).unlink()
    assert build(tmp_path / "c", ToyImages(20)).teacher_rows == first.grid.block_rows
    assert sc.open(tmp_path / "c").teacher_rows == 0


# -- another teacher under the same name ---------------------------------------------------------------------------


def test_a_callable_that_names_no_weights_is_told_by_its_answers(tmp_path: Path):
    def teacher(factor: float):
        def answer(pixels: np.ndarray) -> np.ndarray:
            rows = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
            return factor * rows[:, :4]

        answer.input_spec = {"size": 8}  # type: ignore[attr-defined]
        return answer

    first = build(tmp_path / "c", ToyImages(8), teacher=teacher(1), targets=["logits=full(f16)"])
    assert (
        build(tmp_path / "c", ToyImages(8), teacher=teacher(1), targets=["logits=full(f16)"]).digest
        == first.digest
    )
    with pytest.raises(MismatchError, match=r"teacher\.answer"):
        build(tmp_path / "c", ToyImages(8), teacher=teacher(-5), targets=["logits=full(f16)"])


def test_a_dataset_that_never_gives_the_same_image_is_refused(tmp_path: Path):
    class Random(ToyImages):
        def __getitem__(self, i: int):
            return np.random.default_rng().integers(0, 256, (8, 8, 3), np.uint8), self.targets[i]

    with pytest.raises(SourceError, match="random transforms"):
        build(tmp_path / "c", Random(8))


def test_labels_are_part_of_the_identity(tmp_path: Path):
    swapped = ToyImages(8)
    swapped.targets = swapped.targets[::-1]
    build(tmp_path / "c", ToyImages(8))
    with pytest.raises(MismatchError, match=r"source\.labels"):
        build(tmp_path / "c", swapped)
