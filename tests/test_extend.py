"""An extended cache holds what a whole build would have written, and nobody touched what was there before."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache import inventory, testing
from softcache import manifest as m
from softcache.cli import main
from softcache.errors import (
    DamageError,
    InvalidRow,
    MismatchError,
    NotBuilt,
    SourceError,
    SpecError,
    StoreError,
)
from softcache.spec import canonical_json, digest
from softcache.store import Data, Store
from softcache.testing import ToyTeacher, toy_detector, toy_teacher

BUILD: dict[str, Any] = {
    "recipe": "random_resized_crop(8)|flip",
    "block_rows": 8,
    "batch": 4,
    "progress": False,
}
KEPT = {"logits": "full(u8)", "map": "int8"}


class Big(ToyTeacher):
    """Another teacher, of another size."""

    input_spec = {"size": (6, 6)}  # noqa: RUF012
    weights_digest = "5" * 64

    def constants(self) -> dict[str, np.ndarray]:
        return {"prior": np.arange(4, dtype=np.float32)}


def build(path: Path, source: Any, **options: Any) -> sc.Cache:
    return sc.build(
        path, source=source, **{"teacher": toy_teacher(), "targets": KEPT, "views": 2, **BUILD, **options}
    )


def extend(path: Path | Store, source: Any, **options: Any) -> sc.Cache:
    return sc.extend(path, source=source, **{"teacher": toy_teacher(), "progress": False, **options})


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and change time of every file: some file systems give a freed inode's number to the next file."""
    stats = {p.relative_to(root).as_posix(): p.stat() for p in root.rglob("*") if p.is_file()}
    return {name: (found.st_ino, found.st_ctime_ns) for name, found in stats.items()}


def shards(root: Path) -> dict[str, bytes]:
    return {n: d for n, d in files(root).items() if n.startswith(("targets/", "view/"))}


@pytest.fixture(scope="module")
def base(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of two targets. Copy it before you change it."""
    path = tmp_path_factory.mktemp("base") / "cache"
    build(path, small_folder)
    return path


@pytest.fixture(scope="module")
def grown(base: Path, small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More views, another target, another teacher, and another target of it. Copy it before you change it."""
    path = Path(shutil.copytree(base, tmp_path_factory.mktemp("grown") / "cache"))
    extend(path, small_folder, views=5)
    extend(path, small_folder, targets={"vector": "f16"})
    extend(path, small_folder, targets={"logits": "full(f16)"}, name="big", teacher=Big())
    extend(path, small_folder, targets=["map=int8"], name="big", teacher=Big())
    return path


@pytest.fixture
def path(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "cache"))


@pytest.fixture
def grown_copy(grown: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grown, tmp_path / "cache"))


# -- what it is ------------------------------------------------------------------------------------------------


def test_everything_is_what_a_whole_build_would_have_written(grown: Path, small_folder: Path, tmp_path: Path):
    build(tmp_path / "one", small_folder, views=5, targets={**KEPT, "vector": "f16"})
    build(
        tmp_path / "two", small_folder, views=5, targets={"logits": "full(f16)", "map": "int8"}, teacher=Big()
    )
    whole, found = shards(tmp_path / "one"), shards(grown)
    for name, data in shards(tmp_path / "two").items():
        if name.startswith("targets/"):
            whole[name.replace("targets/", "targets/big.")] = data
    del whole["targets/big.zarr.json"]
    assert whole == found and len(found) > 100


def test_what_was_there_is_not_touched(base: Path, path: Path, small_folder: Path):
    before = stamps(path)
    extend(path, small_folder, views=3)
    extend(path, small_folder, targets={"logits": "argmax", "vector": "f16"}, name="big", teacher=Big())
    after, old, new = stamps(path), files(base), files(path)
    touched = {name for name in before if after.get(name) != before[name]}
    assert {n for n in touched if not n.endswith("zarr.json")} == {"softcache.json"}
    assert all(new[n] == old[n] for n in before.keys() - touched)
    assert not list(path.rglob("*.tmp")) and not (path / ".claims").exists()


def test_verify_and_the_list_of_files_know_every_file(grown: Path):
    cache = sc.open(grown)
    assert sc.verify(cache, read_data=True) == []
    assert {one.file for one in inventory.files(cache)} | {m.MANIFEST} == set(files(grown))


def test_again_it_says_so_and_computes_nothing(grown_copy: Path, small_folder: Path, capsys):
    before = stamps(grown_copy)
    again = [
        {"views": 5},
        {"targets": {"vector": "f16"}},
        {"targets": {"logits": "full(f16)"}, "name": "big", "teacher": Big()},
        {"targets": {"map": "int8"}, "name": "big", "teacher": Big()},
    ]
    for options in again:
        cache = extend(grown_copy, small_folder, **options, progress=True)
        assert cache.teacher_rows == 0 and "is complete: 0 rows" in capsys.readouterr().err
    assert build(grown_copy, small_folder).teacher_rows == 0
    assert stamps(grown_copy) == before


def test_as_many_views_as_there_are_is_nothing_to_do_and_fewer_is_refused(
    base: Path, small_folder: Path, capsys
):
    assert extend(base, small_folder, views=2, progress=True).views == 2
    assert "nothing is to be done" in capsys.readouterr().err
    with pytest.raises(SpecError, match="has 2 views, and views=1 is how many there shall be"):
        extend(base, small_folder, views=1)


