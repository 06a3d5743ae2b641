"""What is captured of transformers' detectors is what the installed version computes, layer by layer, and at probes."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import socket
from functools import cache
from pathlib import Path
from typing import Any

import detectors
import numpy as np
import pytest

from softcache.errors import TeacherError
from softcache.teachers import Options, constants_of, load

pytest.importorskip("transformers")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PLAIN = ((0, 0, 0), (1, 1, 1))
STARTED = [kind for kind in detectors.HF if not kind.startswith("detr")]

every_kind = pytest.mark.parametrize("kind", detectors.HF)
every_started = pytest.mark.parametrize("kind", STARTED)


@pytest.fixture(scope="module")
def pixels(shared_data: Path) -> np.ndarray:
    return detectors.pictures(shared_data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every network, as ``save_pretrained`` leaves it."""
    from transformers.utils import logging as told

    told.disable_progress_bar()
    found = {kind: tmp_path_factory.mktemp("hf") / kind for kind in detectors.HF}
    for kind, folder in found.items():
        detectors.hf(kind).save_pretrained(folder)
    return found


def network(folder: Path) -> Any:
    """The network in a folder, as transformers loads it; a copy of your own."""
    return copy.deepcopy(loaded(folder))


@cache
def loaded(folder: Path) -> Any:
    from transformers import AutoModelForObjectDetection

    return AutoModelForObjectDetection.from_pretrained(folder).eval()


def teacher(folder: Path, *taps: str, **options: Any) -> Any:
    return load(f"hf:{folder}", Options(taps=taps, input_size=detectors.SIZE, **options))


def run(model: Any, kind: str, pixels: np.ndarray) -> Any:
    import torch

    mean, std = PLAIN if kind.startswith("rt") else IMAGENET
    with torch.no_grad():
        return model(detectors.normalised(pixels, mean, std))


def layers(said: dict[str, np.ndarray], teacher: Any, target: str = "queries") -> dict[str, np.ndarray]:
    """Parts of the items, ``(B, layers, queries, columns)``."""
    layout = teacher.layouts[target]
    rows = said[target].reshape(len(said[target]), layout.layers, -1, layout.width)
    return dict(layout.parts(rows))


def close(a: Any, b: Any, atol: float = 1e-4) -> bool:
    return np.shape(a) == np.shape(b) and np.allclose(a, b, atol=atol, rtol=1e-4)


@every_kind
def test_detections_are_the_models_own_answer(kind: str, folders, pixels):
    made = teacher(folders[kind], "detections")
    parts = dict(made.layouts["detections"].parts(made(pixels)["detections"]))
    said = run(network(folders[kind]), kind, pixels)
    assert close(parts["logits"], said.logits) and close(
        parts["boxes"], detectors.corners(said.pred_boxes.numpy())
    )
    # and they are of the image, not of the network alone
    assert np.abs(np.diff(parts["logits"], axis=0)).max() > 1e-2
    assert np.abs(np.diff(parts["boxes"], axis=0)).max() > 1e-3


@pytest.mark.parametrize(
    "kind", [kind for kind in detectors.HF if kind != "detr-auxiliary"]
)  # see the next test
def test_every_layer_says_what_the_network_says_that_ends_there(kind: str, folders, pixels):
    """A decoder of fewer layers is the independent answer, heads and refinement and all."""
    made, whole = teacher(folders[kind], "queries"), network(folders[kind])
    parts = layers(made(pixels), made)
    assert parts["logits"].shape[1] == 3
    for number in range(3):
        said = run(detectors.cut(whole, number + 1), kind, pixels)
        assert close(parts["logits"][:, number], said.logits), number
        assert close(parts["boxes"][:, number], detectors.corners(said.pred_boxes.numpy())), number
        assert close(parts["embedding"][:, number], said.last_hidden_state), number
    assert not np.allclose(parts["logits"][:, 0], parts["logits"][:, 2], atol=1e-3)


def test_a_detr_trained_with_auxiliary_losses_says_in_its_layers_what_it_was_trained_on(folders, pixels):
    """Where a config asks for them, transformers normalises between the layers too."""
    folder = folders["detr-auxiliary"]
    made, model = teacher(folder, "queries", "detections"), network(folder)
    noted: list[Any] = []
    model.model.register_forward_hook(lambda _m, _i, out: noted.append(out.intermediate_hidden_states))
    said, answer = run(model, "detr", pixels), made(pixels)
    parts = layers(answer, made)
    assert close(parts["embedding"][:, :2], noted[0].transpose(0, 1)[:, :2])
    assert close(parts["logits"][:, 2], said.logits)


