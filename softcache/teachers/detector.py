"""A detector as a teacher: items and maps by name, and no logits. What the libraries' own kinds derive from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from softcache.errors import TeacherError
from softcache.targets.layout import Layout
from softcache.teachers import Options
from softcache.teachers.module import ModuleTeacher

Tensors = dict[str, torch.Tensor]
_MAP = r"p\db?"


class Detector(ModuleTeacher):
    """Answers what it is asked for of its layouts, and maps ``(B, C, H, W)``: ``p3``, ``p4``, … of stride 2³, 2⁴, ….

    Of two maps of one stride the second is called ``p5b``.
    """

    more: tuple[str, ...] = ()  # answers that are neither items nor maps
    _model: Any  # of a library: its parts are of many kinds

    def __init__(
        self, model: Any, name: str, options: Options, spec: Mapping[str, Any], layouts: Mapping[str, Layout]
    ):
        names = (*layouts, *self.more)
        self.own = f"{', '.join(names)}, maps (p3, p4, …)"
        self._asked = {n for n in options.taps if n in names or re.fullmatch(_MAP, n)}
        if not options.taps:
            raise TeacherError(
                f"{name} is a detector, without logits. Name what to keep, such as --target '{names[0]}=…': it has "
                f"{self.own}, and its modules"
            )
        super().__init__(model, name, options, spec)
        self.layouts = dict(layouts)

    def _says(self, name: str) -> bool:
        return name in self._asked

    def _detect(self, x: torch.Tensor, probes: torch.Tensor | None) -> tuple[Tensors, Iterable[torch.Tensor]]:
        """Of normalised pixels the items that were asked for, float32, and the maps, finest first.

        ``probes``: boxes ``(B, P, 4)`` to answer for, x1, y1, x2, y2 in the unit square, where there are any.
        """
        raise NotImplementedError

    def _answer(self, x: torch.Tensor, **given: torch.Tensor) -> Tensors:
        found, maps = self._detect(x, given.get("probes"))
        for map in maps:
            name = f"p{_exponent(x, map)}"
            found[name + "b" * (name in found)] = map
        if lacking := self._asked - found.keys() - self.layouts.keys():
            has = ", ".join(sorted(n for n in found if re.fullmatch(_MAP, n)))
            raise TeacherError(f"the teacher {self._name} has no map {min(lacking)!r}; it has {has}")
        return {name: value for name, value in found.items() if name in self._asked}


def _exponent(x: torch.Tensor, map: torch.Tensor) -> int:
    """Of the stride of a map. A side that is no multiple of the stride was rounded up."""
    return math.ceil(math.log2(max(x.shape[-2:]) / max(map.shape[-2:])))
