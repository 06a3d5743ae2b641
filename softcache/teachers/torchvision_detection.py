"""Detectors of torchvision as teachers, before non-maximum suppression: RetinaNet and FCOS, and Faster R-CNN.

Pixels go straight to the backbone: a view has the size that the network is to see, and what torchvision's own transform does
(resizing, normalising, padding to whole cells of 32) is the recipe's and the input spec's. Boxes are in the unit square
of the view, and not clipped to it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import torch

from softcache.errors import SpecError, TeacherError
from softcache.targets.layout import Layout
from softcache.teachers import Options, Teacher, input_spec, weights
from softcache.teachers.detector import Detector, Tensors

_log = logging.getLogger(__name__)
_CELL = 32  # sides are a multiple of it
_MOST = 300  # proposals of a view
# Their first weights were trained with batch norms of eps 0, which torchvision sets after it has loaded them.
_NO_EPS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")


def load(name: str, options: Options) -> Teacher:
    """The detector, for as many classes as its weights have; without weights, random ones, the same every time.

    COCO's names go with as many logits as COCO's published weights have.
    """
    from torchvision import models

    kind = next((kind for kind in _KINDS if name.startswith(kind)), None)
    if kind is None:
        raise TeacherError(
            f"torchvision:{name} is a detector of another kind than {', '.join(_KINDS)}: take one of these, or export it "
            "as ONNX"
        )
    teacher, bias, anchors = _KINDS[kind]
    named = models.get_model_weights(name).DEFAULT.meta["categories"]  # type: ignore[attr-defined]
    classes = len(named)
    if options.weights is None:
        _log.warning("torchvision:%s has random weights: say --weights FILE", name)
    else:
        state, _ = weights.read(options)
        classes = next((len(v) // anchors for n, v in state.items() if n.endswith(bias)), classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    if classes == len(named):
        model.classes = tuple(named)
    if name in _NO_EPS and _published(options, models.get_model_weights(name)["COCO_V1"].url):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 0.0
    return teacher(model, f"torchvision:{name}", options, None)


def _published(options: Options, url: str) -> bool:
    """Are the weights torchvision's own file? Its name there ends with the start of its sha256."""
    if options.weights is None or options.weights.suffix == ".safetensors":
        return False
    start = url.rpartition("-")[2].removesuffix(".pth")
    with options.weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(start)


class _Sized(Detector):
    """A detector whose transform says what it sees, unless ``spec`` does."""

    def __init__(self, model: Any, name: str, options: Options, spec: Mapping[str, Any] | None):
        seen = model.transform
        spec = {"size": seen.min_size[0], "mean": seen.image_mean, "std": seen.image_std, **(spec or {})}
        size = input_spec(options, spec, name).size
        if any(side % _CELL for side in size):
            good = ",".join(str(max(1, round(side / _CELL)) * _CELL) for side in size)
            raise SpecError(
                f"{name} cannot see {size[0]}x{size[1]} pixels: the sides are multiples of {_CELL}. Say --input-size {good}"
            )
        super().__init__(model, name, options, spec, self._laid_out(model.eval(), size))

    def _laid_out(self, model: Any, size: tuple[int, int]) -> dict[str, Layout]:
        raise NotImplementedError


class DenseTeacher(_Sized):
    """RetinaNet, FCOS: ``detections``, one item an anchor, level by level and cell by cell.

    FCOS has one anchor a cell, and ``objectness``, which it calls centerness; its score is the root of the product.
    """

    def _laid_out(self, model: Any, size: tuple[int, int]) -> dict[str, Layout]:
        head = model.head.classification_head
        with torch.inference_mode():
            here = next(model.parameters()).device
            levels = tuple(
                tuple(m.shape[-2:]) for m in model.backbone(torch.zeros(1, 3, *size, device=here)).values()
            )
        columns = {"logits": head.num_classes, "boxes": 4}
        if hasattr(model.head.regression_head, "bbox_ctrness"):
            columns = {"logits": head.num_classes, "objectness": 1, "boxes": 4}
            return {"detections": Layout(columns, score="geometric", levels=levels)}
        return {"detections": Layout(columns, levels=levels, anchors=head.num_anchors)}

    def _detect(self, x: torch.Tensor, probes: torch.Tensor | None) -> tuple[Tensors, Iterable[torch.Tensor]]:
        maps = list(self._model.backbone(x).values())
        if not self._asked & self.layouts.keys():
            return {}, maps
        said = self._model.head(maps)
        anchors = torch.stack(self._model.anchor_generator(_pictures(x), maps))
        moved, coder = said["bbox_regression"], self._model.box_coder
        if "bbox_ctrness" in said:
            parts = [said["cls_logits"], said["bbox_ctrness"], _unit(coder.decode(moved, anchors), x)]
        else:
            boxes = coder.decode_single(moved.flatten(0, 1), anchors.flatten(0, 1)).view_as(moved)
            parts = [said["cls_logits"], _unit(boxes, x)]
        return {"detections": torch.cat([part.float() for part in parts], -1)}, maps


