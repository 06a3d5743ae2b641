"""New samples are a second cache, opened together with the first: read as one, with all samples of both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache.errors import MismatchError, SpecError
from softcache.several import Joined
from softcache.testing import ToyTeacher, make_image_folder

SETTINGS: dict[str, Any] = {
    "recipe": "random_resized_crop(8)|flip",
    "views": 2,
    "batch": 4,
    "block_rows": 8,
    "targets": {"logits": "topk(2)", "map": "int8", "vector": "f16"},
    "progress": False,
}
MIXED = "random_resized_crop(8)|color_jitter(0.4,0.4,0.4)|mosaic|mixup(0.8)"


class Other(ToyTeacher):
    weights_digest = "5" * 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All images, and those of two parts: every third is in the second."""
    base = tmp_path_factory.mktemp("images")
    every = make_image_folder(base / "every", per_class=6)
    for i, path in enumerate(sorted(every.rglob("*.png"))):
        copy = base / ("new" if i % 3 == 0 else "old") / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return [every, base / "old", base / "new"]


def build(path: Path, source: Path, **options: Any) -> sc.Cache:
    return sc.build(path, source=source, **{"teacher": ToyTeacher(), **SETTINGS, **options})


@pytest.fixture(scope="module", params=[SETTINGS["recipe"], MIXED], ids=["alone", "mixed"])
def joined(request: Any, folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("caches")
    paths = [build(out / p.name, p, recipe=request.param).path for p in folders[1:]]
    found = sc.open(paths)
    assert isinstance(found, Joined)
    return found


def test_rows_are_those_of_each(joined: Joined):
    a, b = joined.members
    assert (a.samples, b.samples, joined.samples, len(joined)) == (16, 8, 24, 24)
    assert (
        joined.ids == (*a.ids, *b.ids)
        and joined.index(b.ids[3]) == 19
        and joined.targets.keys() == a.targets.keys()
    )
    samples = np.random.default_rng(0).permutation(24)[:17]
    found = joined.read(1, samples)
    for place, sample in enumerate(samples.tolist()):
        one, number = (a, sample) if sample < 16 else (b, sample - 16)
        own = one.read(1, np.array([number]))
        assert np.array_equal(found["logits"].index[place], own["logits"].index[0])
        for name in ("map", "vector"):
            assert np.array_equal(found[name].values[place], own[name].values[0])
    assert np.array_equal(joined[b.ids[2], 0]["vector"].values, b[b.ids[2], 0]["vector"].values)
    assert len(joined.read(0, np.zeros(0, np.int64))["map"].values) == 0
    assert joined.digest not in (a.digest, b.digest)
    assert joined.report.labelled == a.report.labelled + b.report.labelled


def test_views_and_who_they_are_shown_with(joined: Joined, folders: list[Path]):
    every = sc.Source(folders[0])
    index = sc.pair(joined, every).index
    assert [every.ids[i] for i in index] == list(joined.ids)
    views = joined.read_views(1, np.arange(24))
    for number, (one, folder) in enumerate(zip(joined.members, folders[1:], strict=True)):
        source, start = sc.Source(folder), int(joined.starts[number])
        for sample, own in enumerate(one.read_views(1, np.arange(one.samples))):
            view = views[start + sample]
            assert view.others == tuple(start + other for other in own.others)
            theirs = {i: source.image(i) for i in own.others}
            ours = {i: every.image(int(index[i])) for i in view.others}
            expected = sc.render(source.image(sample), own, (8, 8), theirs)
            assert np.array_equal(
                sc.render(every.image(int(index[start + sample])), view, (8, 8), ours), expected
            )
    assert any(view.others for view in views) == joined.mixed


def test_a_dataset_and_a_loader_have_all_samples(joined: Joined, folders: list[Path]):
    every = sc.Source(folders[0])
    items = sc.with_targets(every, joined)
    assert len(items) == 24
    item = items[5]
    row = joined[str(joined.ids[item["index"]]), item["view"]]
    assert np.array_equal(item["vector"], row["vector"].values)
    pytest.importorskip("torch")
    from softcache_train import Loader

    seen: set[int] = set()
    for batch in Loader(joined, every, global_batch=8, seed=0):
        seen |= set(batch.index.tolist())
        expected = joined.read(batch.view, batch.index)["map"].values
        assert np.array_equal(np.asarray(batch.targets["map"].values), expected)  # pyright: ignore
        if not joined.tiled:
            labels = every.labels[sc.pair(joined, every).index]
            assert batch.labels.tolist() == labels[batch.index].tolist()
    assert seen == set(range(24))


def test_a_source_without_the_new_samples_is_refused(joined: Joined, folders: list[Path]):
    with pytest.raises(MismatchError, match="8 of the cache's 8 ids are not in"):
        sc.pair(joined, sc.Source(folders[1]))
    with pytest.raises(SpecError, match="verify each by itself"):
        sc.verify(joined)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe": "random_resized_crop(8)"}, r"recipe\.spec differ"),
        ({"seed": 1}, r"recipe\.seed differ: 0 and 1"),
        ({"views": 3}, "views differ: 2 and 3"),
        (
            {"targets": {"logits": "topk(2)", "map": "int8"}},
            r"targets differ: vector is .* there and None here",
        ),
        (
            {"targets": {**SETTINGS["targets"], "vector": "int8"}},
            r"targets differ: vector\.codec is f16 there and int8",
        ),
        ({"teacher": Other()}, r"teachers of logits differ: name is .*; weights is"),
        ({"ignore_labels": True}, "classes or their order differ"),
    ],
)
def test_what_they_disagree_in_is_named(folders: list[Path], tmp_path: Path, change: Any, told: str):
    build(tmp_path / "a", folders[1])
    build(tmp_path / "b", folders[2], **change)
    with pytest.raises(MismatchError, match=told) as caught:
        sc.open([tmp_path / "a", tmp_path / "b"])
    assert "\n" not in str(caught.value)


def test_some_common_samples_are_refused(folders: list[Path], tmp_path: Path):
    paths = [build(tmp_path / f"{n}", folders[n]).path for n in range(3)]
    with pytest.raises(MismatchError, match="their ids differ: 24 and 16"):
        sc.open(paths[:2])
    with pytest.raises(MismatchError, match="some samples are in two of them, and not all"):
        sc.open([paths[1], paths[2], paths[1]])


def test_samples_that_one_could_not_read_have_no_row(folders: list[Path], tmp_path: Path):
    images = Path(shutil.copytree(folders[2], tmp_path / "images"))
    broken = sorted(images.rglob("*.png"))[2]
    broken.write_bytes(b"no image")
    paths = [build(tmp_path / "a", folders[1]).path, build(tmp_path / "b", images, skip_corrupt=True).path]
    both = sc.open(paths)
    assert both.invalid.tolist() == [18] and both.ids[18] == broken.relative_to(images).as_posix()


def test_extended_caches_are_joined(folders: list[Path], tmp_path: Path):
    paths = [build(tmp_path / "a", folders[1]).path, build(tmp_path / "b", folders[2]).path]
    for path, folder in zip(paths, folders[1:], strict=True):
        kept = {"logits": "full(u8)"}
        sc.extend(path, source=folder, teacher=Other(), name="big", targets=kept, progress=False)
    both = sc.open(paths)
    assert both.teacher("big.logits")["weights"] == "5" * 64
    expected = sc.open(paths[1]).read(1, np.arange(8))["big.logits"].values
    assert np.array_equal(both.read(1, np.arange(16, 24))["big.logits"].values, expected)
