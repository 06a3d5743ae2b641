"""tools/curve_kl.py: what it calls distortion, against float64 written out, and a tiny curve on real images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

import softcache as sc

pytest.importorskip("torch")
pytest.importorskip("scipy")
sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import curve_kl as tool
import curve_tables
import proof_views


class Projecting:
    """A teacher of ten classes that needs no data."""

    input_spec: ClassVar = {"size": (32, 32), "mean": (0, 0, 0), "std": (1, 1, 1), "color": "RGB"}
    weights_digest = "ab" * 32
    matrix = np.random.default_rng(0).standard_normal((32 * 32 * 3, 10)) / 64

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"logits": (pixels.reshape(len(pixels), -1) / 32 @ self.matrix).astype(np.float32)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> sc.Cache:
    folder = tmp_path_factory.mktemp("curve")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(20):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "images" / f"{i}.png")
    return tool.prepare(folder, sc.Source(folder / "images"), Projecting(), 2)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def logits_of(cache: sc.Cache, name: str) -> np.ndarray:
    return np.concatenate(
        [cache.read(v, np.arange(cache.samples), [name])[name].values for v in range(2)]
    ).astype(np.float64)


@pytest.mark.parametrize("name", ["full-u8", "noise-3", "scale-0.25"])
def test_distortion_of_whole_logits(cache: sc.Cache, name: str):
    arm = next(arm for arm in tool.arms() if arm.name == name)
    z, kept = logits_of(cache, "full-f16"), logits_of(cache, name)
    found = tool.distortion(cache, arm)
    for at in (1, 4):
        p, q = softmax(z / at), softmax(kept / at)
        assert found[f"kl_T{at}"] == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-9)
    errors = np.sqrt(((q - p) ** 2).sum(axis=1) / (p**2).sum(axis=1))
    assert found["gradient"] == pytest.approx(errors.mean(), rel=1e-9)
    assert found["bytes"] == (14 if name == "full-u8" else 20)


def test_draws_and_decisions_have_no_kl(cache: sc.Cache):
    p = softmax(logits_of(cache, "full-f16") / 4)
    arms = {arm.name: arm for arm in tool.arms()}
    found = tool.distortion(cache, arms["argmax"])
    one_hot = np.eye(10)[p.argmax(axis=1)]
    norms = np.linalg.norm(p, axis=1)
    assert found["gradient"] == pytest.approx((np.linalg.norm(one_hot - p, axis=1) / norms).mean(), rel=1e-6)
    drawn = tool.distortion(cache, arms["sample-10"])
    assert not {"kl_T1", "kl_T4"} & (found.keys() | drawn.keys())
    assert 0 < drawn["gradient"] < found["gradient"]


def test_what_is_spoiled_by_hand(cache: sc.Cache):
    z = logits_of(cache, "full-f16")
    assert np.allclose(logits_of(cache, "scale-0.5"), z / 2, atol=2e-2)
    noise = (logits_of(cache, "noise-6") - z) / 6
    assert abs(noise.mean()) < 0.2 and noise.std() == pytest.approx(1, abs=0.15)  # of 400
    assert np.allclose(noise, (logits_of(cache, "noise-1") - z), atol=2e-2)  # the same, but for its size
    assert len(np.unique(noise.round(2), axis=0)) == len(noise)


def test_names_and_families():
    arms = tool.arms()
    assert len({arm.name for arm in arms}) == len(arms) and arms[0].name == tool.REFERENCE
    families = {arm.name: arm.family for arm in arms}
    assert families["topk-2-spread"] == "codecs" and families["sample-1"] == "draws"
    assert families["scale-0.5"] == "scaled" and families["argmax"] == "class only"
    assert set(families.values()) == set(curve_tables.MARKERS)


def test_differences_are_paired():
    def runs(**top1: float) -> dict[int, dict[str, float]]:
        return {int(seed[1:]): {"top1_train": one} for seed, one in top1.items()}

    found = {"a": runs(s2=0.25, s0=0.5), "b": runs(s0=0.25, s1=0.5, s2=0.25), "c": runs(s0=0.75, s2=0.5)}
    assert curve_tables.differences(found, "a", ["b"]) == [25, 0]
    assert curve_tables.differences(found, "a", ["b", "c"]) == [0, -12.5]
    assert curve_tables.differences(found, "c", ["b", "c"]) == [50, 25]  # from the others
    assert curve_tables.differences(found, "b", ["b"]) == curve_tables.differences(found, "d", ["b"]) == []
    below = {"arm": "a", "kl_T4": curve_tables.FINE / 17}
    assert curve_tables.fine([below, {"arm": "b", "kl_T4": 0.1}, {"arm": "c"}], found) == ["a"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # half a minute of one core; several where the machine is busy
def test_a_tiny_curve(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(proof_views.TEACHERS, "small", (("resnet20",), False, 1))
    monkeypatch.setattr(tool, "CODECS", ("full(f16)", "topk(1)", "argmax"))
    monkeypatch.setattr(tool, "MORE", ("sample(1, T=4)",))
    monkeypatch.setattr(tool, "SPOILED", (("noise", 3.0), ("scale", 0.25)))
    monkeypatch.setattr(tool.arms, "__defaults__", (tool.CODECS + tool.MORE,))
    scale = tool.Scale(images=128, views=2, held_out=200, teacher="small")
    (tmp_path / "runs").mkdir()
    tool.work(shared_data, tmp_path, scale, seeds=2)
    runs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")}
    assert len(runs) == 2 * 6
    for run in runs.values():
        assert np.isfinite([*run["loss"], run["ce_train"]]).all() and 0 <= run["top1_train"] <= 1
    assert len({tuple(run["loss"]) for run in runs.values()}) == len(
        runs
    )  # no two learned from the same numbers

    gone = tmp_path / "runs" / "topk-1-1.json"
    gone.unlink()
    tool.work(shared_data, tmp_path, scale, seeds=2)
    again = json.loads(gone.read_text())
    assert again["loss"] == pytest.approx(
        runs["topk-1-1"]["loss"], rel=1e-6
    )  # and nothing else was run again
    assert {p.stem for p in (tmp_path / "runs").glob("*.json")} == set(runs)

    capsys.readouterr()
    sys_argv = ["curve_kl.py", "--data", str(shared_data), "--out", str(tmp_path), "--tables"]
    monkeypatch.setattr(
        sys, "argv", [*sys_argv, "--plot", str(tmp_path / "c.png"), "--json", str(tmp_path / "c.json")]
    )
    assert tool.main() == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + 2 + 6 and lines[4].startswith("| `full(f16)` | 20 | 0 | 0 | 0 | 0 |")
    assert "noise of 3" in "".join(lines) and "∞" in lines[-1]
    assert (tmp_path / "c.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / "c.json").read_text())["runs"]) == 12
