"""What the spine costs: building, reading, training. Both sides of every comparison run interleaved in one process.

    .venv/bin/python tools/bench_spine.py --data ../shared/data [--only build read train] [--rounds 5]

Prints tables with medians and ratios. Let nothing else run on the machine meanwhile. Needs the CIFAR-10 Parquet files
in DATA/cifar10 and cifar10_resnet56.safetensors in DATA/weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import softcache as sc
from softcache import job, loop, teachers
from softcache.block import Grid
from softcache.meter import Meter
from softcache.reader import Files, Reader
from softcache.recipe import Recipe
from softcache.store import Store
from softcache.targets import Target, requests
from softcache.zarrfile import Array

RECIPE = "crop(32, pad=4)|flip"


def table(title: str, rows: list[tuple[str, ...]]) -> None:
    """Aligned columns; the first row is the head."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for i, row in enumerate(rows):
        cells = [
            c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("| " + " | ".join(cells) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    sys.stdout.flush()


def interleaved(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each side once a round, every other round in reverse, after a round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in list(sides)[:: (-1) ** i]:
            value = sides[name]()
            if i:
                found[name].append(value)
    return found


# -- build -------------------------------------------------------------------------------------------------------


def bench_build(data: Path, rounds: int) -> None:
    """The builder's loop against the same loop without encoding and writing."""
    rows: list[tuple[str, ...]] = [("teacher", "bare, rows/s", "build, rows/s", "build / bare")]
    source = sc.Source(data / "cifar10", split="test", limit=2048)
    asked = requests(["logits=full(u8)", "layer3=int8"])
    for name in ("resnet8", "resnet20", "resnet56"):
        weights = data / "weights" / f"cifar10_{name}.safetensors"
        options = teachers.Options(weights=weights if weights.exists() else None, taps=("layer3",))
        teacher = teachers.load(f"softcache_train.students:{name}", options)

        def run(keep: bool, teacher: teachers.Teacher = teacher) -> float:
            with tempfile.TemporaryDirectory() as folder:
                made = job.prepare(
                    Store(Path(folder) / "cache"),
                    source,
                    teacher,
                    Recipe(RECIPE, 0),
                    asked,
                    1,
                    256,
                    False,
                    False,
                )
                blocks = [[block] for block in made.grid.blocks()]
                meter = Meter(len(source), show=False)
                with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(1) as writer:
                    start = time.perf_counter()
                    if keep:
                        loop._pass(made, blocks, readers, writer, meter)
                    else:
                        with mock.patch.object(loop, "keep", lambda *_: 0):
                            loop._pass(made, blocks, readers, writer, meter)
                    return len(source) / (time.perf_counter() - start)

        found = interleaved({"bare": lambda run=run: run(False), "build": lambda run=run: run(True)}, rounds)
        ratios = [b / a for a, b in zip(found["bare"], found["build"], strict=True)]
        bare, build = statistics.median(found["bare"]), statistics.median(found["build"])
        rows.append((name, f"{bare:,.0f}", f"{build:,.0f}", f"{statistics.median(ratios):.3f}"))
    table(
        "build (logits as full(u8), layer3 as int8; crop and flip from Parquet) against the bare teacher",
        rows,
    )


# -- read --------------------------------------------------------------------------------------------------------


def bench_read(rounds: int) -> None:
    """Shuffled batches: the reader, np.memmap over the same rows, zarr-python over the same files."""
    import warnings

    import zarr

    warnings.filterwarnings("ignore", module="zarr")
    rng = np.random.default_rng(0)
    cases = {
        "logits (10) as full(u8), batch 256": ((10,), 200_000, 256, 8192, "logits=full(u8)"),
        "logits (1000) as full(u8), batch 256": ((1000,), 50_000, 256, 8192, "logits=full(u8)"),
        "logits (1000), one file": ((1000,), 50_000, 256, 50_000, "logits=full(u8)"),
        "map (64, 8, 8) as int8 (zstd), batch 64": ((64, 8, 8), 8_192, 64, 1024, "map=int8"),
        "map (256, 20, 20) as f16 (zstd), batch 16": ((256, 20, 20), 1_024, 16, 128, "map=f16"),
    }
    rows: list[tuple[str, ...]] = [
        ("rows", "decoded, k rows/s", "gathered", "np.memmap", "zarr-python", "gathered / memmap", "/ zarr")
    ]
    for title, (shape, samples, batch, block_rows, asked) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            target, grid, arrays, reader = _synthetic(Path(folder), shape, samples, block_rows, asked)
            path = f"targets/{target.name}"
            arrays = [a for a in arrays if a.path.startswith(path)]
            flat = [_memmap(Path(folder), grid, reader, array) for array in arrays]
            group: Any = zarr.open(folder, mode="r")
            positions = [rng.integers(0, samples, batch) for _ in range(200)]
            outs = [np.empty((batch, *a.row), a.dtype) for a in arrays]

            def decoded(reader=reader, path=path, target=target, positions=positions) -> None:
                for p in positions:
                    target.decode(reader.fields(path, 0, p))

            def gathered(reader=reader, path=path, positions=positions) -> None:
                for p in positions:
                    reader.fields(path, 0, p)

            def memmap(flat=flat, positions=positions, outs=outs) -> None:
                for p in positions:
                    for values, out in zip(flat, outs, strict=True):
                        np.take(values, p, axis=0, out=out)

            def through_zarr(group=group, arrays=arrays, positions=positions) -> None:
                for p in positions[:1]:
                    for array in arrays:
                        group[array.path].oindex[0, p]

            sides = {
                n: lambda f=f, n=k * batch: n / _timed(f)
                for n, f, k in (
                    ("decoded", decoded, 200),
                    ("gathered", gathered, 200),
                    ("memmap", memmap, 200),
                    ("zarr", through_zarr, 1),
                )
            }
            found = {k: statistics.median(v) for k, v in interleaved(sides, rounds).items()}
            rates = [f"{found[k] / 1e3:,.1f}" for k in ("decoded", "gathered", "memmap", "zarr")]
            ratio = f"{found['gathered'] / found['memmap']:.2f}", f"{found['gathered'] / found['zarr']:,.0f}"
            rows.append((title, *rates, *ratio))
    table("shuffled reads, thousand rows a second (decoded = float32, the rest = stored fields)", rows)


def _timed(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def _synthetic(
    folder: Path, shape: tuple[int, ...], samples: int, block_rows: int, asked: str
) -> tuple[Target, Grid, list[Array], Reader]:
    """Files whose rows are noise (maps: half of it zeros, as after a ReLU), written by the product's encoders."""
    from softcache.arrays import block_arrays

    (request,) = requests([asked])
    target = request.resolve(shape)
    grid = Grid(samples, 1, block_rows, 0)
    rng = np.random.default_rng(0)
    arrays = block_arrays(grid, {target.name: target})
    store = Store(folder)
    for block in grid.blocks():
        values = rng.standard_normal((block.rows, *shape), np.float32)
        fields = target.codec.encode(np.maximum(values, 0) if len(shape) > 1 else 4 * values)
        for array in arrays:
            encoded = fields.get(
                array.path.rpartition("/")[2], np.zeros((block.rows, *array.row), array.dtype)
            )
            path = store.path(array.file(block.view, block.index))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(array.encode(encoded))
    for array in arrays:
        store.path(f"{array.path}/zarr.json").write_bytes(array.metadata())
    for name in ("", "targets/", f"targets/{target.name}/", "view/"):
        store.path(f"{name}zarr.json").write_bytes(b'{"zarr_format":3,"node_type":"group","attributes":{}}')
    return target, grid, arrays, Reader(Files(store), grid, arrays, lambda block: None)


def _memmap(folder: Path, grid: Grid, reader: Reader, array: Array) -> np.ndarray:
    """The array's rows, uncompressed, in one file that numpy maps."""
    path = folder / (array.path.replace("/", "-") + ".npy")
    group, _, field = array.path.rpartition("/")
    parts = np.array_split(np.arange(grid.samples), 32)
    np.save(path, np.concatenate([reader.fields(group, 0, p, slab=False)[field].copy() for p in parts]))
    return np.load(path, mmap_mode="r")


# -- train -------------------------------------------------------------------------------------------------------


def bench_train(data: Path, rounds: int) -> None:
    """Steps from the cache, with labels only, and with the teacher online, in turn."""
    import softcache_train as st
    import torch
    from softcache_train import online, students
    from softcache_train.objectives import cross_entropy
    from softcache_train.targets import CacheTargets

    weights = data / "weights" / "cifar10_resnet56.safetensors"
    source = sc.Source(data / "cifar10", split="test", limit=2048)
    spec = "softcache_train.students:resnet56"
    rows: list[tuple[str, ...]] = [
        ("student", "labels", "cache", "online", "cache / labels (95 %)", "online / cache", "(t + s) / s")
    ]
    with tempfile.TemporaryDirectory() as folder:
        small = {"source": source, "teacher": spec, "weights": weights, "recipe": RECIPE, "progress": False}
        cache = sc.build(Path(folder) / "cache", targets={"logits": "full(u8)"}, **small)
        live = online.load(cache, spec, str(weights), ["logits"], "cpu")
        for name in ("resnet8", "resnet20"):
            torch.manual_seed(0)
            model = students.make(name, 10)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            sources = {
                "labels": CacheTargets(cache, []),
                "cache": CacheTargets(cache, ["logits"]),
                "online": live,
            }
            steps = {
                n: _steps(st.Loader(cache, source, global_batch=128, target_source=s))
                for n, s in sources.items()
            }

            def step(kind: str, steps=steps, model=model, optimizer=optimizer) -> float:
                start = time.perf_counter()
                batch = next(steps[kind])
                output = model(batch.images)
                loss = cross_entropy(output, batch.labels)
                if kind != "labels":
                    loss = 0.1 * loss + 0.9 * st.kd(output, batch["logits"], T=4.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                return 1e3 * (time.perf_counter() - start)

            pairs = interleaved({k: lambda k=k: step(k) for k in ("labels", "cache")}, 40 * rounds)
            slow = interleaved({k: lambda k=k: step(k) for k in ("cache", "online")}, 6 * rounds)
            low, middle, high = _paired(pairs["cache"], pairs["labels"])
            labels, cached, asked = (
                statistics.median(v) for v in (pairs["labels"], slow["cache"], slow["online"])
            )
            teacher_ms = 1e3 * statistics.median(
                _timed(lambda: live(0, np.arange(128), _pixels(live))) for _ in range(5)
            )
            rows.append(
                (
                    f"{name}, batch 128",
                    f"{labels:.1f} ms",
                    f"{statistics.median(pairs['cache']):.1f} ms",
                    f"{asked:.1f} ms",
                    f"{middle:.3f} ({low:.3f} to {high:.3f})",
                    f"{asked / cached:.2f}",
                    f"{(teacher_ms + labels) / labels:.2f}",
                )
            )
    table("a training step on the CPU, ResNet-56 as teacher; paired and interleaved", rows)


def _steps(loader):  # endless batches, rendered in the thread that asks: every side pays for its own
    loader.workers = 0
    while True:
        yield from loader


def _pixels(live) -> np.ndarray:
    return np.zeros((128, *live.size, 3), np.uint8)


def _paired(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median of the paired ratios a/b, and a bootstrap 95 % interval of it."""
    ratios = np.array(a) / np.array(b)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.median(ratios)), float(np.quantile(medians, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["build", "read", "train"])
    arguments = parser.parse_args()
    if "build" in arguments.only:
        bench_build(arguments.data, arguments.rounds)
    if "read" in arguments.only:
        bench_read(arguments.rounds)
    if "train" in arguments.only:
        bench_train(arguments.data, arguments.rounds)


if __name__ == "__main__":
    main()