@every_started
def test_the_first_layer_starts_from_the_models_references_and_each_next_one_from_where_it_came(
    kind, folders, pixels
):
    made = teacher(folders[kind], "queries")
    parts, said = layers(made(pixels), made), run(network(folders[kind]), kind, pixels)
    first = said.init_reference_points
    first = (first.sigmoid() if kind.startswith("rt") else first).numpy()
    first = np.pad(first, ((0, 0), (0, 0), (0, 4 - first.shape[-1])))
    assert close(parts["reference"][:, 0], detectors.corners(first))
    if kind == "deformable":
        assert close(parts["reference"][:, 1], parts["reference"][:, 0])
    else:
        assert close(parts["reference"][:, 1:], parts["boxes"][:, :-1])


@every_kind
def test_maps_are_what_the_encoder_gives(kind: str, folders, pixels):
    import torch

    names = {"d": ["p5"], "r": ["p3", "p4", "p5"]}
    names = ["p3", "p4", "p5", "p6"] if kind.startswith("deformable") else names[kind[0]]
    made, model = teacher(folders[kind], *names), network(folders[kind])
    noted: list[Any] = []
    model.model.encoder.register_forward_hook(lambda _m, _i, out: noted.append(out.last_hidden_state))
    run(model, kind, pixels)
    shapes = [(8, 12), (4, 6), (2, 3), (1, 2)]
    found = made(pixels)
    assert sorted(found) == names
    if kind.startswith("rt"):
        wanted = noted[0]
    elif kind.startswith("deformable"):
        pieces = torch.split(noted[0], [h * w for h, w in shapes], dim=1)
        wanted = [p.mT.reshape(2, 32, h, w) for p, (h, w) in zip(pieces, shapes, strict=True)]
    else:
        wanted = [noted[0].mT.reshape(2, 32, 2, 3)]
    for name, map in zip(names, wanted, strict=True):
        assert close(found[name], map), name


def test_a_map_it_does_not_have_is_refused_with_those_it_has(folders, pixels):
    with pytest.raises(TeacherError, match="has no map 'p3'; it has p5"):
        teacher(folders["detr"], "p3")(pixels)


@every_kind
def test_a_module_is_tapped_as_of_any_network(kind: str, folders, pixels):
    made, model = (
        teacher(folders[kind], "model.backbone.model.encoder.stages.3", "detections"),
        network(folders[kind]),
    )
    noted: list[Any] = []
    model.get_submodule("model.backbone.model.encoder.stages.3").register_forward_hook(
        lambda _m, _i, o: noted.append(o)
    )
    run(model, kind, pixels)
    found = made(pixels)
    assert close(found["model.backbone.model.encoder.stages.3"], noted[0]) and "detections" in found


# -- probes ----------------------------------------------------------------------------------------------------


def boxes(seed: int, n: int = 9) -> np.ndarray:
    """float32 ``(2, n, 4)``, x1, y1, x2, y2 in the unit square."""
    rng = np.random.default_rng(seed)
    centre, side = rng.uniform(0.1, 0.9, (2, n, 2)), rng.uniform(0.05, 0.5, (2, n, 2))
    return np.concatenate([centre - side / 2, centre + side / 2], axis=-1).astype(np.float32)


@every_started
def test_probes_where_the_models_own_queries_start_say_what_those_say(kind: str, folders, pixels, tmp_path):
    import torch

    model = network(folders[kind])
    if kind.startswith(
        "rt"
    ):  # then a query starts at the anchor of its cell: the cell of the probe is the one it is made of
        with torch.no_grad():
            model.model.enc_bbox_head.layers[-1].weight.zero_()
            model.model.enc_bbox_head.layers[-1].bias.zero_()
    model.save_pretrained(tmp_path)
    made = teacher(tmp_path, "queries", "probes")
    start = layers(made(pixels), made)["reference"][:, 0]
    if kind in ("deformable", "deformable-refined"):  # points; a probe there is a box around one
        start = start + np.array([-0.1, -0.1, 0.1, 0.1], np.float32)
    said = made(pixels, probes=start)
    own, probed = layers(said, made), layers(said, made, "probes")
    for part in ("embedding", "logits", "boxes"):
        assert close(probed[part], own[part], atol=2e-4), part
    assert np.array_equal(probed["reference"][:, 0].round(5), start.round(5))


