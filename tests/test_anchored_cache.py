"""Caches of ``anchored``: bases are made once, of the first views, and every row is decoded with its own image's."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_crash
from test_extend import BUILD, Big, Interrupted, Interrupting, files, shards, stamps

import softcache as sc
from softcache.codecs.anchored import Anchored, AnchoredLogits
from softcache.errors import DamageError, MismatchError, SpecError, StoreError, TeacherError
from softcache.hostile import sign
from softcache.store import ANCHORS, Store
from softcache.teachers import Options, load
from softcache.testing import (
    CountingDisk,
    FailingDisk,
    ForgetfulDisk,
    ToyImages,
    ToyTeacher,
    make_image_folder,
    remove,
    toy_teacher,
    truncate,
)

SPEC, CODEC = "anchored(1, extra=1, views=2)", Anchored(1, extra=1, views=2)
KEPT = {"logits": SPEC, "vector": "f16"}
TOYS = sc.Source(ToyImages(12))


def build(path: Any, source: Any, **options: Any) -> sc.Cache:
    asked = {"teacher": toy_teacher(), "targets": KEPT, "views": 4, **BUILD}
    return sc.build(path, source=source, **{**asked, **options})


def extend(path: Any, source: Any, **options: Any) -> sc.Cache:
    return sc.extend(path, source=source, **{"teacher": toy_teacher(), "progress": False, **options})


@pytest.fixture(scope="module")
def made(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 samples in blocks of 8, 8 and 4, four views. Copy it before you change it."""
    path = tmp_path_factory.mktemp("anchored") / "cache"
    build(path, small_folder)
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def said(cache: sc.Cache, source: sc.Source, teacher: Any = None) -> np.ndarray:
    """What the teacher says of every view, ``(views, samples, 4)``."""
    size = (teacher or toy_teacher()).input_spec["size"]
    rows = [
        [
            sc.render(source.image(i), view, size)
            for i, view in enumerate(cache.read_views(k, np.arange(cache.samples)))
        ]
        for k in range(cache.views)
    ]
    return np.stack([(teacher or toy_teacher())(np.stack(pixels))["logits"] for pixels in rows])


def same(cache: sc.Cache, logits: np.ndarray, name: str = "logits") -> None:
    """Every row is what the codec makes of it and of its image's first views."""
    every = np.random.default_rng(0).permutation(cache.samples)
    shared = CODEC.anchor(logits[:2])
    for k in range(cache.views):
        expected = CODEC.decode(CODEC.encode(logits[k], shared) | shared, (4,))
        for slab in (True, False):
            found = cache.read(k, every, name, slab=slab)[name]
            assert isinstance(found, AnchoredLogits)
            for part in ("value", "rest", "shift"):
                assert np.array_equal(getattr(found, part), getattr(expected, part)[every])
        assert np.array_equal(cache[cache.ids[3], k][name].log_probs(2), expected.log_probs(2)[3])


def test_every_row_is_decoded_with_its_own_images_base(made: Path, small_folder: Path):
    cache = sc.open(made)
    same(cache, said(cache, sc.Source(small_folder)))
    assert sc.verify(cache, read_data=True) == []
    assert not (made / ANCHORS).exists()
    assert {p: tuple(c.shape) for p, c in cache.constants.items() if p.startswith("anchors/")} == {
        "anchors/0/base": (20, 2), "anchors/0/grid": (20, 5), "anchors/0/list": (20, 1), "anchors/0/listed": (20, 1)
    }  # fmt: skip
    bases = sum((made / f"anchors/0/{f}/c.0.0").stat().st_size for f in ("base", "grid", "list", "listed"))
    assert (
        cache.report.bytes
        == sum(p.stat().st_size for p in [*made.rglob("targets/**/c.*"), *made.rglob("view/**/c.*")]) + bases
    )


def test_zarr_reads_the_bases_in_the_order_of_positions(made: Path):
    zarr = pytest.importorskip("zarr")
    cache = sc.open(made)
    group = zarr.open(str(made), mode="r")
    at = cache.grid.positions(np.arange(20))
    for field, values in cache.beside("logits", at).items():
        assert np.array_equal(group[f"anchors/0/{field}"][:][at], values)


