"""What tools share that tell ways to train apart: caches, and students of the same seeds, made where they are not there yet.

Images are CIFAR-10's. The transfer set is of test images, which the published teachers never saw; students are measured on
training images, which no student saw, and on test images outside every transfer set. Students of one seed share initial
weights and batches, so that gains are paired; intervals are Student's, 95 %. Everything lies in ``--out``: stop a tool
and start it again at will.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from proof_views import TRANSFER, accuracy, evaluation
from softcache_train import students, train
from softcache_train.checkpoint import load_student
from softcache_train.compare import interval
from softcache_train.config import check
from torch import nn

import softcache as sc
from softcache.recipe import View

RECIPE = "crop(32, pad=4)|flip"
STUDENT = {
    "student": "resnet8",
    "global_batch": 64,
    "lr": 0.05,
    "warmup_epochs": 1,
    "workers": 0,
    "val_limit": 100,
}
HALF = {"student": "paired:small"}
CE, KD = {"ce": {"weight": 0.1}}, {"kd": {"weight": 0.9, "T": 4}}

Scores = dict[int, float]  # top-1 on the training images, by seed, in 0…1


@dataclass(frozen=True)
class Scale:
    """How much is done; ``held_out`` are the training images that students are measured on."""

    images: int
    views: int
    epochs: int
    seeds: int = 3
    held_out: int = 10_000


@dataclass(frozen=True)
class Bench:
    """``data`` has cifar10/ and weights/; ``out`` is kept."""

    data: Path
    out: Path
    scale: Scale

    def source(self, limit: int | None = None) -> sc.Source:
        return sc.Source(self.data / "cifar10", split="test", limit=limit)

    def cache(
        self, name: str, targets: Mapping[str, str], network: str = "resnet56", weights: Path | None = None
    ) -> sc.Cache:
        """What a network, by default with its published weights, says of the transfer set."""
        said = self.out / "caches" / slug(name)
        return sc.build(
            said,
            source=self.source(self.scale.images),
            teacher=f"softcache_train.students:{network}",
            weights=weights or self.data / "weights" / f"cifar10_{network}.safetensors",
            recipe=RECIPE,
            views=self.scale.views,
            targets=targets,
            progress=not (said / "softcache.json").exists(),
        )

    def run(self, name: str, cache: sc.Cache, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """A student: its ``top1``, see :meth:`measured`, and its ``model``."""
        folder = self.out / "runs" / slug(name) / str(seed)
        note = folder / "found.json"
        if not note.exists():
            config = check(
                {**STUDENT, "epochs": self.scale.epochs, **options, "seed": seed, "out": str(folder)}
            )
            result = train(config, cache, self.source())
            top1 = self.measured(load_student(folder))
            found = {"arm": name, "seed": seed, "top1": top1, "model": result.model}
            note.with_suffix(".partial").write_text(json.dumps(found))
            note.with_suffix(".partial").rename(note)
            print(f"{name}, seed {seed}: {top1['train']:.2%}", file=sys.stderr, flush=True)
        return json.loads(note.read_text())

    def runs(self, arms: Mapping[str, tuple[sc.Cache, Mapping[str, Any]]]) -> dict[str, Scores]:
        """Every arm, a cache and the options of a config, with every seed: seed after seed, so that what is broken off is
        of pairs."""
        found: dict[str, Scores] = {name: {} for name in arms}
        for seed in range(self.scale.seeds):
            for name, (cache, options) in arms.items():
                found[name][seed] = self.run(name, cache, seed, options)["top1"]["train"]
        return found

    def measured(self, network: nn.Module) -> dict[str, float]:
        """Its top-1 on the ``train`` images and on the ``test`` images outside the transfer sets, whole."""
        spec: Any = network.input_spec
        whole, size = View(0, 0, 32, 32, 32, 32, flip=False), tuple(spec["size"])
        found = {}
        for on, (pixels, labels) in self.held_out.items():
            seen = np.stack([sc.render(image, whole, size) for image in pixels[: self.scale.held_out]])
            found[on] = accuracy(network, seen, labels[: self.scale.held_out])
        return found

    @cached_property
    def held_out(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Pixels and labels of either set."""
        return evaluation(self.data, self.out, self.source(TRANSFER))


def small(num_classes: int) -> nn.Module:
    """ResNet-8 that sees half as many pixels a side: four times faster to train."""
    network = students.resnet8(num_classes)
    network.input_spec = network.input_spec | {"size": [16, 16]}  # pyright: ignore[reportAttributeAccessIssue]
    return network


def slug(name: str) -> str:
    """A name as a folder has it: ``kd + alignment`` → ``kd-alignment``."""
    return "-".join(re.findall(r"[\w.]+", name))


# -- told --------------------------------------------------------------------------------------------------


def told(values: Sequence[float]) -> str:
    """Points, as ``+0.31 ± 0.52``: mean, and half of the 95 % interval, where there are several."""
    half = interval(values)
    mean = f"{statistics.mean(values):+.2f}".replace("-", "−")
    return mean if half is None else f"{mean} ± {half:.2f}"


def gains(found: Mapping[str, Scores], better: Sequence[str], worse: Sequence[str]) -> list[float]:
    """By how many points the mean of the arms ``better`` is above that of ``worse``, of every seed that all have."""
    seeds = sorted(set.intersection(*(set(found[name]) for name in (*better, *worse))))

    def mean(names: Sequence[str], seed: int) -> float:
        return statistics.mean(found[name][seed] for name in names)

    return [100 * (mean(better, seed) - mean(worse, seed)) for seed in seeds]


def table(
    found: Mapping[str, Scores], beside: Mapping[str, Sequence[str]] | None = None, heads: Sequence[str] = ()
) -> str:
    """A row an arm: top-1 with its standard deviation over seeds, and what it gains over the first. ``beside``: more
    cells of each, under ``heads``."""
    first = next(iter(found))
    lines = [["", "top-1, %", f"gain over {first}, points", *heads]]
    for name, scores in found.items():
        values = [100 * one for one in scores.values()]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        gain = "–" if name == first else told(gains(found, [name], [first]))
        lines.append([name, f"{statistics.mean(values):.2f}{spread}", gain, *((beside or {}).get(name, ()))])
    return _markdown(lines)


def differences(found: Mapping[str, Scores], pairs: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> str:
    """A row a comparison of arms: the ones, and those that they are compared with."""
    lines = [["", "points", "seeds"]]
    for title, (better, worse) in pairs.items():
        values = gains(found, better, worse)
        lines.append([title, told(values), str(len(values))])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ([*line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


def main(
    doc: str | None, full: Scale, quick: Scale, work: Callable[[Bench], tuple[str, dict[str, Any]]]
) -> int:
    """The command line of a tool. ``work`` makes what is missing; what it returns is printed, and kept as JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with cifar10/ and weights/")
    parser.add_argument("--out", type=Path, required=True, help="caches, students and results, kept")
    parser.add_argument(
        "--quick", action="store_true", help="that it works: a few images, one epoch; no figures"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="top-1 of every student")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    text, found = work(Bench(options.data, options.out.resolve(), quick if options.quick else full))
    print(text)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0
