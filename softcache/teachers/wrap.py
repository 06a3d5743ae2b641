"""Any callable as a teacher. A ``torch.nn.Module`` gets hooks, weights and precision; see :mod:`.module`."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np

from softcache.errors import SoftcacheError, SpecError, TeacherError, nearest
from softcache.identity import InputSpec, TeacherId
from softcache.teachers import Options, Teacher, constants_of, failure, input_spec, layouts_of
from softcache.teachers.classes import names_of

PRECISIONS = ("fp32", "fp16", "bf16")


def wrap(made: Any, name: str, options: Options, spec: Any = None) -> Teacher:
    """A module or a callable as a :class:`~softcache.teachers.Teacher`."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(made, torch.nn.Module):
        return _kind(made)(made, name, options, spec)
    if not callable(made):
        raise TeacherError(f"the teacher {name} is a {type(made).__name__}, neither a module nor a callable")
    return CallableTeacher(made, name, options, spec)


def _kind(model: Any) -> Any:
    """The teacher for a module: a detector's own, where it is one of a library that we know."""
    from softcache.teachers.detr import FAMILIES
    from softcache.teachers.module import ModuleTeacher

    bases = {b.__name__ for b in type(model).__mro__ if b.__module__.startswith("transformers.")}
    for architecture, teacher in FAMILIES.values():
        if architecture in bases:
            return teacher
    if library := sys.modules.get("torchvision.models.detection"):
        from softcache.teachers.torchvision_detection import DenseTeacher, ProposalTeacher

        if isinstance(model, library.RetinaNet | library.FCOS):
            return DenseTeacher
        if isinstance(model, library.FasterRCNN):
            return ProposalTeacher
    return ModuleTeacher


class CallableTeacher:
    """``f(pixels)``, numpy uint8 ``(B, H, W, 3)`` RGB → logits ``(B, C)``, or a mapping of names to arrays.

    It normalises by itself. It may carry ``input_spec``, ``classes``, ``layouts``, ``constants`` and ``weights_digest`` (64
    hex digits).
    Without the last, its answer to a picture of noise is what tells one from another.
    """

    def __init__(self, function: Any, name: str, options: Options, spec: Any = None):
        if options.weights is not None:
            raise TeacherError(
                f"the teacher {name} is a plain callable: it cannot be given weights, let it load them"
            )
        if options.mean not in (None, (0, 0, 0)) or options.std not in (None, (1, 1, 1)):
            raise TeacherError(
                f"the teacher {name} is a plain callable: it is given uint8 pixels and normalises by itself"
            )
        if options.precision not in PRECISIONS:
            raise SpecError(f"precision {options.precision!r}{nearest(options.precision, PRECISIONS)}")
        self._function, self._name, self._options = function, name, options
        self.probed = getattr(function, "weights_digest", None) is None
        found = spec or getattr(function, "input_spec", None) or {}
        # It normalises by itself, so only the size must be known.
        self.input_spec: InputSpec = input_spec(options, {"mean": (0, 0, 0), "std": (1, 1, 1), **found}, name)
        self.classes = names_of(getattr(function, "classes", None))
        self.layouts = layouts_of(function)

    def __call__(self, pixels: np.ndarray, **given: np.ndarray) -> dict[str, np.ndarray]:
        try:
            answer = self._function(pixels, **given)
        except SoftcacheError:
            raise
        except Exception as e:
            raise failure(self._name, pixels, e) from e
        named = dict(answer) if hasattr(answer, "keys") else {"logits": answer}
        with np.errstate(over="ignore"):  # what float32 does not hold is refused with its image
            return {k: np.asarray(v, np.float32) for k, v in named.items()}

    def identity(self) -> TeacherId:
        digest = getattr(self._function, "weights_digest", None)
        if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
            raise TeacherError(f"weights_digest of {self._name} must be 64 hex digits, a sha256")
        return TeacherId(
            name=self._name,
            weights=digest,
            weights_format=None,
            input_spec=self.input_spec,
            processor="as the callable chooses",
            **self._options.said(),
        )

    def libraries(self) -> dict[str, str]:
        return {}

    def constants(self) -> dict[str, np.ndarray]:
        return constants_of(self._function)
