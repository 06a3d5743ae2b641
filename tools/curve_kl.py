"""What does distortion of the targets cost the student? Accuracy against KL, CIFAR-10, ResNet-8, paired seeds.

    python tools/curve_kl.py --data ../shared/data --out runs/curve                  # runs what is missing; hours
    python tools/curve_kl.py --data ../shared/data --out runs/curve --tables --plot docs/curve_kl.png --json curve.json
    python tools/curve_kl.py --data ../shared/data --out runs/quick --quick          # that it works; under two minutes

One cache holds the same answers of one teacher once for every arm: as codecs keep them, and, labelled as such, spoiled
by hand where codecs leave gaps: ``noise`` (Gaussian, on the logits, another one for every view) and ``scaled`` (flattened
alike for all rows, which is a bias and no noise). Images, teachers and evaluation sets are those of
tools/proof_views.py. The loss is KD alone (alpha = 1): labels would mend what the targets lost. Students of one seed share
initial weights and batches, see every view once, and see it at half the teacher's resolution, which is four times faster.
Runs are files in --out: stop it and start it again at will; an ``ensemble.npz`` of proof_views.py there spares the teacher.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curve_tables import plot, tables
from proof_views import BATCH, LR, SPEC, TRANSFER, WEIGHT_DECAY, Remembering, evaluation, learning_rate
from softcache_train import Loader, kd
from softcache_train.loader import normalise
from softcache_train.students import cifar_resnet
from softcache_train.targets import CacheTargets

import softcache as sc
from softcache.codecs import HardLabels, SampledLogits
from softcache.recipe import View
from softcache.targets import Logits

T, SIZE = 4.0, (16, 16)


@dataclass(frozen=True)
class Scale:
    """How much is done: images of the transfer set, views and epochs (one each), images that are held out, at most."""

    images: int = TRANSFER
    views: int = 5
    held_out: int = 20_000
    teacher: str = "ensemble"


QUICK = Scale(256, 2, 500, "resnet56")


@dataclass(frozen=True)
class Arm:
    """One way to keep the teacher's logits: a codec, after ``noise`` of that deviation and a factor."""

    name: str
    codec: str
    noise: float = 0
    scale: float = 1

    @property
    def family(self) -> str:
        if self.noise or self.scale != 1:
            return "noise" if self.noise else "scaled"
        return {"sample": "draws", "argmax": "class only"}.get(self.codec.partition("(")[0], "codecs")


REFERENCE = "full-f16"
CODECS = ("full(f16)", "full(u8)", "topk(5)", "topk(3)", "topk(1)", "sample(1, T=4)", "argmax")
SPOILED = (("noise", 1.0), ("noise", 3.0), ("noise", 6.0), ("scale", 0.5), ("scale", 0.25))
MORE = (
    *("packed(14)", "packed(12)", "sample(10, T=4)"),
    *("topk(1, tail=spread)", "packed(9)", "topk(2)", "topk(2, tail=spread)"),
)


def arms(codecs: tuple[str, ...] = CODECS + MORE) -> list[Arm]:
    spoiled = [Arm(f"{how}-{much:g}", "full(f16)", **{how: much}) for how, much in SPOILED]
    return [Arm(_plain(codec), codec) for codec in codecs] + spoiled


def _plain(codec: str) -> str:
    """``topk(2, tail=spread)`` → ``topk-2-spread``: a target's name."""
    words = codec.replace("(", " ").replace(")", " ").replace(",", " ").replace("tail=", "").split()
    return "-".join(word for word in words if not word.startswith("T="))


# -- the cache ---------------------------------------------------------------------------------------------


class Spoiling:
    """The teacher, and its answers as each arm spoils them before its codec. Noise follows from the answer itself."""

    def __init__(self, teacher: Any):
        self.teacher, self.input_spec = teacher, teacher.input_spec
        said = repr((teacher.weights_digest, arms())).encode()
        self.weights_digest = blake2b(said, digest_size=32).hexdigest()

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        logits = self.teacher(pixels)["logits"]
        noise = np.stack([_noise(row) for row in logits])
        return {arm.name: (arm.scale * logits + arm.noise * noise).astype(np.float32) for arm in arms()}


def _noise(row: np.ndarray) -> np.ndarray:
    seed = int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(len(row))


def prepare(out: Path, transfer: sc.Source, teacher: Any, views: int) -> sc.Cache:
    """The cache of all arms, built once."""
    return sc.build(
        out / "cache",
        source=transfer,
        teacher=Spoiling(teacher),
        recipe="crop(32, pad=4)|flip",
        views=views,
        seed=0,
        targets={f"{arm.name}:logits": arm.codec for arm in arms()},
    )