def test_identity_and_report_are_of_all(grown: Path, small_folder: Path, tmp_path: Path):
    cache = sc.open(grown)
    whole = build(tmp_path / "one", small_folder, views=5, targets={**KEPT, "vector": "f16"})
    assert cache.views == 5 and cache.identity["grid"]["views"] == 5
    assert list(cache.targets) == ["big.logits", "big.map", "logits", "map", "vector"]
    assert {n: cache.identity["targets"][n] for n in whole.targets} == whole.identity["targets"]
    report = cache.report
    assert (report.labelled, report.top1, report.teacher_top1) == pytest.approx(
        (whole.report.labelled, whole.report.top1, whole.report.teacher_top1)
    )
    for name, figures in whole.report.fidelity.items():
        assert report.fidelity[name] == pytest.approx(figures)
    assert report.equivariance["map"] == whole.report.equivariance["map"]
    of_big = cache.sealed[3].report
    logits = np.stack([cache.read(v, np.arange(20), ["big.logits"])["big.logits"].values for v in range(5)])
    assert (
        of_big.top1 == (logits.argmax(axis=2) == sc.Source(small_folder).labels).mean()
        and of_big.labelled == 100
    )
    assert np.array_equal(cache.constant("parts/3/constants/prior"), np.arange(4))


def test_zarr_reads_the_grown_arrays_whole(grown: Path):
    zarr = pytest.importorskip("zarr")
    group, cache = zarr.open(str(grown), mode="r"), sc.open(grown)
    positions = cache.grid.positions(np.arange(20))
    for name in ("vector", "big.logits"):
        stored = group[f"targets/{name}/value"][:]
        assert stored.shape[0] == 5
        for view in range(5):
            assert np.array_equal(
                stored[view][positions], cache.read(view, np.arange(20), [name])[name].values
            )
    geometry = group["view/geometry"][:]
    assert np.array_equal(geometry[4][positions], [v.pack() for v in cache.read_views(4, np.arange(20))])


# -- who may -----------------------------------------------------------------------------------------------------


class Reweighted(ToyTeacher):
    weights_digest = "0" * 64


def changed(pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {name: said + 1 for name, said in toy_teacher()(pixels).items()}


def unchanged(pixels: np.ndarray) -> dict[str, np.ndarray]:
    return toy_teacher()(pixels)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another teacher": (
        {"teacher": Reweighted()},
        MismatchError,
        r"weights is .* there and 0+… here|--as NAME",
    ),
    "another precision": ({"precision": "fp16"}, MismatchError, r"its precision is fp32 there and fp16 here"),
    "another batch": ({"batch": 5}, MismatchError, r"its batch is 4 there and 5 here"),
    "a mirror's mean": ({"flip_tta": True}, SpecError, "has no mean over an image and its mirror"),
    "a target that is there": ({"targets": {"map": "f16"}}, MismatchError, "'map' is there already"),
    "views and targets": ({"views": 3}, SpecError, "one of the two"),
    "neither": ({"targets": None}, SpecError, "one of the two"),
    "no name": ({"name": "1.2"}, SpecError, "up to 32 letters"),
    "a name with views": ({"targets": None, "views": 3, "name": "big"}, SpecError, "leave its name out"),
    "no rank": ({"rank": 2}, SpecError, "rank 2 of world 1"),
    "no target": ({"targets": {"vektor": "f16"}}, Exception, "did you mean 'vector'"),
    "too many views": ({"targets": None, "views": 1 << 21}, SpecError, "from 1 to"),
}