@every_started
def test_probes_are_in_no_order_and_answer_for_their_places(kind: str, folders, pixels):
    made = teacher(folders[kind], "probes")
    a, b = boxes(0), boxes(0)
    turn = np.random.default_rng(2).permutation(9)
    b = b[:, turn]
    first, second, third = (layers(made(pixels, probes=p), made, "probes") for p in (a, b, boxes(1)))
    for part in ("embedding", "logits", "boxes", "reference"):
        assert close(second[part], first[part][:, :, turn], atol=2e-4), part
    assert np.abs(first["logits"] - third["logits"]).max() > 1e-2
    assert np.abs(np.diff(first["logits"], axis=0)).max() > 1e-2  # and for the image


def test_an_rt_detr_probe_is_made_of_the_cell_under_its_centre_on_the_level_of_its_size(folders, pixels):
    """Boxes of 0.05, 0.1 and 0.2 are the anchors of the three levels; what the decoder is given is noted."""
    made = teacher(folders["rt-detr"], "probes", "p3")
    net = made._model.model
    noted: dict[str, list[Any]] = {"cells": [], "given": []}
    net.enc_output.register_forward_hook(lambda _m, _i, out: noted["cells"].append(out))
    net.decoder.register_forward_pre_hook(
        lambda _m, _a, given: noted["given"].append(given), with_kwargs=True
    )
    centres = np.array([[0.3, 0.7], [0.3, 0.7], [0.3, 0.7], [0.999, 0.999]])
    sides = np.array([[0.05, 0.05], [0.2, 0.05], [0.3, 0.3], [0.9, 0.9]])
    probes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1).astype(np.float32)
    made(pixels, probes=np.stack([probes, probes]))
    cells = noted["cells"][0].numpy()
    # levels of 8x12, 4x6 and 2x3 cells; column 0.3·w, row 0.7·h
    at = [5 * 12 + 3, 96 + 2 * 6 + 1, 96 + 24 + 1 * 3 + 0, 96 + 24 + 1 * 3 + 2]
    assert np.array_equal(noted["given"][1]["inputs_embeds"].numpy(), cells[:, at])


@pytest.mark.parametrize("kind", ["detr", "detr-auxiliary"])
def test_detr_has_no_probes(kind: str, folders):
    with pytest.raises(TeacherError, match=r"has no target 'probes'.*it has detections, queries, maps"):
        teacher(folders[kind], "probes")


def test_without_points_the_rest_is_answered(folders, pixels):
    assert set(teacher(folders["rt-detr"], "probes", "queries")(pixels)) == {"queries"}


# -- loading ---------------------------------------------------------------------------------------------------


@every_kind
def test_identity_and_layouts(kind: str, folders):
    made = teacher(folders[kind], "detections")
    identity = made.identity()
    assert (
        identity.name == f"hf:{type(network(folders[kind])).__name__}"
        and identity.weights_format == "safetensors"
    )
    assert identity.weights and str(folders[kind].parent) not in identity.model_dump_json()
    assert {"torch", "transformers"} <= made.libraries().keys()
    layout = made.layouts["queries"]
    if kind.startswith("detr"):
        assert (layout.score, layout.background, layout.columns["logits"]) == ("softmax", 6, 7)
        assert "probes" not in made.layouts
    else:
        assert (layout.score, layout.background, layout.columns["logits"]) == ("sigmoid", None, 6)
        assert made.layouts["probes"] == layout


def test_no_network_is_reached(folders, pixels, monkeypatch, tmp_path: Path):
    from huggingface_hub import constants

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was reached for")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    for kind in ("detr", "rt-detr-v2"):
        teacher(folders[kind], "detections")(pixels)
    assert constants.HF_HUB_OFFLINE is False
    with pytest.raises(
        TeacherError, match=r"facebook/detr-resnet-50.*nothing is downloaded: save the model there once"
    ):
        load("hf:facebook/detr-resnet-50", Options(taps=("detections",)))
    # a config from before backbones had configs of their own, whose name might be looked up
    said = json.loads((folders["deformable"] / "config.json").read_text())
    del said["backbone_config"]
    said |= {"backbone": "microsoft/resnet-18", "use_timm_backbone": False}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(TeacherError, match="cannot make the model"):
        load(f"hf:{tmp_path / 'config.json'}", Options(taps=("detections",)))


