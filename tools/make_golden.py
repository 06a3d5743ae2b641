"""Write a small cache of today's format, and the values in it, for `tests/test_golden.py` to read forever.

    .venv/bin/python tools/make_golden.py tests/golden/1.3

Run it once for each version of the format, never again for an old one.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

import softcache as sc
from softcache.testing import ToyImages, toy_detector


def contents(cache: sc.Cache, source: sc.Source) -> dict[int, dict[str, np.ndarray]]:
    """Of each view, for the samples in source order: its pixels as a trainer renders them, and its decoded targets."""
    shown = sc.with_targets(source, cache, transform=np.asarray)
    found = {}
    for epoch in range(cache.views):
        shown.set_epoch(epoch)
        rows = {"pixels": np.stack([shown[i]["image"] for i in range(len(shown))])}
        for name, target in cache.read(shown.view(epoch), shown.samples).items():
            arrays = target.arrays()
            fields = arrays if isinstance(arrays, dict) else {"values": arrays}
            rows |= {f"{name}.{field}": values for field, values in fields.items()}
        found[shown.view(epoch)] = rows
    return found


class Layered:
    """Exact arithmetic on pixels: twenty classes by a last layer of whole numbers, and a map (3, 5, 7)."""

    input_spec = {"size": (8, 8)}  # noqa: RUF012
    weights_digest = hashlib.sha256(b"layered").hexdigest()
    weight = np.arange(120, dtype=np.float32).reshape(20, 6) * 7 % 11 - 5
    bias = np.arange(20, dtype=np.float32) % 3

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        rows = pixels.reshape(len(pixels), -1).astype(np.int64)
        means = rows.reshape(len(rows), 6, -1).mean(axis=2)  # of one image's views much alike
        embedding = np.floor(means / 2 - 50).astype(np.float32)
        embedding[:, 0] = 127  # so that a byte's scale is 1
        logits = (embedding @ self.weight.T + self.bias) / 64
        many = np.resize(rows.T, (105, len(rows))).T.reshape(-1, 3, 5, 7)
        maps = (many * 31 % 509 / 64 - 4).astype(np.float32)
        said = {"logits": logits * 64, "logits.head": embedding, "map": maps, "signs": maps}
        return said | {"shared": logits, "packed": logits, "drawn": logits}

    def constants(self) -> dict[str, np.ndarray]:
        return {"class_weight": self.weight, "class_bias": self.bias}


def main(out: Path) -> None:
    if out.exists():
        sys.exit(f"{out} exists: a golden cache is never written again")
    source = sc.Source(ToyImages(11))
    folder = out / "cache"
    sc.build(
        folder,
        source=source,
        teacher=Layered(),
        recipe="flip|color_jitter(brightness=0.2)",
        views=4,
        targets={
            "logits": "head(int8)",
            "shared:logits": "anchored(listed=3, extra=2, views=3)",
            "packed:logits": "packed(20)",
            "drawn:logits": "sample(9)",
            "map": "int8|plain",
            "map.strength": "strength",
            "signs": "sign",
        },
        ignore_labels=True,
        block_rows=4,
        batch=4,
    )
    sc.extend(folder, source=source, teacher=Layered(), views=5)
    other = {"detections": "top(5, logits=score)"}
    sc.extend(folder, source=source, teacher=toy_detector(), name="other", targets=other, batch=4)
    cache = sc.open(folder)
    for view, rows in contents(cache, source).items():
        np.savez_compressed(out / f"view-{view}", allow_pickle=False, **rows)
    (out / "digest").write_text(cache.digest + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
