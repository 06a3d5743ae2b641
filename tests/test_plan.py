"""``plan``: what it reckons, against what the build then writes."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache import cli, forecast, telling
from softcache.errors import MismatchError, SourceError, SpecError, TeacherError
from softcache.testing import ToyImages, ToyTeacher, make_image_folder, toy_teacher

QUIET = {"progress": False}
ALL = {"logits": "full(u8)", "map": "int8", "vector": "f16"}


def written(folder: Path) -> int:
    """Bytes of every file, whatever it is."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def on_disk(folder: Path) -> int:
    """Bytes that files and folders take, as ``du`` counts them."""
    return sum(f.stat().st_blocks * 512 for f in [folder, *folder.rglob("*")])


class Ramps:
    """Maps whose content, and so its size under zstd, differs from image to image: dark ones compress best."""

    input_spec = ToyTeacher().input_spec

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        levels = pixels.reshape(len(pixels), -1).astype(np.int64).sum(axis=1) % 97
        noise = np.random.default_rng(0).normal(size=(8, 32, 32)).astype(np.float32)
        kept = np.arange(8 * 32 * 32).reshape(8, 32, 32)[None] % 97 < levels[:, None, None, None]
        return {"logits": np.eye(4, dtype=np.float32)[levels % 4], "map": noise * kept}