def test_a_config_alone_has_random_weights_the_same_every_time_and_says_so(folders, pixels, caplog):
    import torch

    file = folders["rt-detr"] / "config.json"
    with caplog.at_level(logging.WARNING):
        a, b = (load(f"hf:{file}", Options(taps=("detections",))) for _ in range(2))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        load(f"hf:{file}", Options(taps=("detections",)))
    assert torch.equal(before, torch.get_rng_state())
    assert "random" in caplog.text and "--weights FILE" in caplog.text
    assert a.identity().weights == b.identity().weights and a.identity().weights_format is None


@every_kind
def test_a_config_with_weights_is_the_folder(kind: str, folders, pixels):
    folder = folders[kind]
    apart = load(
        f"hf:{folder / 'config.json'}",
        Options(taps=("detections",), weights=folder / "model.safetensors", input_size=detectors.SIZE),
    )
    whole = teacher(folder, "detections")
    assert apart.identity() == whole.identity()
    assert np.array_equal(apart(pixels)["detections"], whole(pixels)["detections"])


def test_a_folder_as_published_of_old(pixels, tmp_path: Path):
    """A backbone of timm, told by its name beside the config, under the module names of those days."""
    from safetensors.torch import load_file, save_file

    pytest.importorskip("timm")
    model = detectors.hf("detr-timm")
    model.save_pretrained(tmp_path)
    new = teacher(tmp_path, "detections")(pixels)["detections"]
    said = json.loads((tmp_path / "config.json").read_text())
    del said["backbone_config"]
    said |= {"backbone": "resnet18", "use_timm_backbone": True, "use_pretrained_backbone": True}
    (tmp_path / "config.json").write_text(json.dumps(said))
    state = load_file(tmp_path / "model.safetensors")
    old = ("backbone.model.", "backbone.conv_encoder.model.")
    state = {n if old[1] in n else n.replace(*old): v for n, v in state.items()}
    assert any(old[1] in name for name in state)
    save_file(state, tmp_path / "model.safetensors")
    assert np.array_equal(teacher(tmp_path, "detections")(pixels)["detections"], new)
    assert close(new[..., :7], run(model, "detr", pixels).logits)


def test_weights_in_several_files_are_one(folders, pixels, tmp_path: Path):
    network(folders["rt-detr"]).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert (
        teacher(tmp_path, "detections").identity().weights
        == teacher(folders["rt-detr"], "detections").identity().weights
    )


def test_a_pickle_needs_the_flag(folders, tmp_path: Path):
    import torch

    shutil.copy(folders["detr"] / "config.json", tmp_path)
    with pytest.raises(TeacherError, match=r"holds no model.safetensors.*--weights"):
        teacher(tmp_path, "detections")
    torch.save(network(folders["detr"]).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=r"a pickle can run any code.*--allow-pickle"):
        teacher(tmp_path, "detections")
    made = teacher(tmp_path, "detections", allow_pickle=True)
    assert made.identity().weights_format == "pickle"
    assert made.identity().weights == teacher(folders["detr"], "detections").identity().weights


