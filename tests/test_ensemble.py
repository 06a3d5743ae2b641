"""Several teachers as one: the mean of what each says by itself, and who each was is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache.errors import MismatchError, SoftcacheError, SpecError, TeacherError
from softcache.source import Source
from softcache.teachers import Options, load
from softcache.teachers.ensemble import assemble
from softcache.testing import ToyImages, toy_teacher


class Linear:
    """``classes`` logits from the pixels, by a matrix of its own; exact in float32."""

    def __init__(self, seed: int, classes: int = 4, size: int = 8, names: tuple[str, ...] | None = None):
        self.input_spec = {"size": size}
        self.matrix = np.random.default_rng(seed).integers(-3, 4, (size * size * 3, classes))
        self.weights_digest = f"{seed:064x}"
        if names:
            self.classes = names

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        rows = pixels.reshape(len(pixels), -1).astype(np.int64)
        return {"logits": rows @ self.matrix / 256, "first": rows[:, :5]}


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
A, B, C = Linear(1), Linear(2), Linear(3)


def said(teacher: Linear, pixels: np.ndarray = PIXELS) -> np.ndarray:
    return teacher(pixels)["logits"]


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def test_logits_are_the_geometric_mean_at_every_temperature():
    teacher = assemble([A, B, C], None, Options())
    found = teacher(PIXELS)
    assert set(found) == {"logits"} and found["logits"].dtype == np.float32
    for T in (1.0, 4.0, 20.0):  # noqa: N806
        geometric = np.prod([softmax(said(t) / T) for t in (A, B, C)], axis=0) ** (1 / 3)
        geometric /= geometric.sum(axis=1, keepdims=True)
        assert np.allclose(softmax(found["logits"].astype(np.float64) / T), geometric, atol=1e-6)


def test_each_members_own_outputs_are_there_where_they_are_asked_for():
    found = assemble([A, B], None, Options(taps=("1.logits", "0.first")))(PIXELS)
    assert set(found) == {"logits", "1.logits", "0.first"}
    assert np.allclose(found["1.logits"], said(B), rtol=1e-6)
    assert np.array_equal(found["0.first"], A(PIXELS)["first"])


def test_who_they_were_is_recorded():
    teacher = assemble([A, B], None, Options(batch=5))
    identity = teacher.identity()
    assert identity.members is not None and identity.batch == 5
    assert [w.weights for w in identity.members] == [A.weights_digest, B.weights_digest]
    assert identity.members[1].name == load(B, Options()).identity().name
    others = [assemble(t, None, Options()).identity().weights for t in ([B, A], [A, C], [A, B, C])]
    assert identity.weights not in others and None not in others
    assert assemble([A, toy_teacher], None, Options(input_size=(8, 8))).identity().weights is None


def test_one_is_no_ensemble():
    for one in (A, [A]):
        identity = assemble(one, None, Options()).identity()
        assert identity.members is None and identity.weights == A.weights_digest
        assert not {"members", "flip_tta"} & set(identity.model_dump())


def test_the_mean_with_the_mirror_image():
    found = assemble([A, B], None, Options(flip_tta=True, taps=("0.logits",)))(PIXELS)
    mirrored = PIXELS[:, :, ::-1]
    own = (said(A) + said(A, mirrored)) / 2
    both = (own + (said(B) + said(B, mirrored)) / 2) / 2
    assert np.allclose(found["0.logits"], own, rtol=1e-6) and np.allclose(found["logits"], both, rtol=1e-6)
    single = assemble(A, None, Options(flip_tta=True))
    assert np.allclose(single(PIXELS)["logits"], own, rtol=1e-6) and set(single(PIXELS)) == {"logits"}
    assert single.identity().flip_tta and not assemble(A, None, Options()).identity().flip_tta


@pytest.mark.filterwarnings("error")
def test_means_of_what_is_not_finite_warn_of_nothing():
    def endless(sign: float) -> Any:
        def teacher(pixels: np.ndarray) -> dict[str, np.ndarray]:
            logits = np.full((len(pixels), 4), 1e300)
            logits[:, 0] = np.where(pixels[:, 0, 0, 0] > pixels[:, 0, -1, 0], np.inf, -np.inf) * sign
            return {"logits": logits}

        return teacher

    both = [endless(1), endless(-1)]
    found = assemble(both, None, Options(input_size=(8, 8), flip_tta=True))(PIXELS)["logits"]
    assert not np.isfinite(found).any()


@pytest.mark.parametrize(
    ("teachers", "weights", "options", "kind", "told"),
    [
        ([A, Linear(4, size=6)], None, {}, MismatchError, "0 .*:Linear.* and 1 .* see 8x8 and 6x6 pixels"),
        ([A, B, Linear(4, classes=5)], None, {}, MismatchError, r"teacher 2 is the first.*\(4,\).*\(5,\)"),
        ([A, B], ["a.safetensors"], {}, SpecError, "2 teachers and 1 file of weights"),
        (A, ["a.safetensors", "b.safetensors"], {}, SpecError, "1 teacher and 2 files"),
        ([], None, {}, SpecError, "no teacher"),
        ([A, B], None, {"taps": ("first",)}, TeacherError, "2 teachers have no target 'first'.*'1.layer3'"),
        ([A, B], None, {"taps": ("2.logits",)}, TeacherError, "2 teachers have no target '2.logits'"),
        ([A, B], None, {"taps": ("0.first",), "flip_tta": True}, SpecError, "'0.first' has no mean over"),
        (A, None, {"taps": ("first",), "flip_tta": True}, SpecError, "'first' has no mean over"),
        (
            [Linear(1, names=("a", "b", "c", "d")), Linear(2, names=("b", "a", "c", "d"))],
            None,
            {},
            MismatchError,
            "name other classes, or in another order",
        ),
    ],
)
def test_what_does_not_go_together_is_told(teachers: Any, weights: Any, options: Any, kind: type, told: str):
    with pytest.raises(kind, match=told) as caught:
        assemble(teachers, weights, Options(**options))(PIXELS)
    assert isinstance(caught.value, SoftcacheError) and "\n" not in str(caught.value)


# -- in a build ------------------------------------------------------------------------------------------------


def build(path: Path, **options: Any) -> sc.Cache:
    settings: dict[str, Any] = {
        "source": ToyImages(12),
        "teacher": [A, B],
        "recipe": "random_resized_crop(8)",
    }
    return sc.build(path, **settings | {"batch": 4, "views": 2, "progress": False} | options)


def test_a_build_keeps_the_mean_and_the_members(tmp_path: Path):
    kept = {"logits": "full(f16)", "0.logits": "full(f16)", "1.logits": "full(f16)", "1.first": "f16"}
    cache = build(tmp_path / "c", targets=kept)
    found = cache.read(1, np.arange(12))
    assert {n: t.kind for n, t in cache.targets.items()} == {
        "logits": "logits", "0.logits": "logits", "1.logits": "logits", "1.first": "embedding",
    }  # fmt: skip
    mean = (found["0.logits"].values + found["1.logits"].values) / 2
    assert np.allclose(found["logits"].values, mean, rtol=2e-3, atol=1e-2)
    again = build(tmp_path / "c", targets=kept)
    assert again.teacher_rows == 0 and again.digest == cache.digest
    with pytest.raises(MismatchError, match=r"teacher\.weights"):
        build(tmp_path / "c", targets=kept, teacher=[A, C])
    with pytest.raises(MismatchError, match=r"teacher\.flip_tta is None there and True here"):
        build(tmp_path / "d", targets=["logits=full(f16)"]) and build(tmp_path / "d", flip_tta=True)


def test_members_of_other_classes_than_the_source_are_refused_without_their_mean_too(tmp_path: Path):
    five = [Linear(1, classes=5), Linear(2, classes=5)]
    with pytest.raises(MismatchError, match="answers 5 classes and the source names 4"):
        build(tmp_path / "c", teacher=five, targets=["0.logits=full(f16)", "1.logits=full(f16)"])


NETS = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, mean, color):
        super().__init__()
        self.input_spec = {"size": 8, "mean": (mean,) * 3, "std": (0.5,) * 3, "color": color}
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(12, 4)
    def forward(self, x):
        return self.head(self.pool(x).flatten(1))
def one():
    torch.manual_seed(1)
    return Net(0.1, "RGB")
def two():
    torch.manual_seed(2)
    return Net(0.4, "BGR")
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch) -> Path:
    """A module ``nets_of_a_test`` of two networks that normalise differently, and files of weights for each."""
    import sys

    save_file = pytest.importorskip("safetensors.torch").save_file
    (tmp_path / "nets_of_a_test.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_of_a_test", raising=False)
    import nets_of_a_test as made  # type: ignore[import-not-found]

    for number, net in enumerate((made.two(), made.one())):  # other values than the factories draw
        save_file(net.state_dict(), tmp_path / f"{number}.safetensors")
    return tmp_path


SAID = [
    "--teacher", "nets_of_a_test:one", "--weights", "0.safetensors",
    "--teacher", "nets_of_a_test:two", "--weights", "1.safetensors",
]  # fmt: skip


def test_the_command_line_builds_checks_and_trains(nets: Path, small_folder: Path, capsys):
    """From flags and from YAML the same cache; ``verify --live`` and the trainer run the ensemble again."""
    from softcache import cli

    common = ["--source", str(small_folder), "--flip-tta", "--no-progress"]
    assert cli.build_cache([*common, *SAID, "-o", "c", "--target", "logits=full(f16)"]) == 0
    (nets / "config.yaml").write_text(
        "teacher: ['nets_of_a_test:one', 'nets_of_a_test:two']\nweights: [0.safetensors, 1.safetensors]\n"
        "targets: {logits: full(f16)}\n"
    )
    assert cli.build_cache(["config.yaml", *common, "-o", "d"]) == 0
    cache = sc.open("c")
    assert sc.open("d").digest == cache.digest
    members = cache.identity["teacher"]["members"]
    assert [m["input_spec"]["color"] for m in members] == ["RGB", "BGR"]
    assert members[0]["weights"] != members[1]["weights"]

    capsys.readouterr()
    live = ["verify", "c", "--live", "8", "--source", str(small_folder), "--json"]
    assert cli.main([*live, *SAID]) == 0
    assert json.loads(capsys.readouterr().out)["logits"]["cache"]["kl_T1"] < 1e-6
    assert cli.main([*live, *SAID[4:], *SAID[:4]]) == 3
    assert "its members is" in capsys.readouterr().err
    assert cli.main(["show", "c"]) == 0
    shown = capsys.readouterr().out
    assert "1: nets_of_a_test:two" in shown and "mirror image" in shown

    import torch
    from softcache_train import online
    from softcache_train.loader import Loader

    source = Source(small_folder)
    teachers, files = SAID[1::4], SAID[3::4]
    teacher = online.load(cache, teachers, files, ["logits"], "cpu")
    batches = [
        next(iter(Loader(cache, source, global_batch=20, seed=0, target_source=t))) for t in (teacher, None)
    ]
    assert torch.allclose(batches[0]["logits"].values, batches[1]["logits"].values, atol=2e-3)


def test_the_trainer_takes_several_teachers(nets: Path, small_folder: Path, capsys):
    from softcache_train import cli as train_cli

    from softcache import cli

    common = ["--source", str(small_folder), *SAID, "--no-progress"]
    assert cli.build_cache([*common, "-o", "c", "--target", "logits=full(f16)"]) == 0
    (nets / "kd.yaml").write_text("student: resnet8\nepochs: 1\nglobal_batch: 8\nval_limit: 4\n")
    losses = []
    for extra in ([], SAID):
        out = f"run{len(losses)}"
        run = ["kd.yaml", "--cache", "c", "--source", str(small_folder), "-o", out, *extra]
        assert train_cli.main(run) == 0, capsys.readouterr().err
        state = json.loads((nets / out / "checkpoint.json").read_text())
        losses.append(state["history"][-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# -- the real ones ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 80,000 images through networks: a minute of two cores, many of a busy machine
def test_the_four_given_networks_know_cifar10_better_together(shared_data: Path):
    """ResNet-20/32/44/56 on the 10,000 test images: 94.54 % together and 94.70 % with flips, as published."""
    pytest.importorskip("softcache_train")
    from softcache.recipe import Recipe, render

    source = Source(shared_data / "cifar10", split="test")
    depths = (20, 32, 44, 56)
    teacher = assemble(
        [f"softcache_train.students:resnet{d}" for d in depths],
        [shared_data / "weights" / f"cifar10_resnet{d}.safetensors" for d in depths],
        Options(flip_tta=True),
    )
    plain = teacher.teacher  # type: ignore[attr-defined]
    view = Recipe("identity", 0).view(source.ids[0], 0, 32, 32)
    right = {"plain": 0, "flips": 0}
    for start in range(0, len(source), 500):
        rows = range(start, start + 500)
        pixels = np.stack([render(source.image(i), view, (32, 32)) for i in rows])
        for name, who in {"plain": plain, "flips": teacher}.items():
            right[name] += int(
                (who(pixels)["logits"].argmax(axis=1) == source.labels[rows.start : rows.stop]).sum()
            )
    assert right == {"plain": pytest.approx(9454, abs=3), "flips": pytest.approx(9470, abs=3)}
