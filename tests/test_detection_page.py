"""docs/detection.md, walked: a YOLO of somebody's own over a data.yaml of somebody's own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from quickstart import walk  # noqa: E402

PAGE = ROOT / "docs" / "detection.md"


def test_the_walk(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    ultralytics = pytest.importorskip("ultralytics", reason="needs ultralytics: the extra 'ultralytics'")
    photos = as_yolo(shared_data / "coco356", tmp_path / "drone")
    somebodys(ultralytics, photos).save(tmp_path / "best.pt")

    steps = list(walk(PAGE.read_text(), tmp_path))
    said = "".join(step.printed for step in steps)
    assert "24 samples × 3 views" in said and "detections as top(500, background=100, inside=100)" in said
    assert len(list((tmp_path / "look").glob("*.png"))) == 8
    assert said.count("(320, 320, 3)") == 4


def as_yolo(coco: Path, root: Path) -> list[Path]:
    """24 photographs with their boxes, written as Ultralytics has them."""
    told = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    categories = sorted(told["categories"], key=lambda c: c["id"])
    labels = {c["id"]: i for i, c in enumerate(categories)}
    images = sorted(told["images"], key=lambda i: i["id"])[:24]
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True)
    for image in images:
        lines = []
        for a in (a for a in told["annotations"] if a["image_id"] == image["id"]):
            x, y, w, h = np.array(a["bbox"]) / np.tile([image["width"], image["height"]], 2)
            lines.append(f"{labels[a['category_id']]} {x + w / 2:.6f} {y + h / 2:.6f} {w:.6f} {h:.6f}\n")
        name = Path(image["file_name"])
        shutil.copy(coco / "images" / "train2017" / name, root / "images" / "train")
        (root / "labels" / "train" / name.with_suffix(".txt")).write_text("".join(lines))
    names = "".join(f"  {i}: {c['name']}\n" for i, c in enumerate(categories))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/train\nnames:\n{names}")
    return sorted((root / "images" / "train").iterdir())


def somebodys(ultralytics: Any, photos: list[Path]) -> Any:
    """A YOLOv8n of random weights, its batch norms calibrated: else its answers would not depend on the picture."""
    import torch
    from PIL import Image

    model = ultralytics.YOLO("yolov8n.yaml")
    for module in model.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    pixels = [np.asarray(Image.open(photo).convert("RGB").resize((320, 320))) for photo in photos[:8]]
    with torch.no_grad():
        model.model.train()(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255)
    model.model.eval().names = dict(enumerate(names_of(photos[0].parents[2] / "data.yaml")))
    return model


def names_of(file: Path) -> list[str]:
    return [line.partition(": ")[2] for line in file.read_text().splitlines() if line.startswith("  ")]
