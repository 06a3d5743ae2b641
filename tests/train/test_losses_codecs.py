"""What the cache rounds costs the relation losses, on what real networks say of real images."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from formulas import coded
from softcache_train import students
from softcache_train.objectives import CRD, InfoNCE, cc, fsp, gram, nst, rkd

from softcache.source import Source

LAYERS = ("embedding", "layer1", "layer2", "layer3")


@pytest.fixture(scope="module")
def said(shared_data):
    """What a ResNet-56 and a fresh ResNet-8 say of 48 test images."""
    from safetensors.torch import load_file

    source = Source(shared_data / "cifar10", split="test")
    pixels = np.stack([source.image(i) for i in range(48)])
    teacher = students.resnet56()
    teacher.load_state_dict(load_file(shared_data / "weights" / "cifar10_resnet56.safetensors"))
    torch.manual_seed(0)
    return inside(students.resnet8(), pixels), inside(teacher.eval(), pixels)


def inside(model, pixels):
    from softcache_train.loader import normalise

    found = {}
    for name in LAYERS:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: found.update({name: out})
        )
    with torch.no_grad():
        model(normalise(pixels, model.input_spec))
    return found


def contrast(student, teacher):
    torch.manual_seed(0)
    loss = CRD((64,), (64,), samples=100, negatives=200)
    return loss(student, teacher, index=torch.arange(48))


@pytest.mark.parametrize(
    ("loss", "layers", "text"),
    [
        *((loss, "embedding", "f16") for loss in (rkd, cc, contrast, InfoNCE((64,), (64,)))),
        *((loss, "layer3", "int8") for loss in (gram, nst, partial(rkd, angle=0))),
        (fsp, ("layer1", "layer2"), "int8"),
    ],
    ids=["rkd", "cc", "crd", "infonce", "gram", "nst", "rkd of maps", "fsp"],
)
def test_the_loss_from_the_cache_is_that_of_the_living_teacher(loss, layers, text, said):
    ours, theirs = said

    def value(teacher):
        given = [layers] if isinstance(layers, str) else layers
        pair = [ours[name] for name in given], [teacher(theirs[name]) for name in given]
        return loss(*(one[0] if isinstance(layers, str) else one for one in pair)).item()

    live, cached = value(lambda x: x), value(lambda x: torch.as_tensor(np.array(coded(x, text))))
    assert live > 1e-3 and cached != live
    assert cached == pytest.approx(live, rel=1e-3)
