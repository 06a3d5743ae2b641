"""What a teacher said is what its network gives for the pixels, normalised as it says; and who it was is recorded."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.errors import SoftcacheError, SpecError, TeacherError
from softcache.teachers import TEACHERS, Options, load

pytest.importorskip("torch")

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
SMALL_INPUT = {"input_size": (64, 64)}  # the networks' own 224 would only cost time


def make(kind: str) -> Any:
    """The library's own resnet18 with random weights, batch norms with statistics that are not trivial."""
    import torch

    library = pytest.importorskip(kind)
    torch.manual_seed(0)
    model = library.models.resnet18() if kind == "torchvision" else library.create_model("resnet18")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """kind → (the model, its weights as safetensors, and as a pickle)."""
    import torch
    from safetensors.torch import save_file

    made: dict[str, tuple[Any, Path, Path]] = {}

    def get(kind: str) -> tuple[Any, Path, Path]:
        if kind not in made:
            folder, model = tmp_path_factory.mktemp(kind), make(kind)
            state = {k: v.contiguous() for k, v in model.state_dict().items()}
            save_file(state, folder / "w.safetensors")
            torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "w.pth")
            made[kind] = model, folder / "w.safetensors", folder / "w.pth"
        return made[kind]

    return get


def answer(model: Any, pixels: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    """The network's output, written as in its paper: (x / 255 - mean) / std, in float64 before the network."""
    import torch

    x = (pixels.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    with torch.no_grad():
        return model(torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))).numpy()


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# -- the contract of TEACHERS: a new member is put in here -----------------------------------------------------

# Graphs in a file, and detectors, are of another sort: tests/test_onnx.py, tests/test_ultralytics.py, tests/test_hf.py.
every_kind = pytest.mark.parametrize("kind", sorted(TEACHERS.keys() - {"hf", "onnx", "ultralytics"}))


def test_every_kind_is_a_module_with_load():
    for module in TEACHERS.values():
        assert callable(importlib.import_module(f"softcache.teachers.{module}").load)


@every_kind
def test_logits_are_the_networks(kind: str, models):
    model, weights, _ = models(kind)
    teacher = load(f"{kind}:resnet18", Options(weights=weights, **SMALL_INPUT))
    found = teacher(PIXELS)
    assert set(found) == {"logits"} and found["logits"].dtype == np.float32
    assert np.allclose(found["logits"], answer(model, PIXELS, **IMAGENET), atol=1e-4, rtol=1e-4)


@every_kind
def test_identity_says_who_spoke(kind: str, models):
    _, weights, _ = models(kind)
    teacher = load(f"{kind}:resnet18", Options(weights=weights, batch=5))
    identity = teacher.identity()
    assert (identity.name, identity.weights_format) == (f"{kind}:resnet18", "safetensors")
    assert (identity.precision, identity.batch) == ("fp32", 5)
    assert identity.input_spec == teacher.input_spec
    assert teacher.input_spec.size == (224, 224) and teacher.input_spec.color == "RGB"
    assert teacher.input_spec.mean == IMAGENET["mean"] and teacher.input_spec.std == IMAGENET["std"]
    assert str(weights.parent) not in identity.model_dump_json()
    assert teacher.libraries()["torch"] == importlib.import_module("torch").__version__


@every_kind
def test_a_tapped_module_is_what_it_returned(kind: str, models):
    """Computed by hand: the stem up to layer1. In both libraries a ReLU in place follows bn1."""
    import torch

    model, weights, _ = models(kind)
    teacher = load(
        f"{kind}:resnet18", Options(weights=weights, taps=("bn1", "layer1", "conv1"), **SMALL_INPUT)
    )
    found = teacher(PIXELS)
    x = (
        torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255 - torch.tensor(IMAGENET["mean"]).view(1, 3, 1, 1)
    ) / (torch.tensor(IMAGENET["std"]).view(1, 3, 1, 1))
    with torch.no_grad():
        conv = model.conv1(x)
        normed = model.bn1(conv)
        layer1 = model.layer1(model.maxpool(torch.relu(normed)))
    for name, value in {"conv1": conv, "bn1": normed, "layer1": layer1}.items():
        assert np.allclose(found[name], value.numpy(), atol=1e-4), name
    assert found["bn1"].min() < -0.1
    assert set(found) == {"logits", "bn1", "layer1", "conv1"}


