"""Every method's config trains for a few steps on real images, from what a real teacher said of them."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from softcache_train import Loader, loop, online, students, train
from softcache_train import config as configs
from softcache_train.objectives import OBJECTIVES

import softcache as sc
from softcache.codecs import parse

METHODS = sorted((Path(__file__).parents[2] / "train" / "configs" / "methods").glob("*.yaml"))
TARGETS = {
    "logits": "full(u8)",
    "embedding": "f16",
    "input.gradient": "f16",
    **{f"layer{i}": "int8" for i in (1, 2, 3)},
    **{f"layer{i}.strength": "strength" for i in (1, 2, 3)},
    **{f"layer{i}.8.sum": "sign" for i in (1, 2, 3)},
    "layer3.attribution": "f16",
}
HEAD = {"logits": "head(f16)"}
TEACHER, WEIGHTS = "softcache_train.students:resnet56", "weights/cifar10_resnet56.safetensors"


def headed(path):
    """Does it ask for the teacher's last layer?"""
    return "head(f16)" in path.read_text()


@pytest.fixture(scope="module")
def caches(shared_data, tmp_path_factory):
    """96 test images in one view: all that a method may ask of the ResNet-56, and its logits with the last layer."""
    source = sc.Source(shared_data / "cifar10", split="test", limit=96)
    build = partial(
        sc.build,
        source=source,
        teacher=TEACHER,
        weights=shared_data / WEIGHTS,
        recipe="crop(32, pad=4)|flip",
        views=1,
        batch=32,
        progress=False,
    )
    folder = tmp_path_factory.mktemp("methods")
    return [build(folder / "cache", targets=TARGETS), build(folder / "head", targets=HEAD)], source


@pytest.fixture
def built(caches, path):
    """The cache that a method reads."""
    found, source = caches
    return found[headed(path)], source


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_methods_config_trains(path, built, tmp_path):
    cache, source = built
    options: dict[str, Any] = {
        "global_batch": 24,
        "workers": 0,
        "out": str(tmp_path / "run"),
        "val_limit": 10,
    }
    asked = configs.load(path, flags=options)
    last = max((o.start for o in asked.terms), default=0) + 1
    config = configs.load(path, ["epochs=" + str(last), "warmup_epochs=0"], options)
    result = train(config, cache, source)
    history = json.loads((tmp_path / "run" / "checkpoint.json").read_text())["history"]
    assert result.epochs == last and 0 <= (result.top1 or 0) <= 1
    for term in config.terms:
        told = [entry[term.label] for entry in history[term.start : term.stop]]
        assert all(math.isfinite(value) and value > 0 for value in told), (term.label, told)


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_config_says_what_its_cache_holds(path):
    """The targets in its comment are those that its objectives read, and codecs that are."""
    said = [
        w.strip("'").split("=", 1)
        for w in path.read_text().split("--target ")[1:]
        for w in [w.split("' ")[0].split("'\n")[0]]
    ]
    for _, spec in said:
        parse(spec)
    assert {name for name, _ in said} == set(configs.load(path).targets)


def test_every_objective_has_a_row_and_a_config():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    used = {o.name for path in METHODS for o in configs.load(path).terms}
    assert set(OBJECTIVES) <= used
    for name in set(OBJECTIVES) - {"ce"}:
        assert f"`{name}" in page, name


@pytest.fixture(scope="module")
def pairs(caches, shared_data):
    """Of each cache one batch, its targets from the cache and from the living teacher."""
    found, source = caches
    who = TEACHER, str(shared_data / WEIGHTS)

    def batch(cache, of=None):
        return Loader(cache, source, global_batch=24, workers=0, target_source=of).batch(0, 0)

    return [(batch(c), batch(c, online.load(c, *who, list(c.targets), "cpu"))) for c in found]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_loss_and_gradient_from_the_cache_are_those_of_the_living_teacher(path, built, pairs):
    """Within a thousandth where halves or bytes of logits are kept; of signs, which lose nothing, within a millionth. A
    gradient within ten times that."""
    cache, _ = built
    config = configs.load(path)
    torch.manual_seed(0)
    student = students.make(config.student, 10).train()
    whole = loop._distillation(config, cache, student, (32, 32), (0.229, 0.224, 0.225), None)
    state, learns = copy.deepcopy(whole.state_dict()), [*student.parameters()]
    found: list[dict[int, tuple[float, torch.Tensor]]] = []
    for batch in pairs[headed(path)]:
        whole.load_state_dict(state)
        torch.manual_seed(1)
        found.append({})
        for epoch in sorted({term.start for term in config.terms}):
            losses = whole(batch, epoch)
            for i, term in enumerate(config.terms):
                if term.start == epoch:
                    slopes = torch.autograd.grad(losses[i], learns, retain_graph=True, allow_unused=True)
                    slope = torch.cat([one.flatten() for one in slopes if one is not None])
                    found[-1][i] = losses[i].item(), slope
    for i, term in enumerate(config.terms):
        (kept, slope), (said, exact) = (each[i] for each in found)
        rel = 3e-3 if any(TARGETS[name] == "int8" for name in term.targets) else 1e-3
        if term.name == "activation_boundary":
            rel = 1e-6  # in a batch of another size a value may pass 0
        assert kept == pytest.approx(said, rel=rel, abs=1e-7), term.label
        assert exact.any() and (slope - exact).norm() <= 10 * rel * exact.norm(), term.label
