"""``pool`` and ``attention``: what is kept of a feature map, against loops that say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import softcache as sc
from softcache import codecs
from softcache.codecs import Objects, is_boxed
from softcache.codecs.attention import Attention, AttentionMap
from softcache.codecs.pool import Pool, Pooled
from softcache.codecs.strength import Strength
from softcache.errors import CodecError, MismatchError, SpecError, TeacherError
from softcache.targets import KINDS, Target, request, requests, taps
from softcache.testing import ToyImages, toy_teacher

maps = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))
)


@settings(max_examples=60)
@given(values=maps, n=st.integers(2, 8))
def test_pooling_is_the_mean_over_what_there_is(values: np.ndarray, n: int):
    found = Pool(n)(values)
    rows, channels, height, width = values.shape
    assert found.dtype == np.float32 and found.shape[1:] == Pool(n).shape(values.shape[1:])
    for row in range(rows):
        for channel in range(channels):
            for y in range(-(-height // n)):
                for x in range(-(-width // n)):
                    cell = values[row, channel, y * n : (y + 1) * n, x * n : (x + 1) * n].astype(np.float64)
                    assert found[row, channel, y, x] == np.float32(cell.sum() / cell.size)


def test_pooling_is_what_torch_does():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=(2, 3, 13, 8)).astype(np.float32)
    theirs = torch.nn.functional.avg_pool2d(torch.from_numpy(values), 4, ceil_mode=True)
    assert np.allclose(Pool(4)(values), theirs.numpy(), atol=1e-6)


def test_steps_are_read_from_left_to_right():
    codec = codecs.parse(" pool(2) | pool( 3 )|int8").codec
    assert isinstance(codec, Pooled) and codecs.parse("pool(2)|pool(3)|int8").codec == codec
    values = np.random.default_rng(0).normal(size=(2, 3, 12, 9)).astype(np.float32)
    twice = Pool(3)(Pool(2)(values))
    kept = codec.decode(codec.encode(values), (3, 12, 9))
    assert kept.shape == twice.shape == (2, 3, 2, 2) and np.allclose(kept, twice, atol=0.02)


def test_a_pooled_target_is_a_feature_map_of_fewer_cells():
    target = request("p3=pool(2)|int8").resolve((8, 5, 6))
    assert (target.kind, target.law, target.shape) == ("feature_map", "spatial", (8, 5, 6))
    assert Target.from_identity("p3", target.identity()) == target
    values = np.random.default_rng(0).normal(size=(3, 8, 5, 6)).astype(np.float32)
    assert (
        target.decode(target.codec.encode(values)).values.shape
        == target.wrap(values).values.shape
        == (3, 8, 3, 3)
    )
    with pytest.raises(CodecError, match=r"embedding, which 'pool\(2\)\|f16' does not hold"):
        request("avgpool=pool(2)|f16").resolve((512,))
    with pytest.raises(MismatchError, match="reads version 1"):
        Target.from_identity("p3", target.identity() | {"codec_version": 2})


def test_maps_of_no_cells_are_refused():
    with pytest.raises(TeacherError, match=r"\(3, 0, 5\): there is nothing in them"):
        request("p3=int8").resolve((3, 0, 5))


# -- every codec of maps ---------------------------------------------------------------------------------------

MAPS = ("f16", "int8", "int4", "sign", "foreground(5)", "foreground(5, pool=2)", "attention")
MAPS += tuple(f"pool({n})|{codec}" for n in (2, 3) for codec in ("f16", "int8", "int4", "sign"))


def encoded(codec: Any, values: np.ndarray) -> dict[str, np.ndarray]:
    objects = [Objects(np.array([[0.1, 0.2, 0.6, 0.5]]), np.zeros(1, np.int64))] * len(values)
    return codec.encode(values, objects) if is_boxed(codec) else codec.encode(values)


def parts_of(decoded: Any) -> dict[str, np.ndarray]:
    return decoded.arrays() if isinstance(decoded, AttentionMap) else {"value": decoded}


@pytest.fixture(scope="module")
def resnet_maps(shared_data: Path) -> dict[str, np.ndarray]:
    """What ResNet-56 says of eight test images of CIFAR-10, layer by layer."""
    pytest.importorskip("torch")
    from softcache.teachers import Options, load

    source = sc.Source(shared_data / "cifar10", split="test", limit=8)
    weights, layers = shared_data / "weights" / "cifar10_resnet56.safetensors", ("layer1", "layer2", "layer3")
    teacher = load("softcache_train.students:resnet56", Options(weights=weights, taps=layers))
    return teacher(np.stack([source.image(i) for i in range(8)]))


@pytest.mark.parametrize("text", MAPS)
def test_of_real_maps_every_codec_keeps_what_it_says(text: str, resnet_maps: dict[str, np.ndarray]):
    """Whole, and with odd sides."""
    codec: Any = codecs.parse(text).codec
    for whole in (resnet_maps["layer1"], resnet_maps["layer3"]):
        for values in (whole, np.ascontiguousarray(whole[:, :, :7, :5])):
            shape, exact = values.shape[1:], getattr(codec, "exact", lambda x: x)
            fields = encoded(codec, values)
            assert {name: (f.dtype.name, f.shape[1:]) for name, f in fields.items()} == {
                f.name: (f.dtype, f.shape) for f in codec.fields(shape)
            }
            kept, said = parts_of(codec.decode(fields, shape)), parts_of(exact(values))
            bound = codec.bound(fields, shape)
            for name, part in kept.items():
                off = np.abs(part.astype(np.float64) - said[name])
                assert part.shape == said[name].shape
                assert (off <= (bound[name] if isinstance(bound, dict) else bound)).all()
                dot = (part.astype(np.float64) * said[name]).sum()
                cosine = dot / np.linalg.norm(part) / np.linalg.norm(said[name])
                assert cosine > (0.85 if text == "foreground(5, pool=2)" else 0.99)


@pytest.mark.parametrize("text", MAPS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.7, 65504.0, -65504.0, 1e-40])
def test_a_constant_map_is_one(text: str, value: float):
    codec: Any = codecs.parse(text).codec
    values = np.full((2, 3, 5, 7), value, np.float32)
    with np.errstate(all="raise", under="ignore"):
        fields = encoded(codec, values)
        kept = parts_of(codec.decode(fields, (3, 5, 7)))
    for part in kept.values():
        assert np.isfinite(part).all() and np.ptp(part) <= 2e-3 * np.abs(part).max()
    if not text.endswith(("sign", "attention")):
        assert np.allclose(kept["value"], value, rtol=1e-2, atol=6e-8)


@pytest.mark.parametrize(
    ("text", "value"), [("int8", np.nan), ("pool(2)|int8", np.inf), ("int4", -np.inf), ("sign", np.nan)]
)
def test_a_map_that_is_not_finite_is_refused_with_its_image(tmp_path: Path, text: str, value: float):
    noise: list[np.ndarray] = []

    def teacher(pixels: np.ndarray) -> dict[str, np.ndarray]:
        said = toy_teacher()(pixels)
        said["map"][-1, 2, 3, 4] = value if noise else 0
        noise.append(pixels)
        return said

    with pytest.raises(TeacherError, match=r"'map' of the image '\d+' is not finite"):
        options: Any = {"recipe": "identity", "batch": 4, "progress": False, "input_size": 8}
        sc.build(tmp_path / "c", source=ToyImages(4), teacher=teacher, targets={"map": text}, **options)


# -- attention -------------------------------------------------------------------------------------------------


def fgd(feature: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """S and C of one map, written as in the paper's equations 5 to 7, in float64."""
    channels, height, width = feature.shape
    places = np.array([[np.abs(feature[:, y, x]).mean() for x in range(width)] for y in range(height)])
    strengths = np.array([np.abs(feature[c]).mean() for c in range(channels)])
    spatial = height * width * np.exp(places / tau) / np.exp(places / tau).sum()
    return spatial, channels * np.exp(strengths / tau) / np.exp(strengths / tau).sum()


