"""What sharing a cache costs, and what verify finds.

    python tools/bench_share.py [--work FOLDER] [--quick] [--json]

A cache of at least 1 GB (10,000 images × 8 views; --quick: 200 × 2) of logits of 1,000 classes as full(u8), maps of
64 × 14 × 14 as int8 and vectors of 512 as f16, of a teacher that is a table of random numbers: nothing compresses well.
It is pushed, pulled and pulled in part (logits alone; a tenth of the samples), to a folder and to moto's S3 server on
127.0.0.1 (one Python process: its rates are the server's), beside copying the same files with an fsync each. Then one
view more by extend, pushed again; a thousand flipped bits, one at a time, anywhere in any file of a small cache of every
kind of target; the same cache's files cut at every multiple of 512 bytes; and batches of 64 by st.Loader from the cache,
and streamed from the S3 server, in the first epoch (shards come) and the second of the same view.

What was measured is kept in FOLDER/results.json (default: a temporary folder): run again, it goes on with the rest.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np

import softcache as sc
from softcache.errors import DamageError
from softcache.inventory import files
from softcache.testing import ToyTeacher, flip_bit, make_image_folder

SHAPES = {"logits": (1000,), "map": (64, 14, 14), "vector": (512,)}
TARGETS = {"logits": "full(u8)", "map": "int8", "vector": "f16"}
STEP = 512


class Images:
    """Tiny random images, made when they are asked for."""

    def __init__(self, n: int):
        self.targets = [0] * n
        self._pixels = np.random.default_rng(0).integers(0, 256, (n, 12, 12, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self._pixels[i], 0


class Table:
    """A teacher that looks its answers up, by the sum of the pixels, and adds a little of the pixels themselves."""

    input_spec = {"size": (8, 8)}  # noqa: RUF012
    weights_digest = "7" * 64

    def __init__(self) -> None:
        draw = np.random.default_rng(1)
        self._rows = {n: draw.standard_normal((1021, *shape), np.float32) for n, shape in SHAPES.items()}

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        rows = pixels.reshape(len(pixels), -1).astype(np.int64)
        which, scale = (
            rows.sum(axis=1) % 1021,
            (rows @ np.arange(1, rows.shape[1] + 1) % 97 / 97 + 1).astype(np.float32),
        )
        return {
            n: table[which] * scale.reshape(-1, *[1] * (table.ndim - 1)) for n, table in self._rows.items()
        }


def build(out: Path, samples: int, views: int) -> Any:
    return sc.build(
        out,
        source=Images(samples),
        teacher=Table(),
        recipe="random_resized_crop(8)|flip",
        targets=TARGETS,
        views=views,
        ignore_labels=True,
        block_rows=1000,
        progress=sys.stderr.isatty(),
    )


@contextmanager
def bucket() -> Iterator[str]:
    """An empty bucket of an S3 server on 127.0.0.1; this process has what it needs to use it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint, name = f"http://{host}:{port}", f"bench-{secrets.token_hex(4)}"
    others = {n: v for n, v in os.environ.items() if not n.startswith("AWS_")}  # no store but this one
    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
    ours = others | keys | {"AWS_ENDPOINT_URL": endpoint, "NO_PROXY": "127.0.0.1"}
    try:
        with mock.patch.dict(os.environ, ours, clear=True):
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()
            yield f"s3://{name}"
    finally:
        server.stop()


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = do()
    return time.perf_counter() - start, found


def size_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


# -- moving --------------------------------------------------------------------------------------------------


def copy(cache: Path, out: Path) -> dict[str, float]:
    """Every file read, written and synced, one after the other: what nobody verifies."""

    def do() -> None:
        for file in (f for f in cache.rglob("*") if f.is_file()):
            to = out / file.relative_to(cache)
            to.parent.mkdir(parents=True, exist_ok=True)
            with to.open("wb") as writer:
                writer.write(file.read_bytes())
                os.fsync(writer.fileno())

    seconds, _ = timed(do)
    return rate(seconds, size_of(out))


def rate(seconds: float, size: int) -> dict[str, float]:
    return {"seconds": seconds, "bytes": size, "MB/s": size / 1e6 / seconds}


