"""How far a teacher's maps move with the view: the build measures it, and puts it into the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import softcache as sc
from softcache import cli, testing
from softcache.errors import MismatchError
from softcache.source import Source

SIZE, CELL = 16, 2


def paintings(n: int) -> testing.ToyImages:
    """Smooth pictures of 32 × 32 pixels, so that a zoom changes their cells little."""

    class Paintings(testing.ToyImages):
        def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
            coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3)).astype(np.uint8)
            return np.array(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)), self.targets[
                i
            ]

    return Paintings(n)


class Pool:
    """Cells of 2 × 2 pixels: their mean colour, seen from the middle grey, and ``bias`` × where they are."""

    input_spec = {"size": (SIZE, SIZE)}  # noqa: RUF012
    weights_digest = "0" * 64

    def __init__(self, bias: float = 0.0):
        self.bias, self.rows = bias, 0

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        self.rows += len(pixels)
        n = SIZE // CELL
        cells = pixels.astype(np.float32).reshape(len(pixels), n, CELL, n, CELL, 3).mean((2, 4)) / 128 - 1
        place = np.random.default_rng(0).normal(size=(3, n, n)).astype(np.float32)
        map_ = np.moveaxis(cells, -1, 1) + self.bias * place
        return {"map": map_, "logits": map_.mean((2, 3)), "vector": map_.reshape(len(map_), -1)}


def build(path: Path, teacher: Pool, n: int = 12, **options) -> sc.Cache:
    options = {"targets": {"map": "f16"}, "source": paintings(n), "ignore_labels": True, "batch": 8} | options
    return sc.build(path, teacher=teacher, progress=False, **options)


def figures(cache: sc.Cache) -> dict[str, float]:
    assert cache.manifest is not None
    return cache.manifest.report.equivariance["map"]


def test_a_map_that_moves_with_the_view_is_found_to(tmp_path: Path):
    found = figures(build(tmp_path / "c", Pool()))
    assert found["same"] == found["flip"] == found["shift"] == 1
    assert 0.9 < found["zoom"] < 1
    assert all(found[f"{k}_ignored"] < found[k] - 0.1 for k in ("flip", "shift", "zoom"))


def test_one_that_stays_where_it_is_is_found_out(tmp_path: Path):
    found = figures(build(tmp_path / "c", Pool(bias=10.0)))
    assert found["same"] == 1
    assert all(found[k] < 0.5 < 0.95 < found[f"{k}_ignored"] for k in ("flip", "shift", "zoom"))


def test_the_figures_are_the_definition(tmp_path: Path):
    """Twelve images are all in the probe: a transcription in loops, over the images in source order."""
    teacher, source = Pool(bias=0.5), paintings(12)
    found = figures(build(tmp_path / "c", teacher))

    def say(picture: Image.Image) -> np.ndarray:
        small = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return teacher(np.array(small)[None])["map"][0].astype(np.float64)

    def cosine(a: np.ndarray, b: np.ndarray) -> list[float]:
        cells = [(a[:, i, j], b[:, i, j]) for i in range(a.shape[1]) for j in range(a.shape[2])]
        return [float(p @ q / np.sqrt((p @ p) * (q @ q))) for p, q in cells]

    seen: dict[str, list[float]] = {k: [] for k in found}
    for i in range(12):
        picture = Image.fromarray(source[i][0])
        plain, mirrored = say(picture), say(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        seen["flip"] += cosine(plain[:, :, ::-1], mirrored)
        seen["flip_ignored"] += cosine(plain, mirrored)
        moved = Image.new("RGB", (SIZE, SIZE))
        moved.paste(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR), (CELL, CELL))
        shifted = say(moved)
        seen["shift"] += cosine(plain[:, 1:-2, 1:-2], shifted[:, 2:-1, 2:-1])
        seen["shift_ignored"] += cosine(plain[:, 2:-1, 2:-1], shifted[:, 2:-1, 2:-1])
        zoomed = say(picture.crop((4, 4, 28, 28)))
        # cells of the zoomed map, on the plain one: the middle three quarters
        at = np.clip((np.arange(8) + 0.5) * 0.75 + 1 - 0.5, 0, 7)
        across = np.stack([[np.interp(at, range(8), row) for row in channel] for channel in plain])
        both = np.stack([[np.interp(at, range(8), col) for col in channel.T] for channel in across])
        seen["zoom"] += cosine(both.transpose(0, 2, 1), zoomed)
        seen["zoom_ignored"] += cosine(plain, zoomed)
        seen["same"] += [1.0]
    for key, values in seen.items():
        assert found[key] == pytest.approx(np.mean(values), abs=6e-5), key


def test_a_cache_without_maps_asks_the_teacher_for_nothing_more(tmp_path: Path):
    plain, mapped = Pool(), Pool()
    cache = build(tmp_path / "plain", plain, n=16, targets={"logits": "full(f16)", "vector": "f16"})
    assert plain.rows == 1 + cache.teacher_rows == 17  # and the picture of noise
    assert cache.manifest is not None and cache.manifest.report.equivariance == {}
    assert b"equivariance" not in (tmp_path / "plain" / "softcache.json").read_bytes()
    assert build(tmp_path / "mapped", mapped, n=16).teacher_rows == 16 and mapped.rows == 17 + 5 * 16


def test_it_is_measured_once_and_the_same_again(tmp_path: Path):
    teacher = Pool(bias=0.5)
    manifest = build(tmp_path / "c", teacher).path / "softcache.json"
    raw, rows = manifest.read_bytes(), teacher.rows
    assert build(tmp_path / "c", teacher).teacher_rows == 0 and teacher.rows == rows
    manifest.unlink()
    build(tmp_path / "c", teacher)
    assert manifest.read_bytes() == raw and teacher.rows > rows


def test_a_shift_needs_cells_of_whole_pixels(small_cache: sc.Cache):
    """The toy map has 16 cells on 8 pixels."""
    assert small_cache.manifest is not None
    found = small_cache.manifest.report.equivariance
    assert set(found) == {"map"} and set(found["map"]) == {
        *("same", "flip", "flip_ignored", "zoom", "zoom_ignored")
    }


def test_unreadable_images_are_left_out(tmp_path: Path):
    folder = testing.make_image_folder(tmp_path / "images", per_class=5)
    for path in sorted(folder.rglob("*.png"))[::2]:
        path.write_bytes(path.read_bytes()[:40])
    cache = build(tmp_path / "c", Pool(), source=folder, skip_corrupt=True)
    assert len(cache.invalid) == 10 and figures(cache)["flip"] == 1


def test_values_that_are_not_finite_are_like_nothing(tmp_path: Path):
    class Wild(Pool):
        def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
            said = super().__call__(pixels)
            whole = pixels.std() < 1000 and self.rows > 8 + 16  # the probe, not the build
            return {**said, "map": np.full_like(said["map"], np.inf) if whole else said["map"]}

    found = figures(build(tmp_path / "c", Wild(), n=16))
    assert found["flip"] == found["same"] == 0


def test_it_is_told(tmp_path: Path, capsys):
    cache = sc.build(
        tmp_path / "c", source=paintings(12), teacher=Pool(0.5), targets=["map=f16"], ignore_labels=True
    )
    f = figures(cache)
    told = f"cosine: flip {f['flip']:.4f} ({f['flip_ignored']:.4f} ignoring it), shift {f['shift']:.4f} ("
    assert f"map moves with the view, {told}" in capsys.readouterr().err
    assert cli.main(["show", str(cache.path)]) == 0
    assert told in capsys.readouterr().out
    assert cli.main(["show", str(cache.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["equivariance"]["map"] == f


def warped(cache: sc.Cache, source: Source) -> None:
    """What a trainer asks for that wants every epoch mirrored anew."""
    from softcache_train import Loader

    Loader(cache, source, global_batch=4, policy="warp", recipe="flip")


# -- real networks ---------------------------------------------------------------------------------------------


def test_a_vision_transformer_is_caught(tmp_path: Path):
    """One network, with and without its position embeddings. Its patch embedding is made symmetric: without positions
    every token is mirrored with its patch, to the last bit or so; with them, moving the map is wrong."""
    torch = pytest.importorskip("torch")
    transformer = pytest.importorskip("timm").models.vision_transformer.VisionTransformer

    class Tokens(torch.nn.Module):
        input_spec = {"size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}  # noqa: RUF012

        def __init__(self, positions: float):
            super().__init__()
            torch.manual_seed(0)
            self.vit = transformer(
                img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=4
            )
            patch = self.vit.patch_embed.proj.weight
            with torch.no_grad():
                patch.copy_((patch + patch.flip(3)) / 2)
                self.vit.pos_embed.normal_(std=positions)
            self.map = torch.nn.Identity()

        def forward(self, x):
            tokens = self.vit.forward_features(x)
            self.map(tokens[:, 1:].transpose(1, 2).reshape(len(x), 64, 8, 8))
            return self.vit.forward_head(tokens)

    caches = {p: build(tmp_path / f"{p}", Tokens(p), n=16, targets=["map=f16"]) for p in (0.0, 0.2, 1.0)}
    found = {p: figures(cache) for p, cache in caches.items()}
    assert found[0.0]["flip"] > 0.9999 > 0.9 > found[0.0]["flip_ignored"]
    assert found[0.2]["flip"] < 0.95
    assert found[1.0]["flip"] < found[1.0]["flip_ignored"] - 0.2  # moving it is worse than leaving it
    assert all(f["same"] > 0.9999 for f in found.values())
    warped(caches[0.0], Source(paintings(16)))
    for positions in (0.2, 1.0):
        with pytest.raises(
            MismatchError, match=f"'map' does not move with a flip.*{found[positions]['flip']:.4f}"
        ):
            warped(caches[positions], Source(paintings(16)))


def test_a_real_network_of_convolutions(shared_data: Path, tmp_path: Path):
    """ResNet-56 for CIFAR-10: it follows a shift, and neither a mirror image nor a zoom."""
    pytest.importorskip("torch")
    cache = sc.build(
        tmp_path / "c",
        source=shared_data / "cifar10",
        split="test",
        limit=64,
        teacher="softcache_train.students:resnet56",
        weights=shared_data / "weights" / "cifar10_resnet56.safetensors",
        targets=["layer2=f16", "layer3=f16"],
        progress=False,
    )
    assert cache.manifest is not None
    layer2, layer3 = (cache.manifest.report.equivariance[n] for n in ("layer2", "layer3"))
    assert layer2["same"] > 0.9999 and layer3["same"] > 0.9999
    assert layer2["shift"] > 0.97 and layer3["shift"] > 0.9
    assert 0.6 < layer2["flip"] < 0.9 and 0.6 < layer3["flip"] < 0.9
    assert layer2["zoom"] < 0.95 and layer3["zoom"] < 0.8
    with pytest.raises(MismatchError, match=f"'layer2' does not move with a flip.*{layer2['flip']:.4f}"):
        warped(cache, Source(shared_data / "cifar10", split="test"))
