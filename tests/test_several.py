"""Several caches of the same views are read as one, matched by id; whatever they disagree in is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache.errors import InvalidRow, MismatchError, NotBuilt, SpecError
from softcache.testing import ToyTeacher, make_image_folder


class Other(ToyTeacher):
    """Another teacher, of another size."""

    input_spec = {"size": (6, 6)}  # noqa: RUF012
    weights_digest = "5" * 64


def reordered(folder: Path) -> sc.Source:
    """The same samples, backwards."""
    source = sc.Source(folder)
    source._take(list(reversed(source._rows)))
    return source


SETTINGS: dict[str, Any] = {
    "recipe": "random_resized_crop(8)|flip",
    "views": 2,
    "batch": 4,
    "block_rows": 8,
    "targets": {"logits": "full(f16)", "vector": "f16"},
    "progress": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), per_class=5)


@pytest.fixture(scope="module")
def paths(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Caches of two teachers; the second's ids stand in the opposite order."""
    out = tmp_path_factory.mktemp("caches")
    sc.build(out / "a", source=folder, teacher=ToyTeacher(), **SETTINGS)
    sc.build(out / "b", source=reordered(folder), teacher=Other(), **SETTINGS)
    return [out / "a", out / "b"]


def test_rows_are_those_of_each_matched_by_id(paths: list[Path]):
    both, (a, b) = sc.open(paths), (sc.open(p) for p in paths)
    assert a.ids == tuple(reversed(b.ids)) and both.ids == a.ids and len(both) == 20
    assert list(both.targets) == ["0.logits", "0.vector", "1.logits", "1.vector"]
    samples = np.random.default_rng(0).permutation(20)[:7]
    theirs = np.array([b.index(a.ids[i]) for i in samples])
    found = both.read(1, samples)
    for name in ("logits", "vector"):
        assert np.array_equal(found[f"0.{name}"].values, a.read(1, samples)[name].values)
        assert np.array_equal(found[f"1.{name}"].values, b.read(1, theirs)[name].values)
    assert not np.array_equal(found["0.logits"].values, found["1.logits"].values)
    row = both[a.ids[3], 0]
    assert np.array_equal(row["1.vector"].values, b[a.ids[3], 0]["vector"].values)
    assert both.read_views(1, samples) == a.read_views(1, samples) == b.read_views(1, theirs)
    assert sc.open([paths[1], paths[0]]).digest != both.digest != a.digest


def test_an_unknown_target_names_the_nearest(paths: list[Path]):
    with pytest.raises(MismatchError, match=r"no target 'logits'.*did you mean '\d.logits'"):
        sc.open(paths).read(0, np.arange(3), ["logits"])
    with pytest.raises(SpecError, match="verify each by itself"):
        sc.verify(sc.open(paths))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"recipe": "random_resized_crop(8)"},
            r"their recipe\.spec differ: random_resized_crop\(8\)\|flip and",
        ),
        ({"seed": 1}, r"their recipe\.seed differ: 0 and 1"),
        ({"views": 3}, "their views differ: 2 and 3"),
        ({"limit": 12}, "their ids differ: 20 and 12; '.*png' is in one of them only"),
        ({"ignore_labels": True}, "their classes or their order differ: ant, bee, cow, dog and none"),
    ],
)
def test_what_they_disagree_in_is_named(
    paths: list[Path], folder: Path, tmp_path: Path, change: Any, told: str
):
    sc.build(tmp_path / "c", source=folder, teacher=Other(), **SETTINGS | change)
    with pytest.raises(MismatchError, match=told) as caught:
        sc.open([paths[0], tmp_path / "c"])
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_another_order_of_classes_and_other_images_are_named(paths: list[Path], folder: Path, tmp_path: Path):
    turned = reordered(folder)
    turned.classes = ("bee", "ant", "cow", "dog")
    sc.build(tmp_path / "c", source=turned, teacher=Other(), **SETTINGS)
    with pytest.raises(MismatchError, match="classes or their order differ: ant, bee, cow, dog and bee, ant"):
        sc.open([paths[0], tmp_path / "c"])
    images = make_image_folder(tmp_path / "images", per_class=5, seed=1)
    sc.build(tmp_path / "d", source=images, teacher=Other(), **SETTINGS)
    with pytest.raises(MismatchError, match="their images differ"):
        sc.open([paths[0], tmp_path / "d"])


