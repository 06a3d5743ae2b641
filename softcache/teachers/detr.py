"""Detectors of the DETR family as teachers: every decoder layer's queries, the maps they look at, and probes.

A *probe* is a query at a box that is named from outside (:mod:`softcache.probes`): the decoder runs a second time, on the
same memory, with the probes in place of the model's own queries. Probes see one another, as the model's queries do, so
what is said of one belongs to the whole set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from softcache.targets.layout import Layout
from softcache.teachers import Options
from softcache.teachers.detector import Detector, Tensors


@dataclass(frozen=True)
class Call:
    """What a decoder was given, by its own names, and what it gave."""

    given: Mapping[str, Any]
    gave: Any


class DetrTeacher(Detector):
    """A ``DetrForObjectDetection``: ``detections``, ``queries`` and the encoder's map. It has no references, so no probes.

    ``queries``: items are all queries of the first decoder layer, then of the second, …; of each its embedding, class
    logits and box, and where the model has references, the box it started from (of a point, a box without size).
    ``detections``: logits and boxes of the last layer.
    """

    spec: Mapping[str, Any] = {"size": 800, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    score, background, starts = "softmax", True, False

    def __init__(
        self, model: Any, name: str, options: Options, spec: Mapping[str, Any] | None, form: str | None = None
    ):
        """``spec``: what is known of its input. ``form``: the format of the file that the model's weights came from."""
        self._config, self._net = model.config, model.model
        super().__init__(model, name, options, {**self.spec, **(spec or {})}, self._laid_out())
        self._format = form or self._format
        self.classes = self.classes or _classes(self._config)
        self._noted: dict[str, Any] = {}
        self._net.decoder.register_forward_hook(self._note_call, with_kwargs=True)
        self._watch()

    def _laid_out(self) -> dict[str, Layout]:
        logits = self._config.num_labels + self.background
        found = {"logits": logits, "boxes": 4}
        every = {"embedding": self._config.d_model, **found} | ({"reference": 4} if self.starts else {})
        kind: dict[str, Any] = {"score": self.score, "background": logits - 1 if self.background else None}
        queries = Layout(every, layers=self._config.decoder_layers, **kind)
        said = {"detections": Layout(found, **kind), "queries": queries}
        return said | ({"probes": queries} if self.starts else {})

    def constants(self) -> dict[str, np.ndarray]:
        """``query_position``: what is learned of every query's place, ``(queries, D)``, where that is not of the image.

        Deformable-DETR's, in one stage, are the position and then the content, ``(queries, 2 D)``.
        """
        learned = getattr(self._net, "query_position_embeddings", None)
        return {} if learned is None else {"query_position": learned.weight.detach().cpu().numpy()}

    def libraries(self) -> dict[str, str]:
        return super().libraries() | {"transformers": version("transformers")}

    def _note_call(self, _module: Any, _args: Any, given: dict[str, Any], gave: Any) -> None:
        self._noted["call"] = Call(given, gave)

    def _note(self, module: torch.nn.Module, name: str) -> None:
        """Keep what the module gives under ``name``, every time it runs, in order."""
        module.register_forward_hook(lambda _m, _i, out: self._noted.setdefault(name, []).append(out))

    def _watch(self) -> None:
        """Note what :meth:`_parts`, :meth:`_maps` and :meth:`_at` need beside the call of the decoder."""
        self._note(self._net.input_projection, "projected")
        for layer in self._net.decoder.layers:
            self._note(layer, "layers")

    def _detect(self, x: torch.Tensor, probes: torch.Tensor | None) -> tuple[Tensors, Iterable[torch.Tensor]]:
        self._noted.clear()
        said = self._model(pixel_values=x)
        call: Call = self._noted["call"]
        wanted = self._asked & {"detections", "queries"}
        parts = self._parts(call) if wanted else {}
        found = {name: rows(parts, self.layouts[name]) for name in wanted}
        if probes is not None and "probes" in self._asked:
            boxes = torch.cat(
                [(probes[..., :2] + probes[..., 2:]) / 2, probes[..., 2:] - probes[..., :2]], -1
            )
            given = {**call.given, **self._at(call, boxes)}
            parts = self._parts(Call(given, self._net.decoder(**given)))
            parts["reference"][:, 0] = boxes
            found["probes"] = rows(parts, self.layouts["probes"])
        maps = self._maps(said, call)
        self._noted.clear()
        return found, maps

    def _parts(self, call: Call) -> Tensors:
        """What every layer says, ``(B, layers, queries, n)``, by the names of a layout; boxes are cx, cy, w, h."""
        *before, _ = self._noted["layers"]
        norm = self._net.decoder.layernorm
        embedding = torch.stack([*map(norm, before), call.gave.last_hidden_state], 1)
        logits, boxes = self._model.class_labels_classifier(embedding), self._model.bbox_predictor(embedding)
        return {"embedding": embedding, "logits": logits, "boxes": boxes.sigmoid()}

    def _maps(self, said: Any, call: Call) -> list[torch.Tensor]:
        return unflatten(call.given["encoder_hidden_states"], [self._noted["projected"][0].shape[-2:]])

    def _at(self, call: Call, boxes: torch.Tensor) -> dict[str, Any]:
        """The decoder's arguments for queries at ``boxes`` ``(B, P, 4)``, cx, cy, w, h."""
        raise NotImplementedError