def test_weights_that_do_not_fit_are_named(folders, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    state = load_file(folders["detr"] / "model.safetensors")
    state["bbox_predictor.layers.1.bias"] = state["bbox_predictor.layers.1.bias"][:3].clone()
    del state["class_labels_classifier.bias"]
    state["extra.weight"] = state["class_labels_classifier.weight"].clone()
    shutil.copy(folders["detr"] / "config.json", tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(TeacherError) as told:
        teacher(tmp_path, "detections")
    said = str(told.value)
    assert "class_labels_classifier.bias is missing in the file" in said
    assert "bbox_predictor.layers.1.bias is (3,) in the file and (32,) in the network" in said
    assert "extra.weight is not in the network" in said


def test_half_precision_weights_run_in_full(folders, pixels, tmp_path: Path):
    network(folders["rt-detr"]).half().save_pretrained(tmp_path)
    said = run(network(folders["rt-detr"]).half().float(), "rt-detr", pixels)
    assert close(teacher(tmp_path, "detections")(pixels)["detections"][..., :6], said.logits)


@pytest.mark.parametrize(
    ("said", "size", "mean"),
    [
        ({"size": {"height": 64, "width": 96}, "do_normalize": False, "image_mean": [9, 9, 9], "image_std": [9, 9, 9]},
         (64, 96), (0, 0, 0)),
        ({"size": {"shortest_edge": 480, "longest_edge": 1333}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3},
         (480, 480), (0.5, 0.4, 0.3)),
        ({"size": 320, "do_rescale": False, "image_mean": [127.5, 102, 76.5], "image_std": [51] * 3}, (320, 320),
         (0.5, 0.4, 0.3)),
        (None, (800, 800), IMAGENET[0]),
    ],
)  # fmt: skip
def test_the_input_is_what_the_preprocessor_says(said, size, mean, folders, tmp_path: Path):
    folder = shutil.copytree(folders["detr"], tmp_path / "model")
    if said is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    spec = load(f"hf:{folder}", Options(taps=("detections",))).input_spec
    assert spec.size == size and np.allclose(spec.mean, mean)
    if said is not None and mean[0] == 0.5:
        assert np.allclose(spec.std, 0.2)


def test_the_preprocessor_of_transformers_sees_what_the_network_sees(folders, pixels, tmp_path: Path):
    """Its own image processor, on pixels of the right size, gives the very input."""
    from transformers import RTDetrImageProcessor

    folder = shutil.copytree(folders["rt-detr"], tmp_path / "model")
    processor = RTDetrImageProcessor(size={"height": 64, "width": 96})
    processor.save_pretrained(folder)
    made, model = load(f"hf:{folder}", Options(taps=("detections",))), network(folder)
    said = model(**processor(images=list(pixels), return_tensors="pt"))
    assert close(made(pixels)["detections"][..., :6], said.logits.detach())


def test_an_older_transformers_is_told_apart(folders, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.2.0")
    with pytest.raises(TeacherError, match=r"needs transformers 5\.3 or newer, and 5\.2\.0 is here"):
        teacher(folders["detr"], "detections")


@pytest.mark.parametrize(
    ("kind", "width"), [("detr", 32), ("deformable", 64), ("deformable-two-stage", 0), ("rt-detr", 0)]
)
def test_what_is_learned_of_queries_is_a_constant(kind: str, width: int, folders):
    found = constants_of(teacher(folders[kind], "queries"))
    if not width:
        assert found == {}
    else:
        learned = network(folders[kind]).model.query_position_embeddings.weight.detach()
        assert np.array_equal(found["query_position"], learned) and learned.shape == (7, width)


@every_kind
def test_in_bfloat16_it_says_about_the_same(kind: str, folders, pixels):
    probed = {"probes": boxes(0)} if kind in STARTED else {}
    full, half = (
        teacher(folders[kind], "queries", *probed, precision=precision)(pixels, **probed)
        for precision in ("fp32", "bf16")
    )
    for name in full:
        assert np.isfinite(half[name]).all() and half[name].dtype == np.float32
    if kind.startswith("d"):  # an RT-DETR may choose other cells
        assert np.abs(full["queries"] - half["queries"]).mean() < 0.1


def test_what_is_no_detector_of_these_is_told(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        TeacherError,
        match=r"config of a 'llama', and hf: runs deformable_detr, detr, rt_detr, rt_detr_v2: ",
    ):
        load(f"hf:{tmp_path}", Options())
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(TeacherError, match=r"config\.json cannot be read as JSON"):
        load(f"hf:{tmp_path}", Options())


def test_a_detector_has_no_logits(folders):
    with pytest.raises(TeacherError, match=r"is a detector, without logits.*'detections=…'"):
        load(f"hf:{folders['detr']}", Options())


def test_names_of_classes_are_the_configs_where_somebody_gave_some(folders, tmp_path: Path):
    assert teacher(folders["detr"], "detections").classes is None
    folder = shutil.copytree(folders["detr"], tmp_path / "model")
    said = json.loads((folder / "config.json").read_text())
    said["id2label"] = {str(i): n for i, n in enumerate(["N/A", "ant", "bee", "N/A", "cow", "dog"])}
    (folder / "config.json").write_text(json.dumps(said))
    assert teacher(folder, "detections").classes == ("N/A", "ant", "bee", "N/A", "cow", "dog")


@every_kind
def test_a_model_of_your_own_is_the_same_teacher(kind: str, folders, pixels):
    model = network(folders[kind])
    own = load(model, Options(taps=("detections",), input_size=detectors.SIZE))
    assert np.array_equal(
        own(pixels)["detections"], teacher(folders[kind], "detections")(pixels)["detections"]
    )


def test_without_the_library_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TeacherError, match=r"needs transformers: pip install 'softcache\[hf\]'"):
        load("hf:folder", Options())
