"""What is captured of torchvision's detectors leads to the very detections of the installed version."""

from __future__ import annotations

import copy
import hashlib
import logging
from pathlib import Path
from typing import Any

import detectors
import numpy as np
import pytest

from softcache.errors import SpecError, TeacherError
from softcache.teachers import Options, load

pytest.importorskip("torchvision")

SIZE = (128, 160)
DENSE = ("retinanet_resnet50_fpn", "fcos_resnet50_fpn")
MOST = 30  # proposals
RCNN = ("fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_320_fpn")


@pytest.fixture(scope="module")
def pixels(shared_data: Path) -> np.ndarray:
    return detectors.pictures(shared_data, size=SIZE)


@pytest.fixture(scope="module")
def networks():
    """name → a shaken network of seven classes."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = detectors.torchvision(name, SIZE, num_classes=7)
        return made[name]

    return get


def teacher(model: Any, *taps: str) -> Any:
    return load(model, Options(taps=taps, input_size=SIZE))


def run(model: Any, pixels: np.ndarray) -> Any:
    """The model's own detections, of the very input that a teacher gives it: nothing is resized."""
    import torch
    from torchvision.models.detection.image_list import ImageList

    x = detectors.normalised(pixels, model.transform.image_mean, model.transform.image_std)

    class Transformed(torch.nn.Module):
        def forward(self, images: Any, targets: Any) -> Any:
            return ImageList(x, [SIZE] * len(x)), targets

        def postprocess(self, result: Any, *_: Any) -> Any:
            return result

    own, model.transform = model.transform, Transformed()
    try:
        with torch.no_grad():
            return model(list(x))
    finally:
        model.transform = own


def parts(made: Any, said: dict[str, np.ndarray], target: str) -> dict[str, np.ndarray]:
    return dict(made.layouts[target].parts(said[target]))


