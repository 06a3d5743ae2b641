"""On real images: what a loss and its gradient come to from the cache, and from the living teacher on the same views."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from softcache_train import loader as loading
from softcache_train import online, students
from softcache_train.objectives import (
    ActivationBoundary,
    Hint,
    Vid,
    attention,
    channelwise,
    dist,
    dkd,
    gradient_attention,
    hard,
    input_gradient,
    kd,
    levels,
    logits_mse,
    masked_attention,
    pearson,
    probs_mse,
)
from softcache_train.taps import Tapped
from softcache_train.targets import CacheTargets

import softcache as sc

TEACHER = "softcache_train.students:resnet56"
STD = [0.229, 0.224, 0.225]
TARGETS = {
    "logits": "full(f16)",
    "layer1.8.bn2": "sign",
    "layer2": "f16",
    "layer3": "int8",
    "layer2.strength": "strength(2)",
    "layer2.attribution": "f16",
    "input.gradient": "f16",
}


@pytest.fixture(scope="module")
def batches(shared_data: Path, tmp_path_factory):
    """Of 32 images in one view: (the loader's batch, what the cache says, what the teacher says)."""
    source = sc.Source(shared_data / "cifar10", split="test", limit=32)
    weights = str(shared_data / "weights" / "cifar10_resnet56.safetensors")
    path = tmp_path_factory.mktemp("cached") / "cache"
    cache = sc.build(
        path,
        source=source,
        teacher=TEACHER,
        weights=weights,
        recipe="crop(32, pad=4)|flip",
        views=1,
        targets=TARGETS,
        progress=False,
    )
    live = online.load(cache, TEACHER, weights, list(TARGETS), "cpu")
    cached, living = (
        next(iter(loading.Loader(cache, source, global_batch=32, workers=0, target_source=given)))
        for given in (CacheTargets(cache), live)
    )
    assert torch.equal(cached.images, living.images)
    return cached, cached.targets, living.targets


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return Tapped(students.make("resnet8", 10), ["layer1", "layer2", "layer3"]).eval()


def made(loss, *shapes, **options):
    torch.manual_seed(1)
    return loss(*shapes, **options)


def of_logits(loss, **options):
    return lambda seen, said, batch: loss(seen.logits, said["logits"], **options)


def of_maps(loss, layer, target, **options):
    return lambda seen, said, batch: loss(seen.inside[layer], said[target].values, **options)


def masked(loss, layer, target, **options):
    return lambda seen, said, batch: loss(
        seen.inside[layer], said[target].values, mask=said["layer2.attribution"].values, **options
    )


def of_gradients(seen, said, batch):
    """Of the pixels in 0…1, as the teacher's is."""
    ours = input_gradient(seen.logits, seen.images, batch.labels)
    return gradient_attention(ours / torch.tensor(STD)[:, None, None], said["input.gradient"].values)


LAYER2, LAYER3 = (32, 16, 16), (64, 8, 8)
CASES = {  # name: (the loss, how far it may be off, of its size)
    "kd": (of_logits(kd), 1e-3),
    "logits_mse": (of_logits(logits_mse), 1e-3),
    "probs_mse": (of_logits(probs_mse, T=2.0), 1e-3),
    "hard": (of_logits(hard), 0),
    "dkd": (lambda seen, said, batch: dkd(seen.logits, said["logits"], labels=batch.labels), 1e-3),
    "dist": (of_logits(dist), 1e-3),
    "attention of f16": (of_maps(attention, "layer2", "layer2"), 1e-3),
    "attention of strength": (of_maps(attention, "layer2", "layer2.strength"), 1e-3),
    "gradient_attention": (of_gradients, 1e-3),
    "levels low": (of_maps(levels, "layer2", "layer2", level="low"), 1e-3),
    "levels high": (of_maps(levels, "layer3", "layer3", level="high"), 1e-3),
    "hint of f16": (of_maps(made(Hint, LAYER2, LAYER2), "layer2", "layer2"), 1e-3),
    "hint of int8": (of_maps(made(Hint, LAYER3, LAYER3), "layer3", "layer3"), 1e-3),
    "pearson of int8": (of_maps(pearson, "layer3", "layer3"), 1e-3),
    "channelwise of int8": (of_maps(channelwise, "layer3", "layer3"), 1e-3),
    "vid of int8": (of_maps(made(Vid, LAYER3, LAYER3), "layer3", "layer3"), 1e-3),
    "activation_boundary of sign": (
        of_maps(made(ActivationBoundary, (16, 32, 32), (16, 32, 32)), "layer1", "layer1.8.bn2"),
        0,
    ),
    "masked hint": (masked(made(Hint, LAYER2, LAYER2, over="mask", quantile=0.5), "layer2", "layer2"), 5e-3),
    "masked_attention": (masked(masked_attention, "layer2", "layer2.strength", quantile=0.5), 5e-3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_from_the_cache_is_that_of_the_living_teacher(name, batches, student):
    batch, cached, living = batches
    loss, bound = CASES[name]
    found = []
    for said in (cached, living):
        seen = student(batch.images.detach().requires_grad_())
        value = loss(seen, said, batch)
        slopes = torch.autograd.grad(value, list(student.parameters()), allow_unused=True)
        found.append((value.item(), torch.cat([s.flatten() for s in slopes if s is not None])))
    (value, slope), (wanted, exact) = found
    assert wanted > 0 and exact.any()
    if bound == 0:
        assert value == wanted and torch.equal(slope, exact)
    assert value == pytest.approx(wanted, rel=bound)
    assert (slope - exact).norm() <= 5 * bound * exact.norm()