@every_kind
def test_an_unknown_module_lists_those_it_has(kind: str, models):
    _, weights, _ = models(kind)
    for name, codec in (("layer3.strength", "strength"), ("layer1.0.attention", "attention")):
        with pytest.raises(TeacherError, match=f"no target '{name}': {name}={codec} is kept of the map "):
            load(f"{kind}:resnet18", Options(weights=weights, taps=(name,)))
    with pytest.raises(TeacherError, match=r"no target 'layer5'.*did you mean 'layer\d'.*conv1.*layer1.*fc"):
        load(f"{kind}:resnet18", Options(weights=weights, taps=("layer5",)))


@every_kind
def test_an_unknown_model_names_the_nearest(kind: str):
    pytest.importorskip(kind)
    with pytest.raises(TeacherError, match="did you mean 'resnet"):
        load(f"{kind}:resnet_18", Options())


@every_kind
def test_nothing_is_downloaded_so_weights_are_asked_for(kind: str):
    pytest.importorskip(kind)
    with pytest.raises(TeacherError, match="needs --weights FILE: nothing is downloaded"):
        load(f"{kind}:resnet18", Options())


@every_kind
def test_weights_of_another_network_do_not_fit(kind: str, models, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    state = load_file(models(kind)[1])
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:, :3].contiguous()
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        TeacherError, match=rf"do not fit the teacher {kind}:resnet18: .*layer1.0.conv1.weight"
    ):
        load(f"{kind}:resnet18", Options(weights=tmp_path / "other.safetensors"))