def suppressed(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """torchvision's non-maximum suppression, class by class: which are kept, in falling order of score."""
    import torch
    from torchvision.ops import batched_nms

    given = (torch.from_numpy(a.astype(d)) for a, d in ((boxes, "f4"), (scores, "f4"), (labels, "i8")))
    return batched_nms(*given, threshold).numpy()


def between(scores: np.ndarray, count: int) -> float:
    """What so many scores are above."""
    low, high = np.sort(scores, axis=None)[[-count - 1, -count]]
    return float(low + high) / 2


PIXELS = np.array([SIZE[1], SIZE[0]] * 2)


def same(own: dict[str, Any], boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
    """The model's detections of a picture and ours, in pixels, in falling order of score.

    Slivers, cut off by the edge, are left out: they overlap with slivers only, by what is in the last bit.
    """
    wanted = [own[name].numpy() for name in ("boxes", "scores", "labels")]
    thick = [(of[:, 2:] - of[:, :2]).min(axis=1) > 0.1 for of in (wanted[0], boxes)]
    wanted, found = [w[thick[0]] for w in wanted], [f[thick[1]] for f in (boxes, scores, labels)]
    assert len(wanted[0]) == len(found[0]) > 5
    for a, b, apart in zip(wanted, found, (0.02, 1e-5, 0), strict=True):
        assert np.allclose(a, b, atol=apart)


# -- dense heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_head_gives_what_its_head_gives(name: str, networks, pixels):
    model = networks(name)
    noted: list[Any] = []
    hook = model.head.register_forward_hook(lambda _m, _i, out: noted.append(out))
    run(model, pixels)
    hook.remove()
    made = teacher(model, "detections")
    found = parts(made, made(pixels), "detections")
    assert np.allclose(found["logits"], noted[0]["cls_logits"], atol=1e-4)
    if name.startswith("fcos"):
        assert np.allclose(found["objectness"], noted[0]["bbox_ctrness"], atol=1e-4)
    assert np.abs(np.diff(found["logits"], axis=0)).max() > 0.1  # of the image


@pytest.mark.parametrize("picture", [0, 1])
@pytest.mark.parametrize("name", DENSE)
def test_suppressing_dense_items_gives_the_models_own_detections(name: str, picture: int, networks, pixels):
    model, seen = networks(name), pixels[picture : picture + 1]
    made = teacher(model, "detections")
    layout = made.layouts["detections"]
    found = {n: v[0] for n, v in parts(made, made(seen), "detections").items()}
    score = layout.scores(found).astype(np.float64)
    model.score_thresh = between(score, 300)
    item, label = np.nonzero(score > model.score_thresh)
    boxes, value = (found["boxes"][item] * PIXELS).clip(0, PIXELS), score[item, label]
    kept = suppressed(boxes, value, label, model.nms_thresh)[: model.detections_per_img]
    same(run(model, seen)[0], boxes[kept], value[kept], label[kept])


def test_retinanets_boxes_are_decoded_from_its_anchors(networks, pixels):
    """Anchors as its paper has them: three sizes an octave apart by thirds, three proportions, at the corners of cells."""
    model = networks("retinanet_resnet50_fpn")
    noted: list[Any] = []
    hook = model.head.register_forward_hook(
        lambda _m, _i, out: noted.append(out["bbox_regression"].double().numpy())
    )
    made = teacher(model, "detections")
    found = parts(made, made(pixels), "detections")["boxes"]
    hook.remove()
    anchors = []
    for level, (height, width) in enumerate(made.layouts["detections"].levels):
        sizes = [int(32 * 2**level * 2 ** (third / 3)) for third in range(3)]
        base = [(size / ratio**0.5, size * ratio**0.5) for ratio in (0.5, 1, 2) for size in sizes]
        for row in range(height):
            for column in range(width):
                x, y = (
                    place * (side // cells)
                    for place, side, cells in ((column, SIZE[1], width), (row, SIZE[0], height))
                )
                anchors += [
                    (x - round(w / 2), y - round(h / 2), x + round(w / 2), y + round(h / 2)) for w, h in base
                ]
    a = np.array(anchors, np.float64)
    w, h = a[:, 2] - a[:, 0], a[:, 3] - a[:, 1]
    dx, dy, dw, dh = np.moveaxis(noted[0], -1, 0)
    x, y = a[:, 0] + w / 2 + dx * w, a[:, 1] + h / 2 + dy * h
    half = np.exp(np.minimum(np.stack([dw, dh]), np.log(1000 / 16))) * np.stack([w, h])[:, None] / 2
    wanted = np.stack([x - half[0], y - half[1], x + half[0], y + half[1]], axis=-1) / PIXELS
    assert np.allclose(found, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", DENSE)
def test_an_items_level_and_cell_are_where_its_anchor_stands(name: str, networks, pixels):
    import torch
    from torchvision.models.detection.image_list import ImageList

    from softcache.targets import Items

    model = networks(name)
    made = teacher(model, "detections")
    layout, said = made.layouts["detections"], made(pixels)["detections"]
    items = Items.whole(layout, said[:1])
    maps = [torch.zeros(1, 1, *level) for level in layout.levels]
    anchors = model.anchor_generator(ImageList(torch.zeros(1, 3, *SIZE), [SIZE]), maps)[0].numpy()
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    sides = np.array(layout.levels)[items.level()[0]]
    stride = np.array(SIZE) // sides
    assert np.array_equal(items.cell()[0] * stride, centre[:, ::-1])
    assert layout.cells == len(anchors) and layout.anchors == (9 if name.startswith("retina") else 1)


@pytest.mark.parametrize("name", DENSE)
def test_maps_are_the_pyramids(name: str, networks, pixels):
    model = networks(name)
    noted: list[Any] = []
    hook = model.backbone.register_forward_hook(lambda _m, _i, out: noted.append(list(out.values())))
    run(model, pixels)
    hook.remove()
    found = teacher(model, "p3", "p4", "p5", "p6", "p7")(pixels)
    assert sorted(found) == ["p3", "p4", "p5", "p6", "p7"]
    for (_, map), own in zip(sorted(found.items()), noted[0], strict=True):
        assert np.allclose(map, own, atol=1e-4)


# -- Faster R-CNN ----------------------------------------------------------------------------------------------


def watched(model: Any, pixels: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """The model's own detections, and what its parts gave on the way."""
    noted: dict[str, Any] = {}
    hooks = [
        model.rpn.register_forward_hook(lambda _m, _i, out: noted.update(proposals=out[0])),
        model.roi_heads.box_head.register_forward_hook(lambda _m, _i, out: noted.update(embedding=out)),
        model.roi_heads.box_predictor.register_forward_hook(lambda _m, _i, out: noted.update(heads=out)),
        model.backbone.register_forward_hook(lambda _m, _i, out: noted.update(maps=out)),
    ]
    said = run(model, pixels)
    for hook in hooks:
        hook.remove()
    return said, noted


@pytest.fixture
def few(networks):
    """name → a Faster R-CNN that proposes thirty boxes, however they score and overlap."""

    def get(name: str, most: int = MOST) -> Any:
        model = networks(name)
        model.rpn._post_nms_top_n["testing"] = most
        model.rpn.score_thresh, model.rpn.nms_thresh = 0.0, 1.0
        return model

    return get


@pytest.mark.parametrize("name", RCNN)
def test_proposals_are_the_networks_and_what_its_heads_say_of_them(name: str, few, pixels):
    model = few(name)
    _, noted = watched(model, pixels)
    assert [len(p) for p in noted["proposals"]] == [MOST, MOST]
    made = teacher(model, "proposals", "proposals.embedding")
    said = made(pixels)
    found = parts(made, said, "proposals")
    assert np.allclose(
        found["reference"], np.stack([p.numpy() for p in noted["proposals"]]) / PIXELS, atol=1e-5
    )
    logits, deltas = noted["heads"]
    assert np.allclose(found["logits"], logits.reshape(2, MOST, 7), atol=1e-4)
    assert np.allclose(found["deltas"], deltas.reshape(2, MOST, 28), atol=1e-4)
    assert np.allclose(said["proposals.embedding"], noted["embedding"].reshape(2, MOST, -1), atol=1e-4)


@pytest.mark.parametrize("picture", [0, 1])
@pytest.mark.parametrize("name", RCNN)
def test_proposals_lead_to_the_models_own_detections(name: str, picture: int, few, pixels):
    """Deltas decoded with weights 10, 10, 5, 5, clipped, suppressed; and ``boxes`` is the likeliest class's."""
    model, seen = few(name), pixels[picture : picture + 1]
    made, heads = teacher(model, "proposals"), model.roi_heads
    layout = made.layouts["proposals"]
    found = {n: v[0].astype(np.float64) for n, v in parts(made, made(seen), "proposals").items()}
    score = layout.scores(found)
    x1, y1, x2, y2 = (found["reference"][:, None] * PIXELS).transpose(2, 0, 1)
    dx, dy, dw, dh = found["deltas"].reshape(MOST, 7, 4).transpose(2, 0, 1)
    w, h = x2 - x1, y2 - y1
    x, y = x1 + w / 2 + dx / 10 * w, y1 + h / 2 + dy / 10 * h
    w, h = (np.exp(np.minimum(d / 5, np.log(1000 / 16))) * side / 2 for d, side in ((dw, w), (dh, h)))
    every = np.stack([x - w, y - h, x + w, y + h], axis=-1)[:, 1:]
    assert np.allclose(found["boxes"] * PIXELS, every[np.arange(MOST), score.argmax(axis=1)], atol=0.02)
    heads.score_thresh = between(score, 90)
    item, label = np.nonzero(score > heads.score_thresh)
    boxes = every[item, label].clip(0, PIXELS)
    whole = ((boxes[:, 2:] - boxes[:, :2]) >= 1e-2).all(axis=1)
    boxes, label, value = boxes[whole], label[whole], score[item, label][whole]
    kept = suppressed(boxes, value, label, heads.nms_thresh)[: heads.detections_per_img]
    same(run(model, seen)[0], boxes[kept], value[kept], label[kept] + 1)


def test_at_most_three_hundred_proposals_the_first_ones(few, pixels):
    model = few("fasterrcnn_resnet50_fpn_v2", 1000)
    _, noted = watched(model, pixels)
    made = teacher(model, "proposals")
    found = parts(made, made(pixels), "proposals")
    assert min(len(p) for p in noted["proposals"]) > 300
    firsts = np.cumsum([0, len(noted["proposals"][0])])
    logits = noted["heads"][0].numpy()
    for i, (first, proposals) in enumerate(zip(firsts, noted["proposals"], strict=True)):
        assert np.allclose(found["reference"][i], proposals[:300].numpy() / PIXELS, atol=1e-5)
        assert np.allclose(found["logits"][i], logits[first : first + 300], atol=1e-4)


def test_where_the_network_proposes_less_tiles_follow_and_the_heads_answer_for_them(few, pixels):
    import torch

    model = few("fasterrcnn_mobilenet_v3_large_320_fpn", 40)
    every = teacher(model, "proposals")
    whole = parts(every, every(pixels), "proposals")["reference"]
    model.rpn.score_thresh = 2.0  # no score is as high
    made = teacher(model, "proposals")
    found = parts(made, made(pixels), "proposals")
    tiles = [
        (j / n, i / n, (j + 1) / n, (i + 1) / n) for n in range(1, 5) for i in range(n) for j in range(n)
    ]
    assert np.allclose(found["reference"][:, :30], tiles, atol=1e-6) and len(tiles) == 30
    assert found["reference"].shape == (2, 40, 4) == whole.shape
    with torch.no_grad():
        maps = model.backbone(detectors.normalised(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        boxes = [torch.tensor(tiles, dtype=torch.float32) * torch.tensor(PIXELS)] * 2
        pooled = model.roi_heads.box_roi_pool(maps, boxes, [SIZE] * 2)
        logits, _ = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    assert np.allclose(found["logits"][:, :30], logits.reshape(2, 30, 7), atol=1e-4)


def test_two_maps_of_one_stride_have_two_names(few, pixels):
    model = few("fasterrcnn_mobilenet_v3_large_320_fpn")
    _, noted = watched(model, pixels)
    found = teacher(model, "p5", "p5b", "p6")(pixels)
    for name, own in zip(("p5", "p5b", "p6"), noted["maps"].values(), strict=True):
        assert np.allclose(found[name], own, atol=1e-4), name
    with pytest.raises(TeacherError, match="has no map 'p4'; it has p5, p5b, p6"):
        teacher(model, "p4")(pixels)


# -- by name ---------------------------------------------------------------------------------------------------


def named(name: str, *taps: str, **options: Any) -> Any:
    return load(f"torchvision:{name}", Options(taps=taps, **options))


def test_by_name_it_has_cocos_names_and_random_weights_the_same_every_time(caplog):
    with caplog.at_level(logging.WARNING):
        made = named("fasterrcnn_mobilenet_v3_large_320_fpn", "proposals")
    assert "random weights: say --weights FILE" in caplog.text
    assert made.input_spec.size == (320, 320) and np.allclose(made.input_spec.mean, (0.485, 0.456, 0.406))
    assert made.classes[:3] == ("__background__", "person", "bicycle") and len(made.classes) == 91
    assert made.layouts["proposals"].columns == {"logits": 91, "boxes": 4, "reference": 4, "deltas": 364}
    identity = made.identity()
    assert (identity.name, identity.weights_format) == (
        "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
        None,
    )
    assert identity.weights == named("fasterrcnn_mobilenet_v3_large_320_fpn", "p5").identity().weights


@pytest.mark.parametrize(("name", "target"), [(DENSE[0], "detections"), (RCNN[1], "proposals")])
def test_a_head_of_your_own_classes_is_taken_from_the_file(
    name: str, target: str, networks, few, pixels, tmp_path: Path
):
    from safetensors.torch import save_file

    model = few(name) if target == "proposals" else networks(name)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    made = named(name, target, weights=tmp_path / "w.safetensors", input_size=SIZE)
    assert made.layouts[target].columns["logits"] == 7 and made.classes is None
    assert made.identity().weights_format == "safetensors"
    own = teacher(model, target)
    assert made.identity().weights == own.identity().weights
    if target == "detections":
        assert np.array_equal(made(pixels)[target], own(pixels)[target])


def test_torchvisions_first_weights_have_batch_norms_of_eps_0(networks, pixels, tmp_path: Path, monkeypatch):
    """As torchvision does where it loads them itself: ``overwrite_eps(model, 0.0)`` for this file, and no other."""
    import torch
    from torchvision import models
    from torchvision.models.detection._utils import overwrite_eps

    name = DENSE[0]
    file = tmp_path / "w.pth"
    torch.save(networks(name).state_dict(), file)

    class Published:
        DEFAULT = models.get_model_weights(name).DEFAULT
        url = f"https://example.org/{name}_coco-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"

        def __class_getitem__(cls, key: str) -> Any:
            assert key == "COCO_V1"
            return cls

    options = {"weights": file, "allow_pickle": True, "input_size": SIZE}
    own = named(name, "detections", **options)(pixels)["detections"]
    assert np.array_equal(own, teacher(networks(name), "detections")(pixels)["detections"])
    monkeypatch.setattr(models, "get_model_weights", lambda _: Published)
    found = named(name, "detections", **options)(pixels)["detections"]

    frozen = frozen_copy(networks(name))
    overwrite_eps(frozen, 0.0)
    expected = teacher(frozen, "detections")(pixels)["detections"]
    ours, before = (float(np.abs(said - expected).mean()) for said in (found, own))
    assert ours < 0.1 * before  # another order of rounding


def frozen_copy(model: Any) -> Any:
    """The model with torchvision's frozen batch norms, as it builds it around weights."""
    from torchvision.ops import FrozenBatchNorm2d

    copied = copy.deepcopy(model)
    for path, module in list(copied.named_modules()):
        if type(module).__name__ == "BatchNorm2d":
            frozen = FrozenBatchNorm2d(module.num_features, module.eps)
            frozen.load_state_dict(module.state_dict(), strict=False)
            parent, _, last = path.rpartition(".")
            setattr(copied.get_submodule(parent), last, frozen)
    return copied


@pytest.mark.parametrize("name", ["ssd300_vgg16", "maskrcnn_resnet50_fpn"])
def test_other_detectors_are_refused_with_those_it_knows(name: str):
    with pytest.raises(TeacherError, match=r"of another kind than fasterrcnn, fcos, retinanet"):
        named(name, "detections")


def test_a_size_that_is_no_whole_number_of_cells_is_refused(networks):
    with pytest.raises(
        SpecError, match=r"cannot see 100x160 pixels: the sides are multiples of 32. Say --input-size 96,160"
    ):
        load(networks(DENSE[1]), Options(taps=("detections",), input_size=(100, 160)))


def test_a_detector_has_no_logits(networks):
    with pytest.raises(
        TeacherError, match=r"is a detector, without logits.*'detections=…'.*it has detections, maps"
    ):
        load(networks(DENSE[1]), Options())
