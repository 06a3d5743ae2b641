"""Write a small cache of today's format, and the values in it, for `tests/test_golden.py` to read forever.

    .venv/bin/python tools/make_golden.py tests/golden/1.1

Run it once for each version of the format, never again for an old one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import softcache as sc
from softcache.testing import ToyImages, toy_teacher


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
    cache = sc.build(
        out / "cache",
        source=source,
        teacher=[toy_teacher(), toy_teacher()],
        recipe="random_resized_crop(8)|flip|color_jitter(0.4, 0.4, 0.4, 0.1)|rand_augment|erase(p=1)|mix(p=0.8)",
        views=2,
        targets=["logits=topk(2)", "0.logits=argmax", "1.logits=full(u8)", "0.map=int8", "1.vector=f16"],
        label_smoothing=0.1,
        block_rows=4,
        batch=4,
    )
    for view, rows in contents(cache, source).items():
        np.savez_compressed(out / f"view-{view}", allow_pickle=False, **rows)
    (out / "digest").write_text(cache.digest + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
