"""Vision transformers with a distillation token for 32 × 32 images.

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention" (DeiT), arXiv:2012.12877,
§4. Layers are named as in timm, so that weights fit both.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache_train.students.cifar_resnet import CifarResNet


class Attention(nn.Module):
    """Self-attention: (B, tokens, width) → the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with a GELU between them, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """(B, 3, h, w) → a token of each patch, row by row, (B, patches, width)."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Deit(nn.Module):
    """64 patches of 4 × 4 behind a class token and a distillation token: (B, 3, 32, 32) → logits (B, C).

    ``head`` gives the logits of the class token, which learns from labels, ``head_dist`` those of the distillation token,
    which learns from the teacher. In training mode the answer is that of ``head``, since each has a loss of its own; in
    evaluation mode it is the mean of both.
    """

    input_spec: ClassVar[dict[str, Any]] = CifarResNet.input_spec

    def __init__(self, width: int, depth: int, heads: int, num_classes: int):
        super().__init__()
        self.patch_embed = Patches(width, patch=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + 8 * 8, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        self.head_dist = nn.Linear(width, num_classes)
        for token in (self.cls_token, self.dist_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        tokens = (token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token))
        x = self.norm(self.blocks(torch.cat([*tokens, x], dim=1) + self.pos_embed))
        of_class, of_teacher = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return of_class if self.training else (of_class + of_teacher) / 2


def deit_nano(num_classes: int = 10) -> Deit:
    """96 wide, 6 layers, 3 heads, 0.68 M parameters: for a machine without an accelerator."""
    return Deit(96, 6, 3, num_classes)


def deit_tiny(num_classes: int = 10) -> Deit:
    """192 wide, 12 layers, 3 heads, 5.4 M parameters: DeiT-Ti, with smaller patches."""
    return Deit(192, 12, 3, num_classes)
