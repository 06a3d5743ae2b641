"""Attributions: what in a view speaks for its label, to the teacher."""

from __future__ import annotations

import numpy as np

from softcache.targets.feature_map import FeatureMap

SUFFIXES = (".attribution", ".gradient")
GAP = "completeness_gap"


class AttributionKind:
    """Maps (C, h, w), true of the exact view and of its label.

    ``input.gradient``: ∂/∂x of the label's cross entropy, (3, H, W), by pixels x in 0…1. ``layer3.attribution``: the
    integrated gradients of the label's logit, of what the module ``layer3`` gives, from 0, summed over its channels.
    """

    name = "attribution"
    law = "view-locked"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 3

    def wrap(self, values: np.ndarray) -> FeatureMap:
        return FeatureMap(values)


def gap_of(name: str) -> str:
    """The name under which a teacher that gives ``layer3.attribution`` says what its rows miss, float32 (B,), 0…1: of the
    label's logit less what it is with the map 0, the share that their sum is off by."""
    return f"{name}.{GAP}"


def is_attribution(name: str) -> bool:
    """Is the answer of that name of a label, which has to be given with the pixels?"""
    return name.endswith(SUFFIXES)
