"""HDF5 and NPZ files that were made to harm: no other file is opened, and nothing is made that the file does not hold."""

from __future__ import annotations

import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import softcache as sc
from softcache.errors import DamageError, MismatchError, SoftcacheError
from softcache.exchange import arrayfile, hdf5

h5py = pytest.importorskip("h5py")


@pytest.fixture
def tripwire(tmp_path: Path) -> Iterator[Path]:
    """A pipe: whoever opens it waits for ever, and is stopped after a while."""
    os.mkfifo(tmp_path / "pipe")

    def tripped(*_: object) -> None:
        raise AssertionError("another file was opened")

    before = signal.signal(signal.SIGALRM, tripped)
    signal.alarm(20)
    yield tmp_path / "pipe"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outward(
    file: h5py.File, name: str, kind: str, to: Path, shape: tuple[int, ...] = (20, 4), dtype: str = "f4"
) -> None:
    """A dataset whose values lie in another file."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if kind == "external link":
        file[name] = h5py.ExternalLink(str(to), "/x")
    elif kind == "soft link":
        file["outside"] = h5py.ExternalLink(str(to), "/")
        file[name] = h5py.SoftLink("/outside/x")
    elif kind == "external storage":
        file.create_dataset(name, shape, dtype, external=[(str(to), 0, size)])
    else:
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource(str(to), "x", shape, dtype)
        file.create_virtual_dataset(name, layout)


KINDS = ["external link", "soft link", "external storage", "virtual"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_file_is_opened_for_arrays(kind: str, tripwire: Path, tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        outward(file, "logits", kind, tripwire)
    with (
        arrayfile.opened(tmp_path / "a.h5") as found,
        pytest.raises(MismatchError, match=r"other files|a link"),
    ):
        found.find("logits")
    with arrayfile.opened(tmp_path / "a.h5") as found, pytest.raises(MismatchError):
        found.find("outside/x" if kind == "soft link" else "nothing/x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["targets/logits/value", "manifest", "files/bytes"])
def test_no_other_file_is_opened_for_an_export(
    name: str, kind: str, tripwire: Path, small_path: Path, tmp_path: Path
):
    sc_file = tmp_path / "a.h5"
    hdf5.export(sc.open(small_path), sc_file)
    with h5py.File(sc_file, "r+") as file:
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        outward(file, name, kind, tripwire, shape or (4,), "u1" if name == "manifest" else dtype.str)
    with pytest.raises(SoftcacheError, match=r"a\.h5"):
        hdf5.restore(sc_file, tmp_path / "back")


@pytest.mark.parametrize(
    "how",
    [
        {"shape": (1 << 40, 1000), "chunks": (1, 1000), "compression": "gzip"},
        {"shape": (1 << 40, 1000), "dtype": "f4"},
        {"shape": (4, 1 << 28), "chunks": (1, 1 << 28), "compression": "gzip"},
        {"shape": (1000, 1000), "chunks": (10, 1000), "fillvalue": 1.0},
    ],
)
def test_what_is_declared_and_not_there_is_no_array(how: dict[str, object], tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", **{"dtype": "f4"} | how)
    with (
        arrayfile.opened(tmp_path / "a.h5") as found,
        pytest.raises(DamageError, match="does not hold as many"),
    ):
        found.find("x")


def test_chunks_that_stand_for_others_are_counted(tmp_path: Path):
    """Two datasets over the same bytes: together they are more than the file."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = np.zeros(100_000, np.uint8)
        file["b"] = file["a"]
    with arrayfile.opened(tmp_path / "a.h5") as found:
        found.find("a")
        with pytest.raises(DamageError):
            found.find("b")


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("scaleoffset", "filter number 6"),
        ("vlen", "varying length"),
        ("reference", "references"),
        ("record", "records"),
    ],
)
def test_odd_types_and_filters(kind: str, match: str, tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if kind == "scaleoffset":
            file.create_dataset("x", data=np.arange(100), chunks=(10,), scaleoffset=0)
        elif kind == "vlen":
            file.create_dataset("x", (3,), h5py.vlen_dtype(np.float32))
        elif kind == "reference":
            file.create_dataset("x", (3,), h5py.ref_dtype)
        else:
            file["x"] = np.zeros(3, [("a", "i4")])
    with arrayfile.opened(tmp_path / "a.h5") as found, pytest.raises(MismatchError, match=match):
        found.find("x")


def test_groups_that_hold_each_other_end(tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for i in range(20):
            file.create_group(f"g{i}")
        for i in range(20):
            for j in range(20):
                file[f"g{i}/h{j}"] = file[f"g{j}"]
    with arrayfile.opened(tmp_path / "a.h5") as found, pytest.raises(MismatchError, match="no datasets"):
        found.find("x")


# -- NPZ -----------------------------------------------------------------------------------------------------


def npy(shape: tuple[int, ...], content: bytes, descr: str = "<f4") -> bytes:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": shape})
    return head.getvalue() + content


def find(path: Path, name: str = "x") -> None:
    with arrayfile.opened(path) as found:
        for _ in found.find(name).pieces():
            pass


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch sprung",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    trap = np.array([Trap()], object)
    np.savez(tmp_path / "a.npz", x=trap)
    np.save(tmp_path / "x.npy", trap)
    for name in ("a.npz", "x.npy"):
        with pytest.raises(MismatchError, match="unpickled"):
            find(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("shape", [(1 << 40,), (5,), (3,), (-4,), (1 << 62, 4)])
def test_an_npz_array_is_as_long_as_it_says(shape: tuple[int, ...], tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(shape, bytes(16)))
    with pytest.raises(DamageError, match=r"declares|no array"):
        find(tmp_path / "a.npz")
    (tmp_path / "x.npy").write_bytes(npy(shape, bytes(16)))
    with pytest.raises(DamageError, match=r"declares|no array"):
        find(tmp_path / "x.npy")


def test_two_members_of_one_name(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x.npy", npy((4,), bytes(16)))
        archive.writestr("x.npy", npy((4,), bytes(16)))
    with pytest.raises(DamageError, match="two arrays of one name, 'x'"):
        find(tmp_path / "a.npz")


@pytest.mark.parametrize("field", [18, 22])  # of the directory: the packed and the full size
def test_sizes_that_were_edited(field: int, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy((4000,), bytes(16000)))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    at = data.rindex(b"PK\x01\x02") + field + 2
    data[at : at + 4] = (1 << 31).to_bytes(4, "little")
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(DamageError):
        find(tmp_path / "a.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_not_read(method: int, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("x.npy", npy((4,), bytes(16)))
    with pytest.raises(MismatchError, match=r"numpy\.savez"):
        find(tmp_path / "a.npz")


# -- any bytes -----------------------------------------------------------------------------------------------

FUZZ = """
import random, resource, shutil, signal, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
import h5py, numcodecs  # which ask for the processor, by a process
import softcache as sc
from softcache.exchange import arrayfile, hdf5
sys.addaudithook(lambda event, args: sys.exit(event) if event in ("os.exec", "os.system", "subprocess.Popen") else None)
folder, digest = Path(sys.argv[1]), sys.argv[2]
for file in sorted(folder.glob("*.h5")) + sorted(folder.glob("*.npz")):
    signal.alarm(30)
    try:
        if file.suffix == ".npz":
            with arrayfile.opened(file) as found:
                for name in found.names:
                    list(found.find(name).pieces())
        else:
            assert hdf5.restore(file, folder / "back").digest == digest
            assert sc.verify(folder / "back", read_data=True) == []
    except sc.SoftcacheError:
        pass
    shutil.rmtree(folder / "back", ignore_errors=True)
print("all")
"""


def test_any_change_is_refused_or_makes_no_difference(small_path: Path, tmp_path: Path):
    """Bits flipped, bytes overwritten and copied, files cut: within 4 GB and in time the same cache, or an error of ours."""
    hdf5.export(sc.open(small_path), tmp_path / "whole.h5")
    np.savez_compressed(tmp_path / "whole.npz", x=np.arange(100.0), y=np.array(["a", "b"]))
    draw, folder = random.Random(0), tmp_path / "changed"
    folder.mkdir()
    for name, count in (("whole.h5", 25), ("whole.npz", 100)):
        whole = (tmp_path / name).read_bytes()
        for i in range(count):
            changed, size = bytearray(whole), len(whole)
            at = draw.choice(
                [draw.randrange(size), draw.randrange(min(size, 4096)), -1 - draw.randrange(min(size, 8192))]
            )
            at %= size
            match draw.randrange(4):
                case 0:
                    changed[at] ^= 1 << draw.randrange(8)
                case 1:
                    changed[at : at + 8] = draw.choice([b"\0", b"\xff"]) * len(changed[at : at + 8])
                case 2:
                    other = draw.randrange(size - 32)
                    changed[at : at + 32] = changed[other : other + len(changed[at : at + 32])]
                case _:
                    del changed[at:]
            (folder / f"{i:03d}{Path(name).suffix}").write_bytes(changed)
    command = [sys.executable, "-c", FUZZ, str(folder), sc.open(small_path).digest]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0 and said.stdout == "all\n", said.stderr[-2000:]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    shutil.rmtree(folder)


def test_a_pipe_holds_nobody_up(tmp_path: Path):
    os.mkfifo(tmp_path / "x.h5")
    with pytest.raises(DamageError, match="is no HDF5 file"):
        hdf5.restore(tmp_path / "x.h5", tmp_path / "out")
