"""tools/paired.py and the tools on it: gains by hand, arms that are configs, and each of them shortened on real images."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("scipy")
sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import ablation
import paired
from softcache_train.config import check

ROOT = Path(__file__).resolve().parents[1]
FOUND = {"a": {0: 0.5, 1: 0.6, 2: 0.7}, "b": {0: 0.52, 1: 0.61, 2: 0.75}, "c": {0: 0.4, 2: 0.5}}


def test_gains_are_paired_and_of_the_seeds_that_all_have():
    assert paired.gains(FOUND, ["b"], ["a"]) == pytest.approx([2, 1, 5])
    assert paired.gains(FOUND, ["a", "b"], ["c"]) == pytest.approx([11, 22.5])
    assert paired.gains(FOUND, ["c"], ["c"]) == [0, 0]


def test_intervals_are_students():
    half = 4.303 * statistics.stdev([2, 1, 5]) / math.sqrt(3)  # t of two degrees of freedom
    assert paired.told([2, 1, 5]) == f"+2.67 ± {half:.2f}"
    assert paired.told([-1.0]) == "−1.00"
    lines = paired.table(FOUND, {"b": ["x"]}, ["beside"]).splitlines()
    assert (
        lines[0] == "|  | top-1, % | gain over a, points | beside |"
        and lines[1] == "| --- | --- | --- | --- |"
    )
    assert lines[2].startswith("| a | 60.00 ± 10.00 | – |") and lines[3].endswith(f"+2.67 ± {half:.2f} | x |")
    assert paired.differences(FOUND, {"of c": (["a"], ["c"])}).splitlines()[2].endswith("| 2 |")


def test_names_become_folders():
    assert paired.slug("kd + masked attention") == "kd-masked-attention"
    assert len({paired.slug(name) for name in ablation.ARMS}) == len(ablation.ARMS)


def test_the_arms_of_the_ablation_are_configs_that_its_cache_has_the_targets_for():
    for more in ablation.ARMS.values():
        config = check({**paired.STUDENT, "epochs": 2, "objectives": [paired.CE, paired.KD, *more]})
        assert set(config.targets) <= set(ablation.TARGETS)
    for better, worse in ablation.EFFECTS.values():
        assert {*better, *worse} <= set(ablation.ARMS) and len(better) == len(worse)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paired")


def quick(tool: str, data: Path, out: Path) -> tuple[str, dict]:
    found = out / f"{tool}.json"
    command = [
        sys.executable,
        ROOT / "tools" / f"{tool}.py",
        "--data",
        data,
        "--out",
        out,
        "--quick",
        "--json",
        found,
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "train"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads(found.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("tool", "arms"), [("ablation", 7), ("capacity_gap", 5), ("views_curve", 4)])
def test_a_tool_shortened(tool: str, arms: int, shared_data: Path, out: Path):
    text, found = quick(tool, shared_data, out)
    assert len(found["top1"]) == arms and all(f"| {name} |" in text for name in found["top1"])
    assert all(
        list(scores) == ["0", "1"] and all(0 < s < 1 for s in scores.values())
        for scores in found["top1"].values()
    )
    if tool == "ablation":
        gaps = found["completeness_gap"]
        assert gaps["layer3.attribution"] < 1e-3 < gaps["layer2.attribution"] < 0.5
    if tool == "capacity_gap":
        assert (
            found["teachers"]["ResNet-56"]
            > 0.85
            > max(s for n, s in found["teachers"].items() if n != "ResNet-56")
        )
    students = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")}
    assert quick(tool, shared_data, out) == (text, found)  # and what is there is not made again
    assert students == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")}