@pytest.mark.parametrize(("options", "error", "told"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_belong_is_refused_and_leaves_no_trace(
    path: Path, small_folder: Path, options: Any, error: Any, told: str
):
    before = stamps(path)
    with pytest.raises(error, match=told) as caught:
        extend(path, small_folder, **{"targets": {"vector": "f16"}, **options})
    assert "\n" not in str(caught.value)
    shutil.rmtree(path / ".claims", ignore_errors=True)
    assert stamps(path) == before


def test_other_images_are_refused(path: Path, small_folder: Path, tmp_path: Path):
    images = Path(shutil.copytree(small_folder, tmp_path / "images"))
    shutil.copy(images / "ant" / "0000.png", images / "ant" / "0004.png")
    with pytest.raises(MismatchError, match=r"source\.content is|are not those|another image|Say --limit 20"):
        extend(path, images, views=3)
    with pytest.raises(MismatchError, match="ids are not in"):
        extend(path, small_folder, views=3, limit=12)


def test_another_renderer_is_refused(path: Path, small_folder: Path, monkeypatch):
    from softcache.recipe import Recipe

    real = Recipe.identity
    monkeypatch.setattr(
        Recipe, "identity", lambda self: real(self) | {"render": {"version": 1, "pillow": "1.0"}}
    )
    with pytest.raises(MismatchError, match=r"recipe\.render\.pillow is .* there and 1\.0 here"):
        extend(path, small_folder, targets={"vector": "f16"})


def test_a_callable_without_a_digest_is_known_by_its_answer(small_folder: Path, tmp_path: Path):
    size = {"input_size": (8, 8)}
    build(tmp_path / "c", small_folder, teacher=unchanged, **size)
    changed.__qualname__ = "unchanged"
    with pytest.raises(MismatchError, match="picture of noise is not what it was"):
        extend(tmp_path / "c", small_folder, teacher=changed, targets={"vector": "f16"}, **size)
    assert (
        extend(tmp_path / "c", small_folder, teacher=unchanged, targets={"vector": "f16"}).teacher_rows == 40
    )


def test_more_views_of_several_teachers_are_refused(grown_copy: Path, small_folder: Path):
    with pytest.raises(MismatchError, match=r"several teachers made those of .* \(big and the first\)"):
        extend(grown_copy, small_folder, views=9)


def test_a_name_that_is_known_is_of_the_same_teacher(grown_copy: Path, small_folder: Path):
    with pytest.raises(MismatchError, match="another teacher than the one of"):
        extend(grown_copy, small_folder, targets={"vector": "f16"}, name="big")
    with pytest.raises(MismatchError, match=r"'big\.logits' is there already"):
        extend(
            grown_copy, small_folder, targets={"logits": "argmax", "vector": "f16"}, name="big", teacher=Big()
        )


def test_what_was_added_is_never_changed(grown_copy: Path, small_folder: Path):
    told = (
        r"was extended by vector, by .*codec is f16 there and int8 here.*What a cache holds is never changed"
    )
    with pytest.raises(MismatchError, match=told):
        extend(grown_copy, small_folder, targets={"vector": "int8"})
    assert sc.verify(grown_copy) == []


@pytest.mark.parametrize("kind", ["webdataset", "hdf5"])
def test_an_export_holds_all_parts(grown: Path, small_folder: Path, tmp_path: Path, kind: str):
    exchange = pytest.importorskip(f"softcache.exchange.{kind}")
    cache, out = sc.open(grown), tmp_path / ("cache.h5" if kind == "hdf5" else "tars")
    exchange.export(cache, out)
    if kind == "hdf5":
        exchange.restore(out, tmp_path / "again")
        assert files(tmp_path / "again") == files(grown)
        return
    opened = sc.open(out)
    assert opened.digest == cache.digest and sc.verify(opened, read_data=True) == []
    for view in range(5):
        a, b = (one.read(view, np.arange(20)) for one in (cache, opened))
        assert all(np.array_equal(a[name].values, b[name].values) for name in cache.targets)
    with pytest.raises(MismatchError, match="is an export to tars"):
        extend(out, small_folder, views=6)


def test_an_unfinished_cache_and_another_extension_are_refused(
    path: Path, small_folder: Path, tmp_path: Path
):
    with pytest.raises(Interrupted):
        extend(Interrupting(path, after=12), small_folder, targets={"vector": "f16"})
    with pytest.raises(
        MismatchError, match=r"is being extended by vector, by .*ToyTeacher: .*delete .*parts/1"
    ):
        extend(path, small_folder, views=3)
    assert sc.verify(path, read_data=True) == []
    assert extend(path, small_folder, targets={"vector": "f16"}).complete
    assert extend(path, small_folder, views=3).views == 3
    (path / "softcache.json").unlink()
    with pytest.raises(NotBuilt, match="is not finished"):
        extend(path, small_folder, views=4)


# -- class order, unreadable images, recipes ---------------------------------------------------------------------------


class Turned(Big):
    """Its classes stand in the opposite order."""

    classes = ("dog", "cow", "bee", "ant")


def test_another_teachers_classes_are_put_into_the_caches_order(path: Path, small_folder: Path):
    extend(path, small_folder, targets={"logits": "full(f16)"}, name="big", teacher=Big())
    cache = extend(path, small_folder, targets={"logits": "full(f16)"}, name="turned", teacher=Turned())
    assert cache.teacher("turned.logits")["columns"] == [3, 2, 1, 0] and "columns" not in cache.teacher(
        "big.logits"
    )
    read = cache.read(1, np.arange(20))
    assert np.array_equal(read["turned.logits"].values, read["big.logits"].values[:, ::-1])


def test_unreadable_images_are_those_of_the_cache(small_folder: Path, tmp_path: Path):
    images = Path(shutil.copytree(small_folder, tmp_path / "images"))
    (images / "bee" / "0001.png").write_bytes(b"no image")
    build(tmp_path / "c", images, skip_corrupt=True)
    before = sc.open(tmp_path / "c").invalid.tolist()
    cache = extend(tmp_path / "c", images, views=3)
    cache = extend(tmp_path / "c", images, targets={"vector": "f16"})
    assert cache.invalid.tolist() == before and len(before) == 1 and sc.verify(cache, read_data=True) == []
    whole = build(tmp_path / "w", images, skip_corrupt=True, views=3, targets={**KEPT, "vector": "f16"})
    assert shards(cache.path) == shards(whole.path)


def test_ignored_labels_stay_ignored(small_folder: Path, tmp_path: Path):
    build(tmp_path / "c", small_folder, ignore_labels=True)
    cache = extend(
        tmp_path / "c", small_folder, targets={"logits": "full(f16)"}, name="turned", teacher=Turned()
    )
    assert cache.classes is None and "columns" not in cache.teacher("turned.logits")


@pytest.mark.parametrize(
    "recipe",
    [
        "random_resized_crop(8)|color_jitter(0.4,0.4,0.4)|mixup(0.8)",
        "random_resized_crop(8)|mosaic|mixup(0.8)",
    ],
)
def test_views_of_several_samples(small_folder: Path, tmp_path: Path, recipe: str):
    build(tmp_path / "c", small_folder, recipe=recipe)
    extend(tmp_path / "c", small_folder, targets={"vector": "f16"})
    cache = extend(tmp_path / "c", small_folder, views=4)
    whole = build(tmp_path / "w", small_folder, recipe=recipe, views=4, targets={**KEPT, "vector": "f16"})
    assert shards(cache.path) == shards(whole.path)
    assert cache.read_views(3, np.arange(20)) == whole.read_views(3, np.arange(20))


def test_a_detector_is_added_to_a_classifiers_cache(path: Path, small_folder: Path, tmp_path: Path):
    kept = {"detections": "top(5, background=2)", "queries": "all", "p3": "pool(2)|int8"}
    cache = extend(path, small_folder, targets=kept, name="yolo", teacher=toy_detector())
    whole = build(tmp_path / "w", small_folder, targets=kept, teacher=toy_detector())
    ours, theirs = cache.read(1, np.arange(20)), whole.read(1, np.arange(20))
    assert (
        cache.targets["yolo.detections"].kind == "detections"
        and cache.targets["yolo.p3"].kind == "feature_map"
    )
    for part in ("logits", "boxes"):
        assert np.array_equal(ours["yolo.detections"].parts[part], theirs["detections"].parts[part])
    assert np.array_equal(cache.constant("parts/1/constants/head"), whole.constant("constants/head"))
    assert sc.verify(cache, read_data=True) == []


# -- reading ------------------------------------------------------------------------------------------------------


def test_who_said_a_target(grown: Path):
    cache = sc.open(grown)
    assert {cache.teacher(n)["name"].partition(":")[2] for n in ("logits", "map", "vector")} == {"ToyTeacher"}
    assert {cache.teacher(n)["weights"] for n in ("big.logits", "big.map")} == {"5" * 64}
    both = sc.open([grown, grown])
    assert both.teacher("1.big.logits")["weights"] == "5" * 64
    assert np.array_equal(
        both.read(4, np.arange(5))["1.big.logits"].values, cache.read(4, np.arange(5))["big.logits"].values
    )


def test_live_verification_is_of_the_teacher_that_is_given(grown: Path, small_folder: Path):
    cache, source = sc.open(grown), sc.Source(small_folder)
    from softcache.teachers import Options, load

    first = load(toy_teacher(), Options(batch=4))
    big = load(Big(), Options(batch=8))
    found = sc.verify_live(cache, source, first, 16)
    assert set(found) == {"logits", "map", "vector"} and found["vector"]["cache"]["relative_l2"] < 1e-3
    found = sc.verify_live(cache, source, big, 16)
    assert set(found) == {"big.logits", "big.map"} and found["big.logits"]["cache"]["kl_T1"] < 1e-3
    with pytest.raises(MismatchError, match=r"its weights is .* and was .*; its weights is .* of 'big'"):
        sc.verify_live(cache, source, load(Reweighted(), Options(batch=4)), 4)
    with pytest.raises(MismatchError, match=r"the cache has no teacher 'bog'.*did you mean 'big'"):
        sc.verify_live(cache, source, big, 4, name="bog")


def test_an_enemy_who_swaps_rows_is_found_live(grown_copy: Path, small_folder: Path):
    """The digests are made to fit: only the teacher can tell."""
    from softcache.teachers import Options, load

    shard = grown_copy / "targets" / "big.logits" / "value" / "c.0.0.0"
    for view in range(5):
        for block in range(3):
            shard = shard.with_name(f"c.{view}.{block}.0")
            rows = np.frombuffer(shard.read_bytes()[:-4], np.float16).reshape(8, 4)[::-1]
            array = sc.open(grown_copy).arrays["targets/big.logits/value"]
            shard.write_bytes(array.encode(rows[8 - len(rows) :]))
    found = sc.verify_live(sc.open(grown_copy), sc.Source(small_folder), load(Big(), Options(batch=8)), 30)
    assert found["big.logits"]["cache"]["kl_T1"] > 0.1


def test_diff_tells_who_said_it(grown: Path, base: Path, small_folder: Path, tmp_path: Path):
    whole = build(tmp_path / "w", small_folder, views=5, targets={**KEPT, "vector": "f16"})
    found = sc.diff(sc.open(grown), whole)
    assert not found["same"] and found["values"]["vector"]["cosine"] == pytest.approx(1)
    assert {field.split(".")[0] for field, _, _ in found["identity"]} == {"targets"}
    other = Path(shutil.copytree(base, tmp_path / "other"))
    extend(other, small_folder, targets={"logits": "full(f16)"}, name="big", teacher=Turned())
    fields = [field for field, _, _ in sc.diff(sc.open(grown), sc.open(other))["identity"]]
    assert "teacher of big.logits.columns" in fields


def test_a_dataset_has_the_targets_of_all(grown: Path, small_folder: Path):
    items = sc.with_targets(sc.Source(small_folder), sc.open(grown))
    cache = items.cache
    for epoch in range(5):
        items.set_epoch(epoch)
        item = items[3]
        row = cache[str(cache.ids[item["index"]]), item["view"]]
        assert np.array_equal(item["big.logits"], row["big.logits"].values)
        assert np.array_equal(item["vector"], row["vector"].values)


def test_a_loader_reads_it_and_the_trainer_learns_from_the_second_teacher(
    grown: Path, small_folder: Path, tmp_path: Path, capsys
):
    pytest.importorskip("torch")
    from softcache_train import Loader
    from softcache_train.cli import main as train

    cache, views = sc.open(grown), set()
    loader = Loader(cache, sc.Source(small_folder), global_batch=10, seed=0)
    for _ in range(5):
        for batch in loader:
            views.add(batch.view)
            want = cache.read(batch.view, batch.index)
            assert np.array_equal(np.asarray(batch.targets["big.logits"].values), want["big.logits"].values)  # pyright: ignore
    assert views == set(range(5))
    (tmp_path / "kd.yaml").write_text(
        "student: resnet8\nepochs: 1\nglobal_batch: 4\nalpha: 1.0\ntarget: big.logits\n"
    )
    run = [str(tmp_path / "kd.yaml"), "--source", str(small_folder), "--cache", str(grown)]
    assert train([*run, "-o", str(tmp_path / "cached")]) == 0, capsys.readouterr().err
    cached = capsys.readouterr().err.split("loss")[1].split()[0]
    live = [*run, "--teacher", "test_extend:Big", "-o", str(tmp_path / "live")]
    assert train(live) == 0, capsys.readouterr().err
    assert float(capsys.readouterr().err.split("loss")[1].split()[0]) == pytest.approx(
        float(cached), rel=1e-2
    )


def test_label_smoothing_is_told_of_the_teacher_that_is_learned_from(path: Path, small_folder: Path):
    pytest.importorskip("torch")
    from softcache_train.config import Config
    from softcache_train.loop import _smoothing_note

    cache = extend(
        path, small_folder, targets={"logits": "full(f16)"}, name="big", teacher=Big(), label_smoothing=0.1
    )
    told = [
        _smoothing_note(
            Config(student="resnet8", epochs=1, global_batch=4, T=4.0, target=name), cache, np.arange(5)
        )
        for name in ("logits", "big.logits")
    ]
    assert told[0] is None and "label smoothing 0.1" in str(told[1])
    assert "'big.logits'" in str(told[1]) and "% erased" in str(told[1]) and "(5 rows)" in str(told[1])


# -- the command ---------------------------------------------------------------------------------------------------


def run(*words: Any) -> int:
    return main([str(word) for word in words])


TOY = ("--teacher", "softcache.testing:toy_teacher", "--no-progress")


def test_the_command(base: Path, small_folder: Path, tmp_path: Path, capsys):
    root = tmp_path / "c"
    build(root, small_folder, teacher="softcache.testing:toy_teacher")
    common = ("extend", root, "--source", small_folder)
    assert run(*common, *TOY, "--views", 3, "--json") == 0
    assert json.loads(capsys.readouterr().out)["views"] == 3
    assert run(*common, *TOY, "--target", "vector=f16") == 0
    assert run(*common, "--teacher", "test_extend:Big", "--as", "big", "--target", "logits=full(f16)") == 0
    assert "top-1 of big.logits" in capsys.readouterr().err
    assert run("show", root) == 0
    shown = capsys.readouterr().out
    assert "added    views 2 to 2" in shown and "added    vector\n" in shown
    assert (
        f"added    big.logits by test_extend:Big at 6x6, fp32 on as the callable chooses, weights {'5' * 64}"
        in shown
    )
    assert run("verify", root, "--read-data") == 0
    live = ("verify", root, "--live", 8, "--source", small_folder)
    assert run(*live, "--teacher", "softcache.testing:toy_teacher") == 0
    assert "left out, of other teachers (--as NAME): big.logits" in capsys.readouterr().err
    assert run(*live, "--teacher", "test_extend:Big", "--as", "big") == 0
    said = capsys.readouterr()
    assert (
        "big.logits" in said.out
        and "left out, of other teachers (--as NAME): logits, map, vector" in said.err
    )
    assert run(*live, "--teacher", "test_extend:Big") == 3
    assert run(*common, "--teacher", "test_extend:Big", "--target", "vector=int8") == 3
    assert run("extend", root, "--views", 4) == 1
    assert "--source is missing" in capsys.readouterr().err


def test_its_flags_are_those_of_build():
    import inspect

    from softcache import flags
    from softcache.extending import OF_THE_CACHE

    keywords = [n for n, p in inspect.signature(sc.extend).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert set(keywords) - {"name"} == flags.BUILD.keys() - set(OF_THE_CACHE)


def test_licences_stay_but_the_teachers_when_there_is_another(small_folder: Path, tmp_path: Path):
    stated = {"source": "CC-BY-4.0", "teacher": "MIT", "cache": "CC-BY-4.0"}
    build(tmp_path / "c", small_folder, licences=stated)
    assert extend(tmp_path / "c", small_folder, views=3).licences == stated
    both = {"logits": "full(f16)"}
    cache = extend(tmp_path / "c", small_folder, targets=both, name="big", teacher=Big())
    assert cache.licences == {what: one for what, one in stated.items() if what != "teacher"}
    cache = extend(
        tmp_path / "c",
        small_folder,
        targets=both,
        name="two",
        teacher=Turned(),
        licences={"teacher": "MIT AND ISC"},
    )
    assert cache.licences["teacher"] == "MIT AND ISC"


# -- what goes wrong on the way --------------------------------------------------------------------------------------


class Interrupted(BaseException):
    pass


class Interrupting(Store):
    """Is broken off after so many files."""

    def __init__(self, root: Path, after: int):
        super().__init__(root)
        self.after = after

    def put(self, name: str, data: Data) -> None:
        if self.after == 0:
            raise Interrupted
        self.after -= 1
        super().put(name, data)


MORE: dict[str, dict[str, Any]] = {
    "views": {"views": 3},
    "a target": {"targets": {"vector": "f16"}},
    "a teacher": {"targets": {"logits": "full(f16)"}, "name": "big", "teacher": Big()},
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_broken_off_after_any_file_the_old_cache_is_whole_and_it_goes_on(
    base: Path, small_folder: Path, tmp_path: Path, more: dict[str, Any]
):
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    extend(whole, small_folder, **more)
    count = len(set(files(whole)) - set(files(base)))
    expected, old = files(whole), sc.open(base)
    committed = 0
    for after in range(count + 4):
        root = Path(shutil.copytree(base, tmp_path / "c"))
        with contextlib.suppress(Interrupted):
            extend(Interrupting(root, after), small_folder, **more)
        now = sc.open(root)
        damaged = [d for d in sc.verify(now, read_data=True) if not d.file.endswith("zarr.json")]
        assert not damaged
        if now.digest == old.digest:
            assert sc.verify(now, read_data=True) == []
            assert np.array_equal(
                now.read(1, np.arange(20))["map"].values, old.read(1, np.arange(20))["map"].values
            )
        else:
            committed += 1
        before = stamps(root)
        extend(root, small_folder, **more)
        assert files(root) == expected
        after_ = stamps(root)
        again = [n for n in before if after_.get(n) != before[n] and n.split("/")[-1].startswith("v0")]
        assert not again, "a committed block was computed again"
        shutil.rmtree(root)
    assert committed


def test_several_extenders_share_the_blocks(path: Path, small_folder: Path):
    found: list[sc.Cache] = []
    threads = [
        threading.Thread(
            target=lambda r=r: found.append(extend(path, small_folder, views=6, rank=r, world=3))
        )
        for r in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 and sum(c.teacher_rows for c in found) == 80
    assert sc.verify(path, read_data=True) == []


def test_an_error_of_the_disk_at_every_operation_is_survived(base: Path, small_folder: Path, tmp_path: Path):
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=memory)) if os.access(memory, os.W_OK) else tmp_path
    try:
        whole, disk = Path(shutil.copytree(base, place / "whole")), testing.CountingDisk()
        extend(Store(whole, disk), small_folder, targets={"vector": "f16"})
        expected, root = files(whole), place / "c"
        assert disk.operations > 40
        for at in range(1, disk.operations + 1):
            shutil.copytree(base, root)
            with pytest.raises(StoreError, match="run the same command again"):
                extend(Store(root, testing.FailingDisk(at)), small_folder, targets={"vector": "f16"})
            assert not [d for d in sc.verify(root, read_data=True) if not d.file.endswith("zarr.json")]
            extend(root, small_folder, targets={"vector": "f16"})
            assert files(root) == expected
            shutil.rmtree(root)
    finally:
        if place != tmp_path:
            shutil.rmtree(place)


# -- kill -9 of real processes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path: Path):
    source = testing.make_image_folder(tmp_path / "images", per_class=8)
    build(tmp_path / "base", source, teacher="softcache.testing:toy_teacher", views=1)
    common = [sys.executable, "-m", "softcache.cli", "extend", "ROOT", "--source", str(source)]
    command = [*common, "--teacher", "softcache.testing:toy_teacher", "--views", "4"]

    def start(root: Path, delay: float) -> subprocess.Popen[bytes]:
        words = [str(root) if word == "ROOT" else word for word in command]
        environment = os.environ | {"SOFTCACHE_TOY_DELAY": str(delay)}
        return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE)

    whole = Path(shutil.copytree(tmp_path / "base", tmp_path / "whole"))
    began = time.monotonic()
    assert start(whole, 0.01).wait() == 0
    seconds, expected, rng = time.monotonic() - began, files(whole), random.Random(0)
    kills, old = 0, files(tmp_path / "base")
    while kills < 6:
        root = Path(shutil.copytree(tmp_path / "base", tmp_path / "c"))
        finished = False
        while not finished:
            receipts = {n: i for n, i in stamps(root).items() if re.fullmatch(r"parts/1/v.*json", n)}
            process = start(root, 0.01)
            wanted, last = len(receipts) + rng.randint(0, 6), time.monotonic() + 2 * seconds
            while process.poll() is None and time.monotonic() < last:
                if len(list(root.glob("parts/1/v*.json"))) >= wanted and rng.random() < 0.2:
                    break
                time.sleep(0.005)
            finished = process.poll() == 0
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += not finished
            assert not [d for d in sc.verify(root, read_data=True) if not d.file.endswith("zarr.json")]
            now = sc.open(root)
            assert now.read(0, np.arange(32))["map"].values.any()
            if len(now.parts) == 1:
                assert sc.verify(root, read_data=True) == []
                assert (root / "softcache.json").read_bytes() == old["softcache.json"]
            after = stamps(root)
            assert all(after[name] == stamp for name, stamp in receipts.items()), "a block was computed again"
        assert files(root) == expected
        shutil.rmtree(root)


DAMAGED = {
    "a shard of the build": ("targets/map/value/c.1.1.0.0.0", {}, 8),
    "a receipt of the build": ("receipts/v0001-b000002.json", {}, 4),
    "the build's table": ("files.bin", {}, 0),
    "ids": ("ids/bytes/c.0", {}, 0),
    "a canary": ("canary/pixels/c.0.0.0.0", {}, 0),
    "metadata": ("targets/vector/value/zarr.json", {}, 0),
    "a shard of more views": ("targets/map/value/c.3.1.0.0.0", {"views": 5}, 8),
    "geometry of more views": ("view/geometry/c.4.0.0", {"views": 5}, 8),
    "the table of more views": ("parts/1/files.bin", {"views": 5}, 0),
    "an identity": ("parts/1/identity.json", {"views": 5}, 0),
    "a shard of another target": ("targets/vector/value/c.4.2.0", {"targets": {"vector": "f16"}}, 4),
    "a receipt": ("parts/2/v0000-b000001.json", {"targets": {"vector": "f16"}}, 8),
    "another teacher's": (
        "targets/big.logits/value/c.0.0.0",
        {"targets": {"logits": "full(f16)"}, "name": "big", "teacher": Big()},
        8,
    ),
    "another teacher's constant": (
        "parts/3/constants/prior/c.0",
        {"targets": {"logits": "full(f16)"}, "name": "big", "teacher": Big()},
        0,
    ),
}


@pytest.mark.parametrize("damage", [testing.remove, testing.truncate, testing.empty])
@pytest.mark.parametrize(("name", "options", "rows"), DAMAGED.values(), ids=DAMAGED)
def test_running_it_again_mends_its_own_part_and_keeps_the_others(
    grown: Path, grown_copy: Path, small_folder: Path, name: str, options: Any, rows: int, damage: Any
):
    before = stamps(grown_copy)
    damage(grown_copy / name)
    assert sc.verify(grown_copy)
    cache = extend(grown_copy, small_folder, **options) if options else build(grown_copy, small_folder)
    assert files(grown_copy) == files(grown) and cache.teacher_rows == rows
    assert before["softcache.json"] == stamps(grown_copy)["softcache.json"]
    if not options:
        (grown_copy / "parts" / "1" / "files.bin").unlink()
        build(grown_copy, small_folder)
        assert [d.file for d in sc.verify(grown_copy)] == ["parts/1/files.bin"]


def test_what_comes_out_otherwise_is_not_put_there(grown_copy: Path, small_folder: Path, monkeypatch):
    """A teacher of the same name and digest whose code is another: the digest of the manifest tells."""

    def otherwise(self: Any, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {name: said + 1 for name, said in ToyTeacher.__call__(self, pixels).items()}

    (grown_copy / "targets" / "big.logits" / "value" / "c.0.0.0").unlink()
    monkeypatch.setattr(Big, "__call__", otherwise)
    options = {"targets": {"logits": "full(f16)"}, "name": "big", "teacher": Big()}
    before = stamps(grown_copy)
    with pytest.raises(MismatchError, match=r"view 0, block 0 of .* comes out otherwise here"):
        extend(grown_copy, small_folder, **options)
    assert {n for n in before if stamps(grown_copy).get(n) != before[n]} <= {"parts/3/v0000-b000000.json"}


def test_damage_in_another_part_is_told(grown_copy: Path, small_folder: Path, capsys):
    (grown_copy / "targets" / "vector" / "value" / "c.0.0.0").unlink()
    build(grown_copy, small_folder, progress=True)
    assert "files of what extend made are missing or cut" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"targets": ["map=int8"], "name": "BIG"}, "teacher 'BIG' differs from 'big'"),
        ({"targets": ["Vector:embedding=f16"]}, "target 'Vector' differs from 'vector'"),
    ],
)
def test_names_that_differ_in_case_alone_are_refused(
    grown_copy: Path, small_folder: Path, asked: dict[str, Any], told: str
):
    with pytest.raises(SpecError, match=f"the {told} in its case alone"):
        extend(grown_copy, small_folder, **asked)


