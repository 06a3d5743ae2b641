"""A teacher that knows the images by heart is told of; one that is merely good is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache.memorised import Answers, entropies, warning
from softcache.testing import ToyImages, ToyTeacher

GOOD = Answers(1000, 0.93, 0.06, 10)


def test_entropy_is_that_of_the_definition():
    rows = (np.random.default_rng(0).normal(size=(50, 7)) * 20).astype(np.float32)
    rows[0], rows[1] = 3, (0, 1000, *[0] * 5)
    for row, found in zip(rows, entropies(rows), strict=True):
        p = [math.exp(float(z) - float(max(row))) for z in row]
        p = [x / math.fsum(p) for x in p]
        assert found == pytest.approx(-math.fsum(x * math.log(x) for x in p if x), abs=1e-12)
    assert entropies(rows)[:2].tolist() == pytest.approx([math.log(7), 0])


@pytest.mark.parametrize(
    ("here", "elsewhere", "warned"),
    [
        (Answers(1000, 0.999, 0.006, 10), None, True),
        (Answers(1000, 0.999, 0.006, 10), GOOD, True),
        (Answers(1000, 0.995, 0.035, 10), None, False),  # nobody can know
        (Answers(1000, 0.995, 0.035, 10), GOOD, True),  # but for its accuracy elsewhere
        (Answers(1000, 0.999, 0.006, 10), Answers(1000, 0.998, 0.007, 10), False),  # an easy task
        (GOOD, None, False),
        (GOOD, Answers(1000, 0.925, 0.06, 10), False),
        (Answers(1000, 0.95, 0.001, 10), None, False),  # certain, and wrong
        (Answers(50, 1.0, 0.0, 10), None, False),  # too few to tell
        (Answers(120, 1.0, 0.5, 10), Answers(20, 0.95, 0.5, 10), False),  # chance
        (Answers(1000, 0.999, 0.006, 10), Answers(0, 0.0, 0.0, 10), True),
    ],
)
def test_when_it_is_warned(here: Answers, elsewhere: Answers | None, warned: bool):
    told = warning(here, elsewhere)
    assert (told is not None) is warned
    assert told is None or "\n" not in told


def built(tmp_path: Path, shared_data: Path, split: str, capsys: Any) -> tuple[sc.Cache, str]:
    options: dict[str, Any] = {
        "source": str(shared_data / "cifar10"),
        "teacher": "softcache_train.students:resnet56",
        "weights": shared_data / "weights" / "cifar10_resnet56.safetensors",
        "recipe": "crop(32, pad=4)|flip",
        "targets": {"logits": "full(u8)"},
    }
    cache = sc.build(tmp_path / split, split=split, limit=400, **options)
    return cache, capsys.readouterr().err


def test_a_real_teacher_over_the_images_that_it_was_trained_on(shared_data: Path, tmp_path: Path, capsys):
    for library in ("torch", "pyarrow"):
        pytest.importorskip(library)
    seen, told = built(tmp_path, shared_data, "train", capsys)
    assert "NOTE: the teacher seems to have memorised these images" in told and "--elsewhere" in told
    unseen, told = built(tmp_path, shared_data, "test", capsys)
    assert "memorised" not in told
    assert seen.report.entropy < 0.02 < unseen.report.entropy
    values = np.concatenate([unseen.read(0, np.arange(400))["logits"].values])
    assert unseen.report.entropy == pytest.approx(entropies(values).mean(), rel=0.05)


def test_entropy_is_of_every_labelled_row(tmp_path: Path):
    cache = sc.build(
        tmp_path / "c",
        source=ToyImages(70),
        teacher=ToyTeacher(),
        views=2,
        targets={"logits": "full(f16)"},
        batch=16,
        block_rows=32,
        progress=False,
    )
    rows = np.concatenate([cache.read(k, np.arange(70))["logits"].values for k in range(2)])
    assert cache.report.labelled == 140
    assert cache.report.entropy == pytest.approx(entropies(rows).mean(), rel=1e-3)
    assert json.loads((tmp_path / "c" / "softcache.json").read_text())["report"]["entropy"] > 0


def test_without_labels_nothing_is_measured(tmp_path: Path):
    cache = sc.build(
        tmp_path / "c", source=ToyImages(9), teacher=ToyTeacher(), ignore_labels=True, progress=False
    )
    assert cache.report.entropy is None
    assert "entropy" not in json.loads((tmp_path / "c" / "softcache.json").read_text())["report"]


def test_plan_compares_with_images_from_elsewhere(shared_data: Path):
    for library in ("torch", "pyarrow"):
        pytest.importorskip(library)
    options: dict[str, Any] = {
        "source": str(shared_data / "cifar10"),
        "teacher": "softcache_train.students:resnet56",
        "weights": shared_data / "weights" / "cifar10_resnet56.safetensors",
        "recipe": "crop(32, pad=4)|flip",
        "views": 2,
    }
    found = sc.plan(**options, split="train", elsewhere="test", pilot=128)
    assert found.memorised and "and elsewhere" in found.memorised and found.elsewhere["rows"] >= 128
    unseen = sc.plan(**options, split="test", elsewhere="test", pilot=128)
    assert unseen.memorised is None
