"""A cache travels to a machine without a teacher: does a student learn there what it learns here, to the last digit?

    python tools/share_roundtrip.py [--data ../shared/data] [--images 2000] [--json]

build-cache (ResNet-56 on CIFAR-10's test images: four views, logits and a feature map), softcache push to moto's S3 server
on 127.0.0.1, softcache pull --targets logits into an empty folder, the server stopped, softcache verify --read-data, and
softcache-train there; beside it the same training from the cache that was built. Every command is a process of its own,
and from the pull on no library of teachers can be imported in it; in training not even softcache.teachers. Exit status 1
when losses, top-1 or weights are not the same.

Students are trained on one thread of the CPU: on several, or on an accelerator, two runs need not come out alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench_share import bucket, size_of

from softcache.pulled import FILE as PULLED

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "train" / "configs" / "cifar10_resnet8_kd.yaml"
SPLIT, VIEWS, EPOCHS = "test", 4, 3
LIBRARIES = ("torchvision", "timm", "ultralytics", "transformers", "onnxruntime")
TEACHERS = (*LIBRARIES, "softcache.teachers")
COMMANDS = {
    "build-cache": "from softcache.cli import build_cache as main",
    "softcache": "from softcache.cli import main",
    "softcache-train": "from softcache_train.cli import main",
}
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'train'}",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def command(words: Sequence[object], gone: Sequence[str] = ()) -> str:
    """Run one in a process of its own, where the modules that are ``gone`` are as if not installed; what it printed.

    Raises :class:`SystemExit` with what it said when it fails.
    """
    name, *arguments = map(str, words)
    code = f"import sys; sys.modules.update(dict.fromkeys({gone!r})); {COMMANDS[name]}; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join([name, *arguments])}\nexited with {done.returncode}:\n{done.stderr}")
    return done.stdout


def roundtrip(work: Path, data: Path, images: int) -> dict[str, Any]:
    """All of it, in ``work``: the cache is built in ``here/`` and pulled into ``there/``."""
    here, there, steps = work / "here", work / "there", []

    def step(name: str, do: Callable[[], int | None]) -> None:
        start = time.perf_counter()
        moved = do()
        steps.append({"step": name, "bytes": moved, "seconds": time.perf_counter() - start})

    def build() -> None:
        build = ["build-cache", "--source", data / "cifar10", "--split", SPLIT, "--limit", images]
        build += ["--teacher", "softcache_train.students:resnet56"]
        build += ["--weights", data / "weights" / "cifar10_resnet56.safetensors"]
        build += ["--recipe", "crop(32, pad=4)|flip", "--views", VIEWS, "--block-rows", 512]
        build += ["--target", "logits=full(u8)", "--target", "layer3=int8", "-o", here / "cache"]
        command(build)

    def push() -> int:
        said = command(["softcache", "push", here / "cache", remote, "v1", "--private", "--json"])
        return json.loads(said)["bytes"]

    def pull() -> int:
        out = there / "cache"
        command(["softcache", "pull", remote, "v1", "-o", out, "--targets", "logits"], LIBRARIES)
        return size_of(out) - (out / PULLED).stat().st_size  # the only file that did not come

    def verify() -> None:
        command(["softcache", "verify", there / "cache", "--read-data"], LIBRARIES)

    def train(folder: Path) -> None:
        train = ["softcache-train", CONFIG, "--cache", folder / "cache", "--source", data / "cifar10"]
        command([*train, "--set", f"epochs={EPOCHS}", "val_limit=500", "-o", folder / "student"], TEACHERS)

    step("build-cache", build)
    with bucket() as remote:
        step("push", push)
        step("pull --targets logits", pull)
    step("verify --read-data", verify)
    step("train, what was pulled", lambda: train(there))
    step("train, what was built", lambda: train(here))
    built, pulled = learned(here / "student"), learned(there / "student")
    return {
        "images": images,
        "views": VIEWS,
        "bytes": size_of(here / "cache"),
        "steps": steps,
        "built": built,
        "pulled": pulled,
        "equal": built == pulled,
    }


def learned(student: Path) -> dict[str, Any]:
    """How a run went: its losses and top-1, and the sha256 of the weights it ended with."""
    run = json.loads((student / "checkpoint.json").read_text())
    curve = [{name: epoch[name] for name in ("loss", "ce", "kd", "top1")} for epoch in run["history"]]
    return {"curve": curve, "weights": run["files"]["model"]["sha256"]}


def tell(found: dict[str, Any]) -> None:
    print(f"{found['images']:,} images × {found['views']} views, a cache of {found['bytes']:,} bytes\n")
    print(f"{'step':24}{'bytes moved':>12}{'seconds':>9}")
    for step in found["steps"]:
        moved = "" if step["bytes"] is None else f"{step['bytes']:,}"
        print(f"{step['step']:24}{moved:>12}{step['seconds']:9.1f}")
    built, pulled = found["built"], found["pulled"]
    print(f"\n{'epoch':>5}  {'loss, from what was built':28}{'from what was pulled':28}")
    for i, (one, other) in enumerate(zip(built["curve"], pulled["curve"], strict=True), 1):
        print(f"{i:5}  {one['loss']!r:28}{other['loss']!r:28}{'equal' if one == other else 'NOT EQUAL'}")
    same = "equal" if built["weights"] == pulled["weights"] else "NOT EQUAL"
    print(f"\nweights  {built['weights'][:16]}…  {pulled['weights'][:16]}…  {same}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 where both students are the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="at least 64: a batch")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    if not (arguments.data / "cifar10").is_dir():
        parser.exit(
            1, f"no CIFAR-10 in {arguments.data}: give the folder with cifar10/ and weights/ as --data\n"
        )
    with TemporaryDirectory() as work:
        found = roundtrip(Path(work), arguments.data, arguments.images)
    print(json.dumps(found, indent=2)) if arguments.json else tell(found)
    return 0 if found["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