@settings(max_examples=60)
@given(values=maps, tau=st.sampled_from([0.5, 0.8, 1, 3.0]))
def test_attention_is_what_the_paper_says(values: np.ndarray, tau: float):
    codec, shape = Attention(tau), values.shape[1:]
    fields = codec.encode(values)
    kept, bound = codec.decode(fields, shape), codec.bound(fields, shape)
    for row, feature in enumerate(values.astype(np.float64)):
        spatial, channel = fgd(feature, tau)
        assert (np.abs(kept.spatial[row] - spatial) <= bound["spatial"][row] + 1e-6 * spatial).all()
        assert (np.abs(kept.channel[row] - channel) <= bound["channel"][row] + 1e-6 * channel).all()
    assert {f.name: (f.dtype, f.shape) for f in codec.fields(shape)} == {
        name: (part.dtype.name, part.shape[1:]) for name, part in fields.items()
    }
    assert kept.spatial.dtype == kept.channel.dtype == np.float32


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e4, 3e38])
def test_attention_does_not_overflow(size: float):
    values = np.full((1, 3, 4, 4), size, np.float32)
    values[0, 0, 0, 0] *= -1
    values[0, 1, 2, 3] = 0
    kept = Attention().decode(Attention().encode(values), (3, 4, 4))
    for part in kept.arrays().values():
        assert np.isfinite(part).all() and part.mean() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (70_000, 2, 2), (2, 300, 300)])
