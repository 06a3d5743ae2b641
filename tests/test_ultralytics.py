"""The contract with Ultralytics: what is captured is what forward hooks of the installed version catch.

Real architectures with random weights. A fresh one ignores its input (batch norms of variance one let nothing through, and
RT-DETR's box heads are zero), so batch norms are calibrated on the package's own photographs and box heads are perturbed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.errors import SpecError, TeacherError
from softcache.teachers import Options, load
from softcache.teachers.ensemble import assemble

torch = pytest.importorskip("torch")

YOLOS = ["yolov8n", "yolov10n", "yolo11n", "yolo26n"]
DETRS = ["rtdetr-l", "yolov8-rtdetr"]
HEIGHT, WIDTH = 160, 192
SIZE: dict[str, Any] = {"input_size": (HEIGHT, WIDTH)}


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package, with its settings in a folder of its own and off the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_AUTOINSTALL", "false")
        yield pytest.importorskip("ultralytics", reason="needs ultralytics: the extra 'ultralytics'")


@pytest.fixture(scope="module")
def pixels(library: Any) -> np.ndarray:
    """Two photographs, uint8 (2, H, W, 3)."""
    from PIL import Image

    names = (library.ASSETS / name for name in ("bus.jpg", "zidane.jpg"))
    return np.stack([np.asarray(Image.open(name).resize((WIDTH, HEIGHT))) for name in names])


def seen(pixels: np.ndarray) -> Any:
    """Pixels as the networks are shown them, / 255. In the memory they came in: the order of a sum depends on it."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


@dataclass
class Made:
    """A model that depends on its input, and the file of its weights."""

    model: Any
    weights: Path
    teacher: Callable[..., Any]


def enliven(model: Any, pixels: np.ndarray) -> Any:
    head = model.model[-1]
    last = [h.layers[-1] for h in getattr(head, "dec_bbox_head", [])]
    last += [head.enc_bbox_head.layers[-1]] if last else []
    last += [c[-1] for n in ("cv2", "one2one_cv2") for c in getattr(head, n, None) or []]
    with torch.no_grad():
        for layer in last:
            layer.weight.add_(torch.randn_like(layer.weight) * 0.05)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        for _ in range(2):
            model.train()(seen(pixels))
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Callable[[str], Made]:
    """name → the model of that architecture; each is made once."""
    from safetensors.torch import save_file
    from ultralytics.nn import tasks

    found: dict[str, Made] = {}

    def get(name: str, nc: int | None = None) -> Made:
        key = f"{name}-{nc}"
        if key not in found:
            torch.manual_seed(1)
            kind = tasks.RTDETRDetectionModel if "rtdetr" in name else tasks.DetectionModel
            model = enliven(kind(f"{name}.yaml", nc=nc, verbose=False), pixels)
            file = tmp_path_factory.mktemp("weights") / f"{key}.safetensors"
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)

            def teacher(*taps: str, **options: Any) -> Any:
                return load(f"ultralytics:{name}.yaml", Options(weights=file, taps=taps, **SIZE | options))

            found[key] = Made(model, file, teacher)
        return found[key]

    return get


class Hooks:
    """What forward hooks on modules catch while ``model`` sees ``pixels``: (inputs, output) by the name of the hook."""

    def __init__(self, model: Any, pixels: np.ndarray, **modules: Any):
        self.inputs: dict[str, Any] = {}
        self.output: dict[str, Any] = {}
        handles = [module.register_forward_hook(self.keeper(name)) for name, module in modules.items()]
        with torch.inference_mode():
            self.y, self.raw = model(seen(pixels))
        for handle in handles:
            handle.remove()

    def keeper(self, name: str) -> Any:
        def keep(_module: Any, inputs: Any, output: Any) -> None:
            self.inputs[name] = inputs
            self.output[name] = output.clone() if isinstance(output, torch.Tensor) else output

        return keep


def corners(boxes: np.ndarray) -> np.ndarray:
    """cx, cy, w, h → x1, y1, x2, y2."""
    return np.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=-1)


# -- YOLO ------------------------------------------------------------------------------------------------------


def branch(model: Any, which: str) -> tuple[Any, Any]:
    """The box layers and the class layers of a head, one a level."""
    head = model.model[-1]
    return (head.cv2, head.cv3) if which == "one2many" else (head.one2one_cv2, head.one2one_cv3)


