"""Networks of Ultralytics as teachers: what each kind of head answers. :mod:`.ultralytics` loads them.

A detector has no ``logits``. What it answers has names: ``detections``, the maps ``p3``, ``p4``, … that its head is given,
and more. Models are not fused: fusing drops one of two heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from softcache.errors import SpecError, TeacherError
from softcache.targets.layout import Layout
from softcache.teachers import Options, failure, input_spec
from softcache.teachers.classes import names_of
from softcache.teachers.module import ModuleTeacher

_LOOK = 256  # pixels a side of the picture that tells how coarse the levels are


class Network(ModuleTeacher):
    """A network of Ultralytics: pixels / 255, class names, and the library's version.

    ``pickled``: its weights came out of a pickle with it.
    """

    size = 640

    def __init__(self, model: Any, name: str, options: Options, pickled: bool):
        super().__init__(model, name, options, self._spec())
        self._format = "pickle" if pickled else self._format
        self.classes = _class_names(model)

    def _spec(self) -> Mapping[str, Any]:
        return {"size": self.size, "mean": (0, 0, 0), "std": (1, 1, 1)}

    def libraries(self) -> dict[str, str]:
        import ultralytics

        return {**super().libraries(), "ultralytics": ultralytics.__version__}


class Classifier(Network):
    """``logits``: before the softmax."""

    size = 224

    def _answer(self, x: torch.Tensor, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self._model(x)[1]}


class Detector(Network):
    """Maps, and targets of many items with their :class:`Layout`: of these what was asked for.

    Maps: ``p3``, ``p4``, ``p5`` ``(B, C, H / 8, W / 8)``, …: what its head is given; the number is the stride's logarithm.
    """

    def __init__(self, model: Any, name: str, options: Options, pickled: bool):
        self._head = model.model[-1]
        height, width = input_spec(options, self._spec(), name).size
        coarsest = int(max(model.stride))
        if height % coarsest or width % coarsest:
            good = ",".join(str(max(1, round(side / coarsest)) * coarsest) for side in (height, width))
            raise SpecError(
                f"{name} cannot see {height}x{width} pixels: the sides are multiples of its stride, {coarsest}. "
                f"Say --input-size {good}"
            )
        strides = _strides(model, name)
        self._maps = [f"p{stride.bit_length() - 1}" for stride in strides]
        self._levels = tuple((height // stride, width // stride) for stride in strides)
        layouts = self._layouts()
        names = [*layouts, *self._more_maps(), *self._maps]
        self.own = ", ".join(names)
        self._asked = [name for name in options.taps if name in names]
        if not options.taps:
            raise TeacherError(
                f"{name} is a detector, without logits. Name what to keep, such as --target 'detections=…': "
                f"it has {self.own}, and its modules"
            )
        self._given: list[torch.Tensor] = []
        self._head.register_forward_pre_hook(lambda _head, args: self._given.extend(args[0]))
        super().__init__(model, name, options, pickled)
        self.layouts = layouts

    def _layouts(self) -> dict[str, Layout]:
        """Its targets of many items."""
        raise NotImplementedError

    def _more_maps(self) -> list[str]:
        """Names of maps besides those that the head is given."""
        return []

    def _say(self, name: str, raw: Any) -> torch.Tensor:
        """One of these, of the head's raw output."""
        raise NotImplementedError

    def _says(self, name: str) -> bool:
        return name in self._asked

    def _forget(self) -> None:
        self._given.clear()

    def _answer(self, x: torch.Tensor, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        self._forget()  # what an earlier picture, that failed, has left
        _, raw = self._model(x)
        maps = dict(zip(self._maps, self._given, strict=True))
        found = {name: maps[name] if name in maps else self._say(name, raw) for name in self._asked}
        self._forget()
        return found


class Yolo(Detector):
    """``detections`` ``(B, anchors, logits | boxes | distribution)`` of every anchor, before NMS.

    The distribution is of its distances to the left, top, right and bottom, in cells, where the head has one; the box is
    their expectation. A model of two heads also answers ``one2many.detections`` and ``one2one.detections``; ``detections``
    is then the one that the installed Ultralytics infers with, and ``head`` of its layout says which.
    """

    def _layouts(self) -> dict[str, Layout]:
        head = self._head
        columns = {"logits": int(head.nc), "boxes": 4}
        if head.reg_max > 1:
            columns["distribution"] = 4 * int(head.reg_max)
        heads = {"one2many": head.cv2, "one2one": getattr(head, "one2one_cv2", None)}
        found = {
            f"{name}.detections": Layout(columns, levels=self._levels, head=name)
            for name, layers in heads.items()
            if layers is not None  # a file that was fused has one of them
        }
        used = found[f"{'one2one' if head.end2end else 'one2many'}.detections"]
        return {"detections": used, **(found if len(found) > 1 else {})}

    def _say(self, name: str, raw: Any) -> torch.Tensor:
        said = raw.get(self.layouts[name].head, raw)  # of one of the heads, or of the only one
        logits, sides = said["scores"].float(), said["boxes"].float()
        parts = [logits, self._boxes(sides)]
        if self._head.reg_max > 1:
            parts.append(sides)
        return torch.cat(parts, dim=1).transpose(1, 2).contiguous()

    def _boxes(self, sides: torch.Tensor) -> torch.Tensor:
        """``(B, 4 · bins, anchors)`` → x1, y1, x2, y2 in the unit square, ``(B, 4, anchors)``, in float32."""
        if self._head.reg_max > 1:
            bins = torch.arange(self._head.reg_max, device=sides.device).view(-1, 1)
            sides = (sides.unflatten(1, (4, -1)).softmax(dim=2) * bins).sum(dim=2)
        middles, cells = (grid.to(sides.device) for grid in _grid(self._levels))
        corners = torch.cat([middles - sides[:, :2], middles + sides[:, 2:]], dim=1)
        return corners / cells.repeat(2, 1)


class RtDetr(Detector):
    """``queries`` ``(B, layers · queries, embedding | logits | boxes | reference)`` of every decoder layer.

    ``detections`` are the last layer's logits and boxes, ``encoder.detections`` those of the tokens that queries start from,
    ``memory.p3``, … the tokens that the decoder attends to, as maps ``(B, C, H / 8, W / 8)``.
    """

    def __init__(self, model: Any, name: str, options: Options, pickled: bool):
        head = model.model[-1]
        head.shapes = []  # a grid of anchors may lie in the file, in half precision: it is made anew
        self._layers = head.decoder.layers[: head.decoder.eval_idx + 1]
        super().__init__(model, name, options, pickled)
        self._embeddings: list[torch.Tensor] = []
        self._references: list[torch.Tensor] = []
        self._memory: list[torch.Tensor] = []
        for layer in self._layers:
            layer.register_forward_hook(self._keep_layer)
        head.decoder.register_forward_pre_hook(lambda _decoder, args: self._memory.append(args[2]))

    def constants(self) -> dict[str, np.ndarray]:
        """``class_embedding`` ``(classes, C)``: what it is shown of a class while it learns to denoise boxes.

        And where queries do not start from tokens, ``query_embedding`` ``(queries, C)``.
        """
        found = {"class_embedding": self._head.denoising_class_embed.weight}
        if self._head.learnt_init_query:
            found["query_embedding"] = self._head.tgt_embed.weight
        return {name: value.detach().float().cpu().numpy() for name, value in found.items()}

    def _keep_layer(self, _layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._embeddings.append(output)
        self._references.append(args[1])

    def _forget(self) -> None:
        super()._forget()
        for kept in (self._embeddings, self._references, self._memory):
            kept.clear()

    def _layouts(self) -> dict[str, Layout]:
        boxed = {"logits": int(self._head.nc), "boxes": 4}
        every = {"embedding": int(self._head.hidden_dim), **boxed, "reference": 4}
        return {
            "detections": Layout(boxed, head="decoder"),
            "encoder.detections": Layout(boxed, head="encoder"),
            "queries": Layout(every, layers=len(self._layers), head="decoder"),
        }

    def _more_maps(self) -> list[str]:
        return [f"memory.{name}" for name in self._maps]

    def _say(self, name: str, raw: Any) -> torch.Tensor:
        boxes, logits, encoder_boxes, encoder_logits, _ = raw
        if name == "detections":
            return _columns(logits[-1], _corners(boxes[-1]))
        if name == "encoder.detections":
            return _columns(encoder_logits, _corners(encoder_boxes))
        if name == "queries":
            return self._queries(logits[-1], boxes[-1])
        return self._memory_map(self._maps.index(name.removeprefix("memory.")))

    def _queries(self, last_logits: torch.Tensor, last_boxes: torch.Tensor) -> torch.Tensor:
        scores = zip(self._head.dec_score_head, self._embeddings[:-1], strict=False)
        logits = [*(score(embedding) for score, embedding in scores), last_logits]
        boxes = [*self._references[1:], last_boxes]  # where a layer ends, the next one starts
        layers = zip(self._embeddings, logits, boxes, self._references, strict=True)
        return torch.cat([_columns(e, z, _corners(b), _corners(r)) for e, z, b, r in layers], dim=1)

    def _memory_map(self, level: int) -> torch.Tensor:
        cells = [height * width for height, width in self._levels]
        tokens = self._memory[0].split(cells, dim=1)[level]
        return tokens.transpose(1, 2).unflatten(2, self._levels[level]).contiguous()


# the class of a model's last module → the teacher
NETWORKS = {"Detect": Yolo, "v10Detect": Yolo, "RTDETRDecoder": RtDetr, "Classify": Classifier}


def _columns(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.float() for part in parts], dim=-1)


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    """Middle, width, height → x1, y1, x2, y2."""
    middle, size = boxes.float().split(2, dim=-1)
    return torch.cat([middle - size / 2, middle + size / 2], dim=-1)


def _grid(levels: tuple[tuple[int, int], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every anchor its middle in cells, and its level's width and height in cells: both ``(2, anchors)``."""
    middles, cells = [], []
    for height, width in levels:
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        middles.append(torch.stack([x, y]).flatten(1))
        cells.append(torch.tensor([[width], [height]]).expand(2, height * width))
    return torch.cat(middles, dim=1), torch.cat(cells, dim=1)


def _strides(model: Any, name: str) -> list[int]:
    """Pixels a side of a cell, of each level that the head is given."""
    widths: list[int] = []
    hook = model.model[-1].register_forward_pre_hook(
        lambda _head, args: widths.extend(x.shape[-1] for x in args[0])
    )
    look = torch.zeros(1, 3, _LOOK, _LOOK)
    with torch.inference_mode():
        try:
            model.eval()(look)
        except Exception as e:
            raise failure(name, look.permute(0, 2, 3, 1).numpy(), e) from e
    hook.remove()
    return [_LOOK // width for width in widths]


def _class_names(model: Any) -> tuple[str, ...] | None:
    """Those it was trained with; None for the numbers that an architecture has in their place."""
    names = names_of(getattr(model, "names", None))
    return None if names == tuple(map(str, range(len(names or ())))) else names
