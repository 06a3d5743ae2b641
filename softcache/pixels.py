"""What every network wants of pixels: normalised, channels first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def normalise(pixels: np.ndarray, input_spec: Mapping[str, Any], out: np.ndarray | None = None) -> np.ndarray:
    """uint8 RGB (…, h, w, 3) → float32 (…, 3, h, w): (x/255 − mean) / std, channels as ``color`` says; into ``out``."""
    if input_spec["color"] == "BGR":
        pixels = pixels[..., ::-1]
    mean, std = (np.array(input_spec[k], np.float32).reshape(3, 1, 1) for k in ("mean", "std"))
    planes = np.moveaxis(pixels, -1, -3)
    images = np.empty(planes.shape, np.float32) if out is None else out
    images[...] = planes
    images /= 255
    images -= mean
    images /= std
    return images
