"""How well an epoch is shuffled, globally and block by block: no images, no cache, seconds.

    .venv/bin/python tools/shuffle_quality.py [--samples 1_000_000] [--block-rows 8192] [--batch 256] [--json]

The dataset is an ImageFolder's: samples sorted by class. Of each way to go through it:

- order: Spearman's correlation of a row's place in the epoch with its place on the disk. 0 is what a shuffle has.
- class mix: over batches, the mean χ² of the counts of classes against the dataset's, over its degrees of freedom. 1 is what
  batches drawn at random have (0 all classes alike often, and many a batch of one class).
- neighbours: how much more often than by chance two rows that are together in a batch are from the same block. 1 is chance.
- meet again: the same for two rows that were in one batch in the epoch before.
- files: blocks touched by a batch, and by the hundred batches after it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np
from softcache_train.order import Order
from softcache_train.samples import AsTheyLie, Every
from softcache_train.shuffle import Blocks

from softcache.block import Grid


def quality(grid: Grid, labels: np.ndarray, batches: Callable[[int], np.ndarray]) -> dict[str, float]:
    """Figures of an order that gives an epoch's rows, (steps, batch)."""
    now, before = batches(1), batches(0)
    steps, batch = now.shape
    places = grid.positions(now.ravel()).reshape(now.shape)
    blocks = places // grid.block_rows
    of_class, counts = labels[now], np.bincount(labels)
    expected = counts / counts.sum() * batch
    mixed = [
        ((np.bincount(row, minlength=len(counts)) - expected) ** 2 / expected).sum() / (len(counts) - 1)
        for row in of_class
    ]
    step_before = np.full(grid.samples, -1)
    step_before[before.ravel()] = np.repeat(np.arange(len(before)), batch)
    hundred = min(100, steps)
    return {
        "order": float(np.corrcoef(places.ravel().argsort().argsort(), np.arange(places.size))[0, 1]),
        "class mix": float(np.mean(mixed)),
        "neighbours": _pairs(blocks, grid.blocks_per_view),
        "meet again": _pairs(step_before[now], steps),
        "files a batch": float(np.mean([len(np.unique(row)) for row in blocks[:1000]])),
        "files a hundred": float(len(np.unique(blocks[:hundred]))),
    }


def _pairs(groups: np.ndarray, count: int) -> float:
    """How much more often than by chance two of a row are of one group, of ``count`` about as large."""
    rows, batch = groups.shape
    alike = sum(int((n * (n - 1)).sum()) for n in (np.unique(row, return_counts=True)[1] for row in groups))
    return alike / (rows * batch * (batch - 1)) * count


def table(samples: int, block_rows: int, batch: int, classes: int) -> dict[str, dict[str, float]]:
    """Figures of every way."""
    grid = Grid(samples, 1, block_rows, 7)
    every = Every(samples, np.zeros(0, np.int64))
    labels = np.arange(samples) * classes // samples
    lying = AsTheyLie(grid, every)
    orders = {
        "global": Order(every, 1, batch, 0),
        **{
            f"blocks, {n} together": Order(lying, 1, batch, 0, 1, Blocks(block_rows, n))
            for n in (1, 4, 16, 64)
        },
    }
    steps = samples // batch

    def whole(order: Order) -> Callable[[int], np.ndarray]:
        return lambda epoch: np.stack([order.rows(epoch, step) for step in range(steps)])

    def plain(rows: np.ndarray) -> Callable[[int], np.ndarray]:
        return lambda epoch: rows[: steps * batch].reshape(steps, batch)

    found = {name: quality(grid, labels, whole(order)) for name, order in orders.items()}
    found["as it lies"] = quality(grid, labels, plain(lying[np.arange(samples)]))
    return found | {"sorted by class": quality(grid, labels, plain(np.arange(samples)))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("samples", 1_000_000), ("block-rows", 8192), ("batch", 256), ("classes", 1000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = table(asked.samples, asked.block_rows, asked.batch, asked.classes)
    if asked.json:
        print(json.dumps(found))
        return
    names = list(found["global"])
    print(f"| | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for way, one in found.items():
        print(f"| {way} | {' | '.join(f'{one[name]:.3f}' for name in names)} |")


if __name__ == "__main__":
    main()