def test_views_that_are_added_later_are_encoded_against_the_same_base(
    made: Path, small_folder: Path, tmp_path: Path
):
    few = build(tmp_path / "few", small_folder, views=2).path
    before = stamps(few)
    cache = extend(few, small_folder, views=4)
    assert all(
        stamp == stamps(few)[n] for n, stamp in before.items() if n.startswith("anchors") and "zarr" not in n
    )
    assert shards(few) == shards(made)
    same(cache, said(cache, sc.Source(small_folder)))
    assert sc.verify(cache, read_data=True) == [] and not (few / ANCHORS).exists()
    damaged = Path(shutil.copytree(few, tmp_path / "damaged"))
    remove(damaged / "targets/logits/tail/c.3.1.0")
    extend(damaged, small_folder, views=4)
    assert files(damaged) == files(few)


def test_a_target_that_is_added_later_has_bases_of_its_own(small_folder: Path, tmp_path: Path):
    path = build(tmp_path / "c", small_folder, targets={"vector": "f16"}).path
    extend(path, small_folder, targets={"logits": SPEC})
    cache = extend(path, small_folder, targets={"logits": SPEC}, name="big", teacher=Big())
    assert "parts/1/anchors/0/base" in cache.constants and "parts/2/anchors/0/base" in cache.constants
    same(cache, said(cache, sc.Source(small_folder)))
    same(cache, said(cache, sc.Source(small_folder), Big()), "big.logits")
    assert sc.verify(cache, read_data=True) == []


def test_a_cache_that_is_being_built_is_read_with_the_bases_that_are_there(
    small_folder: Path, tmp_path: Path, made: Path
):
    whole, seen = sc.open(made), 0
    for after in range(12, 60, 6):
        with pytest.raises(Interrupted):
            build(Interrupting(tmp_path / f"c{after}", after), small_folder)
        cache = sc.open(tmp_path / f"c{after}")
        for k in range(4):
            for sample in range(20):
                try:
                    found = cache.read(k, np.array([sample]), "logits")["logits"]
                except sc.errors.NotBuilt:
                    continue
                seen += 1
                expected = whole.read(k, np.array([sample]), "logits")["logits"]
                assert np.array_equal(found.log_probs(2), expected.log_probs(2))
    assert seen > 50


def test_broken_off_after_any_file_it_ends_with_the_same_bytes(
    made: Path, small_folder: Path, tmp_path: Path
):
    expected, count, root = files(made), len(files(made)), tmp_path / "c"
    for after in range(0, count + 3, 7):  # and the hidden files of three blocks
        with pytest.raises(Interrupted):
            build(Interrupting(root, after), small_folder)
        before = {n: i for n, i in stamps(root).items() if n.startswith("receipts/v")}
        build(root, small_folder)
        assert files(root) == expected
        assert before.items() <= stamps(root).items(), "a committed block was computed again"
        shutil.rmtree(root)


@pytest.fixture
def anchored_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[tuple[Path, tuple[bytes, int]]]:
    """The builds of tests/test_crash.py are of this codec; a folder in memory, and an undisturbed build's outcome."""
    crashing = {**test_crash.SMALL, "targets": {"logits": SPEC}, "views": 3}
    monkeypatch.setattr(test_crash, "SMALL", crashing)
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=memory, prefix="softcache-") as folder:
        disk = CountingDisk()
        sc.build(Store(Path(folder) / "whole", disk), source=TOYS, **crashing)
        yield Path(folder), ((Path(folder) / "whole" / "softcache.json").read_bytes(), disk.operations)


def test_an_error_of_the_disk_is_survived(anchored_crash: Any):
    folder, (manifest, operations) = anchored_crash
    for at in range(1, operations + 1, 7):
        with pytest.raises(StoreError, match="run the same command again"):
            sc.build(Store(folder / "c", FailingDisk(at)), source=TOYS, **test_crash.SMALL)
        test_crash.assert_resumes_to(manifest, folder / "c", TOYS)
        shutil.rmtree(folder / "c")


def test_a_power_loss_is_survived(anchored_crash: Any):
    folder, reference = anchored_crash
    test_crash.lose_power_everywhere(ForgetfulDisk, TOYS, reference, folder, step=9)


def test_without_an_fsync_of_the_bases_the_power_loss_test_fails(anchored_crash: Any):
    class WithoutTheirSync(ForgetfulDisk):
        def keep_folder(self, path: Path) -> None:
            if ANCHORS not in path.parts:
                super().keep_folder(path)

    with pytest.raises((AssertionError, sc.SoftcacheError)):
        test_crash.lose_power_everywhere(WithoutTheirSync, TOYS, anchored_crash[1], anchored_crash[0], step=3)


