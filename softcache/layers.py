"""The last layers of a teacher, of which ``head`` keeps the inputs: taken from its constants, and tried on its answer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from softcache.beside import lead_of
from softcache.codecs import Fields
from softcache.codecs.head import CONSTANTS, layer
from softcache.errors import DamageError, TeacherError
from softcache.targets import Target
from softcache.teachers import Teacher, constants_of

_OFF = 0.02  # of the largest logit, by which half precision may be off


def of(teacher: Teacher, targets: Mapping[str, Target], named: str) -> dict[str, Fields]:
    """The layer of each target that needs one. :class:`TeacherError` where the teacher offers none."""
    found: dict[str, Fields] = {}
    offered = constants_of(teacher) if any(target.layered for target in targets.values()) else {}
    for name, target in targets.items():
        if target.layered:
            lead = lead_of(name.removeprefix(f"{named}."))
            if any(lead + part not in offered for part in CONSTANTS):
                raise TeacherError(
                    f"target {name!r}: {target.spec!r} needs the teacher's last layer, {' and '.join(CONSTANTS)} of its "
                    "constants, which it does not offer: keep the logits with full(u8)"
                )
            found[name] = {part: offered[lead + part] for part in CONSTANTS}
    return found


def check(
    layers: Mapping[str, Fields], targets: Mapping[str, Target], said: Mapping[str, np.ndarray]
) -> None:
    """Refuse a layer that does not make the teacher's logits of the embeddings that it says with them."""
    for name, constants in layers.items():
        target = targets[name]
        try:
            weight, bias = layer(constants, target.shape)
        except DamageError as e:
            raise TeacherError(f"target {name!r}: the teacher's {e}") from None
        if len(weight) < 2:
            raise TeacherError(
                f"target {name!r}: {target.spec!r} is of at least two class logits, and the teacher's last layer makes one: "
                "keep what goes into that layer as a target of its own, by its module's name"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            made, logits = said[target.tap] @ weight.T + bias, said.get(name, np.zeros(0))
        fits = logits.shape == made.shape
        if not fits or not np.abs(logits - made).max() <= _OFF * max(np.abs(logits).max(), 1e-6):
            raise TeacherError(
                f"target {name!r}: the teacher's logits are not what its constants {' and '.join(CONSTANTS)} make of its "
                f"{target.tap!r}: keep the logits with full(u8)"
            )
