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


def heard(model, images, *names):
    """The model's answer and what its modules ``names`` gave."""
    found, modules = {}, dict(model.named_modules())
    for name in names:
        modules[name].register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out}))
    return model(images), [found[name] for name in names]


@pytest.mark.parametrize("name", ["resnet8", "resnet56", "resnet20_exits"])
def test_sums_and_the_embedding_can_be_tapped(name):
    model, images = students.make(name, 5), torch.randn(2, 3, 32, 32)
    logits, (before, after, embedding) = heard(model, images, "layer3.0.sum", "layer3.0", "embedding")
    assert before.shape == (2, 64, 8, 8) and (before < 0).any()
    assert torch.equal(before.relu(), after)
    assert embedding.shape == (2, 64) and torch.equal(model.linear(embedding), logits)


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


@pytest.mark.parametrize(("name", "stages"), [("resnet8_exits", 1), ("resnet20_exits", 3)])
def test_early_exits_are_a_resnet_and_two_exits(name, stages):
    model, images = students.make(name, 7), torch.randn(4, 3, 32, 32)
    plain = students.make(f"resnet{6 * stages + 2}", 7)
    left = plain.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and {key.split(".")[0] for key in left.unexpected_keys} == {"exit1", "exit2"}
    for training in (True, False):
        model.train(training), plain.train(training)
        names = [f"{exit}{part}" for exit in ("exit1", "exit2") for part in ("", ".embedding", ".align")]
        with torch.no_grad():
            answer, (logits1, features1, map1, logits2, features2, map2) = heard(model, images, *names)
            torch.testing.assert_close(answer, plain(images))
        assert logits1.shape == logits2.shape == (4, 7) and features1.shape == features2.shape == (4, 64)
        assert map1.shape == map2.shape == (4, 64, 8, 8)
    with torch.no_grad():
        for number, expected in enumerate((logits1, logits2, answer), start=1):
            assert torch.equal(model.at_exit(images, number), expected)
    with pytest.raises(SpecError, match="exits 1, 2 and 3"):
        model.at_exit(images, 4)


def test_an_early_exit_runs_only_what_it_needs():
    model, ran = students.make("resnet8_exits", 7).eval(), []
    for name in ("layer1", "layer2", "layer3", "exit1", "exit2", "linear"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    for number, expected in (
        (1, "layer1 exit1"),
        (2, "layer1 layer2 exit2"),
        (3, "layer1 layer2 layer3 linear"),
    ):
        model.at_exit(torch.zeros(1, 3, 32, 32), number)
        assert " ".join(ran) == expected
        ran.clear()


def test_early_exits_learn_from_themselves():
    """All three signals reach the weights of the exits, and those of the network."""
    from softcache_train.objectives import own_exits

    model, labels = students.make("resnet8_exits", 7), torch.arange(4)
    names = ("exit1", "exit2", "linear", "exit1.embedding", "exit2.embedding", "embedding")
    _, found = heard(model, torch.randn(4, 3, 32, 32), *names)
    own_exits(found[:3], found[3:], labels=labels).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_deit_is_timms_with_the_same_weights():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, **sizes).eval()
    model, images = students.make("deit_nano", 7).eval(), torch.randn(3, 3, 32, 32)
    model.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)
    theirs.set_distilled_training()
    model.train(), theirs.train()
    answer, heads = heard(model, images, "head", "head_dist")
    for found, expected in zip(heads, theirs(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert answer is heads[0]


def test_deit_answers_with_one_head_in_training_and_with_both_after():
    model, images = students.make("deit_nano", 7), torch.randn(2, 3, 32, 32)
    torch.nn.init.ones_(model.head_dist.bias)
    answer, (of_class, of_teacher) = heard(model, images, "head", "head_dist")
    assert torch.equal(answer, of_class) and not torch.equal(of_class, of_teacher)
    torch.testing.assert_close(model.eval()(images), (of_class + of_teacher) / 2)
    assert model.input_spec["size"] == [32, 32]


def test_deit_tiny_has_the_parameters_of_deit_ti_but_for_patches_and_classes():
    count = sum(p.numel() for p in students.make("deit_tiny", 1000).parameters())
    patches = (3 * 192) * (16**2 - 4**2) + 192 * (14**2 - 8**2)
    assert count + patches == 5_910_800  # timm's deit_tiny_distilled_patch16_224


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