def said_by(model: Any, pixels: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits, distances' logits, boxes in the unit square) by hooks on the last convolutions, in float64 from there."""
    boxes, classes = branch(model, which)
    hooks = Hooks(
        model,
        pixels,
        **{f"box{i}": layer[-1] for i, layer in enumerate(boxes)},
        **{f"class{i}": layer[-1] for i, layer in enumerate(classes)},
    )
    levels = [hooks.output[f"class{i}"].shape[2:] for i in range(len(boxes))]
    logits, sides = (
        np.concatenate(
            [hooks.output[f"{kind}{i}"].numpy().reshape(2, -1, h * w) for i, (h, w) in enumerate(levels)], 2
        )
        for kind in ("class", "box")
    )
    logits, sides = logits.transpose(0, 2, 1), sides.transpose(0, 2, 1)
    return logits, sides, decoded(sides, levels)


def decoded(sides: np.ndarray, levels: Any) -> np.ndarray:
    """Distances or their logits ``(B, anchors, 4 · bins)`` → boxes in the unit square, anchor by anchor, in float64."""
    bins = sides.astype(np.float64).reshape(len(sides), sides.shape[1], 4, -1)
    p = np.exp(bins - bins.max(axis=3, keepdims=True))
    mean = (p / p.sum(axis=3, keepdims=True) * np.arange(bins.shape[3])).sum(axis=3)
    distances = mean if bins.shape[3] > 1 else bins[..., 0]
    found, at = np.zeros(distances.shape), 0
    for height, width in levels:
        for row in range(height):
            for column in range(width):
                left, top, right, bottom = distances[:, at].T
                x, y = column + 0.5, row + 0.5
                box = [(x - left) / width, (y - top) / height, (x + right) / width, (y + bottom) / height]
                found[:, at] = np.stack(box, axis=1)
                at += 1
    assert at == sides.shape[1]
    return found


def heads_of(name: str) -> list[str]:
    return ["one2many", "one2one"] if name in ("yolov10n", "yolo26n") else ["one2many"]


@pytest.mark.parametrize("name", YOLOS)
def test_detections_are_what_hooks_on_the_last_convolutions_catch(name: str, made, pixels):
    who = made(name)
    heads = heads_of(name)
    names = [f"{head}.detections" for head in heads] if len(heads) > 1 else ["detections"]
    teacher = who.teacher(*names)
    found = teacher(pixels)
    assert set(found) == set(names)
    bins = 1 if name == "yolo26n" else 16
    for target, head in zip(names, heads, strict=True):
        layout = teacher.layouts[target]
        logits, sides, boxes = said_by(who.model, pixels, head)
        values = found[target]
        assert values.dtype == np.float32 and values.shape == (2, layout.cells, layout.width)
        assert layout.levels == ((20, 24), (10, 12), (5, 6)) and layout.score == "sigmoid"
        assert (layout.head, layout.background, layout.layers) == (head, None, 1)
        assert list(layout.columns) == ["logits", "boxes", "distribution"][: 2 + (bins > 1)]
        assert np.array_equal(layout.part(values, "logits"), logits)
        assert np.abs(layout.part(values, "boxes") - boxes).max() < 2e-6
        if bins > 1:
            assert np.array_equal(layout.part(values, "distribution"), sides)


@pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
def test_boxes_and_scores_are_those_the_model_decodes_itself(name: str, made, pixels):
    who = made(name)
    teacher = who.teacher("detections")
    values, layout = teacher(pixels)["detections"], teacher.layouts["detections"]
    who.model.model[-1].end2end, before = False, who.model.model[-1].end2end  # all anchors, not the best 300
    y = Hooks(who.model, pixels).y.numpy().transpose(0, 2, 1)
    who.model.model[-1].end2end = before
    expected = corners(y[..., :4].astype(np.float64)) / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    target = layout if layout.head == "one2many" else None
    if target is None:  # an older Ultralytics, which infers with the other head
        values = (teacher := who.teacher("one2many.detections"))(pixels)["one2many.detections"]
    assert np.abs(layout.part(values, "boxes") - expected).max() < 2e-6
    scores = layout.scores({"logits": layout.part(values, "logits")})
    assert np.abs(scores - y[..., 4:]).max() < 1e-6


@pytest.mark.parametrize("name", ["yolov8n", "yolo26n", *DETRS])
def test_answers_depend_on_the_picture(name: str, made, pixels):
    """Else nothing above would mean anything."""
    values = made(name).teacher("detections", "p3")(pixels)
    first, second = values["detections"]
    layout = made(name).teacher("detections").layouts["detections"]
    for part in layout.columns:
        assert np.abs(layout.part(first, part) - layout.part(second, part)).max() > 0.02, part
    assert np.abs(np.diff(values["p3"], axis=0)).max() > 0.1


@pytest.mark.parametrize("name", ["yolov8n", "yolo26n", "yolov8-rtdetr"])
def test_maps_are_what_the_modules_before_the_head_give(name: str, made, pixels):
    who = made(name)
    first = who.model.model[0]
    found = who.teacher("p3", "p4", "p5", "model.2")(pixels)
    indices = who.model.model[-1].f
    modules = {f"p{3 + i}": who.model.model[index] for i, index in enumerate(indices)}
    hooks = Hooks(who.model, pixels, **modules, **{"model.2": who.model.model[2]})
    assert set(found) == set(hooks.output) and first.i == 0
    for target, value in hooks.output.items():
        assert np.array_equal(found[target], value.numpy()), target
    assert [found[f"p{i}"].shape[2:] for i in (3, 4, 5)] == [(20, 24), (10, 12), (5, 6)]


def test_detections_of_two_heads_are_the_ones_it_infers_with(made, pixels):
    who = made("yolo26n")
    for end2end, head in ((True, "one2one"), (False, "one2many")):
        who.model.model[-1].end2end = end2end
        teacher = as_file(who.model, who.weights.parent / "m.pt", "detections", f"{head}.detections")
        assert teacher.layouts["detections"].head == head
        assert set(teacher.layouts) == {"detections", "one2many.detections", "one2one.detections"}
        found = teacher(pixels)
        assert np.array_equal(found["detections"], found[f"{head}.detections"])
    who.model.model[-1].end2end = True
    best = Hooks(rounded(who.model), pixels).y.numpy()  # (2, 300, 6): boxes in pixels, score, class
    teacher = as_file(who.model, who.weights.parent / "m.pt", "detections")
    values, layout = teacher(pixels)["detections"], teacher.layouts["detections"]
    scores = layout.scores({"logits": layout.part(values, "logits")})
    for image in range(2):
        top = np.argmax(scores[image].max(axis=1))
        assert abs(scores[image, top].max() - best[image, 0, 4]) < 1e-6
        expected = best[image, 0, :4] / [WIDTH, HEIGHT, WIDTH, HEIGHT]
        assert np.abs(layout.part(values, "boxes")[image, top] - expected).max() < 2e-6


def test_a_model_that_was_fused_has_the_head_it_kept(made, pixels, tmp_path: Path):
    model = deepcopy(made("yolo26n").model)
    model.model[-1].end2end = True
    model.fuse(verbose=False)
    teacher = as_file(model, tmp_path / "fused.pt", "detections")
    assert {n: one.head for n, one in teacher.layouts.items()} == {"detections": "one2one"}
    raw = Hooks(rounded(model), pixels).raw["one2one"]["scores"].numpy().transpose(0, 2, 1)
    found = teacher.layouts["detections"].part(teacher(pixels)["detections"], "logits")
    assert np.array_equal(found, raw)


# -- RT-DETR ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETRS)
def test_queries_of_every_layer_are_what_hooks_on_the_decoder_catch(name: str, made, pixels):
    from ultralytics.nn.modules.utils import inverse_sigmoid

    who = made(name)
    head = who.model.model[-1]
    layers = {f"layer{i}": layer for i, layer in enumerate(head.decoder.layers)}
    hooks = Hooks(who.model, pixels, **layers)
    teacher = who.teacher("queries", "detections", "encoder.detections")
    found, layout = teacher(pixels), teacher.layouts["queries"]
    assert (layout.layers, layout.score, layout.levels) == (6, "sigmoid", ())
    assert layout.columns == {"embedding": 256, "logits": 80, "boxes": 4, "reference": 4}
    assert found["queries"].shape == (2, 6 * 300, layout.width)
    for k, values in enumerate(np.split(found["queries"], 6, axis=1)):
        embedding, reference = hooks.output[f"layer{k}"], hooks.inputs[f"layer{k}"][1]
        with torch.inference_mode():
            logits = head.dec_score_head[k](embedding)
            boxes = torch.sigmoid(head.dec_bbox_head[k](embedding) + inverse_sigmoid(reference))
        assert np.array_equal(layout.part(values, "embedding"), embedding.numpy())
        assert np.array_equal(layout.part(values, "logits"), logits.numpy())
        assert np.allclose(layout.part(values, "boxes"), corners(boxes.numpy()), atol=1e-6)
        assert np.allclose(layout.part(values, "reference"), corners(reference.numpy()), atol=1e-6)
    assert np.abs(layout.part(values, "boxes") - layout.part(values, "reference")).max() > 0.01
    last_boxes, last_logits, encoder_boxes, encoder_logits, _ = hooks.raw
    for target, z, b in (
        ("detections", last_logits[-1], last_boxes[-1]),
        ("encoder.detections", encoder_logits, encoder_boxes),
    ):
        plain = teacher.layouts[target]
        assert np.array_equal(plain.part(found[target], "logits"), z.numpy())
        assert np.allclose(plain.part(found[target], "boxes"), corners(b.numpy()), atol=1e-6)
    assert np.array_equal(
        layout.part(values, "logits"), last_logits[-1].numpy()
    )  # the last layer is what it says


def test_detections_of_rtdetr_are_its_answer(made, pixels):
    who = made("yolov8-rtdetr")
    teacher = who.teacher("detections")
    values, layout = teacher(pixels)["detections"], teacher.layouts["detections"]
    best = Hooks(who.model, pixels).y.numpy()  # (2, 300, 6): cx, cy, w, h, score, class
    scores = layout.scores({"logits": layout.part(values, "logits")})
    for image in range(2):
        order = np.argsort(-scores[image].ravel(), kind="stable")[:300]
        item, label = np.divmod(order, 80)
        assert np.allclose(scores[image].ravel()[order], best[image, :, 4], atol=1e-6)
        same = (label == best[image, :, 5]).mean()  # equal scores may stand in another order
        assert same > 0.9
        boxes = layout.part(values, "boxes")[image, item[0]]
        assert np.allclose(boxes, corners(best[image, 0, :4]), atol=1e-6)


def test_queries_that_are_learned_are_a_constant(made, pixels, tmp_path: Path):
    model = deepcopy(made("yolov8-rtdetr").model)
    assert set(as_file(model, tmp_path / "a.pt", "p3").constants()) == {"class_embedding"}
    head = model.model[-1]
    head.learnt_init_query, head.tgt_embed = True, torch.nn.Embedding(300, 256)
    teacher = as_file(model, tmp_path / "b.pt", "queries")
    assert np.array_equal(
        teacher.constants()["query_embedding"], head.tgt_embed.weight.detach().half().float().numpy()
    )
    assert teacher(pixels)["queries"].shape == (2, 1800, 344)


def test_probes_where_queries_start_say_what_those_say(made, pixels, tmp_path: Path):
    """Without a box head before the decoder queries start from anchors, and so from the cells under their own middles."""
    model = deepcopy(made("yolov8-rtdetr").model)
    torch.nn.init.zeros_(model.model[-1].enc_bbox_head.layers[-1].weight)
    torch.nn.init.zeros_(model.model[-1].enc_bbox_head.layers[-1].bias)
    teacher = as_file(model, tmp_path / "m.pt", "queries", "probes")
    layout, said = teacher.layouts["probes"], teacher(pixels)
    assert set(said) == {"queries"} and layout == teacher.layouts["queries"]
    start = layout.part(said["queries"], "reference")[:, :300].copy()
    said = teacher(pixels, probes=start)
    assert np.allclose(said["probes"], said["queries"], atol=2e-3)
    assert said["probes"].shape == (2, 6 * 300, layout.width)
    other = start[:, :7] * 0.9
    probed = teacher(pixels, probes=other)["probes"]
    assert np.allclose(layout.part(probed, "reference")[:, :7], other, atol=1e-6)
    assert (
        np.abs(layout.part(probed, "logits")[:, :7] - layout.part(said["probes"], "logits")[:, :7]).max()
        > 0.01
    )


def test_memory_is_what_the_decoder_attends_to(made, pixels):
    who = made("yolov8-rtdetr")
    hooks = Hooks(who.model, pixels, decoder=who.model.model[-1].decoder)
    tokens, shapes = hooks.inputs["decoder"][2:4]
    found = who.teacher("memory.p3", "memory.p4", "memory.p5")(pixels)
    start = 0
    for level, (height, width) in enumerate(shapes):
        expected = tokens[:, start : start + height * width].numpy()
        value = found[f"memory.p{3 + level}"]
        assert value.shape == (2, 256, height, width)
        assert np.array_equal(value.reshape(2, 256, -1).transpose(0, 2, 1), expected)
        start += height * width


def test_anchors_that_lie_in_a_file_are_made_anew(made, pixels, tmp_path: Path):
    """A training in half precision leaves them there, rounded, for its own size."""
    square = np.tile(pixels, (1, 2, 2, 1))[:, :256, :256]
    model, size = deepcopy(made("yolov8-rtdetr").model), {"input_size": (256, 256)}
    Hooks(model, square)
    good = as_file(model, tmp_path / "a.pt", "detections", **size)(square)["detections"]
    head = model.model[-1]
    assert head.shapes == [[32, 32], [16, 16], [8, 8]]
    head.anchors = head.anchors + 0.1
    assert np.array_equal(as_file(model, tmp_path / "b.pt", "detections", **size)(square)["detections"], good)


# -- files -----------------------------------------------------------------------------------------------------


def as_file(model: Any, path: Path, *taps: str, **options: Any) -> Any:
    """The teacher in a file such as Ultralytics' trainer writes: averaged, in half precision."""
    torch.save({"model": None, "ema": deepcopy(model).half(), "epoch": 3, "train_args": {"imgsz": 640}}, path)
    return load(f"ultralytics:{path}", Options(taps=taps, allow_pickle=True, **SIZE | options))


def rounded(model: Any) -> Any:
    """The model that is in such a file, but for anchors that were rounded with it."""
    copy = deepcopy(model).half().float()
    copy.model[-1].shapes = []
    return copy


@pytest.mark.parametrize("name", ["yolov8n", "yolov8-rtdetr"])
def test_a_checkpoint_is_the_model_in_it(name: str, made, pixels, tmp_path: Path):
    model = deepcopy(made(name).model)
    model.names = {i: f"thing {i}" for i in range(80)}
    teacher = as_file(model, tmp_path / "best.pt", "detections")
    identity = teacher.identity()
    assert (identity.name, identity.weights_format) == ("ultralytics:best.pt", "pickle")
    assert str(tmp_path) not in identity.model_dump_json()
    assert teacher.classes == tuple(f"thing {i}" for i in range(80))
    layout = teacher.layouts["detections"]
    raw = Hooks(rounded(model), pixels).raw
    logits = raw[1][-1].numpy() if "rtdetr" in name else raw["scores"].numpy().transpose(0, 2, 1)
    assert np.array_equal(layout.part(teacher(pixels)["detections"], "logits"), logits)


def test_of_two_models_in_a_checkpoint_the_averaged_one_speaks(made, tmp_path: Path):
    other, averaged = (deepcopy(made("yolov8n").model) for _ in range(2))
    other.names = {i: f"other {i}" for i in range(80)}
    averaged.names = {i: f"averaged {i}" for i in range(80)}
    for file, ema, first in (("last.pt", averaged, "averaged 0"), ("stripped.pt", None, "other 0")):
        torch.save({"model": other, "ema": ema}, tmp_path / file)
        teacher = load(f"ultralytics:{tmp_path / file}", Options(taps=("p3",), allow_pickle=True, **SIZE))
        assert teacher.classes[0] == first


def test_weights_are_of_as_many_classes_as_they_have(made):
    for name in ("yolov8n", "yolov8-rtdetr"):
        teacher = made(name, nc=3).teacher("detections")
        assert teacher.layouts["detections"].columns["logits"] == 3
        assert teacher.identity().weights_format == "safetensors" and teacher.classes is None
        assert teacher.identity().name == f"ultralytics:{name}.yaml"
        assert teacher.libraries().keys() == {"torch", "ultralytics"}


def test_without_weights_it_is_random_says_so_and_is_the_same_every_time(caplog):
    options = Options(taps=("detections",), **SIZE)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = load("ultralytics:yolov8n.yaml", options)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    other = load("ultralytics:yolov8n.yaml", options)
    assert one.identity() == other.identity() and one.identity().weights_format is None
    assert "yolov8n.yaml has random weights" in caplog.text


def test_a_classifier_has_logits(pixels, tmp_path: Path):
    from ultralytics.nn.tasks import ClassificationModel

    model = enliven(ClassificationModel("yolo11n-cls.yaml", nc=10, verbose=False), pixels)
    teacher = as_file(model, tmp_path / "m.pt")
    probabilities = Hooks(rounded(model), pixels).y.numpy()
    found = teacher(pixels)
    assert set(found) == {"logits"}
    p = np.exp(found["logits"].astype(np.float64))
    assert np.allclose(p / p.sum(axis=1, keepdims=True), probabilities, atol=1e-6)
    assert load("ultralytics:yolo11n-cls.yaml", Options()).input_spec.size == (224, 224)


def test_other_strides_name_other_levels(pixels):
    teacher = load("ultralytics:yolov8n-p6.yaml", Options(taps=("p6",), input_size=(128, 64)))
    assert teacher.layouts["detections"].levels == ((16, 8), (8, 4), (4, 2), (2, 1))
    teacher = load("ultralytics:yolov8n-p2.yaml", Options(taps=("p2",), input_size=(32, 64)))
    assert teacher.layouts["detections"].levels == ((8, 16), (4, 8), (2, 4), (1, 2))
    with pytest.raises(TeacherError, match="no map 'p6'; it has p2, p3, p4, p5"):
        load("ultralytics:yolov8n-p2.yaml", Options(taps=("p6",), **SIZE))(pixels)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_and_boxes_are_decoded_in_full(precision: str, made, pixels):
    who = made("yolov8n")
    exact = who.teacher("detections")(pixels)["detections"]
    teacher = who.teacher("detections", precision=precision)
    layout, half = teacher.layouts["detections"], teacher(pixels)["detections"]
    assert teacher.identity().precision == precision
    error = np.abs(layout.part(half, "logits") - layout.part(exact, "logits"))
    assert 0 < error.max() < 3 and error.mean() < 0.2
    boxes = decoded(layout.part(half, "distribution"), layout.levels)
    assert np.abs(layout.part(half, "boxes") - boxes).max() < 2e-6


def test_rtdetr_runs_in_half_precision(made, pixels):
    who = made("yolov8-rtdetr")
    exact, half = (who.teacher("memory.p4", "queries", precision=p)(pixels) for p in ("fp32", "bf16"))
    a, b = exact["memory.p4"].ravel(), half["memory.p4"].ravel()
    assert 0.9 < a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 1 - 1e-6
    layout, values = who.teacher("queries").layouts["queries"], half["queries"]
    boxes, starts = (np.split(layout.part(values, part), 6, axis=1) for part in ("boxes", "reference"))
    assert np.isfinite(values).all() and np.array_equal(boxes[0], starts[1])


@pytest.mark.parametrize(("name", "target"), [("yolo26n", "detections"), ("yolov8-rtdetr", "memory.p4")])
def test_an_image_is_answered_alone_as_in_a_batch(name: str, target: str, made, pixels):
    """But for rounding, by which queries of RT-DETR may trade places."""
    teacher = made(name).teacher(target, "p4")
    both, alone = teacher(pixels), teacher(pixels[1:])
    for name, value in both.items():
        assert np.allclose(value[1:], alone[name], atol=1e-3), name


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("yolov8n.pt", {"allow_pickle": True}, r"yolov8n.pt does not exist, and nothing is downloaded: put"),
        ("yolov8n", {}, r"neither a file such as best.pt nor an architecture"),
        ("yolov8x9.yaml", {}, r"no architecture 'yolov8x9.yaml' \(did you mean"),
        ("folder/yolov8n.yaml", {}, r"folder/yolov8n.yaml does not exist"),
        ("coco8.yaml", {}, r"no architecture of Ultralytics"),
        ("yolov8n-seg.yaml", {}, r"ends in the head Segment, which is neither"),
        ("yolo11n-pose.yaml", {}, r"ends in the head Pose\b"),
        ("yolov8s-world.yaml", {}, r"ends in the head WorldDetect\b"),
        ("yolo11-cls-resnet18.yaml", {}, r"would be downloaded"),
        (
            "yolov8n.yaml",
            {"taps": ()},
            r"without logits.*it has detections, maps \(p3, p4, …\), and its modules",
        ),
        ("yolov8n.yaml", {"taps": ("probes",)}, r"no target 'probes'.*it has detections, maps"),
        ("yolov8n.yaml", {"input_size": (640, 650)}, r"640x650.*stride, 32.*--input-size 640,640"),
        ("yolov8n.yaml", {"input_size": (10, 10)}, r"--input-size 32,32"),
        ("yolov8n.yaml", {"weights": Path("none.safetensors")}, r"none.safetensors do not exist"),
    ],
)
def test_what_cannot_be_is_told(name: str, options: dict[str, Any], told: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TeacherError, SpecError), match=told) as e:
        load(f"ultralytics:{name}", Options(**{"taps": ("detections",), **SIZE, **options}))
    assert "\n" not in str(e.value)


