"""Which response methods carry a class that no image showed: the demo's digits, every 3 left out, one method a row.

    .venv/bin/python tools/omit_class.py [--seeds 5] [--epochs 160] [-o runs/omit_class] [--json]

The teacher knows ten digits, its cache is built once, and students learn from it without a 3 (Hinton et al. 2015, §3). The
output for 3 is then shifted by a δ chosen on a validation split, as in `softcache-train demo`, whose parts these are. Prints
the accuracy on the 3s, and on all digits, before and after the shift: means over the seeds, and the range of the 3s. Δ is by
how many points the 3s as trained, and all digits after the shift, differ from those of kd at T = 8, in pairs, with
Student's 95 % interval. Ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import numpy as np
import softcache_train as st
import torch
from paired import told
from safetensors.torch import save_file
from softcache_train import demo
from softcache_train.commands import say, softcache
from softcache_train.demo_score import THREE, Judge, Score
from softcache_train.loader import Batch
from softcache_train.objectives import cross_entropy, dist, dkd, hard, kd, logits_mse, probs_mse
from torch import Tensor

import softcache as sc

Loss = Callable[[Tensor, Batch], Tensor]
BASE = "kd, T=8"
METHODS: dict[str, Loss] = {
    "ce (labels)": lambda z, batch: cross_entropy(z, batch.labels),
    "hard": lambda z, batch: hard(z, batch["logits"]),
    "kd, T=1": lambda z, batch: kd(z, batch["logits"], T=1),
    "kd, T=4": lambda z, batch: kd(z, batch["logits"], T=4),
    "kd, T=8": lambda z, batch: kd(z, batch["logits"], T=8),
    "kd, T=20": lambda z, batch: kd(z, batch["logits"], T=20),
    "logits_mse": lambda z, batch: logits_mse(z, batch["logits"]),
    "probs_mse, T=8": lambda z, batch: probs_mse(z, batch["logits"], T=8),
    "dkd, T=8": lambda z, batch: dkd(z, batch["logits"], labels=batch.labels, T=8),
    "dist, T=4": lambda z, batch: dist(z, batch["logits"], T=4),
}


def built(out: Path) -> tuple[sc.Cache, Judge]:
    """The demo's cache, or what is there of it, and its judge of students."""
    if not (out / "digits").is_dir():
        demo.write_digits(out / "digits")
    train, val, test = (sc.Source(out / "digits", split=split) for split in demo.SPLITS)
    teacher = demo.train_teacher(train)
    save_file(teacher.state_dict(), out / "teacher.safetensors")
    softcache(
        *("build", "--source", out / "digits", "--split", "train"),
        *("--teacher", f"softcache_train.students:{demo.TEACHER}", "--weights", out / "teacher.safetensors"),
        *(
            "--recipe",
            demo.RECIPE,
            "--views",
            demo.VIEWS,
            "--target",
            "logits=full(f16)",
            "-o",
            out / "cache",
        ),
    )
    return sc.open(out / "cache"), Judge.of(teacher, val, test)


def scores(out: Path, seeds: int, epochs: int) -> dict[str, list[Score]]:
    cache, judge = built(out)
    train = sc.Source(out / "digits", split="train")
    samples = np.flatnonzero(train.labels != THREE)
    found: dict[str, list[Score]] = {}
    for name, loss in METHODS.items():
        for seed in range(seeds):
            loader = st.Loader(cache, train, samples=samples, global_batch=demo.BATCH, seed=seed, workers=0)
            student, _ = demo.train_student(loader, seed, epochs, loss)
            found.setdefault(name, []).append(judge(student))
            say(f"  {name}, seed {seed}: {found[name][-1].shifted_threes:.1%} of the 3s")
    return found


def table(found: dict[str, list[Score]]) -> str:
    lines = [
        "| method | 3s, as trained | 3s, shifted | range | all, as trained | all, shifted | δ | Δ of the 3s | Δ of all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, of in found.items():
        shown = [f"{100 * mean(values):.1f} %" for values in _columns(of)]
        threes = [100 * s.shifted_threes for s in of]
        gained = [
            "–" if name == BASE else told([100 * (a - b) for a, b in zip(own, base, strict=True)])
            for own, base in list(zip(_columns(of), _columns(found[BASE]), strict=True))[::3]
        ]
        lines.append(
            f"| {name} | {shown[0]} | {shown[1]} | {min(threes):.0f} to {max(threes):.0f} | {shown[2]} | {shown[3]} | "
            f"{mean(s.shift for s in of):.2f} | {gained[0]} | {gained[1]} |"
        )
    return "\n".join(lines)


def _columns(of: list[Score]) -> list[list[float]]:
    return [
        [s.threes for s in of],
        [s.shifted_threes for s in of],
        [s.overall for s in of],
        [s.shifted_overall for s in of],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/omit_class"))
    parser.add_argument("--seeds", type=int, default=demo.SEEDS)
    parser.add_argument("--epochs", type=int, default=demo.EPOCHS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = scores(options.out, options.seeds, options.epochs)
    if options.json:
        print(json.dumps({name: [asdict(s) for s in of] for name, of in found.items()}, indent=2))
    print(table(found), file=sys.stderr if options.json else sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
