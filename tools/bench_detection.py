"""What the targets of a detector cost, and what their codecs do to the gradients of feature losses.

    python tools/bench_detection.py --data ../shared/data [--limit 96] [--only logits maps] [--json]

**Logits.** Class logits of four detectors on validation images of COCO, of the items that ``top(1000, background=200)``
keeps of dense heads and of all queries: bytes an image, under zstd as they are written; the relative error ‖σ(ẑ) − σ(z)‖ /
‖σ(z)‖, which is that of the gradient of sigmoid losses (binary cross entropy, varifocal) at a student that says 0; the same
of the gradient of the class layer's bias, the weighted sum over the items; KL(σ(z) ‖ σ(ẑ)) in nats an item, summed over
the classes. The last column is what the numbers of ``score`` would take as Rice codes: gaps between those above 0, and
numbers, with the best parameters for each class of an image.

**Maps.** YOLOv8n at 640 over validation images of COCO, one view: its anchors before NMS and the maps P3 to P5 that its head
is given (tensors inside the graph, made outputs here). Bytes are those on disk, zstd and checksums counted. Gradients are
of three losses between these maps and a student's of the same shape (the teacher's, shrunk by a third, with noise of half
their deviation): hint, the squared difference (Romero et al. 2015); PKD, the same of maps normalised a channel over the
batch (Cao et al. 2022); CWD, KL of the softmax over a channel's cells at T = 4 (Shu et al. 2021). Each is the relative error
of the gradient that the cached map gives instead of the teacher's own. Memory is the peak of a build in its own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from coco356_ap import DETECTORS
from numcodecs import Zstd

MAPS = {f"p{i}": f"/model.{module}/cv2/act/Mul_output_0" for i, module in ((3, 15), (4, 18), (5, 21))}
DETECTIONS = {"detections": "top(1000, background=200)"}
CODECS = ("f16", "int8", "pool(2)|int8")
LOGITS = ("f16", "u8", "score")
DATASETS = {"COCO train": 118_287, "VisDrone train": 6_471}


def graph(data: Path, out: Path) -> Path:
    """YOLOv8n with its neck's maps as outputs."""
    import onnx

    model = onnx.load(data / "weights" / "yolov8n_coco_int8_640.onnx")
    for name, tensor in MAPS.items():
        model.graph.node.append(onnx.helper.make_node("Identity", [tensor], [name]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, out)
    return out


def build(data: Path, model: Path, out: Path, targets: dict[str, str], limit: int, views: int = 1) -> Any:
    import softcache as sc

    return sc.build(
        out,
        source=data / "coco356",
        split="val2017",
        limit=limit,
        teacher=f"onnx:{model}",
        recipe="letterbox(640)",
        views=views,
        targets=targets,
        batch=8,
        progress=False,
    )


def stored(cache: Any) -> dict[str, float]:
    """Bytes an image of each target, on disk."""
    found: dict[str, float] = {}
    for array in cache.arrays.values():
        name = array.path.split("/")[1] if array.path.startswith("targets/") else "view"
        files = (cache.store.size(array.file(b.view, b.index)) for b in cache.grid.blocks())
        found[name] = found.get(name, 0.0) + sum(files) / (cache.samples * cache.views)
    return found


# -- class logits ------------------------------------------------------------------------------------------


def written(field: np.ndarray) -> float:
    """Bytes a row of a field on disk but for checksums and indices: under zstd where it is big."""
    from softcache.zarrfile import BIG_ROW, ZSTD_LEVEL

    if field[0].nbytes < BIG_ROW:
        return field[0].nbytes
    return float(np.mean([len(Zstd(ZSTD_LEVEL).encode(np.ascontiguousarray(row))) for row in field]))


def answers(data: Path, name: str, limit: int) -> tuple[Any, np.ndarray]:
    """What a detector says of validation images: its layout, and float32 ``(limit, items, columns)``."""
    import softcache as sc
    from softcache.recipe import Recipe, render
    from softcache.teachers import Options, layouts_of, load

    detector = DETECTORS[name]
    source = sc.Source(data / "coco356", split="val2017", limit=limit)
    teacher = load(f"onnx:{data / 'weights' / detector.file}", Options(taps=("detections",)))
    recipe, said = Recipe(detector.recipe, seed=0), []
    for i in range(limit):
        pixels = source.image(i)
        view = recipe.view(source.ids[i], 0, pixels.shape[1], pixels.shape[0])
        said.append(teacher(render(pixels, view, teacher.input_spec.size)[None])["detections"])
    return layouts_of(teacher)["detections"], np.concatenate(said)


def class_logits(data: Path, limit: int) -> dict[str, dict[str, dict[str, float]]]:
    """By detector and by how its logits are kept; see the module's text."""
    from softcache import codecs

    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in DETECTORS:
        layout, values = answers(data, name, limit)
        found[name] = {}
        for word in LOGITS:
            text = f"top(1000, background=200, logits={word})" if layout.levels else f"all(logits={word})"
            codec: Any = codecs.parse(text).codec
            codec = codec.laid_out(layout)
            fields = codec.encode(values)
            kept = codec.decode(fields, values.shape[1:])
            said = codec.exact(values).take(kept.index)
            sizes = {field: written(one) for field, one in fields.items()}
            found[name][word] = {
                "bytes": sum(size for field, size in sizes.items() if field.startswith("logits")),
                "all": sum(sizes.values()),
                **class_errors(said.parts["logits"], kept.parts["logits"], kept.weight),
            }
            if word == "score":
                found[name][word]["rice"] = float(np.mean([rice(row) for row in fields["logits"]]))
    return found


def class_errors(said: np.ndarray, kept: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Of logits ``(n, K, C)``, of items that stand for ``weight`` ``(n, K)`` others."""
    z, y = said.astype(np.float64), kept.astype(np.float64)
    p, q = (np.exp(-np.logaddexp(0, -x)) for x in (z, y))
    yes, no = np.logaddexp(0, -y) - np.logaddexp(0, -z), np.logaddexp(0, y) - np.logaddexp(0, z)
    bias, off = ((x * weight[..., None]).sum(axis=1) for x in (p, q - p))
    return {
        "gradient": float(np.linalg.norm(q - p) / np.linalg.norm(p)),
        "bias": float(np.linalg.norm(off) / np.linalg.norm(bias)),
        "kl": float((p * yes + (1 - p) * no).sum(axis=-1).mean()),
    }


def rice(value: np.ndarray) -> float:
    """Bytes of numbers ``(C, K)`` as Rice codes: of each class how many are above 0, their gaps, and what they are."""
    bits = 0
    for row in value.astype(np.int64):
        places = np.flatnonzero(row)
        bits += len(row).bit_length() + 2 * 3
        for numbers in (np.diff(places, prepend=-1) - 1, row[places] - 1):
            bits += min(int((numbers >> r).sum()) + len(numbers) * (1 + r) for r in range(8))
    return bits / 8


# -- gradients ---------------------------------------------------------------------------------------------


def hint(student: Any, teacher: Any) -> Any:
    return (student - teacher).square().mean()


def pkd(student: Any, teacher: Any) -> Any:
    def normal(x: Any) -> Any:
        x = x - x.mean(dim=(0, 2, 3), keepdim=True)
        return x / (x.square().mean(dim=(0, 2, 3), keepdim=True).sqrt() + 1e-6)

    return (normal(student) - normal(teacher)).square().mean() / 2


def cwd(student: Any, teacher: Any) -> Any:
    p, q = ((x.flatten(2) / 4).log_softmax(dim=-1) for x in (teacher, student))
    return 16 * (p.exp() * (p - q)).sum(dim=-1).mean()


LOSSES: dict[str, Callable[[Any, Any], Any]] = {"hint": hint, "PKD": pkd, "CWD": cwd}


def gradient(loss: Callable[[Any, Any], Any], student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    import torch

    x = torch.from_numpy(student.astype(np.float64)).requires_grad_()
    loss(x, torch.from_numpy(teacher.astype(np.float64))).backward()
    assert x.grad is not None
    return x.grad.numpy()


def pooled(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Means over equal cells, as ``pool`` keeps them."""
    n, c, h, w = values.shape
    return values.reshape(n, c, size[0], h // size[0], size[1], w // size[1]).mean(axis=(3, 5))


def fidelity(said: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Cosine and relative L2 of all maps, and the errors of the three gradients in batches of eight.

    Of pooled maps the student's and the teacher's own are pooled first: what is lost by pooling is another question.
    """
    if kept.shape != said.shape:
        said = pooled(said, kept.shape[2:])
    a, b = said.astype(np.float64), kept.astype(np.float64)
    found = {
        "cosine": float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())),
        "relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(a)),
    }
    noise = np.random.default_rng(0).normal(size=said.shape) * said.std(axis=(0, 2, 3), keepdims=True) / 2
    student = said * (2 / 3) + noise
    for name, loss in LOSSES.items():
        wrong = whole = 0.0
        for i in range(0, len(said), 8):
            own = gradient(loss, student[i : i + 8], said[i : i + 8])
            wrong += np.square(gradient(loss, student[i : i + 8], kept[i : i + 8]) - own).sum()
            whole += np.square(own).sum()
        found[name] = float(np.sqrt(wrong / whole))
    return found


def live(cache: Any, data: Path, model: Path, samples: int) -> dict[str, np.ndarray]:
    """The teacher's maps of the first samples."""
    import softcache as sc
    from softcache.recipe import render
    from softcache.teachers import Options, load

    source = sc.Source(data / "coco356", split="val2017", limit=cache.samples)
    teacher = load(
        f"onnx:{model}", Options(taps=tuple(MAPS), input_size=(640, 640), mean=(0, 0, 0), std=(1, 1, 1))
    )
    views = cache.read_views(0, np.arange(samples))
    pixels = [render(source.image(i), view, (640, 640)) for i, view in enumerate(views)]
    said = [teacher(one[None]) for one in pixels]
    return {name: np.concatenate([row[name] for row in said]) for name in MAPS}


# -- the tables --------------------------------------------------------------------------------------------


_PEAK = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bench_detection as bench
with tempfile.TemporaryDirectory() as out:
    targets = bench.DETECTIONS | dict.fromkeys(bench.MAPS, "int8")
    bench.build(Path(sys.argv[2]), Path(sys.argv[3]), Path(out), targets, int(sys.argv[4]), int(sys.argv[5]))
# Not getrusage: its peak is handed down from the process that started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(data: Path, model: Path, limit: int, views: int) -> float:
    """MB of a build in a process of its own (Linux)."""
    given = map(str, (Path(__file__).parent, data, model, limit, views))
    done = subprocess.run([sys.executable, "-c", _PEAK, *given], check=True, capture_output=True, text=True)
    return float(done.stdout) / 1024


def of_maps(data: Path, limit: int) -> dict[str, Any]:
    found: dict[str, Any] = {"bytes": {}, "fidelity": {}}
    with TemporaryDirectory() as folder:
        model = graph(data, Path(folder) / "yolov8n.onnx")
        said: dict[str, np.ndarray] = {}
        for codec in CODECS:
            targets = DETECTIONS | dict.fromkeys(MAPS, codec)
            cache = build(data, model, Path(folder) / str(len(found["bytes"])), targets, limit)
            said = said or live(cache, data, model, min(limit, 32))
            found["bytes"][codec] = stored(cache)
            found["seconds_per_100"] = 100 / cache.pace["rows"]
            found["teacher_share"] = cache.pace["rows"] / cache.pace["teacher_rows"]
            kept = cache.read(0, np.arange(len(said["p3"])), list(MAPS))
            found["fidelity"][codec] = {name: fidelity(said[name], kept[name].values) for name in MAPS}
        found["peak_mb"] = {
            f"{n} x {v}": peak(data, model, n, v) for n, v in ((16, 1), (limit, 1), (limit, 4))
        }
    return found


def show_logits(found: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    yield "| detector | logits as | kB | kB of all | gradient | of the bias | KL, nats an item | as Rice codes, kB |"
    yield "|---" * 8 + "|"
    for name, words in found.items():
        for word, f in words.items():
            coded = f"{f['rice'] / 1000:.1f}" if "rice" in f else ""
            yield (
                f"| {name} | `{word}` | {f['bytes'] / 1000:.1f} | {f['all'] / 1000:.1f} | {f['gradient']:.2%} | "
                f"{f['bias']:.2%} | {f['kl']:.1e} | {coded} |"
            )


def show_maps(found: dict[str, Any]) -> Iterator[str]:
    names = ("view", "detections", *MAPS)
    yield (
        "| maps as | "
        + " | ".join(names)
        + " | all, kB | "
        + " | ".join(f"{name}, {views} views" for name in DATASETS for views in (1, 10))
        + " |"
    )
    yield "|---" * (2 + len(names) + 2 * len(DATASETS)) + "|"
    for codec, sizes in found["bytes"].items():
        total = sum(sizes.values())
        scaled = [total * images * views / 1e9 for images in DATASETS.values() for views in (1, 10)]
        cells = (
            [f"{sizes[name] / 1000:.1f}" for name in names]
            + [f"{total / 1000:.0f}"]
            + [f"{s:,.0f} GB" for s in scaled]
        )
        yield f"| `{codec}` | ".replace("|int8", "\\|int8") + " | ".join(cells) + " |"
    yield ""
    yield "| map | as | cosine | relative L2 | " + " | ".join(LOSSES) + " |"
    yield "|---" * (4 + len(LOSSES)) + "|"
    for codec, maps in found["fidelity"].items():
        for name, f in maps.items():
            told = codec.replace("|", "\\|")
            errors = " | ".join(f"{f[loss]:.2%}" for loss in LOSSES)
            yield f"| {name} | `{told}` | {f['cosine']:.6f} | {f['relative_l2']:.2%} | {errors} |"
    yield ""
    yield f"{found['seconds_per_100']:.1f} s per 100 images, {found['teacher_share']:.0%} of it in the teacher"
    yield "peak memory, images x views: " + ", ".join(
        f"{k}: {v:,.0f} MB" for k, v in found["peak_mb"].items()
    )


PARTS = {"logits": (class_logits, show_logits), "maps": (of_maps, show_maps)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder with coco356/ and weights/")
    parser.add_argument("--limit", type=int, default=96, help="images; default 96")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {name: PARTS[name][0](args.data, args.limit) for name in args.only}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, one in found.items():
        print("\n".join(PARTS[name][1](one)), end="\n\n")


if __name__ == "__main__":
    main()