def test_files_that_are_no_models(made, tmp_path: Path):
    path = tmp_path / "m.pt"
    with pytest.raises(TeacherError, match=r"is a pickle.*--allow-pickle"):
        path.write_bytes(b"x")
        load(f"ultralytics:{path}", Options(taps=("p3",)))
    with pytest.raises(TeacherError, match=r"m\.pt cannot be read") as e:
        load(f"ultralytics:{path}", Options(taps=("p3",), allow_pickle=True))
    assert "\n" not in str(e.value)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(TeacherError, match=r"holds no model of Ultralytics.*--weights"):
        load(f"ultralytics:{path}", Options(taps=("p3",), allow_pickle=True))
    with pytest.raises(SpecError, match="leave --weights out"):
        load(f"ultralytics:{path}", Options(weights=made("yolov8n").weights, allow_pickle=True))
    one = deepcopy(made("yolov8n").model)
    one.model[0].conv = torch.nn.Conv2d(1, 16, 3, 2, 1)
    with pytest.raises(TeacherError, match=r"ultralytics:m\.pt failed on .*to have 1 channels"):
        as_file(one, path, "p3")


def test_weights_of_another_architecture_are_told(made):
    with pytest.raises(TeacherError, match=r"do not fit the teacher ultralytics:yolo11n\.yaml"):
        load("ultralytics:yolo11n.yaml", Options(weights=made("yolov8n").weights, taps=("p3",)))


