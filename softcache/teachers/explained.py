"""What in a layer speaks for a label: the integrated gradients of a network's logit, of what one of its modules gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import TeacherError
from softcache.teachers.attribution import integrated_gradients


def explained(network: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Attributions (B, 1, h, w) of the places of ``module``'s map to the logit of ``labels`` int64 (B,), summed over its
    channels, from the map 0; ``network`` is images (B, 3, H, W) → logits (B, C), and runs ``module`` once.

    Their sum over an image is its logit less what it is with the map 0. Raises :class:`TeacherError` for what is no map.
    """
    with torch.no_grad():
        features = _given(network, module, x)
    if features.ndim != 4:
        raise TeacherError(
            f"an attribution is of a map (B, C, h, w), and the module gives {tuple(features.shape)}"
        )

    def rest(h: Tensor) -> Tensor:
        hook = module.register_forward_hook(lambda *_: h)
        try:
            return network(x)
        finally:
            hook.remove()

    return integrated_gradients(rest, features, labels).sum(dim=1, keepdim=True)


def _given(network: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
    kept: list[Any] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        network(x)
    finally:
        hook.remove()
    if len(kept) != 1 or not isinstance(kept[0], Tensor):
        raise TeacherError("an attribution is of a module that runs once for an image and gives one tensor")
    return kept[0].clone()
