"""What views cost: decoding, rendering and every pixel op, in images a second of one worker; and the loader.

    .venv/bin/python tools/bench_views.py --data ../shared/data [--rounds 5] [--images 512]

Prints two tables of medians; all rows of a table run interleaved, in one process. Let nothing else run on the machine
meanwhile. Needs the CIFAR-10 Parquet files in DATA/cifar10, and photographs in DATA/coco356/images/val2017.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import softcache_train as st
from bench_spine import interleaved, table

import softcache as sc
from softcache.recipe import Recipe, render
from softcache.recipe.replay import replay
from softcache.source.decode import to_rgb

OPS = [
    "color_jitter(brightness=0.4, contrast=0.4, saturation=0.4)",
    "color_jitter(hue=0.1)",
    "grayscale(p=1)",
    "solarize(p=1)",
    "rand_augment",
    "erase(p=1)",
    "cutout(8)",
]
WORKERS = (0, 1, 2, 4)
RECIPES = {"CIFAR-10, 32": "crop(32, pad=4)|flip", "photographs, 224": "random_resized_crop(224)|flip"}


def timed(f: Callable[[int], object], count: int) -> float:
    """Calls a second of ``f(0) … f(count - 1)``."""
    start = time.perf_counter()
    for i in range(count):
        f(i)
    return count / (time.perf_counter() - start)


def one_worker(encoded: Sequence[bytes], recipe: str, rounds: int) -> dict[str, float]:
    """Images a second: of decoding, drawing a view, rendering it, and each op on what was rendered."""
    made = Recipe(recipe, 0)
    assert made.size is not None
    count, size = len(encoded), made.size
    images = [to_rgb(e) for e in encoded]
    views = [made.view(str(i), 0, image.shape[1], image.shape[0]) for i, image in enumerate(images)]
    pixels = [render(image, view, size) for image, view in zip(images, views, strict=True)]
    drawn = {op: [Recipe(op, 0).view(str(i), 0, *size).ops for i in range(count)] for op in OPS}
    sides: dict[str, Callable[[int], object]] = {
        "decode": lambda i: to_rgb(encoded[i]),
        "draw a view": lambda i: made.view(str(i), 1, images[i].shape[1], images[i].shape[0]),
        f"render: {recipe}": lambda i: render(images[i], views[i], size),
    }
    for op, ops in drawn.items():
        sides[op] = lambda i, ops=ops: replay(pixels[i], ops[i])
    found = interleaved({name: lambda f=f: timed(f, count) for name, f in sides.items()}, rounds)
    return {name.split(":")[0]: statistics.median(values) for name, values in found.items()}


def bench_worker(data: Path, images: int, rounds: int) -> None:
    source = sc.Source(data / "cifar10", split="test", limit=images)
    photographs = sorted((data / "coco356" / "images" / "val2017").glob("*.jpg"))[:images]
    sets = {
        "CIFAR-10, 32": [_encoded(source.image(i)) for i in range(len(source))],
        "photographs, 224": [path.read_bytes() for path in photographs],
    }
    found = {name: one_worker(encoded, RECIPES[name], rounds) for name, encoded in sets.items()}
    rows = [("one worker, images/s", *sets)]
    rows += [(step, *(f"{found[name][step]:,.0f}" for name in sets)) for step in found["CIFAR-10, 32"]]
    table("views: " + "; ".join(f"{name}: {recipe}" for name, recipe in RECIPES.items()), rows)


def _encoded(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def bench_loader(data: Path, images: int, rounds: int) -> None:
    """Batches of 64 from a cache of one view; decoded images are kept by the loader, as in training."""
    source = sc.Source(data / "cifar10", split="test", limit=max(images, 64))
    crop = RECIPES["CIFAR-10, 32"]
    recipes = [crop, *(f"{crop}|{op}" for op in ("color_jitter(brightness=0.4, hue=0.1)", "rand_augment"))]
    rows: list[tuple[str, ...]] = [("loader, images/s", *(f"{n} workers" for n in WORKERS))]
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            cache = sc.build(
                Path(folder) / "c", source=source, teacher=_teacher(), recipe=recipe, progress=False
            )
            loaders = {n: st.Loader(cache, source, global_batch=64, workers=n) for n in WORKERS}

            def epoch(loader: st.Loader) -> float:
                start = time.perf_counter()
                return 64 * sum(1 for _ in loader) / (time.perf_counter() - start)

            found = interleaved({str(n): lambda x=x: epoch(x) for n, x in loaders.items()}, rounds)
        rows.append((recipe, *(f"{statistics.median(values):,.0f}" for values in found.values())))
    table("the loader, all workers together; decoded images are kept", rows)


def _teacher() -> Callable[[np.ndarray], np.ndarray]:
    def teacher(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), -1)[:, :10].astype(np.float32)

    teacher.input_spec = {"size": 32}  # type: ignore[attr-defined]
    return teacher


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=512)
    arguments = parser.parse_args()
    bench_worker(arguments.data, arguments.images, arguments.rounds)
    bench_loader(arguments.data, arguments.images, arguments.rounds)


if __name__ == "__main__":
    main()
