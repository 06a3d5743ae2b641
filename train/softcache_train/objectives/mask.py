"""Which cells of a map count: a mask of whatever fineness, or attributions, on the cells of a map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import MismatchError, SpecError
from softcache_train.objectives.checks import check_least


def check_quantile(who: str, quantile: float | None) -> None:
    """Raises :class:`SpecError` unless it is None, or at least 0 and below 1."""
    if quantile is not None:
        check_least(who, 0, quantile=quantile)
        if quantile >= 1:
            raise SpecError(f"{who}: quantile must be below 1, not {quantile}: 0.5 keeps half of the cells")


def on_cells(who: str, mask: Tensor, maps: Tensor, quantile: float | None) -> Tensor:
    """``mask`` (B, h, w) or (B, 1, h, w) on the cells of maps (B, …, H, W): (B, H, W), of the maps' dtype.

    Means over areas where it is finer. With ``quantile`` q it is not a mask but attributions, signed numbers: 1 where
    they are at least their q-quantile in the image, else 0. Raises :class:`MismatchError` for another shape, a coarser
    mask, or one with values below 0.
    """
    told = f"the mask's {tuple(mask.shape)} and the map's {tuple(maps.shape)}"
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if maps.ndim < 3 or mask.ndim != 3 or len(mask) != len(maps):
        raise MismatchError(f"{who} takes a mask (B, h, w) for maps (B, C, H, W), not {told}")
    size = (maps.shape[-2], maps.shape[-1])
    if mask.shape[1] < size[0] or mask.shape[2] < size[1]:
        raise MismatchError(f"{who} takes a mask at least as fine as its maps, not {told}")
    weights = mask.detach().to(maps.dtype)
    if weights.shape[1:] != size:
        weights = F.adaptive_avg_pool2d(weights, size)
    if quantile is not None:
        cells = weights.flatten(1)
        return (cells >= torch.quantile(cells, quantile, dim=1, keepdim=True)).to(cells).view_as(weights)
    if (weights < 0).any():
        raise MismatchError(
            f"{who} is given a mask with values below 0, as attributions have: quantile: 0.5 makes a mask of them"
        )
    return weights