def test_processes_that_are_killed_end_with_the_same_bytes(tmp_path: Path):
    source = make_image_folder(tmp_path / "images", per_class=8)
    command = [sys.executable, "-m", "softcache.cli", "build", "--source", str(source), "--views", "3"]
    command += ["--recipe", "random_resized_crop(8, scale=(0.08, 0.4))|flip", "--block-rows", "8"]
    command += ["--teacher", "softcache.testing:toy_teacher", "--target", f"logits={SPEC}"]
    toy = test_crash.Build(command, b"", {}, 0.0)
    began = time.monotonic()
    assert toy.start(tmp_path / "whole", tmp_path / "log", delay=0.01).wait() == 0
    toy.seconds = time.monotonic() - began
    toy.manifest = (tmp_path / "whole" / "softcache.json").read_bytes()
    toy.rows = test_crash.rows_of(sc.open(tmp_path / "whole"), sc.Source(source))
    (tmp_path / "killed").mkdir()
    assert test_crash.kill_until_done(toy, tmp_path / "killed", 6, random.Random(0)) >= 6


@pytest.mark.parametrize("world", [2, 3])
def test_builders_that_share_the_blocks_make_the_same_bytes(
    made: Path, small_folder: Path, tmp_path: Path, world: int
):
    import threading

    rows: list[int] = []
    threads = [
        threading.Thread(
            target=lambda r=r: rows.append(
                build(tmp_path / "c", small_folder, rank=r, world=world).teacher_rows
            )
        )
        for r in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(rows) == 80 and files(tmp_path / "c") == files(made)


@pytest.mark.parametrize("damage", [remove, truncate])
@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["anchors/0/grid/c.0.0"], 40),  # of all images two views
        (["targets/logits/tail/c.3.1.0"], 8),
        (["targets/logits/tail/c.1.1.0"], 8),
        (["anchors/0/base/c.0.0", "targets/logits/tail/c.3.1.0"], 48),
        (["files.bin"], 0),
        (["receipts/v0000-b000001.json"], 8),
    ],
)
def test_what_is_missing_or_cut_is_made_anew(
    made: Path, copy: Path, small_folder: Path, names: Any, rows: int, damage: Any
):
    for name in names:
        damage(copy / name)
    assert [d.file for d in sc.verify(copy)] == names
    assert build(copy, small_folder).teacher_rows == rows
    assert files(copy) == files(made)


def test_bases_that_were_deleted_while_building_are_told(small_folder: Path, tmp_path: Path, made: Path):
    root = tmp_path / "c"
    with pytest.raises(Interrupted):
        build(Interrupting(root, 16), small_folder)
    assert list(root.glob("receipts/v*.json"))
    shutil.rmtree(root / ANCHORS)
    with pytest.raises(
        DamageError, match=r"anchors.* is missing.*delete the receipts .*v0000-b00000\d.json to v0001"
    ) as e:
        build(root, small_folder)
    for receipt in root.glob("receipts/v*.json"):
        receipt.unlink()
    assert "run the same command again" in str(e.value)
    build(root, small_folder)
    assert files(root) == files(made)


# -- bases of others ---------------------------------------------------------------------------------------------


def swapped(path: Path, a: int, b: int) -> None:
    """Exchange the bases of two positions, and make every digest right again."""
    cache = sc.open(path)
    for name, one in cache.constants.items():
        if name.startswith("anchors/"):
            array = one.array(name)
            values = cache.constant(name).copy()
            values[[a, b]] = values[[b, a]]
            (path / array.file()).write_bytes(array.encode(values))
    sign(path)


def test_an_image_whose_base_is_anothers_is_found(copy: Path, small_folder: Path):
    sign(copy)
    assert sc.verify(copy, read_data=True) == []
    swapped(copy, 3, 4)
    assert sc.verify(copy) == []
    found = sc.verify(copy, read_data=True)
    assert {(d.target, d.view, d.shard) for d in found} == {("logits", view, 0) for view in range(4)}
    assert "encoded against other bases" in str(found[0])
    swapped(copy, 3, 4)
    swapped(copy, 2, 18)
    found = sc.verify(copy, read_data=True)
    assert {(d.view, d.shard) for d in found} == {(view, shard) for view in range(4) for shard in (0, 2)}


