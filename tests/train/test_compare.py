"""One table of several configs: the same seeds for all, gains in pairs, and what each costs."""

from __future__ import annotations

import csv
import json
import math
import statistics

import pytest
from safetensors.torch import save_file
from softcache_train import compare, students
from softcache_train.cli import main

BASE = "student: resnet8\nepochs: 1\nglobal_batch: 25\nlr: 0.01\nworkers: 0\n"


@pytest.fixture
def asked(cache, images, tmp_path):
    (tmp_path / "labels.yaml").write_text(BASE + "objectives: [ce]\n")
    (tmp_path / "kd.yaml").write_text(BASE + "objectives: [{kd: {T: 2}}]\n")
    paths = [str(tmp_path / f"{name}.yaml") for name in ("labels", "kd")]
    return [
        "compare",
        *paths,
        *(
            "--cache",
            str(cache.path),
            "--source",
            str(images),
            "--split",
            "train",
            "-o",
            str(tmp_path / "out"),
        ),
    ]


def test_gains_are_paired_by_seed(asked, cache, tmp_path, capsys):
    teacher = students.make("resnet20", 4)
    save_file(teacher.state_dict(), tmp_path / "t.safetensors")
    beside = ["--beside", "softcache_train.students:resnet20", str(tmp_path / "t.safetensors")]
    assert main([*asked, "--seeds", "3", "--json", *beside]) == 0
    labels, kd, beside_row = json.loads(capsys.readouterr().out)
    assert labels["top1"].keys() == kd["top1"].keys() == {"0", "1", "2"}
    gains = [100 * (kd["top1"][s] - labels["top1"][s]) for s in "012"]
    assert kd["gain"] == pytest.approx(statistics.mean(gains)) and labels["gain"] is None
    assert kd["half"] == pytest.approx(4.303 * statistics.stdev(gains) / math.sqrt(3))
    parameters = sum(p.numel() for p in students.make("resnet8", 4).parameters())
    assert (kd["parameters"], kd["megabytes"]) == (parameters, pytest.approx(4 * parameters / 1e6))
    size = cache.arrays["targets/logits/value"].row_bytes
    assert [row["view_bytes"] for row in (labels, kd, beside_row)] == [0, size, None]
    assert beside_row["parameters"] == sum(p.numel() for p in teacher.parameters())
    for row in (labels, kd):
        for seed, top1 in row["top1"].items():
            run = json.loads((tmp_path / "out" / row["name"] / seed / "checkpoint.json").read_text())
            assert run["history"][-1]["top1"] == top1 and run["config"]["seed"] == int(seed)

    with (tmp_path / "out" / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["name"], r["seed"]) for r in rows[:6]] == [(n, s) for n in ("labels", "kd") for s in "012"]
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")

    before = (tmp_path / "out" / "kd" / "0" / "checkpoint.json").stat().st_mtime_ns
    assert main([*asked, "--seeds", "3"]) == 0  # what is finished is kept
    told = capsys.readouterr().out
    assert (tmp_path / "out" / "kd" / "0" / "checkpoint.json").stat().st_mtime_ns == before
    assert "3 seeds, the same for all; gains over labels" in told and f"{kd['gain']:+.2f}" in told


def test_the_interval_is_students():
    scipy = pytest.importorskip("scipy.stats")
    for n in (2, 3, 8, 16):
        values = [float(i % 3) + i / 7 for i in range(n)]
        spread = statistics.stdev(values) / math.sqrt(n)
        assert compare.interval(values) == pytest.approx(scipy.t.ppf(0.975, n - 1) * spread, rel=1e-3)
    assert compare.interval([1.0]) is None


def test_what_cannot_be_compared_is_refused(asked, tmp_path, capsys):
    assert main([*asked, "--seeds", "0"]) == 1
    assert "at least one" in capsys.readouterr().err
    (tmp_path / "hint.yaml").write_text(BASE + "objectives: [{hint: {target: layer2}}]\n")
    assert main([*asked[:2], str(tmp_path / "hint.yaml"), *asked[2:]]) == 1
    assert "has no target 'layer2'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kd.yaml").write_text(BASE)
    assert main([asked[0], str(tmp_path / "other" / "kd.yaml"), *asked[1:]]) == 1
    assert "two of the configs have one name" in capsys.readouterr().err
