"""A small coloured-squares dataset, a teacher that measures colour, and students without batch norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn

import softcache
from softcache.cache import Cache
from softcache.source import Source

CLASSES = ("blue", "green", "grey", "red")
TINTS = {"blue": (0, 0, 60), "green": (0, 60, 0), "grey": (0, 0, 0), "red": (60, 0, 0)}
SIZE = 16


def picture(name: str, seed: int) -> np.ndarray:
    """uint8 (16, 16, 3): noise with a tint."""
    noise = np.random.default_rng(seed).integers(0, 190, (SIZE, SIZE, 3))
    return (noise + TINTS[name]).astype(np.uint8)


def write_imagefolder(root: Path, split: str, each: int, seed: int) -> Path:
    """``root/split/class/000.png``: the splits share their ids and none of their images."""
    for c, name in enumerate(CLASSES):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(each):
            image = picture(name, seed + 1000 * c + i)
            Image.fromarray(image).save(folder / f"{i:03}.png")
    return root


def build(path: Path, source: Source, **options) -> Cache:
    """Three views of every image of ``source``."""
    options = {"recipe": "crop(16, pad=2)|flip", "views": 3, "block_rows": 50} | options
    return softcache.build(path, source=source, teacher=teacher, progress=False, batch=16, **options)


class Dataset:
    """The pictures as a map-style dataset, its class names in any order."""

    def __init__(self, each: int, classes: tuple[str, ...] = CLASSES, seed: int = 0):
        self.classes = classes
        self.items = [
            (picture(name, seed + 1000 * c + i), classes.index(name))
            for c, name in enumerate(CLASSES)
            for i in range(each)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def teacher(pixels: np.ndarray) -> np.ndarray:
    """Logits (B, 4) in the order of CLASSES, from the mean colour."""
    mean = pixels.reshape(len(pixels), -1, 3).mean(1)
    tint = mean - mean.min(1, keepdims=True)
    red, green, blue = tint.T
    return np.stack([blue, green, 30 - tint.max(1), red], 1).astype(np.float32) / 8


teacher.input_spec = {"size": [SIZE, SIZE]}


def teacher_factory():
    return teacher


def plain(num_classes: int) -> nn.Module:
    """No batch norm: a batch is the sum of its rows."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, num_classes))


def dropout(num_classes: int) -> nn.Module:
    """Draws random numbers at every step."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(3 * SIZE * SIZE, num_classes))


class Exit(nn.Module):
    def __init__(self, wide: int, num_classes: int):
        super().__init__()
        self.embedding, self.linear = nn.Linear(wide, 16), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.embedding(x.flatten(1)))


class Exits(nn.Module):
    """Answers behind either of two stages; no batch norm."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU())
        self.exit1, self.exit2 = Exit(392, num_classes), Exit(144, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.every_exit(x)[-1]

    def every_exit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stage1(x)
        return self.exit1(x), self.exit2(self.stage2(x))

    def at_exit(self, x: Tensor, number: int) -> Tensor:
        x = self.stage1(x)
        return self.exit1(x) if number == 1 else self.exit2(self.stage2(x))


def exits(num_classes: int) -> Exits:
    return Exits(num_classes)
