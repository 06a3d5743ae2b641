"""Networks of Ultralytics as teachers: what each kind of head answers. :mod:`.ultralytics` loads them.

The maps ``p3``, ``p4``, … are those that a detector's head is given. Models are not fused: fusing drops one of two heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from softcache.errors import SpecError
from softcache.targets.layout import Layout
from softcache.teachers import Options, failure, input_spec
from softcache.teachers.classes import names_of
from softcache.teachers.detector import Detector, Tensors
from softcache.teachers.detr import cells_under, gather, logit, rows, unflatten
from softcache.teachers.module import ModuleTeacher

_PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}  # what all are shown: pixels / 255
_LOOK = 256  # pixels a side of the picture that tells how coarse the levels are


class _Network(ModuleTeacher):
    """A network of Ultralytics, its class names, and the library's version."""

    def _came(self, model: Any, pickled: bool) -> None:
        """``pickled``: its weights came out of a pickle with it."""
        self._format = "pickle" if pickled else self._format
        names = names_of(getattr(model, "names", None))
        numbers = tuple(map(str, range(len(names or ()))))  # which an architecture has in their place
        self.classes = None if names == numbers else names

    def libraries(self) -> dict[str, str]:
        import ultralytics

        return {**super().libraries(), "ultralytics": ultralytics.__version__}


class Classifier(_Network):
    """``logits``: before the softmax."""

    def __init__(self, model: Any, name: str, options: Options, pickled: bool):
        super().__init__(model, name, options, {"size": 224, **_PLAIN})
        self._came(model, pickled)

    def _answer(self, x: torch.Tensor, **given: torch.Tensor) -> Tensors:
        return {"logits": self._model(x)[1]}


