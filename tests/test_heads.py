"""Heads of detectors' graphs: against the graphs' own outputs, and boxes reckoned by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.errors import SoftcacheError, SpecError, TeacherError
from softcache.targets.layout import Layout
from softcache.teachers import Options, heads, load
from softcache.teachers.onnx import OnnxTeacher

pytest.importorskip("onnxruntime")

SIZE = (64, 32)  # levels of 8x4, 4x2 and 2x1 cells
CELLS = 32 + 8 + 2


def answer(head: heads.Head, said: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Layout]:
    layout = head.layout(said, SIZE)
    values = head.read(said, SIZE)
    assert values.shape[-1] == layout.width
    return dict(layout.parts(values)), layout


def test_yolo_boxes_are_shares_of_the_picture_and_scores_logits():
    said = {"out": np.zeros((1, 4 + 3, CELLS), np.float32)}
    said["out"][0, :, 5] = 16, 32, 8, 16, 0.5, 0.0, 1.0
    head = heads.fitting(None, said, SIZE, "x")
    parts, layout = answer(head, said)
    assert layout.levels == ((8, 4), (4, 2), (2, 1)) and layout.cells == CELLS
    assert np.allclose(parts["boxes"][0, 5], [12 / 32, 24 / 64, 20 / 32, 40 / 64])
    assert np.allclose(parts["logits"][0, 5], [0, -np.log(1e6 - 1), np.log(1e6 - 1)], rtol=1e-2)
    assert np.allclose(layout.scores(parts)[0, 5], [0.5, 0, 1], atol=2e-6)


def test_yolox_cells_are_counted_along_rows_level_by_level():
    said = {"out": np.zeros((2, CELLS, 5 + 2), np.float32)}
    item = 32 + 2 * 2 + 1  # of the second level, of 4x2 cells of 16 pixels: row 2, column 1
    said["out"][1, item] = 0.5, 0.25, np.log(2), np.log(0.5), 0.5, 0.5, 0.9
    head = heads.fitting("yolox", said, SIZE, "x")
    parts, layout = answer(head, said)
    middle, sides = ((1 + 0.5) * 16, (2 + 0.25) * 16), (32, 8)
    box = [
        middle[0] - sides[0] / 2,
        middle[1] - sides[1] / 2,
        middle[0] + sides[0] / 2,
        middle[1] + sides[1] / 2,
    ]
    assert np.allclose(parts["boxes"][1, item], np.array(box) / [32, 64, 32, 64])
    assert np.allclose(layout.scores(parts)[1, item], [0.25, 0.45], atol=1e-6)


def test_detr_with_a_class_for_nothing():
    said = {"pred_logits": np.zeros((1, 2, 4), np.float32), "pred_boxes": np.full((1, 2, 4), 0.5, np.float32)}
    said["pred_logits"][0, 0] = 1, 2, 3, 4
    parts, layout = answer(heads.parse("detr(score=softmax)"), said)
    assert layout.background == 3 and not layout.levels
    assert np.allclose(parts["boxes"], [0.25, 0.25, 0.75, 0.75])
    assert np.allclose(layout.scores(parts)[0, 0], (np.exp([1, 2, 3]) / np.exp([1, 2, 3, 4]).sum()))


@pytest.mark.parametrize(
    "text", ["yolo", "yolox(output=out)", "yolo(strides=(8, 16))", "detr(score=softmax)"]
)
def test_what_is_spelled_makes_the_same(text: str):
    head = heads.parse(text)
    assert heads.spelled(head) == text and heads.parse(heads.spelled(head)) == head


@pytest.mark.parametrize(
    ("text", "shapes", "told"),
    [
        (None, {"out": (1, 84, 8400)}, r"no head that is known: .* it answers out \(1, 84, 8400\)"),
        (None, {"out": (1, 300, 6)}, "no head that is known"),
        ("yolo", {"out": (1, CELLS, 85)}, "'yolo' does not fit"),
        ("detr", {"pred_logits": (1, 5, 3), "pred_boxes": (1, 4, 4)}, "'detr' does not fit"),
        (None, {"a": (1, 7, CELLS), "b": (1, CELLS, 7)}, "fit the heads yolo and yolox"),
        ("yolov3", {"out": (1, 7, CELLS)}, "unknown head 'yolov3'"),
        ("yolo|detr", {"out": (1, 7, CELLS)}, "has 2 steps"),
        ("detr(score=max)", {"out": (1, 7, CELLS)}, "score is sigmoid or softmax"),
    ],
)
def test_what_does_not_fit_is_told_with_what_was_found(text: str | None, shapes: dict[str, tuple], told: str):
    found = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(SoftcacheError, match=told):
        heads.fitting(text, found, SIZE, "onnx:m.onnx")


@pytest.mark.parametrize("head", [heads.Yolo(), heads.Yolox()])
def test_logits_are_not_taken_for_probabilities(head: heads.Head):
    shape = (1, 7, CELLS) if isinstance(head, heads.Yolo) else (1, CELLS, 7)
    values = np.full(shape, 0.25, np.float32)
    if isinstance(head, heads.Yolo):
        values[:, :4] = 25
    head.read({"out": values}, SIZE)
    values[0, -1, -1] = 3.5
    with pytest.raises(TeacherError, match=r"go from 0 to 3\.5, and this head reads probabilities"):
        head.read({"out": values}, SIZE)


@pytest.mark.parametrize("size", [(32, 32), SIZE, (416, 416)])
def test_boxes_that_a_yolox_graph_has_decoded_are_told_from_raw_ones(size: tuple[int, int]):
    random, head, rows = np.random.default_rng(0), heads.Yolox(), []
    for stride in head.strides:  # cx, cy, w, h as YOLOX's decode_outputs reckons them, cell by cell
        for y in range(size[0] // stride):
            for x in range(size[1] // stride):
                dx, dy, log_w, log_h = random.normal(0.5, 1.0, 4)
                rows.append(((dx, dy, log_w, log_h), ((dx + x) * stride, (dy + y) * stride)))
    raw = np.full((1, len(rows), 7), 0.25, np.float32)
    raw[0, :, :4] = [offsets for offsets, _ in rows]
    decoded = raw.copy()
    decoded[0, :, :2] = [middle for _, middle in rows]
    decoded[0, :, 2:4] = np.exp(raw[0, :, 2:4]) * 8
    assert np.isfinite(head.read({"out": raw}, size)).all()
    head.read({"out": raw * [10, 10, 1, 1, 1, 1, 1]}, size)  # of random weights they lie anywhere near
    with pytest.raises(TeacherError, match=r"decodes its boxes itself: .* without --decode_in_inference"):
        head.read({"out": decoded}, size)
    decoded[0, :, :4] /= [size[1], size[0]] * 2
    if size == (416, 416):  # where there are enough cells to know
        with pytest.raises(TeacherError, match=r"they are pixels or shares, and the head yolox reads"):
            head.read({"out": decoded}, size)


def test_boxes_in_shares_are_not_taken_for_pixels():
    random, head = np.random.default_rng(0), heads.Yolo()
    said = random.uniform(0, 1, (2, 4 + 3, CELLS)).astype(np.float32)
    with pytest.raises(
        TeacherError, match=r"no number of the graph's boxes is beyond 0\.99.*shares of the sides"
    ):
        head.read({"out": said}, SIZE)
    said[1, 2, 7] = 20  # one side of one box in the batch is enough to know
    head.read({"out": said}, SIZE)


@pytest.mark.parametrize("strides", ["8", "(0,)", "(8, -16)", "(8.0, 16)", "()", "(True,)", "(8, x)"])
@pytest.mark.parametrize("head", ["yolo", "yolox"])
def test_strides_that_are_none_are_refused(head: str, strides: str):
    with pytest.raises(SpecError, match=rf"{head}: strides are whole numbers of at least 1, .* not "):
        heads.parse(f"{head}(strides={strides})")


# -- real detectors ----------------------------------------------------------------------------------------

DETECTORS = {
    "yolov8n_coco_int8_640": ("yolo", 8400, "RGB"),
    "yolox_nano_coco_416": ("yolox", 3549, "BGR"),
    "deimv2_atto_coco_320": ("detr", 100, "RGB"),
}


def detector(path: Path) -> OnnxTeacher:
    teacher = load(f"onnx:{path}", Options(taps=("detections",)))
    assert isinstance(teacher, OnnxTeacher)
    return teacher


def bus(shared_data: Path, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    path = sorted((shared_data / "coco356" / "images" / "val2017").iterdir())[0]
    return np.asarray(Image.open(path).convert("RGB").resize((size[1], size[0])))[None]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_real_detector_is_recognised(shared_data: Path, name: str):
    head, items, color = DETECTORS[name]
    teacher = detector(shared_data / "weights" / f"{name}.onnx")
    layout = teacher.layouts["detections"]
    values = teacher(bus(shared_data, teacher.input_spec.size))["detections"]
    assert values.shape == (1, items, layout.width) and values.dtype == np.float32
    assert teacher.input_spec.color == color and teacher.identity().head == head
    parts = dict(layout.parts(values))
    assert parts["logits"].shape[-1] == 80 and layout.scores(parts).max() > 0.5
    sure = parts["boxes"][0, layout.scores(parts)[0].max(axis=-1) > 0.3]
    assert len(sure) and (sure[:, 2:] > sure[:, :2]).all() and np.abs(sure - 0.5).max() < 0.6


def test_its_own_decoding_says_the_same(shared_data: Path):
    """DEIMv2's graph has boxes in pixels of the original, sorted by score, beside the raw queries."""
    import onnxruntime

    path = shared_data / "weights" / "deimv2_atto_coco_320.onnx"
    pixels = bus(shared_data, (320, 320))
    teacher = detector(path)
    layout = teacher.layouts["detections"]
    parts = dict(layout.parts(teacher(pixels)["detections"][0]))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {"images": pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255}
    feed["orig_target_sizes"] = np.array([[320, 320]])
    labels, boxes, scores = map(np.asarray, session.run(["labels", "boxes", "scores"], feed))
    ours = layout.scores(parts)
    order = np.argsort(-ours.ravel(), kind="stable")[: scores.shape[1]]
    query, label = np.divmod(order, ours.shape[1])
    assert np.allclose(ours.ravel()[order], scores[0], atol=1e-5)
    assert (label == labels[0])[scores[0] > 0.01].all()
    assert np.allclose(parts["boxes"][query][:20] * 320, boxes[0][:20], atol=0.01)


def test_a_graph_of_raw_outputs_needs_no_head(shared_data: Path):
    path = shared_data / "weights" / "deimv2_atto_coco_320.onnx"
    unit: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    teacher = load(f"onnx:{path}", Options(taps=("pred_logits",), **unit))
    assert teacher(bus(shared_data, (320, 320)))["pred_logits"].shape == (1, 100, 80)
    with pytest.raises(SpecError, match="ask for that target"):
        load(f"onnx:{path}", Options(taps=("pred_logits",), head="detr", **unit))
    with pytest.raises(TeacherError, match=r"'yolox' does not fit onnx:deimv2_atto_coco_320.onnx"):
        load(f"onnx:{path}", Options(taps=("detections",), head="yolox"))
    with pytest.raises(SpecError, match="leave it out for torchvision:resnet18"):
        load("torchvision:resnet18", Options(head="detr"))
