"""Every method's config trains for a few steps on real images, from what a real teacher said of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from softcache_train import config as configs
from softcache_train import train

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


@pytest.fixture(scope="module")
def built(shared_data, tmp_path_factory):
    """96 test images in one view, all that a method may ask of the ResNet-56."""
    source = sc.Source(shared_data / "cifar10", split="test", limit=96)
    cache = sc.build(
        tmp_path_factory.mktemp("methods") / "cache",
        source=source,
        teacher="softcache_train.students:resnet56",
        weights=shared_data / "weights" / "cifar10_resnet56.safetensors",
        recipe="crop(32, pad=4)|flip",
        views=1,
        targets=TARGETS,
        batch=32,
        progress=False,
    )
    return cache, source


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
