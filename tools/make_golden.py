"""Write a small cache of today's format, and the values in it, for `tests/test_golden.py` to read forever.

    .venv/bin/python tools/make_golden.py tests/golden/1.0

Run it once for each version of the format, never again for an old one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import softcache as sc
from softcache.testing import ToyImages, toy_teacher


def main(out: Path) -> None:
    if out.exists():
        sys.exit(f"{out} exists: a golden cache is never written again")
    cache = sc.build(
        out / "cache",
        source=ToyImages(11),
        teacher=toy_teacher(),
        recipe="random_resized_crop(8)|flip",
        views=2,
        targets=["logits=full(u8)", "map=int8", "vector=f16"],
        block_rows=4,
        batch=4,
    )
    samples = np.arange(cache.samples)
    for view in range(cache.views):
        for name, target in cache.read(view, samples).items():
            np.save(out / f"{name}-{view}.npy", target.values.astype(np.float16), allow_pickle=False)
        geometry = [v.pack() for v in cache.read_views(view, samples)]
        np.save(out / f"view-{view}.npy", np.array(geometry, np.int16), allow_pickle=False)
    (out / "digest").write_text(cache.digest + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