CASES: dict[str, dict[str, Any]] = {
    "logits": {"source": 300, "views": 3},
    "bytes": {"source": 700, "views": 4, "targets": {"logits": "full(u8)"}},
    "everything": {"source": 600, "views": 3, "targets": ALL},
    "one image": {"source": 1, "views": 1},
    "five images, many views": {"source": 5, "views": 23, "targets": ALL},
    "many views": {"source": 40, "views": 60, "targets": {"logits": "full(u8)"}},
    "tiny blocks": {"source": 300, "views": 3, "block_rows": 8, "targets": ALL},
    "blocks above the pilot": {"source": 700, "views": 3, "block_rows": 450, "targets": ALL},
    "blocks above the source": {"source": 300, "views": 2, "block_rows": 5000},
    "odd batch": {"source": 701, "views": 2, "batch": 77, "targets": ALL},
    "batch above the pilot": {"source": 500, "views": 2, "batch": 400},
    "content": {
        "source": 900,
        "views": 3,
        "teacher": Ramps(),
        "targets": {"map": "int8", "logits": "full(f16)"},
    },
    "pixel ops": {"source": 400, "views": 3, "recipe": "random_resized_crop(8)|flip|grayscale"},
    "mixes": {"source": 400, "views": 3, "recipe": "crop(8)|grayscale|mix(p=0.9)"},
    "phases": {
        "source": 400,
        "views": 7,
        "recipe": "5: letterbox(8)|random_affine(degrees=9)|hsv_jitter; letterbox(8)",
        "targets": ALL,
    },
    "two teachers": {
        "source": 300,
        "views": 2,
        "teacher": [ToyTeacher(), Ramps()],
        "targets": {"logits": "full(u8)", "1.map": "int8"},
    },
    "top-k": {"source": 400, "views": 3, "targets": {"logits": "topk(2)"}},
    "no labels": {"source": 300, "views": 2, "ignore_labels": True},
    "limit": {"source": 900, "views": 2, "limit": 500},
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_the_build_writes(tmp_path: Path, case: str):
    options = {"teacher": toy_teacher(), "recipe": "random_resized_crop(8)|flip"} | CASES[case]
    options["source"] = ToyImages(options["source"])
    out = tmp_path / "deep" / "cache"
    found = sc.plan(out, **options)
    assert not out.parent.exists()
    cache = sc.build(out, **options, **QUIET)
    real = written(out)
    assert found.predicted_bytes == pytest.approx(real, rel=0.02)  # the promise is 10 %
    assert (found.samples, found.views) == (cache.samples, cache.views)
    assert found.teacher_rows == cache.teacher_rows == cache.samples * cache.views
    assert found.bytes_per_view == pytest.approx(real / cache.teacher_rows, rel=0.02)
    assert found.disk_bytes >= found.predicted_bytes and found.fits


def test_bytes_of_parquet_and_of_real_feature_maps(shared_data: Path, tmp_path: Path):
    for library in ("torch", "pyarrow"):
        pytest.importorskip(library)
    options: dict[str, Any] = {
        "source": str(shared_data / "cifar10"),
        "split": "test",
        "limit": 500,
        "teacher": "softcache_train.students:resnet20",
        "weights": shared_data / "weights" / "cifar10_resnet20.safetensors",
        "recipe": "crop(32, pad=4)|flip",
        "views": 2,
        "targets": {"logits": "full(u8)", "layer1": "int8", "layer3": "f16"},
    }
    found = sc.plan(tmp_path / "c", **options, pilot=128)
    cache = sc.build(tmp_path / "c", **options, **QUIET)
    assert found.predicted_bytes == pytest.approx(written(tmp_path / "c"), rel=0.03)
    assert found.disk_bytes == pytest.approx(on_disk(tmp_path / "c"), rel=0.1)
    report = cache.manifest.report  # type: ignore[union-attr]
    assert found.top1 == pytest.approx(report.top1, abs=0.06) and found.labelled == 256
    for name, values in report.fidelity.items():
        for key, value in values.items():
            few = 10 if key.startswith("kl") else 1.3  # of 32 rows, one may hold most of the KL
            assert value / few < found.fidelity[name][key] < value * few


def test_an_image_folder_is_planned_as_it_is_built(tmp_path: Path):
    folder = make_image_folder(tmp_path / "images", per_class=90)
    options: dict[str, Any] = {"source": folder, "teacher": toy_teacher(), "views": 3, "targets": ALL}
    before = sorted((f, f.stat().st_mtime_ns) for f in folder.rglob("*"))
    found = sc.plan(tmp_path / "c", **options)
    assert sorted((f, f.stat().st_mtime_ns) for f in folder.rglob("*")) == before
    assert "360 samples, 4 classes" in found.source
    assert found.pilot["samples"] == 256 and found.pilot["views"] == 2
    sc.build(tmp_path / "c", **options, **QUIET)
    assert found.predicted_bytes == pytest.approx(written(tmp_path / "c"), rel=0.02)


def test_a_build_that_has_begun_needs_only_the_rest_of_its_disk(tmp_path: Path):
    options: dict[str, Any] = {"source": ToyImages(50), "teacher": toy_teacher(), "views": 3}
    whole = sc.plan(tmp_path / "c", **options)
    sc.build(tmp_path / "c", **options, **QUIET)
    again = sc.plan(tmp_path / "c", **options)
    assert again.predicted_bytes == whole.predicted_bytes and again.disk_bytes < whole.disk_bytes / 2


def test_invalid_rows_take_their_share(tmp_path: Path):
    folder = make_image_folder(tmp_path / "images", per_class=75)
    for file in sorted(folder.rglob("*.png"))[::5]:
        file.write_bytes(b"no image")
    options: dict[str, Any] = {"source": folder, "teacher": toy_teacher(), "targets": ALL, "views": 2}
    with pytest.raises(SourceError, match=r"images cannot be read: .*--skip-corrupt"):
        sc.plan(**options)
    found = sc.plan(**options, skip_corrupt=True)
    sc.build(tmp_path / "c", **options, **QUIET, skip_corrupt=True)
    assert found.predicted_bytes == pytest.approx(written(tmp_path / "c"), rel=0.03)


# -- time and break-even ---------------------------------------------------------------------------------------


class Slow(ToyTeacher):
    """A batch of any size takes 40 ms, the first one after the picture of noise ``start`` seconds more."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.calls, self.start = 0, start

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        time.sleep(0.04 + self.start * (self.calls == 2))
        return super().__call__(pixels)


def test_rates_are_those_of_a_build_under_way():
    found = sc.plan(source=ToyImages(2000), teacher=Slow(1.5), views=10, batch=32)
    assert 32 / 0.04 * 0.4 < found.teacher_rows_per_second <= 32 / 0.04
    assert 100 < found.rows_per_second <= found.teacher_rows_per_second
    assert found.hours * 3600 >= 20_000 / found.rows_per_second
    assert found.hours * 3600 < 20_000 / found.rows_per_second + 20
    shared = sc.plan(source=ToyImages(2000), teacher=Slow(), views=10, batch=32, world=4, rank=1)
    assert shared.hours < found.hours / 2


def test_break_even_is_where_the_teacher_online_has_taken_as_long():
    found = sc.plan(source=ToyImages(2000), teacher=Slow(), views=10, batch=32, epochs=7)
    an_epoch = 2000 / found.teacher_rows_per_second / 3600
    assert (found.break_even_epochs - 1) * an_epoch < found.hours <= found.break_even_epochs * an_epoch
    assert found.break_even_epochs >= 10  # each view costs at least one answer
    assert [row["students"] for row in found.online] == [1, 2, 5] and found.epochs == 7
    for row in found.online:
        assert row["online_hours"] == pytest.approx(row["students"] * 7 * an_epoch)
        assert row["cache_hours"] == found.hours
        assert row["pays"] == (row["students"] * 7 >= found.break_even_epochs)
    assert not found.online[0]["pays"] and found.online[2]["pays"]
    text = telling.tell(found, None)
    assert "1 student × 7 epochs" in text and "caching DOES NOT PAY" in text and "caching pays" in text


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"pilot": 0}, SpecError, "pilot"),
        ({"epochs": 0}, SpecError, "epochs"),
        ({"views": 0}, SpecError, "views is 0"),
        ({"batch": 0}, SpecError, "batch"),
        ({"block_rows": 0}, SpecError, "block_rows"),
        ({"rank": 3, "world": 2}, SpecError, "rank 3 of world 2"),
        ({"targets": {"lay": "int8"}}, TeacherError, "no target 'lay'"),
        ({"recipe": "crp(3)"}, SpecError, "crp"),
        ({"recipe": "mixup", "source": ToyImages(1)}, SpecError, "mixes every sample with another"),
        ({"source": "nowhere"}, SourceError, "there is no nowhere"),
        ({"teacher": "no_such_package:make"}, TeacherError, "no_such_package"),
        ({"view": 3}, TypeError, "view"),
    ],
)
def test_errors_are_those_of_the_build(options: dict[str, Any], error: type[Exception], told: str):
    with pytest.raises(error, match=told):
        sc.plan(**{"source": ToyImages(8), "teacher": toy_teacher()} | options)


def test_a_folder_of_something_else_is_refused_as_by_the_build(tmp_path: Path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("x")
    with pytest.raises(MismatchError, match="holds something else"):
        sc.plan(tmp_path / "c", source=ToyImages(8), teacher=toy_teacher())
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["thesis.tex"]


# -- the command -----------------------------------------------------------------------------------------------


def command(folder: Path) -> list[str]:
    return ["plan", "--source", str(folder), "--teacher", "softcache.testing:toy_teacher", "--views", "4"]


def test_the_command_prints_a_table_or_json_and_leaves_nothing(
    tmp_path: Path, small_folder: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    out = tmp_path / "there" / "c"
    assert cli.main([*command(small_folder), "-o", str(out), "--epochs", "3"]) == 0
    text, err = capsys.readouterr()
    assert err == "" and "20 samples × 4 views = 80 rows" in text and "it fits" in text
    assert "5 students × 3 epochs" in text
    assert cli.main([*command(small_folder), "--json", "--pilot", "5", "--batch", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(inspect.get_annotations(forecast.Plan))
    assert found["disk_free"] is None and found["fits"] is None
    assert found["pilot"]["samples"] == 8 and found["teacher_rows"] == 80
    assert not list(temporary.iterdir()) and not out.parent.exists()


def test_a_config_is_read_as_by_the_build(tmp_path: Path, small_folder: Path, capsys):
    config = tmp_path / "c.yaml"
    text = f"source: {small_folder}\nteacher: softcache.testing:toy_teacher\nviews: 3\nprogress: false\n"
    config.write_text(text)
    assert cli.main(["plan", str(config), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert cli.main(["build", str(config), "-o", str(tmp_path / "c")]) == 0
    assert planned["predicted_bytes"] == pytest.approx(written(tmp_path / "c"), rel=0.02)
    config.write_text(text + "batch: two\n")
    assert cli.main(["plan", str(config)]) == 1
    assert "--batch" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_told_and_exits_with_1(
    tmp_path: Path, small_folder: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    real = os.statvfs(tmp_path)
    full = os.statvfs_result([*real[:4], 3, *real[5:]])  # f_bavail: three blocks
    monkeypatch.setattr(forecast.os, "statvfs", lambda path: full)
    arguments = [*command(small_folder), "-o", str(tmp_path / "c")]
    assert cli.main(arguments) == 1
    assert "IT DOES NOT FIT" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_ctrl_c_deletes_the_pilot(tmp_path: Path, small_folder: Path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    root = Path(inspect.getfile(sc)).parents[1]
    log = tmp_path / "log"
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "TMPDIR": str(temporary),
        "SOFTCACHE_TOY_DELAY": "0.3",
    }
    environment["SOFTCACHE_TOY_LOG"] = str(log)
    arguments = [*command(small_folder), "--batch", "2", "--block-rows", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "softcache.cli", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not log.exists() or log.read_text().count("\n") < 4:
            time.sleep(0.05)
            assert process.poll() is None
        assert list(temporary.glob("softcache-plan-*/pilot/receipts/*"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.strip() == "stopped; the pilot is deleted"
    assert not list(temporary.iterdir())


def test_json_values_are_plain(small_folder: Path):
    found = sc.plan(source=small_folder, teacher=toy_teacher())
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


def test_a_sample_of_a_source_is_what_limit_chooses(small_folder: Path):
    whole, limited = sc.Source(small_folder), sc.Source(small_folder, limit=7)
    part = whole.sample(7)
    assert part.ids == limited.ids and part.fingerprint == limited.fingerprint
    assert part.labels.tolist() == limited.labels.tolist() and part.split == limited.split
    assert whole.sample(99).ids == whole.ids
    assert set(limited.sample(3).ids) < set(limited.ids)
    assert all((part.image(i) == whole.image(whole.index(id))).all() for i, id in enumerate(part.ids))