def travel(cache: Path, remote: str, work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seconds, done = timed(lambda: sc.push(cache, remote, "v1", private=True, progress=False))
    found["push"] = rate(seconds, done.bytes)
    seconds, done = timed(lambda: sc.push(cache, remote, "v1", private=True, progress=False))
    found["push again"] = rate(seconds, done.bytes)
    parts: dict[str, dict[str, Any]] = {
        "pull": {},
        "pull logits": {"targets": "logits"},
        "pull 10%": {"sample": 0.1},
    }
    for name, asked in parts.items():
        out = work / "pulled"
        shutil.rmtree(out, ignore_errors=True)
        seconds, _ = timed(lambda out=out, asked=asked: sc.pull(remote, "v1", out, progress=False, **asked))
        found[name] = rate(seconds, size_of(out))
        if sc.verify(out, read_data=True):
            raise SystemExit(f"{name} from {remote} is damaged")
    shutil.rmtree(work / "pulled")
    return found


def grow(cache: Path, samples: int, views: int, work: Path) -> dict[str, Any]:
    """Push, one view more by extend, push again: what moves is what is new."""
    grown, remote = work / "grown", work / "remote-grown"
    shutil.rmtree(grown, ignore_errors=True)
    shutil.copytree(cache, grown)
    first = sc.push(grown, remote, "v1", progress=False)
    before = {file.entry.sha256 for file in files(sc.open(grown))}
    sc.extend(grown, source=Images(samples), teacher=Table(), views=views + 1, progress=False)
    new = sum(
        f.entry.bytes for f in files(sc.open(grown)) if f.content is None and f.entry.sha256 not in before
    )
    seconds, done = timed(lambda: sc.push(grown, remote, "v1", progress=False))
    return {"first push": first.bytes, "new": new, **rate(seconds, done.bytes)}


# -- damage --------------------------------------------------------------------------------------------------


def small(work: Path) -> Path:
    """A new cache of every kind of file: 20 samples, two views, blocks of 8, 8 and 4."""
    for folder in ("small", "images"):
        shutil.rmtree(work / folder, ignore_errors=True)
    sc.build(
        work / "small",
        source=make_image_folder(work / "images", per_class=5),
        teacher=ToyTeacher(),
        recipe="random_resized_crop(8)|flip",
        targets={"logits": "full(u8)", "map": "int8", "vector": "f16"},
        views=2,
        block_rows=8,
        batch=4,
        progress=False,
    )
    return work / "small"


def places(cache: Path) -> dict[str, tuple[Any, ...]]:
    """Where verify should say that each file is."""
    known = {f.file: (f.target, f.field, f.view, f.shard) for f in files(sc.open(cache))}
    names = [f.relative_to(cache).as_posix() for f in sorted(cache.rglob("*")) if f.is_file()]
    return {name: known.get(name, ()) for name in names}


def located(cache: Path, name: str, place: tuple[Any, ...], read_data: bool) -> bool:
    """Does verify name this file, with its place, and no other?"""
    try:
        found = sc.verify(cache, read_data=read_data)
    except DamageError as e:  # of the manifest: nothing can be told of the rest
        return name == "softcache.json" and name in str(e)
    if name.endswith("files.bin"):
        return [d.file for d in found] == [name]
    return [(d.file, (d.target, d.field, d.view, d.shard)) for d in found] == [(name, place)]


def flips(work: Path, count: int) -> dict[str, Any]:
    cache = small(work)
    known, draw, missed = places(cache), np.random.default_rng(5), []
    for i in range(count):
        name = list(known)[i % len(known)] if i < len(known) else str(draw.choice(list(known)))
        bit = int(draw.integers(8 * (cache / name).stat().st_size))
        flip_bit(cache / name, bit)
        if not located(cache, name, known[name], read_data=True):
            missed.append(f"{name} bit {bit}")
        flip_bit(cache / name, bit)
    return {"flips": count, "files": len(known), "found and located": count - len(missed), "missed": missed}


def cuts(work: Path, most: int) -> dict[str, Any]:
    cache = small(work)
    known, tried, missed = places(cache), 0, []
    for name, place in known.items():
        whole = (cache / name).read_bytes()
        for size in list(range(0, len(whole), STEP))[:most]:
            (cache / name).write_bytes(whole[:size])
            tried += 1
            if not located(cache, name, place, read_data=False):
                missed.append(f"{name} at {size}")
        (cache / name).write_bytes(whole)
    return {"cuts": tried, "files": len(known), "found and located": tried - len(missed), "missed": missed}


# -- streaming -----------------------------------------------------------------------------------------------


def streaming(cache: Path, samples: int, work: Path) -> dict[str, Any]:
    """Steps a second, of batches of 64 with logits and maps in one view."""
    import softcache_train as st

    def steps(opened: Any) -> list[float]:
        loader = st.Loader(opened, source, global_batch=64, targets=["logits", "map"], views=1)
        found = []
        for _ in range(2):
            seconds, count = timed(lambda: sum(1 for _ in loader))
            found.append(count / seconds)
        return found

    source, near = sc.Source(Images(samples)), work / "near"
    shutil.rmtree(near, ignore_errors=True)
    with bucket() as remote:
        sc.push(cache, remote, "v1", private=True, progress=False)
        local = steps(sc.open(cache))
        streamed = steps(sc.stream(remote, "v1", near, keep=size_of(cache)))
    fetched = sum(f.stat().st_size for part in ("targets", "view") for f in (near / part).rglob("c.*"))
    shutil.rmtree(near)
    return {"local": local, "streamed": streamed, "bytes fetched": fetched}


# -- all of it -----------------------------------------------------------------------------------------------


def measure(work: Path, quick: bool) -> dict[str, Any]:
    kept = work / f"results{'-quick' * quick}.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    samples, views = (200, 2) if quick else (10_000, 8)
    cache = work / f"cache{'-quick' * quick}"

    def once(name: str, do: Callable[[], Any]) -> None:
        if name not in found:
            found[name] = do()
            kept.write_text(json.dumps(found, indent=2))

    def through_s3() -> dict[str, Any]:
        with bucket() as remote:
            return travel(cache, remote, work)

    def through_folder() -> dict[str, Any]:
        shutil.rmtree(work / "remote", ignore_errors=True)
        return travel(cache, str(work / "remote"), work)

    def copied() -> dict[str, float]:
        shutil.rmtree(work / "copy", ignore_errors=True)
        try:
            return copy(cache, work / "copy")
        finally:
            shutil.rmtree(work / "copy", ignore_errors=True)

    def built() -> dict[str, Any]:
        build(cache, samples, views)
        return {"samples": samples, "views": views, "bytes": size_of(cache)}

    once("cache", built)
    once("copy", copied)
    once("folder", through_folder)
    once("s3", through_s3)
    once("extend", lambda: grow(cache, samples, views, work))
    once("flips", lambda: flips(work, 100 if quick else 1000))
    once("cuts", lambda: cuts(work, 2 if quick else 1 << 30))
    once("streaming", lambda: streaming(cache, samples, work))
    return found


def tell(found: dict[str, Any]) -> None:
    cache = found["cache"]
    print(f"{cache['samples']:,} samples × {cache['views']} views, {cache['bytes'] / 1e6:,.0f} MB\n")
    print(f"{'':24}{'MB moved':>12}{'seconds':>10}{'MB/s':>10}")
    rows = {"copy, fsync a file": found["copy"]}
    for kind in ("folder", "s3"):
        rows |= {f"{name}, {kind}": row for name, row in found[kind].items()}
    rows["push after extend"] = found["extend"]
    for name, row in rows.items():
        print(f"{name:24}{row['bytes'] / 1e6:12,.1f}{row['seconds']:10,.2f}{row['MB/s']:10,.1f}")
    new, first = found["extend"]["new"], found["extend"]["first push"]
    print(f"\nextend made {new / 1e6:,.1f} MB, after {first / 1e6:,.1f} MB")
    for what in ("flips", "cuts"):
        row = found[what]
        count, right = row[what], row["found and located"]
        print(f"\n{count:,} {what} over {row['files']} files: {right:,} found and located", *row["missed"])
    stream = found["streaming"]
    print("\nsteps a second (first epoch, second of the same view)")
    for name in ("local", "streamed"):
        print(f"{name:24}" + "".join(f"{rate:10,.2f}" for rate in stream[name]))
    print(f"{stream['bytes fetched'] / 1e6:,.1f} MB fetched")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, help="where caches and results are kept; a temporary folder by default"
    )
    parser.add_argument("--quick", action="store_true", help="a few megabytes, a hundred flips")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = measure(work, arguments.quick)
    print(json.dumps(found, indent=2)) if arguments.json else tell(found)


if __name__ == "__main__":
    main()