def test_what_attention_cannot_hold_is_refused(shape: tuple[int, ...]):
    with pytest.raises(CodecError, match="attention is of maps"):
        Attention().fields(shape)


# -- strength --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(values=maps, p=st.sampled_from([1, 2, 3.0]))
def test_strength_is_what_attention_transfer_compares(values: np.ndarray, p: float):
    codec, shape = Strength(p), values.shape[1:]
    fields = codec.encode(values)
    kept, bound = codec.decode(fields, shape).values, codec.bound(fields, shape)
    for row, feature in enumerate(values.astype(np.float64)):
        q = sum(np.abs(channel) ** p for channel in feature) / len(feature)
        norm = np.sqrt((q**2).sum())
        wanted = q / norm if norm > 1e-30 else np.zeros_like(q)
        assert norm <= 1e-30 or (np.abs(kept[row] - wanted) <= bound[row] + 1e-6).all()
    assert kept.dtype == np.float32 and fields["value"].shape == (len(values), *shape[1:])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4, 3e38])
def test_strength_does_not_overflow(size: float):
    values = np.full((1, 3, 4, 4), size, np.float32)
    kept = Strength(3).decode(Strength(3).encode(values), (3, 4, 4)).values
    assert kept == pytest.approx(0.25 if size else 0)


def test_strength_is_of_a_map_and_does_not_move():
    target = request("layer3.strength=strength").resolve((4, 2, 5))
    assert (target.kind, target.law, target.tap) == ("attention_map", "view-locked", "layer3")
    assert Target.from_identity("layer3.strength", target.identity()) == target
    batch = target.wrap(np.ones((3, 4, 2, 5), np.float32))
    assert batch.values.shape == batch.arrays().shape == (3, 2, 5) and batch[1].values.shape == (2, 5)
    with pytest.raises(CodecError, match="strength is of maps"):
        Strength().fields((7,))
    with pytest.raises(SpecError, match="p must be a number above 0"):
        Strength(0)


def test_the_suffix_names_the_map_it_is_of():
    asked = requests(
        {
            "p3": "int8",
            "p3.attention": "attention",
            "x.attention": "f16",
            "logits": "argmax",
            "p4": "attention",
        }
    )
    assert [r.tap for r in asked] == ["logits", "p3", "p3", "p4", "x.attention"]
    assert taps(asked) == ("p3", "p4", "x.attention")
    target = asked[2].resolve((3, 4, 5))
    assert (target.kind, target.law, target.tap) == ("attention_map", "view-locked", "p3")
    assert Target.from_identity("p3.attention", target.identity()) == target
    assert KINDS["attention_map"].accepts((3, 4, 5)) and not KINDS["attention_map"].accepts((3, 4))


def test_rows_and_parts_of_attention():
    values: Any = np.random.default_rng(0).normal(size=(3, 4, 2, 5)).astype(np.float32)
    target = request("p3.attention=attention").resolve((4, 2, 5))
    batch = target.wrap(values)
    assert isinstance(batch, AttentionMap) and batch.spatial.shape == (3, 2, 5)
    assert {n: v.shape for n, v in batch[1].arrays().items()} == {"spatial": (2, 5), "channel": (4,)}
    kept = target.decode(target.codec.encode(values))
    assert np.allclose(kept.spatial, batch.spatial, rtol=1e-3) and np.allclose(
        kept.channel, batch.channel, rtol=1e-3
    )
