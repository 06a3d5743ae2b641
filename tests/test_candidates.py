"""The table of codecs: its figures by their definitions, its bytes by builds, and what fits no target is told."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_plan import written

import softcache as sc
from softcache import losses, pilot
from softcache.builder import build
from softcache.candidates import BY_KIND, Tried, try_all
from softcache.codecs import CODECS, parse
from softcache.commission import commission
from softcache.errors import TeacherError
from softcache.targets import KINDS
from softcache.telling import tell
from softcache.testing import ToyImages, ToyTeacher, toy_detector, toy_teacher

QUIET = {"progress": False}


def tried(samples: int = 64, **options: Any) -> Tried:
    bound = inspect.signature(build).bind(
        "", **{"source": ToyImages(200), "teacher": toy_teacher()} | options
    )
    bound.apply_defaults()
    return try_all(pilot.try_out(commission(bound.arguments, lambda text: None), samples))


def test_every_codec_named_in_the_table_is_one_and_every_codec_is_in_it_but_one():
    assert BY_KIND.keys() == KINDS.keys()
    named = {type(parse(spec).codec) for some in BY_KIND.values() for spec in some}
    known = {codec for word, codec in CODECS.items() if word not in ("sample", "foreground")}
    assert known <= named  # sample is bound to one temperature, foreground asks for boxes
    for kind, some in BY_KIND.items():
        for spec in some:
            kinds = parse(spec).codec.kinds
            assert kind in kinds or (kind == "feature_map" and kinds == ("attention_map",)), spec


# -- figures ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(shared_data: Path) -> np.ndarray:
    with np.load(shared_data / "logits" / "efficientnet_lite0_imagenet.npz") as kept:
        return kept["logits"][:200].astype(np.float32)


@pytest.mark.parametrize(
    "spec", ["full(f16)", "full(u8)", "packed(44)", "topk(10)", "topk(10, tail='spread')"]
)
def test_figures_of_logits_are_those_of_their_definition(imagenet: np.ndarray, spec: str):
    codec: Any = parse(spec).codec
    kept = codec.decode(codec.encode(imagenet), (1000,))
    found = losses.of_logits(imagenet, KINDS["logits"].wrap(kept))
    for T in (1, 2, 4, 8):  # noqa: N806
        kls, gradients = [], []
        for row in range(len(imagenet)):
            z = [float(x) / T for x in imagenet[row]]
            most = max(z)
            p = np.exp(np.array(z) - most)
            p /= p.sum()
            if spec.startswith("full"):
                q = np.exp((kept[row].astype(np.float64) - kept[row].max()) / T)
                q /= q.sum()
            else:  # the rows as they are kept: named classes, and what all others weigh, evenly
                here = kept[row]
                named = here.index[here.value > -np.inf]
                value = here.value[here.value > -np.inf].astype(np.float64)
                rest = 1000 - len(named)
                mean = float(here.soft_mean.astype(np.float64)[(1, 2, 4, 8).index(T)])
                total = np.exp(value / T).sum() + rest * np.exp(mean / T)
                q = np.full(1000, np.exp(mean / T) / total)
                q[named] = np.exp(value / T) / total
            kls.append(float((p * np.log(p / q)).sum()))
            gradients.append(float(np.linalg.norm(q - p) / np.linalg.norm(p)))
        assert found[f"kl_T{T}"] == pytest.approx(np.mean(kls), rel=1e-6, abs=1e-12)
        assert found[f"t2kl_T{T}"] == pytest.approx(T * T * np.mean(kls), rel=1e-6, abs=1e-10)
        assert found[f"gradient_T{T}"] == pytest.approx(np.mean(gradients), rel=1e-6)


@pytest.mark.parametrize(("shape", "pool"), [((5, 6, 7), 1), ((5, 6, 7), 2), ((4, 9), 1), ((30,), 1)])
def test_figures_of_maps_are_those_of_a_hint_loss(shape: tuple[int, ...], pool: int):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    said = (rng.normal(size=(12, *shape)) + 5).astype(np.float32)
    small = shape if pool == 1 else (shape[0], *(-(-side // pool) for side in shape[1:]))
    kept = (rng.normal(size=(12, *small)) + 5).astype(np.float32)
    found = losses.of_values(said, kept, pool)
    t = torch.from_numpy(said).double()
    axes = (0, 2, 3) if len(shape) == 3 else tuple(range(len(shape)))
    s = t.mean(dim=axes, keepdim=True).expand_as(t).clone().requires_grad_()
    near = torch.from_numpy(kept).double()
    if pool > 1:  # the student is pooled as the map was
        near = torch.repeat_interleave(torch.repeat_interleave(near, pool, 2), pool, 3)[
            :, :, : shape[1], : shape[2]
        ]
    (true,) = torch.autograd.grad(((s - t) ** 2).sum(), s)
    (wrong,) = torch.autograd.grad(((s - near) ** 2).sum(), s)
    assert found["gradient"] == pytest.approx(float((wrong - true).norm() / true.norm()), rel=1e-9)
    cosine = torch.nn.functional.cosine_similarity(t.flatten(1), near.flatten(1)).mean()
    assert found["cosine"] == pytest.approx(float(cosine), rel=1e-9)


def test_a_map_that_does_not_vary_is_compared_with_itself():
    said = np.full((4, 3, 5, 5), 2.5, np.float32)
    assert losses.of_values(said, said) == {"cosine": pytest.approx(1), "gradient": 0}
    assert losses.of_values(said, said * np.float32(1.1))["gradient"] == pytest.approx(0.1, rel=1e-5)
    nothing = np.zeros_like(said)
    assert losses.of_values(nothing, nothing)["gradient"] == 0
    assert losses.of_values(nothing, said)["gradient"] == 1


# -- bytes, by building ----------------------------------------------------------------------------------------


def test_totals_are_what_a_build_with_that_codec_writes(tmp_path: Path):
    options: dict[str, Any] = {
        "source": ToyImages(300), "views": 2, "targets": {"logits": "full(f16)", "map": "int8", "vector": "f16"},
        "recipe": "random_resized_crop(8)|flip",
    }  # fmt: skip
    found = tried(256, **options)
    seen = 0
    for name, some in found.candidates.items():
        for one in some:
            out = tmp_path / f"{name}-{seen}"
            targets = options["targets"] | {name: one.codec}
            cache = sc.build(out, **options | {"targets": targets, "teacher": toy_teacher()}, **QUIET)
            total = found.whole({**found.asked, name: one})
            assert total.bytes == pytest.approx(written(out), rel=0.03), one.codec
            mine = sum(f.stat().st_size for f in (out / "targets" / name).rglob("c.*"))
            assert found.bytes_per_view(one) == pytest.approx(mine / 600, rel=0.05), one.codec
            assert cache.targets[name].spec == one.codec
            seen += 1
    assert seen >= 12


def test_bytes_of_real_feature_maps(shared_data: Path, tmp_path: Path):
    for library in ("torch", "pyarrow"):
        pytest.importorskip(library)
    options: dict[str, Any] = {
        "source": str(shared_data / "cifar10"), "split": "test", "limit": 300,
        "teacher": "softcache_train.students:resnet20",
        "weights": shared_data / "weights" / "cifar10_resnet20.safetensors",
        "recipe": "crop(32, pad=4)|flip", "targets": {"logits": "full(u8)", "layer2": "int8"},
    }  # fmt: skip
    found = tried(128, **options)
    for codec in ("int4", "pool(2)|int8", "sign"):
        one = next(o for o in found.candidates["layer2"] if o.codec == codec)
        sc.build(tmp_path / codec, **options | {"targets": {"logits": "full(u8)", "layer2": codec}}, **QUIET)
        assert found.whole({**found.asked, "layer2": one}).bytes == pytest.approx(
            written(tmp_path / codec), rel=0.05
        )


def test_detections_and_maps_with_boxes(tmp_path: Path):
    from layouts import write

    write("coco", tmp_path / "coco", count=24)

    found = tried(
        32,
        source=tmp_path / "coco",
        teacher=toy_detector(),
        ignore_labels=True,
        targets={"detections": "all", "p3": "int8"},
    )
    items = {one.codec: one for one in found.candidates["detections"]}
    assert items["all(logits=f16)"].error <= items["all"].error < 1e-3
    assert {one.codec for one in found.candidates["p3"]} >= {
        "foreground(9, pool=2)",
        "foreground(4, pool=2)",
        "int4",
    }
    assert all(one.same for one in items.values())


# -- what does not fit, and bad answers --------------------------------------------------------------------------


def test_what_does_not_fit_is_left_out_and_told():
    found = sc.plan(
        source=ToyImages(40), teacher=toy_teacher(), targets={"logits": "full(f16)", "map": "f16"}
    )
    why = {one["codec"]: one["why"] for one in found.left_out if one["target"] == "logits"}
    assert "keeps 10 of more classes than that" in why["topk(10)"]
    assert "no fewer bytes than full(f16)" in why["packed(44)"]
    assert "left out for logits: " in tell(found, None)


class Odd(ToyTeacher):
    """Says ``what`` of an image now and then."""

    def __init__(self, what: float, target: str):
        super().__init__()
        self.what, self.target, self.calls = what, target, 0

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        said, self.calls = super().__call__(pixels), self.calls + 1
        if self.calls > 2:
            said[self.target][-1] = self.what
        return said


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
def test_answers_that_are_not_finite_are_refused_by_name(what: float):
    with pytest.raises(TeacherError, match=r"target 'map' of the image .* is not finite"):
        sc.plan(source=ToyImages(200), teacher=Odd(what, "map"), targets={"map": "f16"}, budget="1MB")


class Flat(ToyTeacher):
    """Two classes that are always equal, and a map of one value."""

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        n = len(pixels)
        return {"logits": np.zeros((n, 4), np.float32), "map": np.full((n, 8, 16, 16), 3.7, np.float32)}


def test_constant_answers():
    found = sc.plan(
        source=ToyImages(60), teacher=Flat(), targets={"logits": "full(f16)", "map": "f16"}, budget="60kB"
    )
    assert found.choice is not None and found.predicted_bytes <= 60_000
    for row in found.codecs:
        assert all(np.isfinite(list(row["figures"].values()))), row
        if row["target"] == "logits" and row["codec"] != "argmax":
            assert row["figures"]["t2kl_T8"] < 1e-6


class One:
    input_spec = ToyTeacher.input_spec

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"logits": pixels.reshape(len(pixels), -1)[:, :1].astype(np.float32)}


def test_one_class_is_refused_as_by_a_build():
    with pytest.raises(sc.SoftcacheError, match="at least two class logits"):
        sc.plan(source=ToyImages(20), teacher=One(), ignore_labels=True)


def test_what_is_kept_of_the_answers_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pilot, "BYTES", 1 << 18)
    found = tried(100, targets={"logits": "full(f16)", "map": "f16"}, views=3)
    heard = found.pilot.heard
    assert heard["map"].values.nbytes <= 1 << 18 and len(heard["map"].samples) == 16
    assert len(heard["logits"].samples) == pilot.ROWS
    assert set(heard["map"].views.tolist()) == {0, 1}  # of every view, of the same samples
    assert all(part.base is None or part.base.nbytes < 1 << 20 for part in (heard["map"].values,))


# -- codecs whose views share something ------------------------------------------------------------------------


def test_a_base_is_counted_and_tried_on_views_that_it_is_not_made_of(tmp_path: Path):
    from test_choice import Thousand

    options: dict[str, Any] = {
        "source": ToyImages(90), "views": 15, "ignore_labels": True, "batch": 16,
        "targets": {"logits": "anchored"}, "recipe": "random_resized_crop(8)|flip",
    }  # fmt: skip
    found = tried(48, **options, teacher=Thousand())
    assert found.pilot.views == 12
    logits = {one.codec: one for one in found.candidates["logits"]}
    assert {spec for _, spec, _ in found.left_out} == {"head(f16)", "head(int8)"}  # not asked of the teacher
    for codec in ("anchored", "packed(44)"):
        out = tmp_path / codec
        cache = sc.build(out, **options | {"targets": {"logits": codec}}, teacher=Thousand(), **QUIET)
        assert found.whole({"logits": logits[codec]}).bytes == pytest.approx(written(out), rel=0.03)
        said = Thousand()
        kls = []
        for k in range(12 if codec == "packed(44)" else 6, 15):
            kept = cache.read(k, np.arange(90))["logits"].log_probs(1.0)
            views = cache.read_views(k, np.arange(90))
            pixels = np.stack([sc.render(ToyImages(90)[i][0], v, (8, 8)) for i, v in enumerate(views)])
            z = said(pixels)["logits"].astype(np.float64)
            z -= z.max(1, keepdims=True)
            z -= np.log(np.exp(z).sum(1, keepdims=True))
            kls.append((np.exp(z) * (z - kept)).sum(axis=1).mean())
        assert logits[codec].figures["kl_T1"] == pytest.approx(np.mean(kls), rel=0.4)


def test_too_few_views_for_a_base_are_told():
    from test_choice import Thousand

    found = tried(32, source=ToyImages(60), teacher=Thousand(), ignore_labels=True, views=3)
    why = {spec: reason for _, spec, reason in found.left_out}
    assert "makes a base of 6 views" in why["anchored"]