class ProposalTeacher(_Sized):
    """Faster R-CNN: ``proposals``, the first 300 of the region proposals, or as many as the network makes at most.

    Of each: ``reference``, the proposal; ``logits``, softmax, the background first; ``deltas``, four for every logit;
    ``boxes``, the proposal moved by the deltas of its likeliest class. ``proposals.embedding`` is what the box head makes of
    each. Where the network proposes fewer, tiles of the view follow (the whole, then 2 by 2, 3 by 3, …), and the heads
    answer for them as for the others: every item is something the teacher says.
    """

    more = ("proposals.embedding",)

    def _laid_out(self, model: Any, size: tuple[int, int]) -> dict[str, Layout]:
        logits = model.roi_heads.box_predictor.cls_score.out_features
        self._most = min(_MOST, model.rpn.post_nms_top_n())
        columns = {"logits": logits, "boxes": 4, "reference": 4, "deltas": 4 * logits}
        return {"proposals": Layout(columns, score="softmax", background=0)}

    def _detect(self, x: torch.Tensor, probes: torch.Tensor | None) -> tuple[Tensors, Iterable[torch.Tensor]]:
        maps, pictures, heads = self._model.backbone(x), _pictures(x), self._model.roi_heads
        if not any(name.startswith("proposals") for name in self._asked):
            return {}, maps.values()
        proposed, _ = self._model.rpn(pictures, maps)
        tiles = _tiles(x, self._most)
        starts = [torch.cat([p[: self._most], tiles])[: self._most] for p in proposed]
        embedding = heads.box_head(heads.box_roi_pool(maps, starts, pictures.image_sizes))
        logits, deltas = heads.box_predictor(embedding)
        boxes = heads.box_coder.decode(deltas, starts)
        best = logits[:, 1:].argmax(1) + 1
        parts = [
            logits,
            _unit(boxes[torch.arange(len(boxes), device=x.device), best], x),
            _unit(torch.cat(starts), x),
            deltas,
        ]
        rows = torch.cat([part.float() for part in parts], -1).unflatten(0, (len(x), -1))
        return {"proposals": rows, "proposals.embedding": embedding.unflatten(0, (len(x), -1))}, maps.values()


# What a name begins with → the teacher, the weights that tell the number of classes, and how many rows each has there.
_KINDS: dict[str, tuple[type[_Sized], str, int]] = {
    "fasterrcnn": (ProposalTeacher, "roi_heads.box_predictor.cls_score.bias", 1),
    "fcos": (DenseTeacher, "head.classification_head.cls_logits.bias", 1),
    "retinanet": (DenseTeacher, "head.classification_head.cls_logits.bias", 9),
}


def _pictures(x: torch.Tensor) -> Any:
    """The batch, as torchvision hands it on."""
    from torchvision.models.detection.image_list import ImageList

    return ImageList(x, [(x.shape[-2], x.shape[-1])] * len(x))


def _unit(boxes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Pixels of the view → its unit square."""
    height, width = x.shape[-2:]
    return boxes.float() / boxes.new_tensor([width, height, width, height], dtype=torch.float32)


def _tiles(x: torch.Tensor, most: int) -> torch.Tensor:
    """Boxes in pixels: the whole view, its quarters, its ninths, …; ``most`` or some more."""
    found: list[tuple[float, ...]] = []
    for n in count(1):
        found += [(j / n, i / n, (j + 1) / n, (i + 1) / n) for i in range(n) for j in range(n)]
        if len(found) >= most:
            break
    height, width = x.shape[-2:]
    return x.new_tensor(found) * x.new_tensor([width, height, width, height])
