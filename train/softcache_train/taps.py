"""What a student says inside: the outputs of its modules by name, beside its logits."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import MismatchError, SpecError, suggest

HINTS = {
    "logits": ": say student: linear, or whichever module gives its logits",
    "exit1": ": students with exits are resnet8_exits and resnet20_exits; of one of your own, say student: and its modules",
}


@dataclass(frozen=True)
class Seen:
    """A student's answer to a batch: ``images`` (B, 3, h, w) that it was shown, ``logits`` (B, C), and ``inside`` what its
    tapped modules gave, by name."""

    images: Tensor
    logits: Tensor
    inside: dict[str, Tensor] = field(default_factory=dict)


class Tapped(nn.Module):
    """A student whose modules ``names`` are listened to while this module runs, and not when the student runs by itself;
    its weights keep their names, since it is a part of this one."""

    def __init__(self, student: nn.Module, names: Iterable[str]):
        super().__init__()
        self.student = student
        self._inside: dict[str, Tensor] | None = None
        modules = dict(student.named_modules())
        for name in dict.fromkeys(names):
            if name not in modules or not name:
                known = [n for n in modules if n]
                hint = HINTS.get(name) or suggest(name, known)
                raise SpecError(
                    f"the student has no module {name!r}{hint}; it has {', '.join(known[:30])}"
                    + (", …" if len(known) > 30 else "")
                )
            modules[name].register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._inside is None:
                return
            if not isinstance(output, Tensor):
                raise SpecError(
                    f"the student's module {name!r} gives a {type(output).__name__}, not a tensor: name one inside it"
                )
            if name in self._inside:
                raise SpecError(
                    f"the student's module {name!r} runs more than once for an image: name one around it"
                )
            self._inside[name] = output

        return keep

    def forward(self, images: Tensor) -> Seen:
        inside = self._inside = {}
        try:
            logits: Any = self.student(images)
        finally:
            self._inside = None
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise MismatchError(
                f"a student gives logits (B, C), and this one a {type(logits).__name__}"
                + (f" {tuple(logits.shape)}" if isinstance(logits, Tensor) else "")
            )
        return Seen(images, logits, inside)

    def idle(self, size: tuple[int, int], device: torch.device) -> bool:
        """Has it weights that its logits in training do not depend on, such as those of exits? Leaves no trace in it."""
        student = deepcopy(self.student).train()
        learned = [p for p in student.parameters() if p.requires_grad]
        logits = student(torch.zeros(2, 3, *size, device=device))
        slopes = torch.autograd.grad(logits.sum(), learned, allow_unused=True)
        return any(slope is None for slope in slopes)

    @torch.no_grad()
    def shapes(self, size: tuple[int, int], device: torch.device) -> dict[str, tuple[int, ...]]:
        """What one image gives in each module, ``""`` being the student itself; leaves no trace in it."""
        training = {module: module.training for module in self.student.modules()}
        self.student.eval()
        try:
            seen = self(torch.zeros(2, 3, *size, device=device))
        finally:
            for module, was in training.items():
                module.training = was
        return {name: tuple(x.shape[1:]) for name, x in {"": seen.logits, **seen.inside}.items()}
