"""A cache as an HDF5 file and back: h5py alone reads the same values, and the same bytes come back."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache as sc
from softcache.cli import main
from softcache.errors import DamageError, MismatchError, NotBuilt, SpecError, StoreError
from softcache.exchange import hdf5
from softcache.testing import ToyImages, flip_bit, toy_detector, toy_teacher

h5py = pytest.importorskip("h5py")

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.*"))
PLAIN = {"deflate", "shuffle"}
MATLAB = {"float32", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"}  # it has no halves


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def exported(small_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cache as a file. Copy it before you change it."""
    path = tmp_path_factory.mktemp("exported") / "small.h5"
    hdf5.export(sc.open(small_path), path)
    return path


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(exported, tmp_path / "copy.h5"))


# -- the same bytes come back --------------------------------------------------------------------------------


def build(tmp_path: Path, **options: Any) -> Path:
    said = {"source": ToyImages(11), "teacher": toy_teacher(), "recipe": "flip", "block_rows": 4, "batch": 4}
    sc.build(tmp_path / "built", **said | options, progress=False)
    return tmp_path / "built"


SOME: dict[str, dict[str, Any]] = {
    "sparse": {"targets": ["logits=topk(2)"], "views": 2},
    "bits": {"targets": ["logits=packed(16)"]},
    "hard": {"targets": ["logits=argmax", "map=pool(3)|f16", "map.attention=attention"]},
    "ops": {"recipe": "random_resized_crop(8)|color_jitter(brightness=0.4)|mixup", "views": 3},
    "mosaics": {"recipe": "flip|mosaic(8)", "views": 2},
    "items": {
        "teacher": toy_detector(),
        "targets": ["detections=top(3, background=2)", "queries=all", "p3=int8"],
    },
}


@pytest.mark.parametrize("name", SOME)
def test_every_kind_of_cache_comes_back_to_the_last_byte(name: str, tmp_path: Path):
    built = build(tmp_path, **SOME[name])
    hdf5.export(sc.open(built), tmp_path / "a.h5", decoded=True)
    assert hdf5.restore(tmp_path / "a.h5", tmp_path / "back").digest == sc.open(built).digest
    assert files(tmp_path / "back") == files(built)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_caches_of_the_past_do_too(golden: Path, tmp_path: Path):
    hdf5.export(sc.open(golden / "cache"), tmp_path / "a.h5")
    hdf5.restore(tmp_path / "a.h5", tmp_path / "back")
    assert files(tmp_path / "back") == files(golden / "cache")