def test_a_mirror_has_no_mean_of_detections(made):
    options = Options(taps=("detections",), flip_tta=True, **SIZE)
    with pytest.raises(SpecError, match="no mean over an image and its mirror"):
        assemble("ultralytics:yolov8n.yaml", made("yolov8n").weights, options)


def test_nothing_is_asked_of_a_network_and_the_process_stays_as_it_was(tmp_path: Path):
    """Imported for the first time by us, the library finds no network, and its habits end with the import; the image that
    nobody can read is damaged as before."""
    code = """
import os, socket, subprocess, sys
import numpy as np
def refuse(*args, **more): raise AssertionError("asked a network, or another program")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
before = dict(os.environ), repr(np.array([0.123456789]))
from softcache.teachers import Options, load
import torch  # finds its libraries by another program
subprocess.Popen.__init__ = refuse
load("ultralytics:yolov8n.yaml", Options(taps=("p3",), input_size=(64, 64)))
from softcache.source.decode import to_rgb
try:
    to_rgb(b"damaged")
except OSError:
    pass  # of Pillow's own kinds: for the library's, a package would have been asked for
else:
    raise AssertionError("no image was read")
assert (dict(os.environ), repr(np.array([0.123456789]))) == before
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("YOLO_") and k != "OMP_NUM_THREADS"}
    env = clean | {"YOLO_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # that is for --json


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(TeacherError, match=r"pip install 'softcache\[ultralytics\]'"):
        load("ultralytics:yolov8n.yaml", Options(taps=("p3",)))


def test_an_old_library_is_told(monkeypatch, library):
    monkeypatch.setattr(library, "__version__", "8.3.99")
    with pytest.raises(TeacherError, match=r"needs Ultralytics 8\.4\.120 or newer, and 8\.3\.99 is here"):
        load("ultralytics:yolov8n.yaml", Options(taps=("p3",)))


# -- cached ----------------------------------------------------------------------------------------------------


def build(
    capsys: Any, tmp_path: Path, data: Path, teacher: Any, *targets: str
) -> tuple[Any, Any, np.ndarray]:
    """A cache of three images in two views, built by the command and checked against the living teacher; its source, and
    the pixels of view 1."""
    import softcache as sc
    from softcache.cli import build_cache, main
    from softcache.recipe import render

    who = [
        "--source",
        str(data / "coco356"),
        "--split",
        "val2017",
        "--limit",
        "3",
        "--teacher",
        teacher,
        "--allow-pickle",
    ]
    made = [
        "--recipe",
        f"letterbox(({HEIGHT}, {WIDTH}))|flip",
        "--views",
        "2",
        "--batch",
        "4",
        "--no-progress",
    ]
    keep = [word for target in targets for word in ("--target", target)]
    path = str(tmp_path / "cache")
    assert build_cache([*who, *made, "--input-size", f"{HEIGHT},{WIDTH}", *keep, "-o", path]) == 0, (
        capsys.readouterr()
    )
    assert main(["verify", path, "--live", "3", *who]) == 0, capsys.readouterr()
    cache = sc.open(path)
    source = sc.Source(data / "coco356", split="val2017", limit=3)
    views = cache.read_views(1, np.arange(3))
    return cache, source, np.stack([render(source.image(i), v, (HEIGHT, WIDTH)) for i, v in enumerate(views)])


def test_a_yolo_is_cached_in_the_order_of_the_sources_classes(made, shared_data, tmp_path: Path, capsys):
    import softcache as sc

    names = sc.Source(shared_data / "coco356", split="val2017").classes
    model = deepcopy(made("yolov8n").model)
    model.names = dict(enumerate(reversed(names)))
    live = as_file(model, tmp_path / "best.pt", "detections", "p4")
    cache, _, pixels = build(
        capsys, tmp_path, shared_data, f"ultralytics:{tmp_path / 'best.pt'}",
        "detections=top(200, background=16)", "p4=int8",
    )  # fmt: skip
    batch = cache.read(1, np.arange(3))
    items, said = batch["detections"], live(np.concatenate([pixels, pixels[:1]]))
    values, layout = said["detections"][:3], live.layouts["detections"]
    assert items.layout == layout and items.index.shape == (3, 216)
    logits = layout.part(values, "logits")[..., ::-1]
    best = np.sort(-logits.max(axis=2), axis=1)[:, :200]
    for row in range(3):
        index = items.index[row]
        assert np.allclose(-logits[row, index[:200]].max(axis=1), best[row], atol=1e-4)
        span = np.ptp(logits[row, index], axis=1)[:, None]
        assert (np.abs(items.parts["logits"][row] - logits[row, index]) <= span / 255 * 0.51 + 1e-2).all()
        boxes = np.clip(layout.part(values, "boxes")[row, index], -0.5, 1.5)
        assert np.abs(items.parts["boxes"][row] - boxes).max() < 2e-5
    assert items.weight.sum(axis=1).tolist() == [layout.cells] * 3
    error = np.abs(batch["p4"].values - said["p4"][:3])
    assert error.max() <= np.abs(said["p4"]).max() / 254 * 1.01
    assert cache.identity["teacher"]["columns"] == list(range(79, -1, -1))
    assert cache.identity["teacher"]["weights_format"] == "pickle"
    assert cache.identity["libraries"].keys() >= {"torch", "ultralytics"}


def test_queries_of_rtdetr_are_cached(made, shared_data, tmp_path: Path, capsys):
    import softcache as sc
    from softcache import probes

    model = deepcopy(made("yolov8-rtdetr").model)
    model.names = dict(enumerate(sc.Source(shared_data / "coco356", split="val2017").classes))
    live = as_file(model, tmp_path / "best.pt", "queries", "encoder.detections", "memory.p5")
    cache, source, pixels = build(
        capsys, tmp_path, shared_data, f"ultralytics:{tmp_path / 'best.pt'}",
        "queries=all", "encoder.detections=top(50)", "memory.p5=int8", "probes=all",
    )  # fmt: skip
    batch, said = cache.read(1, np.arange(3)), live(np.concatenate([pixels, pixels[:1]]))
    items, layout = batch["queries"], live.layouts["queries"]
    assert items.layout == layout and items.index.shape == (3, 6 * 300)
    for part, most in (("boxes", 2e-5), ("reference", 2e-5), ("embedding", 0.1), ("logits", 0.1)):
        exact = layout.part(said["queries"][:3], part)
        assert np.abs(items.parts[part] - exact).max() < most, part
    last = items.layer(-1).parts["boxes"]
    assert np.abs(last - layout.part(said["queries"][:3, -300:], "boxes")).max() < 2e-5
    assert batch["encoder.detections"].parts["logits"].shape == (3, 50, 80)
    assert cache.identity["targets"]["memory.p5"]["kind"] == "feature_map"
    for sample, view in enumerate(cache.read_views(1, np.arange(3))):
        boxes = probes.points(
            0, source.ids[sample], 1, probes.visible(view, sample, source.boxes, (HEIGHT, WIDTH)).boxes
        )
        assert np.allclose(batch["probes"].layer(0).parts["reference"][sample], boxes, atol=1e-7)
    shown = rounded(model).state_dict()["model.22.denoising_class_embed.weight"].numpy()
    assert np.array_equal(cache.constant("constants/class_embedding"), shown)


def test_several_detectors_are_cached_beside_one_another(made, pixels):
    options = Options(taps=("0.detections", "1.queries"), **SIZE)
    two = [made("yolov8n"), made("yolov8-rtdetr")]
    names = ["ultralytics:yolov8n.yaml", "ultralytics:yolov8-rtdetr.yaml"]
    teacher = assemble(names, [one.weights for one in two], options)
    found = teacher(pixels)
    assert set(found) == {"0.detections", "1.queries"}
    assert np.array_equal(found["0.detections"], two[0].teacher("detections")(pixels)["detections"])
    assert teacher.layouts["1.queries"].layers == 6
