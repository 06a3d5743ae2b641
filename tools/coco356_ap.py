"""Does a cache of detections say what the detector said? AP of the cache alone, and the gradients a student would get.

    python tools/coco356_ap.py --data ../shared/data [--json] [--only yolox] [--target 'detections=top(300, background=64)']

Builds a cache of the validation images for every detector there, one view each. ``live`` is the AP (pycocotools, 50:95) of
the teacher's own dense answers to these views, ``cache`` that of the rows read back in a process that can import neither
onnxruntime nor a teacher; ``anchor`` was measured independently.

AP does not see the background, where soft labels live, so ``grad_error_pos`` and ``grad_error_neg`` are the relative errors
of the gradient that the classification loss (binary cross entropy to the teacher's probabilities) has with respect to a
student's logits: over positives (the ten anchors of every object that TOOD's task-aligned assigner takes, Feng et al. 2021:
score^0.5 · IoU^6; the one query of DETR types) each for itself; over all others as their sum, which is the gradient of the
class layer's bias. A positive that the cache does not hold counts as lost. ``loss_error`` is of that loss, over everything;
``box_error`` of the gradient of squared box errors, over positives that are held. The student's logits are the teacher's,
shrunk by a third and blurred by noise: somebody half-way there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

CONFIDENCE, IOU, MOST = 0.001, 0.7, 300
SPLIT = "val2017"


@dataclass(frozen=True)
class Detector:
    """A graph, how its images are laid into its input, what is kept, and the AP that was measured independently."""

    file: str
    recipe: str
    target: str
    anchor: float


_DENSE, _SET = "detections=top(1000, background=200, inside=100)", "detections=all"

DETECTORS = {
    "yolov8n": Detector("yolov8n_coco_int8_640.onnx", "letterbox(640)", _DENSE, 38.0),
    "deimv2-femto": Detector("deimv2_femto_coco_416.onnx", "resize((416, 416))", _SET, 34.2),
    "yolox-nano": Detector("yolox_nano_coco_416.onnx", "letterbox(416, align=top_left)", _DENSE, 28.6),
    "deimv2-atto": Detector("deimv2_atto_coco_320.onnx", "resize((320, 320))", _SET, 26.3),
}


@dataclass(frozen=True)
class Row:
    """What is printed of a detector; the errors are shares, AP is in percent."""

    teacher: str
    live: float
    cache: float
    anchor: float
    bytes_per_image: int
    grad_error_pos: float
    grad_error_neg: float
    loss_error: float
    box_error: float
    seconds_per_100: float
    teacher_share: float


# -- detections of an image --------------------------------------------------------------------------------


def detections(scores: np.ndarray, boxes: np.ndarray, nms: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most 300 (box, class, score) of an image: ``scores`` (items, C), ``boxes`` (items, 4) in pixels."""
    import torch
    from torchvision.ops import batched_nms

    item, label = np.nonzero(scores > (CONFIDENCE if nms else 0))
    score = scores[item, label]
    order = np.argsort(-score, kind="stable")[: 30_000 if nms else MOST]
    item, label, score = item[order], label[order], score[order]
    if nms:
        box, by, of = (torch.from_numpy(a) for a in (boxes[item].astype(np.float32), score, label))
        kept = batched_nms(box, by.float(), of, IOU)[:MOST].numpy()
        item, label, score = item[kept], label[kept], score[kept]
    return boxes[item], label, score