def test_other_images_in_another_order_are_found_by_the_pixels(
    paths: list[Path], folder: Path, tmp_path: Path
):
    images = make_image_folder(tmp_path / "images", per_class=5, seed=1)
    sc.build(tmp_path / "d", source=reordered(images), teacher=Other(), **SETTINGS)
    both = sc.open([paths[0], tmp_path / "d"])
    with pytest.raises(MismatchError, match=r"are not those the cache|another image"):
        sc.pair(both, sc.Source(folder))
    assert "20 ids found" in sc.pair(sc.open(paths), sc.Source(folder)).message


def test_an_unfinished_one_and_none_are_refused(paths: list[Path], folder: Path, tmp_path: Path):
    sc.build(tmp_path / "c", source=folder, teacher=Other(), **SETTINGS)
    (tmp_path / "c" / "softcache.json").unlink()
    with pytest.raises(NotBuilt, match="is not finished"):
        sc.open([paths[0], tmp_path / "c"])
    with pytest.raises(SpecError, match="no cache"):
        sc.open([])


def test_a_sample_that_one_could_not_read_has_no_row(paths: list[Path], folder: Path, tmp_path: Path):
    import shutil

    shutil.copytree(folder, tmp_path / "images")
    source = sc.Source(tmp_path / "images")
    (tmp_path / "images" / source.ids[4]).write_bytes(b"no image")
    for name, teacher in (("c", Other()), ("d", ToyTeacher())):
        sc.build(tmp_path / name, source=tmp_path / "images", teacher=teacher, skip_corrupt=True, **SETTINGS)
    both = sc.open([tmp_path / "c", tmp_path / "d"])
    assert both.invalid.tolist() == [4]
    with pytest.raises(InvalidRow, match=r"\.png"):
        both.read(0, np.array([4]))


# -- in the trainer --------------------------------------------------------------------------------------------


def test_means_of_several_teachers_against_float64():
    torch = pytest.importorskip("torch")
    from softcache_train.objectives import combine
    from softcache_train.targets import Dense, Hard

    z = np.random.default_rng(0).normal(size=(3, 5, 7)) * 4
    targets = [Dense(torch.from_numpy(one.astype(np.float32))) for one in z]

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    for heat in (1.0, 4.0):
        found = {how: combine(targets, heat, how).values.numpy() for how in ("geometric", "arithmetic")}
        assert np.allclose(softmax(found["arithmetic"] / heat), softmax(z / heat).mean(axis=0), atol=1e-6)
        geometric = np.prod(softmax(z / heat), axis=0) ** (1 / 3)
        assert np.allclose(
            softmax(found["geometric"] / heat), geometric / geometric.sum(-1, keepdims=True), atol=1e-6
        )
    with pytest.raises(SpecError, match="whole logits"):
        combine([targets[0], Hard(torch.zeros(5, dtype=torch.int64), 7)], 1.0)


def test_a_loader_reads_several(paths: list[Path], folder: Path):
    pytest.importorskip("torch")
    from softcache_train import Loader

    both, a = sc.open(paths), sc.open(paths[0])
    batch = next(iter(Loader(both, sc.Source(folder), global_batch=8, seed=0)))
    alone = next(iter(Loader(a, sc.Source(folder), global_batch=8, seed=0)))
    assert set(batch.targets) == set(both.targets)
    assert np.array_equal(batch.index, alone.index) and bool((batch.images == alone.images).all())
    assert bool((batch["0.logits"].values == alone["logits"].values).all())


def test_the_trainer_learns_from_several(paths: list[Path], folder: Path, tmp_path: Path, capsys):
    pytest.importorskip("torch")
    from softcache_train.cli import main

    (tmp_path / "kd.yaml").write_text(
        "student: resnet8\nepochs: 1\nglobal_batch: 4\nalpha: 1.0\nT: 2.0\ntarget: [0.logits, 1.logits]\n"
    )
    common = [str(tmp_path / "kd.yaml"), "--source", str(folder), "--cache", str(paths[0])]
    losses = set()
    for how in ("geometric", "arithmetic"):
        run = [*common, "--cache", str(paths[1]), "-o", str(tmp_path / how), "--set", f"combine={how}"]
        assert main(run) == 0, capsys.readouterr().err
        losses.add(capsys.readouterr().err.split("loss")[1].split()[0])
    assert len(losses) == 2
    assert main([*common, "-o", str(tmp_path / "x")]) == 1
    assert "has no target '0.logits'" in capsys.readouterr().err
    live = [*common, "--cache", str(paths[1]), "--teacher", "softcache.testing:toy_teacher"]
    assert main([*live, "-o", str(tmp_path / "y")]) == 1
    assert "stands in for one cache" in capsys.readouterr().err
