"""Walk docs/quickstart.md: save its files, run its commands in order, and write what they print into the page.

    .venv/bin/python tools/quickstart.py data/cifar10     # the Parquet files that the page's images are taken from

`tests/test_quickstart.py` takes the same walk, and compares.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "quickstart.md"
CLASSES = {1: "automobile", 6: "frog", 8: "ship"}  # of CIFAR-10
IMAGES = {"train": ("train-00000-of-00005.parquet", 100), "test": ("test-00000-of-00001.parquet", 50)}
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """The commands of one block, what the page says they print, and what they printed."""

    commands: str
    quoted: str
    printed: str


def export_photos(cifar: Path, photos: Path) -> None:
    """The first images of three classes, as PNG files in ``photos/{train,test}/CLASS/``."""
    import pyarrow.parquet as pq
    from PIL import Image

    for split, (file, count) in IMAGES.items():
        taken: Counter[int] = Counter()
        for row in pq.read_table(cifar / file).slice(0, 3000).to_pylist():
            label = row["label"]
            if label in CLASSES and taken[label] < count:
                out = photos / split / CLASSES[label] / f"{taken[label]:04d}.png"
                out.parent.mkdir(parents=True, exist_ok=True)
                Image.open(io.BytesIO(row["img"]["bytes"])).save(out)
                taken[label] += 1


def walk(page: str, folder: Path) -> Iterator[Step]:
    """Save every file of the page and run every block of commands, in order, in ``folder``.

    Raises :class:`RuntimeError` with what was printed when a command fails.
    """
    fences = [(found[1], found[2]) for found in _FENCE.finditer(page)] + [("", "")]
    environment = _environment(folder)
    for (language, text), (after, printed) in pairwise(fences):
        if language in ("python", "yaml"):
            name = text.splitlines()[0].removeprefix("# ")
            (folder / name).write_text(text)
        elif language == "bash":
            yield Step(text, printed if after == "text" else "", _run(text, folder, environment))


def _run(commands: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(f"{commands}exited with {done.returncode}:\n{done.stdout}")
    return done.stdout


def _environment(folder: Path) -> dict[str, str]:
    """The commands as an installation would put them on the PATH, running this working tree with this Python."""
    commands = folder / ".bin"
    commands.mkdir()
    calls = {"python": ""}
    for project in (ROOT, ROOT / "train"):
        for name, target in tomllib.loads((project / "pyproject.toml").read_text())["project"][
            "scripts"
        ].items():
            module, _, function = target.partition(":")
            calls[name] = shlex.join(
                ["-c", f"import sys; from {module} import {function}; sys.exit({function}())"]
            )
    for name, call in calls.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {call} "$@"\n')
        (commands / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'train'}",
        "OMP_NUM_THREADS": "1",
    }


def masked(text: str) -> list[str]:
    """The lines of an output without what differs from run to run: numbers, digests, units, spaces, verdicts."""
    text = re.sub(r"\b[0-9a-f]{16,}\b|[-+]?\d[\d.,:%]*(e-?\d+)?%?", "#", text)
    text = re.sub(r"# (bytes|kB|MB|GB|TB|h)\b", "# u", text)
    text = re.sub(r"the limit was \w+", "the limit was #", text)
    text = re.sub(r"caching (pays|DOES NOT PAY): # times as (fast|long)", "caching #", text)
    text = re.sub(rf": ({'|'.join(CLASSES.values())}) \(", ": # (", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def shortened(text: str) -> str:
    """Without the live line and the epochs in the middle."""
    lines = [line for line in text.rstrip().splitlines() if "left · the limit is" not in line]
    epochs = [i for i, line in enumerate(lines) if line.startswith("epoch ")]
    if len(epochs) > 4:
        lines[epochs[1] + 1 : epochs[-1]] = ["…"]
    return "".join(line + "\n" for line in lines)


def main(cifar: Path) -> None:
    page = PAGE.read_text()
    with tempfile.TemporaryDirectory() as name:
        export_photos(cifar, Path(name) / "photos")
        for step in walk(page, Path(name)):
            print(f"$ {step.commands}{step.printed}")
            old = f"```bash\n{step.commands}```\n\n```text\n{step.quoted}```"
            new = f"```bash\n{step.commands}```\n\n```text\n{shortened(step.printed)}```"
            page = page.replace(old, new)
    PAGE.write_text(page)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