@pytest.mark.parametrize("damage", [testing.remove, testing.truncate])
@pytest.mark.parametrize("asked", [{"views": 3}, {"targets": ["vector=f16"]}])
def test_a_damaged_cache_is_not_extended(path: Path, small_folder: Path, damage: Any, asked: dict[str, Any]):
    damage(path / "targets" / "map" / "value" / "c.1.0.0.0.0")
    before = stamps(path)
    with pytest.raises(DamageError, match=r"targets/map/value/c\.1\.0\.0\.0\.0: .*Run the build-cache"):
        extend(path, small_folder, **asked)
    assert stamps(path) == before


def test_an_image_that_can_be_read_now_is_refused(path: Path, small_folder: Path):
    """Not the bytes are others, but what they are decoded with."""
    sign(path, lambda v: v.update(invalid=[3]))
    with pytest.raises(SourceError, match="can be read now and could not"):
        extend(path, small_folder, views=3)
    shutil.rmtree(path / "parts")
    with pytest.raises(InvalidRow, match="was unreadable when the cache was built"):
        extend(path, small_folder, targets={"vector": "f16"})
    assert len(sc.open(path).parts) == 1


# -- hostile manifests ------------------------------------------------------------------------------------------------


def sign(path: Path, change: Any) -> None:
    """Change a manifest as an enemy would: every digest is made to fit."""
    value = json.loads((path / m.MANIFEST).read_bytes())
    change(value)
    for number, part in enumerate([value, *value.get("parts", [])]):
        raw = canonical_json(part["identity"])
        part["identity_file"] = {"sha256": digest(raw), "bytes": len(raw)}
        file = path / (f"parts/{number}/identity.json" if number else "receipts/identity.json")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(raw)
    del value["digest"]
    (path / m.MANIFEST).write_bytes(canonical_json(value | {"digest": digest(canonical_json(value))}))