def average_precision(truth: Any, found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """pycocotools' AP 50:95 in percent of the images in ``found``, by file name."""
    from pycocotools.cocoeval import COCOeval

    numbers = {image["file_name"]: number for number, image in truth.imgs.items()}
    categories = sorted(truth.cats)
    told = [
        {
            "image_id": numbers[id],
            "category_id": categories[label],
            "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
            "score": float(score),
        }
        for id, of in found.items()
        for (x1, y1, x2, y2), label, score in zip(*of, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(truth, truth.loadRes(told), "bbox")
        judge.params.imgIds = [numbers[id] for id in found]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return 100 * float(judge.stats[0])


def open_truth(data: Path) -> Any:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(data / "coco356" / "annotations" / f"instances_{SPLIT}.json"))


# -- from the cache alone ----------------------------------------------------------------------------------


def from_cache(folder: Path, data: Path) -> float:
    """AP of what the cache holds."""
    import softcache as sc
    from softcache.geometry import to_source

    cache = sc.open(folder)
    # the background stands for others, and what lies inside was chosen by the very boxes that are looked for
    most = getattr(cache.targets["detections"].codec, "n", None)
    found = {}
    for i, id in enumerate(cache.ids):
        kept = cache.read(0, np.array([i]), "detections")["detections"][0]
        view = cache.read_views(0, np.array([i]))[0]
        boxes = to_source(view, kept.parts["boxes"][:most].astype(np.float64))
        found[id] = detections(kept.scores()[:most], inside(boxes, view), bool(kept.layout.levels))
    return average_precision(open_truth(data), found)


def inside(boxes: np.ndarray, view: Any) -> np.ndarray:
    """Cut at the edges of the image, as evaluations do."""
    return np.clip(boxes, 0, [view.image_width, view.image_height] * 2)


def without_teacher(folder: Path, data: Path) -> float:
    """The same, in a process of its own that can import no teacher."""
    code = (
        "import sys; sys.modules['onnxruntime'] = sys.modules['softcache.teachers.onnx'] = None; "
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; import coco356_ap as tool; "
        f"print(tool.from_cache(Path({str(folder)!r}), Path({str(data)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


# -- beside the living teacher -----------------------------------------------------------------------------


def beside(cache: Any, source: Any, teacher: Any, truth: Any) -> dict[str, float]:
    """AP of the living teacher on the cached views, and how far a student's gradients are from its own."""
    from softcache.geometry import to_source, to_view
    from softcache.recipe import render

    layout = teacher.layouts["detections"]
    found, errors = {}, Errors()
    for i, id in enumerate(cache.ids):
        view = cache.read_views(0, np.array([i]))[0]
        values = teacher(render(source.image(source.index(id)), view, teacher.input_spec.size)[None])[
            "detections"
        ][0]
        said = dict(layout.parts(values))
        boxes = inside(to_source(view, said["boxes"].astype(np.float64)), view)
        found[id] = detections(layout.scores(said), boxes, bool(layout.levels))
        objects = source.boxes(source.index(id))
        taken = positives(layout, said, to_view(view, objects.xyxy), objects.label)
        kept = cache.read(0, np.array([i]), "detections")["detections"][0]
        errors.add(layout, said, kept, taken, np.random.default_rng(i))
    return {"live": average_precision(truth, found), **errors.told()}


def positives(
    layout: Any, said: dict[str, np.ndarray], objects: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Which items are taken for an object, bool ``(items,)``."""
    most, scores = 10 if layout.levels else 1, layout.scores(said)
    taken = np.zeros(len(scores), bool)
    for box, label in zip(objects, labels, strict=True):
        aligned = np.sqrt(scores[:, label]) * overlap(said["boxes"], box) ** 6
        best = np.argsort(-aligned)[:most]
        taken[best[aligned[best] > 0]] = True
    return taken


def overlap(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The IoU of each box with one, ``(items,)``."""
    corner, end = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    common = np.clip(end - corner, 0, None).prod(axis=-1)
    sizes = [np.clip(b[..., 2:] - b[..., :2], 0, None).prod(axis=-1) for b in (boxes, box)]
    return common / np.maximum(sizes[0] + sizes[1] - common, 1e-12)


class Errors:
    """Sums over images; see the module's text."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(
        self, layout: Any, said: dict[str, np.ndarray], kept: Any, positive: np.ndarray, rng: Any
    ) -> None:
        """Of one image: ``said`` (items, …) by the living teacher, ``kept`` in the cache; ``positive`` (items,) bool."""
        student = said["logits"] * (2 / 3) + rng.normal(size=said["logits"].shape)
        target = layout.scores(said)
        held = kept.index
        live, cached = sigmoid(student) - target, sigmoid(student[held]) - kept.scores()
        gradient = np.zeros_like(live)
        gradient[held] = cached
        self._add("grad_error_pos", gradient[positive], live[positive])
        far = ~positive[held]
        self._add(
            "grad_error_neg", (cached * kept.weight[:, None])[far].sum(axis=0), live[~positive].sum(axis=0)
        )
        loss = (entropy(student[held], kept.scores()) * kept.weight).sum()
        self._add("loss_error", loss, entropy(student, target).sum())
        near = positive[held]
        moved = said["boxes"] + rng.normal(scale=0.01, size=said["boxes"].shape)  # the student's boxes
        gap = moved[held] - kept.parts["boxes"]
        self._add("box_error", gap[near], (moved - said["boxes"])[held][near])

    def _add(self, name: str, found: Any, true: Any) -> None:
        """Squares of what is wrong and of what is right: a positive that matters little counts little."""
        wrong, whole = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = wrong + float(np.square(found - true).sum()), whole + float(np.square(true).sum())

    def told(self) -> dict[str, float]:
        """The relative error of each, over all images."""
        return {name: float(np.sqrt(wrong / whole)) for name, (wrong, whole) in self._sums.items()}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def entropy(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Binary cross entropy over the classes, (items,)."""
    return (np.logaddexp(0, logits) - target * logits).sum(axis=-1)


# -- the table ---------------------------------------------------------------------------------------------


def measured(name: str, data: Path, out: Path, target: str | None) -> Row:
    import softcache as sc
    from softcache.teachers import Options, load

    detector, folder = DETECTORS[name], out / name
    path, source = data / "weights" / detector.file, sc.Source(data / "coco356", split=SPLIT)
    cache = sc.build(
        folder,
        source=source,
        teacher=f"onnx:{path}",
        recipe=detector.recipe,
        targets=[target or detector.target],
        batch=8,
        progress=False,
    )
    manifest = cache.manifest
    assert manifest is not None
    pace = cache.pace or {"rows": np.nan, "teacher_rows": np.nan}  # it was there already
    teacher = load(f"onnx:{path}", Options(taps=("detections",)))
    errors = beside(cache, source, teacher, open_truth(data))
    return Row(
        teacher=name,
        cache=without_teacher(folder, data),
        anchor=detector.anchor,
        bytes_per_image=round(manifest.report.bytes / len(cache)),
        seconds_per_100=100 / pace["rows"],
        teacher_share=pace["rows"] / pace["teacher_rows"],
        **errors,
    )


def show(rows: list[Row]) -> Iterator[str]:
    yield f"confidence {CONFIDENCE}, IoU of NMS {IOU}, maxDets {MOST}; DETR types without NMS"
    yield "| teacher | anchor | live | cache | kB an image | grad. pos. | grad. neg. | loss | boxes | s / 100 | teacher |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for r in rows:
        errors = (r.grad_error_pos, r.grad_error_neg, r.loss_error, r.box_error)
        yield (
            f"| {r.teacher} | {r.anchor:.1f} | {r.live:.2f} | {r.cache:.2f} | {r.bytes_per_image / 1000:.1f} | "
            + " | ".join(f"{e:.2%}" for e in errors)
            + f" | {r.seconds_per_100:.1f} | {r.teacher_share:.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder with coco356/ and weights/")
    parser.add_argument("--out", type=Path, help="keep the caches here, and use what is there")
    parser.add_argument("--only", action="append", choices=DETECTORS, help="repeatable")
    parser.add_argument("--target", help=f"what to keep; by default {_DENSE!r}, and of DETR types {_SET!r}")
    parser.add_argument("--json", action="store_true", help="a list of objects on stdout")
    args = parser.parse_args()
    with TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        rows = [measured(name, args.data, out, args.target) for name in args.only or DETECTORS]
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else "\n".join(show(rows)))


if __name__ == "__main__":
    main()
