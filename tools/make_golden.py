"""Write a small cache of today's format, and the values in it, for `tests/test_golden.py` to read forever.

    .venv/bin/python tools/make_golden.py tests/golden/1.2

Run it once for each version of the format, never again for an old one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import softcache as sc
from softcache.testing import ToyImages, toy_detector, toy_teacher


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


def main(out: Path) -> None:
    if out.exists():
        sys.exit(f"{out} exists: a golden cache is never written again")
    source = sc.Source(ToyImages(11))
    folder = out / "cache"
    sc.build(
        folder,
        source=source,
        teacher=toy_detector(),
        recipe="1: flip|hsv_jitter|mosaic(8)|mixup(p=0.5); letterbox(8)|vflip|random_affine(degrees=20)",
        views=2,
        targets={
            "detections": "top(5, background=3)",
            "queries": "all(logits=f16)",
            "p3": "pool(2)|int8",
            "p3.attention": "attention",
        },
        licences={"source": "CC0-1.0", "teacher": "Apache-2.0", "cache": "CC0-1.0"},
        block_rows=4,
        batch=4,
    )
    sc.extend(folder, source=source, teacher=toy_detector(), views=3)
    other = {"logits": "full(f16)", "map": "int4", "vector": "f16"}
    sc.extend(folder, source=source, teacher=toy_teacher(), name="other", targets=other, batch=4)
    cache = sc.open(folder)
    for view, rows in contents(cache, source).items():
        np.savez_compressed(out / f"view-{view}", allow_pickle=False, **rows)
    (out / "digest").write_text(cache.digest + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
