"""A cache of a thousand million rows, on a laptop: how fast it opens, what it takes of memory, and how fast it is read.

    .venv/bin/python tools/scale.py [--samples 100_000_000 --views 10] [--block-rows 65536] [--json] [--keep FOLDER]

The cache is generated: a real one of a few rows, its manifest rewritten for so many samples, every shard a hard link to
one real file, and ids that are a hole on the disk (nobody reads them here). So it takes a few megabytes, each shard has its
checksum, and all that a reader does is what it would do. ``blocks`` reads from files, ``global`` from the slab of a view
where that has no more than 1 GiB. Everything is measured in a process of its own; memory is the most that it had resident
(VmHWM), with what it has mapped. Without arguments, 10^8 samples in ten views and 10^9 in one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH, STEPS = 256, 200
UNREADABLE = 1000


# -- the cache -------------------------------------------------------------------------------------------------


def generate(folder: Path, samples: int, views: int, block_rows: int) -> None:
    """Write a finished cache of so many rows, of which the first blocks repeat."""
    import softcache as sc
    from softcache import manifest as m
    from softcache.arrays import block_arrays, constant, view_rows
    from softcache.identity import Identity
    from softcache.testing import ToyImages, ToyTeacher

    made = sc.build(
        folder, source=ToyImages(256), teacher=ToyTeacher(), targets={"logits": "full(u8)"}, progress=False
    )
    small = made.manifest
    assert small is not None
    shape = {"samples": samples, "views": views, "block_rows": block_rows}
    identity = Identity(**{**dict(small.identity), "grid": small.identity.grid.model_copy(update=shape)})
    grid = identity.make_grid()
    arrays = block_arrays(grid, identity.make_targets(), view_rows(0, 0, False, False))

    entries = []
    for array in arrays:
        rows = np.asarray(_rows_of(made, array.path))
        data = array.encode(np.resize(rows, (block_rows, *rows.shape[1:])))
        entries.append(m.Entry.of(data))
        _link_all(folder, [array.file(block.view, block.index) for block in grid.blocks()], data)
    entries.append(m.Entry(sha256="0" * 64, bytes=0))  # of receipts, which nobody reads

    table = m.pack_entries(entries) * (grid.blocks_per_view * views)
    (folder / made.parts[0].table_file).write_bytes(table)
    ids = {"ids/offsets": ((samples + 1,), "int64"), "ids/bytes": ((9 * samples,), "uint8")}
    constants = dict(small.constants)
    for path, (size, dtype) in ids.items():
        array = constant(path, size, dtype)
        (folder / array.file()).unlink()
        with (folder / array.file()).open("wb") as file:
            file.truncate(array.plain_bytes())
        constants[path] = m.Constant(
            sha256="0" * 64, bytes=array.plain_bytes(), dtype=dtype, shape=list(size)
        )
    few = min(UNREADABLE, samples // 100)
    invalid = sorted(set(np.random.default_rng(0).integers(0, samples, few).tolist()))
    manifest = m.Manifest(
        **{
            **dict(small),
            "identity": identity,
            "identity_file": m.Entry.of(identity.to_bytes()),
            "constants": constants,
            "files": m.Entry.of(table),
            "invalid": invalid,
        }
    ).signed()
    (folder / m.MANIFEST).write_bytes(manifest.to_bytes())


def _rows_of(made: Any, path: str) -> np.ndarray:
    group, _, field = path.rpartition("/")
    return made.reader.fields(group, 0, np.arange(made.samples))[field]


def _link_all(folder: Path, names: list[str], data: bytes) -> None:
    """Every file the same; a file system allows some ten thousands of names for one."""
    first = folder / names[0]
    for number, name in enumerate(names):
        path = folder / name
        path.unlink(missing_ok=True)
        if number % 50_000:
            os.link(first, path)
        else:
            first = path
            path.write_bytes(data)


# -- what it takes ---------------------------------------------------------------------------------------------


def measure(folder: Path) -> dict[str, float]:
    """Seconds, microseconds and megabytes, of this process."""
    found: dict[str, float] = {}

    def told(name: str, start: float, each: int = 1, unit: float = 1.0) -> None:
        found[name] = (time.perf_counter() - start) / each * unit
        found[f"MB after {name}"] = _resident()

    start = time.perf_counter()
    import softcache as sc

    cache = sc.open(folder)
    told("import and open, s", start)
    start = time.perf_counter()
    cache = sc.open(folder)
    told("open, s", start)

    from softcache_train.order import Order
    from softcache_train.samples import as_stored, trainable
    from softcache_train.shuffle import choose

    start = time.perf_counter()
    every = trainable(cache)
    blocks = choose(cache, len(every), cache.names(), 1, "blocks")
    orders = {
        "global": Order(every, cache.views, BATCH, 0),
        "blocks": Order(as_stored(cache, every), cache.views, BATCH, 0, 1, blocks),
    }
    told("order, s", start)
    for name, order in orders.items():
        steps = np.random.default_rng(0).integers(0, order.steps, STEPS).tolist()
        start = time.perf_counter()
        for epoch, step in enumerate(steps):
            order.rows(epoch, step)
        told(f"{name}: order, µs a batch", start, STEPS, 1e6)
    for name, order in reversed(orders.items()):
        slab = name == "global"
        start = time.perf_counter()
        cache.read(order.view(0), order.rows(0, 0), ["logits"], slab=slab)
        told(f"{name}: first batch, s", start)
        start = time.perf_counter()
        for step in range(1, 21):
            cache.read(order.view(0), order.rows(0, step), ["logits"], slab=slab)
            cache.read_views(order.view(0), order.rows(0, step), slab=slab)
        told(f"{name}: the next twenty, ms each", start, 20, 1e3)
    return found


def _resident() -> float:
    """The most that this process had in memory, in MB. ru_maxrss would know of the process that started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run(samples: int, views: int, block_rows: int, keep: Path | None = None) -> dict[str, float]:
    """Generate a cache, and measure it in another process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary) / "cache"
        start = time.perf_counter()
        generate(folder, samples, views, block_rows)
        made = {"generated, s": time.perf_counter() - start}
        command = [sys.executable, __file__, "--measure", str(folder)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return made | json.loads(told)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--block-rows", type=int, default=1 << 16)
    parser.add_argument("--keep", type=Path, help="where to put the cache, which is then kept")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure)))
        return
    shapes = [(asked.samples, asked.views)] if asked.samples else [(10**8, 10), (10**9, 1)]
    found = {f"{s:,} × {v}": run(s, v, asked.block_rows, asked.keep) for s, v in shapes}
    if asked.json:
        print(json.dumps(found))
        return
    names = [name for name in next(iter(found.values())) if not name.startswith("MB after")]
    for shape, one in found.items():
        print(f"\n| {shape} samples × views | | resident, MB |\n|---|---|---|")
        for name in names:
            print(f"| {name} | {one[name]:,.3f} | {one.get(f'MB after {name}', 0):,.0f} |")


if __name__ == "__main__":
    main()
