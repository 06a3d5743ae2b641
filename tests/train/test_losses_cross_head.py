"""The student's features through the teacher's last layer: against the formula in numpy, by hand, and in a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import toys
from formulas import softmax
from safetensors.torch import load_file
from softcache_train import Loader, terms, train
from softcache_train import config as configs
from softcache_train.objectives import CrossHead, kd
from softcache_train.taps import Seen
from torch import nn

import softcache
from softcache.errors import MismatchError, SpecError


def made(rng, student, teacher, classes, **options) -> tuple[CrossHead, np.ndarray, np.ndarray]:
    """The loss in float64, and its last layer."""
    weight, bias = rng.normal(size=(classes, teacher)), rng.normal(size=classes)
    torch.manual_seed(int(rng.integers(1 << 30)))
    loss = CrossHead(student, (teacher,), head=(torch.tensor(weight), torch.tensor(bias)), **options)
    return loss.double(), weight, bias


@pytest.mark.parametrize("seed", range(6))
def test_it_is_its_formula(seed):
    """Row by row; behind a linear map where widths differ, of a map behind the mean over its places."""
    rng = np.random.default_rng(seed)
    rows, width, own, classes = (int(n) for n in rng.integers(2, 9, 4))
    own = width if seed % 2 else own + 9
    T = rng.uniform(0.5, 8)  # noqa: N806
    shape = (own, 3, 2) if seed % 3 == 0 else (own,)
    loss, weight, bias = made(rng, shape, width, classes, T=T)
    features, teacher = rng.normal(size=(rows, *shape)), 3 * rng.normal(size=(rows, classes))
    total = 0.0
    for f, z in zip(features, teacher, strict=True):
        if own != width:
            a, b = (part.detach().numpy() for part in loss.parameters())
            f = np.einsum("oc,c...->o...", a[:, :, 0, 0], f) + b.reshape(-1, *[1] * (f.ndim - 1))
        crossed = weight @ f.reshape(width, -1).mean(axis=1) + bias
        p, q = softmax(z / T), softmax(crossed / T)
        total += T**2 * sum(p * np.log(p / q))
    assert len(list(loss.parameters())) == 2 * (own != width)
    found = loss(torch.tensor(features), torch.tensor(teacher))
    assert found.item() == pytest.approx(total / rows, rel=1e-9)


def test_by_hand():
    """One feature, ln 3 of it and two classes ±½: odds of three to one, where the teacher's are even."""
    head = torch.tensor([[0.5], [-0.5]]), torch.zeros(2)
    loss = CrossHead((1,), (1,), head=head, T=1)
    even = torch.zeros(1, 2)
    expected = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert loss(torch.tensor([[np.log(3)]], dtype=torch.float32), even).item() == pytest.approx(expected)
    assert loss(torch.zeros(1, 1), even).item() == 0
    assert not list(loss.parameters())


def test_the_teachers_own_features_leave_nothing_to_learn_at_any_temperature():
    rng = np.random.default_rng(0)
    for T in (0.7, 1, 4, 20):  # noqa: N806
        loss, weight, bias = made(rng, (5,), 5, 7, T=T)
        f = rng.normal(size=(6, 5))
        features = torch.tensor(f, requires_grad=True)
        found = loss(features, torch.tensor(f @ weight.T + bias + 3))  # softmax is blind to a shift
        found.backward()
        assert features.grad is not None
        assert abs(found.item()) < 1e-12 and features.grad.abs().max() < 1e-12


def test_gradients_reach_features_and_adapter_and_never_the_head():
    rng = np.random.default_rng(1)
    loss, *_ = made(rng, (6,), 4, 3, T=2)
    assert set(dict(loss.named_parameters())) == {"adapter.join.0.weight", "adapter.join.0.bias"}
    assert set(loss.state_dict()) == set(dict(loss.named_parameters()))
    features = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    loss(features, teacher).backward()
    assert features.grad is not None and features.grad.any() and teacher.grad is None
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    assert not loss.weight.requires_grad and not loss.bias.requires_grad
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher.detach()), features)
    moved = CrossHead((6,), (4,), head=(nn.Parameter(torch.ones(3, 4)), torch.zeros(3)))
    assert not moved.weight.requires_grad  # whoever hands over a live layer trains it no more