class DeformableDetrTeacher(DetrTeacher):
    """A ``DeformableDetrForObjectDetection``, in one stage or in two.

    A probe, in two stages: reference, content and position are functions of its box, as the model has them of its own
    proposals. In one stage references are points, and content and position are learned, a pair for each slot: the probe is
    its box's centre, with those of the slot whose own point is nearest.
    """

    score, background, starts = "sigmoid", False, True

    def _watch(self) -> None:
        pass

    def _parts(self, call: Call) -> Tensors:
        hidden, reached = call.gave.intermediate_hidden_states, call.gave.intermediate_reference_points
        starts = [call.given["reference_points"], *reached[:, :-1].unbind(1)]
        logits, boxes = [], []
        for layer, start in enumerate(starts):
            logits.append(self._model.class_embed[layer](hidden[:, layer]))
            moved = self._model.bbox_embed[layer](hidden[:, layer])
            boxes.append((moved + _whole(logit(start))).sigmoid())
        reference = [_whole(start) for start in starts]
        parts = {"logits": logits, "boxes": boxes, "reference": reference}
        return {"embedding": hidden} | {name: torch.stack(part, 1) for name, part in parts.items()}

    def _maps(self, said: Any, call: Call) -> list[torch.Tensor]:
        return unflatten(call.given["encoder_hidden_states"], call.given["spatial_shapes_list"])

    def _at(self, call: Call, boxes: torch.Tensor) -> dict[str, Any]:
        content, position = "inputs_embeds", "object_queries_position_embeddings"
        if self._config.two_stage:
            told = self._net.pos_trans(self._net.get_proposal_pos_embed(logit(boxes)))
            where, what = self._net.pos_trans_norm(told).split(self._config.d_model, -1)
            return {content: what, position: where, "reference_points": boxes}
        points = call.given["reference_points"]
        centre = boxes[..., :2].to(points.dtype)
        slot = torch.cdist(centre, points, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
        return {n: gather(call.given[n], slot) for n in (content, position)} | {"reference_points": centre}


class RtDetrTeacher(DetrTeacher):
    """An ``RTDetrForObjectDetection``, or ``RTDetrV2…``; its maps are those that its hybrid encoder hands on.

    A probe's reference is its box. Its content is what ``enc_output`` says of the cell under the box's centre, on the level
    whose anchors are nearest to the box in size: the model makes its own queries of cells.
    """

    score, background, starts = "sigmoid", False, True
    spec: Mapping[str, Any] = {"size": 640, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def _watch(self) -> None:
        self._note(self._net.enc_output, "cells")

    def _parts(self, call: Call) -> Tensors:
        boxes = call.gave.intermediate_reference_points
        first = call.given["reference_points"].sigmoid()[:, None]
        return {
            "embedding": call.gave.intermediate_hidden_states,
            "logits": call.gave.intermediate_logits,
            "boxes": boxes,
            "reference": torch.cat([first, boxes[:, :-1]], 1),
        }

    def _maps(self, said: Any, call: Call) -> list[torch.Tensor]:
        return list(said.encoder_last_hidden_state)

    def _at(self, call: Call, boxes: torch.Tensor) -> dict[str, Any]:
        cells = cells_under(boxes, call.given["spatial_shapes_list"])
        return {"inputs_embeds": gather(self._noted["cells"][0], cells), "reference_points": logit(boxes)}


# config.model_type → (class in transformers, teacher)
FAMILIES: dict[str, tuple[str, type[DetrTeacher]]] = {
    "deformable_detr": ("DeformableDetrForObjectDetection", DeformableDetrTeacher),
    "detr": ("DetrForObjectDetection", DetrTeacher),
    "rt_detr": ("RTDetrForObjectDetection", RtDetrTeacher),
    "rt_detr_v2": ("RTDetrV2ForObjectDetection", RtDetrTeacher),
}


def rows(parts: Tensors, layout: Layout) -> torch.Tensor:
    """The columns of a layout, float32 ``(B, items, columns)``: of all layers, or of the last."""
    boxes = {name: corners(parts[name].float()) for name in ("boxes", "reference") if name in layout.columns}
    rows = torch.cat([(parts | boxes)[name].float() for name in layout.columns], -1)
    return rows[:, -1] if layout.layers == 1 else rows.flatten(1, 2)


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """cx, cy, w, h → x1, y1, x2, y2."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def logit(share: torch.Tensor, least: float = 1e-5) -> torch.Tensor:
    """The inverse of a sigmoid, as these models compute it."""
    share = share.clamp(0, 1)
    return (share.clamp(min=least) / (1 - share).clamp(min=least)).log()


def cells_under(boxes: torch.Tensor, levels: Sequence[Sequence[int]]) -> torch.Tensor:
    """RT-DETR's cells of which probes at ``boxes`` ``(B, P, 4)``, cx, cy, w, h, are made: their numbers, ``(B, P)``.

    ``levels``: height and width of each.
    """
    shapes = torch.tensor(levels, device=boxes.device)
    starts = torch.nn.functional.pad(shapes.prod(1).cumsum(0), (1, 0))
    anchor = 0.05  # of the first level, as a share of the view's side; twice as large on each that follows
    level = (boxes[..., 2:].prod(-1).sqrt() / anchor).log2().round().clamp(0, len(shapes) - 1).long()
    size = shapes[level]
    row, column = ((boxes[..., i] * size[..., 1 - i]).long() for i in (1, 0))
    row, column = row.clamp(0).minimum(size[..., 0] - 1), column.clamp(0).minimum(size[..., 1] - 1)
    return starts[level] + row * size[..., 1] + column


def _whole(place: torch.Tensor) -> torch.Tensor:
    """Points and boxes ``(…, 2 or 4)`` → ``(…, 4)``, zeros behind points."""
    return torch.nn.functional.pad(place, (0, 4 - place.shape[-1]))


def gather(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows`` ``(B, N, D)`` at ``index`` ``(B, P)``."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def unflatten(memory: torch.Tensor, shapes: Sequence[Any]) -> list[torch.Tensor]:
    """``(B, cells of all levels, C)`` → maps."""
    levels = memory.split([h * w for h, w in shapes], 1)
    return [level.transpose(1, 2).unflatten(2, tuple(s)) for level, s in zip(levels, shapes, strict=True)]


def _classes(config: Any) -> tuple[str, ...] | None:
    """Names that somebody gave."""
    names = tuple(config.id2label.get(i, f"LABEL_{i}") for i in range(config.num_labels))
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names
