"""Small detectors of real architectures with random weights, for the contract tests of their teachers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

SIZE = (64, 96)


def pictures(shared_data: Path, n: int = 2, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 ``(n, H, W, 3)``: images of coco356, squeezed."""
    from PIL import Image

    files = sorted((shared_data / "coco356/images/val2017").glob("*.jpg"))[:n]
    return np.stack([np.asarray(Image.open(f).convert("RGB").resize(size[::-1])) for f in files])


def shaken(model: Any, size: tuple[int, int] = SIZE) -> Any:
    """The model, in evaluation mode, with weights by which every layer says as much of a picture as of itself.

    Fresh box heads are zero, fresh batch norms may leave nothing of a picture, and pyramids of random weights may make
    a lot of the last bit. So every layer is scaled to answers of variance 1, and every norm has the statistics, of
    pictures of blots; torchvision's heads say a fifth of that, since they have no norms before them.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    done: set[int] = set()

    def settle(module: Any, inputs: Any) -> None:
        module.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        module.running_var.copy_(inputs[0].var((0, 2, 3)) + 1e-3)

    def scale(module: Any, _inputs: Any, output: Any) -> Any:
        if id(module) in done:  # a head that looks at several levels
            return output
        done.add(id(module))
        share = small.get(module, 1.0) / output.std().clamp(min=0.1)
        module.weight.mul_(share)
        if module.bias is None:
            return output * share
        offset = module.bias.view(-1, 1, 1) if isinstance(module, torch.nn.Conv2d) else module.bias
        return (output - offset) * share + offset

    last = ("bbox_pred", "bbox_reg", "cls_logits", "cls_score")
    hooks, small = [], {m: 0.2 for n, m in model.named_modules() if n.endswith(last)}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                hooks.append(module.register_forward_pre_hook(settle))
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                deviation = module.weight[0].numel() ** -0.5
                module.weight.add_(torch.randn(module.weight.shape, generator=generator) * deviation)
                hooks.append(module.register_forward_hook(scale))
        blots = torch.rand((4, 3, 8, 8), generator=generator)
        model.eval()(torch.nn.functional.interpolate(blots, size, mode="bicubic"))
    for hook in hooks:
        hook.remove()
    return model


def _backbone(kind: str, stages: int) -> Any:
    import transformers

    out = [f"stage{i}" for i in range(5 - stages, 5)]
    return getattr(transformers, kind)(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=out,
    )


def _detr(timm: bool = False, **settings: Any) -> Any:
    from transformers import DetrConfig, DetrForObjectDetection

    if timm:
        return DetrForObjectDetection(DetrConfig(backbone="resnet18", num_queries=7, **settings))
    return DetrForObjectDetection(
        DetrConfig(backbone_config=_backbone("ResNetConfig", 1), num_queries=7, **settings)
    )


def _deformable(**settings: Any) -> Any:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    config = DeformableDetrConfig(
        backbone_config=_backbone("ResNetConfig", 3), num_queries=7, two_stage_num_proposals=7, **settings
    )
    return DeformableDetrForObjectDetection(config)


def _rt_detr(version: str, **settings: Any) -> Any:
    import transformers

    config = getattr(transformers, f"RTDetr{version}Config")(
        backbone_config=_backbone("RTDetrResNetConfig", 3),
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 32],
        decoder_in_channels=[32, 32, 32],
        num_queries=7,
        **settings,
    )
    return getattr(transformers, f"RTDetr{version}ForObjectDetection")(config)


_SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_labels": 6,
}
HF = {
    "detr": lambda: _detr(**_SMALL),
    "detr-auxiliary": lambda: _detr(auxiliary_loss=True, **_SMALL),
    "deformable": lambda: _deformable(**_SMALL),
    "deformable-refined": lambda: _deformable(with_box_refine=True, **_SMALL),
    "deformable-two-stage": lambda: _deformable(with_box_refine=True, two_stage=True, **_SMALL),
    "rt-detr": lambda: _rt_detr("", **_SMALL),
    "rt-detr-v2": lambda: _rt_detr("V2", **_SMALL),
}


def hf(kind: str) -> Any:
    """A shaken network of :data:`HF`, or ``detr-timm``, the same every time."""
    import torch

    torch.manual_seed(0)
    return shaken(_detr(timm=True, **_SMALL) if kind == "detr-timm" else HF[kind]())


def cut(model: Any, layers: int) -> Any:
    """A copy of a transformers model that ends after so many decoder layers."""
    short = copy.deepcopy(model)
    short.model.decoder.layers = short.model.decoder.layers[:layers]
    return short


def normalised(pixels: np.ndarray, mean: Any, std: Any) -> Any:
    """float32 tensor ``(B, 3, H, W)``, rounded and laid out as a teacher's.

    Such small networks make a lot of the last bit.
    """
    import torch

    mean, std = (np.float32(255) * np.array(v, np.float32) for v in (mean, std))
    return torch.from_numpy((pixels.astype(np.float32) - mean) / std).permute(0, 3, 1, 2)


def corners(boxes: np.ndarray) -> np.ndarray:
    """cx, cy, w, h → x1, y1, x2, y2."""
    x, y, w, h = np.moveaxis(boxes, -1, 0)
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=-1)


def torchvision(name: str, size: tuple[int, int] = SIZE, **settings: Any) -> Any:
    """A shaken detector of torchvision, the same every time, whose own transform leaves pictures of ``size`` as they are."""
    import torch
    from torchvision import models

    torch.manual_seed(0)
    made = models.get_model(
        name, weights=None, weights_backbone=None, min_size=min(size), max_size=max(size), **settings
    )
    return shaken(made, size)
