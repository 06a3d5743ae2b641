"""``softcache-train demo``: a student that never saw a 3 learns it from what a teacher said of other digits.

Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", §3, on scikit-learn's digits: no
network, no accelerator. The teacher knows all ten digits. It speaks once, into a cache; then students are
trained from the cache with every 3 left out, and meet their first 3 in the test. Their output for 3, which
hardly anything ever pushed up, is shifted by a δ that is chosen on a validation split.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import softcache as sc
import softcache_train as st
from softcache.errors import SpecError
from softcache.keyed import Permutation
from softcache_train import students
from softcache_train.commands import say, softcache
from softcache_train.cost import cost
from softcache_train.demo_report import closing, draw, require_matplotlib, table
from softcache_train.demo_score import THREE, Found, Judge
from softcache_train.loader import Batch, normalise, stack_views
from softcache_train.objectives import cross_entropy
from softcache_train.students.digits import INPUT_SPEC

SPLITS = {"train": 900, "val": 360, "test": 537}
TEACHER, STUDENT = "digits_cnn", "digits_mlp"
RECIPE, VIEWS = "crop(8, pad=1)", 8
T = 8.0
BATCH, TEACHER_EPOCHS, EPOCHS, SEEDS = 64, 40, 160, 5
TIMED = 200  # images

Loss = Callable[[Tensor, Batch], Tensor]
LOSSES: dict[str, Loss] = {
    "hard labels": lambda logits, batch: cross_entropy(logits, batch.labels),
    "cache": lambda logits, batch: st.kd(logits, batch["logits"], T=T),
}

CONFIG = f"""\
# A student of the demo's cache, from all ten digits.
student: {STUDENT}
epochs: 40
global_batch: {BATCH}
optimizer: adamw
lr: 0.002
weight_decay: 0
T: {T}
alpha: 1
val_split: val
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message}; see softcache-train demo --help")


def main(argv: Sequence[str]) -> int:
    """The command. Progress on stderr; on stdout the table, or with ``--json`` the measurements."""
    parser = _Parser("softcache-train demo", description="A student that never saw a 3, taught by a cache.")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"students a kind ({SEEDS})")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"of a student ({EPOCHS})")
    parser.add_argument("--json", action="store_true", help="the measurements as JSON on stdout")
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.epochs < 1:
        raise SpecError("--seeds and --epochs are at least 1")
    with _one_thread():
        found = run(options.out, options.seeds, options.epochs)
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
    print(f"\n{table(found)}\n\n{closing(found)}", file=sys.stderr if options.json else sys.stdout)
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks as small as these lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(out: Path, seeds: int, epochs: int) -> Found:
    """Everything, in order: digits, teacher, cache, students, measurements, picture."""
    began = time.perf_counter()
    _check(out)
    write_digits(out / "digits")
    train, val, test = (sc.Source(out / "digits", split=split) for split in SPLITS)
    teacher, spec = train_teacher(train), f"softcache_train.students:{TEACHER}"
    save_file(teacher.state_dict(), out / "teacher.safetensors")

    softcache(
        *("build", "--source", out / "digits", "--split", "train"),
        *("--teacher", spec, "--weights", out / "teacher.safetensors"),
        *("--recipe", RECIPE, "--views", VIEWS, "--target", "logits=full(f16)", "-o", out / "cache"),
    )
    softcache("verify", out / "cache", "--read-data")

    cache = sc.open(out / "cache")
    samples = np.flatnonzero(train.labels != THREE)  # cache.ids are the source's, in order
    say(f"\nstudents: of the cache's {cache.samples} digits they see the {len(samples)} that are no 3")
    judge, scores, shown = Judge.of(teacher, val, test), {}, np.zeros(10, np.int64)
    for kind in LOSSES:
        scores[kind] = []
        for seed in range(seeds):
            loader = st.Loader(cache, train, samples=samples, global_batch=BATCH, seed=seed, workers=0)
            student, seen = train_student(loader, seed, epochs, LOSSES[kind])
            score = judge(student)
            say(
                f"  from {kind}, seed {seed}: {score.threes:.1%} of the 3s, {score.shifted_threes:.1%} shifted"
            )
            scores[kind].append(score)
            shown += seen

    (out / "student.yaml").write_text(CONFIG)
    found = Found(
        out=out,
        cache=cache,
        teacher_spec=spec,
        T=T,
        hard=scores["hard labels"],
        soft=scores["cache"],
        teacher=judge.of_teacher,
        student_cost=cost(students.make(STUDENT, 10), judge.test[0][:TIMED]),
        teacher_cost=cost(teacher, judge.test[0][:TIMED]),
        shown=shown,
        test=np.bincount(test.labels, minlength=10),
        seconds=time.perf_counter() - began,
    )
    draw(found, train, samples)
    return found


def _check(out: Path) -> None:
    """Refuse what cannot end well, before anything is written."""
    if out.exists() and not (out / "digits").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(f"{out} holds something that is not this demo; give another folder with -o")
    require_matplotlib()


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 handwritten digits as an ImageFolder: 8 × 8 grey PNGs, in three splits."""
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise SpecError(
            f"the demo's digits come with scikit-learn: pip install 'softcache-train[demo]' ({e})"
        ) from e
    digits: Any = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # from 0…16
    say(f"digits: {len(pixels):,} handwritten ones that come with scikit-learn, written to {folder}")
    shuffled = iter(Permutation(len(pixels), "demo").inverse(np.arange(len(pixels))).tolist())
    for split, count in SPLITS.items():
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True, exist_ok=True)
        for _, i in zip(range(count), shuffled, strict=False):
            Image.fromarray(pixels[i]).save(folder / split / str(digits.target[i]) / f"{i:04d}.png")


def train_teacher(source: sc.Source) -> nn.Module:
    """A small convolutional network, trained on all ten digits in ever new views."""
    say(f"teacher: {TEACHER}, {TEACHER_EPOCHS} epochs on the {len(source)} digits of the train split, 3s too")
    torch.manual_seed(0)
    teacher = students.make(TEACHER, 10)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEACHER_EPOCHS)
    pixels, labels = [source.image(i) for i in range(len(source))], torch.from_numpy(source.labels)
    recipe = sc.Recipe(RECIPE, seed=1)  # the cache has another seed, so its views are new to the teacher
    for epoch in range(TEACHER_EPOCHS):
        views = [recipe.view(id, epoch, 8, 8) for id in source.ids]
        images = normalise(stack_views(pixels, views, (8, 8)), INPUT_SPEC)
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = cross_entropy(teacher(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return teacher.eval()


def train_student(loader: st.Loader, seed: int, epochs: int, loss_of: Loss) -> tuple[nn.Module, np.ndarray]:
    """A student of what ``loss_of`` its logits and a batch says, from the same views in the same order.

    Also how many images of each digit it was shown, int64 (10,).
    """
    torch.manual_seed(seed)
    student = students.make(STUDENT, 10)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    shown = np.zeros(10, np.int64)
    for _ in range(epochs):
        for batch in loader:
            loss = loss_of(student(batch.images), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            shown += np.bincount(batch.labels.numpy(), minlength=10)
    return student.eval(), shown
