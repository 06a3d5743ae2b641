"""What is of a label: gradients of the image and integrated gradients of a layer, of a real network, kept and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache import measure
from softcache.errors import SpecError, TeacherError
from softcache.targets import gap_of
from softcache.teachers import Options, load
from softcache.testing import ToyImages

torch = pytest.importorskip("torch")

TEACHER = "softcache_train.students:resnet56"
TARGETS = {
    "logits": "full(f16)",
    "input.gradient": "f16",
    "layer3.attribution": "f16",
    "layer2.attribution": "f16",
    "layer3": "int8",
}


@pytest.fixture(scope="module")
def built(shared_data, tmp_path_factory):
    """Twelve test images in two views, what the ResNet-56 says of them, and why."""
    source = sc.Source(shared_data / "cifar10", split="test", limit=12)
    weights = shared_data / "weights" / "cifar10_resnet56.safetensors"
    return source, sc.build(
        tmp_path_factory.mktemp("attributions") / "cache",
        source=source,
        teacher=TEACHER,
        weights=weights,
        recipe="crop(32, pad=4)|flip",
        views=2,
        targets=TARGETS,
        batch=8,
        progress=False,
    )


@pytest.fixture(scope="module")
def network(shared_data):
    from safetensors.torch import load_file
    from softcache_train import students

    net = students.make("resnet56", 10)
    net.load_state_dict(load_file(shared_data / "weights" / "cifar10_resnet56.safetensors"))
    return net.double().eval()


def seen(source, cache, view):
    """The pixels in 0…1 that the teacher saw, float64 (n, 3, 32, 32)."""
    from softcache.recipe import render

    views = cache.read_views(view, np.arange(cache.samples))
    shown = [render(source.image(i), v, (32, 32)) for i, v in enumerate(views)]
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).double() / 255


def normal(pixels):
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_the_gradient_of_the_image_is_that_of_its_labels_loss(built, network):
    source, cache = built
    pixels = seen(source, cache, 1).requires_grad_()
    labels = torch.from_numpy(source.labels.astype(np.int64))
    loss = torch.nn.functional.cross_entropy(network(normal(pixels)), labels, reduction="sum")
    (wanted,) = torch.autograd.grad(loss, pixels)
    kept = cache.read(1, np.arange(12), ["input.gradient"])["input.gradient"].values
    assert cache.targets["input.gradient"].law == "view-locked"
    # sure of most images, the network has gradients there that are below what a half holds
    off, size = (np.linalg.norm(x.reshape(12, -1), axis=1) for x in (kept - wanted.numpy(), wanted.numpy()))
    assert (off <= 5e-3 * size + 1e-5).all() and (size > 1e-2).any()


def test_the_attributions_of_a_layer_add_up_to_the_logit(built, network):
    """Completeness: Σ = f_y(h) − f_y(0), of a head that is linear in the map without an error of the integral."""
    source, cache = built
    found = cache.read(0, np.arange(12))
    kept, h = found["layer3.attribution"].values, found["layer3"].values
    assert kept.shape == (12, 1, 8, 8)
    own = (
        found["logits"].values[np.arange(12), source.labels]
        - network.linear.bias.detach().numpy()[source.labels]
    )
    assert np.allclose(kept.sum((1, 2, 3)), own, rtol=0.01, atol=0.02)
    # where the rest is global mean and linear layer, it is h · w_y / 64 at every place
    weight = network.linear.weight.detach().numpy()[source.labels]
    assert np.allclose(kept[:, 0], np.einsum("nchw,nc->nhw", h, weight) / 64, atol=0.02 * np.abs(kept).max())


def test_what_attributions_miss_is_measured_and_told(built, network):
    """Of a layer with more than a linear head behind it, the sums differ from the logit's change by the integral's error."""
    source, cache = built
    labels = torch.from_numpy(source.labels.astype(np.int64))
    gaps = []
    for view in range(2):
        with torch.no_grad():
            h = network.layer2(network.stem(normal(seen(source, cache, view))))
            change = network.classified(h) - network.classified(torch.zeros_like(h))
        change = change.gather(1, labels[:, None])[:, 0].numpy()
        kept = cache.read(view, np.arange(12), ["layer2.attribution"])["layer2.attribution"].values
        assert kept.shape == (12, 1, 16, 16)
        gaps.append(np.minimum(np.abs(kept.sum((1, 2, 3)) - change) / np.abs(change), 1))
    rows = cache.grid.samples_of(cache.grid.block(0, 0))[:8]  # the first batch
    report = cache.report.fidelity
    assert report["layer2.attribution"]["completeness_gap"] == pytest.approx(
        np.mean(np.array(gaps)[:, rows]), abs=1e-3
    )
    assert report["layer3.attribution"]["completeness_gap"] < 1e-4
    assert not any("completeness_gap" in report[name] for name in ("logits", "input.gradient", "layer3"))
    assert f"completeness_gap {report['layer2.attribution']['completeness_gap']:.3g}" in measure.tell(cache)


def test_attributions_that_miss_too_much_are_called_out(built, monkeypatch):
    _, cache = built
    assert "do not add up" not in measure.tell(cache)
    monkeypatch.setattr(measure, "MOST_GAP", 0)
    assert measure.tell(cache).count("do not add up to the change of the logit") == 2


def test_a_member_of_an_ensemble_says_what_it_misses():
    from softcache.teachers.ensemble import assemble

    net = "softcache_train.students:resnet8"
    options = Options(taps=("1.layer2.attribution", "1.layer2"))
    said = assemble([net, net], None, options)(np.zeros((2, 32, 32, 3), np.uint8), labels=np.array([3, -1]))
    assert set(said) == {"logits", *options.taps, gap_of(options.taps[0])}
    assert said[gap_of(options.taps[0])][1] == 0 and not said[options.taps[0]][1].any()


def test_they_are_verified_live_and_asked_of_a_live_teacher(built, shared_data):
    from softcache_train import Loader, online

    source, cache = built
    weights = shared_data / "weights" / "cifar10_resnet56.safetensors"
    names = ["input.gradient", "layer3.attribution"]
    options = Options(weights=weights, taps=tuple(TARGETS)[1:], batch=8)
    found = sc.verify_live(cache, source, load(TEACHER, options), 12)
    assert all(found[name]["cache"]["wrong"] == 0 for name in TARGETS)
    assert found["layer3.attribution"]["cache"]["cosine"] > 0.999

    live = online.load(cache, TEACHER, str(weights), names, "cpu")
    same = [
        next(iter(Loader(cache, source, global_batch=12, workers=0, targets=names, target_source=of)))
        for of in (None, live)
    ]
    for name in names:
        kept, said = (torch.as_tensor(batch[name].values).flatten(1) for batch in same)
        assert ((kept - said).norm(dim=1) <= 5e-3 * said.norm(dim=1) + 1e-5).all()


def test_a_plan_chooses_among_the_codecs_that_hold_them():
    from softcache_train import students

    names = ("input.gradient", "layer3.attribution")
    ask: dict[str, Any] = {"source": ToyImages(16), "teacher": students.make("resnet8", 4), "batch": 8}
    found = sc.plan(**ask, targets=dict.fromkeys(names, "f16"), budget="80kB")
    rows = {name: {r["codec"]: r for r in found.codecs if r["target"] == name} for name in names}
    for tried in rows.values():
        assert tried.keys() == {"f16", "int8", "int4"}
        errors = [tried[codec]["figures"]["gradient"] for codec in ("f16", "int8", "int4")]
        assert 0 < errors[0] < errors[1] < errors[2] < 0.5
    assert rows["input.gradient"]["int4"]["chosen"] and found.predicted_bytes < 80_000


def test_what_has_no_label_or_several_is_refused(shared_data, tmp_path):
    source = sc.Source(shared_data / "cifar10", split="test", limit=8)
    ask: dict[str, Any] = {
        "teacher": "softcache_train.students:resnet8",
        "views": 1,
        "targets": {"input.gradient": "f16"},
        "progress": False,
    }
    with pytest.raises(SpecError, match="of one image with one label"):
        sc.build(tmp_path / "a", source=source, recipe="mixup(0.5)", **ask)
    with pytest.raises(SpecError, match="is of the label"):
        sc.build(tmp_path / "b", source=source, recipe="flip", ignore_labels=True, **ask)
    other: dict[str, Any] = ask | {"targets": {"layer9.attribution": "f16"}}
    with pytest.raises(TeacherError, match=r"no target 'layer9.attribution' .did you mean 'layer3'"):
        sc.build(tmp_path / "c", source=source, recipe="flip", **other)