def test_the_living_teacher_finds_it_too(made: Path, copy: Path, small_folder: Path):
    teacher, source = load(toy_teacher(), Options(batch=4)), sc.Source(small_folder)
    good = sc.verify_live(sc.open(made), source, teacher, rows=80, seed=0)
    assert good["logits"]["cache"]["wrong"] == 0
    for a in range(0, 20, 2):
        swapped(copy, a, a + 1)
    assert sc.verify_live(sc.open(copy), source, teacher, rows=80, seed=0)["logits"]["cache"]["wrong"] > 5


@pytest.mark.parametrize("change", ["gone", "shape", "dtype"])
def test_constants_that_are_no_bases_are_damage(copy: Path, change: str):
    def edit(value: dict[str, Any]) -> None:
        one = value["constants"]["anchors/0/grid"]
        if change == "gone":
            del value["constants"]["anchors/0/grid"]
        elif change == "shape":
            one["shape"] = [10, 10]
        else:
            one["dtype"] = "uint16"

    sign(copy, edit)
    with pytest.raises(DamageError, match=r"anchors/0/grid.*float16 \(20, 5\)"):
        sc.open(copy).read(0, np.arange(3))


# -- what is refused -----------------------------------------------------------------------------------------------


def test_fewer_views_than_the_base_is_made_of_are_refused(small_folder: Path, tmp_path: Path):
    with pytest.raises(SpecError, match=r"first 3 views, and there are 2: cache more.*fifteen"):
        build(tmp_path / "c", small_folder, views=2, targets={"logits": "anchored(1, extra=1, views=3)"})
    assert not (tmp_path / "c").exists()
    path = build(tmp_path / "c", small_folder, views=1, targets={"vector": "f16"}).path
    with pytest.raises(SpecError, match="first 2 views, and there are 1"):
        extend(path, small_folder, targets={"logits": SPEC})


def test_more_classes_by_name_than_there_are_is_refused(small_folder: Path, tmp_path: Path):
    with pytest.raises(sc.errors.CodecError, match=r"16 \+ 5 of more classes than that by name.*\(4,\)"):
        build(tmp_path / "c", small_folder, targets={"logits": "anchored"}, views=6)


class Sick(ToyTeacher):
    """Says what is no number of one view of an image."""

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        found = super().__call__(pixels)
        if len(pixels) == 4 and pixels[2].any() and pixels[2].sum() % 5 == 0:
            found["logits"][2, 1] = np.nan
        return found


def test_what_is_no_number_is_refused_with_its_image_and_nothing_of_it_stays(
    small_folder: Path, tmp_path: Path
):
    with pytest.raises(TeacherError, match=r"target 'logits' of the image '.*' is not finite"):
        build(tmp_path / "c", small_folder, teacher=Sick())
    for receipt in (tmp_path / "c").glob("receipts/v*.json"):
        view, block = receipt.stem.split("-")
        assert len(list((tmp_path / "c").glob(f"targets/*/*/c.{int(view[1:])}.{int(block[1:])}.*"))) == 5


def test_unreadable_images_have_no_rows(small_folder: Path, tmp_path: Path):
    source = Path(shutil.copytree(small_folder, tmp_path / "images"))
    victim = sorted(source.rglob("*.png"))[7]
    victim.write_bytes(victim.read_bytes()[:60])
    cache = build(tmp_path / "c", source, skip_corrupt=True)
    assert cache.invalid.tolist() == [7]
    assert np.isfinite(cache.read(3, np.delete(np.arange(20), 7), "logits")["logits"].log_probs()).all()
    assert sc.verify(cache, read_data=True) == []


# -- elsewhere -------------------------------------------------------------------------------------------------------


def read_all(cache: sc.Cache, name: str = "logits") -> np.ndarray:
    return np.stack(
        [cache.read(k, np.arange(cache.samples), name)[name].log_probs(3) for k in range(cache.views)]
    )


