"""What do longer schedules gain on one view, and on five? CIFAR-10, ResNet-56 → ResNet-8, paired seeds.

    python tools/views_curve.py --data ../shared/data --out runs/views                # runs what is missing
    python tools/views_curve.py --data ../shared/data --out runs/quick --quick        # that it works

Epochs show every image once: of a cache of one view (``views: 1``) the same pixels with the same targets every time, of five
each view in turn. Each number of epochs has its own schedule. 0.1 CE + 0.9 KD at T = 4; the student sees 16 × 16 pixels.
"""

from __future__ import annotations

import sys
from typing import Any

from paired import CE, HALF, KD, Bench, Scale, differences, main, table

FULL, QUICK = (
    Scale(images=2000, views=5, epochs=10),
    Scale(images=128, views=2, epochs=2, seeds=2, held_out=200),
)


def work(bench: Bench) -> tuple[str, dict[str, Any]]:
    scale, cache = bench.scale, bench.cache("views", {"logits": "full(u8)"})
    short, long = scale.epochs, 2 * scale.epochs

    def name(views: int, epochs: int) -> str:
        return f"{views} view{'s' * (views > 1)}, {epochs} epochs"

    arms = {
        name(views, epochs): (cache, {**HALF, "objectives": [CE, KD], "views": views, "epochs": epochs})
        for views in (1, scale.views)
        for epochs in (short, long)
    }
    found = bench.runs(arms)
    pairs = {
        f"{scale.views} views − 1 view, {epochs} epochs": ([name(scale.views, epochs)], [name(1, epochs)])
        for epochs in (short, long)
    } | {
        f"{long} − {short} epochs, {views} view{'s' * (views > 1)}": (
            [name(views, long)],
            [name(views, short)],
        )
        for views in (1, scale.views)
    }
    return f"{table(found)}\n\n{differences(found, pairs)}", {"top1": found}


if __name__ == "__main__":
    sys.exit(main(__doc__, FULL, QUICK, work))
