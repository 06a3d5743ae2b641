"""Students: the published networks, by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from softcache_train import students

from softcache.errors import SpecError

PARAMETERS = {"resnet20": 0.27e6, "resnet32": 0.46e6, "resnet44": 0.66e6, "resnet56": 0.85e6}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_he_et_al_table_6(name):
    count = sum(p.numel() for p in students.make(name, 10).parameters())
    assert count == pytest.approx(PARAMETERS[name], abs=0.006e6)


@pytest.mark.parametrize("name", ["resnet8", *PARAMETERS])
def test_logits_have_a_class_each(name):
    model = students.make(name, 7)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert model.input_spec["size"] == [32, 32]


def test_shortcut_subsamples_and_pads_channels_on_both_sides():
    block = students.resnet8().layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_pretrained_weights_fit_strictly(shared_data):
    from safetensors.torch import load_file

    weights = load_file(shared_data / "weights" / "cifar10_resnet56.safetensors")
    students.resnet56().load_state_dict(weights, strict=True)


def test_own_factory():
    model = students.make("softcache_train.students.cifar_resnet:resnet20", 4)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_own_factory_that_makes_no_module():
    with pytest.raises(SpecError, match="not a torch module"):
        students.make("builtins:dict", 4)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet21", "did you mean 'resnet"),
        ("no_such_package:student", "cannot load the student"),
        ("softcache_train.students:resnet21", "cannot load the student"),
    ],
)
def test_names_that_lead_nowhere(name, says):
    with pytest.raises(SpecError, match=says):
        students.make(name, 10)


@pytest.mark.slow
def test_top1_of_the_pretrained_resnet56_is_93_39(shared_data):
    """The published weights, through the code that feeds every student."""
    from safetensors.torch import load_file
    from softcache_train.validation import Images, accuracy

    from softcache.source import Source

    source = Source(shared_data / "cifar10", split="test")
    pixels = np.stack([source.image(i) for i in range(len(source))])
    model = students.resnet56()
    model.load_state_dict(load_file(shared_data / "weights" / "cifar10_resnet56.safetensors"))
    images = Images(pixels, source.labels, "")
    assert accuracy(model, images, model.input_spec, torch.device("cpu")) == 0.9339