def part(number: int, *keys: Any, to: Any) -> Any:
    def change(value: Any) -> None:
        place = value["parts"][number - 1]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return change


def rename(number: int, old: str, new: str) -> Any:
    def change(value: Any) -> None:
        targets = value["parts"][number - 1]["identity"]["targets"]
        targets[new] = targets.pop(old)

    return change


def first(*keys: Any, to: Any) -> Any:
    def change(value: Any) -> None:
        place = value["identity"]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return change


HOSTILE: dict[str, tuple[Any, str]] = {
    "views that overlap": (part(1, "identity", "grid", "first", to=1), "its views are 1 to 4, after 2"),
    "views with a hole": (part(1, "identity", "grid", "first", to=3), "its views are 3 to 4, after 2"),
    "no views": (part(1, "identity", "grid", "views", to=2), "its views are 2 to 1, after 2"),
    "views of some targets": (
        lambda v: v["parts"][0]["identity"]["targets"].pop("map"),
        "more views are of all targets, and its targets are others",
    ),
    "views by a named teacher": (part(1, "identity", "named", to="big"), "several teachers made them"),
    "fewer views": (part(2, "identity", "grid", "views", to=4), "it has 4 of 5 views"),
    "a target twice": (rename(2, "vector", "logits"), "the target 'logits' is there already"),
    "a target of nobody's name": (
        rename(3, "big.logits", "logits2"),
        "'logits2' is not named after the teacher 'big'",
    ),
    "a target of another's name": (
        rename(2, "vector", "big.vector"),
        "'big' has the name of another one's targets",
    ),
    "another source": (part(2, "identity", "source", "content", to="0" * 64), r"source\.content is"),
    "another order of ids": (part(1, "identity", "source", "ids", to="0" * 64), r"source\.ids is"),
    "other classes": (
        part(3, "identity", "source", "classes", to=["a", "b", "c", "d"]),
        r"source\.classes is",
    ),
    "another seed": (part(1, "identity", "recipe", "seed", to=1), r"recipe\.seed is 0 there and 1 here"),
    "another key": (part(2, "identity", "grid", "key", to=1), "its grid is another"),
    "other blocks": (part(2, "identity", "grid", "block_rows", to=4), "its grid is another"),
    "other samples": (part(2, "identity", "grid", "samples", to=21), "its grid is another"),
    "another teacher of no name": (
        part(2, "identity", "teacher", "weights", to="0" * 64),
        "its teacher is another",
    ),
    "another teacher of a name": (
        part(4, "identity", "teacher", "weights", to="0" * 64),
        "its teacher is another",
    ),
    "a first part of later views": (first("grid", "first", to=1), "it is the first one"),
    "a first part by a name": (first("named", to="big"), "it is the first one"),
    "a constant of part 0": (
        lambda v: v["parts"][2]["constants"].update({"ids/offsets": v["constants"]["ids/offsets"]}),
        "the constant 'ids/offsets' is where no cache has one",
    ),
    "a constant of another part": (
        lambda v: v["parts"][1].update(constants=v["parts"][2]["constants"]),
        "the constant 'parts/3/constants/prior' is where no cache has one",
    ),
    "a first constant in a part": (
        lambda v: v["constants"].update(v["parts"][2]["constants"]),
        "the constant 'parts/3/constants/prior' is where no cache has one",
    ),
}