def test_the_same_cache_is_the_same_file(exported: Path, small_copy: Path, tmp_path: Path):
    hdf5.export(sc.open(small_copy), tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == exported.read_bytes()


def test_many_windows_are_as_one(
    small_path: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("softcache.exchange.hdf5._WINDOW", 3 * 4096)
    hdf5.export(sc.open(small_path), tmp_path / "a.h5")
    hdf5.restore(tmp_path / "a.h5", tmp_path / "back")
    assert files(tmp_path / "back") == files(small_path)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["targets/map/value"].chunks[1] == 2


# -- what others read ----------------------------------------------------------------------------------------


def test_h5py_alone_reads_what_the_cache_says(exported: Path, small_cache: sc.Cache):
    """By what the file says of itself: the formulas are its own attributes'."""
    samples = np.arange(small_cache.samples)
    with h5py.File(exported) as file:
        assert [id.decode() for id in file["ids"]] == list(small_cache.ids)
        assert [name.decode() for name in file["classes"]] == list(small_cache.classes or ())
        assert file["manifest"][()] == (small_cache.path / "softcache.json").read_bytes()
        assert file.attrs["digest"].decode() == small_cache.digest
        logits, maps, vectors = (file[f"targets/{name}"] for name in ("logits", "map", "vector"))
        assert logits.attrs["decode"] == b"low + step * value, one low and one step a row"
        assert maps.attrs["decode"].startswith(b"scale * value")
        assert vectors.attrs["decode"] == b"value"
        columns = file["view/geometry"].attrs["columns"].decode().split(", ")
        for view in range(small_cache.views):
            said = small_cache.read(view, samples)
            low, step = logits["low"][view][:, None], logits["step"][view][:, None]
            np.testing.assert_array_equal(low + step * logits["value"][view], said["logits"].values)
            scale = maps["scale"][view][:, :, None, None]
            np.testing.assert_array_equal(scale * maps["value"][view], said["map"].values)
            np.testing.assert_array_equal(vectors["value"][view], said["vector"].values)
            for row, seen in zip(
                file["view/geometry"][view], small_cache.read_views(view, samples), strict=True
            ):
                told = dict(zip(columns, row.tolist(), strict=True))
                assert told.pop("mirrored") == seen.flip
                assert told == {name: getattr(seen, name) for name in told}


def test_decoded_values_are_those_of_the_cache(small_cache: sc.Cache, tmp_path: Path):
    hdf5.export(small_cache, tmp_path / "a.h5", decoded=True)
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file["decoded"]) == set(small_cache.targets)
        for name, dataset in file["decoded"].items():
            for view in range(small_cache.views):
                said = small_cache.read(view, np.arange(small_cache.samples))[name].values
                np.testing.assert_array_equal(dataset[view], said)


def test_any_hdf5_of_the_last_ten_years_and_matlab_open_it(exported: Path):
    """No filter that is not built in, no type that MATLAB lacks, no strings of varying length, the oldest superblock."""
    seen = []

    def look(name: str, one: Any) -> None:
        if isinstance(one, h5py.Dataset):
            seen.append(name)
            plan = one.id.get_create_plist()
            filters = {plan.get_filter(i)[3].decode() for i in range(plan.get_nfilters())}
            assert filters <= PLAIN, name
            assert one.dtype.kind == "S" or one.dtype.name in MATLAB, (name, one.dtype)
            if one.dtype.kind == "S":
                assert h5py.check_string_dtype(one.dtype).encoding == "utf-8"
        for value in one.attrs.values():
            assert isinstance(value, bytes | np.bytes_)

    with h5py.File(exported) as file:
        file.visititems(look)
        assert file.id.get_create_plist().get_version()[0] == 0
    assert len(seen) > 10


# -- what is refused -----------------------------------------------------------------------------------------


def change(path: Path, name: str, to: Any = None, **made: Any) -> None:
    """Put another dataset into the place of one; without ``to`` there is none any more."""
    with h5py.File(path, "r+") as file:
        del file[name]
        if to is not None or made:
            file.create_dataset(name, data=to, **made)


def other_value(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        file[name][1, -1] = file[name][1, -1] + 1


@pytest.mark.parametrize(
    "name", ["targets/logits/value", "targets/logits/low", "targets/map/value", "view/geometry"]
)
def test_a_value_that_was_changed_is_found_and_named(name: str, copy: Path, tmp_path: Path):
    other_value(copy, name)
    with pytest.raises(DamageError, match=rf"view 1 of '{name}' .* is not what was exported"):
        hdf5.restore(copy, tmp_path / "back")
    assert not (tmp_path / "back" / "softcache.json").exists()


def test_nothing_of_a_refused_file_is_taken_for_a_cache_and_a_good_one_goes_on(
    copy: Path, exported: Path, small_path: Path, tmp_path: Path
):
    other_value(copy, "targets/map/value")
    with pytest.raises(DamageError):
        hdf5.restore(copy, tmp_path / "back")
    hdf5.restore(exported, tmp_path / "back")
    assert files(tmp_path / "back") == files(small_path)


@pytest.mark.parametrize(
    ("name", "to", "error"),
    [
        ("targets/logits/value", None, MismatchError),
        ("targets/logits/value", np.zeros((2, 20, 5), np.uint8), MismatchError),
        ("targets/logits/value", np.zeros((2, 20, 4), np.int16), MismatchError),
        ("targets/logits/value", np.zeros((2, 20, 4), [("a", "u1")]), MismatchError),
        ("manifest", np.arange(4), MismatchError),
        ("files/end", np.full(13, 1 << 60), DamageError),
        ("files/end", np.zeros(13), MismatchError),
        ("files/name", np.array([b"x"] * 13), DamageError),
        ("files/bytes", np.zeros(11865, np.uint8), DamageError),
    ],
)
def test_another_layout_is_refused(name: str, to: Any, error: type[Exception], copy: Path, tmp_path: Path):
    change(copy, name, to)
    with pytest.raises(error, match=r"copy\.h5"):
        hdf5.restore(copy, tmp_path / "back")
    assert not (tmp_path / "back" / "softcache.json").exists()


def test_a_manifest_that_was_edited_is_refused(copy: Path, tmp_path: Path):
    with h5py.File(copy) as file:
        raw = file["manifest"][()]
    change(copy, "manifest", np.bytes_(raw.replace(b'"seed":0', b'"seed":1')))
    with pytest.raises(DamageError, match="was edited"):
        hdf5.restore(copy, tmp_path / "back")


@pytest.mark.parametrize("keep", [0, 8, 100, 2000, -3000, -1])
def test_a_file_that_was_cut_is_damage(keep: int, copy: Path, tmp_path: Path):
    copy.write_bytes(copy.read_bytes()[:keep])
    with pytest.raises((DamageError, SpecError)):
        hdf5.restore(copy, tmp_path / "back")
    assert not (tmp_path / "back" / "softcache.json").exists()


def test_a_damaged_cache_is_not_exported(small_copy: Path, tmp_path: Path):
    flip_bit(next((small_copy / "targets/logits/value").glob("c.1.*")), 7)
    with pytest.raises(DamageError, match="checksum"):
        hdf5.export(sc.open(small_copy), tmp_path / "a.h5")
    assert list(tmp_path.glob("a.h5*")) == []


def test_an_unfinished_cache_is_not_exported(small_copy: Path, tmp_path: Path):
    (small_copy / "softcache.json").unlink()
    with pytest.raises(NotBuilt):
        hdf5.export(sc.open(small_copy), tmp_path / "a.h5")


def test_a_folder_with_something_else_is_left_alone(
    exported: Path, golden_folder: Path, small_cache: sc.Cache, tmp_path: Path
):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(MismatchError, match=r"holds something else, for example 'mine\.txt'"):
        hdf5.restore(exported, tmp_path / "notes")
    before = files(golden_folder)
    both = f"{sc.open(golden_folder).digest}, and this is {small_cache.digest}"
    with pytest.raises(MismatchError, match=f"another cache, {both}"):
        hdf5.restore(exported, golden_folder)
    assert files(golden_folder) == before


@pytest.fixture
def golden_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN[0] / "cache", tmp_path / "golden"))


