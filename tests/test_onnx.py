"""``onnx:FILE`` says what onnxruntime says for the pixels, normalised as told; and no other file is part of it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache.errors import SoftcacheError, SpecError, TeacherError
from softcache.source import Source
from softcache.teachers import Options, load
from softcache.teachers.ensemble import assemble

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PLAIN: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}
MATRIX = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)


def write(
    path: Path,
    shape: tuple[Any, ...] = ("n", 3, 6, 8),
    dtype: str = "FLOAT",
    outputs: tuple[str, ...] = ("pooled", "logits"),
    opset: int = 17,
    ir: int = 8,
    metadata: dict[str, str] | None = None,
    inputs: int = 1,
    **save: Any,
) -> Path:
    """The mean of each channel, and those by :data:`MATRIX` as the last output."""
    from onnx import TensorProto, helper, numpy_helper

    last = len(shape) == 4 and shape[3] == 3
    axes = numpy_helper.from_array(np.array([1, 2] if last else [2, 3]), "axes")
    matrix = numpy_helper.from_array(MATRIX, "matrix")
    cast = helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT)
    total = helper.make_node("ReduceSum", ["cast", "axes"], ["sum"], keepdims=0)
    count = numpy_helper.from_array(np.array(48, np.float32), "count")
    mean = helper.make_node("Div", ["sum", "count"], ["pooled"])
    graph = helper.make_graph(
        [cast, total, mean, helper.make_node("MatMul", ["pooled", "matrix"], [outputs[-1]])],
        "g",
        [
            helper.make_tensor_value_info(n, getattr(TensorProto, dtype), shape)
            for n in ("x", "orig_size")[:inputs]
        ],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [matrix, axes, count],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path, **save)
    return path


def means(pixels: np.ndarray = PIXELS, scaled: bool = True) -> np.ndarray:
    x = pixels.astype(np.float64)
    return ((x / 255 - PLAIN["mean"]) / PLAIN["std"] if scaled else x).mean(axis=(1, 2))


@pytest.mark.parametrize("shape", [("n", 3, 6, 8), (1, 3, 6, 8), (2, 3, 6, 8), (None, 6, 8, 3), (2, 6, 8, 3)])
def test_any_layout_and_batch_gives_the_same(tmp_path: Path, shape: tuple[Any, ...]):
    teacher = load(f"onnx:{write(tmp_path / 'm.onnx', shape)}", Options(taps=("pooled",), **PLAIN))
    found = teacher(PIXELS)
    assert teacher.input_spec.size == (6, 8)
    assert set(found) == {"logits", "pooled"} and {v.dtype for v in found.values()} == {np.dtype(np.float32)}
    assert np.allclose(found["pooled"], means(), atol=1e-5)
    assert np.allclose(found["logits"], means() @ MATRIX, atol=1e-4)


def test_the_only_output_is_the_logits_and_has_its_name_too(tmp_path: Path):
    path = write(tmp_path / "m.onnx", outputs=("scores",))
    found = load(f"onnx:{path}", Options(taps=("scores",), **PLAIN))(PIXELS)
    assert np.array_equal(found["logits"], found["scores"])
    assert np.allclose(found["logits"], means() @ MATRIX, atol=1e-4)


def test_a_graph_of_uint8_normalises_by_itself(tmp_path: Path):
    path = write(tmp_path / "m.onnx", dtype="UINT8")
    teacher = load(f"onnx:{path}", Options())
    assert np.allclose(teacher(PIXELS)["logits"], means(scaled=False) @ MATRIX, rtol=1e-5, atol=1e-3)
    with pytest.raises(SpecError, match="normalises by itself"):
        load(f"onnx:{path}", Options(**PLAIN))


def test_half_floats_and_bgr(tmp_path: Path):
    path = write(tmp_path / "m.onnx", dtype="FLOAT16")
    found = load(f"onnx:{path}", Options(taps=("pooled",), color="BGR", **PLAIN))(PIXELS)["pooled"]
    assert np.allclose(found, means(PIXELS[..., ::-1]), atol=2e-3)


def test_a_free_size_is_stated(tmp_path: Path):
    path = write(tmp_path / "m.onnx", ("n", 3, "h", "w"))
    with pytest.raises(TeacherError, match=r"says nothing about its input's size, mean, std.*--input-size"):
        load(f"onnx:{path}", Options())
    assert load(f"onnx:{path}", Options(input_size=(6, 8), **PLAIN)).input_spec.size == (6, 8)


def test_who_it_is(tmp_path: Path):
    path = write(tmp_path / "m.onnx", metadata={"names": "{0: 'a', 1: 'b', 2: 'c', 3: 'd'}"})
    teacher = load(f"onnx:{path}", Options(batch=3, **PLAIN))
    identity = teacher.identity()
    assert identity.weights == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (identity.name, identity.weights_format, identity.batch) == ("onnx:m.onnx", "onnx", 3)
    assert "one thread" in identity.processor and "onnxruntime" in teacher.libraries()
    assert str(tmp_path) not in identity.model_dump_json() and teacher.classes == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("written", "options", "told"),
    [
        ({}, {"taps": ("poled",)}, "no output 'poled' .did you mean 'pooled'.*: it has pooled, logits"),
        (
            {"outputs": ("pooled", "scores")},
            {},
            "no output 'logits', and not one alone: it has pooled, scores",
        ),
        ({"inputs": 2}, {}, r"takes 2 inputs \(x, orig_size\)"),
        ({"shape": ("n", "c", 6, 8)}, {}, r"takes x \['n', 'c', 6, 8\].*an image is"),
        ({"dtype": "DOUBLE"}, {}, r"of tensor\(double\): an image is"),
        ({}, {"input_size": (8, 8)}, "takes images of 6x8 only"),
        ({"opset": 99}, {}, "Opset 99.*export it for an older opset, or install a newer onnxruntime"),
        ({"ir": 99}, {}, "IR version: 99.*install a newer onnxruntime"),
        (
            {"save_as_external_data": True, "location": "w.bin", "size_threshold": 40},
            {},
            "keeps weights in other files: save it as one file",
        ),
        ({}, {"precision": "fp16"}, "in the precision it was exported in"),
        ({}, {"device": "cuda"}, "runs on the CPU"),
        ({}, {"weights": Path("w.safetensors")}, "leave --weights out"),
    ],
)
def test_what_cannot_be_run_is_one_line(tmp_path: Path, monkeypatch, written: dict, options: dict, told: str):
    monkeypatch.chdir(tmp_path)  # where onnxruntime would find the other files
    path = write(tmp_path / "m.onnx", **written)
    with pytest.raises(SoftcacheError, match=told) as caught:
        load(f"onnx:{path}", Options(**PLAIN | options))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("data", "told"), [(b"junk", "is it an ONNX file"), (b"", "is it an ONNX file"), (None, "does not exist")]
)
def test_no_graph_is_one_line(tmp_path: Path, data: bytes | None, told: str):
    if data is not None:
        (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(TeacherError, match=told):
        load(f"onnx:{tmp_path / 'm.onnx'}", Options(**PLAIN))


def test_an_output_that_is_not_of_each_image_is_refused(tmp_path: Path):
    path = write(tmp_path / "m.onnx", outputs=("matrix", "logits"))
    with pytest.raises(TeacherError, match=r"'matrix' of onnx:m.onnx is \(3, 4\) for 5 images"):
        load(f"onnx:{path}", Options(taps=("matrix",), **PLAIN))(PIXELS)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TeacherError, match=r"needs onnxruntime: pip install 'softcache\[onnx\]'"):
        load("onnx:m.onnx", Options())


def test_a_build_keeps_an_output_by_its_name(tmp_path: Path, small_folder: Path, capsys):
    """``logits`` need not be there at all; and the cache is the same built again, and beside the live graph."""
    from softcache import cli

    path = write(tmp_path / "m.onnx", outputs=("pooled", "scores"))
    given = ["--source", str(small_folder), "--teacher", f"onnx:{path}"]
    normal = ["--mean", "0.1,0.2,0.3", "--std", "0.5,0.25,2"]
    out = str(tmp_path / "c")
    assert cli.build_cache([*given, *normal, "--target", "scores=f16", "--no-progress", "-o", out]) == 0
    cache = sc.open(out)
    assert cache.targets["scores"].shape == (4,)
    capsys.readouterr()
    assert cli.main(["verify", out, "--live", "6", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["cache"]["relative_l2"] < 1e-3


def detector(path: Path, side: int, value: float = 0.5) -> Path:
    """A YOLO of two classes that says ``value`` everywhere, of pictures of ``side``."""
    from onnx import TensorProto, helper, numpy_helper

    cells = sum((side // stride) ** 2 for stride in (8, 16, 32))
    nodes = [
        helper.make_node("ReduceMax", ["images", "axes"], ["most"], keepdims=0),
        helper.make_node("Mul", ["most", "nothing"], ["zero"]),
        helper.make_node("Reshape", ["zero", "rows"], ["row"]),
        helper.make_node("Add", ["row", "said"], ["out"]),
    ]
    arrays = {
        "axes": np.array([1, 2, 3]),
        "nothing": np.zeros(1, np.float32),
        "rows": np.array([-1, 1, 1]),
        "said": np.where(np.arange(6)[:, None] < 4, np.float32(value), np.full((6, cells), 0.5, np.float32)),
    }
    shape = ["n", 3, side, side]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 6, cells])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


@pytest.mark.filterwarnings("error")
def test_boxes_that_are_not_finite_come_without_a_warning(tmp_path: Path):
    path = detector(tmp_path / "m.onnx", 32, np.inf)
    found = load(f"onnx:{path}", Options(taps=("detections",)))(np.zeros((1, 32, 32, 3), np.uint8))
    assert not np.isfinite(found["detections"][..., 2:]).any()


def test_another_graph_than_the_caches_is_told_so(tmp_path: Path, small_folder: Path, capsys):
    from softcache import cli

    ours, other = detector(tmp_path / "a.onnx", 32, 8), detector(tmp_path / "b.onnx", 64, 8)
    given, out = ["--source", str(small_folder), "--teacher"], str(tmp_path / "c")
    more = ["--target", "detections=all", "--ignore-labels", "--no-progress", "-o", out]
    assert cli.build_cache([*given, f"onnx:{ours}", *more]) == 0
    renamed = ours.rename(tmp_path / "d.onnx")
    assert cli.main(["verify", out, "--live", "2", *given, f"onnx:{renamed}"]) == 0
    capsys.readouterr()
    assert cli.main(["verify", out, "--live", "2", *given, f"onnx:{other}"]) == 3
    assert "b.onnx is not the graph that the cache was built with: its sha256 is" in capsys.readouterr().err


# -- real ones -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet20(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The given ResNet-20: its safetensors, and exported by torch with a batch of any size."""
    pytest.importorskip("onnxscript")
    import torch
    from safetensors.torch import load_file

    students = pytest.importorskip("softcache_train.students")
    weights = shared_data / "weights" / "cifar10_resnet20.safetensors"
    model = students.resnet20()
    model.load_state_dict(load_file(weights))
    path = tmp_path_factory.mktemp("onnx") / "resnet20.onnx"
    torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 3, 32, 32),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
        external_data=False,
        verbose=False,
    )
    return weights, path


IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def test_an_exported_resnet20_says_what_torch_says(
    resnet20: tuple[Path, Path], shared_data: Path, tmp_path: Path
):
    weights, path = resnet20
    pixels = np.random.default_rng(3).integers(0, 256, (7, 32, 32, 3), np.uint8)
    torch_says = load("softcache_train.students:resnet20", Options(weights=weights))(pixels)["logits"]
    teacher = load(f"onnx:{path}", Options(**IMAGENET))
    assert np.allclose(teacher(pixels)["logits"], torch_says, atol=1e-4)
    pair = assemble(
        [f"onnx:{path}", "softcache_train.students:resnet20"], [None, weights], Options(**IMAGENET)
    )
    assert np.allclose(pair(pixels)["logits"], torch_says, atol=1e-4)

    source = Source(shared_data / "cifar10", split="test", limit=300)
    common: dict[str, Any] = {"source": source, "targets": "logits=full(f16)", "progress": False}
    a = sc.build(tmp_path / "a", teacher=f"onnx:{path}", **IMAGENET, **common)
    b = sc.build(tmp_path / "b", teacher="softcache_train.students:resnet20", weights=weights, **common)
    reports = [c.manifest.report for c in (a, b) if c.manifest is not None]
    assert reports[0].top1 == reports[1].top1 and 0.87 < (reports[0].top1 or 0) < 0.96
    assert sc.diff(a, b)["values"]["logits"]["kl_T1"] < 1e-6


def test_a_detector_of_others_answers_by_its_outputs_name(shared_data: Path):
    """YOLOX-Nano takes BGR values of 0…255, one image at a time."""
    path = shared_data / "weights" / "yolox_nano_coco_416.onnx"
    byte = (1 / 255,) * 3
    teacher = load(f"onnx:{path}", Options(taps=("output",), color="BGR", mean=(0, 0, 0), std=byte))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 416, 416, 3), np.uint8)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for row, image in zip(teacher(pixels)["output"], pixels, strict=True):
        x = image[None, ..., ::-1].transpose(0, 3, 1, 2).astype(np.float32)
        assert row.shape == (3549, 85)
        assert np.allclose(row, session.run(["output"], {"images": x})[0][0], atol=1e-3)