@pytest.mark.parametrize(("change", "told"), HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_whose_parts_cannot_follow_is_damage(grown_copy: Path, change: Any, told: str):
    sign(grown_copy, change)
    with pytest.raises(DamageError, match=told) as caught:
        sc.open(grown_copy)
    assert "\n" not in str(caught.value)


def test_an_identity_that_is_not_its_own_file_is_damage(grown_copy: Path):
    value = json.loads((grown_copy / m.MANIFEST).read_bytes())
    value["parts"][1]["identity_file"]["sha256"] = "0" * 64
    del value["digest"]
    (grown_copy / m.MANIFEST).write_bytes(canonical_json(value | {"digest": digest(canonical_json(value))}))
    with pytest.raises(DamageError, match="its identity is not the one"):
        sc.open(grown_copy)


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100])
def test_a_damaged_beginning_is_no_part(path: Path, small_folder: Path, content: bytes):
    (path / "parts" / "1").mkdir(parents=True)
    (path / "parts" / "1" / "identity.json").write_bytes(content)
    assert [d.file for d in sc.verify(path)] == ["parts/1/identity.json"]
    with pytest.raises(DamageError, match=r"delete the folder parts/1 and extend again"):
        extend(path, small_folder, views=3)
    assert sc.open(path).read(0, np.arange(3))


# -- real images and networks ------------------------------------------------------------------------------------------


def test_a_real_cache_grows(shared_data: Path, tmp_path: Path):
    pytest.importorskip("torch")
    student = "softcache_train.students:"
    common: dict[str, Any] = {
        "source": shared_data / "cifar10",
        "split": "test",
        "limit": 64,
        "teacher": f"{student}resnet56",
        "weights": shared_data / "weights" / "cifar10_resnet56.safetensors",
        "progress": False,
    }
    made = {"recipe": "crop(32, pad=4)|flip", "batch": 32}
    kept = {"logits": "full(u8)", "layer3": "int8"}
    whole = sc.build(tmp_path / "whole", **common, **made, views=3, targets=kept)
    sc.build(tmp_path / "c", **common, **made, views=1, targets={"logits": "full(u8)"})
    sc.extend(tmp_path / "c", **common, views=3)
    cache = sc.extend(tmp_path / "c", **common, targets={"layer3": "int8"})
    assert shards(cache.path) == shards(whole.path)
    assert cache.report.top1 == pytest.approx(whole.report.top1) and (cache.report.top1 or 0) > 0.85
    assert cache.report.equivariance == whole.report.equivariance