class _Detector(_Network, Detector):
    """A detector whose last module is its head."""

    def __init__(self, model: Any, name: str, options: Options, pickled: bool):
        spec = {"size": 640, **_PLAIN}
        self._head = model.model[-1]
        self._levels = _levels(model, name, input_spec(options, spec, name).size)
        Detector.__init__(self, model, name, options, spec, self._laid_out())
        self._came(model, pickled)
        self._given: list[torch.Tensor] = []
        self._head.register_forward_pre_hook(lambda _head, args: self._given.extend(args[0]))

    def _laid_out(self) -> dict[str, Layout]:
        raise NotImplementedError

    def _look(self, x: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        """The head's raw answer, and the maps it was given."""
        self._given.clear()
        _, raw = self._model(x)
        maps = self._given.copy()
        self._given.clear()
        return raw, maps


class Yolo(_Detector):
    """``detections`` ``(B, anchors, logits | boxes | distribution)`` of every anchor, before NMS.

    The distribution is of its distances to the left, top, right and bottom, in cells, where the head has one; the box is
    their expectation. A model of two heads also answers ``one2many.detections`` and ``one2one.detections``; ``detections``
    is then the one that the installed Ultralytics infers with, and ``head`` of its layout says which.
    """

    def _laid_out(self) -> dict[str, Layout]:
        head = self._head
        columns = {"logits": int(head.nc), "boxes": 4}
        if head.reg_max > 1:
            columns["distribution"] = 4 * int(head.reg_max)
        heads = {"one2many": head.cv2, "one2one": getattr(head, "one2one_cv2", None)}
        found = {
            f"{name}.detections": Layout(columns, levels=tuple(self._levels.values()), head=name)
            for name, layers in heads.items()
            if layers is not None  # a file that was fused has one of them
        }
        used = found[f"{'one2one' if head.end2end else 'one2many'}.detections"]
        return {"detections": used, **(found if len(found) > 1 else {})}

    def _detect(self, x: torch.Tensor, probes: torch.Tensor | None) -> tuple[Tensors, Iterable[torch.Tensor]]:
        raw, maps = self._look(x)
        wanted = self._asked & self.layouts.keys()
        heads = {
            name: raw.get(self.layouts[name].head, raw) for name in wanted
        }  # one of them, or the only one
        return {name: self._items(said) for name, said in heads.items()}, maps

    def _items(self, said: Tensors) -> torch.Tensor:
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
        middles, cells = (grid.to(sides.device) for grid in _grid(self._levels.values()))
        return torch.cat([middles - sides[:, :2], middles + sides[:, 2:]], dim=1) / cells.repeat(2, 1)


class RtDetr(_Detector):
    """``queries`` ``(B, layers · queries, embedding | logits | boxes | reference)`` of every decoder layer; ``probes``, as
    :class:`.detr.RtDetrTeacher` has them.

    ``detections`` are the last layer's logits and boxes, ``encoder.detections`` those of the tokens that queries start from,
    ``memory.p3``, … the tokens that the decoder attends to, as maps.
    """

    def __init__(self, model: Any, name: str, options: Options, pickled: bool):
        head = model.model[-1]
        head.shapes = []  # a grid of anchors may lie in the file, in half precision: it is made anew
        self._layers = head.decoder.layers[: head.decoder.eval_idx + 1]
        super().__init__(model, name, options, pickled)
        self._noted: dict[str, list[Any]] = {}
        head.enc_output.register_forward_hook(lambda _m, _args, output: self._note("cells", output))
        head.decoder.register_forward_pre_hook(lambda _m, args: self._note("call", args))
        for layer in self._layers:
            layer.register_forward_hook(self._note_layer)

    def _note(self, name: str, value: Any) -> None:
        self._noted.setdefault(name, []).append(value)

    def _note_layer(self, _layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._note("embedding", output)
        self._note("reference", args[1])

    def _laid_out(self) -> dict[str, Layout]:
        boxed = {"logits": int(self._head.nc), "boxes": 4}
        every = {"embedding": int(self._head.hidden_dim), **boxed, "reference": 4}
        self.more = tuple(f"memory.{name}" for name in self._levels)
        layers = Layout(every, layers=len(self._layers), head="decoder")
        return {
            "detections": Layout(boxed, head="decoder"),
            "encoder.detections": Layout(boxed, head="encoder"),
            "queries": layers,
            "probes": layers,
        }

    def constants(self) -> dict[str, np.ndarray]:
        """``class_embedding`` ``(classes, C)``: what it is shown of a class while it learns to denoise boxes.

        And where queries do not start from tokens, ``query_embedding`` ``(queries, C)``.
        """
        found = {"class_embedding": self._head.denoising_class_embed.weight}
        if self._head.learnt_init_query:
            found["query_embedding"] = self._head.tgt_embed.weight
        return {name: value.detach().float().cpu().numpy() for name, value in found.items()}

    def _detect(self, x: torch.Tensor, probes: torch.Tensor | None) -> tuple[Tensors, Iterable[torch.Tensor]]:
        self._noted.clear()
        (boxes, logits, *encoder, _), maps = self._look(x)
        call, cells = self._noted["call"][0], self._noted["cells"][0]
        parts = {name: self._parts(logits[-1], boxes[-1]) for name in self._asked & {"detections", "queries"}}
        if "encoder.detections" in self._asked:
            parts["encoder.detections"] = {"boxes": encoder[0][:, None], "logits": encoder[1][:, None]}
        if probes is not None and "probes" in self._asked:
            parts["probes"] = self._probed(call, cells, probes)
        found = {name: rows(part, self.layouts[name]) for name, part in parts.items()}
        found |= zip(self.more, unflatten(call[2], list(self._levels.values())), strict=True)
        self._noted.clear()
        return found, maps

    def _parts(self, last_logits: torch.Tensor, last_boxes: torch.Tensor) -> Tensors:
        """What every layer says, ``(B, layers, queries, n)``; boxes are cx, cy, w, h."""
        embeddings, references = self._noted["embedding"], self._noted["reference"]
        scores = zip(self._head.dec_score_head, embeddings[:-1], strict=False)
        parts = {
            "embedding": embeddings,
            "logits": [*(score(embedding) for score, embedding in scores), last_logits],
            "boxes": [*references[1:], last_boxes],  # where a layer ends, the next one starts
            "reference": references,
        }
        return {name: torch.stack(part, 1) for name, part in parts.items()}

    def _probed(self, call: tuple[Any, ...], cells: torch.Tensor, probes: torch.Tensor) -> Tensors:
        """The decoder's second run, on the same memory."""
        boxes = torch.cat([(probes[..., :2] + probes[..., 2:]) / 2, probes[..., 2:] - probes[..., :2]], -1)
        content = gather(cells, cells_under(boxes, list(self._levels.values())))
        self._noted.clear()
        ended, logits = self._head.decoder(content, logit(boxes), *call[2:])
        parts = self._parts(logits[-1], ended[-1])
        parts["reference"][:, 0] = boxes
        return parts


# the class of a model's last module → the teacher
NETWORKS = {"Detect": Yolo, "v10Detect": Yolo, "RTDETRDecoder": RtDetr, "Classify": Classifier}


def _grid(levels: Iterable[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every anchor its middle in cells, and its level's width and height in cells: both ``(2, anchors)``."""
    middles, cells = [], []
    for height, width in levels:
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        middles.append(torch.stack([x, y]).flatten(1))
        cells.append(torch.tensor([[width], [height]]).expand(2, height * width))
    return torch.cat(middles, dim=1), torch.cat(cells, dim=1)


def _levels(model: Any, name: str, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Height and width of each map that the head is given, of pictures of ``size``, by its name."""
    coarsest = int(max(model.stride))
    if any(side % coarsest for side in size):
        good = ",".join(str(max(1, round(side / coarsest)) * coarsest) for side in size)
        raise SpecError(
            f"{name} cannot see {size[0]}x{size[1]} pixels: the sides are multiples of its stride, {coarsest}. "
            f"Say --input-size {good}"
        )
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
    strides = [_LOOK // width for width in widths]
    return {f"p{s.bit_length() - 1}": (size[0] // s, size[1] // s) for s in strides}
