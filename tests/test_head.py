"""``head``: an embedding and the teacher's last layer are its logits, at any temperature, in any order of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from softcache_train import kd
from softcache_train.targets import to_tensors

import softcache as sc
from softcache.codecs.head import Head
from softcache.errors import DamageError, SpecError, TeacherError
from softcache.teachers import Options, load
from softcache.testing import ToyTeacher, make_image_folder

SETTINGS: dict[str, Any] = {"recipe": "crop(8, pad=1)|flip", "block_rows": 8, "batch": 4, "progress": False}


class Small(torch.nn.Module):
    """A network of the toy images' four classes."""

    def __init__(self, bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.input_spec = {"size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
        self.body = torch.nn.Conv2d(3, 24, 8)
        self.inside = torch.nn.Linear(24, 12)
        self.last = torch.nn.Linear(12, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.inside(self.body(x).flatten(1))))


class Scaled(Small):
    """Its logits are not what its last layer gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), per_class=5)


def build(path: Path, source: Any, teacher: Any = None, **options: Any) -> sc.Cache:
    asked = {"targets": {"logits": "head(f16)"}, "views": 2, **SETTINGS, **options}
    return sc.build(path, source=source, teacher=teacher or Small(), **asked)


def logits_of(cache: sc.Cache) -> np.ndarray:
    return np.stack(
        [cache.read(k, np.arange(cache.samples), "logits")["logits"].values for k in range(cache.views)]
    )


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", ["f16", "int8"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_logits_are_within_the_bound_of_the_layers_own_in_float64(dtype: str, scale: float):
    rng = np.random.default_rng(0)
    values = (rng.normal(0, scale, (50, 64))).astype(np.float32)
    layer = {
        "class_weight": rng.normal(0, 1, (10, 64)).astype(np.float32),
        "class_bias": rng.normal(0, 1, 10).astype(np.float32),
    }
    codec = Head(dtype)
    fields = codec.encode(values)
    assert {n: f.shape[1:] for n, f in fields.items()} == {f.name: f.shape for f in codec.fields((64,))}
    kept, bound = codec.decode(fields | layer, (64,)), codec.bound(fields | layer, (64,))
    said = values.astype(np.float64) @ layer["class_weight"].T.astype(np.float64) + layer["class_bias"]
    off = np.abs(kept - said)
    assert (off <= bound).all() and off.max() >= 0.02 * bound.max()
    for wrong in ({"class_bias": np.zeros(9, np.float32)}, {"class_weight": np.zeros((10, 63), np.float32)},
                  {"class_weight": layer["class_weight"].astype(np.float16)}):  # fmt: skip
        with pytest.raises(DamageError, match="no layer that makes logits"):
            codec.decode({**fields, **layer, **wrong}, (64,))


def test_a_wrong_number_type_is_named():
    with pytest.raises(SpecError, match="did you mean 'int8'"):
        sc.codecs.parse("head(int9)")


@pytest.mark.parametrize("bias", [True, False])
def test_a_cache_gives_the_teachers_logits(source: Path, tmp_path: Path, bias: bool):
    cache = build(tmp_path / "c", source, Small(bias))
    whole = build(tmp_path / "w", source, Small(bias), targets={"logits": "full(f16)"})
    assert {p: tuple(c.shape) for p, c in cache.constants.items() if "constants/" in p} == {
        "constants/class_bias": (4,), "constants/class_weight": (4, 12)
    }  # fmt: skip
    found, said = logits_of(cache), logits_of(whole)
    assert np.abs(found - said).max() < 4e-3 * max(1, np.abs(said).max())
    assert np.array_equal(found.argmax(axis=2), said.argmax(axis=2))
    assert cache.report.top1 == whole.report.top1 and cache.report.fidelity["logits"]["kl_T1"] < 1e-6
    z = torch.randn(20, 4)
    losses = [kd(z, to_tensors(c.read(1, np.arange(20))["logits"]), 20.0).item() for c in (cache, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    live = sc.verify_live(
        cache, sc.Source(source), load(Small(bias), Options(batch=4, taps=("logits.head",))), rows=40, seed=0
    )
    assert live["logits"]["cache"]["wrong"] == 0 and live["logits"]["cache"]["agreement"] == 1


def test_classes_are_put_into_the_sources_order(source: Path, tmp_path: Path):
    names = ["dog", "ant", "cow", "bee"]
    cache = build(tmp_path / "c", source, classes=names)
    whole = build(tmp_path / "w", source, classes=names, targets={"logits": "full(f16)"})
    assert cache.identity["teacher"]["columns"] == [1, 3, 2, 0]
    assert np.abs(logits_of(cache) - logits_of(whole)).max() < 5e-3


def test_it_grows_and_travels(source: Path, tmp_path: Path):
    from softcache.exchange import hdf5, webdataset

    cache = build(tmp_path / "c", source)
    sc.extend(cache.path, source=source, teacher=Small(), views=4, progress=False)
    assert np.array_equal(logits_of(sc.open(cache.path)), logits_of(build(tmp_path / "w", source, views=4)))
    sc.extend(
        cache.path,
        source=source,
        teacher=Small(),
        targets={"logits": "head(int8)"},
        name="big",
        progress=False,
    )
    grown = sc.open(cache.path)
    assert "parts/2/constants/class_weight" in grown.constants
    assert grown.read(0, np.arange(3), "big.logits")["big.logits"].values.shape == (3, 4)
    assert sc.verify(grown, read_data=True) == []
    webdataset.export(grown, tmp_path / "tars")
    assert np.array_equal(logits_of(sc.open(tmp_path / "tars")), logits_of(grown))
    webdataset.restore(tmp_path / "tars", tmp_path / "again")
    assert files(tmp_path / "again") == files(grown.path)
    pytest.importorskip("h5py")
    hdf5.export(grown, tmp_path / "c.h5", decoded=True)
    hdf5.restore(tmp_path / "c.h5", tmp_path / "once more")
    assert files(tmp_path / "once more") == files(grown.path)


def test_a_member_of_an_ensemble_has_its_own_layer(source: Path, tmp_path: Path):
    cache = build(
        tmp_path / "c", source, [Small(), Small()], targets={"1.logits": "head", "logits": "full(f16)"}
    )
    assert "constants/1/class_weight" in cache.constants
    found = cache.read(0, np.arange(20))
    assert np.abs(found["1.logits"].values - found["logits"].values).max() < 5e-3


@pytest.mark.parametrize("teacher", [Scaled(), ToyTeacher()])
def test_logits_that_no_last_layer_gives_are_refused(source: Path, tmp_path: Path, teacher: Any):
    with pytest.raises(TeacherError, match=r"full\(u8\)|logits\.head"):
        build(tmp_path / "c", source, teacher)
    assert not (tmp_path / "c").exists()


class One(Small):
    """Of one class."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(12, 1)


def test_a_teacher_of_one_class_is_refused(source: Path, tmp_path: Path):
    with pytest.raises(
        TeacherError, match="at least two class logits, and the teacher's last layer makes one"
    ):
        build(tmp_path / "c", source, One(), ignore_labels=True)
    assert not (tmp_path / "c").exists()


class Broken(Small):
    """From its answer number ``after`` on, what its layer ``where`` gives is multiplied by ``by``."""

    def __init__(self, where: str, by: float, after: int):
        super().__init__()
        self.by, self.after, self.answers = by, after, 0
        self.get_submodule(where).register_forward_hook(self._scale)

    def _scale(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        self.answers += 1
        return output * self.by if self.answers > self.after else output


@pytest.mark.parametrize("where", ["inside", "last"])
@pytest.mark.parametrize("by", [np.nan, np.inf])
def test_what_is_not_finite_is_called_so(source: Path, tmp_path: Path, where: str, by: float):
    with pytest.raises(TeacherError, match=r"a picture of noise with values that are not finite, in 'logits"):
        build(tmp_path / "c", source, Broken(where, by, after=0))
    assert not (tmp_path / "c").exists()
    with pytest.raises(TeacherError, match=r"target 'logits' of the image .* is not finite"):
        build(tmp_path / "c", source, Broken(where, by, after=1))


def test_an_embedding_past_halves_is_called_so(source: Path, tmp_path: Path):
    with pytest.raises(TeacherError, match=r"target 'logits' of the image .* reaches .*e\+.*, past 65504"):
        build(tmp_path / "c", source, Broken("inside", 1e9, after=0))


def test_a_real_networks_logits(shared_data: Path, tmp_path: Path):
    source = sc.Source(shared_data / "cifar10", split="test", limit=96)
    asked: dict[str, Any] = {
        "teacher": "softcache_train.students:resnet56", "recipe": "crop(32, pad=4)|flip", "block_rows": 32,
        "weights": shared_data / "weights" / "cifar10_resnet56.safetensors", "batch": 32,
    }  # fmt: skip
    cache = build(
        tmp_path / "c", source, **{k: v for k, v in asked.items() if k != "teacher"}, teacher=asked["teacher"]
    )
    whole = build(tmp_path / "w", source, **{**asked, "targets": {"logits": "full(f16)"}})
    found, said = logits_of(cache), logits_of(whole)
    assert np.abs(found - said).max() < 0.05 and np.array_equal(found.argmax(axis=2), said.argmax(axis=2))
    assert cache.report.top1 == whole.report.top1 and cache.report.bytes_per_row == {"logits": 128}
