"""Does a cache teach as well as a live teacher, and how many views does it need? CIFAR-10, ResNet-8, paired seeds.

    python tools/proof_views.py --data ../shared/data --out runs/proof --jobs 2      # runs what is missing; hours
    python tools/proof_views.py --data ../shared/data --out runs/proof --clock       # times one of each; minutes, alone
    python tools/proof_views.py --data ../shared/data --out runs/proof --tables      # prints what there is

The published CIFAR teachers have memorised their training images, so the transfer set is 8,000 images of the test set,
which they never saw; the other 2,000 are the evaluation set, and where only precision matters 20,000 training images
are, too, which no student has seen. Every student sees every image once an epoch, for equal epochs; arms of one
seed share initial weights and the order of images. Runs are files in --out: stop it and start it again at will.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from proof_tables import plot, tables
from softcache_train import Loader, kd
from softcache_train.loader import normalise
from softcache_train.objectives import cross_entropy
from softcache_train.students import cifar_resnet
from softcache_train.targets import CacheTargets, Dense

import softcache as sc
from softcache.keyed import Permutation
from softcache.recipe import View

EPOCHS, BATCH, LR, WARMUP, WEIGHT_DECAY = 20, 64, 0.05, 1, 5e-4
T, ALPHA = 4.0, 0.9
TRANSFER, SEEDS = 8000, 5
FRESH = EPOCHS  # views: another one in every epoch
SPEC = {"size": (32, 32), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "color": "RGB"}
# networks, whether they see the mirrored image too, views that are cached
TEACHERS = {
    "resnet56": (("resnet56",), False, FRESH),
    "ensemble": (("resnet20", "resnet32", "resnet44", "resnet56"), True, 10),
}


@dataclass(frozen=True)
class Arm:
    """One way to train: where the targets come from, and how many views there are of an image."""

    targets: str
    views: int
    teacher: str = "resnet56"
    epochs: int = EPOCHS

    @property
    def name(self) -> str:
        longer = "" if self.epochs == EPOCHS else f"-{self.epochs}"
        return f"{self.teacher}-{self.targets}-{self.views}{longer}"


def arms(longer: int) -> list[Arm]:
    """In the order in which they are run for each seed; ``longer``: epochs of labels in the time of build and student."""
    main = [Arm("full", 10), Arm("online", FRESH), Arm("labels", FRESH, "none"), Arm("frozen", FRESH)]
    main += [Arm("labels", 1, "none"), Arm("full", 1), Arm("labels", 10, "none"), Arm("topk", 10)]
    main += [Arm("online", 10), Arm("online", 1), Arm("topk", 1), Arm("labels", 4, "none"), Arm("full", 4)]
    main += [Arm("topk", 4), Arm("online", 4), Arm("other", 10), Arm("shuffled", 10)]
    main += [Arm("labels", FRESH, "none", longer), Arm("full", 10, epochs=longer)]
    return [
        *main,
        *(Arm(targets, views, "ensemble") for targets, views in (("full", 10), ("online", 10), ("full", 1))),
    ]


# -- teachers and caches -----------------------------------------------------------------------------------


class Remembering:
    """Networks, their logits averaged, perhaps with the mirrored image's; an answer once given is kept for the pixels.

    So the "online" arms get the live teacher's own float32 numbers, and 5 seeds of them cost one pass of the teacher.
    """

    input_spec = SPEC | {"mean": (0, 0, 0), "std": (1, 1, 1)}

    def __init__(self, data: Path, name: str):
        members, self.mirrored, _ = TEACHERS[name]
        self.weights_digest = blake2b(repr((members, self.mirrored)).encode(), digest_size=32).hexdigest()
        self.networks = [_network(data, member) for member in members]
        self.known: dict[bytes, np.ndarray] = {}

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        keys = [blake2b(row.tobytes(), digest_size=16).digest() for row in pixels]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        if new:
            x = normalise(pixels[new], SPEC)
            shown = (x, x.flip(3)) if self.mirrored else (x,)
            said = torch.stack([network(one) for network in self.networks for one in shown]).mean(0).numpy()
            self.known |= {keys[i]: row for i, row in zip(new, said, strict=True)}
        logits = np.stack([self.known[key] for key in keys])
        return {"logits": logits, "kept": logits}

    def save(self, path: Path) -> None:
        keys = np.frombuffer(b"".join(self.known), np.uint8).reshape(-1, 16)
        np.savez(path, keys=keys, logits=np.stack(list(self.known.values())))

    def load(self, path: Path) -> Remembering:
        with np.load(path) as file:
            self.known = {key.tobytes(): row for key, row in zip(file["keys"], file["logits"], strict=True)}
        return self


def _network(data: Path, name: str) -> torch.nn.Module:
    from safetensors.torch import load_file

    network = getattr(cifar_resnet, name)()
    network.load_state_dict(load_file(data / "weights" / f"cifar10_{name}.safetensors"))
    return network.eval()


def prepare(data: Path, out: Path, name: str) -> None:
    """The caches of a teacher: the views that students see, and the one canonical view for the known mistake."""
    memory = out / f"{name}.npz"
    if memory.exists():
        return
    teacher, source, views = Remembering(data, name), _transfer(data), TEACHERS[name][-1]
    targets = {"logits": "full(u8)", "kept:logits": "topk(3)"}
    began = time.monotonic()
    sc.build(
        out / name,
        source=source,
        teacher=teacher,
        recipe="crop(32, pad=4)|flip",
        views=views,
        seed=0,
        targets=targets,
    )
    seconds = time.monotonic() - began
    sc.build(out / f"{name}-canonical", source=source, teacher=teacher, recipe="identity", targets=targets)
    (out / f"{name}-build.json").write_text(json.dumps({"seconds": seconds, "rows": views * TRANSFER}))
    teacher.save(memory.with_suffix(".partial.npz"))
    memory.with_suffix(".partial.npz").rename(memory)


def _transfer(data: Path) -> sc.Source:
    return sc.Source(data / "cifar10", split="test", limit=TRANSFER)


class Online:
    """The live teacher on the very pixels that the student sees."""

    size = SPEC["size"]
    probed = False

    def __init__(self, teacher: Remembering):
        self.teacher = teacher

    def __call__(self, view: int, samples: np.ndarray, pixels: np.ndarray | None) -> dict[str, Dense]:
        assert pixels is not None
        return {"logits": Dense(torch.from_numpy(self.teacher(pixels)["logits"]))}


class Instead:
    """The cache's targets of other rows than the student sees: ``rows(view, samples)`` → (view, samples)."""

    size = None
    probed = False

    def __init__(self, cache: sc.Cache, rows: Callable[[int, np.ndarray], tuple[int, np.ndarray]]):
        self.targets, self.rows = CacheTargets(cache, ["logits"]), rows

    def __call__(self, view: int, samples: np.ndarray, pixels: np.ndarray | None) -> dict[str, Any]:
        return self.targets(*self.rows(view, samples))