def distortion(cache: sc.Cache, arm: Arm) -> dict[str, Any]:
    """Means over all rows: KL in nats at T = 1 and at the T of training, ‖p̂ − p‖ / ‖p‖ at the latter, against what
    ``full(f16)`` keeps of the unspoiled logits. Draws and decisions have no finite KL."""
    found: dict[str, list[np.ndarray]] = {"kl_T1": [], "kl_T4": [], "gradient": []}
    for view in range(cache.views):
        rows = cache.read(view, np.arange(cache.samples), [REFERENCE, arm.name])
        said, kept = rows[REFERENCE], rows[arm.name]
        p, q = np.exp(said.log_probs(T)), _probs(kept)
        found["gradient"].append(np.linalg.norm(q - p, axis=1) / np.linalg.norm(p, axis=1))
        if not isinstance(kept, HardLabels | SampledLogits):
            for at in (1, 4):
                log_p = said.log_probs(at)
                found[f"kl_T{at}"].append((np.exp(log_p) * (log_p - kept.log_probs(at))).sum(axis=1))
    size = cache.targets[arm.name].row_bytes
    means = {key: float(np.concatenate(parts).mean()) for key, parts in found.items() if parts}
    return {"arm": arm.name, "codec": arm.codec, "family": arm.family, "bytes": size} | means


def _probs(kept: Any) -> np.ndarray:
    if isinstance(kept, HardLabels):
        return np.eye(kept.classes)[kept.index]
    return np.exp(kept.log_probs(T))


# -- one run -----------------------------------------------------------------------------------------------


def train(arm: Arm, seed: int, cache: sc.Cache, source: sc.Source) -> tuple[torch.nn.Module, list[float]]:
    """A student, and the mean loss of each of its epochs."""
    loader = Loader(
        cache,
        source,
        global_batch=BATCH,
        seed=seed,
        workers=0,
        input_spec=SPEC,
        size=SIZE,
        target_source=CacheTargets(cache, [arm.name]),
    )
    torch.manual_seed(seed)
    student = cifar_resnet.resnet8().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        student.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    steps, curve = len(loader), []
    for epoch in range(cache.views):
        total = 0.0
        for batch in loader:
            rate = learning_rate(epoch * steps + loader.step - 1, steps, cache.views)
            optimizer.param_groups[0]["lr"] = rate
            logits = student(batch.images.contiguous(memory_format=torch.channels_last))
            loss = kd(logits, batch[arm.name], T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        curve.append(total / steps)
    return student.eval(), curve


def held_out(data: Path, out: Path, count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What no student saw, of each set at most ``count``: pixels uint8 (n, 16, 16, 3) and labels."""
    found = evaluation(data, out, sc.Source(data / "cifar10", split="test", limit=TRANSFER))
    whole = View(0, 0, 32, 32, 32, 32, flip=False)
    return {
        name: (np.stack([sc.render(image, whole, SIZE) for image in pixels[:count]]), labels[:count])
        for name, (pixels, labels) in found.items()
    }


def measure(student: torch.nn.Module, images: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Top-1 and cross entropy with the labels, on either set."""
    found = {}
    for name, (pixels, labels) in images.items():
        said = Logits(_says(student, pixels))
        found[f"top1_{name}"] = float((said.top1() == labels).mean())
        found[f"ce_{name}"] = -float(said.log_probs()[np.arange(len(labels)), labels].mean())
    return found


@torch.inference_mode()
def _says(student: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    parts = (normalise(pixels[i : i + 500], SPEC) for i in range(0, len(pixels), 500))
    return torch.cat([student(x.contiguous(memory_format=torch.channels_last)) for x in parts]).numpy()


# -- all of them -------------------------------------------------------------------------------------------


def work(data: Path, out: Path, scale: Scale, seeds: int) -> None:
    """Run what is missing: what the curve is drawn through for all seeds, then what else may be asked."""
    torch.set_num_threads(1)
    transfer = sc.Source(data / "cifar10", split="test", limit=scale.images)
    teacher, memory = Remembering(data, scale.teacher), out / f"{scale.teacher}.npz"
    if memory.exists():
        teacher.load(memory)
    cache = prepare(out, transfer, teacher, scale.views)
    (out / "distortion.json").write_text(json.dumps([distortion(cache, arm) for arm in arms()]))
    images = held_out(data, out, scale.held_out)
    more = [arm for arm in arms() if arm not in arms(CODECS)]
    for seed, arm in [
        *product(range(seeds), arms(CODECS)),
        *((s, arm) for arm in more for s in range(seeds)),
    ]:
        result = out / "runs" / f"{arm.name}-{seed}.json"
        if result.exists():
            continue
        began = time.monotonic()
        student, curve = train(arm, seed, cache, transfer)
        found = {"arm": arm.name, "seed": seed, "loss": curve, "seconds": time.monotonic() - began}
        found |= measure(student, images)
        result.with_suffix(".partial").write_text(json.dumps(found))
        result.with_suffix(".partial").rename(result)
        told = f"{arm.name} seed {seed}: {found['top1_train']:.2%} in {found['seconds']:,.0f} s"
        print(told, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder with cifar10/ and weights/")
    parser.add_argument("--out", type=Path, required=True, help="cache and results, kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="that it works: 256 images, one network, one seed"
    )
    parser.add_argument("--tables", action="store_true", help="print what there is, and run nothing")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="distortions and all runs")
    arguments = parser.parse_args()
    out = arguments.out
    (out / "runs").mkdir(parents=True, exist_ok=True)
    if not arguments.tables:
        work(arguments.data, out, *((QUICK, 1) if arguments.quick else (Scale(), arguments.seeds)))
    tables(out, REFERENCE)
    if arguments.plot:
        plot(out, arguments.plot)
    if arguments.json:
        runs = [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))]
        kept = {"distortion": json.loads((out / "distortion.json").read_text()), "runs": runs}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