@pytest.mark.parametrize("kind", ["webdataset", "hdf5"])
def test_an_export_is_the_cache(made: Path, tmp_path: Path, kind: str):
    out = tmp_path / ("out.h5" if kind == "hdf5" else "out")
    if kind == "hdf5":
        pytest.importorskip("h5py")
        from softcache.exchange import hdf5

        hdf5.export(sc.open(made), out, decoded=True)
        hdf5.restore(out, tmp_path / "again")
    else:
        from softcache.exchange import webdataset

        webdataset.export(sc.open(made), out)
        assert np.array_equal(read_all(sc.open(out)), read_all(sc.open(made)))
        assert sc.verify(out, read_data=True) == []
        webdataset.restore(out, tmp_path / "again")
    assert files(tmp_path / "again") == files(made)


def test_a_part_that_was_pulled_has_the_bases(made: Path, tmp_path: Path):
    remote = str(tmp_path / "remote")
    sc.push(made, remote, "v1", private=True, progress=False)
    part = sc.pull(remote, "v1", tmp_path / "part", targets=["logits"], views=(0, 3), progress=False)
    whole = sc.open(made)
    assert np.array_equal(
        part.read(2, np.arange(20), "logits")["logits"].log_probs(2),
        whole.read(2, np.arange(20), "logits")["logits"].log_probs(2),
    )
    assert sc.verify(part, read_data=True) == []
    streamed = sc.stream(remote, "v1", tmp_path / "streamed", keep=1 << 20)
    assert np.array_equal(read_all(streamed), read_all(whole))


def test_several_caches_are_read_with_the_bases_of_each(tmp_path: Path):
    folders = [make_image_folder(tmp_path / f"images{i}", per_class=3, seed=i) for i in range(2)]
    for path in sorted(folders[1].rglob("*.png")):
        path.rename(path.with_name(f"new-{path.name}"))
    one, two = (build(tmp_path / f"c{i}", folder) for i, folder in enumerate(folders))
    both = sc.open([one.path, two.path])
    assert np.array_equal(read_all(both), np.concatenate([read_all(one), read_all(two)], axis=1))
    other = build(tmp_path / "c2", folders[0], teacher=Big())
    several = sc.open([one.path, other.path])
    assert np.array_equal(read_all(several, "1.logits"), read_all(other))


def test_arrays_of_several_views_are_imported(tmp_path: Path, small_folder: Path):
    from softcache.exchange.foreign import import_arrays

    logits = np.random.default_rng(0).normal(0, 3, (20, 5, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", logits=logits)
    cache = import_arrays(
        tmp_path / "c", tmp_path / "a.npz", source=small_folder, arrays={"logits": "logits"}, ids="order",
        recipe="unknown", targets={"logits": SPEC}, views=5, input_size=8, block_rows=8, progress=False,
    )  # fmt: skip
    same(cache, logits.transpose(1, 0, 2))
    assert sc.verify(cache, read_data=True) == []


def test_plan_counts_the_bases(tmp_path: Path):
    source = make_image_folder(tmp_path / "images", per_class=100)
    asked = {"teacher": toy_teacher(), "recipe": BUILD["recipe"], "targets": {"logits": SPEC}, "views": 6}
    planned = sc.plan(source=source, pilot=64, **asked)
    cache = sc.build(tmp_path / "c", source=source, progress=False, **asked)
    size = sum(p.stat().st_size for p in cache.path.rglob("*") if p.is_file())
    assert planned.predicted_bytes == pytest.approx(size, rel=0.03)
    assert planned.pilot["views"] == 4


def test_another_build_is_refused_naming_the_codec(copy: Path, small_folder: Path):
    with pytest.raises(MismatchError, match=r"targets\.logits\.codec"):
        build(copy, small_folder, targets={**KEPT, "logits": "anchored(1, extra=1, views=3)"})


def test_bases_that_are_cut_while_they_are_read_are_damage(made: Path, tmp_path: Path):
    """In a process of its own: a mapping that is shorter than it was would end it."""
    path = shutil.copytree(made, tmp_path / "cut")
    code = (
        "import sys, pathlib, numpy as np, softcache as sc\n"
        "from softcache.errors import DamageError\n"
        "cache = sc.open(sys.argv[1]); cache.read(0, np.arange(2))\n"
        "for file in pathlib.Path(sys.argv[1]).glob('anchors/*/*/c.*'): open(file, 'wb').close()\n"
        "try: cache.read(0, np.arange(4))\n"
        "except DamageError as e: print(e)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "anchors" in run.stdout, (run.returncode, run.stderr)
