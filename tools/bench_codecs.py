"""What a byte buys: logits and feature maps under every codec, against what peers keep.

    python tools/bench_codecs.py --data ../shared/data [--quick] [--json]

**Logits** of EfficientNet-Lite0 over photographs whose number mod 10 is 7 or more (nothing was chosen on them). Bytes a
view are those of all fields; of ``anchored`` also the image's share, a 20th of it for each of 20 views, measured on views
that its base was not made of. KL(p ‖ p̂) in nats, T²·KL, and the relative error ‖p̂ − p‖ / ‖p‖, which is that of the gradient
that a student far from its teacher gets; means over rows. The tail is taken to be flat where nothing is known of it. ``fp16
top-k`` is k logits as halves, k indices and the tail's exact mass at every T (two bytes, which is generous). ``TinyViT``
and ``ml-dr`` keep k = 10 probabilities as halves; the rest of the mass is spread evenly, and at another temperature all are
raised to 1/T. Rates are of one core, in rows a second, of batches of 256.

**Maps** of ResNet-56 on CIFAR-10's test images, and gradients of three losses between them and ResNet-20's, relative errors:
hint, the squared difference (Romero et al. 2015); AT, that of normalised sums of squares (Zagoruyko and Komodakis 2017);
CWD, KL of the softmax over a channel's cells at T = 4 (Shu et al. 2021). Of pooled maps both are pooled first.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_spine import table
from numcodecs import Zstd

from softcache import codecs
from softcache.codecs.pool import Pooled
from softcache.targets import Logits

AT = (1, 2, 4, 8)
BYTES = (16, 28, 44, 64, 128, 256, 512, 1000)
MAPS = ("f16", "int8", "int4", "sign", "pool(2)|int8", "pool(2)|int4", "pool(4)|int8")
VIEWS = 20  # of an image, over which a base is spread
Kept = Callable[[float], np.ndarray]  # T → log-probabilities (n, C)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return Logits(z).log_probs()


# -- logits ------------------------------------------------------------------------------------------------


def fidelity(said: np.ndarray, kept: Kept) -> dict[str, float]:
    found = {}
    for T in AT:  # noqa: N806
        p, q = Logits(said).log_probs(T), kept(T)
        kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
        off = np.linalg.norm(np.exp(q) - np.exp(p), axis=1) / np.linalg.norm(np.exp(p), axis=1)
        found |= {f"kl_T{T}": kl, f"T2kl_T{T}": T * T * kl, f"p_T{T}": float(off.mean())}
    return found


def fp16_top_k(values: np.ndarray, k: int) -> Kept:
    index = np.argsort(-values, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(values, index, 1).astype(np.float16).astype(np.float64)

    def at(T: float) -> np.ndarray:  # noqa: N803
        p = Logits(values).log_probs(T)
        np.put_along_axis(p, index, -np.inf, 1)
        rest = np.log(np.exp(p).sum(axis=1, keepdims=True))
        out = np.repeat(rest - np.log(p.shape[1] - k), p.shape[1], axis=1)
        np.put_along_axis(out, index, log_softmax(kept / T) + np.log(-np.expm1(rest)), 1)
        return out

    return at


def probabilities(values: np.ndarray, k: int) -> Kept:
    p = np.exp(log_softmax(values))
    index = np.argsort(-p, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(p, index, 1).astype(np.float16).astype(np.float64)
    rest = np.maximum(1 - kept.sum(axis=1, keepdims=True), 1e-6) / (p.shape[1] - k)
    out = np.repeat(rest, p.shape[1], axis=1)
    np.put_along_axis(out, index, np.maximum(kept, 1e-8), 1)
    return Logits(np.log(out)).log_probs


def decoded(kept: Any) -> Kept:
    return kept.log_probs if hasattr(kept, "log_probs") else Logits(kept).log_probs


def rate(f: Callable[[int], object], rows: int) -> float:
    """Rows a second of ``f(first)``, which does 256 of them; the best of a few rounds."""
    starts = range(0, max(rows - 255, 1), 256)
    best = 0.0
    for _ in range(3):
        begun = time.perf_counter()
        for first in starts:
            f(first)
        best = max(best, len(starts) * min(rows, 256) / (time.perf_counter() - begun))
    return best


def of_codec(text: str, values: np.ndarray) -> dict[str, float]:
    codec, shape = codecs.parse(text).codec, values.shape[1:]
    fields = codec.encode(values)
    cut = [{n: f[i : i + 256] for n, f in fields.items()} for i in range(0, len(values), 256)]
    return {
        "bytes": sum(f.nbytes for f in fields.values()) / len(values),
        **fidelity(values, decoded(codec.decode(fields, shape))),
        "encode": rate(lambda i: codec.encode(values[i : i + 256]), len(values)),
        "decode": rate(lambda i: codec.decode(cut[i // 256], shape), len(values)),
    }


def of_anchored(text: str, views: np.ndarray) -> dict[str, float]:
    """``views`` (images, 24, C): the base is of the first; 20 others are kept."""
    codec: Any = codecs.parse(text).codec
    shared = codec.anchor(views[:, : codec.views].transpose(1, 0, 2))
    rows = views[:, -VIEWS:].reshape(-1, views.shape[2])
    each = {name: np.repeat(f, VIEWS, axis=0) for name, f in shared.items()}
    fields = codec.encode(rows, each)
    once, row = (sum(f.nbytes for f in part.values()) for part in (shared, fields))
    return {
        "bytes": (once + row) / len(rows),
        **fidelity(rows, decoded(codec.decode(fields | each, rows.shape[1:]))),
        "encode": rate(
            lambda i: codec.encode(rows[i : i + 256], {n: f[i : i + 256] for n, f in each.items()}), len(rows)
        ),
        "decode": rate(
            lambda i: codec.decode({n: f[i : i + 256] for n, f in (fields | each).items()}, rows.shape[1:]),
            len(rows),
        ),
    }


def logits_of(data: Path, name: str, most: int) -> np.ndarray:
    """Photographs that nothing was chosen on: ``(rows, C)``, or of the file of 24 views ``(images, 24, C)``."""
    with np.load(data / "logits" / f"efficientnet_lite0_imagenet{name}.npz") as file:
        image, values = file["image"], file["logits"].astype(np.float32)
    if not name:
        return values[image % 10 >= 7][:most]
    chosen = np.unique(image[image % 10 >= 7])[: max(most // VIEWS, 4)]
    return np.stack([values[image == one] for one in chosen])


def of_logits(data: Path, quick: bool) -> dict[str, dict[str, float]]:
    values = logits_of(data, "", 256 if quick else 1200)
    found = {}
    for size in BYTES if not quick else (28, 44, 128):
        k = min((size - 2) // 4, values.shape[1] - 1)
        found[f"fp16 top-{k}"] = {"bytes": float(4 * k + 2), **fidelity(values, fp16_top_k(values, k))}
        found[f"packed({size})"] = of_codec(f"packed({size})", values)
    for name, size in (("TinyViT, k = 10", 44.0), ("ml-dr, k = 10", 104.0)):
        found[name] = {"bytes": size, **fidelity(values, probabilities(values, 10))}
    for text in ("topk(10)", "topk(50)", "full(u8)", "full(f16)"):
        found[text] = of_codec(text, values)
    if "anchored" in codecs.CODECS:
        views = logits_of(data, "_24views", 256 if quick else 1500)
        found[f"anchored, {VIEWS} views"] = of_anchored("anchored", views)
        found["packed(44), the same views"] = of_codec(
            "packed(44)", views[:, -VIEWS:].reshape(-1, views.shape[2])
        )
    return found


# -- maps --------------------------------------------------------------------------------------------------


def maps_of(data: Path, network: str, images: int) -> dict[str, np.ndarray]:
    """Of CIFAR-10's first test images: by the layer's name, float32 ``(images, C, H, W)``."""
    import pyarrow.parquet as pq
    from PIL import Image

    from softcache.teachers import Options, load

    rows = pq.read_table(data / "cifar10" / "test-00000-of-00001.parquet").slice(0, images).to_pylist()
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows]
    )
    layers = ("layer1", "layer2", "layer3")
    weights = data / "weights" / f"cifar10_{network}.safetensors"
    teacher = load(f"softcache_train.students:{network}", Options(weights=weights, taps=layers))
    said = [teacher(pixels[i : i + 64]) for i in range(0, images, 64)]
    return {name: np.concatenate([one[name] for one in said]) for name in layers}


def hint(student: Any, teacher: Any) -> Any:
    return (student - teacher).square().mean()


def attention(student: Any, teacher: Any) -> Any:
    import torch.nn.functional as F

    a, b = (F.normalize(x.square().mean(dim=1).flatten(1)) for x in (student, teacher))
    return (a - b).square().mean()


def cwd(student: Any, teacher: Any) -> Any:
    p, q = ((x.flatten(2) / 4).log_softmax(dim=-1) for x in (teacher, student))
    return 16 * (p.exp() * (p - q)).sum(dim=-1).mean()


LOSSES: dict[str, Callable[[Any, Any], Any]] = {"hint": hint, "AT": attention, "CWD": cwd}


def gradient(loss: Callable[[Any, Any], Any], student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    import torch

    x = torch.from_numpy(student.astype(np.float64)).requires_grad_()
    loss(x, torch.from_numpy(teacher.astype(np.float64))).backward()
    assert x.grad is not None
    return x.grad.numpy()


def of_map(text: str, said: np.ndarray, student: np.ndarray) -> dict[str, float]:
    codec, shape = codecs.parse(text).codec, said.shape[1:]
    fields = codec.encode(said)
    kept, own = codec.decode(fields, shape), said
    assert isinstance(kept, np.ndarray)
    pool = codec
    while isinstance(pool, Pooled):
        own, student, pool = pool.pool(own), pool.pool(student), pool.then
    a, b, zstd = own.astype(np.float64), kept.astype(np.float64), Zstd(1)
    packed = sum(len(zstd.encode(row.tobytes())) for f in fields.values() for row in f)
    found = {
        "raw": sum(f.nbytes for f in fields.values()) / len(said),
        "zstd": packed / len(said),
        "relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(a)),
        "cosine": float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())),
    }
    for name, loss in LOSSES.items() if text != "sign" else ():
        true, wrong = (gradient(loss, student, teacher) for teacher in (own, kept))
        found[name] = float(np.linalg.norm(wrong - true) / np.linalg.norm(true))
    return found


def of_maps(data: Path, images: int) -> dict[str, dict[str, dict[str, float]]]:
    said, student = (maps_of(data, network, images) for network in ("resnet56", "resnet20"))
    return {text: {name: of_map(text, said[name], student[name]) for name in said} for text in MAPS}


# -- the tables --------------------------------------------------------------------------------------------


def measured(data: Path, quick: bool) -> dict[str, Any]:
    return {"logits": of_logits(data, quick), "maps": of_maps(data, 64 if quick else 512)}


def logit_rows(found: dict[str, dict[str, float]]) -> Iterator[tuple[str, ...]]:
    yield (
        "logits as", "bytes", *(f"KL, T = {T}" for T in AT), *(f"T²·KL, T = {T}" for T in AT),
        *(f"‖p̂−p‖/‖p‖, T = {T}" for T in AT), "encode/s", "decode/s",
    )  # fmt: skip
    for name, one in sorted(found.items(), key=lambda item: item[1]["bytes"]):
        figures = [f"{one[f'{key}_T{T}']:.3g}" for key in ("kl", "T2kl", "p") for T in AT]
        rates = [f"{one[key]:,.0f}" if key in one else "" for key in ("encode", "decode")]
        yield name, f"{one['bytes']:,.1f}", *figures, *rates


def map_rows(found: dict[str, dict[str, dict[str, float]]]) -> Iterator[tuple[str, ...]]:
    keys = ("relative_l2", "cosine", *LOSSES)
    yield "maps as", "of", "bytes", "zstd", *keys
    for text, layers in found.items():
        for name, one in layers.items():
            figures = [f"{one[key]:.4f}" if key in one else "" for key in keys]
            yield text, name, f"{one['raw']:,.0f}", f"{one['zstd']:,.0f}", *figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder with logits/, weights/, cifar10/"
    )
    parser.add_argument("--quick", action="store_true", help="few rows, under two minutes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measured(args.data, args.quick)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    table("Logits", list(logit_rows(found["logits"])))
    table("Maps: bytes an image, before and after zstd", list(map_rows(found["maps"])))


if __name__ == "__main__":
    main()
