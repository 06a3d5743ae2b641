"""A folder of images without labels, beside an ImageFolder: which is taken for which, and what a cache of one is for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from layouts import pixels, png

import softcache as sc
from softcache import cli
from softcache.errors import SourceError
from softcache.source import Source


def lay(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(pixels(i)) if name.endswith("png") else b"text")
    return root


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["a.png", "b.png"], "folder"),
        (["a.png", "notes/read.me"], "folder"),
        (["train/a.png", "val/b.png"], "folder"),
        (["cat/a.png", "dog/b.png"], "imagefolder"),
        (["cat/deep/a.png"], "imagefolder"),
        (["train/cat/a.png", "val/cat/b.png"], "imagefolder"),
        (["cat/a.png", ".hidden.png"], "imagefolder"),
        (["a.png", "cat/b.png"], None),
        (["train/a.png", "train/cat/b.png"], None),
        (["cat/a.png", "dog/b.png", "test/c.png"], None),
    ],
)
def test_where_the_images_lie_tells_a_folder_from_an_imagefolder(tmp_path: Path, names, layout):
    root = lay(tmp_path / "x", *names)
    if layout is None:
        with pytest.raises(SourceError, match=r"may be read as imagefolder or as folder.*--layout"):
            Source(root)
        return
    split = names[0].split("/")[0] if names[0].split("/")[0] == "train" else None
    source = Source(root, split=split)
    assert source.layout == layout and source.describe().startswith(layout)


def test_a_folder_goes_down_and_is_sorted_by_path(tmp_path: Path):
    root = lay(tmp_path / "x", "b/2.png", "b/deep/3.png", "a.png", "b.txt", ".git/x.png", "c/1.png")
    source = Source(root, layout="folder")
    assert source.ids == ("a.png", "b/2.png", "b/deep/3.png", "c/1.png")
    assert np.array_equal(source.image(1), pixels(0)) and source._where(1) == str(root / "b/2.png")
    assert source.classes is None and source.labels.tolist() == [-1] * 4
    assert "no labels; 1 file ignored, of another kind than images" in source.describe()


def test_an_imagefolder_can_be_read_without_its_labels(tmp_path: Path):
    root = lay(tmp_path / "x", "train/cat/0.png", "train/dog/1.png", "val/cat/2.png")
    source = Source(root, split="train", layout="folder")
    assert source.ids == ("cat/0.png", "dog/1.png") and source.classes is None
    with pytest.raises(SourceError, match="train, val"):
        Source(root, layout="folder")
    with pytest.raises(SourceError, match="has no columns"):
        Source(root, layout="folder", label_column="x")
    with pytest.raises(SourceError, match="no split 'train'"):
        Source(root / "train", layout="folder", split="train")


def test_images_beside_class_folders_are_told_of(tmp_path: Path):
    root = lay(tmp_path / "x", "cat/0.png", "stray.png")
    source = Source(root, layout="imagefolder")
    assert (
        source.ids == ("cat/0.png",)
        and "images directly in x, in no class folder, ignored" in source.describe()
    )


def test_a_student_learns_from_images_without_labels(tmp_path: Path, capsys):
    """Build, show, verify and train by the commands: from the teacher only, and no top-1 is claimed."""
    pytest.importorskip("torch")
    train = pytest.importorskip("softcache_train.cli")
    names = [f"{'deep/' * (i % 2)}{i:02}.png" for i in range(24)]
    images = ["--source", str(lay(tmp_path / "images", *names))]
    out = str(tmp_path / "cache")
    build = [
        "--teacher",
        "softcache.testing:toy_teacher",
        "--recipe",
        "random_resized_crop(8)|flip",
        "-o",
        out,
    ]
    assert cli.build_cache([*images, *build]) == 1
    assert "say which with layout= (--layout)" in capsys.readouterr().err
    assert cli.build_cache([*images, *build, "--layout", "folder", "--views", "2"]) == 0
    told = capsys.readouterr().err
    assert "folder: 24 samples, no class names; no labels" in told
    assert cli.main(["show", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["top1"] is None and found["identity"]["source"]["labels"] is None
    assert cli.main(["show", out]) == 0 and "folder, 24 samples" in capsys.readouterr().out
    assert cli.main(["verify", out, "--read-data"]) == 0
    assert (
        cli.main(["verify", out, "--live", "8", *images, "--teacher", "softcache.testing:toy_teacher"]) == 0
    )
    config = tmp_path / "c.yaml"
    config.write_text("student: resnet8\nepochs: 1\nglobal_batch: 8\nworkers: 0\n")
    command = [str(config), "--cache", out, *images, "-o", str(tmp_path / "run")]
    capsys.readouterr()
    assert train.main(command) == 1
    assert (
        "the source has no labels: learn from the teacher only with --set alpha=1" in capsys.readouterr().err
    )
    assert train.main([*command, "--set", "alpha=1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["top1"] is None and result["epochs"] == 1
    assert Path(result["model"]).is_file() and sc.open(out).samples == 24