def target_source(arm: Arm, data: Path, out: Path, cache: sc.Cache) -> Any:
    """What teaches in this arm."""
    match arm.targets:
        case "labels":
            return CacheTargets(cache, [])
        case "full":
            return CacheTargets(cache, ["logits"])
        case "topk":
            return CacheTargets(cache, ["kept"])
        case "online":
            return Online(Remembering(data, arm.teacher).load(out / f"{arm.teacher}.npz"))
        case "frozen":
            return Instead(sc.open(out / f"{arm.teacher}-canonical"), lambda view, samples: (0, samples))
        case "other":  # always the same other image, in the same view
            order = Permutation(TRANSFER, "another image").forward(np.arange(TRANSFER))
            other = np.empty(TRANSFER, np.int64)
            other[order] = np.roll(order, 1)
            return Instead(cache, lambda view, samples: (view, other[samples]))
        case "shuffled":  # another image of the batch, another one every time
            return Instead(cache, lambda view, samples: (view, np.roll(samples, 1)))
    raise ValueError(arm.targets)


# -- one run -----------------------------------------------------------------------------------------------


def train(arm: Arm, seed: int, data: Path, out: Path, targets: Any = None) -> dict[str, Any]:
    """Train a student, and measure it. ``targets``: what teaches, if not what the arm says."""
    source = _transfer(data)
    cache = sc.open(out / (arm.teacher if arm.teacher != "none" else "resnet56"))
    loader = Loader(
        cache,
        source,
        global_batch=BATCH,
        seed=seed,
        workers=0,
        views=arm.views,
        input_spec=SPEC,
        target_source=targets or target_source(arm, data, out, cache),
    )
    name = "kept" if arm.targets == "topk" else "logits"
    beside = CacheTargets(cache, ["logits"]) if (arm.targets, seed) == ("online", 0) else None
    torch.manual_seed(seed)
    student = cifar_resnet.resnet8().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        student.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    curve, gaps, began = [], [], time.monotonic()
    for epoch in range(arm.epochs):
        sums, steps = np.zeros(2), len(loader)
        for batch in loader:
            rate = learning_rate(epoch * steps + loader.step - 1, steps, arm.epochs)
            optimizer.param_groups[0]["lr"] = rate
            logits = student(batch.images.contiguous(memory_format=torch.channels_last))
            ce = cross_entropy(logits, batch.labels)
            soft = kd(logits, batch[name], T) if arm.targets != "labels" else 0 * ce
            loss = (1 - ALPHA) * ce + ALPHA * soft if arm.targets != "labels" else ce
            if beside is not None:  # the same step, had it been taken from the cache
                said = beside(batch.view, batch.index)["logits"]
                gaps.append(float(kd(logits.detach(), said, T) / soft.detach()) - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += float(ce.detach()), float(soft.detach())
        curve.append((sums / steps).tolist())
    seconds = time.monotonic() - began
    found = {"arm": arm.name, "seed": seed, "ce_kd": curve, "seconds": seconds, "gaps": gaps}
    return found | {
        f"top1_{k}": accuracy(student, *images) for k, images in evaluation(data, out, source).items()
    }


def clock(data: Path, out: Path) -> None:
    """Seconds of a build of ten views, of a student from it, and of a student with the teacher in every step."""
    source, live = _transfer(data), Remembering(data, "resnet56")
    with tempfile.TemporaryDirectory(dir=out) as folder:
        began = time.monotonic()
        sc.build(
            Path(folder) / "cache",
            source=source,
            teacher=live,
            recipe="crop(32, pad=4)|flip",
            views=10,
            seed=0,
            targets=["logits=full(u8)"],
        )
        found = {"build": time.monotonic() - began}
    live.known.clear()  # every view of an epoch is a new one: it remembers in vain
    arms = {"cache": Arm("full", 10), "online": Arm("online", FRESH), "labels": Arm("labels", FRESH, "none")}
    for name, arm in arms.items():
        found[name] = train(arm, SEEDS, data, out, Online(live) if name == "online" else None)["seconds"]
    (out / "clock.json").write_text(json.dumps(found))


def learning_rate(step: int, steps: int, epochs: int) -> float:
    warmup, total = WARMUP * steps, epochs * steps
    if step < warmup:
        return LR * (step + 1) / (warmup + 1)
    return LR * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def evaluation(data: Path, out: Path, transfer: sc.Source) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``test``: the 2,000 test images outside the transfer set. ``train``: 20,000 training images."""
    kept = out / "evaluation.npz"
    if not kept.exists():
        found = {}
        known = set(transfer.ids)
        for split, count in (("test", 2000), ("train", 20_000)):
            source = sc.Source(data / "cifar10", split=split, limit=None if split == "test" else count)
            index = [i for i, id in enumerate(source.ids) if split == "train" or id not in known]
            assert len(index) == count
            whole = View(0, 0, 32, 32, 32, 32, flip=False)
            found[split] = np.stack([sc.render(source.image(i), whole, (32, 32)) for i in index])
            found[f"{split}_labels"] = source.labels[index]
        partial = out / f"evaluation-{os.getpid()}.npz"
        np.savez(partial, **found)
        partial.rename(kept)
    with np.load(kept) as file:
        return {split: (file[split], file[f"{split}_labels"]) for split in ("test", "train")}


@torch.inference_mode()
def accuracy(student: torch.nn.Module, pixels: np.ndarray, labels: np.ndarray) -> float:
    student.eval()
    parts = [pixels[i : i + 500] for i in range(0, len(pixels), 500)]
    found = [
        student(normalise(p, SPEC).contiguous(memory_format=torch.channels_last)).argmax(1) for p in parts
    ]
    student.train()
    return float((torch.cat(found).numpy() == labels).mean())


# -- all of them -------------------------------------------------------------------------------------------


def work(data: Path, out: Path, only: str | None) -> None:
    """Run what nobody has run or is running. A claim dies with its process."""
    import fcntl

    torch.set_num_threads(1)
    for seed in range(SEEDS):
        for arm in arms(_longer(out)):
            if only is not None and arm.teacher not in (only, "none"):
                continue
            result = out / "runs" / f"{arm.name}-{seed}.json"
            with result.with_suffix(".claim").open("w") as claim:
                try:
                    fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if result.exists():
                    continue
                found = train(arm, seed, data, out)
                result.with_suffix(".partial").write_text(json.dumps(found))
                result.with_suffix(".partial").rename(result)
                print(
                    f"{arm.name} seed {seed}: {found['top1_test']:.2%} in {found['seconds']:,.0f} s",
                    flush=True,
                )


def _longer(out: Path) -> int:
    """Epochs of labels alone in the time that building ten views and training once from them takes, on a machine that
    builds 820 rows and trains 2,400 a second (docs/benchmarks.md)."""
    return EPOCHS + round(10 * TRANSFER / 820 / (TRANSFER / 2400))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder with cifar10/ and weights/")
    parser.add_argument("--out", type=Path, required=True, help="caches and results, kept")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--only", choices=TEACHERS, help="the arms of one teacher")
    parser.add_argument("--tables", action="store_true", help="print what there is, and run nothing")
    parser.add_argument("--clock", action="store_true", help="time a build and a student of each kind")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    (out / "runs").mkdir(parents=True, exist_ok=True)
    if arguments.clock:
        clock(data, out)
    elif arguments.worker:
        work(data, out, arguments.only)
    elif not arguments.tables:
        for name in TEACHERS if arguments.only is None else [arguments.only]:
            prepare(data, out, name)
        command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
        workers = [subprocess.Popen(command) for _ in range(arguments.jobs)]
        if sum(worker.wait() for worker in workers):
            return 1
    tables(out, FRESH, _longer(out))
    if arguments.plot:
        plot(out, arguments.plot, FRESH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
