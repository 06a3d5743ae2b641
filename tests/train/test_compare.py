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

from softcache.store import Store

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
    for n in range(2, 61):
        values = [float(i % 3) + i / 7 for i in range(n)]
        spread = statistics.stdev(values) / math.sqrt(n)
        assert compare.interval(values) == pytest.approx(scipy.t.ppf(0.975, n - 1) * spread, rel=1e-4)
    assert compare.interval([1.0]) is None


def test_what_cannot_be_compared_is_refused(asked, tmp_path, capsys):
    assert main([*asked, "--seeds", "0"]) == 1
    assert "at least one" in capsys.readouterr().err
    (tmp_path / "hint.yaml").write_text(BASE + "objectives: [{hint: {target: layer2}}]\n")
    assert main([*asked[:2], str(tmp_path / "hint.yaml"), *asked[2:]]) == 1
    assert "has no target 'layer2'" in capsys.readouterr().err and not (tmp_path / "out").exists()
    for key, said in (
        ("seed", "seed: 7\n"),
        ("val_limit", "val_limit: 9\n"),
        ("val_split", "val_split: test\n"),
    ):
        (tmp_path / "apart.yaml").write_text(BASE + said)
        assert main([*asked[:2], str(tmp_path / "apart.yaml"), *asked[2:]]) == 1
        assert f"labels has {key}=" in (told := capsys.readouterr().err) and f"and apart {key}=" in told
    assert main([*asked, "--teacher", "resnet56"]) == 1  # which would be every config's
    assert "unrecognized arguments: --teacher" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kd.yaml").write_text(BASE)
    assert main([asked[0], str(tmp_path / "other" / "kd.yaml"), *asked[1:]]) == 1
    assert "two of the configs have one name" in capsys.readouterr().err


def test_what_is_measured_beside_is_loaded_before_anything_is_trained(asked, tmp_path, capsys):
    resnet20, weights = "softcache_train.students:resnet20", tmp_path / "w.safetensors"
    assert main([*asked, "--beside", resnet20, str(weights)]) == 1
    assert f"{weights} cannot be read as safetensors" in capsys.readouterr().err
    weights.write_bytes(b"{")
    assert main([*asked, "--beside", resnet20, str(weights)]) == 1
    assert f"{weights} cannot be read as safetensors" in capsys.readouterr().err
    save_file(students.make("resnet8", 4).state_dict(), weights)
    assert main([*asked, "--beside", resnet20, str(weights)]) == 3
    assert f"does not fit {resnet20} of 4 classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_a_run_seen_from_start_to_end_says_how_long_it_took(asked, tmp_path, capsys):
    def seconds() -> list[float | None]:
        assert main([*asked, "--seeds", "1", "--json"]) == 0
        return [row["seconds"] for row in json.loads(capsys.readouterr().out)]

    whole, note = seconds(), tmp_path / "out" / "kd" / "0" / "seconds.json"
    assert all(s and s > 0 for s in whole)
    assert seconds() == whole  # noted
    for damaged in (b"-1.0", b"Infinity", b"[]", b"\xff", b""):
        note.write_bytes(damaged)
        assert compare._seconds(Store(note.parent)) is None
    note.unlink()  # as after a stop, which another process went on from
    assert seconds() == [whole[0], None] and not note.exists()
    assert "1 seed, the same for all" in (tmp_path / "out" / "compare.txt").read_text()