def test_where_the_disk_has_no_more_nothing_is_left(small_path: Path, tmp_path: Path):
    code = (
        "import resource, signal, sys; import softcache as sc; from softcache.exchange import hdf5\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "try: hdf5.export(sc.open(sys.argv[1]), sys.argv[2])\n"
        "except sc.SoftcacheError as e: sys.exit(f'{type(e).__name__}: {e}')\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(small_path), str(tmp_path / "a.h5")], capture_output=True, text=True
    )
    assert said.returncode == 1 and "StoreError" in said.stderr, said.stderr
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_rows_find_no_room_before_they_are_written(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(fd: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StoreError, match="the disk is full"):
        hdf5.restore(exported, tmp_path / "back")


# -- the commands --------------------------------------------------------------------------------------------


def test_the_commands(small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, back = str(tmp_path / "a.h5"), str(tmp_path / "back")
    assert main(["export", str(small_path), "--to", "hdf5", "-o", file]) == 0
    assert main(["export", str(small_path), "--to", "hdf5", "-o", file]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["import", file, "-o", back]) == 0
    assert main(["import", file, "-o", back]) == 0  # it is there
    assert sc.open(small_path).digest in capsys.readouterr().err
    assert main(["import", file, "-o", back, "--views", "3"]) == 1
    assert "--views" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none.h5"), "-o", back]) == 1
    assert main(["import", __file__, "-o", back]) == 1
    assert "no HDF5, NPZ or NPY file" in capsys.readouterr().err


def test_without_h5py_the_extra_is_named(small_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SpecError, match=r"softcache\[hdf5\]"):
        hdf5.export(sc.open(small_path), tmp_path / "a.h5")