def test_half_precision_is_computed_in_float32():
    head = torch.randn(3, 4), torch.randn(3)
    loss, features = CrossHead((4,), (4,), head=head, T=2), torch.randn(5, 4).bfloat16()
    teacher = torch.randn(5, 3)
    found = loss(features, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, kd(features.float() @ head[0].T + head[1], teacher, 2))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error"),
    [
        ((4,), (5,), {}, MismatchError),
        ((4,), (4,), {"T": 0}, SpecError),
        ((6,), (4,), {"adapter": "none"}, MismatchError),
        ((6,), (4,), {"adapter": "2x2"}, SpecError),
    ],
)
def test_what_does_not_fit_is_refused(student, teacher, options, error):
    with pytest.raises(error):
        CrossHead(student, teacher, head=(torch.zeros(3, 4), torch.zeros(3)), **options)


# -- from a cache ----------------------------------------------------------------------------------------------


def teacher():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 6, 5, stride=5), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))
    made.input_spec = {"size": [toys.SIZE] * 2, "mean": [0.5] * 3, "std": [0.25] * 3}  # pyright: ignore
    return made


@pytest.fixture(scope="module")
def build(source, tmp_path_factory):
    def make(codec):
        return softcache.build(
            tmp_path_factory.mktemp("heads") / "cache",
            source=source,
            teacher=teacher(),
            recipe="flip",
            views=2,
            targets={"logits": codec},
            batch=16,
            progress=False,
        )

    return make


OPTIONS = {"student": "toys:plain", "epochs": 1, "global_batch": 25, "lr": 0.01, "workers": 0}


def asked(**keys):
    return {**OPTIONS, "objectives": ["ce", {"cross_head": {"student": "2", **keys}}]}


def test_a_run_keeps_the_head_out_of_everything(build, source, tmp_path):
    cache = build("head(f16)")
    config = configs.check({**asked(T=2), "out": str(tmp_path)})
    (loss,) = (o for o in config.terms if o.name == "cross_head")
    (term,) = terms.make([loss], cache, {"2": (392,), "": (4,)}, 0, (1, 1, 1))
    batch = Loader(cache, source, global_batch=10, workers=0).batch(0, 0)
    features = torch.randn(10, 392)
    found = term(Seen(batch.images, torch.zeros(10, 4), {"2": features}), batch)
    weight, bias = term.parameters()
    crossed = teacher()[3](features @ weight[:, :, 0, 0].T + bias)
    assert found.item() == pytest.approx(kd(crossed, batch["logits"], 2).item(), rel=1e-5)

    train(config, cache, source)
    (own,) = tmp_path.glob("terms-*.safetensors")
    assert {n: tuple(t.shape) for n, t in load_file(own).items()} == {
        "1.loss.adapter.join.0.weight": (54, 392, 1, 1),
        "1.loss.adapter.join.0.bias": (54,),
    }
    (model,) = tmp_path.glob("model-*.safetensors")
    assert set(load_file(model)) == set(toys.plain(4).state_dict())
    (entry,) = json.loads((tmp_path / "checkpoint.json").read_text())["history"]
    assert entry["cross_head(2)"] > 0


def test_a_cache_without_the_head_says_how_to_add_it(build, source, tmp_path):
    cache = build("full(f16)")
    with pytest.raises(
        SpecError, match=r"holds full\(f16\) .*extend .* --as head --target 'logits=head.f16.'"
    ):
        train(configs.check({**asked(), "out": str(tmp_path / "a")}), cache, source)
    more = {"targets": {"logits": "head(f16)"}, "name": "head", "batch": 16, "progress": False}
    grown = softcache.extend(cache.path, source=source, teacher=teacher(), **more)
    config = configs.check({**asked(target="head.logits"), "out": str(tmp_path / "b")})
    assert train(config, grown, source).epochs == 1


def test_two_heads_are_refused():
    with pytest.raises(SpecError, match=r"learns from 1 target, not from 0\.logits, 1\.logits"):
        configs.check(asked(target=["0.logits", "1.logits"]))
