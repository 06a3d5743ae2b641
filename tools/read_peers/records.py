"""The records that all readers hold, and the caches of them, made as a user would: by ``softcache.import_arrays``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import softcache as sc
from softcache import codecs

_CLASSES, _PIECE = 300, 8192
_MANY = 50  # files, of the rows that lie in many


@dataclass(frozen=True)
class Sizes:
    """How many rows of ``topk(10)`` (50 bytes), of float16 maps (256, 20, 20) (205 kB), of small ones (32, 8, 8) (4 kB)."""

    rows: int
    maps: int
    small: int


class _Images:
    """As many images as there are rows; nobody looks at them."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        if i >= self.count:
            raise IndexError(i)
        return np.full((8, 8, 3), i % 256, np.uint8)


def _logits(rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate(
        [
            3 * rng.standard_normal((min(_PIECE, rows - i), _CLASSES), np.float32)
            for i in range(0, rows, _PIECE)
        ]
    )


def _maps(rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise after a ReLU, of channels of unequal gain."""
    rng = np.random.default_rng(0)
    gain = rng.lognormal(sigma=0.5, size=(shape[0], 1, 1)).astype(np.float32)
    return np.maximum(rng.standard_normal((rows, *shape), np.float32) * gain, 0)


def _cache(folder: Path, values: np.ndarray, targets: dict[str, str], block_rows: int | None) -> None:
    file = folder.with_suffix(".npy")
    np.save(file, values)
    arrays: dict[str, Any] = dict.fromkeys(targets, file.stem)
    sc.import_arrays(
        folder,
        file,
        source=_Images(len(values)),
        arrays=arrays,
        ids="order",
        recipe="identity",
        input_size=8,
        targets=targets,
        block_rows=block_rows,
        progress=False,
    )
    file.unlink()


def make(folder: Path, sizes: Sizes) -> None:
    """``truth/NAME.npy``, in source order, encoded here by the codec; and the caches below ``softcache/``."""
    truth, caches = folder / "truth", folder / "softcache"
    for made in (truth, caches):
        made.mkdir(parents=True)
    logits = _logits(sizes.rows)
    topk = codecs.parse("topk(10)").codec
    parts = [topk.encode(logits[i : i + _PIECE]) for i in range(0, sizes.rows, _PIECE)]
    fields = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    np.save(truth / "index.npy", fields["index"])
    value = [fields["step"].view(np.uint16)[:, None], fields["tail"], fields["value"]]
    np.save(truth / "value.npy", np.concatenate(value, axis=1))
    _cache(caches / "rows", logits, {"logits": "topk(10)"}, sizes.rows)
    _cache(caches / "rows-many", logits, {"logits": "topk(10)"}, -(-sizes.rows // _MANY))
    del logits
    maps = _maps(sizes.maps, (256, 20, 20))
    np.save(truth / "map.npy", maps.astype(np.float16))
    _cache(caches / "maps", maps, {"plain": "f16|plain", "packed": "f16"}, None)
    del maps
    small = _maps(sizes.small, (32, 8, 8))
    np.save(truth / "small.npy", small.astype(np.float16))
    _cache(caches / "small", small, {"small": "f16"}, None)