@every_kind
def test_without_the_library_it_says_what_to_install(kind: str, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(TeacherError, match=rf"needs {kind}: pip install 'softcache\[{kind}\]'"):
        load(f"{kind}:resnet18", Options())


def seven(kind: str, name: str) -> Any:
    library = pytest.importorskip(kind)
    return (library.models.get_model if kind == "torchvision" else library.create_model)(name, num_classes=7)


# the head is called fc, classifier.1 (a convolution), head.fc, head
@pytest.mark.parametrize("format", ["safetensors", "pth"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("torchvision", "resnet18"), ("torchvision", "squeezenet1_1"), ("timm", "resnet18"), ("timm", "convnext_atto"),
     ("timm", "test_vit")],
)  # fmt: skip
def test_a_head_of_your_own_classes_is_taken_from_the_file(tmp_path: Path, kind: str, name: str, format: str):
    import torch
    from safetensors.torch import save_file

    model = seven(kind, name).eval()
    path = tmp_path / f"seven.{format}"
    if format == "pth":
        torch.save({"model": model.state_dict(), "epoch": 3}, path)
    else:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    side = 160 if name == "test_vit" else 64
    options = Options(weights=path, allow_pickle=True, input_size=(side, side), **IMAGENET)
    teacher = load(f"{kind}:{name}", options)
    size = teacher.input_spec.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    assert np.allclose(teacher(pixels)["logits"], answer(model, pixels, **IMAGENET), atol=1e-4)


# -- weights ---------------------------------------------------------------------------------------------------


def test_a_pickle_is_refused_without_the_flag_and_recorded_with_it(models):
    _, _, pickle = models("torchvision")
    with pytest.raises(TeacherError, match=r"a pickle can run any code.*--allow-pickle"):
        load("torchvision:resnet18", Options(weights=pickle))
    teacher = load("torchvision:resnet18", Options(weights=pickle, allow_pickle=True))
    assert teacher.identity().weights_format == "pickle"


def test_the_digest_is_of_the_values_however_they_came(models):
    model, safe, pickle = models("torchvision")
    digests = {
        load("torchvision:resnet18", Options(weights=safe)).identity().weights,
        load("torchvision:resnet18", Options(weights=pickle, allow_pickle=True)).identity().weights,
        load(model, Options(input_size=(64, 64), **IMAGENET)).identity().weights,
    }
    assert len(digests) == 1 and None not in digests


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints as trainers write them: name → what is saved."""
    import argparse

    flags = argparse.Namespace(lr=0.1, model="net")  # as torchvision's and DeiT's reference trainers do
    return {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
        "model": {
            "model": state,
            "model_ema": {"module." + k: v * 0 for k, v in state.items()},
            "args": flags,
        },
        "model_ema": {
            "model_ema": {
                "n_averaged": state["head.bias"].sum(),
                **{"module." + k: v for k, v in state.items()},
            }
        },
        "ema": {"ema": state, "step": 5},
        "compiled": {"_orig_mod." + k: v for k, v in state.items()},
        "parallel": {"module._orig_mod." + k: v for k, v in state.items()},
        "lightning": {
            "state_dict": {"model." + k: v for k, v in state.items()},
            "hyper_parameters": {"lr": 0.1},
        },
    }


@pytest.mark.parametrize(
    "kind", ["plain", "state_dict", "model", "model_ema", "ema", "compiled", "parallel", "lightning"]
)
def test_a_checkpoint_is_found_where_trainers_put_it(tmp_path: Path, kind: str):
    import torch

    trained = net()
    with torch.no_grad():
        trained.head.weight += 1
    torch.save(saved(trained.state_dict())[kind], tmp_path / "w.pth")
    teacher = load(net(), Options(weights=tmp_path / "w.pth", allow_pickle=True))
    assert np.array_equal(teacher(small())["logits"], load(trained, Options())(small())["logits"])
    assert teacher.identity().weights == load(trained, Options()).identity().weights


def test_a_name_that_only_looks_like_a_wrappers_is_kept(tmp_path: Path):
    from safetensors.torch import save_file
    from torch import nn

    model = nn.Sequential()
    model.add_module("module", nn.Sequential(nn.Flatten(), nn.Linear(72, 5)))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    options = Options(weights=tmp_path / "w.safetensors", input_size=(4, 6), mean=(0,) * 3, std=(1,) * 3)  # type: ignore[arg-type]
    assert load(model, options)(small())["logits"].shape == (3, 5)


def test_what_does_not_fit_is_named(tmp_path: Path):
    import torch

    torch.save({"head.weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, tmp_path / "w.pth")
    told = (
        r"head.weight is \(2, 4\) in the file and \(2, 3\) in the network; head.bias is missing in the file; "
        "bias is not in the network"
    )
    with pytest.raises(TeacherError, match=told):
        load(net(), Options(weights=tmp_path / "w.pth", allow_pickle=True))
    torch.save({"net": net().state_dict(), "acc": 0.9}, tmp_path / "w.pth")
    with pytest.raises(
        TeacherError, match=r"no state dict .* under state_dict, model, model_ema, ema but net, acc"
    ):
        load(net(), Options(weights=tmp_path / "w.pth", allow_pickle=True))


def test_one_changed_weight_is_another_teacher(models):
    import copy

    import torch

    model, safe, _ = models("torchvision")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc.bias[3] += 1e-6
    before = load("torchvision:resnet18", Options(weights=safe)).identity().weights
    assert load(other, Options(input_size=64, **IMAGENET)).identity().weights != before  # type: ignore[arg-type]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_even_with_the_flag_a_pickle_runs_nothing(tmp_path: Path):
    import torch

    torch.save({"x": Touch(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(TeacherError, match="cannot be read"):
        load(net(), Options(weights=tmp_path / "evil.pth", allow_pickle=True))
    assert not (tmp_path / "ran").exists()


def save_tensor(path: Path) -> None:
    import torch

    torch.save(torch.zeros(3), path)


@pytest.mark.parametrize(
    ("name", "write", "told"),
    [
        ("w.safetensors", lambda p: p.write_bytes(b"nothing of the kind"), "no safetensors file"),
        ("w.safetensors", lambda p: p.write_bytes(b""), "no safetensors file"),
        ("w.safetensors", lambda p: p.mkdir(), "do not exist"),
        ("w.safetensors", lambda p: None, "do not exist"),
        ("w.pth", lambda p: p.write_bytes(b"nothing of the kind"), "cannot be read"),
        ("w.pth", save_tensor, "no state dict"),
    ],
)
def test_weights_that_cannot_be_read_are_named(tmp_path: Path, name: str, write, told: str):
    write(tmp_path / name)
    with pytest.raises(TeacherError, match=rf"{name}.*{told}") as caught:
        load(net(), Options(weights=tmp_path / name, allow_pickle=True))
    assert "\n" not in str(caught.value)


# -- modules of your own ---------------------------------------------------------------------------------------


def net(color: str = "RGB") -> Any:
    """A network so small that it can be followed by hand: the mean of each channel, then a linear layer."""
    import torch
    from torch import nn

    class Net(nn.Module):
        input_spec = {"size": (4, 6), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0), "color": color}  # noqa: RUF012
        classes = ("a", "b")

        def __init__(self):
            super().__init__()
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.dropout = nn.Dropout(0.5)
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.dropout(self.pool(x)))

    torch.manual_seed(1)
    return Net()


def small(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 4, 6, 3), np.uint8)


def test_mean_and_std_are_applied_to_values_from_0_to_1():
    found = load(net(), Options(taps=("pool",)))(small())["pool"]
    expected = (small() / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0]
    assert np.allclose(found, expected.mean(axis=(1, 2)), atol=1e-5)


def test_bgr_turns_the_channels_before_mean_and_std():
    found = load(net("BGR"), Options(taps=("pool",)))(small())["pool"]
    expected = (small()[..., ::-1] / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0]
    assert np.allclose(found, expected.mean(axis=(1, 2)), atol=1e-5)


def test_what_the_user_says_goes_over_what_the_module_says():
    teacher = load(
        net(), Options(mean=(0, 0, 0), std=(1, 1, 1), color="BGR", input_size=(8, 8), taps=("pool",))
    )
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    assert np.allclose(teacher(pixels)["pool"], (pixels[..., ::-1] / 255).mean(axis=(1, 2)), atol=1e-5)
    spec = teacher.identity().input_spec
    assert (spec.size, spec.mean, spec.color) == ((8, 8), (0.0, 0.0, 0.0), "BGR")


def test_it_is_in_evaluation_mode_and_your_own_model_is_as_it_was():
    model = net().train()
    teacher = load(model, Options())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert np.array_equal(teacher(small())["logits"], teacher(small())["logits"])


def test_a_part_put_back_into_training_is_refused():
    model = net()
    teacher = load(model, Options())
    teacher._model.dropout.train()  # type: ignore[attr-defined]
    with pytest.raises(TeacherError, match="training mode"):
        teacher(small())


def test_the_classes_of_a_module_are_kept():
    assert load(net(), Options()).classes == ("a", "b")


def test_a_tap_is_not_changed_by_what_follows_in_place():
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 24, 2))
    teacher = load(model, Options(taps=("0", "1"), input_size=(4, 6), mean=(0.5,) * 3, std=(0.2,) * 3))
    found = teacher(small())
    assert found["0"].min() < 0
    assert np.array_equal(found["1"], np.maximum(found["0"], 0))


def test_taps_are_of_this_batch():
    teacher = load(net(), Options(taps=("pool",)))
    first = teacher(small(1))["pool"].copy()
    second = teacher(small(2))["pool"]
    assert not np.allclose(first, second)
    assert np.array_equal(teacher(small(1))["pool"], first)


def test_a_module_that_runs_twice_is_refused_for_nobody_knows_which_is_meant():
    from torch import nn

    relu = nn.ReLU()
    model = nn.Sequential(nn.Flatten(), relu, nn.Linear(72, 5), relu)
    teacher = load(model, Options(taps=("1",), input_size=(4, 6), mean=(0, 0, 0), std=(1, 1, 1)))
    for _ in range(2):
        with pytest.raises(TeacherError, match="'1' runs more than once"):
            teacher(small())


def test_a_module_that_gives_no_tensor_is_refused():
    from torch import nn

    class Twice(nn.Module):
        def forward(self, x):
            return x, x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = Twice()

        def forward(self, x):
            return self.twice(x)[0].flatten(1)

    teacher = load(Outer(), Options(taps=("twice",), input_size=(4, 6), mean=(0, 0, 0), std=(1, 1, 1)))
    with pytest.raises(TeacherError, match="'twice' gives a tuple, not a tensor"):
        teacher(small())


@pytest.mark.parametrize("form", ["attribute", "mapping", "neither"])
def test_logits_are_found_in_what_the_module_gives(form: str):
    from types import SimpleNamespace

    from torch import nn

    class Wrapped(nn.Module):
        def forward(self, x):
            logits = x.flatten(1)[:, :2]
            return {
                "attribute": SimpleNamespace(logits=logits),
                "mapping": {"logits": logits},
                "neither": [logits],
            }[form]

    teacher = load(Wrapped(), Options(input_size=(4, 6), mean=(0, 0, 0), std=(1, 1, 1)))
    if form == "neither":
        with pytest.raises(TeacherError, match=r"gives a list; a tensor, or \.logits"):
            teacher(small())
    else:
        assert teacher(small())["logits"].shape == (3, 2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_used_and_recorded(precision: str):
    exact, teacher = load(net(), Options()), load(net(), Options(precision=precision))
    found, said = exact(small())["logits"], teacher(small())["logits"]
    assert said.dtype == np.float32 and not np.array_equal(found, said)
    assert np.allclose(found, said, atol=0.1)
    assert teacher.identity().precision == precision


def test_an_unknown_precision_is_named():
    with pytest.raises(SpecError, match="did you mean 'fp16'"):
        load(net(), Options(precision="f16"))


def test_a_module_without_an_input_spec_says_which_flags():
    from torch import nn

    with pytest.raises(TeacherError, match=r"size, mean, std: state it with --input-size 224, --mean, --std"):
        load(nn.Flatten(), Options())


@pytest.mark.parametrize(
    "options",
    [
        {"color": "rgb"},
        {"input_size": (0, 8)},
        {"input_size": (1, 2, 3)},
        {"mean": (1, 2)},
        {"std": (1, 1, float("inf"))},
    ],
    ids=str,
)
def test_an_odd_input_spec_is_one_line(options: dict):
    with pytest.raises(TeacherError, match="an input spec is a size in pixels") as caught:
        load(net(), Options(**options))
    assert "\n" not in str(caught.value)


# -- factories and callables -----------------------------------------------------------------------------------

FACTORIES = """
import numpy as np
input_spec = {"size": 4, "mean": (0, 0, 0), "std": (1, 1, 1)}
not_callable = 3
def plain():
    return lambda pixels: pixels.reshape(len(pixels), -1)[:, :2].astype("float64")
def with_spec():
    f = lambda pixels: {"logits": pixels.mean(axis=(1, 2)), "x": pixels[..., 0]}
    f.input_spec, f.classes, f.weights_digest = {"size": (2, 2)}, ("r", "g", "b"), "ab" * 32
    return f
def on_factory():
    return plain()
on_factory.input_spec = {"size": (7, 5)}
def needs(argument):
    return plain()
def number():
    return 5
def module():
    import torch
    return torch.nn.Flatten()
def bad_digest():
    f = plain()
    f.weights_digest = "abc"
    return f
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "my_teachers_of_a_test.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_teachers_of_a_test", raising=False)
    return "my_teachers_of_a_test"


@pytest.mark.parametrize(
    ("factory", "size"),
    [("plain", (4, 4)), ("with_spec", (2, 2)), ("on_factory", (7, 5)), ("module", (4, 4))],
)
def test_the_input_spec_is_of_the_object_the_factory_or_the_module(mine: str, factory: str, size):
    teacher = load(f"{mine}:{factory}", Options())
    assert teacher.input_spec.size == size
    assert teacher.identity().name == f"{mine}:{factory}"


def test_a_callable_gives_one_array_or_several(mine: str):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    (logits,) = load(f"{mine}:plain", Options())(pixels).values()
    assert logits.dtype == np.float32 and np.array_equal(logits, pixels.reshape(3, -1)[:, :2])
    found = load(f"{mine}:with_spec", Options())(pixels)
    assert set(found) == {"logits", "x"} and found["x"].dtype == np.float32


def test_pixels_are_not_divided_by_a_std_of_nothing():
    import torch

    with pytest.raises(TeacherError, match=r"its std is .*it is above 0"):
        load(torch.nn.Identity(), Options(input_size=(8, 8), mean=(0, 0, 0), std=(1, 0, 1)))


def test_a_teacher_that_fails_is_one_line_that_says_where():
    import torch

    class Narrow(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) @ torch.zeros(7, 2)

    def odd(pixels: np.ndarray) -> np.ndarray:
        raise ValueError("two\nlines")

    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    size = Options(input_size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    for teacher, kind in ((Narrow(), "RuntimeError: .*mat1"), (odd, "ValueError: two ")):
        with pytest.raises(
            TeacherError, match=rf"of shape \(3, 8, 8, 3\): {kind}.*test_teachers.py:\d+"
        ) as caught:
            load(teacher, size)(pixels)
        assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_a_callable_may_say_who_it_is(mine: str):
    teacher = load(f"{mine}:with_spec", Options())
    assert teacher.classes == ("r", "g", "b") and teacher.identity().weights == "ab" * 32
    assert load(f"{mine}:plain", Options()).identity().weights is None


@pytest.mark.parametrize(
    ("spec", "options", "told"),
    [
        (":plian", {}, "has no factory 'plian' .did you mean 'plain'"),
        (":not_callable", {}, "has no factory 'not_callable'"),
        (":needs", {}, "called without arguments"),
        (":number", {}, "is a int, neither a module nor a callable"),
        (":plain", {"weights": Path("w.safetensors")}, "plain callable: it cannot be given weights"),
        (":bad_digest", {}, "64 hex digits"),
        ("", {}, "is written package.module:factory"),
        (":", {}, "is written package.module:factory"),
    ],
)
def test_a_factory_that_is_none_is_one_line(mine: str, spec: str, options: dict, told: str):
    with pytest.raises(TeacherError, match=told) as caught:
        load(mine + spec, Options(**options)).identity()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("torchvison:resnet18", "did you mean 'torchvision'"),
        ("softcache.nothing_here:x", "cannot import 'softcache.nothing_here'"),
        ("nothing.here:x", "cannot import 'nothing'"),
        ("resnet18", "torchvision:NAME"),
    ],
)
def test_a_teacher_that_is_not_there_is_one_line(spec: str, told: str):
    with pytest.raises(SoftcacheError, match=told) as caught:
        load(spec, Options())
    assert type(caught.value) is TeacherError and "\n" not in str(caught.value)


def test_an_object_is_named_by_where_it_was_written():
    from softcache.testing import ToyTeacher, toy_teacher

    assert load(toy_teacher(), Options()).identity().name == "softcache.testing:ToyTeacher"
    assert load(ToyTeacher(), Options()).input_spec.size == (8, 8)


# -- the real one ----------------------------------------------------------------------------------------------


def test_the_given_resnet56_knows_cifar10(shared_data: Path):
    """The first 100 test images, through our source and render: about 93 % are right, as published."""
    pytest.importorskip("softcache_train")
    from softcache.recipe import Recipe, render
    from softcache.source import Source

    source = Source(shared_data / "cifar10", split="test", limit=100)
    weights = shared_data / "weights" / "cifar10_resnet56.safetensors"
    teacher = load("softcache_train.students:resnet56", Options(weights=weights, taps=("layer3",)))
    whole = Recipe("identity", 0)
    pixels = np.stack(
        [render(source.image(i), whole.view(source.ids[i], 0, 32, 32), (32, 32)) for i in range(100)]
    )
    found = teacher(pixels)
    assert found["layer3"].shape == (100, 64, 8, 8)
    assert (found["logits"].argmax(axis=1) == source.labels).mean() >= 0.88
